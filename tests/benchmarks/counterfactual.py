"""Hold out each cell type's treated cells of the Kang data and predict them by every method.

    DISCOVER_SC_DATA=FOLDER python tests/benchmarks/counterfactual.py [--seeds 3] [--out FOLDER]
    python tests/benchmarks/counterfactual.py --data shallow      a simulation, 650 counts per cell
    python tests/benchmarks/counterfactual.py --data unlike       one whose types answer differently

Prints means per method and per cell type, and writes counterfactual.csv and counterfactual.png.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from discover_sc.data import kang, simulate
from discover_sc.evaluation import benchmark_counterfactual, counterfactual_methods, gap_closed
from discover_sc.plotting import plot_counterfactual_benchmark

KEYS = {"condition_key": "condition", "labels_key": "cell_type", "control": "ctrl"}
MAIN = ["lfc_r2", "lfc_r2_top20"]


def shallow():
    """Five types that answer nearly alike, 250 cells of each under each condition."""
    effects = {"effect_scale": 0.7, "specific_effect_scale": 0.5}
    return treated(simulate(2500, 1000, n_types=5, mean_library_size=650, **effects, seed=3))


def unlike():
    """Six types that answer in ways of their own as well: nothing observed elsewhere tells them."""
    effects = {"effect_scale": 1.0, "specific_effect_scale": 1.0}
    return treated(simulate(2500, 1000, n_types=6, **effects, seed=0))


def treated(adata):
    adata.obs["condition"] = adata.obs["condition"].cat.rename_categories({"treat_1": "stim"})
    return adata


DATA = {"kang": kang, "shallow": shallow, "unlike": unlike}


def report(table):
    """Print values and scores: per method over all types and seeds, then per type."""
    sign = np.where(table["metric"].isin(["e_distance", "squared_mmd"]), -1, 1)
    compared = [sign * table[column] for column in ("value", "baseline", "ceiling")]
    table = table.assign(bounded_score=gap_closed(*compared, min_gap=0.05))
    rows = pd.concat([table, ceiling_rows(table)])
    for column, title in {
        "value": "value",
        "score": "score: (value - better baseline) / (ceiling - better baseline)",
        "bounded_score": "score with the denominator not below 0.05",
    }.items():
        means = rows.groupby(["method", "metric"], sort=False)[column].mean().unstack(sort=False)
        print(f"\n{title}, mean over types and seeds\n{means.round(3).to_string()}")
    for metric in [*MAIN, "e_distance", "variance_r2_top20"]:
        part = rows[rows["metric"] == metric]
        means = part.groupby(["method", "group"], sort=False)["value"].mean().unstack()
        print(f"\n{metric} by held-out type, mean over seeds\n{means.round(3).to_string()}")
    main = table[table["metric"].isin(MAIN)]
    by_seed = main.groupby(["method", "metric", "seed"], sort=False)["value"].mean().unstack()
    print(f"\nvalue by seed, mean over types\n{by_seed.round(3).to_string()}")


def ceiling_rows(table):
    """The ceiling as a method, once per type, seed and metric."""
    first = table[table["method"] == table["method"].iloc[0]]
    rows = first.assign(method="split-half ceiling", value=first["ceiling"])
    return rows.drop(columns=["score", "bounded_score"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    available = counterfactual_methods(**KEYS)
    parser.add_argument("--data", choices=list(DATA), default="kang")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=list(available), default=list(available))
    parser.add_argument("--out", type=Path, default=Path())
    arguments = parser.parse_args()
    methods = {name: available[name] for name in arguments.methods}
    arguments.out.mkdir(parents=True, exist_ok=True)
    adata, tables = DATA[arguments.data](), []
    for seed in range(arguments.seeds):
        tables.append(benchmark_counterfactual(adata, **KEYS, methods=methods, seeds=[seed]))
        result = pd.concat(tables, ignore_index=True)
        result.to_csv(arguments.out / "counterfactual.csv", index=False)  # as far as it has got
    report(result)
    figure, ax = plt.subplots(figsize=(7, 5), layout="constrained")
    plot_counterfactual_benchmark(result, ax=ax)
    figure.savefig(arguments.out / "counterfactual.png", dpi=150)
