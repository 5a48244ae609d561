import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from discover_sc.evaluation import (
    chance_accuracy,
    composition_accuracy,
    condition_probes,
    probe_accuracy,
)

PROBES = ("logistic", "mlp", "nearest_neighbors")
CLASSIFIERS = {
    "logistic": LogisticRegression(max_iter=1000),
    "nearest_neighbors": KNeighborsClassifier(15),
}


def draw_noise(n_cells=400, n_latent=4, n_classes=2, seed=0):
    """A latent that carries nothing of balanced classes."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n_cells, n_latent)), rng.permutation(n_cells) % n_classes


def draw_informative(n_cells=400, distance=6.0, seed=0):
    latent, target = draw_noise(n_cells, seed=seed)
    return latent + distance * target[:, None], target


def means(accuracies):
    return {name: folds.mean() for name, folds in accuracies.items()}


@pytest.mark.parametrize(
    ("target", "chance"),
    [(["a", "b", "b", "b"], 0.5), ([0, 1, 2, 3], 0.25), (["a", "a"], 1.0)],
)
def test_chance_is_one_over_the_number_of_classes_however_frequent_they_are(target, chance):
    assert chance_accuracy(target) == chance


def test_composition_tells_the_classes_as_far_as_groups_differ_between_them():
    target = ["a"] * 10 + ["b"] * 20
    assert composition_accuracy(target, ["g", "h"] * 15) == 0.5  # composed alike
    assert composition_accuracy(target, target) == 1.0
    groups = ["g"] * 8 + ["h"] * 2 + ["g"] * 10 + ["h"] * 10
    assert composition_accuracy(target, groups) == pytest.approx((0.8 + 0.5) / 2)


@pytest.mark.parametrize("names", [("ctrl", "stim"), ("stim", "ctrl")], ids=["as is", "renamed"])
@pytest.mark.parametrize("n_cells", [100, 200, 400])
def test_probes_read_a_certain_condition_from_few_cells_as_well(n_cells, names):
    latent, target = draw_informative(n_cells)
    accuracies = probe_accuracy(latent, np.array(names)[target])
    assert tuple(accuracies) == PROBES
    for name, folds in accuracies.items():
        assert folds.shape == (5,)
        assert folds.mean() > 0.99, name


@pytest.mark.parametrize("n_classes", [2, 4])
def test_probes_find_nothing_in_noise(n_classes):
    latent, target = draw_noise(n_classes=n_classes)
    chance = 1 / n_classes
    # each of the 400 cells is judged once; balanced classes, so the mean is a share of cells
    error = np.sqrt(chance * (1 - chance) / 400)
    for name, accuracy in means(probe_accuracy(latent, target)).items():
        assert abs(accuracy - chance) < 4 * error, name


def test_naming_the_frequent_class_always_is_worth_chance():
    """Balanced accuracy: 95 % of the cells in one class do not make noise informative."""
    latent, _ = draw_noise()
    target = np.repeat(["frequent", "rare"], [380, 20])
    assert probe_accuracy(latent, target)["logistic"].tolist() == [0.5] * 5


def test_only_nonlinear_probes_read_a_ring():
    rng = np.random.default_rng(0)
    target = rng.permutation(800) % 2
    angle, radius = rng.uniform(0, 2 * np.pi, 800), 1.0 + 2.0 * target + rng.normal(0, 0.2, 800)
    ring = np.column_stack([radius * np.cos(angle), radius * np.sin(angle)])
    accuracies = means(probe_accuracy(ring, target))
    assert accuracies["logistic"] < 0.65
    assert accuracies["nearest_neighbors"] > 0.95
    assert accuracies["mlp"] > 0.9


@pytest.mark.parametrize("name", list(CLASSIFIERS))
def test_probe_accuracy_is_that_of_a_plain_loop_over_folds(name):
    latent, target = draw_informative(n_cells=200, distance=0.8)
    expected = []
    for train, test in StratifiedKFold(4, shuffle=True, random_state=3).split(latent, target):
        scaler = StandardScaler().fit(latent[train])  # the test cells are not looked at
        probe = CLASSIFIERS[name].fit(scaler.transform(latent[train]), target[train])
        prediction = probe.predict(scaler.transform(latent[test]))
        recalls = [(prediction[target[test] == c] == c).mean() for c in (0, 1)]
        expected.append(np.mean(recalls))
    accuracies = probe_accuracy(latent, target, n_folds=4, seed=3)
    np.testing.assert_allclose(accuracies[name], expected)


def test_units_of_the_dimensions_do_not_matter():
    latent, target = draw_informative(n_cells=200, distance=0.8)
    rescaled = latent * np.array([1e3, 1.0, 1e-3, 10.0]) - 5.0
    first, second = probe_accuracy(latent, target), probe_accuracy(rescaled, target)
    for name in PROBES:
        np.testing.assert_allclose(first[name], second[name], atol=0.03)


def test_permuted_cells_and_relabelled_classes_have_the_same_accuracy():
    latent, target = draw_informative(distance=0.8)
    accuracies = means(probe_accuracy(latent, target))
    order = np.random.default_rng(1).permutation(len(target))
    permuted = means(probe_accuracy(latent[order], target[order]))
    renamed = means(probe_accuracy(latent, np.array(["stim", "ctrl"])[target]))
    for name in PROBES:  # other folds, another start of the perceptron: 2 standard errors
        assert permuted[name] == pytest.approx(accuracies[name], abs=0.05)
        assert renamed[name] == pytest.approx(accuracies[name], abs=0.05)
    assert renamed["logistic"] == pytest.approx(accuracies["logistic"], abs=1e-9)


def test_the_seed_decides_the_folds():
    latent, target = draw_informative(distance=0.8)
    first, again, other = (probe_accuracy(latent, target, seed=s) for s in (0, 0, 1))
    for name in PROBES:
        np.testing.assert_array_equal(first[name], again[name])
    assert first["logistic"].tolist() != other["logistic"].tolist()


def test_a_single_class_is_refused():
    latent, _ = draw_noise(20)
    with pytest.raises(ValueError, match="All cells have the class 'ctrl'.*at least two classes"):
        probe_accuracy(latent, ["ctrl"] * 20)


def test_a_class_with_fewer_cells_than_folds_is_refused():
    latent, _ = draw_noise(20)
    target = ["ctrl"] * 17 + ["stim"] * 3
    with pytest.raises(ValueError, match="Class 'stim' has 3 cells.*n_folds=4.*lower n_folds"):
        probe_accuracy(latent, target, n_folds=4)
    assert probe_accuracy(latent, target, n_folds=3)["logistic"].shape == (3,)


def test_few_cells_are_probed_as_long_as_each_class_has_one_per_fold():
    """The documented rule; the perceptron's own validation cells must not ask for more."""
    latent = np.concatenate([np.zeros((5, 2)), np.ones((5, 2))])
    target = np.repeat(["ctrl", "stim"], 5)
    accuracies = probe_accuracy(latent, target)
    assert accuracies["logistic"].tolist() == [1.0] * 5
    assert accuracies["mlp"].shape == (5,)


