import numpy as np
import pytest

from discover_sc._counterfactual import Reference
from discover_sc._support import Support, warn_of_low_support


def make_reference(n=200):
    rng = np.random.default_rng(0)
    groups = np.array(["seen"] * n + ["unseen"] * n)
    z = rng.normal(size=(2 * n, 2)) + np.where(groups == "seen", 0.0, 8.0)[:, None]
    is_target = (np.arange(2 * n) % 2 == 0) & (groups == "seen")
    return Reference(z, rng.normal(size=(2 * n, 2)), ~is_target, is_target, groups)


def test_cells_like_those_seen_on_both_sides_are_supported_and_others_are_not():
    reference = make_reference()
    support = Support(reference)
    seen = reference.is_source & (reference.groups == "seen")
    unseen = reference.groups == "unseen"
    fresh = np.random.default_rng(1)
    like_seen = support(fresh.normal(size=(300, 2)), fresh.normal(size=(300, 2)))
    assert like_seen.mean() == pytest.approx(0.5, abs=0.1)  # uniform where nothing is special
    assert support(reference.z[unseen], reference.w[unseen]).max() < 0.05
    assert ((like_seen >= 0) & (like_seen <= 1)).all()
    assert seen.sum() == 100


def test_support_does_not_depend_on_the_units_of_a_latent():
    reference = make_reference()
    scaled = Reference(
        reference.z * 100, reference.w, reference.is_source, reference.is_target, reference.groups
    )
    z, w = np.random.default_rng(1).normal(size=(2, 50, 2))
    np.testing.assert_allclose(Support(reference)(z, w), Support(scaled)(z * 100, w))


def test_without_any_group_on_both_sides_there_is_no_support():
    reference = make_reference()
    nowhere = Reference(
        reference.z,
        reference.w,
        reference.is_source,
        ~reference.is_source & False,
        reference.groups,
    )
    np.testing.assert_array_equal(Support(nowhere)(reference.z, reference.w), 0.0)


def test_low_support_warns_and_high_does_not():
    warn_of_low_support(np.full(10, 0.5))  # a warning would be an error here
    with pytest.warns(UserWarning, match=r"median support of the source cells is 0\.01.*treated"):
        warn_of_low_support(np.full(10, 0.01))
