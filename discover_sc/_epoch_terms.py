"""What the terms of the loss come to over an epoch, kept on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


class EpochTerms:
    """Means of named terms over the cells of an epoch, and which of them were not finite first.

    Nothing is read from the device before it is asked for.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self.n_cells = 0
        self._names: list[str] = []
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
        values = torch.stack([value.detach().float() for value in terms.values()])
        if not self._names:
            self._names = list(terms)
            self._sums = torch.zeros_like(values)
            self._broken = torch.zeros_like(values, dtype=torch.bool)
        self._sums += n_cells * values
        self._broken = torch.where(self._broken.any(), self._broken, ~torch.isfinite(values))
        self.n_cells += n_cells

    def find_broken(self) -> list[str]:
        """Return the terms that were not finite in the first minibatch in which any was not."""
        broken = self._broken.tolist()
        return [name for name, is_broken in zip(self._names, broken, strict=True) if is_broken]

    def pop_means(self) -> dict[str, float]:
        """Return the means, and begin anew."""
        sums = self._sums.tolist()
        means = {name: s / self.n_cells for name, s in zip(self._names, sums, strict=True)}
        self._forget()
        return means
