"""Measure treatment effects on a simulation with known truth: genes, responders, calibration.

    python tests/benchmarks/effects.py [--seeds 3]

1,500 cells of four types, one of which does not respond; default arguments of the package. Beside
the genes stand two tests of observed treated against observed control cells, which the model's
user may not have: Welch's t-test and the rank-sum test, on log1p of counts per 10,000.
"""

import argparse

import numpy as np
import pandas as pd
import scvi
from scipy.stats import false_discovery_control, mannwhitneyu, ttest_ind
from sklearn.metrics import roc_auc_score

from discover_sc import DISCoVeR
from discover_sc.data import simulate

DELTA = 0.25
RESTING = "type_3"
N_SHAMS = 10


def fit(adata, seed):
    scvi.settings.seed = seed
    DISCoVeR.setup_anndata(adata, condition_key="condition", labels_key="cell_type")
    model = DISCoVeR(adata)
    model.train(enable_progress_bar=False, accelerator="cpu")
    return model


def true_lfc(adata, name):
    """Log2 fold change of the mean over the control cells of a type."""
    cells = ((adata.obs["cell_type"] == name) & (adata.obs["condition"] == "ctrl")).to_numpy()
    shared = adata.layers["shared_expression"][cells].astype(float)
    treated = shared * np.exp(adata.uns["type_effects"]["treat_1"][int(name[-1])])
    treated /= treated.sum(axis=1, keepdims=True)
    return np.log2((1e4 * treated.mean(axis=0) + 0.1) / (1e4 * shared.mean(axis=0) + 0.1))


def observed_tests(adata, name):
    """Observed log2 fold change, and p-values of both tests of treated against control cells."""
    counts = adata.X.toarray()
    fractions = 1e4 * counts / counts.sum(axis=1, keepdims=True)
    of_type = (adata.obs["cell_type"] == name).to_numpy()
    sides = [
        fractions[of_type & (adata.obs["condition"] == level).to_numpy()]
        for level in ("ctrl", "treat_1")
    ]
    control, treated = (np.log1p(side) for side in sides)
    lfc = np.log2((sides[1].mean(axis=0) + 0.1) / (sides[0].mean(axis=0) + 0.1))
    return lfc, {
        "t-test": ttest_ind(treated, control, equal_var=False).pvalue,
        "rank-sum test": mannwhitneyu(treated, control).pvalue,
    }


def gene_rows(adata, effect, name):
    """Scores of the ranking and of the calls, of the model and of both tests."""
    truth = np.abs(true_lfc(adata, name)) > DELTA
    effects = adata.uns["type_effects"]["treat_1"]
    planted = effects[int(name[-1])] != 0
    elsewhere = (effects != 0).any(axis=0) & ~planted
    genes = effect.genes[effect.genes["group"] == name].set_index("gene").loc[adata.var_names]
    lfc, p_values = observed_tests(adata, name)
    ranked = {"model": (genes["probability"], genes["fdr"] < 0.05)}
    for test, p in p_values.items():
        called = (false_discovery_control(p) < 0.05) & (np.abs(lfc) > DELTA)
        ranked[test] = (-p, called)
    for method, (score, called) in ranked.items():
        called = np.asarray(called)
        row = {"called": called.sum(), "true": truth.sum()}
        if truth.any():
            row["AUROC, lfc > 0.25"] = roc_auc_score(truth, score)
            row["AUROC, planted"] = roc_auc_score(planted, score)
            row["found"] = called[truth].mean()
            row["false among called"] = np.mean(~truth[called]) if called.any() else 0.0
            row["false, moved in another type"] = np.mean((~truth & elsewhere)[called])
        yield method, row


def measure(seed):
    adata = simulate(1500, 300, unresponsive=[RESTING], seed=seed)
    model = fit(adata, seed)
    source = adata[(adata.obs["condition"] == "ctrl").to_numpy()].copy()
    effect = model.treatment_effect(source, to="treat_1", from_="ctrl", by_group=True)
    genes = {
        (method, "resting" if name == RESTING else "responding", name, seed): row
        for name in adata.obs["cell_type"].cat.categories
        for method, row in gene_rows(adata, effect, name)
    }
    cells, responds = effect.cells, effect.cells["group"] != RESTING
    row = {"AUROC of score": roc_auc_score(responds, cells["responder_score"])}
    for name, chosen in (("responding", responds), ("resting", ~responds)):
        some = cells[chosen]
        row[f"{name}: score"] = some["responder_score"].mean()
        row[f"{name}: p < .05"] = (some["p_value"] < 0.05).mean()
        row[f"{name}: effect w"] = some["effect_w"].mean()
        row[f"{name}: sham w"] = some["sham_w"].mean()
        row[f"{name}: effect lfc"] = some["effect_expression"].mean()
        row[f"{name}: sham lfc"] = some["sham_expression"].mean()
    shams = [
        model.treatment_effect(source, to="ctrl", from_="ctrl", by_group=True, seed=s)
        for s in range(N_SHAMS)
    ]
    calibration = {
        f"p < {level}": np.mean([(sham.cells["p_value"] < level).mean() for sham in shams])
        for level in (0.01, 0.05, 0.1)
    }
    calibration["score"] = np.mean([sham.cells["responder_score"].mean() for sham in shams])
    calibration["genes called"] = np.mean([(s.genes["fdr"] < 0.05).mean() for s in shams])
    return genes, row, calibration


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    genes, cells, shams = {}, {}, {}
    for seed in seeds:
        of_genes, cells[seed], shams[seed] = measure(seed)
        genes |= of_genes
    genes = pd.DataFrame.from_dict(genes, orient="index")
    genes.index.names = ["method", "types", "type", "seed"]
    genes = genes.sort_index()
    print("\ngenes, means over types and seeds")
    print(genes.groupby(["types", "method"]).mean().round(3).to_string())
    print("\nmodel by seed, responding types")
    print(genes.loc["model", "responding"].groupby("seed").mean().round(3).to_string())
    print("\ncells, by seed")
    print(pd.DataFrame(cells).round(3).to_string())
    print(f"\ncontrol against control, means over {N_SHAMS} shams, by seed")
    print(pd.DataFrame(shams).round(4).to_string())
