"""What the terms of the loss come to over an epoch, kept on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


_N_TOGETHER = 50  # minibatches that are summed up at once


class EpochTerms:
    """Means of named terms over the cells of an epoch, and which of them were not finite first.

    Nothing is read from the device before it is asked for.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self.n_cells = 0
        self._names: list[str] = []
        self._waiting: list[list[Tensor]] = []
        self._weights: list[int] = []
        self._sums = self._broken = torch.zeros(0)

    def add(self, terms: dict[str, Tensor], n_cells: int) -> None:
        """Add the terms of a minibatch.

        Parameters
        ----------
        terms
            Means over the minibatch's cells, 0-d each; the same names in the same order always.
        n_cells
            Number of its cells.
        """
        self._names = list(terms)
        self._waiting.append([value.detach() for value in terms.values()])
        self._weights.append(n_cells)
        self.n_cells += n_cells
        if len(self._waiting) == _N_TOGETHER:
            self._sum_up()

    def _sum_up(self) -> None:
        """Take the minibatches that wait together: one by one they cost a dozen small steps."""
        if not self._waiting:
            return
        values = torch.stack([torch.stack(terms) for terms in self._waiting]).float()
        weights = torch.tensor(self._weights, dtype=values.dtype, device=values.device)
        infinite = ~torch.isfinite(values)  # (n_minibatches, n_terms)
        first = infinite[infinite.any(1).float().argmax()]
        if not len(self._sums):
            self._sums, self._broken = torch.zeros_like(first, dtype=values.dtype), first
        self._sums = self._sums + weights @ values
        self._broken = torch.where(self._broken.any(), self._broken, first)
        self._waiting, self._weights = [], []

    def find_broken(self) -> list[str]:
        """Return the terms that were not finite in the first minibatch in which any was not."""
        self._sum_up()
        broken = self._broken.tolist()
        return [name for name, is_broken in zip(self._names, broken, strict=True) if is_broken]

    def pop_means(self) -> dict[str, float]:
        """Return the means, and begin anew."""
        self._sum_up()
        sums = self._sums.tolist()
        means = {name: s / self.n_cells for name, s in zip(self._names, sums, strict=True)}
        self._forget()
        return means
