"""Changes under measured parts, put together in expression."""

import numpy as np
import pandas as pd
import pytest
from fitting import train_small

from discover_sc._calibration import GroupMeans
from discover_sc._left_out import LeftOut
from discover_sc._parts import (
    Composition,
    Part,
    composition_of,
    missed_by_group,
    part_changes,
    united,
)
from discover_sc._reference import GroupProfile
from discover_sc._target import targets_of
from discover_sc.data import simulate

pytestmark = pytest.mark.filterwarnings("ignore:The median support")
THETA = np.full(3, 5.0)


def test_changes_of_one_sign_overlap_gene_by_gene_and_others_add_up():
    changes = np.array([[1.0, 2.0, -1.0], [3.0, -2.0, -1.0]])
    np.testing.assert_allclose(united(changes, 0.0), [4.0, 0.0, -2.0])
    np.testing.assert_allclose(united(changes, 1.0), [3.0, 0.0, -1.0])
    np.testing.assert_allclose(united(changes, 0.5), [3.5, 0.0, -1.5])
    np.testing.assert_allclose(united(changes[:1], 0.5), changes[0])


def test_given_weights_average():
    changes = np.array([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_allclose(Composition([0.25, 0.75])(changes), [2.5, 3.5])


def means(predicted, observed=(1.0, 2.0, 3.0), n_cells=10):
    observed = np.array(observed)
    return GroupMeans(observed, observed, np.array(predicted), n_cells)


def test_what_is_seen_without_noise_is_missed_as_it_is():
    profile = GroupProfile(np.array([1.5, 2.0, 3.3]), 10**9, 1e-3)
    part = Part({"a": profile}, [means([1.2, 2.0, 2.9]), means([1.0, 2.0, 3.0])], 0.0)
    found = missed_by_group(part, ["a", "b"], THETA)
    np.testing.assert_allclose(found[0], [0.3, 0.0, 0.4], atol=1e-4)
    np.testing.assert_allclose(found[1], found[0])  # not seen: what is common


def test_a_decoder_that_follows_the_noise_of_a_part_is_not_believed():
    rng = np.random.default_rng(0)
    before, noise = rng.uniform(1.0, 4.0, 500), rng.normal(0, 0.15, 500)
    follows = GroupMeans(before, before, before + noise, 10)
    theta = np.full(500, 1.0)
    part = Part({"a": GroupProfile(before + noise, 50, 1e-3)}, [follows], 0.0)
    [missed] = missed_by_group(part, ["a"], theta)
    assert np.square(noise + missed).mean() < 0.2 * np.square(noise).mean()


def test_where_no_group_saw_a_part_what_is_known_otherwise_is_taken():
    part = Part({}, [means([1.0, 2.0, 3.0])], np.array([0.1, 0.0, -0.1]))
    np.testing.assert_allclose(missed_by_group(part, ["a"], THETA), [[0.1, 0.0, -0.1]])


def test_the_error_is_known_of_groups_that_saw_every_part():
    left_out = LeftOut(np.zeros((1, 3)), np.zeros((1, 3)), np.ones((1, 3)))
    seen = GroupProfile(np.array([1.5, 2.0, 3.3]), 100, 1e-3)
    parts = [
        Part({"a": seen}, [means([1.0, 2.0, 3.0])] * 2, 0.0),
        Part({"a": seen, "b": seen}, [means([1.0, 2.0, 3.0])] * 2, 0.0),
    ]
    first, second = part_changes(
        Composition(None, 0.5, left_out), parts[0], parts, ["a", "b"], THETA
    )
    assert first.left_out is left_out
    assert second.left_out is None


# ------------------------------------------------------------------------- a model


def cells(rng, log_change, condition, n_cells=200):
    base = np.linspace(0, 3, 30) + log_change
    counts = rng.poisson(1000 * np.exp(base) / np.exp(base).sum(), (n_cells, 30))
    return counts, [condition] * n_cells


@pytest.fixture(scope="module", params=["adds up", "counts once"])
def combined(request):
    """A and B move the first genes, A+B by the sum, or as either; A+C likewise, C+B is unknown."""
    rng = np.random.default_rng(0)
    one = np.where(np.arange(30) < 6, 1.0, 0.0)
    both = 2 * one if request.param == "adds up" else one
    levels = {"ctrl": 0 * one, "A": one, "B": one, "C": one, "A+B": both, "A+C": both}
    drawn = [cells(rng, change, name) for name, change in levels.items()]
    adata = simulate(len(levels) * 200, 30, n_types=2, seed=0)
    adata.X = np.concatenate([counts for counts, _ in drawn]).astype("float32")
    adata.obs["condition"] = pd.Categorical(sum((names for _, names in drawn), []))
    model = train_small(adata, {"labels_key": "cell_type"}, train={"max_epochs": 5})
    return model, request.param, cells(rng, both, "B+C", 2000)[0]


def controls(model):
    return model.adata[(model.adata.obs["condition"] == "ctrl").to_numpy()].copy()


def test_registered_combinations_tell_the_overlap_of_profiles_and_the_error(combined):
    model, kind, _ = combined
    [target] = targets_of(model, "B+C", None)
    source = model._condition_levels[0].code("ctrl")
    composition = composition_of(model.reference_, target, None, np.array([source]), None)
    assert composition.overlap == {"adds up": 0.0, "counts once": 1.0}[kind]
    assert len(composition.left_out.errors) == 2 * 2  # combinations x types
    assert np.sqrt((composition.left_out.errors**2).mean()) < 0.2


def test_an_unseen_combination_is_predicted_from_the_observed_profiles_of_its_parts(combined):
    model, _, truth = combined
    true = np.log1p((1e4 * truth / truth.sum(axis=1, keepdims=True)).mean(axis=0))
    auto, decoded = (
        model.predict_counterfactual(controls(model), to="B+C", method=method, n_samples=2).varm
        for method in ("auto", "abduction")
    )
    error, error_of_decoder = (
        np.abs(varm["discover_mean"].mean(axis=1) - true).mean() for varm in (auto, decoded)
    )
    assert error < 0.6 * error_of_decoder
    lower, upper = (auto[f"discover_mean_{side}"].mean(axis=1) for side in ("lower", "upper"))
    assert ((lower < true) & (true < upper)).mean() > 0.8


def test_without_registered_combinations_no_interval_is_given(combined):
    model, *_ = combined
    alone = model.adata[~model.adata.obs["condition"].isin(["A+B", "A+C"]).to_numpy()].copy()
    singles = train_small(alone, {"labels_key": "cell_type"})
    predicted = singles.predict_counterfactual(controls(singles), to="A+B", n_samples=2)
    assert predicted.varm["discover_mean"].notna().all(axis=None)
    assert predicted.varm["discover_mean_lower"].isna().all(axis=None)
    assert singles.counterfactual_choice_["ctrl"]["overlap"] == 0.5
