"""Bounds between which draws lie, without keeping the draws."""

from __future__ import annotations

from math import floor
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Tails:
    """The quantiles of a sample between which a new draw falls as often as asked.

    Only the smallest and the largest draws are kept, sorted, as many as the quantiles need: 2 of
    25 on each side of an interval of 0.9, and 1 in 20 of many.

    Parameters
    ----------
    n_draws
        Number of draws that will be added, at least 2.
    interval
        Probability that a new draw lies between the bounds, in (0, 1).
    """

    def __init__(self, n_draws: int, interval: float) -> None:
        rank = max(0.0, (n_draws + 1) * (1 - interval) / 2 - 1)  # of the lower bound, from 0
        self._below, self._fraction = floor(rank), rank - floor(rank)
        self._lowest: list[Tensor] = []
        self._highest: list[Tensor] = []

    def add(self, draw: Tensor) -> None:
        """Take a draw into account, of the shape of the first one."""
        self._insert(self._lowest, draw, torch.minimum, torch.maximum)
        self._insert(self._highest, draw, torch.maximum, torch.minimum)

    def _insert(self, kept: list[Tensor], draw: Tensor, outer: Callable, inner: Callable) -> None:
        """Put a draw where it belongs; the innermost of those kept makes room for it."""
        for k, row in enumerate(kept):
            kept[k], draw = outer(row, draw), inner(row, draw)
        if len(kept) < self._below + 2:
            kept.append(draw)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Return the lower and the upper bound, each of the shape of a draw."""
        lower, upper = (
            torch.lerp(kept[self._below], kept[self._below + 1], self._fraction)
            for kept in (self._lowest, self._highest)
        )
        return lower, upper
