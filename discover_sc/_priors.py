"""The prior of w given the shared latent and the condition: its mean; its variance is one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ._networks import Covariates

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class LearnedPrior(nn.Module):
    """Prior mean as a network of the shared latent and the conditions."""

    def __init__(
        self, n_latent: int, n_latent_specific: int, n_hidden: int, n_levels: Sequence[int]
    ) -> None:
        super().__init__()
        self.first = nn.Linear(n_latent, n_hidden)
        self.conditions = Covariates(n_levels, 0, n_hidden)
        self.output = nn.Linear(n_hidden, n_latent_specific)

    def forward(self, z: Tensor, condition_index: Tensor) -> Tensor:
        """Return the prior mean, ``(n_cells, n_latent_specific)``."""
        return self.output(torch.relu(self.first(z) + self.conditions(condition_index, None)))

    def update(self, z: Tensor, condition_index: Tensor) -> None:
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

    def _means(self, key: int) -> Tensor:
        return getattr(self, f"means_{key}")

    def forward(self, z: Tensor, condition_index: Tensor) -> Tensor:
        """Return the prior mean, ``(n_cells, n_latent)``."""
        means = [self._means(k)[condition_index[:, k]] for k in range(self.n_keys)]
        return torch.stack(means).mean(0)

    @torch.no_grad()
    def update(self, z: Tensor, condition_index: Tensor) -> None:
        """Move the class means towards those of a minibatch, classes that it lacks excepted."""
        for key in range(self.n_keys):
            means, codes = self._means(key), condition_index[:, key]
            counts = torch.bincount(codes, minlength=len(means)).unsqueeze(1)
            sums = torch.zeros_like(means).index_add_(0, codes, z)
            step = self.momentum * (counts > 0)
            means += step * (sums / counts.clamp(min=1) - means)
