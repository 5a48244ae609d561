import numpy as np
import pytest
import scipy.sparse as sp
import scipy.stats
from sklearn.metrics import r2_score

from discover_sc.evaluation import (
    additive_shift,
    change_pearson,
    counterfactual_scores,
    counterfactual_table,
    direction_match,
    log_mean_profile,
    mean_shift,
    nearest_shift,
    split_half_ceiling,
    top_genes,
)
from discover_sc.evaluation._profiles import log_normalized

SCORES = ["r2", "r2_top", "lfc_r2", "lfc_r2_top", "lfc_pearson", "direction_match"]
ROWS = ["prediction", "no change", "mean shift", "nearest type's shift", "split-half ceiling"]


@pytest.fixture
def group():
    """Treated and control counts of one group: 8 of 60 genes are moved."""
    return draw_group(seed=0)


def draw_group(seed, n_cells=80, effect=1.0, offset=0.0):
    rng = np.random.default_rng(seed)
    truth = np.random.default_rng(99)  # genes and effects are common to all groups
    base = truth.gamma(1.0, 3.0, 60) + 0.5 + offset * truth.random(60)
    moved = np.zeros(60)
    moved[:8] = effect * truth.choice([-1.0, 1.0], 8)
    control = rng.poisson(base, (n_cells, 60))
    treated = rng.poisson(base * np.exp(moved), (n_cells, 60))
    return treated, control


def plain_profile(counts):
    total = np.zeros(counts.shape[1])
    for cell in counts:
        total += 1e4 * cell / cell.sum()
    return np.log(1 + total / len(counts))


# ---------------------------------------------------------------------------- profiles


def test_log_mean_profile_by_hand():
    # fractions (1/2, 1/2) and (3/4, 1/4): means 6,250 and 3,750 per 10,000
    profile = log_mean_profile([[1, 1], [3, 1]])
    np.testing.assert_allclose(profile, np.log([6251.0, 3751.0]))


def test_log_mean_profile_is_that_of_a_plain_loop_dense_and_sparse(group):
    treated, _ = group
    expected = plain_profile(treated)
    np.testing.assert_allclose(log_mean_profile(treated), expected)
    for sparse in (sp.csr_matrix(treated), sp.csc_matrix(treated), sp.csr_array(treated)):
        np.testing.assert_allclose(log_mean_profile(sparse), expected)


def test_depth_of_a_cell_does_not_move_the_profile(group):
    treated, _ = group
    depth = np.random.default_rng(0).integers(1, 9, (len(treated), 1))
    np.testing.assert_allclose(log_mean_profile(treated * depth), log_mean_profile(treated))


def test_a_cell_without_counts_has_no_expression():
    np.testing.assert_allclose(log_mean_profile([[0, 0], [1, 1]]), np.log([2501.0, 2501.0]))


def test_logs_of_sparse_counts_are_those_of_dense_counts_to_the_last_bit(group):
    counts = np.vstack([group[0], np.zeros(60, dtype=int)])
    sparse = sp.csr_matrix(counts)
    sparse.data[0] = 0  # a zero that is stored
    counts[0, sparse.indices[0]] = 0
    np.testing.assert_array_equal(log_normalized(sparse).toarray(), log_normalized(counts))


# --------------------------------------------------------------------------- top genes


def test_top_genes_have_the_largest_t_statistics_of_scipy(group):
    logs = [np.log1p(1e4 * x / x.sum(axis=1, keepdims=True)) for x in group]
    statistic = [scipy.stats.ttest_ind(logs[0][:, g], logs[1][:, g]).statistic for g in range(60)]
    expected = sorted(range(60), key=lambda g: -abs(statistic[g]))
    assert top_genes(*group, n_top=10).tolist() == expected[:10]
    assert len(top_genes(*group)) == 20


def test_more_genes_than_are_dense_at_once_have_the_same_scores(group, monkeypatch):
    predicted = log_mean_profile(group[0]) + np.random.default_rng(0).normal(0, 0.3, 60)
    expected = counterfactual_scores(predicted, *group)
    monkeypatch.setattr("discover_sc.evaluation._counterfactual._GENES_AT_ONCE", 7)
    for cells in (group, map(sp.csr_matrix, group)):
        assert counterfactual_scores(predicted, *cells) == pytest.approx(expected)


def test_top_genes_are_the_moved_ones():
    treated, control = draw_group(0, n_cells=300)
    assert sorted(top_genes(treated, control, n_top=8)) == list(range(8))


def test_silent_genes_are_never_on_top(group):
    treated, control = (np.pad(x, ((0, 0), (1, 0))) for x in group)
    assert 0 not in top_genes(treated, control, n_top=60)
    assert top_genes(treated, control, n_top=61)[-1] == 0


def test_a_gene_without_variance_is_not_moved():
    """All cells alike: no noise to compare with, and none of rounding either."""
    cells = np.tile([1, 2, 7], (3, 1))
    scores = counterfactual_scores(log_mean_profile(cells), cells, cells, n_top=2)
    assert np.isnan(scores["direction_match"])


