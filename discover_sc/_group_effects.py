"""Changes that were observed in groups of cells, carried over to a group that was not treated."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import r2_score
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.neighbors import NearestNeighbors

_POWERS = (0, 1, 2, 4)
_DEFAULT_POWER = 2  # where too few groups are left to choose by leaving one out
_FLOOR = 0.01  # of the mean squared distance between groups: a group meets itself at distance 0
_N_ALIKE = 300  # left-out genes whose errors tell the error of a gene like them


class GroupEffects:
    r"""Observed changes of several groups, weighted by how alike groups are before treatment.

    .. math::

        \hat\Delta = \sum_k v_k \Delta_k, \qquad v_k \propto (d_k^2 + d_0^2)^{-p/2}

    with :math:`d_k` the Euclidean distance between control profiles. The power :math:`p` is the
    one that predicts best when each group in turn is left out; :math:`p = 0` is the mean shift.

    Parameters
    ----------
    control, treated
        Profiles of the groups, log1p of mean counts per 10,000, ``(n_groups, n_genes)`` each,
        at least one group.

    Attributes
    ----------
    power
        The chosen power.
    scores
        Mean over left-out groups of the R2 of the change, by power; empty below three groups.
    errors
        True minus predicted change of each left-out group, ``(n_groups, n_genes)``; the change
        itself where there is a single group.
    """

    def __init__(self, control: np.ndarray, treated: np.ndarray) -> None:
        self._control = control
        self._changes = treated - control
        between = euclidean_distances(control, control, squared=True)
        self._floor = _FLOOR * between.mean() if len(control) > 1 else 1.0
        self.scores = {}
        if len(control) > 2:
            for power in _POWERS:
                left_out = self._leave_one_out(power)
                self.scores[power] = float(
                    np.mean([r2_score(d, p) for d, p in zip(self._changes, left_out, strict=True)])
                )
        self.power = max(self.scores, key=self.scores.get) if self.scores else _DEFAULT_POWER
        self._left_out = self._leave_one_out(self.power)
        self.errors = self._changes - self._left_out

    def _leave_one_out(self, power: int) -> np.ndarray:
        """Return the change of each group as predicted from the others; 0 if it is alone."""
        if len(self._control) == 1:
            return np.zeros_like(self._changes)
        weights = self._weights(
            euclidean_distances(self._control, self._control, squared=True), power
        )
        np.fill_diagonal(weights, 0.0)
        return weights / weights.sum(axis=1, keepdims=True) @ self._changes

    def _weights(self, squared_distances: np.ndarray, power: int) -> np.ndarray:
        return (squared_distances + self._floor) ** (-power / 2)

    def change(self, control: np.ndarray) -> np.ndarray:
        """Return the predicted change of a group, ``(n_genes,)``.

        Parameters
        ----------
        control
            Its profile before treatment, ``(n_genes,)``.
        """
        weights = self._weights(
            euclidean_distances(control[None], self._control, squared=True), self.power
        )[0]
        return weights / weights.sum() @ self._changes

    def weight_beside(self) -> np.ndarray:
        """Weight of the predicted change beside a second estimate, in (0, 1), ``(n_genes,)``.

        Inverse variances: that of this estimate is its squared error over left-out groups, of
        each gene; that of the second one is taken to be half of this one's mean over genes, and
        the same for all genes. So genes that answer differently from group to group are left to
        the second estimate.
        """
        variance = (self.errors**2).mean(axis=0)
        second = variance.mean() / 2
        return second / (second + variance) if second > 0 else np.ones_like(variance)

    def error_variance(self, profile: np.ndarray, change: np.ndarray) -> np.ndarray:
        """Return the expected squared error of predicted genes, ``(n_genes,)``.

        A few left-out groups tell little of a single gene, so its own mean squared error is
        averaged with that of the 300 left-out predictions nearest in level and in absolute change;
        both count like as many groups as there are. It holds the sampling noise of an observed
        profile, since the errors were measured against observed profiles.

        Parameters
        ----------
        profile, change
            Predicted profile after treatment and its change, ``(n_genes,)`` each.
        """
        levels = self._control + self._left_out
        features = np.column_stack([levels.ravel(), np.abs(self._left_out).ravel()])
        index = NearestNeighbors(n_neighbors=min(_N_ALIKE, len(features))).fit(features)
        alike = index.kneighbors(np.column_stack([profile, np.abs(change)]), return_distance=False)
        of_alike = (self.errors.ravel()[alike] ** 2).mean(axis=1)
        return ((self.errors**2).mean(axis=0) + of_alike) / 2
