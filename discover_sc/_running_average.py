"""The average of a module's parameters over the steps of training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn


class RunningAverage:
    """Exponential average over steps of a module's parameters and floating-point buffers.

    A few steps are taken together, weighted as the one at their end: moving all parameters costs
    as much as a large layer.
    """

    _N_TOGETHER = 4

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module = module
        self._decay = decay

    def start(self) -> None:
        """Begin at the present state."""
        self._n_steps, self._n_waiting = 0, 0
        state = self._module.state_dict().values()  # detached, and sharing memory with the module
        self._present = [value for value in state if value.is_floating_point()]
        self._average = [value.clone() for value in self._present]

    def update(self) -> None:
        """Count a step, and move towards the present state when enough have been taken."""
        self._n_steps += 1
        self._n_waiting += 1
        if self._n_waiting == self._N_TOGETHER:
            self._move()

    @torch.no_grad()
    def _move(self) -> None:
        """Early steps count less, or the start would linger."""
        decay = min(self._decay, self._n_steps / (self._n_steps + 10)) ** self._n_waiting
        torch._foreach_lerp_(self._average, self._present, 1 - decay)
        self._n_waiting = 0

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average, brought up to the last step, and the module's state."""
        if self._n_waiting:
            self._move()
        for average, present in zip(self._average, self._present, strict=True):
            kept = present.clone()
            present.copy_(average)
            average.copy_(kept)
