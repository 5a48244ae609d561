"""Reconstruction losses of the count likelihoods, fused: value and analytic gradient.

Most counts are zero, and where :math:`x = 0` all terms in lgamma vanish. So the dense work is one
logarithm per cell and gene; what non-zero counts add is evaluated on these alone and in double
precision, because its large terms nearly cancel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from scvi.distributions import Normal, Poisson, ZeroInflatedNegativeBinomial
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from ._counts import NonZero

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_EPS = 1e-8  # keeps log(0) away, as in scvi-tools' own distributions
_N_TABULATED = 8  # counts below are looked up; most non-zero counts of single cells are


def reconstruction_losses(
    x: Tensor | NonZero, likelihoods: Sequence[torch.distributions.Distribution], theta: Tensor
) -> list[Tensor]:
    r"""Negative log-likelihood of each cell under each of several likelihoods, in nats.

    With :math:`u = \mu / \theta` the negative binomial is

    .. math::
        -\log p(x) = (\theta + x) \log(1 + u) - x \log \mu + \log\Gamma(x + 1)
        - \sum_{k=0}^{x-1} \log(1 + k / \theta)

    and only its first term is left where :math:`x = 0`. The last two are the same for all
    likelihoods that share :math:`\theta`: they are evaluated once.

    Parameters
    ----------
    x
        Counts of shape ``(n_cells, n_genes)``, or their non-zero entries; any real numbers for
        ``Normal``.
    likelihoods
        Likelihoods of one class of :mod:`scvi.distributions`, each over ``(n_cells, n_genes)``.
    theta
        Inverse dispersion that negative binomials share, positive, of shape ``(1, n_genes)`` or
        ``(n_cells, n_genes)``; not read for the others.

    Returns
    -------
    One tensor of shape ``(n_cells,)`` per likelihood, summed over genes.

    Notes
    -----
    Equal to scvi-tools' ``-px.log_prob(x).sum(-1)``, its :math:`\epsilon = 10^{-8}` inside the
    logarithms included. Differentiable once.
    """
    if isinstance(likelihoods[0], Normal):
        x = x.dense() if isinstance(x, NonZero) else x
        return [-px.log_prob(x).sum(-1) for px in likelihoods]
    nonzero = NonZero.of(x)
    if isinstance(likelihoods[0], Poisson):
        return [_poisson_loss(px.rate, nonzero) for px in likelihoods]
    counts = _Counts(nonzero, theta.detach())
    if isinstance(likelihoods[0], ZeroInflatedNegativeBinomial):
        return [_ZeroInflatedLoss.apply(px.mu, px.zi_logits, theta, counts) for px in likelihoods]
    return [_NegativeBinomialLoss.apply(px.mu, theta, counts) for px in likelihoods]


def _poisson_loss(rate: Tensor, nonzero: NonZero) -> Tensor:
    x, rate_nonzero = _wide(nonzero.values), _wide(nonzero.pick(rate))
    # the whole of an entry's loss before the sum: at deep libraries its terms nearly cancel
    entries = rate_nonzero + torch.lgamma(x + 1) - x * torch.log(rate_nonzero + _EPS)
    zeros = rate.reshape(-1).index_fill(0, nonzero.flat, 0.0).view_as(rate).sum(-1)
    return zeros + nonzero.sum_per_cell(entries).to(zeros.dtype)


def _wide(values: Tensor) -> Tensor:
    """Return values in double precision, where the device has it."""
    return values if values.device.type == "mps" else values.double()


class _Counts:
    """What the losses under one theta share: the terms of the non-zero counts without mu.

    Attributes
    ----------
    nonzero
        Positions of the counts.
    x, theta
        Counts and their inverse dispersions, in double precision, ``(n_entries,)``.
    constant, constant_slope
        Terms of the loss without mu, and their derivative with respect to theta.
    """

    def __init__(self, nonzero: NonZero, theta: Tensor) -> None:
        self.nonzero = nonzero
        self.x = _wide(nonzero.values)
        self.theta = _wide(nonzero.pick(theta))
        if len(theta) > 1 or nonzero.shape[0] == 1:  # too many thetas to tabulate
            self.constant, self.constant_slope = _count_terms(self.x, self.theta)
            return
        values, slopes = _tabulate(_wide(theta[0]))  # (n_tabulated, n_genes)
        position = self.x.clamp(max=_N_TABULATED - 1).long() * len(theta[0]) + nonzero.gene
        self.constant = values.view(-1).index_select(0, position)
        self.constant_slope = slopes.view(-1).index_select(0, position)
        other = ((self.x >= _N_TABULATED) | (self.x != self.x.floor())).nonzero().squeeze(1)
        values, slopes = _count_terms(self.x[other], self.theta[other])
        self.constant.index_copy_(0, other, values)
        self.constant_slope.index_copy_(0, other, slopes)


def _count_terms(x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Return lgamma(x + 1) - [lgamma(x + theta) - lgamma(theta) - x log(theta)] and its slope."""
    rising = torch.lgamma(x + theta) - torch.lgamma(theta)
    constant = torch.lgamma(x + 1) - rising + x * torch.log(theta + _EPS)
    slope = torch.digamma(theta) - torch.digamma(x + theta) + x / (theta + _EPS)
    return constant, slope


