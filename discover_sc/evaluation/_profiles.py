"""Profiles of groups of cells, and the two simplest predictions made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike

TARGET_SUM = 1e4


def normalized(expression: ArrayLike | sp.spmatrix) -> np.ndarray:
    """Return counts per 10,000 of each cell as a dense array; cells without counts stay zero."""
    dense = expression.toarray() if sp.issparse(expression) else np.asarray(expression)
    dense = dense.astype(np.float64)
    totals = dense.sum(axis=1, keepdims=True)
    return np.divide(dense, totals, out=np.zeros_like(dense), where=totals > 0) * TARGET_SUM


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
    if sp.issparse(expression):
        return np.log1p(np.asarray(_sparse_normalized(expression).mean(axis=0)).ravel())
    return np.log1p(normalized(expression).mean(axis=0))


def log_normalized(counts: ArrayLike | sp.spmatrix) -> np.ndarray | sp.csr_matrix:
    """Return log1p of the counts per 10,000 of each cell; sparse counts stay sparse."""
    if sp.issparse(counts):
        return _sparse_normalized(counts).log1p()
    return np.log1p(normalized(counts))


def _sparse_normalized(counts: sp.spmatrix) -> sp.csr_matrix:
    """Return counts per 10,000 of each cell; the same numbers as of a dense array."""
    cells = sp.csr_matrix(counts, dtype=np.float64, copy=True)
    cells.eliminate_zeros()  # of cells without counts, which would be divided by 0
    totals = np.asarray(cells.sum(axis=1)).ravel()
    cells.data = cells.data / np.repeat(totals, np.diff(cells.indptr)) * TARGET_SUM
    return cells


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
