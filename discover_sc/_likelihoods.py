"""Reconstruction losses of the count likelihoods, fused: value and analytic gradient.

Most counts are zero, and where :math:`x = 0` all terms in lgamma vanish. So the dense work is one
logarithm per cell and gene; what non-zero counts add is evaluated on these alone, and in double
precision where their terms nearly cancel: on the CPU, with one theta per gene, that is on large
counts, otherwise on all (where the device has double precision).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

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
    counts, means = _Counts(nonzero, theta.detach()), [px.mu for px in likelihoods]
    if isinstance(likelihoods[0], ZeroInflatedNegativeBinomial):
        zi_logits = [px.zi_logits.to(theta.dtype) for px in likelihoods]
        return list(_ZeroInflatedLosses.apply(theta, counts, *means, *zi_logits))
    return list(_NegativeBinomialLosses.apply(theta, counts, *means))


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
    """The non-zero counts under the theta that the losses share, and their terms without mu.

    Attributes
    ----------
    nonzero
        Positions of the counts.
    small
        The terms of every count, in the precision of theta, good for counts below 8; None if all
        are taken from ``exact``.
    exact, exact_at
        Those of the other counts, and of numbers that are no counts, in double precision, and
        where they stand.
    """

    def __init__(self, nonzero: NonZero, theta: Tensor) -> None:
        self.nonzero = nonzero
        x, picked = nonzero.values.to(theta.dtype), nonzero.pick(theta)
        # too many thetas to tabulate; or a device that would have to tell how many are exact
        if len(theta) > 1 or nonzero.shape[0] == 1 or x.device.type != "cpu":
            self.small, self.exact_at = None, slice(None)
        else:
            row = nonzero.values.clamp(max=_N_TABULATED - 1).long()
            position = row * len(theta[0]) + nonzero.gene
            tables = (t.view(-1).index_select(0, position) for t in _tabulate(theta[0]))
            self.exact_at = (nonzero.values != row).nonzero().squeeze(1)
            self.small = _CountTerms(x, picked, *tables)
        x, picked = (_wide(t[self.exact_at]) for t in (x, picked))
        self.exact = _CountTerms(x, picked, *_count_terms(x, picked))


class _CountTerms(NamedTuple):
    """Counts, their inverse dispersions, and the loss without mu and its derivative by theta.

    All of shape ``(n_entries,)``.
    """

    x: Tensor
    theta: Tensor
    constant: Tensor
    constant_slope: Tensor

    def loss(self, mu: Tensor, log_1u: Tensor) -> Tensor:
        """Return the negative log-likelihood of each count."""
        log_mu = torch.log(mu + _EPS)
        return self.constant + (self.x + self.theta) * log_1u - self.x * log_mu

    def slopes(self, mu: Tensor, u: Tensor, log_1u: Tensor) -> tuple[Tensor, Tensor]:
        """Return the derivatives of each count's loss by mu and by theta."""
        mu = mu + _EPS
        total = mu + self.theta
        slope = (mu - self.x) / mu * (self.theta / total)
        weight = (self.x + self.theta) / total
        return slope, self.constant_slope + log_1u - weight * u


