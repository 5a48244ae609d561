"""Measure what was never registered: combinations, described treatments, doses, new treatments.

    DISCOVER_SC_DATA=FOLDER python tests/benchmarks/conditions.py PART [--seeds 3]

PART is one of: combinations, shalek. Default arguments of the package throughout, unless the row
says otherwise; each part prints its table beside the baselines. All scores compare log fold
changes of mean profiles (log1p of the mean of counts per 10,000) with those of cells that neither
the model nor a baseline has seen.
"""

import argparse
import os
from itertools import combinations as pairs_of
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import scvi
from sklearn.metrics import r2_score

from discover_sc import DISCoVeR, evaluation
from discover_sc.evaluation import additive_shift, log_mean_profile

QUIET = {"enable_progress_bar": False, "accelerator": "cpu"}


def fit(adata, seed, **setup):
    scvi.settings.seed = seed
    adata = adata.copy()
    DISCoVeR.setup_anndata(adata, **({"condition_key": "condition"} | setup))
    model = DISCoVeR(adata)
    model.train(**QUIET)
    return model


def of(adata, **levels):
    """Cells with these levels of columns of ``.obs``."""
    mask = np.full(adata.n_obs, True)
    for column, level in levels.items():
        mask &= (adata.obs[column] == level).to_numpy()
    return adata[mask].copy()


class World:
    """Cells of a few types; a treatment adds a vector to the log expression, scaled by type."""

    def __init__(self, seed, n_genes=300, n_types=3):
        self.rng = np.random.default_rng(seed)
        sparse = self.rng.random((n_types, n_genes)) < 0.3
        self.base = self.rng.normal(0, 1.2, n_genes) + sparse * self.rng.normal(
            0, 1.0, (n_types, n_genes)
        )
        self.programs = self.rng.normal(0, 0.3, (4, n_genes)) * (
            self.rng.random((4, n_genes)) < 0.3
        )
        self.sensitivity = self.rng.uniform(0.7, 1.3, n_types)
        self.theta = 3.0 * self.rng.lognormal(0, 0.3, n_genes)

    def effects(self, n, fraction=0.15, scale=1.0):
        """Draw sparse effects, (n, n_genes)."""
        shape = (n, len(self.theta))
        return self.rng.normal(0, scale, shape) * (self.rng.random(shape) < fraction)

    def cells(self, effect, n, types=None, **obs):
        """Draw cells under an effect of shape (n_genes,)."""
        types = range(len(self.base)) if types is None else types
        t = self.rng.choice(list(types), n)
        log = self.base[t] + self.rng.normal(size=(n, 4)) @ self.programs
        log += self.sensitivity[t][:, None] * effect
        fractions = np.exp(log) / np.exp(log).sum(axis=1, keepdims=True)
        library = 2000 * self.rng.lognormal(0, 0.4, (n, 1))
        noise = self.rng.gamma(self.theta, 1 / self.theta, fractions.shape)
        counts = sp.csr_matrix(self.rng.poisson(library * fractions * noise).astype("float32"))
        obs = pd.DataFrame({"cell_type": [f"type_{k}" for k in t]} | obs, index=range(n))
        return ad.AnnData(counts, obs.set_index(obs.index.astype(str)))


def joined(parts):
    adata = ad.concat(parts, index_unique="-", keys=[str(k) for k in range(len(parts))])
    adata.obs = adata.obs.astype({"condition": "category", "cell_type": "category"})
    return adata


def lfc_scores(predicted, true, control):
    change, true_change = predicted - control, true - control
    return {
        "lfc R2": r2_score(true_change, change),
        "lfc Pearson": evaluation.change_pearson(change, true_change),
    }


METHODS = ("auto", "abduction", "prior", "shift", "neighbors", "groups", "linear")


def combinations(seeds):
    """8 parts; singles, a third of the pairs measured; other pairs and some triples predicted."""
    rows = {}
    for seed in range(seeds):
        for interaction in ("additive", "saturating"):
            for scores in _combinations(seed, interaction):
                rows[interaction, seed, len(rows)] = scores
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis(["world", "seed", "case"])
    table = table.reset_index().groupby(["world", "pairs measured", "parts", "method"])
    return table[["lfc R2", "lfc Pearson"]].mean()


