import numpy as np
import pytest
from sklearn.metrics import r2_score

from discover_sc import _left_out
from discover_sc._group_effects import GroupEffects
from discover_sc._left_out import LeftOut

RNG = np.random.default_rng(0)


def like_changes_like(n_groups=6, n_genes=200, noise=0.05):
    """Groups on a line; the change grows along it, so neighbours answer alike."""
    place = np.linspace(0, 1, n_groups)[:, None]
    control = 2.0 + place * RNG.normal(0, 2, n_genes)
    change = place * RNG.normal(0, 1, n_genes) + RNG.normal(0, noise, (n_groups, n_genes))
    return control, change


def test_power_zero_is_the_mean_shift():
    control = RNG.normal(size=(5, 100))
    change = RNG.normal(size=100) + RNG.normal(0, 0.3, (5, 100))  # unrelated to the control
    effects = GroupEffects(control, control + change)
    assert effects.power == 0
    np.testing.assert_allclose(effects.change(control[0] + 1.0), change.mean(0))


def test_where_like_answers_like_near_groups_count_more():
    control, change = like_changes_like()
    effects = GroupEffects(control[1:], control[1:] + change[1:])
    assert effects.power > 0
    predicted = effects.change(control[0])
    mean = change[1:].mean(axis=0)
    error, error_of_mean = (np.square(p - change[0]).sum() for p in (predicted, mean))
    assert error < 0.7 * error_of_mean


def test_the_change_is_the_inverse_distance_average():
    control = np.array([[0.0, 0.0], [3.0, 0.0]])
    effects = GroupEffects(control, control + [[1.0, 0.0], [0.0, 1.0]])
    floor = 0.01 * 4.5  # mean squared distance over all pairs is (0 + 9 + 9 + 0) / 4
    weights = np.array([1 / (1 + floor), 1 / (4 + floor)])  # two groups: power 2
    expected = weights / weights.sum()
    np.testing.assert_allclose(effects.change(np.array([1.0, 0.0])), expected)


def test_errors_are_those_of_a_plain_leave_one_out_loop():
    control, change = like_changes_like(5, 50)
    effects = GroupEffects(control, control + change)
    floor = 0.01 * np.mean([np.square(a - b).sum() for a in control for b in control])
    scores = []
    for left_out in range(5):
        others = [k for k in range(5) if k != left_out]
        distances = [np.square(control[k] - control[left_out]).sum() for k in others]
        weights = (np.array(distances) + floor) ** (-effects.power / 2)
        predicted = np.average(change[others], axis=0, weights=weights)
        np.testing.assert_allclose(effects.errors[left_out], change[left_out] - predicted)
        scores.append(r2_score(change[left_out], predicted))
    assert effects.scores[effects.power] == pytest.approx(np.mean(scores))
    assert effects.scores[effects.power] == max(effects.scores.values())


def test_a_group_that_was_observed_answers_for_itself():
    control, change = like_changes_like(4)
    effects = GroupEffects(control, control + change)
    own = np.square(effects.change(control[2]) - change[2]).mean()
    assert own < 0.1 * np.square(effects.errors[2]).mean() + 1e-6


def test_genes_that_answer_differently_from_group_to_group_are_left_to_the_other_estimate():
    control = RNG.normal(size=(5, 100))
    change = np.tile(RNG.normal(size=100), (5, 1))
    change[:, 0] += np.array([-3.0, 3.0, -3.0, 3.0, 0.0])
    change[:, 1:] += RNG.normal(0, 0.1, (5, 99))
    weight = GroupEffects(control, control + change).weight_beside(np.zeros(100))
    assert weight[0] < 0.03
    assert (weight[1:] > 0.5).all()


def test_a_single_group_gives_its_own_change_and_counts_it_as_the_error():
    control, change = like_changes_like(1)
    effects = GroupEffects(control, control + change)
    assert effects.scores == {}
    np.testing.assert_allclose(effects.change(control[0] + 1.0), change[0])
    np.testing.assert_allclose(effects.errors, change)


def test_the_error_covers_a_new_group_as_often_as_a_normal_error_would():
    covered = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        size = rng.gamma(1.0, 1.0, 300)  # genes with a large change vary more between groups
        change = size * (1 + rng.normal(0, 0.3, (7, 300))) + rng.normal(0, 0.05, (7, 300))
        control = rng.normal(2.0, 0.3, (7, 300))
        effects = GroupEffects(control[1:], control[1:] + change[1:])
        predicted = effects.change(control[0])
        error = np.sqrt(effects.error_variance(control[0] + predicted, predicted))
        covered.append(np.abs(change[0] - predicted) < 1.645 * error)
    assert 0.85 < np.mean(covered) < 0.95


def test_a_second_estimate_that_lies_far_off_is_given_the_error_that_explains_it():
    """Noisy observed changes, and a second estimate that errs far more than they do."""
    rng = np.random.default_rng(0)
    truth, noise = rng.normal(0, 0.3, 2000), 0.2
    control = rng.normal(size=(5, 2000))
    observed = truth + rng.normal(0, noise, (5, 2000))
    effects = GroupEffects(control, control + observed, np.full((5, 2000), noise**2))
    change = effects.change(control.mean(0))
    own_error = np.square(change - truth).mean()
    for size in (0.05, 0.2, 0.5):
        second = truth + rng.normal(0, size, 2000)
        weight = effects.weight_beside(change - second)
        best = size**2 / (size**2 + own_error)
        if size == 0.05:  # within what is assumed anyway: the mean squared error of the changes
            best = 1 / 2
        assert weight.mean() == pytest.approx(best, abs=0.1)
    unknown = GroupEffects(control, control + observed).weight_beside(change - second)
    assert unknown.mean() == pytest.approx(1 / 2, abs=0.1)


def test_changes_are_carried_over_without_their_noise_and_judged_with_it():
    rng = np.random.default_rng(0)
    control = rng.uniform(1.0, 3.0, (4, 300))
    truth = np.where(np.arange(300) < 30, 2.0, 0.0)
    noise = rng.normal(0, 0.3, (4, 300))
    plain, effects = (
        GroupEffects(control, control + truth + noise, variances)
        for variances in (None, np.full((4, 300), 0.09))
    )
    far = [np.square(e.change(control[0]) - truth).mean() for e in (plain, effects)]
    assert far[1] < 0.3 * far[0]
    assert 0.09 < np.square(effects.errors).mean() < np.square(plain.errors).mean()


def test_noise_alone_moves_no_profile():
    """Counts add up: a covariate with the noise of the change would find a common shift in it."""
    rng = np.random.default_rng(0)
    profile, noise = rng.uniform(0.1, 2.0, 2000), 0.3
    control, treated = profile + rng.normal(0, noise, (2, 4, 2000))
    effects = GroupEffects(control, treated, np.full((4, 2000), 2 * noise**2))
    assert abs(effects.change(profile).mean()) < 0.01


def test_very_many_left_out_changes_tell_the_error_of_a_gene_as_all_of_them_would(monkeypatch):
    rng = np.random.default_rng(0)
    control = rng.uniform(0, 4, (8, 2000))
    errors = (0.1 + 0.2 * control) * rng.normal(size=control.shape)  # larger in higher genes
    left_out = LeftOut(control, np.zeros_like(control), errors)
    change = np.zeros(2000)
    of_all = left_out.error_variance(control[0], change)
    monkeypatch.setattr(_left_out, "_MOST_COMPARED", 4000)
    of_some = left_out.error_variance(control[0], change)
    assert not np.array_equal(of_some, of_all)
    np.testing.assert_allclose(of_some, of_all, rtol=0.25)