# --------------------------------------------------------------------- condition_probes


def test_condition_probes_read_informative_cells_perfectly():
    accuracies, chance, _ = condition_probes(*draw_informative(), *draw_informative(seed=1))
    assert accuracies == {"logistic": 1.0, "nearest_neighbors": 1.0}
    assert chance == 0.5


def test_condition_probes_find_nothing_in_noise():
    accuracies, chance, error = condition_probes(*draw_noise(), *draw_noise(seed=1))
    for accuracy in accuracies.values():
        assert abs(accuracy - chance) < 4 * error


@pytest.mark.parametrize("name", list(CLASSIFIERS))
def test_condition_probes_are_those_of_scikit_learn(name):
    train, test = draw_informative(distance=0.8), draw_informative(100, distance=0.8, seed=1)
    scaler = StandardScaler().fit(train[0])
    probe = CLASSIFIERS[name].fit(scaler.transform(train[0]), train[1])
    prediction = probe.predict(scaler.transform(test[0]))
    accuracies, _, _ = condition_probes(*train, *test)
    assert accuracies[name] == pytest.approx(balanced_accuracy_score(test[1], prediction))


def test_standard_error_at_chance_in_closed_form():
    # recall of class k at chance c has variance c (1 - c) / n_k; the accuracy is their mean
    latent, target = draw_noise()
    test_target = np.repeat([0, 1], [10, 40])
    _, _, error = condition_probes(latent, target, latent[:50], test_target)
    assert error == pytest.approx(np.sqrt(0.25 / 10 + 0.25 / 40) / 2)


def test_standard_error_is_that_of_probes_that_guess():
    rng = np.random.default_rng(0)
    latent, target = draw_noise(300, n_classes=3)
    test_target = np.repeat([0, 1, 2], [8, 20, 50])
    _, _, error = condition_probes(latent, target, latent[:78], test_target)
    hits = rng.integers(3, size=(4000, 78)) == test_target
    accuracies = np.mean([hits[:, test_target == c].mean(axis=1) for c in range(3)], axis=0)
    assert error == pytest.approx(accuracies.std(), rel=4 / np.sqrt(2 * 4000))


def test_a_condition_that_no_test_cell_has_does_not_count_against_the_probe():
    latent = np.repeat([[0.0], [10.0], [20.0]], 20, axis=0)
    target = np.repeat([0, 1, 2], 20)
    accuracies, chance, error = condition_probes(latent, target, latent[:40], target[:40])
    assert accuracies == {"logistic": 1.0, "nearest_neighbors": 1.0}
    assert chance == pytest.approx(1 / 3)
    assert error == pytest.approx(np.sqrt(2 * (2 / 9) / 20) / 2)
    # a cell that is given the absent class is wrong: recall 10 of 10 and 10 of 30
    cells = np.repeat([0, 1, 2], [10, 10, 20])
    accuracies, _, _ = condition_probes(latent, target, 10.0 * cells[:, None], np.minimum(cells, 1))
    assert accuracies == pytest.approx({"logistic": 2 / 3, "nearest_neighbors": 2 / 3})


def test_few_training_cells_have_fewer_neighbours():
    latent, target = draw_informative(8)
    accuracies, _, _ = condition_probes(latent, target, *draw_informative(40, seed=1))
    # 6 of 8 neighbours vote, 4 of them at most of the wrong class
    assert accuracies["nearest_neighbors"] > 0.9


@pytest.mark.parametrize("side", ["training", "test"])
def test_condition_probes_refuse_cells_of_one_class(side):
    latent, target = draw_noise(20)
    cells = {"training": (latent, target), "test": (latent, target)}
    cells[side] = (latent, np.zeros(20, dtype=int))
    with pytest.raises(ValueError, match="All cells have the class '0'.*several classes together"):
        condition_probes(*cells["training"], *cells["test"])
