import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import energy_distance as scipy_energy_distance
from sklearn.metrics.pairwise import rbf_kernel

from discover_sc.evaluation import energy_distance, gene_variances, squared_mmd
from discover_sc.evaluation._cells import _CHUNK, median_distance, variance_scores


@pytest.fixture
def populations():
    rng = np.random.default_rng(0)
    return rng.normal(size=(30, 4)), rng.normal(0.5, 1.5, size=(20, 4))


def plain_mean(function, first, second, distinct=False):
    values = [
        function(x, y)
        for i, x in enumerate(first)
        for j, y in enumerate(second)
        if not (distinct and i == j)
    ]
    return np.mean(values)


# ----------------------------------------------------------------------------- distances


def test_energy_distance_is_that_of_a_plain_loop_over_distinct_cells(populations):
    first, second = populations

    def distance(x, y):
        return np.sqrt(((x - y) ** 2).sum())

    expected = (
        2 * plain_mean(distance, first, second)
        - plain_mean(distance, first, first, distinct=True)
        - plain_mean(distance, second, second, distinct=True)
    )
    assert energy_distance(first, second) == pytest.approx(expected)
    assert energy_distance(second, first) == pytest.approx(expected)


def test_energy_distance_in_one_dimension_is_the_square_of_scipy_s_for_many_cells():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=2000), rng.normal(1.0, 2.0, 2000)
    expected = scipy_energy_distance(first, second) ** 2  # with pairs of a cell with itself
    value = energy_distance(first[:, None], second[:, None])
    assert value == pytest.approx(expected, abs=5e-3)


def test_energy_distance_sees_a_difference_of_spread_where_squared_distances_see_none():
    rng = np.random.default_rng(0)
    first = rng.normal(size=(500, 3))
    first -= first.mean(axis=0)
    assert energy_distance(first, 3 * first) > 1.0  # the means are equal


def test_distances_scale_and_do_not_move_with_the_space(populations):
    first, second = populations
    assert energy_distance(5 * first + 1, 5 * second + 1) == pytest.approx(
        5 * energy_distance(first, second)
    )
    assert squared_mmd(5 * first + 1, 5 * second + 1) == pytest.approx(squared_mmd(first, second))


@pytest.mark.parametrize("distance", [energy_distance, squared_mmd])
def test_distances_are_zero_on_average_for_samples_of_one_population(distance):
    rng = np.random.default_rng(0)
    values = [distance(*(rng.normal(size=(n, 3)) for n in (15, 40))) for _ in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
    assert min(values) < 0 < max(values)


def test_squared_mmd_is_that_of_scikit_learn_s_kernel(populations):
    first, second = populations
    distances = np.linalg.norm(second[:, None] - second[None], axis=-1)
    bandwidth = np.median(distances[np.triu_indices(20, k=1)])
    gamma = 1 / (2 * bandwidth**2)
    within = [
        (rbf_kernel(x, gamma=gamma).sum() - len(x)) / (len(x) * (len(x) - 1))
        for x in (first, second)
    ]
    expected = sum(within) - 2 * rbf_kernel(first, second, gamma=gamma).mean()
    assert squared_mmd(first, second) == pytest.approx(expected)
    assert squared_mmd(first, second, bandwidth=bandwidth) == pytest.approx(expected)
    assert squared_mmd(first, second, bandwidth=9.0) != pytest.approx(expected)


def test_chunks_of_the_distance_matrix_add_up():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(_CHUNK + 3, 2)), rng.normal(0.4, 1, size=(5, 2))
    assert energy_distance(first, second) == pytest.approx(energy_distance(second, first))
    expected = 2 * plain_mean(lambda x, y: np.linalg.norm(x - y), first, second)
    distances = np.linalg.norm(first[:, None] - first[None], axis=-1)
    expected -= distances[np.triu_indices(len(first), k=1)].mean()
    distances = np.linalg.norm(second[:, None] - second[None], axis=-1)
    expected -= distances[np.triu_indices(5, k=1)].mean()
    assert energy_distance(first, second) == pytest.approx(expected)


def test_the_median_distance_of_many_cells_is_estimated_from_some():
    cells = np.random.default_rng(0).normal(size=(3 * _CHUNK, 1))
    differences = 0.6745 * np.sqrt(2)  # of two standard normal values, by hand
    assert median_distance(cells) == pytest.approx(differences, rel=0.05)


@pytest.mark.parametrize("distance", [energy_distance, squared_mmd])
def test_a_single_cell_is_no_population(distance):
    with pytest.raises(ValueError, match="have 1 and 3 cells; .* at least 2 each. Pass more"):
        distance([[0.0]], [[0.0], [1.0], [2.0]])


def test_cells_that_do_not_differ_have_no_bandwidth():
    with pytest.raises(ValueError, match="bandwidth is 0.0; it must be positive.*Choose one"):
        squared_mmd([[0.0], [1.0]], [[2.0], [2.0]])


# ----------------------------------------------------------------------------- variances


def test_gene_variances_are_those_of_numpy_dense_and_sparse():
    cells = np.random.default_rng(0).poisson(1.0, (25, 7)).astype(float)
    expected = np.var(cells, axis=0, ddof=1)
    np.testing.assert_allclose(gene_variances(cells), expected)
    np.testing.assert_allclose(gene_variances(sp.csr_matrix(cells)), expected)
    np.testing.assert_allclose(gene_variances(sp.csc_matrix(cells)), expected)


def test_one_cell_has_no_variance():
    with pytest.raises(ValueError, match="has 1 cells; a variance needs at least 2. Pass more"):
        gene_variances([[1.0, 2.0]])


def test_variance_scores_by_hand():
    observed = np.arange(30.0)
    predicted = observed.copy()
    predicted[0] += 10.0  # the least of the ranking, which has the last gene first
    ranking = np.arange(30)[::-1]
    scores = variance_scores(predicted, observed, ranking)
    residual, total = 100.0, ((observed - 14.5) ** 2).sum()
    assert scores == pytest.approx({"variance_r2": 1 - residual / total, "variance_r2_top20": 1.0})
