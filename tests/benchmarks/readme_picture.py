"""Draw the picture of the README.

DISCOVER_SC_DATA=FOLDER python tests/benchmarks/readme_picture.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import scanpy as sc
import scvi

from discover_sc import DISCoVeR
from discover_sc.data import kang
from discover_sc.plotting import latent_scatter

adata = kang()
scvi.settings.seed = 0
DISCoVeR.setup_anndata(adata, condition_key="condition")
model = DISCoVeR(adata)
model.train(enable_progress_bar=False)
model.write_latents()

figure, axes = plt.subplots(2, 2, figsize=(9.5, 7), layout="constrained")
for row, latent in zip(axes, ("z", "w"), strict=True):
    sc.pp.neighbors(adata, use_rep=f"X_discover_{latent}", random_state=0)
    sc.tl.umap(adata, random_state=0)
    for ax, column in zip(row, ("condition", "cell_type"), strict=True):
        title = f"{latent}, by {column.replace('_', ' ')}"
        latent_scatter(adata.obsm["X_umap"], adata.obs[column], title=title, ax=ax)
figure.savefig(Path(__file__).parents[2] / "docs" / "_static" / "latents.png", dpi=110)
