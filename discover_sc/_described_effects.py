"""The change under a treatment that is only described, from the changes under known ones."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import sem
from scvi import settings
from sklearn.linear_model import Ridge

from ._left_out import LeftOut

if TYPE_CHECKING:
    from ._borrowed_effects import KnownChanges

_PENALTIES = np.logspace(-4, 2, 13)  # per treatment; the last leaves nearly the mean
_REACH = 2.0  # how much further than left-out treatments a new one is followed
_TINY = 1e-12


class DescribedEffects:
    r"""Ridge regression of observed changes on descriptions of treatments.

    .. math::

        \hat\Delta_k = \sum_l c_l \tilde\Delta_{lk}

    with :math:`\tilde\Delta_{lk}` of :class:`~discover_sc._borrowed_effects.KnownChanges` and
    :math:`c_l` the weights of the known treatments at the new row, which add up to 1. The
    penalty is the one that predicts mean changes best when each treatment in turn is left out.

    Parameters
    ----------
    known
        Changes under the known treatments, at least three of them observed. One that is known
        without observing it (no change) has 0 cells: it is learned from and not left out.
    control
        Profiles of the groups under the source condition, ``(n_groups, n_genes)``.
    rows
        Descriptions of the known treatments, ``(n_treatments, n_features)``, of mean square
        length 1.
    noise
        Mean sampling variance of the treated profiles; None: not known.

    Attributes
    ----------
    penalty
        The chosen penalty, per treatment.
    scores
        R2 of left-out mean changes (0: no change), by penalty.
    score_of_mean
        The same of the mean of the other treatments, which needs no description.
    """

    def __init__(
        self,
        known: KnownChanges,
        control: np.ndarray,
        rows: np.ndarray,
        noise: float | None = None,
    ) -> None:
        self._known, self._control, self._noise = known, control, noise
        self._rows = rows.astype(float)
        n, observed = len(rows), known.n_cells.any(axis=1)
        left_out = {float(penalty): self._left_out_shares(penalty) for penalty in _PENALTIES}
        errors = {
            penalty: _errors(known.mean, shares)[observed] for penalty, shares in left_out.items()
        }
        errors_of_mean = _errors(known.mean, (1 - np.eye(n)) / (n - 1))[observed]
        total = (known.mean**2).sum()
        self.scores = {penalty: float(1 - each.sum() / total) for penalty, each in errors.items()}
        self.score_of_mean = float(1 - errors_of_mean.sum() / total)
        self.penalty = max(self.scores, key=self.scores.get)
        self._left_out = left_out[self.penalty]
        self._furthest = np.linalg.norm(self._left_out[observed] - 1 / n, axis=1).max()
        self._predicted = np.tensordot(self._left_out, known.table, axes=1)
        self._gains = errors_of_mean - errors[self.penalty]

    @property
    def tells(self) -> bool:
        """Whether left-out treatments are predicted better than by the mean of the others.

        By more than one standard error of the gain over the treatments.
        """
        return bool(self._gains.mean() > sem(self._gains))

    def change(self, new: np.ndarray, group: int | None) -> DescribedChange | None:
        """Return the change of one of the groups; None: of one that is not among them.

        Of a group that no treatment was observed in, the mean change of the others is taken, and
        its error is that of groups and treatments left out together: not known (None) if there
        are no two others. The squared error grows with the square of how far the weights depart
        from equal ones, beyond where they do for any left-out treatment; at twice as far the row
        is followed no further.

        Parameters
        ----------
        new
            Description, ``(n_features,)``.
        group
            Position of the group.
        """
        known = self._known
        shares, distance = self._shares_at(new)
        if group is not None and known.n_cells[:, group].any():
            change = shares @ known.table[:, group]
            predicted, left_out = self._predicted, known.n_cells > 0
        else:
            change = shares @ known.mean
            if known.n_cells.any(axis=0).sum() < 2:
                return None
            predicted, left_out = self._without_groups(), known.n_cells > 0
        return DescribedChange(
            self.summary() | {"description_within_reach": distance <= _REACH},
            change,
            max(distance, 1.0),
            np.broadcast_to(self._control, predicted.shape)[left_out],
            predicted[left_out],
            known.changes[left_out],
            self._noise,
        )

    def summary(self) -> dict[str, object]:
        """Return what was chosen and the cross-validated scores it was chosen by."""
        return {
            "n_treatments": len(self._gains),
            "penalty": self.penalty,
            "lfc_r2_by_penalty": dict(self.scores),
            "lfc_r2_of_mean_treatment": self.score_of_mean,
            "description_tells": self.tells,
        }

    def _shares_at(self, new: np.ndarray) -> tuple[np.ndarray, float]:
        """Return the weights of the known treatments at a row, as far as it is followed.

        And how far they depart from equal ones, in units of the furthest left-out treatment.
        """
        even = 1 / len(self._rows)
        departure = self._shares(new[None].astype(float), self.penalty)[0] - even
        distance = float(np.linalg.norm(departure) / self._furthest)
        return even + departure * min(1.0, _REACH / max(distance, _TINY)), distance

    def _without_groups(self) -> np.ndarray:
        """Return changes predicted without their treatment and their group, as in the table.

        A treatment that was observed in no other group is taken as it is.
        """
        known = self._known
        observed = known.n_cells > 0
        changes = np.where(observed[..., None], known.changes, 0.0)
        others = (observed.sum(axis=1, keepdims=True) - observed)[..., None]
        mean = (changes.sum(axis=1, keepdims=True) - changes) / np.maximum(others, 1)
        mean = np.where(others > 0, mean, known.mean[:, None])
        return np.tensordot(self._left_out, mean, axes=1)

    def _shares(self, new: np.ndarray, penalty: float) -> np.ndarray:
        """Return the weight of each known row in the prediction of new ones, ``(n_new, n)``."""
        n = len(self._rows)
        # the prediction is linear in the changes: regressing the rows' indicators gives weights
        return Ridge(penalty * n).fit(self._rows, np.eye(n)).predict(new)

    def _left_out_shares(self, penalty: float) -> np.ndarray:
        """Return the weight of each row in what the others predict of a row, ``(n, n)``."""
        shares = self._shares(self._rows, penalty)
        own = np.diag(shares).copy()
        np.fill_diagonal(shares, 0.0)
        return shares / (1 - own)[:, None]


class DescribedChange(LeftOut):
    """Change of a group under a described treatment, and its error: that on left-out ones.

    Parameters
    ----------
    choices
        What was chosen, as plain values.
    change
        What is predicted, ``(n_genes,)``.
    widening
        Factor of the standard error.
    control, predicted, observed, noise
        As for :class:`LeftOut`.
    """

    _shared = 0.5  # the network, too, has only these treatments to learn from

    def __init__(
        self,
        choices: dict[str, object],
        change: np.ndarray,
        widening: float,
        control: np.ndarray,
        predicted: np.ndarray,
        observed: np.ndarray,
        noise: float | None,
    ) -> None:
        super().__init__(control, predicted, observed, noise)
        self._choices, self._change, self._widening = choices, change, widening

    def change(self, control: np.ndarray) -> np.ndarray:
        """Return the change of the group, whatever its profile before, ``(n_genes,)``."""
        return self._change

    def error_variance(self, profile: np.ndarray, change: np.ndarray) -> np.ndarray:
        """Return the expected squared error of predicted genes, ``(n_genes,)``."""
        return self._widening**2 * super().error_variance(profile, change)

    def summary(self) -> dict[str, object]:
        """Return what was chosen and the cross-validated scores it was chosen by."""
        return {"n_groups": 0, "n_left_out": len(self.errors)} | self._choices


def _errors(changes: np.ndarray, left_out_shares: np.ndarray) -> np.ndarray:
    """Return the squared error of each change as the others predict it, ``(n,)``."""
    return ((changes - left_out_shares @ changes) ** 2).sum(axis=1)


def warn_of_descriptions(choices: dict[str, list[dict[str, object]]]) -> None:
    """Warn if descriptions tell nothing, or lie far from those of known treatments.

    Parameters
    ----------
    choices
        Of each described level, as :meth:`DescribedChange.summary` returns them, one per source
        condition.
    """
    every = [choice for each in choices.values() for choice in each]
    mute = [choice for choice in every if not choice.get("description_tells", True)]
    far = [
        level
        for level, each in choices.items()
        if not all(choice.get("description_within_reach", True) for choice in each)
    ]
    if mute:
        best = max(mute[0]["lfc_r2_by_penalty"].values())
        warnings.warn(
            "A linear regression on the description predicts registered treatments that are left "
            "out not clearly better than the mean of the others does (R2 of the change "
            f"{best:.2f} against {mute[0]['lfc_r2_of_mean_treatment']:.2f}). Check with "
            "evaluation.embedding_ablation what the model gets from it; use another description, "
            "or more treatments.",
            UserWarning,
            stacklevel=settings.warnings_stacklevel,
        )
    if far:
        warnings.warn(
            f"The descriptions of {far} lie far from those of registered treatments: to a linear "
            "regression, more than twice as far as any of these from the others, which it follows "
            "part of the way only. Check that the features were computed alike.",
            UserWarning,
            stacklevel=settings.warnings_stacklevel,
        )
