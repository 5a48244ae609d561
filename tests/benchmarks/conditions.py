"""Measure what was never registered: combinations, described treatments, doses, new treatments.

    DISCOVER_SC_DATA=FOLDER python tests/benchmarks/conditions.py PART [--seeds 3]

PART is one of: combinations, shalek, embedding, dose, new_treatment, sciplex. Default arguments of
the package throughout, unless the row says otherwise; each part prints its table beside the
baselines. All scores compare log fold changes of mean profiles (log1p of the mean of counts per
10,000) with those of cells that neither the model nor a baseline has seen.
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
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

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


def coverage_of(predicted, truth):
    """Return the share of genes whose true mean lies in the interval, averaged over types."""
    if "discover_mean_lower" not in predicted.varm:
        return {}  # observed cells
    if predicted.varm["discover_mean_lower"].isna().all(axis=None):
        return {}  # no interval is given
    covered = []
    for cell_type in np.unique(truth.obs["cell_type"]):
        lower, upper = (
            predicted.varm[f"discover_mean_{end}"][cell_type].to_numpy()
            for end in ("lower", "upper")
        )
        profile = log_mean_profile(of(truth, cell_type=cell_type).X)
        covered.append(((lower <= profile) & (profile <= upper)).mean())
    return {"coverage": np.mean(covered)}


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
    return table[["lfc R2", "lfc Pearson", "coverage"]].mean()


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
    truth = {level: world.cells(effect(level), 400) for level in unseen}
    base = log_mean_profile(control.X)
    changes = {name: log_mean_profile(cells[name].X) - base for name in names}
    for measured in (0, 9):
        kept = [*names, *every[:measured]]
        training = joined([control, *(cells[name] for name in kept)])
        model = fit(training, seed, labels_key="cell_type")
        source = of(model.adata, condition="ctrl")
        for level in unseen:
            parts = level.split("+")
            about = {"pairs measured": measured, "parts": len(parts)}
            true = log_mean_profile(truth[level].X)
            additive = additive_shift(base, {p: changes[p] for p in parts})
            yield about | {"method": "additive"} | lfc_scores(additive, true, base)
            for method in METHODS:
                predicted = model.predict_counterfactual(source, to=level, method=method)
                scores = lfc_scores(log_mean_profile(predicted.X), true, base)
                coverage = coverage_of(predicted, truth[level]) if method == "auto" else {}
                yield about | {"method": method} | scores | coverage


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
        rows |= _from_other_controls(training, profiles, seed)
    table = pd.DataFrame.from_dict(rows, orient="index")
    print(table.round(3).to_string())
    return table.groupby(level=0).mean()


def _from_other_controls(training, profiles, seed):
    """Predictions read one half of the control cells, the change is seen against the other.

    Otherwise the noise of the control profile stands in the predicted change and in the true one.
    Each half in turn; the network has not seen the other one.
    """
    control = np.flatnonzero((training.obs["condition"] == "Unstimulated").to_numpy())
    halves = np.array_split(np.random.default_rng(seed).permutation(control), 2)
    rows = {}
    for k, other_cells in enumerate(halves):
        model = fit(training[np.setdiff1d(np.arange(training.n_obs), other_cells)], seed)
        source = of(model.adata, condition="Unstimulated")
        predicted = model.predict_counterfactual(source, to="PAM+PIC")
        one, other = log_mean_profile(source.X), log_mean_profile(training.X[other_cells])
        changes = {part: profiles[part] - one for part in ("PAM", "PIC")}
        ends = {
            "auto": log_mean_profile(predicted.X),
            "additive": additive_shift(one, changes),
            **{f"{part} alone": profiles[part] for part in changes},
        }
        for name, end in ends.items():
            scores = lfc_scores(other + end - one, profiles["LPS"], other)
            rows[f"{name}, other control cells", 2 * seed + k] = scores
    return rows


def embedding(seeds):
    """32 treatments whose effects follow from 16 features; a quarter never seen."""
    rows = {}
    for seed in range(seeds):
        for kind in ("linear", "classes", "interacting"):
            for name, scores in _embedding(seed, kind).items():
                rows[kind, name, seed] = scores
    table = pd.DataFrame.from_dict(rows, orient="index")
    print(table.round(3).to_string())
    return table.groupby(level=[0, 1], sort=False).mean()


def _embedding(seed, kind):
    """Return the scores of each method in one world, means over the treatments never seen."""
    world = World(seed)
    loadings = world.effects(8, fraction=0.2, scale=0.5)
    table, strength = _described(world.rng, kind)
    effects = dict(zip(table.index, strength @ loadings, strict=True))
    sizes = {"ctrl": 300}
    adata = joined([world.cells(e, sizes.get(n, 60), condition=n) for n, e in effects.items()])
    adata.uns["drugs"] = table
    held_out = list(world.rng.choice(table.index[1:], 8, replace=False))
    truth = {n: world.cells(effects[n], 400) for n in held_out}
    base = log_mean_profile(of(adata, condition="ctrl").X)
    predicted = _from_descriptions(adata, held_out, seed, with_others=kind == "linear")
    profiles = {
        name: {n: log_mean_profile(cells.X) for n, cells in each.items()}
        for name, each in predicted.items()
    }
    scores = {}
    for name, each in (profiles | _without_network(adata, held_out)).items():
        of_levels = [
            lfc_scores(each[n], log_mean_profile(truth[n].X), base)
            | (coverage_of(predicted[name][n], truth[n]) if name in predicted else {})
            for n in held_out
        ]
        scores[name] = pd.DataFrame(of_levels).mean()
    return scores


def _described(rng, kind):
    """Draw the features of a control and 32 treatments, and how strongly each moves 8 programs."""
    names = ["ctrl", *(f"drug_{k}" for k in range(32))]
    features = rng.normal(size=(33, 16))
    if kind == "classes":  # five of them, alike in features and in effects
        its_class = rng.integers(0, 5, 33)
        features = rng.normal(size=(5, 16))[its_class] + 0.3 * features
        strength = rng.normal(size=(5, 8))[its_class] + 0.3 * rng.normal(size=(33, 8))
    else:
        strength = features[:, :8].copy()
    if kind == "interacting":  # a feature saturates, and the next one switches it
        switch = np.where(np.roll(strength, 1, axis=1) > 0, 1.4, 0.3)
        strength = np.tanh(2 * strength) * switch
    features[0], strength[0] = 0.0, 0.0
    return pd.DataFrame(features, names, [f"feature_{k}" for k in range(16)]), strength


def _from_descriptions(adata, held_out, seed, with_others):
    """Return the predicted cells of each held-out level, by what the model was told and saw."""
    setup = {"labels_key": "cell_type", "condition_embedding": "drugs"}
    table = adata.uns["drugs"]
    training = adata[~adata.obs["condition"].isin(held_out).to_numpy()].copy()
    source = of(adata, condition="ctrl")

    def predicted(model, rows, method="auto"):
        targets = {n: n if rows is None else rows.loc[[n]] for n in held_out}
        return {
            n: model.predict_counterfactual(source, to=to, method=method)
            for n, to in targets.items()
        }

    told = fit(training, seed, **setup)
    cells = {
        "auto": predicted(told, table),
        "abduction": predicted(told, table, "abduction"),
        "their own cells": {n: of(adata, condition=n) for n in held_out},
    }
    if not with_others:
        return cells
    shuffled = table.copy()
    shuffled.iloc[1:] = np.roll(table.iloc[1:].to_numpy(), 1, axis=0)
    training.uns["drugs"] = shuffled
    return cells | {
        "model that saw them": predicted(fit(adata, seed, **setup), None),
        "auto, shuffled": predicted(fit(training, seed, **setup), shuffled),
    }


def _without_network(adata, held_out):
    """Return profiles that need no network: ridge regression on the features, and the mean."""
    table = adata.uns["drugs"]
    base = log_mean_profile(of(adata, condition="ctrl").X)
    seen = [n for n in table.index[1:] if n not in held_out]
    changes = np.stack([log_mean_profile(of(adata, condition=n).X) for n in seen]) - base
    ridge = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 4, 25)))
    predicted = ridge.fit(table.loc[seen], changes).predict(table.loc[held_out])
    return {
        "ridge regression": dict(zip(held_out, base + predicted, strict=True)),
        "mean of seen treatments": dict.fromkeys(held_out, base + changes.mean(axis=0)),
    }


def dose(seeds):
    """4 treatments with Hill responses at 0.1, 1, 10, 100; predicted at 0.3, 3 and 30."""
    rows, covered = [], []
    for seed in range(seeds):
        world = World(seed)
        effects = world.effects(4, fraction=0.2, scale=1.2)
        half = 10 ** world.rng.uniform(-0.5, 1.5, 4)
        slope = world.rng.uniform(0.8, 2.0, 4)

        def effect(k, d, effects=effects, half=half, slope=slope):
            return effects[k] * d ** slope[k] / (d ** slope[k] + half[k] ** slope[k])

        measured = (0.1, 1.0, 10.0, 100.0)
        parts = [world.cells(np.zeros(300), 300, condition="ctrl", dose=0.0)]
        for k in range(4):
            for d in measured:
                parts.append(world.cells(effect(k, d), 60, condition=f"drug_{k}", dose=d))
        model = fit(joined(parts), seed, labels_key="cell_type", dose_key="dose")
        source = of(model.adata, condition="ctrl")
        for k in range(4):
            name = f"drug_{k}"
            observed = {
                d: log_mean_profile(of(model.adata, condition=name, dose=d).X) for d in measured
            }
            for d in (0.3, 3.0, 30.0):
                truth = world.cells(effect(k, d), 2000)
                true = log_mean_profile(truth.X)
                low, high = max(m for m in measured if m < d), min(m for m in measured if m > d)
                nearest = low if d / low < high / d else high
                profiles = {
                    "nearest dose": observed[nearest],
                    "mean of both neighbours": (observed[low] + observed[high]) / 2,
                }
                for method in METHODS:
                    predicted = model.predict_counterfactual(source, to=name, dose=d, method=method)
                    profiles[method] = log_mean_profile(predicted.X)
                    if method == "auto":
                        covered.append(coverage_of(predicted, truth)["coverage"])
                for method, profile in profiles.items():
                    error = np.abs(profile - true).mean()
                    rows.append({"seed": seed, "dose": d, "method": method, "error": error})
    print(f"coverage of auto's intervals: {np.mean(covered):.3f}")
    table = pd.DataFrame(rows)
    return table.pivot_table(index="method", columns="dose", values="error", margins=True)


def new_treatment(seeds):
    """A treatment learned from 20 cells of one type, predicted for the other types."""
    rows = {}
    for seed in range(seeds):
        for name in ("of known pathways", "independent"):
            world = World(seed, n_types=5)
            effects = world.effects(9, fraction=0.15, scale=1.0)
            if name == "of known pathways":
                pathways = world.effects(5, fraction=0.2, scale=0.8)
                effects = world.rng.normal(0, 0.8, (9, 5)) @ pathways
            control = world.cells(np.zeros(300), 600, condition="ctrl")
            treated = [
                world.cells(e, 200, condition=f"drug_{k}") for k, e in enumerate(effects[1:])
            ]
            model = fit(joined([control, *treated]), seed, labels_key="cell_type")
            few = world.cells(effects[0], 20, types=[0], condition="new")
            model.add_condition(few)
            one = of(model.adata, condition="ctrl", cell_type="type_0")
            change = log_mean_profile(few.X) - log_mean_profile(one.X)
            for k in range(1, 5):
                source = of(model.adata, condition="ctrl", cell_type=f"type_{k}")
                truth = world.cells(effects[0], 400, types=[k])
                base, true = log_mean_profile(source.X), log_mean_profile(truth.X)
                profiles = {
                    "no change": base,
                    "the 20 cells' change": np.clip(base + change, 0, None),
                }
                for method in METHODS:
                    predicted = model.predict_counterfactual(source, to="new", method=method)
                    profiles[method] = log_mean_profile(predicted.X)
                    if method == "auto":
                        coverage = coverage_of(predicted, truth)
                r2 = {m: lfc_scores(p, true, base)["lfc R2"] for m, p in profiles.items()}
                ceiling = evaluation.split_half_ceiling(truth.X, source.X)["lfc_r2"]
                better = max(r2["no change"], r2["the 20 cells' change"])
                for method, value in (r2 | {"ceiling": ceiling}).items():
                    score = (value - better) / (ceiling - better)
                    rows[name, method, seed, k] = {"lfc R2": value, "score": score}
                rows[name, "auto", seed, k] |= coverage
    table = pd.DataFrame.from_dict(rows, orient="index")
    print(table.groupby(level=[0, 1, 2], sort=False).mean().round(3).to_string())
    return table.groupby(level=[0, 1], sort=False).mean()


def sciplex(seeds):
    """Dexamethasone on A549, 30 counts per cell: each middle dose held out in turn."""
    full = ad.read_h5ad(Path(os.environ["DISCOVER_SC_DATA"]) / "sciplex2_a549_dex_small.h5ad")
    rows = {}
    for seed in range(seeds):
        for d in (1.0, 10.0):
            training = full[(full.obs["dose"] != d).to_numpy()].copy()
            model = fit(training, seed, condition_key="treatment", dose_key="dose")
            source = of(model.adata, treatment="vehicle")
            true, base = (log_mean_profile(of(full, dose=x).X) for x in (d, 0.0))
            predicted = model.predict_counterfactual(source, to="Dex", dose=d)
            near = {1.0: 0.5, 10.0: 5.0}[d]
            profiles = {
                "auto": log_mean_profile(predicted.X),
                "nearest dose": log_mean_profile(of(full, dose=near).X),
                "no change": base,
            }
            for method, profile in profiles.items():
                error = np.abs(profile - true).mean()
                rows[method, d, seed] = {"error": error} | lfc_scores(profile, true, base)
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.groupby(level=[0, 1], sort=False).mean()


PARTS = (combinations, shalek, embedding, dose, new_treatment, sciplex)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[p.__name__ for p in PARTS])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    part = {p.__name__: p for p in PARTS}[arguments.part]
    result = part(arguments.seeds)
    print(f"\n{arguments.part}, {arguments.seeds} seeds")
    print(result.round(3).to_string())
