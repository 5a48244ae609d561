"""What a step costs as cells, genes, conditions, density and minibatch grow, and a model of it.

    python tests/benchmarks/scaling.py [--threads 1] [--max-cells 1000000]
    python tests/benchmarks/scaling.py --fit     on the sizes of scaling.csv, measuring nothing
    python tests/benchmarks/scaling.py --cells   a cell of 1,000,000 beside one of 10,000

Each size is trained in a process of its own for four epochs, from 100,000 cells on for one; the
cheapest after the first gives the CPU milliseconds per step, so that what else runs on the machine
counts least. Peak memory is what training adds to the AnnData and the model. Then a cost model is
fitted to the sizes, checked on sizes that it did not see, and drawn out.

With --cells the largest data are trained on between two runs on 10,000 cells, and these are means
of 40 epochs: an epoch of two minutes meets what the cheapest of three short ones can miss.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import scvi
import torch
from measuring import EpochTimes, in_own_process, peak_megabytes
from scipy.optimize import nnls
from throughput import QUIET, build_own, counts

BASE = {"n_cells": 10_000, "n_genes": 2_000, "n_conditions": 2, "density": 0.08, "batch": 128}
SWEEPS = {
    "n_genes": [500, 1_000, 5_000, 10_000],
    "n_conditions": [10, 50, 100],
    "density": [0.02, 0.3],
    "batch": [64, 512, 1_024, 4_096],
}
LARGE = {"n_genes": 5_000, "batch": 1_024}
CELLS = [1_000, 10_000, 100_000, 1_000_000]  # with 500 genes, so that the largest fits into memory
UNSEEN = [
    {"n_genes": 3_000, "batch": 256, "density": 0.05, "n_conditions": 20},
    {"n_genes": 7_000, "batch": 1_024, "density": 0.1, "n_conditions": 5, "n_cells": 20_000},
    {"n_genes": 4_000, "batch": 2_048, "n_conditions": 10, "n_cells": 20_000},
]
CACHED = 2**21  # elements of a matrix of cells x genes: 8 MB
POINTS = Path(__file__).with_suffix(".csv")
FAR = {
    "n_cells": 100_000_000,
    "n_genes": 20_000,
    "n_conditions": 1_000,
    "density": 0.1,
    "batch": 4_096,
}


def measure(size, n_threads, n_epochs=4, of_epochs=min):
    """Return CPU milliseconds per step and peak megabytes of training.

    The first epoch is left out unless it is the only one; ``of_epochs`` reduces the others to one.
    """
    torch.set_num_threads(n_threads)
    for name in ("lightning", "lightning.pytorch", "scvi"):
        logging.getLogger(name).setLevel(logging.ERROR)
    scvi.settings.seed = 0
    names = ("n_cells", "n_genes", "density", "n_conditions")
    model = build_own(counts(*(size[name] for name in names)), "nb")
    times, peak = EpochTimes(), []
    with peak_megabytes(peak):
        model.train(
            max_epochs=n_epochs,
            train_size=1.0,
            batch_size=size["batch"],
            callbacks=[times],
            **QUIET,
        )
    n_steps = -(-size["n_cells"] // size["batch"])
    cpu = [seconds for _, seconds in times.seconds[1:] or times.seconds]
    return {"ms per step": 1e3 * of_epochs(cpu) / n_steps, "peak, MB": peak[0]}


def sizes(max_cells):
    """Return the base, one change of it per size, and the numbers of cells."""
    yield BASE
    for name, values in SWEEPS.items():
        for value in values:
            size = BASE | {name: value}
            yield size | {"n_cells": max(BASE["n_cells"], 4 * size["batch"])}
    yield BASE | LARGE
    for n_cells in CELLS:
        if n_cells <= max_cells:
            yield BASE | {"n_genes": 500, "n_cells": n_cells}


def terms_of_time(s):
    """Return what a step's time is made of: fixed, per cell, per gene, and their products."""
    cells, genes = s["batch"], s["n_genes"]
    return {
        "step": 1.0,
        "cell": cells,
        "gene": genes,
        "cell x gene": cells * genes,
        "cell x gene beyond the cache": max(0, cells * genes - CACHED),
        "non-zero entry": cells * genes * s["density"],
        "cell x condition": cells * s["n_conditions"],
    }


def terms_of_memory(s):
    """Return what peak memory is made of, the data aside."""
    return {
        "fixed": 1.0,
        "gene": s["n_genes"],
        "cell x gene": s["batch"] * s["n_genes"],
        "cell": s["n_cells"],
    }


def fit(table, terms, column):
    """Return non-negative coefficients that minimise the relative errors."""
    rows = pd.DataFrame([terms(s) for s in table.to_dict("records")])
    values = table[column].to_numpy()
    coefficients, _ = nnls((rows / values[:, None]).to_numpy(), np.ones(len(values)))
    return pd.Series(coefficients, rows.columns)


def predict(coefficients, terms, size):
    return float(coefficients @ pd.Series(terms(size)))


def measured(options):
    """Return the table of all sizes, and write it as it grows."""
    rows = []
    every = [(size, True) for size in sizes(options.max_cells)]
    every += [(BASE | unseen, False) for unseen in UNSEEN]
    for size, seen in every:
        n_epochs = 4 if size["n_cells"] < 100_000 else 1
        found = in_own_process(measure, size, options.threads, n_epochs)
        rows.append(size | {"seen": seen} | found)
        print(rows[-1], flush=True)
        pd.DataFrame(rows).round(3).to_csv(POINTS, index=False)
    return pd.DataFrame(rows)


def compare_cells(options):
    """Print the cost of a step on the most cells between two runs on 10,000 of them."""
    few, rows = BASE["n_cells"], []
    for n_cells, n_epochs in ((few, 41), (options.max_cells, 1), (few, 41)):
        size = BASE | {"n_genes": 500, "n_cells": n_cells}
        arguments = (size, options.threads, n_epochs, np.mean)
        rows.append({"n_cells": n_cells} | in_own_process(measure, *arguments))
    before, most, after = (row["ms per step"] for row in rows)
    table = pd.DataFrame(rows)
    print(table.round(3).to_string(), "\nratio:", round(2 * most / (before + after), 3))


def main(options):
    table = pd.read_csv(POINTS) if options.fit else measured(options)
    table["us per cell"] = 1e3 * table["ms per step"] / table["batch"]
    for terms, column in ((terms_of_time, "ms per step"), (terms_of_memory, "peak, MB")):
        coefficients = fit(table[table["seen"]], terms, column)
        modelled = [predict(coefficients, terms, s) for s in table.to_dict("records")]
        table[f"error, {column}"] = np.array(modelled) / table[column] - 1
        print(coefficients.to_string(), "\nfar:", predict(coefficients, terms, FAR), column, "\n")
    print(table.round(3).to_string())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-cells", type=int, default=1_000_000)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--cells", action="store_true")
    arguments = parser.parse_args()
    (compare_cells if arguments.cells else main)(arguments)
