import numpy as np
import pytest
import torch

from discover_sc._calibration import (
    GroupMeans,
    LogCalibration,
    OwnChange,
    ShiftCalibration,
    anchored,
    closed,
    combine,
    uncalibrated,
)
from discover_sc._group_effects import GroupEffects
from discover_sc._left_out import LeftOut
from discover_sc._parts import PartChanges

MEANS = GroupMeans(
    observed=np.array([3.0, 1.0]),
    decoded=np.array([2.0, 1.5]),
    predicted=np.array([4.0, 1.0]),
    n_cells=50,
)


def test_what_the_decoder_misses_is_added_to_both_sides_and_shrunk_by_the_cells():
    base, model = anchored(MEANS)  # 50 cells: half of what is missed
    np.testing.assert_allclose(base, [2.5, 1.25])
    np.testing.assert_allclose(model, [4.5, 0.75])


def test_without_observed_groups_the_estimate_is_the_models_and_its_error_unknown():
    estimate = combine(MEANS)
    np.testing.assert_allclose(estimate.profile, [4.5, 0.75])
    assert np.isnan(estimate.error).all()


def test_without_calibration_the_profile_is_the_decoded_one():
    estimate = uncalibrated(MEANS, None)
    np.testing.assert_array_equal(estimate.profile, MEANS.predicted)


def test_observed_changes_and_the_model_are_weighed_gene_by_gene():
    control = np.array([[2.0, 1.0], [2.5, 1.2], [2.2, 1.1]])
    effects = GroupEffects(control, control + [[1.0, 0.5], [1.2, 0.5], [0.8, -0.5]])
    estimate = combine(MEANS, effects)
    base, model = anchored(MEANS)
    weight = effects.weight_beside(base + effects.change(base) - model)
    expected = (1 - weight) * model + weight * (base + effects.change(base))
    np.testing.assert_allclose(estimate.profile, expected)
    assert weight[0] > weight[1]
    assert estimate.observed_weight == pytest.approx(weight.mean())
    assert (estimate.error > 0).all()


def test_the_change_observed_of_the_group_itself_is_trusted_by_its_cells():
    own = OwnChange(np.array([0.5, 2.0]), n_cells=150)  # three quarters
    profile = combine(MEANS, own=own).profile
    base, model = anchored(MEANS)
    np.testing.assert_allclose(profile, 0.25 * model + 0.75 * (base + own.change))


def test_calibrated_cells_have_the_wanted_mean_and_none_is_negative():
    torch.manual_seed(0)
    expression = torch.rand(40, 3) * torch.tensor([10.0, 5.0, 1.0])
    group = torch.arange(40) % 2
    predicted = torch.stack([torch.log1p(expression[group == g].mean(0)) for g in (0, 1)])
    wanted = torch.tensor([[3.0, 0.2, 1.0], [0.0, 2.0, 0.1]])
    moved = LogCalibration(predicted, wanted)(expression, group)
    assert (moved >= 0).all()
    for g in (0, 1):
        mean = moved[group == g].mean(0)
        torch.testing.assert_close(torch.log1p(mean), wanted[g], atol=1e-5, rtol=1e-5)


def test_a_wanted_mean_below_zero_counts_as_zero():
    moved = LogCalibration(torch.ones(1, 1), -torch.ones(1, 1))(
        torch.ones(2, 1), torch.zeros(2).long()
    )
    torch.testing.assert_close(moved, torch.zeros(2, 1))


def test_plain_means_are_moved_by_adding():
    calibrate = ShiftCalibration(torch.tensor([[1.0], [5.0]]), torch.tensor([[2.0], [4.0]]))
    moved = calibrate(torch.tensor([[0.0], [7.0]]), torch.tensor([0, 1]))
    torch.testing.assert_close(moved, torch.tensor([[1.0], [6.0]]))


def test_a_closed_profile_adds_up_and_keeps_the_proportions_of_what_is_not_negative():
    counts = np.expm1(closed(np.log1p([30.0, 10.0, -0.5])))
    np.testing.assert_allclose(counts, [7500.0, 2500.0, 0.0])


def test_two_ways_of_putting_parts_together_are_averaged_and_their_distance_is_an_error():
    left_out = LeftOut(np.zeros((1, 2)), np.zeros((1, 2)), np.full((1, 2), 0.3))
    parts = PartChanges(np.array([0.2, 0.0]), np.array([0.1, 0.0]), np.array([1.0, 0.5]), left_out)
    estimate = combine(MEANS, parts=parts)
    base, model = anchored(MEANS)
    np.testing.assert_allclose(estimate.source, base + [0.2, 0.0])
    together, apart = model + [0.3, 0.0], base + [1.2, 0.5]
    np.testing.assert_allclose(estimate.profile, (together + apart) / 2)
    np.testing.assert_allclose(estimate.error**2, 0.09 + (together - apart) ** 2 / 4)