# ------------------------------------------------------------------------------ scores


def test_change_pearson_is_that_of_numpy():
    first, second = np.random.default_rng(0).normal(size=(2, 30))
    assert change_pearson(first, second) == pytest.approx(np.corrcoef(first, second)[0, 1])
    assert change_pearson(first, -2 * first + 1) == pytest.approx(-1.0)


@pytest.mark.parametrize("constant", ["prediction", "truth"])
def test_change_pearson_of_a_constant_does_not_exist(constant):
    change = [1.0, 2.0, 3.0]
    pair = ([0.5] * 3, change) if constant == "prediction" else (change, [0.5] * 3)
    assert np.isnan(change_pearson(*pair))


def test_direction_match_by_hand():
    predicted, true = [1.0, -2.0, 0.0, 3.0, -1.0], [0.1, 4.0, 1.0, 2.0, -9.0]
    assert direction_match(predicted, true, [True] * 5) == 3 / 5  # 0 matches nothing
    assert direction_match(predicted, true, [True, True, False, False, False]) == 0.5
    assert np.isnan(direction_match(predicted, true, [False] * 5))


def test_a_perfect_prediction_scores_one(group):
    scores = counterfactual_scores(log_mean_profile(group[0]), *group)
    assert list(scores) == SCORES
    for name in SCORES:
        assert scores[name] == pytest.approx(1.0), name


def test_no_change_flatters_in_the_profile_and_fails_in_the_change(group):
    treated, control = group
    scores = counterfactual_scores(log_mean_profile(control), treated, control)
    assert scores["direction_match"] == 0.0
    assert np.isnan(scores["lfc_pearson"])
    assert scores["r2"] > 0.7
    assert scores["lfc_r2"] <= 0.0
    assert scores["lfc_r2_top"] <= 0.0


