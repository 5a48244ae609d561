import numpy as np
import pytest
from sklearn.linear_model import Ridge

from discover_sc._borrowed_effects import KnownChanges
from discover_sc._described_effects import DescribedEffects

N_TREATMENTS, N_GENES = 20, 200
STRENGTH = np.array([0.8, 1.2])


def world(rng, noise=0.1):
    """Treatments whose effects follow from 3 of 5 features, in 2 groups; the last is new."""
    rows = rng.normal(size=(N_TREATMENTS + 1, 5)) / np.sqrt(5)
    effects = rows[:, :3] @ rng.normal(size=(3, N_GENES))
    changes = STRENGTH[:, None] * effects[:, None]
    return rows, changes, changes + rng.normal(0, noise, changes.shape)


def effects_of(rows, observed, noise=0.01):
    known = KnownChanges(observed[:-1], np.full((N_TREATMENTS, 2), 100))
    control = np.full((2, N_GENES), 3.0)
    return DescribedEffects(known, control, rows[:-1], rows[-1], noise)


def test_a_treatment_is_told_from_its_description_in_each_group_and_elsewhere():
    rows, truth, observed = world(np.random.default_rng(0))
    effects = effects_of(rows, observed)
    for group, expected in ((0, truth[-1, 0]), (1, truth[-1, 1]), (None, truth[-1].mean(axis=0))):
        error = effects.of(group).change(None) - expected
        assert (error**2).mean() < 0.1 * (expected**2).mean()
    assert effects.scores[effects.penalty] > 0.9 > effects.score_of_mean
    assert effects.tells
    summary = effects.summary()
    assert summary["lfc_r2_by_penalty"][summary["penalty"]] == max(effects.scores.values())


def test_a_description_that_tells_nothing_leaves_the_mean_of_the_known_treatments():
    rng = np.random.default_rng(1)
    rows, _, observed = world(rng)
    observed = 1.0 + rng.permutation(observed)  # a common response that no feature tells
    effects = effects_of(rows, observed)
    change = effects.of(None).change(None)
    mean = observed[:-1].mean(axis=(0, 1))
    assert ((change - mean) ** 2).mean() < 0.1 * observed.mean(axis=1).var(axis=0).mean()
    assert not effects.tells


def test_left_out_treatments_are_predicted_by_the_regression_on_all_others():
    rows, _, observed = world(np.random.default_rng(2))
    effects = effects_of(rows, observed)
    known = KnownChanges(observed[:-1], np.full((N_TREATMENTS, 2), 100))
    for left_out in (0, 7):
        others = np.arange(N_TREATMENTS) != left_out
        table = known.table[others].reshape(N_TREATMENTS - 1, -1)
        regression = Ridge(effects.penalty).fit(rows[:-1][others], table)
        predicted = regression.predict(rows[[left_out]]).reshape(2, N_GENES)
        errors = effects.errors.reshape(N_TREATMENTS, 2, N_GENES)[left_out]
        np.testing.assert_allclose(errors, observed[left_out] - predicted, atol=1e-8)


def test_the_error_is_that_of_the_observed_change_of_a_treatment_not_among_the_known():
    covered = []
    for seed in range(10):
        rows, _, observed = world(np.random.default_rng(seed))
        effects = effects_of(rows, observed)
        for group in (0, 1):
            change = effects.of(group).change(None)
            error = np.sqrt(effects.error_variance(3.0 + change, change))
            covered.append(np.abs(change - observed[-1, group]) < 1.645 * error)
    assert 0.85 < np.mean(covered) < 0.98


def test_what_a_second_estimate_gets_wrong_alike_does_not_count_against_the_first():
    rows, _, observed = world(np.random.default_rng(3), noise=0.3)
    effects = effects_of(rows, observed, noise=0.0)
    error = (effects.errors**2).mean()
    near, far = (np.full(N_GENES, np.sqrt(k * error)) for k in (0.6, 4.0))
    assert effects.weight_beside(near).mean() == pytest.approx(0.5, abs=0.02)
    # half of the error is shared: 1 - 0.5 / 4
    assert effects.weight_beside(far).mean() == pytest.approx(1 - 0.5 / 4, abs=0.02)


def test_a_group_that_did_not_see_every_treatment_is_left_out_where_it_did():
    rows, truth, observed = world(np.random.default_rng(4))
    n_cells = np.full((N_TREATMENTS, 2), 100)
    n_cells[:12, 1], observed[:12, 1] = 0, np.nan
    known = KnownChanges(observed[:-1], n_cells)
    effects = DescribedEffects(known, np.full((2, N_GENES), 3.0), rows[:-1], rows[-1])
    assert len(effects.errors) == 2 * N_TREATMENTS - 12
    error = effects.of(1).change(None) - truth[-1, 1]
    assert (error**2).mean() < 0.2 * (truth[-1, 1] ** 2).mean()
