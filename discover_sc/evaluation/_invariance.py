"""How much of a label a representation carries, judged by fresh probes on held-out cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

_N_NEIGHBORS = 15


def chance_accuracy(target: ArrayLike) -> float:
    """Balanced accuracy of a probe that knows nothing: one over the number of classes.

    Parameters
    ----------
    target
        Class of each cell, shape ``(n_cells,)``.

    Returns
    -------
    Chance level, in (0, 1].

    Examples
    --------
    >>> chance_accuracy(["ctrl", "stim", "stim"])
    0.5
    """
    return 1.0 / len(np.unique(np.asarray(target)))


def composition_accuracy(target: ArrayLike, groups: ArrayLike) -> float:
    r"""Balanced accuracy of the best rule that knows nothing of a cell but its group.

    .. math:: \frac{1}{C} \sum_g \max_c p(g \mid c)

    over :math:`C` classes: the chance level where all classes are composed alike, and more where
    a group is rarer in one class. A latent that tells the groups apart tells as much of the class,
    so no method can bring it to chance and keep the groups.

    Parameters
    ----------
    target
        Class of each cell, for example its condition, shape ``(n_cells,)``.
    groups
        Group of each cell, for example its type, shape ``(n_cells,)``.

    Returns
    -------
    Balanced accuracy on these same cells, in (0, 1].

    Notes
    -----
    Groups of a few cells each raise it by chance alone.

    Examples
    --------
    >>> composition_accuracy(["ctrl", "ctrl", "stim", "stim"], ["T", "B", "T", "T"])
    0.75
    """
    shares = pd.crosstab(np.asarray(groups), np.asarray(target), normalize="columns")
    return float(shares.max(axis=1).sum() / shares.shape[1])


def probe_accuracy(
    latent: ArrayLike, target: ArrayLike, *, n_folds: int = 5, seed: int = 0
) -> dict[str, np.ndarray]:
    """Balanced accuracy of three fresh probes on cells that they were not fitted on.

    A logistic regression, a multilayer perceptron (64 hidden units) and a
    15-nearest-neighbour classifier, each on standardised dimensions, in stratified folds.

    Parameters
    ----------
    latent
        Representation, shape ``(n_cells, n_latent)``.
    target
        Class of each cell, for example its condition or its type, shape ``(n_cells,)``.
    n_folds
        Number of folds.
    seed
        Seed of the folds and of the perceptron.

    Returns
    -------
    Per probe (``"logistic"``, ``"mlp"``, ``"nearest_neighbors"``) the balanced accuracy of each
    fold, shape ``(n_folds,)``, in [0, 1]; chance is :func:`chance_accuracy`.

    Raises
    ------
    ValueError
        If there are fewer than two classes or a class has fewer cells than folds.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> y = np.repeat(["a", "b"], 200)
    >>> informative = rng.normal(size=(400, 2)) + 5.0 * (y == "b")[:, None]
    >>> bool(probe_accuracy(informative, y)["logistic"].mean() > 0.95)
    True
    """
    latent, target = np.asarray(latent), np.asarray(target).astype(str)
    _check_classes(target, n_folds)
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    return {
        name: cross_val_score(probe, latent, target, cv=folds, scoring="balanced_accuracy")
        for name, probe in _probes(len(target), n_folds, seed).items()
    }


def probe_accuracy_within(
    latent: ArrayLike, target: ArrayLike, groups: ArrayLike, *, n_folds: int = 5, seed: int = 0
) -> tuple[dict[str, np.ndarray], float]:
    """Balanced accuracy of fresh probes within groups: what is told of a class given the group.

    :func:`probe_accuracy` in each group, averaged with the group's number of cells as weight.
    Classes with fewer cells of a group than folds are left out of it, and so are groups that hold
    a single class then.

    Parameters
    ----------
    latent
        Representation, shape ``(n_cells, n_latent)``.
    target
        Class of each cell, for example its condition, shape ``(n_cells,)``.
    groups
        Group of each cell, for example its type, shape ``(n_cells,)``.
    n_folds
        Number of folds.
    seed
        Seed of the folds and of the perceptron.

    Returns
    -------
    Per probe the average of each fold, shape ``(n_folds,)``, in [0, 1]; and the chance level,
    averaged with the same weights.

    Raises
    ------
    ValueError
        If no group holds two classes with enough cells.

    Examples
    --------
    >>> import numpy as np
    >>> groups, y = np.repeat(["g", "h"], 100), np.tile(["a", "b"], 100)
    >>> latent = np.random.default_rng(0).normal(size=(200, 2)) + 5.0 * (groups == "h")[:, None]
    >>> accuracies, chance = probe_accuracy_within(latent, y, groups)
    >>> chance, bool(accuracies["logistic"].mean() < 0.65)
    (0.5, True)
    """
    latent, target, groups = (np.asarray(values) for values in (latent, target, groups))
    accuracies, chances, weights = [], [], []
    for group in np.unique(groups):
        inside = groups == group
        classes, counts = np.unique(target[inside], return_counts=True)
        inside &= np.isin(target, classes[counts >= n_folds])
        if len(np.unique(target[inside])) < 2:
            continue
        accuracies.append(
            probe_accuracy(latent[inside], target[inside], n_folds=n_folds, seed=seed)
        )
        chances.append(chance_accuracy(target[inside]))
        weights.append(inside.sum())
    if not weights:
        raise ValueError(
            f"None of {len(np.unique(groups))} groups holds two classes with at least "
            f"n_folds={n_folds} cells each, so that nothing can be told within groups. Use coarser "
            "groups, or lower n_folds."
        )
    averages = {
        name: np.average([folds[name] for folds in accuracies], axis=0, weights=weights)
        for name in accuracies[0]
    }
    return averages, float(np.average(chances, weights=weights))


def _probes(n_cells: int, n_folds: int, seed: int) -> dict[str, object]:
    n_neighbors = max(1, min(_N_NEIGHBORS, n_cells - n_cells // n_folds - 1))
    classifiers = {
        "logistic": LogisticRegression(max_iter=1000),
        # early stopping would set cells aside, and on few cells stop at the initial weights
        "mlp": MLPClassifier(
            (64,), alpha=1.0, learning_rate_init=3e-3, tol=1e-3, max_iter=200, random_state=seed
        ),
        "nearest_neighbors": KNeighborsClassifier(n_neighbors),
    }
    return {name: make_pipeline(StandardScaler(), c) for name, c in classifiers.items()}


def _check_classes(target: np.ndarray, n_folds: int) -> None:
    classes, counts = np.unique(target, return_counts=True)
    if len(classes) < 2:
        raise ValueError(
            f"All cells have the class {str(classes[0])!r}; a probe needs at least two classes. "
            "Evaluate cells of several classes together."
        )
    if counts.min() < n_folds:
        rare = str(classes[counts.argmin()])
        raise ValueError(
            f"Class {rare!r} has {counts.min()} cells; each class needs at least "
            f"n_folds={n_folds}. Leave that class out or lower n_folds."
        )


def condition_probes(
    latent_train: ArrayLike, target_train: ArrayLike, latent_test: ArrayLike, target_test: ArrayLike
) -> tuple[dict[str, float], float, float]:
    """Balanced accuracy of fresh probes fitted on some cells and judged on others.

    The quick form of :func:`probe_accuracy`, for use during training: a logistic regression and a
    15-nearest-neighbour classifier.

    Parameters
    ----------
    latent_train, latent_test
        Representations of shape ``(n_cells, n_latent)``.
    target_train, target_test
        Class of each cell, shape ``(n_cells,)``.

    Returns
    -------
    Balanced accuracy per probe, in [0, 1]; the chance level; and the standard error of the
    balanced accuracy of a probe that guesses at chance on these test cells.

    Raises
    ------
    ValueError
        If the training or the test cells are all of one class.

    Examples
    --------
    >>> z = [[0.0], [0.1], [0.2], [9.0], [9.1], [9.2]]
    >>> accuracies, chance, error = condition_probes(z, [0, 0, 0, 1, 1, 1], z, [0, 0, 0, 1, 1, 1])
    >>> accuracies["logistic"], chance
    (1.0, 0.5)
    """
    target_train, target_test = np.asarray(target_train), np.asarray(target_test)
    for target in (target_train, target_test):
        _check_classes(target.astype(str), n_folds=1)
    probes = _probes(len(target_train), n_folds=len(target_train), seed=0)
    accuracies = {}
    for name in ("logistic", "nearest_neighbors"):
        prediction = probes[name].fit(latent_train, target_train).predict(latent_test)
        accuracies[name] = _balanced_accuracy(target_test, prediction)
    counts = np.unique(target_test, return_counts=True)[1]
    chance = 1.0 / len(np.unique(target_train))
    error = np.sqrt(np.sum(chance * (1 - chance) / counts)) / len(counts)
    return accuracies, chance, float(error)


def _balanced_accuracy(target: np.ndarray, prediction: np.ndarray) -> float:
    """Mean recall over the classes of the target; classes only predicted do not count."""
    seen = np.unique(target)
    if len(seen) == len(np.unique(np.concatenate([target, prediction]))):
        return float(balanced_accuracy_score(target, prediction))
    return float(np.mean([(prediction[target == c] == c).mean() for c in seen]))
