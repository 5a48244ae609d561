"""Changes that were observed in groups of cells, carried over to a group that was not treated."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import r2_score
from sklearn.metrics.pairwise import euclidean_distances

from ._left_out import LeftOut
from ._shrinkage import denoised

_POWERS = (0, 1, 2, 4)
_DEFAULT_POWER = 2  # where too few groups are left to choose by leaving one out
_FLOOR = 0.01  # of the mean squared distance between groups: a group meets itself at distance 0


class GroupEffects(LeftOut):
    r"""Observed changes of several groups, weighted by how alike groups are before treatment.

    .. math::

        \hat\Delta = \sum_k v_k \Delta_k, \qquad v_k \propto (d_k^2 + d_0^2)^{-p/2}

    with :math:`d_k` the Euclidean distance between control profiles. The power :math:`p` is the
    one that predicts best when each group in turn is left out; :math:`p = 0` is the mean shift. The
    changes :math:`\Delta_k` are taken without their sampling noise, where that is known
    (:func:`~discover_sc._shrinkage.denoised`); predictions are judged by the changes as observed.

    Parameters
    ----------
    control, treated
        Profiles of the groups, log1p of mean counts per 10,000, ``(n_groups, n_genes)`` each,
        at least one group.
    variances
        Sampling variances of the changes, ``(n_groups, n_genes)``; None: not known.

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

    def __init__(
        self, control: np.ndarray, treated: np.ndarray, variances: np.ndarray | None = None
    ) -> None:
        self._control = control
        observed = treated - control
        self._changes = observed
        if variances is not None:
            middle = (control + treated) / 2  # its noise is not that of the change
            self._changes = np.stack(
                [denoised(*group) for group in zip(observed, variances, middle, strict=True)]
            )
        between = euclidean_distances(control, control, squared=True)
        self._floor = _FLOOR * between.mean() if len(control) > 1 else 1.0
        self.scores = {}
        if len(control) > 2:
            for power in _POWERS:
                left_out = self._leave_one_out(power)
                self.scores[power] = float(
                    np.mean([r2_score(d, p) for d, p in zip(observed, left_out, strict=True)])
                )
        self.power = max(self.scores, key=self.scores.get) if self.scores else _DEFAULT_POWER
        noise = None if variances is None else float(variances.mean())
        super().__init__(control, self._leave_one_out(self.power), observed, noise)

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

    def summary(self) -> dict[str, object]:
        """Return what was chosen and the cross-validated scores it was chosen by."""
        return {
            "n_groups": len(self.errors),
            "power": self.power,
            "lfc_r2_by_power": dict(self.scores),
        }