def _tabulate(theta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same for the counts 0, 1, ... of every theta, as running sums over k < x."""
    k = torch.arange(_N_TABULATED - 1, dtype=theta.dtype, device=theta.device).unsqueeze(1)
    log_steps = torch.log(k + 1) - torch.log1p((k - _EPS) / (theta + _EPS))
    slope_steps = (k - _EPS) / ((k + theta) * (theta + _EPS))
    return tuple(F.pad(s.cumsum(0), (0, 0, 1, 0)) for s in (log_steps, slope_steps))


# In both losses u is set to 0 at the counts: there the dense terms and their slopes vanish, and the
# whole of an entry is put in from the terms in double precision.


class _NegativeBinomialLoss(Function):
    """Negative log-likelihood summed over genes; see :func:`reconstruction_losses`."""

    @staticmethod
    def forward(ctx: FunctionCtx, mu: Tensor, theta: Tensor, counts: _Counts) -> Tensor:
        mean = _Mean(mu, counts)
        u = counts.nonzero.put(mu / (theta + _EPS), 0.0)
        log_1u = torch.log1p(u)
        ctx.mean = mean
        ctx.save_for_backward(u, log_1u, theta)
        dense = log_1u @ theta[0] if len(theta) == 1 else (log_1u * theta).sum(-1)
        return dense + counts.nonzero.sum_per_cell(mean.loss()).to(mu.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        u, log_1u, theta = ctx.saved_tensors
        slope = torch.div(theta / (theta + _EPS), u + 1)  # of theta log(1 + u), by mu
        theta_grad = None
        if ctx.needs_input_grad[1]:
            theta_grad = ctx.mean.theta_gradient(grad, len(theta))
            if len(theta) == 1:
                theta_grad += grad @ log_1u - grad @ (u * slope)
            else:
                theta_grad += grad.unsqueeze(1) * (log_1u - u * slope)
        ctx.mean.nonzero.put(slope, ctx.mean.slope().to(slope.dtype))
        return slope.mul_(grad.unsqueeze(1)), theta_grad, None


class _ZeroInflatedLoss(Function):
    r"""The same under zero inflation: a zero comes from either source, a count only from the NB.

    .. math:: -\log p(0) = \mathrm{softplus}(-l) - \mathrm{softplus}(-l - \theta \log(1 + u))

    with the logit :math:`l` of the inflation.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, mu: Tensor, zi_logits: Tensor, theta: Tensor, counts: _Counts
    ) -> Tensor:
        mean = _Mean(mu, counts)
        u = counts.nonzero.put(mu / (theta + _EPS), 0.0)
        log_1u = torch.log1p(u)
        both = torch.mul(log_1u, theta).add_(zi_logits).neg_()
        ctx.mean = mean
        ctx.save_for_backward(u, log_1u, both, zi_logits, theta)
        dense = F.softplus(-zi_logits).sub_(F.softplus(both)).sum(-1)
        entries = mean.loss() + F.softplus(_wide(counts.nonzero.pick(zi_logits)))
        return dense + counts.nonzero.sum_per_cell(entries).to(mu.dtype)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        u, log_1u, both, zi_logits, theta = ctx.saved_tensors
        nonzero, per_cell = ctx.mean.nonzero, grad.unsqueeze(1)
        counted = torch.sigmoid(both)  # probability that a zero comes from the NB
        slope = torch.div(theta / (theta + _EPS), u + 1)
        theta_grad = logits_grad = None
        if ctx.needs_input_grad[2]:
            theta_grad = ctx.mean.theta_gradient(grad, len(theta))
            dense = (log_1u - u * slope).mul_(counted)
            theta_grad += grad @ dense if len(theta) == 1 else dense.mul_(per_cell)
        if ctx.needs_input_grad[1]:
            logits_grad = counted - torch.sigmoid(-zi_logits)
            nonzero.put(logits_grad, torch.sigmoid(nonzero.pick(zi_logits)))
            logits_grad.mul_(per_cell)
        nonzero.put(slope.mul_(counted), ctx.mean.slope().to(slope.dtype))
        return slope.mul_(per_cell), logits_grad, theta_grad, None


class _Mean:
    """What the counts' entries of the loss owe to mu, in double precision, ``(n_entries,)``."""

    def __init__(self, mu: Tensor, counts: _Counts) -> None:
        self.counts, self.nonzero = counts, counts.nonzero
        self.mu = _wide(counts.nonzero.pick(mu))
        self.ratio = self.mu / (counts.theta + _EPS)  # u
        self.log_1u = torch.log1p(self.ratio)
        self.total = counts.x + counts.theta

    def loss(self) -> Tensor:
        """Return the negative log-likelihood of each count."""
        log_mu = torch.log(self.mu + _EPS)
        return self.counts.constant + self.total * self.log_1u - self.counts.x * log_mu

    def _weight(self) -> Tensor:
        return self.total / ((self.counts.theta + _EPS) * (1 + self.ratio))

    def slope(self) -> Tensor:
        """Return the derivative of each count's loss by its mu."""
        return self._weight() - self.counts.x / (self.mu + _EPS)

    def theta_gradient(self, grad: Tensor, n_thetas: int) -> Tensor:
        """Return the counts' part of the gradient to theta, ``(n_thetas, n_genes)``."""
        slope = self.counts.constant_slope + self.log_1u - self._weight() * self.ratio
        slope = slope.mul_(grad.index_select(0, self.nonzero.cell)).to(grad.dtype)
        if n_thetas == 1:
            return self.nonzero.sum_per_gene(slope).unsqueeze(0)
        return self.nonzero.put(grad.new_zeros(self.nonzero.shape), slope)
