"""Check against full retraining what predictions decide without it.

    DISCOVER_SC_DATA=FOLDER python tests/benchmarks/choice.py [--seeds 3]

Each cell type's treated cells of the Kang data are taken out in turn and the network is trained
anew. Inside the remaining types `predict_counterfactual` leaves groups out to choose the power by
which like groups are weighed, and to weigh the observed changes beside the model. Here every
alternative is forced on the same networks and judged by the cells that were taken out.
"""

import argparse
import warnings
from unittest.mock import patch

import numpy as np
import pandas as pd
import scvi

from discover_sc import DISCoVeR, _group_effects
from discover_sc._counterfactual import METHODS
from discover_sc._left_out import LeftOut
from discover_sc.data import kang
from discover_sc.evaluation._held_out import HeldOutGroup

SCORES = ["lfc_r2", "lfc_r2_top20"]
ALONE = {"model alone": 0.0, "observed changes alone": 1.0}  # weight of observed changes


def network(train, seed):
    scvi.settings.seed = seed
    DISCoVeR.setup_anndata(train, condition_key="condition", labels_key="cell_type")
    model = DISCoVeR(train)
    model.train(enable_progress_bar=False, accelerator="cpu")
    return model


def predictions(model, source):
    """Yield the name of each decision and the cells predicted under it; the default first."""
    yield "chosen", model.predict_counterfactual(source, to="stim")
    chosen = model.counterfactual_choice_["ctrl"]["power"]
    for power in _group_effects._POWERS:
        with patch.object(_group_effects, "_POWERS", (power,)):
            name = f"power {power}" + (" (chosen)" if power == chosen else "")
            yield name, model.predict_counterfactual(source, to="stim")
    for name, weight in ALONE.items():
        with patch.object(LeftOut, "weight_beside", lambda self, apart, w=weight: 0 * apart + w):
            yield name, model.predict_counterfactual(source, to="stim")
    for way in METHODS[1:]:
        yield f"way {way}", model.predict_counterfactual(source, to="stim", method=way)


def evaluate(adata, group, seed):
    """One row per decision: its scores on the cells that were taken out."""
    of_group = (adata.obs["cell_type"] == group).to_numpy()
    treated = (adata.obs["condition"] == "stim").to_numpy()
    source = adata[of_group & ~treated].copy()
    held_out = HeldOutGroup(group, adata.X[of_group & treated], source.X)
    model = network(adata[~(of_group & treated)].copy(), seed)
    rows = []
    for name, predicted in predictions(model, source):
        scores = held_out.scores(predicted)
        chosen = name.endswith("(chosen)")
        row = {"group": group, "seed": seed, "decision": name.removesuffix(" (chosen)")}
        rows.append(row | {"chosen power": chosen} | {metric: scores[metric] for metric in SCORES})
        print(rows[-1], flush=True)
    promised = model.counterfactual_choice_["ctrl"]["lfc_r2_by_power"]
    for row in rows:
        if row["decision"].startswith("power"):
            row["promised"] = promised[int(row["decision"].split()[1])]
    return rows


def report(table):
    means = table.groupby("decision", sort=False)[SCORES].mean()
    print(f"\nmeans over held-out types and seeds\n{means.round(3).to_string()}")
    of_power = table[table["decision"].str.startswith("power")]
    tasks = of_power.groupby(["group", "seed"])
    best = tasks["lfc_r2"].transform("max") == of_power["lfc_r2"]
    regret = (
        tasks["lfc_r2"].max()
        - of_power[of_power["chosen power"]].set_index(["group", "seed"])["lfc_r2"]
    )
    print(
        f"\npower: the chosen one is the best after retraining in "
        f"{int((best & of_power['chosen power']).sum())} of {tasks.ngroups} trainings; "
        f"lfc R2 lost by the choice {regret.mean():.3f} on average, {regret.max():.3f} at most"
    )
    agreement = [g["promised"].corr(g["lfc_r2"], method="spearman") for _, g in tasks]
    print(
        "rank correlation over powers of the score promised by leaving groups out and of that "
        f"after retraining: {np.mean(agreement):.2f} on average, {np.min(agreement):.2f} at least"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="seeds to train with")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="The median support")  # held out: that is the point
    adata, rows = kang(), []
    for seed in range(arguments.seeds):
        for group in adata.obs["cell_type"].cat.categories:
            rows += evaluate(adata, group, seed)
    report(pd.DataFrame(rows))
