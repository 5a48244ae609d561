import numpy as np
import pytest
import scipy.sparse as sp

from discover_sc.data import simulate


def mean_fractions(adata):
    """Mean fraction of each gene, and its standard error, over cells."""
    counts = adata.X.toarray().astype(float)
    fractions = counts / counts.sum(axis=1, keepdims=True)
    return fractions.mean(axis=0), fractions.std(axis=0) / np.sqrt(len(fractions))


def log_change(first, second):
    """Log ratio of mean fractions, and its standard error by the delta method."""
    (mean, error), (base, base_error) = mean_fractions(first), mean_fractions(second)
    return np.log(mean / base), np.hypot(error / mean, base_error / base)


def test_the_same_seed_gives_the_same_cells_and_another_seed_others():
    first, again, other = (simulate(100, 30, n_batches=2, seed=s) for s in (3, 3, 4))
    assert (first.X != again.X).nnz == 0
    assert first.obs.equals(again.obs)
    np.testing.assert_array_equal(first.varm["common_effect"], again.varm["common_effect"])
    assert (first.X != other.X).nnz > 0
    assert not first.obs["condition"].equals(other.obs["condition"])


def test_counts_are_integers_in_sparse_rows():
    adata = simulate(100, 30)
    assert adata.shape == (100, 30)
    assert sp.isspmatrix_csr(adata.X)
    assert adata.X.dtype == np.float32
    assert adata.X.data.min() >= 1
    np.testing.assert_array_equal(adata.X.data, np.round(adata.X.data))


def test_groups_have_the_names_and_numbers_asked_for():
    adata = simulate(500, 20, n_types=3, n_conditions=4, n_batches=2)
    assert list(adata.obs["condition"].cat.categories) == ["ctrl", "treat_1", "treat_2", "treat_3"]
    assert list(adata.obs["cell_type"].cat.categories) == ["type_0", "type_1", "type_2"]
    assert list(adata.obs["batch"].cat.categories) == ["batch_0", "batch_1"]
    combinations = adata.obs.groupby(["condition", "cell_type", "batch"], observed=True)
    assert combinations.ngroups == 4 * 3 * 2


def test_moved_genes_change_by_the_planted_effect_and_the_others_do_not():
    adata = simulate(
        6000, 80, n_types=1, effect_scale=1.5, specific_effect_scale=0.0, dispersion=10.0, seed=2
    )
    treated = adata.obs["condition"] == "treat_1"
    change, error = log_change(adata[treated], adata[~treated])
    planted = adata.varm["common_effect"][:, 1]
    # fractions sum to 1: a rise of some genes lowers all others by the same factor
    composition = np.median(change[planted == 0])
    z_scores = (change - composition - planted) / error
    assert 3 <= (planted != 0).sum() <= 20
    assert np.abs(z_scores).max() < 5  # 80 genes; the largest of 80 normal numbers is near 2.7
    moved = np.abs((change - composition) / error)[np.abs(planted) > 0.5]
    assert moved.min() > 5


def test_a_specific_effect_is_seen_in_its_own_type_only():
    adata = simulate(
        8000, 60, n_types=2, effect_scale=0.0, specific_effect_scale=2.0, dispersion=10.0, seed=1
    )
    assert not adata.varm["common_effect"].any()
    effects = adata.uns["type_effects"]["treat_1"]  # (n_types, n_genes)
    only_first = (np.abs(effects[0]) > 0.5) & (effects[1] == 0)
    assert only_first.any()
    for name, seen in (("type_0", True), ("type_1", False)):
        cells = adata[adata.obs["cell_type"] == name]
        treated = cells.obs["condition"] == "treat_1"
        change, error = log_change(cells[treated], cells[~treated])
        unmoved = (effects == 0).all(axis=0)
        z_scores = np.abs(change - np.median(change[unmoved]))[only_first] / error[only_first]
        assert (z_scores > 5).all() if seen else (z_scores < 5).all()


def test_the_control_has_no_effect_and_type_effects_contain_the_common_one():
    adata = simulate(50, 200, n_types=3, n_conditions=3, specific_effect_scale=0.0)
    common = adata.varm["common_effect"]
    assert common.shape == (200, 3)
    assert not common[:, 0].any()
    assert not adata.uns["type_effects"]["ctrl"].any()
    for code, condition in enumerate(["ctrl", "treat_1", "treat_2"]):
        expected = np.tile(common[:, code], (3, 1))
        np.testing.assert_array_equal(adata.uns["type_effects"][condition], expected)


def test_affected_fraction_is_the_share_of_moved_genes():
    adata = simulate(10, 5000, affected_fraction=0.3)
    share = (adata.varm["common_effect"][:, 1] != 0).mean()
    assert abs(share - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 5000)


