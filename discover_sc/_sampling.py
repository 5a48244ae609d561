"""Draws of what could be observed: with fresh noise, or with the noise of an observed cell."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from scvi.distributions import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from torch.distributions import Gamma, Normal

if TYPE_CHECKING:
    from torch import Tensor

_SMALLEST = 1e-10  # fraction; keeps ratios finite


def sample(px: torch.distributions.Distribution, expression: Tensor, library: Tensor) -> Tensor:
    """Draw from a likelihood whose mean is moved to given expression, ``(n_cells, n_genes)``.

    Parameters
    ----------
    px
        Likelihood over ``(n_cells, n_genes)``.
    expression
        Wanted mean up to a factor per cell; values as they are if ``px`` is normal.
    library
        Log library size, ``(n_cells, 1)``.
    """
    if isinstance(px, Normal):
        return torch.normal(expression, px.scale)
    fractions = _fractions(expression)
    rate = fractions * torch.exp(library)
    if isinstance(px, Poisson):
        return torch.poisson(rate)
    if isinstance(px, ZeroInflatedNegativeBinomial):
        # px.scale is the mean before zero inflation, as everywhere else in this package
        return ZeroInflatedNegativeBinomial(
            mu=rate, theta=px.theta, zi_logits=px.zi_logits, scale=fractions
        ).sample()
    return NegativeBinomial(mu=rate, theta=px.theta, scale=fractions).sample()


def carry_over(
    px: torch.distributions.Distribution,
    x: Tensor,
    before: Tensor,
    after: Tensor,
    library: Tensor,
    library_change: float = 0.0,
) -> Tensor:
    r"""Draw the counts that observed cells would have with another mean and their own noise.

    A count is Poisson with a rate :math:`\lambda` that is Gamma distributed. Given the count,

    .. math:: \lambda \mid x \sim \mathrm{Gamma}(\theta + x,\ \theta / \mu + 1)

    If the mean falls by the factor :math:`r`, each molecule stays with probability :math:`r`; if it
    rises, :math:`\mathrm{Poisson}(\lambda (r - 1))` are added. Where x is distributed as the
    likelihood says, the result is, with the mean :math:`r \mu` and the same dispersion; and what
    the cell had beyond the likelihood, it keeps.

    Parameters
    ----------
    px
        Likelihood of the cells over ``(n_cells, n_genes)``; a zero-inflated one has no noise that
        could be told from its zeros, so that fresh counts are drawn.
    x
        Observed counts, ``(n_cells, n_genes)``.
    before, after
        Mean of x, and the wanted mean, up to a factor per cell; values if ``px`` is normal.
    library
        Log library size, ``(n_cells, 1)``.
    library_change
        What the treatment adds to it.
    """
    if isinstance(px, Normal):
        return x + after - before
    if isinstance(px, ZeroInflatedNegativeBinomial):
        return sample(px, after, library + library_change)
    fractions = _fractions(before).clamp(min=_SMALLEST)
    ratio = _fractions(after) / fractions * math.exp(library_change)
    rate = fractions * torch.exp(library)
    if not isinstance(px, Poisson):
        rate = Gamma(px.theta + x, px.theta / rate + 1).sample()
    added = torch.poisson(rate * (ratio - 1).clamp(min=0))
    kept = torch.binomial(x, ratio.clamp(max=1))
    return kept + added


def _fractions(expression: Tensor) -> Tensor:
    return expression / expression.sum(-1, keepdim=True)
