import warnings

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from discover_sc._borrowed_effects import KnownChanges
from discover_sc._described_effects import DescribedEffects, warn_of_descriptions

N_TREATMENTS, N_GENES = 20, 200
STRENGTH = np.array([0.8, 1.2])


def world(rng, noise=0.1, strength=STRENGTH):
    """Treatments whose effects follow from 3 of 5 features, in groups; the last is new."""
    rows = rng.normal(size=(N_TREATMENTS + 1, 5)) / np.sqrt(5)
    effects = rows[:, :3] @ rng.normal(size=(3, N_GENES))
    changes = strength[:, None] * effects[:, None]
    return rows, changes, changes + rng.normal(0, noise, changes.shape)


def effects_of(rows, observed, n_cells=100, noise=0.01):
    """The regression on all treatments but the last."""
    known = KnownChanges(observed[:-1], np.broadcast_to(n_cells, observed[:-1].shape[:2]))
    return DescribedEffects(known, np.full(observed.shape[1:], 3.0), rows[:-1], noise)


def relative_error(change, truth):
    return ((change - truth) ** 2).mean() / (truth**2).mean()


def test_a_treatment_is_told_from_its_description_in_each_group_and_elsewhere():
    rows, truth, observed = world(np.random.default_rng(0))
    effects = effects_of(rows, observed)
    for group, expected in ((0, truth[-1, 0]), (1, truth[-1, 1]), (None, truth[-1].mean(axis=0))):
        assert relative_error(effects.change(rows[-1], group).change(None), expected) < 0.1
    assert effects.scores[effects.penalty] > 0.9 > effects.score_of_mean
    assert effects.tells
    summary = effects.change(rows[-1], 0).summary()
    assert summary["lfc_r2_by_penalty"][summary["penalty"]] == max(effects.scores.values())
    assert summary["description_tells"]
    assert summary["description_within_reach"]
    assert summary["n_left_out"] == 2 * N_TREATMENTS


def test_a_description_that_tells_nothing_leaves_the_mean_of_the_known_treatments():
    rng = np.random.default_rng(1)
    rows, _, observed = world(rng)
    observed = 1.0 + rng.permutation(observed)  # a common response that no feature tells
    effects = effects_of(rows, observed)
    change = effects.change(rows[-1], None).change(None)
    mean = observed[:-1].mean(axis=(0, 1))
    assert ((change - mean) ** 2).mean() < 0.1 * observed.mean(axis=1).var(axis=0).mean()
    assert not effects.tells


@pytest.mark.parametrize("n_features", [5, 60])
def test_left_out_treatments_are_predicted_by_the_regression_on_all_others(n_features):
    rng = np.random.default_rng(2)
    rows, _, observed = world(rng)
    rows = np.hstack([rows, rng.normal(size=(len(rows), n_features - 5))])
    effects = effects_of(rows, observed)
    table = KnownChanges(observed[:-1], np.full((N_TREATMENTS, 2), 100)).table
    errors = effects.change(rows[-1], 0).errors.reshape(N_TREATMENTS, 2, N_GENES)
    for left_out in (0, 7):
        others = np.arange(N_TREATMENTS) != left_out
        regression = Ridge(effects.penalty * N_TREATMENTS)
        regression.fit(rows[:-1][others], table[others].reshape(N_TREATMENTS - 1, -1))
        predicted = regression.predict(rows[[left_out]]).reshape(2, N_GENES)
        np.testing.assert_allclose(errors[left_out], observed[left_out] - predicted, atol=1e-8)


def covered(change, observed):
    error = np.sqrt(change.error_variance(3.0 + change.change(None), change.change(None)))
    return np.abs(change.change(None) - observed) < 1.645 * error


def test_the_error_is_that_of_the_observed_change_of_a_treatment_not_among_the_known():
    shares = []
    for seed in range(10):
        rows, _, observed = world(np.random.default_rng(seed))
        effects = effects_of(rows, observed)
        shares += [covered(effects.change(rows[-1], k), observed[-1, k]) for k in (0, 1)]
    assert 0.85 < np.mean(shares) < 0.98


def test_the_error_of_a_group_that_was_never_treated_is_that_of_groups_left_out_too():
    shares = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rows, _, observed = world(rng, strength=rng.uniform(0.4, 1.6, 6))
        n_cells = np.full((N_TREATMENTS, 6), 100)
        n_cells[:, 5] = 0
        never = observed[:, 5].copy()
        observed[:, 5] = np.nan
        effects = effects_of(rows, observed, n_cells)
        shares.append(covered(effects.change(rows[-1], 5), never[-1]))
        np.testing.assert_array_equal(
            effects.change(rows[-1], 5).errors, effects.change(rows[-1], None).errors
        )
    assert 0.8 < np.mean(shares) < 0.98


def test_elsewhere_left_out_treatments_are_predicted_from_the_other_groups():
    rng = np.random.default_rng(9)
    rows, _, observed = world(rng, strength=np.array([0.5, 1.0, 1.5]))
    n_cells = np.where(rng.random((N_TREATMENTS, 3)) < 0.3, 0, 100)
    n_cells[0] = [100, 0, 0]  # seen in one group only
    n_cells[1:, 2] = 100
    observed[:-1][n_cells == 0] = np.nan
    effects = effects_of(rows, observed, n_cells)
    errors = iter(effects.change(rows[-1], None).errors)
    regression = Ridge(effects.penalty * N_TREATMENTS)
    for left_out in range(N_TREATMENTS):
        others = np.delete(np.arange(N_TREATMENTS), left_out)
        for group in np.flatnonzero(n_cells[left_out]):
            elsewhere = []
            for other in others:
                seen = np.flatnonzero(n_cells[other])
                seen = seen[seen != group] if (seen != group).any() else seen
                elsewhere.append(observed[other, seen].mean(axis=0))
            predicted = regression.fit(rows[others], elsewhere).predict(rows[[left_out]])[0]
            np.testing.assert_allclose(next(errors), observed[left_out, group] - predicted)
    assert not list(errors)