def _combinations(seed, interaction):
    """Parts switch pathways on; a pathway's activity is their sum, or saturates at 1."""
    world = World(seed)
    pathways = world.effects(5, fraction=0.2, scale=0.8)
    strength = world.rng.uniform(0.4, 1.2, (8, 5)) * (world.rng.random((8, 5)) < 0.45)
    names = list("ABCDEFGH")

    def effect(level):
        total = sum(strength[names.index(part)] for part in level.split("+"))
        return (np.tanh(1.5 * total) if interaction == "saturating" else total) @ pathways

    every = ["+".join(pair) for pair in pairs_of(names, 2)]
    world.rng.shuffle(every)
    triples = ["+".join(t) for t in pairs_of(names, 3)]
    world.rng.shuffle(triples)
    control = world.cells(np.zeros(300), 300, condition="ctrl")
    cells = {name: world.cells(effect(name), 120, condition=name) for name in [*names, *every[:9]]}
    unseen = every[9:19] + triples[:6]
    truth = {level: log_mean_profile(world.cells(effect(level), 400).X) for level in unseen}
    base = log_mean_profile(control.X)
    changes = {name: log_mean_profile(cells[name].X) - base for name in names}
    for measured in (0, 9):
        kept = [*names, *every[:measured]]
        training = joined([control, *(cells[name] for name in kept)])
        model = fit(training, seed, labels_key="cell_type")
        source = of(model.adata, condition="ctrl")
        for level in unseen:
            parts = level.split("+")
            profiles = {"additive": additive_shift(base, {p: changes[p] for p in parts})}
            for method in METHODS:
                predicted = model.predict_counterfactual(source, to=level, method=method)
                profiles[method] = log_mean_profile(predicted.X)
            for method, profile in profiles.items():
                about = {"pairs measured": measured, "parts": len(parts), "method": method}
                yield about | lfc_scores(profile, truth[level], base)


def shalek(seeds):
    """LPS triggers what PAM and PIC trigger one each: predicted as PAM+PIC, never seen."""
    adata = ad.read_h5ad(Path(os.environ["DISCOVER_SC_DATA"]) / "shalek_bmdc_small.h5ad")
    training = adata[(adata.obs["condition"] != "LPS").to_numpy()].copy()
    training.obs["condition"] = training.obs["condition"].astype(str)
    profiles = {c: log_mean_profile(of(adata, condition=c).X) for c in adata.obs["condition"]}
    base, true = profiles["Unstimulated"], profiles["LPS"]
    changes = {part: profiles[part] - base for part in ("PAM", "PIC")}
    rows = {("additive", 0): lfc_scores(additive_shift(base, changes), true, base)}
    for part in changes:
        rows[f"{part} alone", 0] = lfc_scores(profiles[part], true, base)
    halves = evaluation.split_half_ceiling(
        of(adata, condition="LPS").X, of(adata, condition="Unstimulated").X
    )
    rows["split-half ceiling", 0] = {
        "lfc R2": halves["lfc_r2"],
        "lfc Pearson": halves["lfc_pearson"],
    }
    for seed in range(seeds):
        model = fit(training, seed)
        source = of(model.adata, condition="Unstimulated")
        for method in METHODS:
            predicted = model.predict_counterfactual(source, to="PAM+PIC", method=method)
            rows[method, seed] = lfc_scores(log_mean_profile(predicted.X), true, base)
    table = pd.DataFrame.from_dict(rows, orient="index")
    print(table.round(3).to_string())
    return table.groupby(level=0).mean()


PARTS = (combinations, shalek)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[p.__name__ for p in PARTS])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    part = {p.__name__: p for p in PARTS}[arguments.part]
    result = part(arguments.seeds)
    print(f"\n{arguments.part}, {arguments.seeds} seeds")
    print(result.round(3).to_string())
