"""Changes under several treatments in several groups, as sums of few factors."""

from __future__ import annotations

from copy import copy

import numpy as np
from sklearn.metrics import r2_score

from ._left_out import LeftOut

_NUMBERS = (2, 4, 8)  # of factors
_MAX_FOLDS = 5
_N_SWEEPS = 60
_N_STARTS = 3
_RIDGE = 0.3  # on the profiles of the factors, in units of one observed change
_LOADING_RIDGE = 0.03  # on the loadings, in units of the mean square of a factor


def complete(changes: np.ndarray, n_factors: int) -> np.ndarray:
    r"""Complete a table of observed changes by a factor model of groups, treatments and genes.

    .. math:: \Delta_{lkg} \approx \sum_r v_{lr} \, u_{kr} \, p_{rg}

    Read r as a pathway: :math:`v` says how far treatment l switches it on, :math:`u` how much of
    its receptor group k has, :math:`p` what it does to gene g. Fitted to the observed changes by
    alternating ridge regressions, the :math:`u` shrunk towards 1 (groups answer alike) and the
    rest towards 0; the mean over three random starts, the same at every call.

    Parameters
    ----------
    changes
        Observed changes, NaN where a group was not seen, ``(n_treatments, n_groups, n_genes)``.
    n_factors
        Number of factors.

    Returns
    -------
    The same table as the factors have it, without gaps. A group seen under no treatment answers
    like a typical one.
    """
    observed = ~np.isnan(changes).any(axis=-1)
    rows = changes[observed]
    gram = rows @ rows.T  # every profile is a weighted sum of the rows: sweeps need no genes
    fits = [_fit(gram, observed, n_factors, np.random.default_rng(s)) for s in range(_N_STARTS)]
    return np.mean(fits, axis=0) @ rows


def _fit(
    gram: np.ndarray, observed: np.ndarray, n_factors: int, rng: np.random.Generator
) -> np.ndarray:
    """Return the completed table as weights of the observed changes, ``(..., n_observed)``."""
    n_treatments, n_groups = observed.shape
    treatments = rng.normal(size=(n_treatments, n_factors))
    groups = 1.0 + 0.3 * rng.normal(size=(n_groups, n_factors))
    products = np.zeros((n_treatments, n_groups, n_factors))
    eye = np.eye(n_factors)
    for _ in range(_N_SWEEPS):
        loadings = (treatments[:, None] * groups[None])[observed]
        profiles = np.linalg.solve(loadings.T @ loadings + _RIDGE * eye, loadings.T)
        along = gram @ profiles.T
        products[observed], squares = along, profiles @ along
        ridge = _LOADING_RIDGE * np.trace(squares) / n_factors * eye
        groups = _loadings(products.transpose(1, 0, 2), squares, treatments, observed.T, ridge, 1.0)
        treatments = _loadings(products, squares, groups, observed, ridge, 0.0)
    return np.einsum("lr,kr,rm->lkm", treatments, groups, profiles)


def _loadings(
    products: np.ndarray,
    squares: np.ndarray,
    others: np.ndarray,
    observed: np.ndarray,
    ridge: np.ndarray,
    typical: float,
) -> np.ndarray:
    """Return the loadings of one side, ``(n, n_factors)``, given those of the other side."""
    outer = others[:, :, None] * others[:, None, :] * squares
    systems = np.einsum("ij,jrs->irs", observed.astype(float), outer) + ridge
    sides = np.einsum("ij,ijr,jr->ir", observed.astype(float), products, others)
    return np.linalg.solve(systems, (sides + typical * ridge.sum(axis=1))[..., None])[..., 0]


class FactorEffects(LeftOut):
    """Changes under one of several treatments as a factor model has them, and their errors.

    The number of factors is the one that predicts best when groups are left out of this treatment,
    one at a time, or several where there are more than five.

    Parameters
    ----------
    changes
        Observed changes, NaN where a group was not seen, ``(n_treatments, n_groups, n_genes)``.
    treatment
        Position of the treatment asked for.
    control
        Profiles of the groups before treatment, ``(n_groups, n_genes)``.
    second_variance
        Least variance of the error of a second estimate that stands beside this one.
    noise
        Mean over groups and genes of the sampling variance of the changes; None: not
        known.

    Attributes
    ----------
    scores
        Mean over left-out groups of the R2 of the change, by number of factors.
    n_factors
        The chosen number.
    """

    def __init__(
        self,
        changes: np.ndarray,
        treatment: int,
        control: np.ndarray,
        second_variance: float,
        noise: float | None = None,
    ) -> None:
        seen = np.flatnonzero(~np.isnan(changes[treatment]).any(axis=-1))
        left_out = {n: _left_out(changes, treatment, seen, n) for n in _NUMBERS}
        self.scores = {
            n: float(np.mean([r2_score(changes[treatment, k], p) for k, p in predicted.items()]))
            for n, predicted in left_out.items()
        }
        self.n_factors = max(self.scores, key=self.scores.get)
        self._in_groups = complete(changes, self.n_factors)[treatment]
        predicted = np.stack([left_out[self.n_factors][k] for k in seen])
        super().__init__(control[seen], predicted, changes[treatment, seen], noise)
        self._second_variance = second_variance

    def of(self, group: int) -> FactorEffects:
        """Return the same for one of the groups."""
        one = copy(self)
        one._change = self._in_groups[group]
        return one

    def change(self, control: np.ndarray) -> np.ndarray:
        """Return the change of the group, whatever its profile before, ``(n_genes,)``."""
        return self._change

    def variance_beside(self) -> float:
        """Return the least variance of the second estimate's error: these errors do not tell it."""
        return self._second_variance

    def summary(self) -> dict[str, object]:
        """Return what was chosen and the cross-validated scores it was chosen by."""
        return {
            "n_groups": len(self.errors),
            "n_factors": self.n_factors,
            "lfc_r2_by_factors": dict(self.scores),
        }


def _left_out(
    changes: np.ndarray, treatment: int, seen: np.ndarray, n_factors: int
) -> dict[int, np.ndarray]:
    """Return the change of each group under the treatment as completed without it."""
    predicted = {}
    for fold in np.array_split(seen, min(len(seen), _MAX_FOLDS)):
        without = changes.copy()
        without[treatment, fold] = np.nan
        completed = complete(without, n_factors)
        predicted |= {int(k): completed[treatment, k] for k in fold}
    return predicted
