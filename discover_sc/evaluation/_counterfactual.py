"""Predicted against observed expression, beside the baselines and the noise ceiling."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.stats import false_discovery_control, pearsonr, ttest_ind
from sklearn.metrics import r2_score

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike

_TARGET_SUM = 1e4
_FDR = 0.05


def _normalized(expression: ArrayLike | sp.spmatrix) -> np.ndarray:
    """Return counts per 10,000 of each cell as a dense array; cells without counts stay zero."""
    dense = expression.toarray() if sp.issparse(expression) else np.asarray(expression)
    dense = dense.astype(np.float64)
    totals = dense.sum(axis=1, keepdims=True)
    return np.divide(dense, totals, out=np.zeros_like(dense), where=totals > 0) * _TARGET_SUM


def log_mean_profile(expression: ArrayLike | sp.spmatrix) -> np.ndarray:
    """Profile of a group of cells: log1p of the mean of its counts per 10,000.

    Parameters
    ----------
    expression
        Counts or expected expression, not negative, shape ``(n_cells, n_genes)``.

    Returns
    -------
    Shape ``(n_genes,)``, natural logarithm.

    Examples
    --------
    >>> log_mean_profile([[1.0, 1.0], [3.0, 1.0]]).round(2)
    array([8.74, 8.23])
    """
    return np.log1p(_normalized(expression).mean(axis=0))


def top_genes(
    treated: ArrayLike | sp.spmatrix, control: ArrayLike | sp.spmatrix, n_top: int = 20
) -> np.ndarray:
    """Indices of the genes that the treatment moves most: largest absolute t-statistic.

    Parameters
    ----------
    treated, control
        Observed counts, shape ``(n_cells, n_genes)``; tested on log1p of counts per 10,000.
    n_top
        Number of genes.

    Returns
    -------
    Shape ``(n_top,)``, the most moved first.

    Examples
    --------
    >>> top_genes([[1, 9, 5], [2, 8, 6], [1, 9, 4]], [[1, 1, 5], [2, 2, 6], [2, 1, 4]], n_top=1)
    array([1])
    """
    statistic, _ = _t_test(treated, control)
    return np.argsort(-np.abs(statistic))[:n_top]


def _t_test(
    treated: ArrayLike | sp.spmatrix, control: ArrayLike | sp.spmatrix
) -> tuple[np.ndarray, np.ndarray]:
    """Return t and p per gene; genes without variance get t = 0 and p = 1."""
    treated, control = np.log1p(_normalized(treated)), np.log1p(_normalized(control))
    moving = (np.ptp(treated, axis=0) > 0) | (np.ptp(control, axis=0) > 0)
    statistic, p_value = np.zeros(treated.shape[1]), np.ones(treated.shape[1])
    with warnings.catch_warnings():
        # a gene that is constant on one side only: its variance there is zero and known exactly
        warnings.filterwarnings(
            "ignore", message="Precision loss occurred", category=RuntimeWarning
        )
        result = ttest_ind(treated[:, moving], control[:, moving])
    statistic[moving], p_value[moving] = result.statistic, result.pvalue
    return statistic, p_value


def change_pearson(predicted_change: ArrayLike, true_change: ArrayLike) -> float:
    """Pearson correlation of predicted and true change over genes.

    Parameters
    ----------
    predicted_change, true_change
        Treated profile minus control profile, shape ``(n_genes,)``.

    Returns
    -------
    In [-1, 1]; NaN where the prediction is constant, for example *no change*.

    Examples
    --------
    >>> round(change_pearson([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]), 3)
    1.0
    """
    predicted_change, true_change = np.asarray(predicted_change), np.asarray(true_change)
    if np.ptp(predicted_change) == 0 or np.ptp(true_change) == 0:
        return float("nan")
    return float(pearsonr(predicted_change, true_change).statistic)


def direction_match(
    predicted_change: ArrayLike, true_change: ArrayLike, significant: ArrayLike
) -> float:
    """Share of the significantly moved genes whose predicted change has the true sign.

    Parameters
    ----------
    predicted_change, true_change
        Treated profile minus control profile, shape ``(n_genes,)``.
    significant
        Boolean mask of shape ``(n_genes,)``.

    Returns
    -------
    In [0, 1]; a change of exactly 0 matches nothing; NaN where no gene is significant.

    Examples
    --------
    >>> direction_match([1.0, -1.0, 5.0], [2.0, 2.0, -1.0], [True, True, False])
    0.5
    """
    mask = np.asarray(significant, dtype=bool)
    if not mask.any():
        return float("nan")
    match = np.sign(np.asarray(predicted_change)[mask]) == np.sign(np.asarray(true_change)[mask])
    return float(match.mean())


def counterfactual_scores(
    predicted: ArrayLike,
    treated: ArrayLike | sp.spmatrix,
    control: ArrayLike | sp.spmatrix,
    *,
    n_top: int = 20,
) -> dict[str, float]:
    """Scores of a predicted profile of treated cells against observed treated cells.

    Profiles flatter and changes do not: the R2 of a *profile* is high for a prediction of no
    change at all, so the R2 of the log fold change against control stands beside it.

    Parameters
    ----------
    predicted
        Predicted profile (:func:`log_mean_profile`), shape ``(n_genes,)``.
    treated, control
        Observed counts of the group, treated and untreated, shape ``(n_cells, n_genes)``. The
        prediction must not have seen the treated ones.
    n_top
        Number of top genes (:func:`top_genes`).

    Returns
    -------
    ``r2``, ``r2_top``: R2 of the profile over all and over the top genes; ``lfc_r2``,
    ``lfc_r2_top``: R2 of the log fold change; ``lfc_pearson``; ``direction_match`` on genes
    significant at a false discovery rate of 5 %. R2 is at most 1 and can be negative.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> control, treated = rng.poisson(2.0, (50, 30)), rng.poisson(3.0, (50, 30))
    >>> counterfactual_scores(log_mean_profile(treated), treated, control)["lfc_r2"]
    1.0
    """
    base = log_mean_profile(control)
    genes = _gene_sets(treated, control, n_top)
    return _profile_scores(np.asarray(predicted), log_mean_profile(treated), base, *genes)


def _gene_sets(
    treated: ArrayLike | sp.spmatrix, control: ArrayLike | sp.spmatrix, n_top: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the top genes and the mask of the significant ones."""
    statistic, p_value = _t_test(treated, control)
    return np.argsort(-np.abs(statistic))[:n_top], false_discovery_control(p_value) < _FDR


