"""Predicted against observed cells: distances between populations, and variances of genes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
from scipy.spatial.distance import cdist
from sklearn.metrics import r2_score
from sklearn.utils.sparsefuncs import mean_variance_axis

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike

_CHUNK = 1000  # rows of a distance matrix held at once


def energy_distance(first: ArrayLike, second: ArrayLike) -> float:
    r"""Energy distance of two populations of cells, with Euclidean distances (not squared).

    .. math:: 2 \, E\|X - Y\| - E\|X - X'\| - E\|Y - Y'\|

    with expectations over distinct cells, so that it is unbiased: 0 on average for two samples of
    one population, whatever their sizes, and then as often below 0 as above. With *squared*
    distances the same formula is twice the squared distance of the two means and says nothing of
    spread and shape.

    Parameters
    ----------
    first, second
        Cells in one space, shapes ``(n_first, n_dimensions)`` and ``(n_second, n_dimensions)``,
        at least two each. Memory grows with the longer side, time with the product.

    Returns
    -------
    In units of the space; lower is closer.

    Raises
    ------
    ValueError
        If a population has fewer than two cells.

    Examples
    --------
    >>> energy_distance([[0.0], [2.0]], [[1.0], [3.0]])
    -1.0
    >>> energy_distance([[0.0], [2.0]], [[10.0], [12.0]])
    16.0
    """
    first, second = _populations(first, second)
    between = _mean(cdist, first, second)
    within = sum(_mean_of_pairs(cdist, cells, itself=0.0) for cells in (first, second))
    return 2 * between - within


def squared_mmd(first: ArrayLike, second: ArrayLike, *, bandwidth: float | None = None) -> float:
    r"""Squared maximum mean discrepancy of two populations of cells, with a Gaussian kernel.

    .. math:: E\,k(X, X') + E\,k(Y, Y') - 2 E\,k(X, Y), \qquad
              k(x, y) = \exp\left(-\frac{\|x - y\|^2}{2 \sigma^2}\right)

    with expectations over distinct cells (the unbiased estimate, which can be below 0).

    Parameters
    ----------
    first, second
        Cells in one space, shapes ``(n_first, n_dimensions)`` and ``(n_second, n_dimensions)``,
        at least two each.
    bandwidth
        :math:`\sigma`; None: the median Euclidean distance between the cells of ``second``. To
        compare predictions, let ``second`` be the observed cells.

    Returns
    -------
    At most 2; lower is closer.

    Raises
    ------
    ValueError
        If a population has fewer than two cells, or the bandwidth is not positive.

    Examples
    --------
    >>> round(squared_mmd([[0.0], [2.0]], [[90.0], [92.0]]), 3)
    1.213
    """
    first, second = _populations(first, second)
    bandwidth = median_distance(second) if bandwidth is None else bandwidth
    if not bandwidth > 0:
        raise ValueError(
            f"bandwidth is {bandwidth}; it must be positive (by default it is the median distance "
            "between the cells of second). Choose one, or pass cells that differ."
        )

    def kernel(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return np.exp(-cdist(rows, columns, "sqeuclidean") / (2 * bandwidth**2))

    within = sum(_mean_of_pairs(kernel, cells, itself=1.0) for cells in (first, second))
    return within - 2 * _mean(kernel, first, second)


def median_distance(cells: np.ndarray) -> float:
    """Return the median Euclidean distance of distinct cells, of at most 1,000 evenly spaced."""
    some = cells[np.linspace(0, len(cells) - 1, min(len(cells), _CHUNK)).astype(int)]
    return float(np.median(cdist(some, some)[np.triu_indices(len(some), k=1)]))


def _populations(first: ArrayLike, second: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if min(len(first), len(second)) < 2:
        raise ValueError(
            f"The populations have {len(first)} and {len(second)} cells; a distance between "
            "populations needs at least 2 each. Pass more cells."
        )
    return first, second


def _mean(pairwise: Callable, first: np.ndarray, second: np.ndarray) -> float:
    """Mean of a function of two cells over all pairs, chunk by chunk."""
    starts = range(0, len(first), _CHUNK)
    total = sum(pairwise(first[start : start + _CHUNK], second).sum() for start in starts)
    return float(total) / (len(first) * len(second))


def _mean_of_pairs(pairwise: Callable, cells: np.ndarray, itself: float) -> float:
    """Mean over pairs of distinct cells, given the function's value of a cell with itself."""
    n = len(cells)
    return (_mean(pairwise, cells, cells) * n - itself) / (n - 1)


def gene_variances(expression: ArrayLike | sp.spmatrix) -> np.ndarray:
    """Variance of each gene over cells (with Bessel's correction).

    Parameters
    ----------
    expression
        For example log1p of counts per 10,000, shape ``(n_cells, n_genes)``, at least two cells;
        sparse matrices stay sparse.

    Returns
    -------
    Shape ``(n_genes,)``.

    Raises
    ------
    ValueError
        If there are fewer than two cells.

    Examples
    --------
    >>> gene_variances([[0.0, 1.0], [2.0, 1.0]])
    array([2., 0.])
    """
    if not sp.issparse(expression):
        expression = np.asarray(expression, dtype=float)
    n = expression.shape[0]
    if n < 2:
        raise ValueError(f"expression has {n} cells; a variance needs at least 2. Pass more cells.")
    if not sp.issparse(expression):
        return expression.var(axis=0, ddof=1)
    _, variances = mean_variance_axis(sp.csr_matrix(expression, dtype=np.float64), axis=0)
    return variances * n / (n - 1)


def variance_scores(
    predicted: np.ndarray, observed: np.ndarray, ranking: np.ndarray
) -> dict[str, float]:
    """Return R2 of gene variances over all genes and over the first 20 of a ranking."""
    top = ranking[:20]
    return {
        "variance_r2": float(r2_score(observed, predicted)),
        "variance_r2_top20": float(r2_score(observed[top], predicted[top])),
    }
