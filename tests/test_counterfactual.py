import numpy as np
import pytest
import torch

from discover_sc._counterfactual import (
    METHODS,
    Abduction,
    Blend,
    Groups,
    Linear,
    Neighbors,
    Prior,
    Reference,
    Shift,
    choose_way,
    cluster_groups,
    n_clusters_for,
)
from discover_sc._module import DiscoverVAE


def make_reference(change, n=80, missing_group=True, seed=0):
    """Three groups in z; w = change(z) under the target, 0 under the source, plus noise."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(["a", "b", "c"], n)
    z = rng.normal(size=(3 * n, 2)) * 0.3 + np.repeat([[0, 0], [3, 0], [6, 0]], n, axis=0)
    is_target = np.tile([True, False], 3 * n // 2)
    if missing_group:
        is_target &= groups != "c"
    w = np.where(is_target[:, None], change(z), 0.0) + 0.01 * rng.normal(size=(3 * n, 2))
    is_source = ~is_target
    return Reference(z.astype("float32"), w.astype("float32"), is_source, is_target, groups)


def constant(z):
    return np.tile([1.0, -2.0], (len(z), 1))


def growing(z):
    return np.stack([z[:, 0], np.zeros(len(z))], axis=1)


SOURCE, TARGET = torch.eye(2).split(1)
SOURCE_Z = np.array([[0.0, 0.0], [3.0, 0.0], [6.0, 0.0]], dtype="float32")
SOURCE_W = np.array([[5.0, 5.0], [0.0, 0.0], [-1.0, 2.0]], dtype="float32")


def test_groups_without_treated_cells_are_not_matched():
    assert make_reference(constant).matched_groups == ["a", "b"]
    assert make_reference(constant, missing_group=False).matched_groups == ["a", "b", "c"]


def test_without_any_matched_group_all_cells_count():
    reference = make_reference(constant)
    only_c = reference.groups == "c"
    lonely = Reference(
        reference.z, reference.w, only_c, ~only_c & reference.is_target, reference.groups
    )
    assert lonely.matched_groups == []
    assert np.array_equal(lonely.matched(lonely.is_source), only_c)
    moved = Shift().fit(lonely)(SOURCE_Z, SOURCE_W)
    np.testing.assert_allclose(moved - SOURCE_W, [[1.0, -2.0]] * 3, atol=0.05)


@pytest.mark.parametrize("way", [Shift, Neighbors, Groups, Linear], ids=lambda w: w.__name__)
def test_a_constant_change_is_added_and_the_cell_keeps_its_residual(way):
    moved = way().fit(make_reference(constant))(SOURCE_Z, SOURCE_W)
    np.testing.assert_allclose(moved - SOURCE_W, [[1.0, -2.0]] * 3, atol=0.05)


def test_shift_counts_each_group_once_however_many_cells_it_has():
    reference = make_reference(growing, missing_group=False)
    many = np.concatenate([np.arange(240), np.tile(np.flatnonzero(reference.groups == "c"), 9)])
    unbalanced = Reference(
        *(getattr(reference, f)[many] for f in ("z", "w", "is_source", "is_target", "groups"))
    )
    np.testing.assert_allclose(Shift().fit(unbalanced).change[0], 3.0, atol=0.1)


def test_linear_extrapolates_a_change_that_grows_with_z():
    moved = Linear().fit(make_reference(growing))(SOURCE_Z, SOURCE_W)
    np.testing.assert_allclose((moved - SOURCE_W)[:, 0], [0.0, 3.0, 6.0], atol=0.3)


def test_neighbors_are_local_and_do_not_extrapolate():
    moved = Neighbors().fit(make_reference(growing))(SOURCE_Z, SOURCE_W)
    change = (moved - SOURCE_W)[:, 0]
    np.testing.assert_allclose(change[:2], [0.0, 3.0], atol=0.3)
    assert change[2] < 4.5


def test_neighbors_agree_with_a_plain_loop():
    reference = make_reference(growing)
    moved = Neighbors().fit(reference)(SOURCE_Z[1:2], SOURCE_W[1:2])
    means = []
    for side in (reference.is_target, reference.is_source):
        cells = np.flatnonzero(side & np.isin(reference.groups, ["a", "b"]))
        distance = np.linalg.norm(reference.z[cells] - SOURCE_Z[1], axis=1)
        means.append(reference.w[cells[np.argsort(distance)[:15]]].mean(axis=0))
    np.testing.assert_allclose(moved[0], SOURCE_W[1] + means[0] - means[1], rtol=1e-5)


def test_groups_vote_by_how_much_their_source_cells_look_alike_in_w():
    rng = np.random.default_rng(0)
    groups, is_target = np.repeat(["a", "b"], 100), np.tile([True, False], 100)
    base = np.where(groups == "a", 0.0, 10.0)[:, None]
    change = np.where(groups == "a", 1.0, -1.0)[:, None]
    w = base + is_target[:, None] * change + 0.01 * rng.normal(size=(200, 1))
    reference = Reference(np.zeros((200, 1)), w, ~is_target, is_target, groups)
    moved = Groups().fit(reference)(np.zeros((2, 1)), np.array([[0.5], [9.0]]))
    np.testing.assert_allclose(moved, [[1.5], [8.0]], atol=0.02)


def test_groups_without_matched_groups_are_a_shift():
    reference = make_reference(constant)
    lonely = Reference(
        reference.z,
        reference.w,
        reference.groups == "c",
        (reference.groups == "a") & reference.is_target,
        reference.groups,
    )
    expected = Shift().fit(lonely)(SOURCE_Z, SOURCE_W)
    np.testing.assert_allclose(Groups().fit(lonely)(SOURCE_Z, SOURCE_W), expected)


@pytest.fixture
def module():
    torch.manual_seed(0)
    return DiscoverVAE(8, [torch.tensor([[0.5, 0.5]])], n_latent=2, n_latent_specific=2).eval()


def prior_mean(module, code):
    with torch.no_grad():
        features = torch.eye(2)[[code] * 3]
        return module.prior(torch.as_tensor(SOURCE_Z), features).numpy()


def test_prior_forgets_w_and_abduction_keeps_its_residual(module):
    source, target = SOURCE, TARGET
    reference = make_reference(constant)
    replaced = Prior(module, target).fit(reference)(SOURCE_Z, SOURCE_W)
    np.testing.assert_allclose(replaced, prior_mean(module, 1), rtol=1e-5)
    kept = Abduction(module, source, target).fit(reference)(SOURCE_Z, SOURCE_W)
    expected = prior_mean(module, 1) + SOURCE_W - prior_mean(module, 0)
    np.testing.assert_allclose(kept, expected, rtol=1e-5, atol=1e-6)


def test_no_change_of_condition_is_no_change_of_w(module):
    same = TARGET
    kept = Abduction(module, same, same)(SOURCE_Z, SOURCE_W)
    np.testing.assert_allclose(kept, SOURCE_W, atol=1e-6)


def test_blend_is_the_mean_of_its_ways():
    reference = make_reference(growing)
    blend = Blend([Shift(), Linear()]).fit(reference)(SOURCE_Z, SOURCE_W)
    parts = [way().fit(reference)(SOURCE_Z, SOURCE_W) for way in (Shift, Linear)]
    np.testing.assert_allclose(blend, np.mean(parts, axis=0), rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_way(module, method):
    way, description = choose_way(method, module, SOURCE, TARGET)
    moved = way.fit(make_reference(constant))(SOURCE_Z, SOURCE_W)
    assert moved.shape == SOURCE_W.shape
    assert description


def test_an_unknown_method_is_refused_with_the_known_ones(module):
    with pytest.raises(ValueError, match=r"method is 'ot'; methods are \['auto', 'shift'"):
        choose_way("ot", module, SOURCE, TARGET)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([100, 100], 4),  # 25 of each condition in a cluster
        ([24, 24], 1),
        ([5000, 5000], 10),
        ([30, 120, 120], 2),  # changes from few cells are noisy, whatever the others
        ([1000, 1000, 10], 10),  # one rare condition does not spoil the others
        ([1000, 1000, 10, 10, 10], 4),  # most pairs have one
        ([1000, 1000, 4], 10),  # too few to be compared at all
        ([1000, 4], 1),
        ([4, 4] + 4 * [200], 8),
    ],
)
def test_clusters_hold_enough_cells_of_typical_conditions(sizes, expected):
    codes = np.repeat(np.arange(len(sizes)), sizes)[:, None]
    assert n_clusters_for(codes) == expected


def test_a_key_of_many_levels_leaves_the_clusters_of_another_alone():
    treatment, donor = np.divmod(np.arange(2000), 1000)
    codes = np.column_stack([treatment, donor % 40])  # 50 cells of each donor
    assert n_clusters_for(codes) == 10
    assert n_clusters_for(codes[:, [1]]) == 2


def test_clusters_of_z_stand_for_groups():
    z = make_reference(constant).z
    clusters = cluster_groups(z, 4).labels_
    for group in range(3):  # no cluster spans two groups
        members = clusters[group * 80 : (group + 1) * 80]
        others = np.delete(clusters, slice(group * 80, (group + 1) * 80))
        assert not set(members) & set(others)
