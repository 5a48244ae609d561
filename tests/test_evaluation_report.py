import anndata as ad
import numpy as np
import pandas as pd
import pytest
from fitting import train_small

from discover_sc.data import simulate
from discover_sc.evaluation import _report, probe_accuracy, probe_accuracy_within, report


class LatentModel:
    """Latents that are columns of the data: what a report asks of a model."""

    condition_keys = ("condition",)
    labels_key = "cell_type"

    def __init__(self, invariance="marginal"):
        self.invariance = invariance

    def get_latent_representation(self, adata, *, latent):
        return adata.obsm[latent]


def composed_cells(n_cells=1200):
    """z tells the type and no more; type b is rarer among treated cells. w tells the condition."""
    rng = np.random.default_rng(0)
    condition = np.array(["ctrl", "stim"])[rng.integers(2, size=n_cells)]
    is_b = rng.random(n_cells) < np.where(condition == "ctrl", 0.8, 0.2)
    obs = pd.DataFrame({"condition": condition, "cell_type": np.where(is_b, "b", "a")})
    obs.index = obs.index.astype(str)
    adata = ad.AnnData(np.zeros((n_cells, 1), dtype=np.float32), obs)
    noise = rng.normal(size=(2, n_cells, 2))
    adata.obsm["z"] = noise[0] + 8.0 * is_b[:, None]
    adata.obsm["w"] = noise[1] + 8.0 * (condition == "stim")[:, None]
    return adata


def test_a_conditional_model_is_asked_for_the_condition_within_labels():
    adata = composed_cells()
    marginal, conditional = (report(LatentModel(i), adata) for i in ("marginal", "conditional"))
    left = marginal[marginal["question"] == "condition left in z"].set_index("metric")
    assert (left["value"] > 0.75).all()  # by way of the type, which alone tells
    np.testing.assert_allclose(left["from_labels"], left["value"], atol=0.03)
    within = conditional[conditional["question"] == "condition left in z, given cell_type"]
    assert (within["value"] - within["chance"]).abs().max() < 0.06
    assert set(within["chance"]) == {0.5}
    assert set(within["wanted"]) == {"chance"}
    rest = conditional["question"].isin(["condition found in w", "cell_type kept in z"])
    assert (conditional[rest]["value"] > 0.95).all()
    assert conditional["from_labels"].isna().all()


def test_accuracy_within_groups_is_the_average_weighted_by_cells():
    adata = composed_cells()
    types, condition = (adata.obs[key].to_numpy() for key in ("cell_type", "condition"))
    latent = adata.obsm["z"] + (condition == "stim")[:, None] * (types == "a")[:, None]
    got, chance = probe_accuracy_within(latent, condition, types, n_folds=4)
    sizes = [(types == name).sum() for name in "ab"]
    alone = [
        probe_accuracy(latent[types == name], condition[types == name], n_folds=4) for name in "ab"
    ]
    for probe, folds in got.items():
        expected = sum(n * a[probe] for n, a in zip(sizes, alone, strict=True)) / sum(sizes)
        np.testing.assert_allclose(folds, expected)
    assert chance == 0.5


def test_chance_within_groups_is_weighted_like_the_accuracy():
    rng = np.random.default_rng(0)
    groups = np.repeat(["two", "four", "one"], [40, 120, 30])
    target = np.concatenate([np.arange(40) % 2, np.arange(120) % 4, np.zeros(30, dtype=int)])
    _, chance = probe_accuracy_within(rng.normal(size=(190, 2)), target, groups)
    assert chance == pytest.approx((40 * 0.5 + 120 * 0.25) / 160)  # nothing to tell in "one"


def test_rare_classes_of_a_group_are_left_out_and_nothing_to_tell_is_refused():
    target = np.array([0] * 20 + [1] * 20 + [2] * 4)
    latent = np.random.default_rng(0).normal(size=(44, 2))
    _, chance = probe_accuracy_within(latent, target, np.zeros(44))
    assert chance == 0.5
    with pytest.raises(ValueError, match="None of 3 groups holds two classes with at least n_fold"):
        probe_accuracy_within(latent, target, target)


def test_of_many_cells_a_part_is_probed_that_keeps_the_rare(monkeypatch):
    monkeypatch.setattr(_report, "_MAX_CELLS", 1000)
    groups = pd.DataFrame({"condition": ["ctrl"] * 6000 + ["stim"] * 3940 + ["rare"] * 60})
    drawn = _report._drawn_cells(groups)
    counts = groups["condition"].iloc[drawn].value_counts()
    assert counts.to_dict() == {"ctrl": 600, "stim": 394, "rare": 50}
    np.testing.assert_array_equal(drawn, _report._drawn_cells(groups))
    assert len(np.unique(drawn)) == len(drawn)
    assert drawn[:600].max() > 5900  # from everywhere
    np.testing.assert_array_equal(_report._drawn_cells(groups[:1000]), np.arange(1000))


def test_probing_a_part_of_the_cells_changes_little(monkeypatch):
    adata = composed_cells(3000)
    every = report(LatentModel(), adata)
    monkeypatch.setattr(_report, "_MAX_CELLS", 1000)
    part = report(LatentModel(), adata)
    assert list(part["question"]) == list(every["question"])
    np.testing.assert_allclose(part["value"], every["value"], atol=0.06)
    assert not part["value"].equals(every["value"])


def test_a_missing_column_of_labels_is_refused():
    adata = composed_cells(100)
    del adata.obs["cell_type"]
    with pytest.raises(KeyError, match="labels_key 'cell_type' is not a column of adata.obs"):
        report(LatentModel("conditional"), adata)


def test_a_trained_conditional_model_reports_within_its_labels():
    adata = simulate(400, 40, n_types=3, seed=0)
    model = train_small(adata, {"labels_key": "cell_type"}, {"invariance": "conditional"})
    questions = set(report(model, adata)["question"])
    assert "condition left in z, given cell_type" in questions
    assert "condition left in z" not in questions