def plain_scores(predicted, treated, control, n_top):
    true, base = plain_profile(treated), plain_profile(control)
    logs = [np.log1p(1e4 * x / x.sum(axis=1, keepdims=True)) for x in (treated, control)]
    tests = [scipy.stats.ttest_ind(logs[0][:, g], logs[1][:, g]) for g in range(len(true))]
    top = sorted(range(len(true)), key=lambda g: -abs(tests[g].statistic))[:n_top]
    ranked = sorted(range(len(true)), key=lambda g: tests[g].pvalue)
    n_significant = 0  # Benjamini and Hochberg: the last rank below its line
    for rank, gene in enumerate(ranked, start=1):
        if tests[gene].pvalue < 0.05 * rank / len(true):
            n_significant = rank
    significant = ranked[:n_significant]
    hits = [(predicted[g] - base[g]) * (true[g] - base[g]) > 0 for g in significant]
    return {
        "r2": r2_score(true, predicted),
        "r2_top": r2_score(true[top], predicted[top]),
        "lfc_r2": r2_score(true - base, predicted - base),
        "lfc_r2_top": r2_score((true - base)[top], (predicted - base)[top]),
        "lfc_pearson": np.corrcoef(true - base, predicted - base)[0, 1],
        "direction_match": np.mean(hits),
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n_top", [5, 20])
def test_scores_are_those_of_a_plain_implementation(seed, n_top):
    treated, control = draw_group(seed)
    noise = np.random.default_rng(seed).normal(0, 0.3, 60)
    predicted = plain_profile(treated) + noise
    expected = plain_scores(predicted, treated, control, n_top)
    scores = counterfactual_scores(predicted, treated, control, n_top=n_top)
    assert scores == pytest.approx(expected)
    sparse = (sp.csr_matrix(treated), sp.csc_matrix(control))
    assert counterfactual_scores(predicted, *sparse, n_top=n_top) == pytest.approx(expected)


def test_permuted_cells_and_genes_have_the_same_scores(group):
    treated, control = group
    predicted = log_mean_profile(treated) + np.random.default_rng(0).normal(0, 0.3, 60)
    scores = counterfactual_scores(predicted, treated, control)
    genes = np.random.default_rng(1).permutation(60)
    permuted = counterfactual_scores(
        predicted[genes], treated[::-1][:, genes], control[::-1][:, genes]
    )
    assert permuted == pytest.approx(scores)


# --------------------------------------------------------------------------- baselines


def test_mean_shift_by_hand():
    changes = {"a": [1.0, -3.0, 0.0], "b": [0.0, -1.0, 0.5]}
    predicted = mean_shift([1.0, 1.0, 1.0], changes)
    np.testing.assert_allclose(predicted, [1.5, 0.0, 1.25])  # a profile is not below 0


def test_additive_shift_by_hand():
    changes = {"A": [1.0, -3.0, 0.0], "B": [0.5, 1.0, 0.5]}
    predicted = additive_shift([1.0, 1.0, 1.0], changes)
    np.testing.assert_allclose(predicted, [2.5, 0.0, 1.5])  # a profile is not below 0


def test_nearest_shift_follows_the_group_with_the_nearest_control():
    changes = {"far": [5.0, 5.0], "near": [1.0, -9.0]}
    controls = {"far": [9.0, 9.0], "near": [2.0, 1.0]}
    np.testing.assert_allclose(nearest_shift([2.0, 2.0], changes, controls), [3.0, 0.0])
    np.testing.assert_allclose(nearest_shift([8.0, 9.0], changes, controls), [13.0, 14.0])


# ----------------------------------------------------------------------------- ceiling


def test_ceiling_is_below_one_and_above_a_noisy_predictor(group):
    treated, _ = group
    ceiling = split_half_ceiling(*group)
    noise = np.random.default_rng(0).normal(0, 1.0, 60)
    noisy = counterfactual_scores(log_mean_profile(treated) + noise, *group)
    for name in ("r2", "r2_top", "lfc_r2", "lfc_r2_top", "lfc_pearson"):
        assert noisy[name] < ceiling[name] < 1.0, name


def test_ceiling_is_that_of_a_plain_loop_over_splits(group):
    treated, control = group
    n_splits, seed, n_top = 3, 5, 10
    rng = np.random.default_rng(seed)
    base = plain_profile(control)
    top = top_genes(treated, control, n_top=n_top)
    expected = {"r2": [], "lfc_r2_top": [], "lfc_pearson": []}
    for _ in range(n_splits):
        order = rng.permutation(len(treated))
        first, second = plain_profile(treated[order[:40]]), plain_profile(treated[order[40:]])
        expected["r2"].append(r2_score(second, first))
        expected["lfc_r2_top"].append(r2_score((second - base)[top], (first - base)[top]))
        expected["lfc_pearson"].append(np.corrcoef(first - base, second - base)[0, 1])
    ceiling = split_half_ceiling(treated, control, n_top=n_top, n_splits=n_splits, seed=seed)
    for name, values in expected.items():
        assert ceiling[name] == pytest.approx(np.mean(values)), name


def test_ceiling_rises_with_the_number_of_cells():
    few, many = (split_half_ceiling(*draw_group(0, n_cells=n)) for n in (20, 400))
    assert few["lfc_r2"] < many["lfc_r2"] < 1.0


def test_the_seed_decides_the_splits(group):
    first, again, other = (split_half_ceiling(*group, n_splits=2, seed=s) for s in (0, 0, 1))
    assert first == again
    assert first != other


def test_a_single_treated_cell_has_no_halves_and_is_refused(group):
    treated, control = group
    with pytest.raises(ValueError, match="at least (two|2) treated cells"):
        split_half_ceiling(treated[:1], control)


# ------------------------------------------------------------------------------- table


@pytest.fixture
def others():
    """Per other group its control and treated counts."""
    groups = {"near": draw_group(1, offset=0.5), "far": draw_group(2, effect=0.5, offset=30.0)}
    return {name: (control, treated) for name, (treated, control) in groups.items()}


def test_table_has_a_row_per_method_and_a_column_per_score(group, others):
    treated, control = group
    table = counterfactual_table(treated[:30], treated, control, others)
    assert list(table.index) == ROWS
    assert list(table.columns) == SCORES


def test_table_rows_are_the_scores_of_the_baselines_as_they_are_defined(group, others):
    treated, control = group
    predicted = draw_group(7, effect=0.8)[0]
    base = plain_profile(control)
    controls = {name: plain_profile(c) for name, (c, _) in others.items()}
    changes = {name: plain_profile(t) - controls[name] for name, (_, t) in others.items()}
    distances = {name: np.sqrt(((c - base) ** 2).sum()) for name, c in controls.items()}
    nearest = min(distances, key=distances.get)
    profiles = {
        "prediction": plain_profile(predicted),
        "no change": log_mean_profile(control),  # to the last bit, or it would correlate
        "mean shift": np.maximum(base + (changes["near"] + changes["far"]) / 2, 0),
        "nearest type's shift": np.maximum(base + changes[nearest], 0),
    }
    table = counterfactual_table(predicted, treated, control, others, n_top=10)
    assert nearest == "near"
    for row, profile in profiles.items():
        expected = counterfactual_scores(profile, treated, control, n_top=10)
        assert table.loc[row].to_dict() == pytest.approx(expected, nan_ok=True), row
    expected = split_half_ceiling(treated, control, n_top=10)
    assert table.loc["split-half ceiling"].to_dict() == pytest.approx(expected)


def test_table_is_the_same_for_sparse_counts(group, others):
    treated, control = group
    dense = counterfactual_table(treated, treated, control, others)
    groups = {n: (sp.csr_matrix(c), sp.csc_matrix(t)) for n, (c, t) in others.items()}
    sparse = counterfactual_table(
        sp.csr_matrix(treated), sp.csr_matrix(treated), sp.csr_matrix(control), groups
    )
    np.testing.assert_allclose(sparse, dense)


def test_table_without_other_groups_is_refused(group):
    with pytest.raises(ValueError, match="other_groups is empty.*Pass {group:"):
        counterfactual_table(group[0], *group, {})
