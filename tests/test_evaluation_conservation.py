import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from discover_sc.evaluation import kmeans_ari, kmeans_nmi

SCORES = pytest.mark.parametrize(
    ("score", "reference"),
    [(kmeans_nmi, normalized_mutual_info_score), (kmeans_ari, adjusted_rand_score)],
    ids=["nmi", "ari"],
)


def draw_clusters(distance, n_cells=150, seed=0):
    """Three overlapping clusters on a line."""
    rng = np.random.default_rng(seed)
    target = rng.integers(3, size=n_cells)
    return rng.normal(size=(n_cells, 2)) + distance * target[:, None], target


@SCORES
@pytest.mark.parametrize("distance", [0.0, 1.5, 3.0])
def test_score_is_that_of_scikit_learn(score, reference, distance):
    latent, target = draw_clusters(distance)
    clusters = KMeans(3, n_init=10, random_state=4).fit_predict(latent)
    assert score(latent, target, seed=4) == pytest.approx(reference(target, clusters))


@SCORES
def test_separate_classes_score_one_whatever_they_are_called(score, reference):
    latent, target = draw_clusters(20.0)
    assert score(latent, target) == pytest.approx(1.0)
    assert score(latent, np.array(["T", "B", "NK"])[target]) == pytest.approx(1.0)
    assert score(latent.tolist(), target.tolist()) == pytest.approx(1.0)


@SCORES
def test_permuted_cells_have_the_same_score(score, reference):
    latent, target = draw_clusters(3.0)
    order = np.random.default_rng(1).permutation(len(target))
    assert score(latent[order], target[order]) == pytest.approx(score(latent, target), abs=0.02)


def test_rand_index_of_noise_is_zero_on_average():
    scores = [kmeans_ari(*draw_clusters(0.0, seed=s)) for s in range(10)]
    assert abs(np.mean(scores)) < 4 * np.std(scores) / np.sqrt(10)


def test_clustering_is_blind_to_a_condition_that_a_dimension_tells():
    """Why invariance is not judged by it: wide types hide a narrow, certain condition."""
    rng = np.random.default_rng(0)
    types, condition = np.repeat([0, 1], 100), np.tile([0, 1], 100)
    latent = np.column_stack([50.0 * types, condition]) + rng.normal(0, 0.05, (200, 2))
    assert kmeans_nmi(latent, condition) < 0.05
    assert kmeans_nmi(latent, types) == pytest.approx(1.0)