def _profile_scores(
    predicted: np.ndarray,
    true: np.ndarray,
    base: np.ndarray,
    top: np.ndarray,
    significant: np.ndarray,
) -> dict[str, float]:
    change, true_change = predicted - base, true - base
    return {
        "r2": float(r2_score(true, predicted)),
        "r2_top": float(r2_score(true[top], predicted[top])),
        "lfc_r2": float(r2_score(true_change, change)),
        "lfc_r2_top": float(r2_score(true_change[top], change[top])),
        "lfc_pearson": change_pearson(change, true_change),
        "direction_match": direction_match(change, true_change, significant),
    }


def mean_shift(control: ArrayLike, changes: Mapping[str, ArrayLike]) -> np.ndarray:
    """Baseline: the control profile plus the mean change of the other groups.

    Parameters
    ----------
    control
        Control profile of the group, shape ``(n_genes,)``.
    changes
        Observed change of each other group, shape ``(n_genes,)`` each.

    Returns
    -------
    Predicted profile, not below 0, shape ``(n_genes,)``.

    Examples
    --------
    >>> mean_shift([1.0, 2.0], {"a": [1.0, 0.0], "b": [2.0, -5.0]})
    array([2.5, 0. ])
    """
    return np.clip(np.asarray(control) + np.mean(list(changes.values()), axis=0), 0, None)


def nearest_shift(
    control: ArrayLike, changes: Mapping[str, ArrayLike], controls: Mapping[str, ArrayLike]
) -> np.ndarray:
    """Baseline: the control profile plus the change of the group with the nearest control.

    Parameters
    ----------
    control
        Control profile of the group, shape ``(n_genes,)``.
    changes, controls
        Observed change and control profile of each other group, shape ``(n_genes,)`` each.

    Returns
    -------
    Predicted profile, not below 0, shape ``(n_genes,)``.

    Examples
    --------
    >>> controls = {"near": [1.0, 2.5], "far": [9.0, 9.0]}
    >>> nearest_shift([1.0, 2.0], {"near": [1.0, 0.0], "far": [5.0, 5.0]}, controls)
    array([2., 2.])
    """
    nearest = min(changes, key=lambda g: np.linalg.norm(np.asarray(controls[g]) - control))
    return np.clip(np.asarray(control) + np.asarray(changes[nearest]), 0, None)


