"""Draws of what could be observed: with fresh noise, or with the noise of an observed cell."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from scvi.distributions import Poisson, ZeroInflatedNegativeBinomial
from torch.distributions import Gamma, Normal

if TYPE_CHECKING:
    from torch import Tensor

_SMALLEST = 1e-10  # fraction; keeps ratios finite
_N_CLUSTERS = 2.0  # expected, above which drawing these one by one takes longer


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
    counts = negative_binomial(rate, px.theta)
    if isinstance(px, ZeroInflatedNegativeBinomial):
        # px.scale is the mean before zero inflation, as everywhere else in this package
        counts.masked_fill_(torch.rand_like(counts) < torch.sigmoid(px.zi_logits), 0.0)
    return counts


def negative_binomial(mean: Tensor, theta: Tensor) -> Tensor:
    r"""Draw negative binomial counts, most of which are zero.

    Such a count is a sum of clusters :cite:p:`Quenouille1949`: their number is Poisson with the
    mean :math:`\theta \log(1 + u)`, :math:`u = \mu / \theta`, their sizes follow a logarithmic
    distribution. So a zero, no cluster, costs one uniform number. Where many clusters are
    expected, the count is drawn as Poisson with a rate that is Gamma distributed.

    Parameters
    ----------
    mean
        Not negative, ``(n_cells, n_genes)``.
    theta
        Inverse dispersion, positive, of a shape that broadcasts to that of the mean.

    Raises
    ------
    ValueError
        If a mean or a dispersion is not a number.
    """
    theta = theta.expand_as(mean)
    log_1u = torch.log1p(mean / theta)
    n_expected = theta * log_1u
    if bool(n_expected.isnan().any()):
        raise ValueError(
            "A mean or a dispersion to draw counts from is not a number. Check the cells for NaN."
        )
    some = -torch.expm1(-n_expected)
    many = n_expected > _N_CLUSTERS
    # from (0, 1]: where a cluster is all but impossible, there is none
    any_cluster = ((1 - torch.rand_like(mean) <= some) & ~many).reshape(-1).nonzero().squeeze(1)
    counts = torch.zeros(mean.shape, dtype=mean.dtype, device=mean.device)
    counts[many] = torch.poisson(Gamma(theta[many], theta[many] / mean[many]).sample())
    log_1u, n_expected, some = (  # sizes are read off logarithms near 0
        values.reshape(-1).index_select(0, any_cluster).double()
        for values in (log_1u, n_expected, some)
    )
    # the first comes at a time in (0, n_expected), given that it comes; the rest after it
    first = -torch.log1p(-some * torch.rand_like(some))
    n_clusters = 1 + torch.poisson((n_expected - first).clamp(min=0)).long()
    sizes = _logarithmic(log_1u.repeat_interleave(n_clusters))
    position = any_cluster.repeat_interleave(n_clusters)
    return counts.view(-1).index_add_(0, position, sizes.to(counts.dtype)).view_as(counts)


def _logarithmic(log_1u: Tensor) -> Tensor:
    r"""Draw sizes :math:`k \ge 1`, each with a probability as :math:`(u / (1 + u))^k / k`.

    Exact, from two uniform numbers :cite:p:`Kemp1981`.
    """
    log_q = torch.log1p(-torch.exp(-torch.rand_like(log_1u) * log_1u))
    return torch.floor(1 + torch.log1p(-torch.rand_like(log_1u)) / log_q)


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
    rises, :math:`\mathrm{Poisson}(\lambda (r - 1))` are added, which given the count are negative
    binomial with :math:`\theta + x`. Where x is distributed as the
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
    rise = (ratio - 1).clamp(min=0)
    if isinstance(px, Poisson):
        added = torch.poisson(rate * rise)
    else:
        shape = px.theta + x
        added = negative_binomial(shape / (px.theta / rate + 1) * rise, shape)
    return torch.binomial(x, ratio.clamp(max=1)) + added


def _fractions(expression: Tensor) -> Tensor:
    return expression / expression.sum(-1, keepdim=True)