def test_shared_expression_is_the_fractions_without_condition_and_batch():
    """The truth of z is the same whatever the treatment and the batch did to the cell."""
    options = {"n_batches": 2, "seed": 5}
    plain = simulate(
        80, 40, effect_scale=0.0, specific_effect_scale=0.0, batch_scale=0.0, **options
    )
    moved = simulate(80, 40, effect_scale=2.0, batch_scale=1.0, **options)
    shared = plain.layers["shared_expression"]
    np.testing.assert_allclose(shared.sum(axis=1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(moved.layers["shared_expression"], shared)
    np.testing.assert_array_equal(moved.obsm["shared_programs"], plain.obsm["shared_programs"])


def test_untreated_cells_of_one_batch_have_the_shared_expression():
    adata = simulate(3000, 30, n_types=2, dispersion=20.0)
    control = adata[(adata.obs["condition"] == "ctrl").to_numpy()]
    mean, error = mean_fractions(control)
    z_scores = (mean - control.layers["shared_expression"].mean(axis=0)) / error
    assert np.abs(z_scores).max() < 4.5


def test_library_sizes_are_log_normal_around_the_median_asked_for():
    n, scale = 4000, 0.2
    adata = simulate(n, 30, mean_library_size=5000.0, library_scale=scale)
    library = adata.obs["library_size"].to_numpy()
    error = scale * np.sqrt(np.pi / 2 / n)  # standard error of a median of normal logarithms
    assert abs(np.log(np.median(library) / 5000.0)) < 4 * error
    assert np.log(library).std() == pytest.approx(scale, rel=4 / np.sqrt(2 * n))
    ratio = np.asarray(adata.X.sum(axis=1)).ravel() / library
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / np.sqrt(n)


def test_smaller_dispersion_parameter_means_more_noise():
    noisy, quiet = (simulate(2000, 20, n_types=1, dispersion=d) for d in (0.5, 50.0))
    spread = [a.X.toarray().std(axis=0) / a.X.toarray().mean(axis=0) for a in (noisy, quiet)]
    assert (spread[0] > spread[1]).all()


def test_dropped_types_are_missing_from_their_condition_only():
    adata = simulate(600, 20, n_types=3, n_conditions=3, drop={"treat_1": ["type_0", "type_2"]})
    table = adata.obs.groupby(["condition", "cell_type"], observed=False).size().unstack()
    assert table.loc["treat_1"].tolist()[0] == table.loc["treat_1"].tolist()[2] == 0
    assert (table.loc[["ctrl", "treat_2"]] > 30).to_numpy().all()


@pytest.mark.parametrize(("batch_scale", "seen"), [(0.5, True), (0.0, False)])
def test_batches_move_genes_by_the_batch_scale(batch_scale, seen):
    adata = simulate(4000, 40, n_types=1, n_batches=2, batch_scale=batch_scale, dispersion=10.0)
    first = adata.obs["batch"] == "batch_0"
    change, error = log_change(adata[first], adata[~first])
    assert (np.abs(change / error).max() > 10) == seen


def test_a_single_batch_has_no_batch_effect():
    first, second = (simulate(50, 20, n_batches=1, batch_scale=s) for s in (0.0, 3.0))
    assert (first.X != second.X).nnz == 0


def test_simulation_arguments_are_kept_with_the_data():
    arguments = {"n_types": 3, "effect_scale": 1.5, "dispersion": 2.0, "seed": 7}
    kept = simulate(50, 20, **arguments).uns["simulation"]
    assert {name: kept.get(name) for name in arguments} == arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_conditions": 1}, "n_conditions is 1; at least 2 are needed"),
        ({"drop": {"nowhere": ["type_0"]}}, "drop names 'nowhere'.*conditions are"),
        ({"drop": {"ctrl": ["type_9"]}}, "type_9.*cell types are"),
        ({"n_types": 2, "drop": {"ctrl": ["type_0", "type_1"]}}, "keeps at least one type"),
    ],
    ids=["one condition", "unknown condition", "unknown type", "no type left"],
)
def test_simulate_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate(50, 20, **arguments)


def test_unresponsive_types_have_no_effect_and_the_others_keep_theirs():
    full, partial = (simulate(400, 50, unresponsive=types, seed=4) for types in ([], ["type_1"]))
    expected = full.uns["type_effects"]["treat_1"].copy()
    assert (expected[1] != 0).any()
    expected[1] = 0.0
    np.testing.assert_array_equal(partial.uns["type_effects"]["treat_1"], expected)
    others = (full.obs["cell_type"] != "type_1").to_numpy()
    assert full.obs.equals(partial.obs)
    np.testing.assert_array_equal(
        full.layers["shared_expression"][others], partial.layers["shared_expression"][others]
    )


def test_unresponsive_types_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"unresponsive names \['type_9'\]; cell types are"):
        simulate(100, 20, unresponsive=["type_9"])