def additive_shift(control: ArrayLike, changes: Mapping[str, ArrayLike]) -> np.ndarray:
    """Baseline of a combination: the control profile plus the change that each part makes.

    Parameters
    ----------
    control
        Control profile of the group, shape ``(n_genes,)``.
    changes
        Observed change under each part alone, shape ``(n_genes,)`` each.

    Returns
    -------
    Predicted profile, not below 0, shape ``(n_genes,)``.

    Examples
    --------
    >>> additive_shift([1.0, 2.0], {"A": [1.0, 0.0], "B": [2.0, -5.0]})
    array([4., 0.])
    """
    return np.clip(np.asarray(control) + np.sum(list(changes.values()), axis=0), 0, None)


def split_half_ceiling(
    treated: ArrayLike | sp.spmatrix,
    control: ArrayLike | sp.spmatrix,
    *,
    n_top: int = 20,
    n_splits: int = 20,
    seed: int = 0,
) -> dict[str, float]:
    """What sampling noise leaves to be had: one half of the treated cells predicts the other.

    Parameters
    ----------
    treated, control
        Observed counts, shape ``(n_cells, n_genes)``; at least two treated cells.
    n_top
        Number of top genes, chosen on all treated cells.
    n_splits
        Number of random splits that are averaged.
    seed
        Seed of the splits.

    Returns
    -------
    The scores of :func:`counterfactual_scores`, averaged over splits.

    Raises
    ------
    ValueError
        If there are fewer than two treated cells.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> control, treated = rng.poisson(2.0, (50, 30)), rng.poisson(3.0, (50, 30))
    >>> split_half_ceiling(treated, control)["lfc_r2"] < 1
    True
    """
    if treated.shape[0] < 2:
        raise ValueError(
            f"Number of treated cells: {treated.shape[0]}; a split into halves needs at least 2 "
            "treated cells. Evaluate a group with more of them."
        )
    rng = np.random.default_rng(seed)
    base, genes = log_mean_profile(control), _gene_sets(treated, control, n_top)
    treated = _normalized(treated)
    splits = []
    for _ in range(n_splits):
        order = rng.permutation(len(treated))
        half = len(order) // 2
        first, second = (
            np.log1p(treated[cells].mean(axis=0)) for cells in (order[:half], order[half:])
        )
        splits.append(_profile_scores(first, second, base, *genes))
    return {name: float(np.mean([s[name] for s in splits])) for name in splits[0]}


def counterfactual_table(
    predicted: ArrayLike | sp.spmatrix,
    treated: ArrayLike | sp.spmatrix,
    control: ArrayLike | sp.spmatrix,
    other_groups: Mapping[str, tuple[ArrayLike | sp.spmatrix, ArrayLike | sp.spmatrix]],
    *,
    n_top: int = 20,
) -> pd.DataFrame:
    """Scores of a prediction beside the baselines and the split-half ceiling.

    Parameters
    ----------
    predicted
        Predicted expression of the group's control cells under treatment, shape
        ``(n_cells, n_genes)``.
    treated, control
        Observed counts of the held-out group, shape ``(n_cells, n_genes)``.
    other_groups
        Per other group its observed control and treated counts, which the baselines use.
    n_top
        Number of top genes.

    Returns
    -------
    One row each for ``prediction``, ``no change``, ``mean shift``, ``nearest type's shift`` and
    ``split-half ceiling``; one column per score of :func:`counterfactual_scores`.

    Raises
    ------
    ValueError
        If there is no other group, or there are fewer than two treated cells.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> control, treated = rng.poisson(2.0, (50, 30)), rng.poisson(3.0, (50, 30))
    >>> table = counterfactual_table(control, treated, control, {"other": (control, treated)})
    >>> list(table.index)
    ['prediction', 'no change', 'mean shift', "nearest type's shift", 'split-half ceiling']
    """
    if not other_groups:
        raise ValueError(
            "other_groups is empty; the baselines need at least one group that was observed under "
            "both conditions. Pass {group: (control counts, treated counts)}."
        )
    base = log_mean_profile(control)
    controls = {g: log_mean_profile(c) for g, (c, _) in other_groups.items()}
    changes = {g: log_mean_profile(t) - controls[g] for g, (_, t) in other_groups.items()}
    profiles = {
        "prediction": log_mean_profile(predicted),
        "no change": base,
        "mean shift": mean_shift(base, changes),
        "nearest type's shift": nearest_shift(base, changes, controls),
    }
    rows = {
        name: counterfactual_scores(profile, treated, control, n_top=n_top)
        for name, profile in profiles.items()
    }
    rows["split-half ceiling"] = split_half_ceiling(treated, control, n_top=n_top)
    return pd.DataFrame.from_dict(rows, orient="index")