def test_of_one_group_nothing_is_known_elsewhere():
    rows, _, observed = world(np.random.default_rng(5), strength=np.ones(1))
    effects = effects_of(rows, observed)
    assert effects.change(rows[-1], 0) is not None
    assert effects.change(rows[-1], None) is None


def test_the_change_elsewhere_is_that_of_the_mean_group():
    rows, _, observed = world(np.random.default_rng(5))
    mean = effects_of(rows, observed.mean(axis=1, keepdims=True)).change(rows[-1], 0)
    elsewhere = effects_of(rows, observed).change(rows[-1], None)
    np.testing.assert_allclose(elsewhere.change(None), mean.change(None))


def test_what_a_second_estimate_gets_wrong_alike_does_not_count_against_the_first():
    rows, _, observed = world(np.random.default_rng(3), noise=0.3)
    change = effects_of(rows, observed, noise=0.0).change(rows[-1], 0)
    error = (change.errors**2).mean()
    near, far = (np.full(N_GENES, np.sqrt(k * error)) for k in (0.6, 4.0))
    assert change.weight_beside(near).mean() == pytest.approx(0.5, abs=0.02)
    # half of the error is shared: 1 - 0.5 / 4
    assert change.weight_beside(far).mean() == pytest.approx(1 - 0.5 / 4, abs=0.02)


def test_a_group_that_did_not_see_every_treatment_is_left_out_where_it_did():
    rows, truth, observed = world(np.random.default_rng(4))
    n_cells = np.full((N_TREATMENTS, 2), 100)
    n_cells[:12, 1], observed[:12, 1] = 0, np.nan
    change = effects_of(rows, observed, n_cells).change(rows[-1], 1)
    assert len(change.errors) == 2 * N_TREATMENTS - 12
    assert relative_error(change.change(None), truth[-1, 1]) < 0.2


def test_a_treatment_that_changes_nothing_is_learned_from_and_not_left_out():
    rng = np.random.default_rng(6)
    rows, _, observed = world(rng)
    observed += 1.0  # a response that all treatments have in common
    far = np.full((1, 5), 2.0)
    rows = np.vstack([far, rows])
    observed = np.concatenate([np.zeros((1, *observed.shape[1:])), observed])
    n_cells = np.full((N_TREATMENTS + 1, 2), 100)
    n_cells[0] = 0
    effects = effects_of(rows, observed, n_cells)
    assert len(effects.change(rows[-1], 0).errors) == 2 * N_TREATMENTS
    like_it, other = (effects.change(row, None).change(None) for row in (rows[0], rows[-1]))
    assert np.abs(like_it).mean() < 0.5 * np.abs(other).mean()


def test_a_row_far_from_all_others_is_followed_part_of_the_way():
    rows, _, observed = world(np.random.default_rng(7))
    effects = effects_of(rows, observed)
    far, farther = (effects.change(f * rows[-1], 0) for f in (1e3, 1e6))
    np.testing.assert_allclose(far.change(None), farther.change(None), rtol=0.02, atol=0.02)
    assert not far.summary()["description_within_reach"]
    within, beyond = (effects.change(f * rows[-1], 0).change(None) for f in (1, 10))
    assert 1 < np.linalg.norm(beyond) / np.linalg.norm(within) < 10


def test_the_error_grows_with_the_distance_of_the_row():
    rows, _, observed = world(np.random.default_rng(7))
    effects = effects_of(rows, observed)
    level = np.full(N_GENES, 3.0)
    mean, near, far, farther = (
        effects.change(f * rows[:-1].mean(axis=0) + f * rows[-1], 0).error_variance(level, level)
        for f in (0.0, 0.1, 1e3, 1e6)
    )
    np.testing.assert_allclose(mean, near)
    assert (far > 100 * near).all()
    assert (farther > far).all()


def test_a_source_that_lies_apart_does_not_extend_the_reach():
    rng = np.random.default_rng(10)
    rows, _, observed = world(rng)
    rows = rows + 2.0  # the source, all zero, is far from every treatment
    apart = effects_of(
        np.vstack([np.zeros(5), rows]),
        np.concatenate([np.zeros((1, *observed.shape[1:])), observed]),
        np.vstack([[0, 0], np.full((N_TREATMENTS, 2), 100)]),
    )
    assert apart.change(rows[-1], 0).summary()["description_within_reach"]
    assert not apart.change(4 * rows[-1], 0).summary()["description_within_reach"]


def test_descriptions_that_tell_nothing_or_lie_far_away_warn_once_each():
    rows, _, observed = world(np.random.default_rng(8))
    near, far = (effects_of(rows, observed).change(f * rows[-1], 0).summary() for f in (1, 1e3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_descriptions({"near": [near, near], "unknown": [{"n_groups": 0}]})
    with pytest.warns(UserWarning, match=r"descriptions of \['a', 'b'\] lie far") as caught:
        warn_of_descriptions({"a": [near, far], "near": [near], "b": [far]})
    assert len(caught) == 1
    mute = near | {"description_tells": False}
    with pytest.warns(UserWarning, match="not clearly better than the mean") as caught:
        warn_of_descriptions({"a": [mute, mute], "b": [mute]})
    assert len(caught) == 1
