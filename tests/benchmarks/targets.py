"""Measure invariance and conservation, beside their baselines.

    DISCOVER_SC_DATA=FOLDER python tests/benchmarks/targets.py PART [--seeds 3]

PART is one of: invariance, variants, composition, cytokines, sizes, second_term. Default
arguments of the package throughout, unless the row says otherwise; each part prints a table.
"""

import argparse
import os
import time
from pathlib import Path
from unittest.mock import patch

import anndata as ad
import numpy as np
import pandas as pd
import scvi

from discover_sc import DISCoVeR, _losses, evaluation
from discover_sc.data import kang, simulate

QUIET = {"enable_progress_bar": False, "accelerator": "cpu"}


def fit(adata, seed, setup=None, model=None):
    scvi.settings.seed = seed
    adata = adata.copy()
    DISCoVeR.setup_anndata(adata, **({"condition_key": "condition"} | (setup or {})))
    fitted = DISCoVeR(adata, **(model or {}))
    fitted.train(**QUIET)
    return fitted


def probes(latent, target):
    return {k: v.mean() for k, v in evaluation.probe_accuracy(latent, target).items()}


def latent_row(model, adata, key="condition"):
    """Probes of z and w for one condition key, beside chance."""
    z, w = (model.get_latent_representation(adata, latent=latent) for latent in ("z", "w"))
    condition = adata.obs[key].astype(str).to_numpy()
    row = {f"{key} from z, {k}": v for k, v in probes(z, condition).items()}
    row["chance"] = evaluation.chance_accuracy(condition)
    row[f"{key} from w"] = probes(w, condition)["logistic"]
    types = adata.obs["cell_type"].astype(str).to_numpy()
    if len(np.unique(types)) > 1:
        row[f"{key} from type alone"] = evaluation.composition_accuracy(condition, types)
        row["type from z"] = probes(z, types)["logistic"]
        row["type NMI"] = evaluation.kmeans_nmi(z, types)
        row["condition NMI (blind)"] = evaluation.kmeans_nmi(z, condition)
    return row


def invariance(seeds):
    adata = kang()
    rows = {}
    for seed in range(seeds):
        for name, options in {"default": {}, "no adversary": {"adversarial_weight": 0.0}}.items():
            rows[name, seed] = latent_row(fit(adata, seed, model=options), adata)
    return pd.DataFrame.from_dict(rows, orient="index")


def variants(seeds):
    adata = kang()
    adata.obs["half"] = np.random.default_rng(0).choice(["a", "b"], adata.n_obs)
    settings = {
        "batch_key=donor": ({"batch_key": "donor"}, {}),
        "zinb": ({}, {"gene_likelihood": "zinb"}),
        "two condition keys": ({"condition_key": ["condition", "donor"]}, {}),
        "conditional": ({"labels_key": "cell_type"}, {"invariance": "conditional"}),
        "adversary_input=reconstruction": ({}, {"adversary_input": "reconstruction"}),
        "adversary_input=z": ({}, {"adversary_input": "z"}),
        "adversary_input=both": ({}, {"adversary_input": "both"}),
        "decoder=linear": ({}, {"decoder": "linear"}),
    }
    rows = {}
    for seed in range(seeds):
        for name, (setup, options) in settings.items():
            model = fit(adata, seed, setup, options)
            rows[name, seed] = latent_row(model, adata)
            if name == "two condition keys":
                rows[name + ": donor", seed] = latent_row(model, adata, "donor")
    return pd.DataFrame.from_dict(rows, orient="index")


def composition(seeds):
    """Two of five types are left out of the treatment: marginal invariance must lose them."""
    full = kang()
    dropped = full.obs["cell_type"].isin(["B cells", "CD8 T cells"])
    adata = full[~(dropped & (full.obs["condition"] == "stim")).to_numpy()].copy()
    balanced = ~adata.obs["cell_type"].isin(["B cells", "CD8 T cells"]).to_numpy()
    rows = {}
    for seed in range(seeds):
        for name in ("marginal", "conditional"):
            model = fit(adata, seed, {"labels_key": "cell_type"}, {"invariance": name})
            z = model.get_latent_representation()
            types = adata.obs["cell_type"].astype(str).to_numpy()
            condition = adata.obs["condition"].astype(str).to_numpy()
            within = probes(z[balanced], condition[balanced])
            rows[name, seed] = {
                "type from z": probes(z, types)["logistic"],
                **{f"condition from z within shared types, {k}": v for k, v in within.items()},
            }
    return pd.DataFrame.from_dict(rows, orient="index")


def cytokines(seeds):
    path = Path(os.environ["DISCOVER_SC_DATA"]) / "cytokines_bcells_small.h5ad"
    adata = ad.read_h5ad(path)
    rows = {("default", s): latent_row(fit(adata, s), adata) for s in range(seeds)}
    return pd.DataFrame.from_dict(rows, orient="index")


def sizes(seeds):
    """Simulations at the ends of what the defaults are meant for; probes on 10,000 cells."""
    settings = {  # cells, genes, conditions
        "300 cells": (300, 300, 2),
        "2 conditions": (10_000, 1_000, 2),
        "5 conditions": (10_000, 1_000, 5),
        "20 conditions": (10_000, 1_000, 20),
        "50 conditions": (10_000, 1_000, 50),
        "10,000 genes": (2_000, 10_000, 2),
        "100,000 cells": (100_000, 1_000, 2),
    }
    rows = {}
    for seed in range(seeds):
        for name, (n_cells, n_genes, n_conditions) in settings.items():
            adata = simulate(n_cells, n_genes, n_conditions=n_conditions, seed=seed)
            start = time.perf_counter()
            model = fit(adata, seed)
            seconds = time.perf_counter() - start
            some = np.random.default_rng(0).permutation(n_cells)[:10_000]
            rows[name, seed] = latent_row(model, adata[some].copy()) | {"training, s": seconds}
            print(name, seed, rows[name, seed], flush=True)
    return pd.DataFrame.from_dict(rows, orient="index")


def second_term(seeds):
    """Without the second adversarial term, and with its full weight on two conditions."""
    settings = {f"{n} conditions, without": (n, np.inf) for n in (5, 20, 50)}
    settings["Kang, full weight"] = (2, 2)
    rows = {}
    for seed in range(seeds):
        for name, (n_conditions, n_of_full_weight) in settings.items():
            if name.startswith("Kang"):
                adata = kang()
            else:
                adata = simulate(10_000, 1_000, n_conditions=n_conditions, seed=seed)
            with patch.object(_losses, "_N_LEVELS_OF_FULL_WEIGHT", n_of_full_weight):
                model = fit(adata, seed)
            accuracy = model.history["adversary_accuracy_train"].iloc[-1, 0]
            rows[name, seed] = latent_row(model, adata) | {"adversary's own": accuracy}
    return pd.DataFrame.from_dict(rows, orient="index")


PARTS = (invariance, variants, composition, cytokines, sizes, second_term)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[p.__name__ for p in PARTS])
    parser.add_argument("--seeds", type=int, default=3, help="seeds to train with")
    arguments = parser.parse_args()
    part = {p.__name__: p for p in PARTS}[arguments.part]
    result = part(arguments.seeds)
    print(f"\n{arguments.part}, {arguments.seeds} seeds")
    print(result.round(3).to_string())
