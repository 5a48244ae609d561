"""Hold out 30 % of the pairs of 6 cell types and 8 treatments of a simulation, and predict them.

    python tests/benchmarks/pairs.py [--seeds 3]

A treatment switches on a few of six pathways, and cell types hold different amounts of each
pathway's receptor: what a type does under a treatment follows from what it does under others and
from what other types do under this one. One model per seed, default arguments; every pair that was
held out is compared with 200 cells that neither the model nor a baseline has seen. Prints means
over the pairs, beside the baselines and the split-half ceiling.
"""

import argparse
from itertools import product

import numpy as np
import pandas as pd
from conditions import World, fit, joined, of

from discover_sc.evaluation import counterfactual_table, gap_closed

N_TYPES, N_TREATMENTS, N_PATHWAYS = 6, 8, 6
METHODS = ("auto", "abduction", "neighbors", "groups", "shift", "prior")


class Receptors(World):
    """Cell types that hold different amounts of the receptor of each pathway."""

    def __init__(self, seed):
        super().__init__(seed, n_genes=500, n_types=N_TYPES)
        pathways = self.effects(N_PATHWAYS, fraction=0.2, scale=0.8)
        receptors = self.rng.uniform(0.2, 1.5, (N_TYPES, 1, N_PATHWAYS))
        uses = self.rng.random((N_TREATMENTS, N_PATHWAYS)) < 0.4
        uses[np.arange(N_TREATMENTS), self.rng.integers(N_PATHWAYS, size=N_TREATMENTS)] = True
        self.effect = (receptors * uses * self.rng.uniform(0.5, 1.5, uses.shape)) @ pathways
        self.sensitivity[:] = 1.0  # receptors stand for it

    def pair(self, cell_type, treatment, n):
        """Draw n cells of a type under a treatment, or under none."""
        effect = 0.0 if treatment is None else self.effect[cell_type, treatment]
        condition = "ctrl" if treatment is None else f"drug_{treatment}"
        return self.cells(effect, n, types=[cell_type], condition=condition)


def held_out_pairs(rng):
    """Draw 30 % of the pairs; at least three types stay under each treatment."""
    pairs = list(product(range(N_TYPES), range(N_TREATMENTS)))
    n_held_out, chosen = round(0.3 * len(pairs)), []
    for k in rng.permutation(len(pairs)):
        if sum(t == pairs[k][1] for _, t in chosen) < N_TYPES - 3:
            chosen.append(pairs[k])
        if len(chosen) == n_held_out:
            return chosen
    raise RuntimeError("no choice of pairs leaves three types under each treatment")


def run(seed):
    """Return the scores of each method for each held-out pair."""
    world = Receptors(seed)
    hidden = held_out_pairs(world.rng)
    parts = [world.pair(t, None, 100) for t in range(N_TYPES)]
    seen = [p for p in product(range(N_TYPES), range(N_TREATMENTS)) if p not in hidden]
    model = fit(joined(parts + [world.pair(*p, 60) for p in seen]), seed, labels_key="cell_type")
    control = {t: of(model.adata, condition="ctrl", cell_type=f"type_{t}") for t in range(N_TYPES)}
    rows = []
    for cell_type, treatment in hidden:
        truth, name = world.pair(cell_type, treatment, 200), f"drug_{treatment}"
        others = {
            t: (control[t].X, of(model.adata, condition=name, cell_type=f"type_{t}").X)
            for t, other in seen
            if other == treatment
        }
        for method in METHODS:
            predicted = model.predict_counterfactual(control[cell_type], to=name, method=method).X
            table = counterfactual_table(predicted, truth.X, control[cell_type].X, others)
            rows += _rows(table, method, first=method == METHODS[0])
    return pd.DataFrame(rows).assign(seed=seed)


def _rows(table, method, *, first):
    """Return the prediction's row, and the baselines' the first time."""
    baselines = table.loc[["mean shift", "nearest type's shift"]].max()
    named = table.rename(index={"prediction": method})
    kept = named if first else named.loc[[method]]
    rows = []
    for name, row in kept.iterrows():
        scores = gap_closed(row, baselines, table.loc["split-half ceiling"], min_gap=0.01)
        score = dict(zip(row.index, scores, strict=True))
        values = {m: row[m] for m in ("lfc_r2", "lfc_r2_top")}
        rows.append({"method": name} | values | {f"score {m}": score[m] for m in values})
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the world and the model")
    tables = [run(seed) for seed in range(parser.parse_args().seeds)]
    grouped = pd.concat(tables).groupby(["method", "seed"], sort=False).mean()
    print(grouped.round(3).to_string())
    print(grouped.groupby("method", sort=False).mean().round(3).to_string())