def _count_terms(x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Return lgamma(x + 1) - [lgamma(x + theta) - lgamma(theta) - x log(theta)] and its slope."""
    total = x + theta
    rising = torch.lgamma(total) - torch.lgamma(theta)
    constant = torch.lgamma(x + 1) - rising + x * torch.log(theta + _EPS)
    slope = torch.digamma(theta) - torch.digamma(total) + x / (theta + _EPS)
    return constant, slope


def _tabulate(theta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same for the counts 0, 1, ... of every theta, as running sums over k < x."""
    k = torch.arange(_N_TABULATED - 1, dtype=theta.dtype, device=theta.device).unsqueeze(1)
    log_steps = torch.log(k + 1) - torch.log1p((k - _EPS) / (theta + _EPS))
    slope_steps = (k - _EPS) / ((k + theta) * (theta + _EPS))
    return tuple(F.pad(s.cumsum(0), (0, 0, 1, 0)) for s in (log_steps, slope_steps))


# In the losses the dense terms are those of a zero; at the counts, the whole of an entry is put in
# their place.


class _NegativeBinomialLosses(Function):
    """Negative log-likelihoods summed over genes; see :func:`reconstruction_losses`."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, theta: Tensor, counts: _Counts, *means: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.entries = _Entries(means, counts)
        ctx.dense = [_log_1u(mu, theta) for mu in means]
        ctx.save_for_backward(theta)
        losses = []
        for (_, log_1u), own in zip(ctx.dense, ctx.entries.loss(), strict=True):
            counts.nonzero.fill(log_1u, 0.0)  # nothing reads the dense terms at the counts
            losses.append(counts.nonzero.sum_per_cell(own) + _sum_weighted(log_1u, theta))
        return tuple(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (theta,) = ctx.saved_tensors
        nonzero = ctx.entries.counts.nonzero
        slopes, theta_slopes = ctx.entries.slopes()
        mean_grads, theta_grad = [], None
        for k, (grad, (u, log_1u)) in enumerate(zip(grads, ctx.dense, strict=True)):
            slope = _slope(u, theta)
            if ctx.needs_input_grad[0]:
                theta_slope = torch.addcmul(log_1u, u, slope, value=-1)
                nonzero.put(theta_slope, theta_slopes[k])
                theta_grad = _add_weighted(theta_grad, grad, theta_slope, len(theta))
            if ctx.needs_input_grad[2 + k]:
                nonzero.put(slope, slopes[k])
                mean_grads.append(slope.mul_(grad.unsqueeze(1)))
            else:
                mean_grads.append(None)
        return theta_grad, None, *mean_grads


class _ZeroInflatedLosses(Function):
    r"""The same under zero inflation: a zero comes from either source, a count only from the NB.

    .. math:: -\log p(0) = \mathrm{softplus}(-l) - \mathrm{softplus}(-l - \theta \log(1 + u))

    with the logit :math:`l` of the inflation.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, theta: Tensor, counts: _Counts, *means_and_logits: Tensor
    ) -> tuple[Tensor, ...]:
        n = len(means_and_logits) // 2
        means, zi_logits = means_and_logits[:n], means_and_logits[n:]
        ctx.entries = _Entries(means, counts)
        counted = torch.stack([counts.nonzero.pick(logits) for logits in zi_logits])
        own_losses = ctx.entries.loss().add_(F.softplus(counted))
        losses, ctx.dense = [], []
        for mu, logits, own in zip(means, zi_logits, own_losses, strict=True):
            u, log_1u = _log_1u(mu, theta)
            both = torch.mul(log_1u, theta).add_(logits).neg_()
            loss = F.softplus(-logits).sub_(F.softplus(both))
            losses.append(counts.nonzero.put(loss, own).sum(-1))
            ctx.dense.append((u, log_1u, both))
        ctx.save_for_backward(theta, *zi_logits)
        return tuple(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        theta, *zi_logits = ctx.saved_tensors
        nonzero = ctx.entries.counts.nonzero
        slopes, theta_slopes = ctx.entries.slopes()
        mean_grads, logits_grads, theta_grad = [], [], None
        for k, (grad, logits, (u, log_1u, both)) in enumerate(
            zip(grads, zi_logits, ctx.dense, strict=True)
        ):
            per_cell = grad.unsqueeze(1)
            counted = torch.sigmoid(both)  # probability that a zero comes from the NB
            slope = _slope(u, theta)
            if ctx.needs_input_grad[0]:
                theta_slope = torch.addcmul(log_1u, u, slope, value=-1).mul_(counted)
                nonzero.put(theta_slope, theta_slopes[k])
                theta_grad = _add_weighted(theta_grad, grad, theta_slope, len(theta))
            if not any(ctx.needs_input_grad[2:]):
                mean_grads.append(None)
                logits_grads.append(None)
                continue
            logits_slope = counted - torch.sigmoid(-logits)
            nonzero.put(logits_slope, torch.sigmoid(nonzero.pick(logits)))
            logits_grads.append(logits_slope.mul_(per_cell))
            nonzero.put(slope.mul_(counted), slopes[k])
            mean_grads.append(slope.mul_(per_cell))
        return theta_grad, None, *mean_grads, *logits_grads


def _log_1u(mu: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Return u and log(1 + u), ``(n_cells, n_genes)``."""
    u = mu / (theta + _EPS)
    return u, torch.log1p(u)


def _sum_weighted(values: Tensor, theta: Tensor) -> Tensor:
    """Return the sum over genes of values times theta, ``(n_cells,)``."""
    if len(theta) > 1:
        return (values * theta).sum(-1)
    with torch.autocast(values.device.type, enabled=False):
        return values @ theta[0]


def _slope(u: Tensor, theta: Tensor) -> Tensor:
    """Return the derivative of theta log(1 + u) by mu, ``(n_cells, n_genes)``."""
    total = u + 1
    return torch.div(theta / (theta + _EPS), total, out=total)


def _add_weighted(total: Tensor | None, grad: Tensor, slope: Tensor, n_thetas: int) -> Tensor:
    """Add to the gradient of theta the slopes of a loss, weighted by the cells' gradients."""
    if n_thetas == 1:
        with torch.autocast(slope.device.type, enabled=False):
            own = (grad @ slope).unsqueeze(0)
    else:
        own = slope.mul_(grad.unsqueeze(1))
    return own if total is None else total.add_(own)


class _Entries:
    """What the counts' entries of the losses owe to mu: all of ``(n_likelihoods, n_entries)``."""

    def __init__(self, means: Sequence[Tensor], counts: _Counts) -> None:
        self.counts = counts
        self.mu = torch.stack([counts.nonzero.pick(mu) for mu in means])
        if counts.small is not None:
            self.u, self.log_1u = _log_1u(self.mu, counts.small.theta)
        self.exact_mu = _wide(self.mu[:, counts.exact_at])
        self.exact_u, self.exact_log_1u = _log_1u(self.exact_mu, counts.exact.theta)

    def loss(self) -> Tensor:
        """Return the negative log-likelihood of each count."""
        exact = self.counts.exact.loss(self.exact_mu, self.exact_log_1u).to(self.mu.dtype)
        if self.counts.small is None:
            return exact
        loss = self.counts.small.loss(self.mu, self.log_1u)
        return loss.index_copy_(1, self.counts.exact_at, exact)

    def slopes(self) -> tuple[Tensor, Tensor]:
        """Return the derivatives of each count's loss by mu and by theta."""
        exact = self.counts.exact.slopes(self.exact_mu, self.exact_u, self.exact_log_1u)
        exact = tuple(slope.to(self.mu.dtype) for slope in exact)
        if self.counts.small is None:
            return exact
        slopes = self.counts.small.slopes(self.mu, self.u, self.log_1u)
        return tuple(
            slope.index_copy_(1, self.counts.exact_at, own)
            for slope, own in zip(slopes, exact, strict=True)
        )
