"""The change under a treatment that is only described, from the changes under known ones."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import sem
from sklearn.linear_model import Ridge

from ._left_out import LeftOut

if TYPE_CHECKING:
    from ._borrowed_effects import KnownChanges

_PENALTIES = np.logspace(-2, 3, 11)  # rows have mean square length 1; the last is nearly the mean


class DescribedEffects(LeftOut):
    r"""Change under a described treatment: known ones, weighted by their descriptions.

    .. math::

        \hat\Delta_k = \sum_l c_l \tilde\Delta_{lk}

    with :math:`\tilde\Delta_{lk}` of :class:`~discover_sc._borrowed_effects.KnownChanges` and
    :math:`c_l` the weights, which add up to 1, of the known treatments in the ridge regression of
    changes on descriptions. Its penalty is the one that predicts mean changes best when each
    treatment in turn is left out. The errors are those on left-out treatments, in the groups that
    they were observed in.

    Parameters
    ----------
    known
        Changes under at least three known treatments.
    control
        Profiles of the groups under the source condition, ``(n_groups, n_genes)``.
    rows
        Descriptions of the known treatments, ``(n_treatments, n_features)``.
    new
        Description of the one asked for, ``(n_features,)``.
    noise
        Mean sampling variance of the observed changes; None: not known.

    Attributes
    ----------
    penalty
        The chosen penalty.
    scores
        R2 of left-out mean changes (0: no change), by penalty.
    score_of_mean
        The same of the mean of the other treatments, which needs no description.
    """

    _shared = 0.5  # the network, too, has only these treatments to learn from

    def __init__(
        self,
        known: KnownChanges,
        control: np.ndarray,
        rows: np.ndarray,
        new: np.ndarray,
        noise: float | None = None,
    ) -> None:
        n = len(rows)
        left_out = {float(penalty): _left_out_shares(rows, penalty) for penalty in _PENALTIES}
        errors = {penalty: _errors(known.mean, shares) for penalty, shares in left_out.items()}
        errors_of_mean = _errors(known.mean, (1 - np.eye(n)) / (n - 1))
        total = (known.mean**2).sum()
        self.scores = {penalty: float(1 - each.sum() / total) for penalty, each in errors.items()}
        self.score_of_mean = float(1 - errors_of_mean.sum() / total)
        self.penalty = max(self.scores, key=self.scores.get)
        self._gains = errors_of_mean - errors[self.penalty]
        shares = _shares(rows, new[None], self.penalty)[0]
        self._change = shares @ known.mean
        self._in_groups = np.tensordot(shares, known.table, axes=1)
        predicted = np.tensordot(left_out[self.penalty], known.table, axes=1)
        observed = known.n_cells > 0
        control = np.broadcast_to(control, predicted.shape)
        super().__init__(control[observed], predicted[observed], known.changes[observed], noise)

    @property
    def tells(self) -> bool:
        """Whether left-out treatments are predicted better than by the mean of the others.

        By more than one standard error of the gain over the treatments.
        """
        return self._gains.mean() > sem(self._gains)

    def of(self, group: int | None) -> DescribedEffects:
        """Return the same for one group of those with known changes; None: for any other."""
        one = copy(self)
        if group is not None:
            one._change = self._in_groups[group]
        return one

    def change(self, control: np.ndarray) -> np.ndarray:
        """Return the change of the group, whatever its profile before, ``(n_genes,)``."""
        return self._change

    def summary(self) -> dict[str, object]:
        """Return what was chosen and the cross-validated scores it was chosen by."""
        return {
            "n_groups": 0,
            "n_left_out": len(self.errors),
            "penalty": self.penalty,
            "lfc_r2_by_penalty": dict(self.scores),
            "lfc_r2_of_mean_treatment": self.score_of_mean,
        }


def _shares(rows: np.ndarray, new: np.ndarray, penalty: float) -> np.ndarray:
    """Return the weight of each known row in the prediction of new ones, ``(n_new, n)``."""
    # the prediction is linear in the changes: regressing the rows' indicators gives the weights
    return Ridge(penalty).fit(rows, np.eye(len(rows))).predict(new)


def _left_out_shares(rows: np.ndarray, penalty: float) -> np.ndarray:
    """Return the weight of each row in what the others predict of a row, ``(n, n)``."""
    shares = _shares(rows, rows, penalty)
    own = np.diag(shares).copy()
    np.fill_diagonal(shares, 0.0)
    return shares / (1 - own)[:, None]


def _errors(changes: np.ndarray, left_out_shares: np.ndarray) -> np.ndarray:
    """Return the squared error of each change as the others predict it, ``(n,)``."""
    return ((changes - left_out_shares @ changes) ** 2).sum(axis=1)
