"""The demonstration: real data, a held-out group, every figure and number a user should see."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import scanpy as sc
import scvi

from . import evaluation, plotting
from ._keys import OBSM_W_KEY, OBSM_Z_KEY
from ._model import DISCoVeR
from .data import kang, simulate

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData
    from rich.console import Console


def run_demo(
    folder: Path, held_out: str | None, max_epochs: int | None, seed: int, console: Console
) -> dict[str, pd.DataFrame]:
    """Train with one type's treated cells held out, write all results, return the tables."""
    adata, control, treatment = _load(console)
    types = sorted(adata.obs["cell_type"].astype(str).unique())
    held_out = held_out or types[0]
    if held_out not in types:
        raise ValueError(f"--held-out {held_out!r} is not a cell type; they are {types}.")
    cell_type, condition = (adata.obs[c].astype(str) for c in ("cell_type", "condition"))
    hidden = ((cell_type == held_out) & (condition == treatment)).to_numpy()
    console.print(f"Held out of training: {hidden.sum()} cells, {held_out} under {treatment}.")

    training = adata[~hidden].copy()
    model = _train(training, max_epochs, seed)
    source = (cell_type == held_out) & (condition == control)
    predicted = model.predict_counterfactual(adata[source.to_numpy()].copy(), to=treatment)
    tables = {
        "What the latents carry": evaluation.report(model, training),
        f"{held_out} under {treatment}, never seen in training": _scores(
            predicted, adata, held_out, control, treatment
        ),
    }
    _write(folder, model, training, predicted, adata[hidden], adata[source.to_numpy()], tables)
    return tables


def _load(console: Console) -> tuple[AnnData, str, str]:
    try:
        adata = kang()
    except ConnectionError as error:
        console.print(f"[yellow]Simulated data, not real cells:[/yellow] {error}")
        return simulate(1500, 500, n_types=5), "ctrl", "treat_1"
    console.print(f"Kang 2018, interferon beta: {adata.n_obs} cells x {adata.n_vars} genes.")
    return adata, "ctrl", "stim"


def _train(training: AnnData, max_epochs: int | None, seed: int) -> DISCoVeR:
    scvi.settings.seed = seed
    DISCoVeR.setup_anndata(training, condition_key="condition", labels_key="cell_type")
    model = DISCoVeR(training)
    model.train(max_epochs=max_epochs)
    model.write_latents()
    return model


def _scores(
    predicted: AnnData, adata: AnnData, held_out: str, control: str, treatment: str
) -> pd.DataFrame:
    def counts(cell_type: str, condition: str) -> object:
        obs = adata.obs
        return adata[
            ((obs["cell_type"] == cell_type) & (obs["condition"] == condition)).to_numpy()
        ].X

    others = [t for t in adata.obs["cell_type"].unique() if t != held_out]
    table = evaluation.counterfactual_table(
        predicted.X,
        counts(held_out, treatment),
        counts(held_out, control),
        {t: (counts(t, control), counts(t, treatment)) for t in others},
    )
    return table.rename_axis("method").reset_index()


def _write(
    folder: Path,
    model: DISCoVeR,
    training: AnnData,
    predicted: AnnData,
    treated: AnnData,
    control: AnnData,
    tables: dict[str, pd.DataFrame],
) -> None:
    report, scores = tables.values()
    report.to_csv(folder / "report.csv", index=False)
    scores.to_csv(folder / "counterfactual.csv", index=False)
    for latent, key in (("z", OBSM_Z_KEY), ("w", OBSM_W_KEY)):
        sc.pp.neighbors(training, use_rep=key, random_state=0)
        sc.tl.umap(training, random_state=0)
        training.obsm[f"X_umap_{latent}"] = training.obsm["X_umap"]
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        for ax, column in zip(axes, ("condition", "cell_type"), strict=True):
            plotting.latent_scatter(
                training.obsm["X_umap"], training.obs[column], title=f"{latent}: {column}", ax=ax
            )
        _save(figure, folder / f"umap_{latent}.png")
    training.write_h5ad(folder / "latents.h5ad")
    predicted.write_h5ad(folder / "predicted.h5ad")
    _save_curves(model, folder)
    _save_scatter(predicted, treated, control, folder)


def _save_curves(model: DISCoVeR, folder: Path) -> None:
    metrics = ("reconstruction_loss", "kl_w", "adversary_cross_entropy")
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for ax, metric in zip(axes, metrics, strict=True):
        plotting.training_curves(model.history, metric, ax=ax)
    _save(figure, folder / "training.png")


def _save_scatter(predicted: AnnData, treated: AnnData, control: AnnData, folder: Path) -> None:
    base = evaluation.log_mean_profile(control.X)
    figure, ax = plt.subplots(figsize=(5.5, 5), layout="constrained")
    plotting.counterfactual_scatter(
        evaluation.log_mean_profile(predicted.X) - base,
        evaluation.log_mean_profile(treated.X) - base,
        gene_names=np.asarray(predicted.var_names),
        top=evaluation.top_genes(treated.X, control.X),
        title="held-out cells",
        ax=ax,
    )
    _save(figure, folder / "counterfactual.png")


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)
