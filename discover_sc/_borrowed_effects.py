"""The change under a new treatment, with the help of the changes under known ones."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import numpy as np

from ._calibration import trust
from ._left_out import LeftOut
from ._shrinkage import standing_out

_TINY = 1e-6
_LEAST_SENSITIVITY = 0.1


class KnownChanges:
    r"""Observed changes under known treatments, and how strongly each group answers.

    Groups answer alike up to a factor and to what their own cells show beyond it:

    .. math::

        \tilde\Delta_{lk} = s_k \bar\Delta_l
        + \frac{n_{lk}}{n_{lk} + 50} (\Delta_{lk} - s_k \bar\Delta_l), \qquad
        s_k = \frac{\sum_l \Delta_{lk}^\top \bar\Delta_l}{\sum_l \bar\Delta_l^\top \bar\Delta_l}

    with :math:`\bar\Delta_l` the mean change under treatment l over the groups.

    Parameters
    ----------
    changes
        Observed changes, NaN where a group was not seen, ``(n_treatments, n_groups, n_genes)``.
    n_cells
        Treated cells of each, ``(n_treatments, n_groups)``.
    """

    def __init__(self, changes: np.ndarray, n_cells: np.ndarray) -> None:
        self.changes, self.n_cells = changes, n_cells
        observed = n_cells > 0
        known = np.where(observed[..., None], changes, 0.0)
        mean = known.sum(axis=1) / np.maximum(observed.sum(axis=1), 1)[:, None]
        products = np.einsum("lkg,lg->k", known, mean)
        squares = np.einsum("lk,lg->k", observed.astype(float), mean**2)
        answers = np.where(squares > 0, products / np.maximum(squares, _TINY), 1.0)
        self.sensitivity = np.maximum(answers, _LEAST_SENSITIVITY)
        typical = self.sensitivity[:, None] * mean[:, None]
        self.mean = mean
        self.table = typical + trust(n_cells)[..., None] * np.where(
            observed[..., None], known - typical, 0.0
        )

    def without(self, treatment: int) -> KnownChanges:
        """Return the changes under the other treatments."""
        others = np.arange(len(self.changes)) != treatment
        return KnownChanges(self.changes[others], self.n_cells[others])

    def carry(self, new: np.ndarray, variances: np.ndarray, seen: list[int]) -> Carried:
        r"""Return the change under a treatment that was seen in few cells of few groups.

        .. math:: d_k = \sum_l c_l \tilde\Delta_{lk} + s_k r + \text{noise}

        The :math:`c_l` are found by ridge regression (standard deviation
        :math:`1 / \sqrt{\text{treatments}}` beforehand); of the rest r, what stands out of the
        noise is kept.

        Parameters
        ----------
        new, variances
            Observed changes and their sampling variances, ``(n_seen, n_genes)`` each.
        seen
            The groups that they were observed in.
        """
        table = self.table[:, seen].reshape(len(self.table), new.size)
        rest = new
        for _ in range(2):  # the second time, the rest says how large it is
            left = max(float((rest**2 - variances).mean()), _TINY)
            weight = 1.0 / (variances.ravel() + left)
            system = (table * weight) @ table.T + len(table) * np.eye(len(table))
            shares = np.linalg.solve(system, (table * weight) @ new.ravel())
            rest = new - np.tensordot(shares, self.table[:, seen], axes=1)
        strength = self.sensitivity[seen][:, None]
        precision = (strength**2 / variances.clip(min=_TINY)).sum(axis=0)
        rest = (strength * rest / variances.clip(min=_TINY)).sum(axis=0) / precision
        rest = standing_out(rest, 1.0 / precision)
        return Carried(
            np.tensordot(shares, self.table, axes=1) + self.sensitivity[:, None] * rest,
            shares @ self.mean + rest,
        )


@dataclass(frozen=True)
class Carried:
    """Change in each group, ``(n_groups, n_genes)``, and in any other, ``(n_genes,)``."""

    in_groups: np.ndarray
    elsewhere: np.ndarray


class BorrowedEffects(LeftOut):
    """Change under a new treatment, and its error: that of known treatments taken for new.

    Each known treatment in turn is carried, with noise as if from as few cells, from the groups
    in which the new one was seen to the others that it was observed in (to the same, if there are
    no others).

    Parameters
    ----------
    known
        Changes under at least one known treatment.
    control
        Profiles of the groups under the source condition, ``(n_groups, n_genes)``.
    new, variances, seen
        As for :meth:`KnownChanges.carry`.
    n_cells
        Cells under the new treatment, ``(n_seen,)``.
    """

    def __init__(
        self,
        known: KnownChanges,
        control: np.ndarray,
        new: np.ndarray,
        variances: np.ndarray,
        seen: list[int],
        n_cells: np.ndarray,
    ) -> None:
        carried = known.carry(new, variances, seen)
        self._change, self._in_groups = carried.elsewhere, carried.in_groups
        rng = np.random.default_rng(0)
        left_out = []
        for treatment, n_known in enumerate(known.n_cells):
            usable = [k for k, group in enumerate(seen) if n_known[group] > 0]
            if not usable:
                continue
            groups = [seen[k] for k in usable]
            fewer = np.maximum(1 - n_cells[usable] / n_known[groups], 0)[:, None]
            noise = rng.normal(size=(len(usable), new.shape[1])) * np.sqrt(
                fewer * variances[usable]
            )
            observed = known.changes[treatment]
            predicted = known.without(treatment).carry(
                observed[groups] + noise, variances[usable], groups
            )
            others = [k for k in np.flatnonzero(n_known) if k not in seen] or groups
            left_out += [(control[k], predicted.in_groups[k], observed[k]) for k in others]
        super().__init__(*(np.stack(rows) for rows in zip(*left_out, strict=True)))

    def of(self, group: int | None) -> BorrowedEffects:
        """Return the same for one group of those with known changes; None: for any other."""
        one = copy(self)
        if group is not None:
            one._change = self._in_groups[group]
        return one

    def change(self, control: np.ndarray) -> np.ndarray:
        """Return the change of the group, whatever its profile before, ``(n_genes,)``."""
        return self._change

    def summary(self) -> dict[str, object]:
        """Return what was learned from, as plain values."""
        return {
            "n_groups": 0,
            "n_left_out": len(self.errors),
        }
