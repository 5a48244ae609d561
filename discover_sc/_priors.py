"""The prior of w given the shared latent and the condition: its mean; its variance is one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ._conditions import ConditionVectors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class LearnedPrior(nn.Module):
    """Prior mean as a network of the shared latent and the conditions."""

    def __init__(
        self, n_latent: int, n_latent_specific: int, n_hidden: int, n_features: Sequence[int]
    ) -> None:
        super().__init__()
        self.first = nn.Linear(n_latent, n_hidden)
        self.conditions = ConditionVectors(n_features, n_hidden)
        self.output = nn.Linear(n_hidden, n_latent_specific)

    def forward(self, z: Tensor, condition_features: Tensor) -> Tensor:
        """Return the prior mean, ``(n_cells, n_latent_specific)``."""
        return self.output(torch.relu(self.first(z) + self.conditions(condition_features)))

    def update(self, z: Tensor, condition_features: Tensor) -> None:
        """Learned by gradient: nothing to keep."""


class ClassMeanPrior(nn.Module):
    """Prior mean as the mean of z over the cells of the cell's condition.

    With several condition keys, the average of their class means. The means run over minibatches
    (a minibatch holds few cells of each of many conditions) and are saved with the model.
    """

    momentum = 0.05

    def __init__(self, n_latent: int, n_levels: Sequence[int]) -> None:
        super().__init__()
        for k, n in enumerate(n_levels):
            self.register_buffer(f"means_{k}", torch.zeros(n, n_latent))
        self.n_keys = len(n_levels)

    def _means(self) -> Tensor:
        return torch.cat([getattr(self, f"means_{key}") for key in range(self.n_keys)])

    def forward(self, z: Tensor, condition_features: Tensor) -> Tensor:
        """Return the prior mean, ``(n_cells, n_latent)``.

        Parameters
        ----------
        z
            Not read.
        condition_features
            Unit vectors of the levels, side by side, ``(n_cells, n_levels of all keys)``.
        """
        return condition_features @ self._means() / self.n_keys

    @torch.no_grad()
    def update(self, z: Tensor, condition_features: Tensor) -> None:
        """Move the class means towards those of a minibatch, classes that it lacks excepted."""
        counts = condition_features.sum(0).unsqueeze(1)
        means = condition_features.T @ z / counts.clamp(min=1)
        present = self.momentum * (counts > 0)
        start = 0
        for key in range(self.n_keys):
            old = getattr(self, f"means_{key}")
            own = slice(start, start + len(old))
            old += present[own] * (means[own] - old)
            start += len(old)
