"""Predicted against observed expression, beside the baselines and the noise ceiling."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.stats import false_discovery_control, pearsonr, ttest_ind
from sklearn.metrics import r2_score

from ._profiles import log_mean_profile, log_normalized, mean_shift, nearest_shift, normalized

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike

_FDR = 0.05
_GENES_AT_ONCE = 200  # genes that are dense at once


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
    sides = [log_normalized(cells) for cells in (treated, control)]
    sides = [cells.tocsc() if sp.issparse(cells) else cells for cells in sides]
    results = []
    for start in range(0, sides[0].shape[1], _GENES_AT_ONCE):
        block = [cells[:, start : start + _GENES_AT_ONCE] for cells in sides]
        results.append(_t_test_dense(*(b.toarray() if sp.issparse(b) else b for b in block)))
    statistic, p_value = (np.concatenate(parts) for parts in zip(*results, strict=True))
    return statistic, p_value


def _t_test_dense(treated: np.ndarray, control: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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


def top_overlap(predicted_change: ArrayLike, true_change: ArrayLike, n_top: int = 50) -> float:
    """Share of the most changed genes that are also predicted to be the most changed.

    Parameters
    ----------
    predicted_change, true_change
        Treated profile minus control profile, shape ``(n_genes,)``; the most changed genes are
        those of the largest absolute change, on both sides.
    n_top
        Number of genes on each side.

    Returns
    -------
    In [0, 1], higher is better; NaN where a change is constant and ranks nothing.

    Examples
    --------
    >>> top_overlap([3.0, -2.0, 0.1], [-1.0, 0.2, 5.0], n_top=2)
    0.5
    """
    changes = np.abs(np.asarray(predicted_change)), np.abs(np.asarray(true_change))
    if any(np.ptp(change) == 0 for change in changes):
        return float("nan")
    predicted, true = (np.argsort(-change, kind="stable")[:n_top] for change in changes)
    return len(np.intersect1d(predicted, true)) / len(true)


def interval_coverage(lower: ArrayLike, upper: ArrayLike, observed: ArrayLike) -> float:
    """Share of genes whose observed value lies in its predicted interval, ends included.

    Parameters
    ----------
    lower, upper
        Ends of the interval of each gene, shape ``(n_genes,)``; for group means on the scale of
        :func:`log_mean_profile`.
    observed
        Observed value of each gene on the same scale, shape ``(n_genes,)``.

    Returns
    -------
    In [0, 1]; right where it is the nominal level of the interval.

    Raises
    ------
    ValueError
        If a lower end is above its upper end, or an end is NaN.

    Examples
    --------
    >>> interval_coverage([0.0, 0.0], [1.0, 1.0], [0.5, 2.0])
    0.5
    """
    lower, upper, observed = (np.asarray(values) for values in (lower, upper, observed))
    if not (lower <= upper).all():
        raise ValueError(
            f"{np.count_nonzero(~(lower <= upper))} of {len(lower)} intervals have a lower end "
            "that is above the upper end, or NaN; each needs lower <= upper. Check which of the "
            "two is which."
        )
    return float(((lower <= observed) & (observed <= upper)).mean())


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
    genes = gene_sets(treated, control, n_top)
    return _profile_scores(np.asarray(predicted), log_mean_profile(treated), base, *genes)


def gene_sets(
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


def change_scores(
    change: np.ndarray, true_change: np.ndarray, ranking: np.ndarray, significant: np.ndarray
) -> dict[str, float]:
    """Return the benchmark's scores of a change; ``ranking`` has the top genes first."""
    scores = {
        "lfc_r2": float(r2_score(true_change, change)),
        "lfc_pearson": change_pearson(change, true_change),
    }
    for n_top in (20, 50):
        top = ranking[:n_top]
        scores[f"lfc_r2_top{n_top}"] = float(r2_score(true_change[top], change[top]))
        scores[f"lfc_pearson_top{n_top}"] = change_pearson(change[top], true_change[top])
    scores["direction_match"] = direction_match(change, true_change, significant)
    scores["top50_overlap"] = top_overlap(change, true_change, 50)
    return scores


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
    base, genes = log_mean_profile(control), gene_sets(treated, control, n_top)
    treated = normalized(treated)
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
