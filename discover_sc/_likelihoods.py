"""Reconstruction losses of decoder outputs, fused: value and analytic gradient.

Most counts are zero, and where :math:`x = 0` all terms in lgamma vanish. So the dense work is one
softmax and one logarithm per cell and gene, for all decoders together; the terms of non-zero counts
are evaluated on these alone, and in double precision where they nearly cancel: on the CPU, with one
theta per gene, that is on large counts, otherwise on all (where the device has double precision).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from ._counts import NonZero
from ._decoded import likelihood_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_EPS = 1e-8  # keeps log(0) away, as in scvi-tools' own distributions
_N_TABULATED = 8  # counts below are looked up; most non-zero counts of single cells are


def reconstruction_losses(
    x: Tensor | NonZero,
    gene_likelihood: Literal["nb", "zinb", "poisson", "normal"],
    outputs: Sequence[Tensor],
    library: Tensor,
    theta: Tensor,
    zi_logits: Tensor | None = None,
) -> Tensor:
    r"""Negative log-likelihood of each cell under each of several decoder outputs, in nats.

    With :math:`u = \mu / \theta` the negative binomial is

    .. math::
        -\log p(x) = (\theta + x) \log(1 + u) - x \log \mu + \log\Gamma(x + 1)
        - \sum_{k=0}^{x-1} \log(1 + k / \theta)

    and only its first term is left where :math:`x = 0`. The last two are the same for all
    outputs, which share :math:`\theta`: they are evaluated once. Under zero inflation with the
    probability :math:`\pi`, a zero comes from either source, a count only from the other one:

    .. math:: -\log p(0) = -\log(\pi + (1 - \pi) (1 + u)^{-\theta})

    Parameters
    ----------
    x
        Counts of shape ``(n_cells, n_genes)``, or their non-zero entries; any real numbers for
        ``"normal"``.
    gene_likelihood
        What the outputs mean; see :func:`~discover_sc._decoded.likelihood_of`.
    outputs
        Outputs of decoders, ``(n_cells, n_genes)`` each.
    library
        Log library size, ``(n_cells, 1)``; not read for ``"normal"``.
    theta
        Inverse dispersion, positive, of shape ``(1, n_genes)`` or ``(n_cells, n_genes)``; not
        read for ``"poisson"``.
    zi_logits
        Logits of :math:`\pi`, which the outputs share too, ``(n_cells, n_genes)``; read only for
        ``"zinb"``.

    Returns
    -------
    Losses of shape ``(n_outputs, n_cells)``, summed over genes.

    Notes
    -----
    Equal to ``-px.log_prob(x).sum(-1)`` of scvi-tools' distributions, their
    :math:`\epsilon = 10^{-8}` inside the logarithms included. Differentiable once.
    """
    outputs = [output.to(theta.dtype) for output in outputs]  # mixed precision rounds no loss
    if gene_likelihood == "normal":
        x = x.dense() if isinstance(x, NonZero) else x
        losses = [-likelihood_of("normal", o, library, theta).log_prob(x).sum(-1) for o in outputs]
        return torch.stack(losses)
    nonzero, library = NonZero.of(x), library.to(theta.dtype)
    if gene_likelihood == "poisson":
        rates = [likelihood_of("poisson", o, library, theta).rate for o in outputs]
        return torch.stack([_poisson_loss(rate, nonzero) for rate in rates])
    counts = _Counts(nonzero, theta.detach())
    if gene_likelihood == "nb":
        return _NegativeBinomialLosses.apply(theta, library, counts, *outputs)
    zi_logits = zi_logits.to(theta.dtype)
    return _ZeroInflatedLosses.apply(theta, library, counts, zi_logits, *outputs)


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
    theta
        The inverse dispersion of each, ``(n_entries,)``.
    small
        The terms of every count, in the precision of theta, good for counts below 8; None if all
        are taken from ``exact``.
    exact, exact_at
        Those of the other counts, and of numbers that are no counts, in double precision, and
        where they stand; None: everywhere.
    """

    def __init__(self, nonzero: NonZero, theta: Tensor) -> None:
        self.nonzero, self.theta = nonzero, nonzero.pick(theta)
        self.small = self.exact_at = None
        x = nonzero.values.to(theta.dtype)
        # a theta per cell is too many to tabulate; other devices would have to be asked how many
        # counts are exact
        if len(theta) == 1 and nonzero.shape[0] > 1 and x.device.type == "cpu":
            row = x.clamp(max=_N_TABULATED - 1).int()
            position = (row * theta.shape[1]).add_(nonzero.gene)
            looked_up = _tabulate(theta[0]).flatten(1).index_select(1, position)
            self.small = _CountTerms(x, self.theta, *looked_up)
            self.exact_at = (x != row).nonzero().squeeze(1)
        x, picked = (_wide(self.at_exact(t)) for t in (x, self.theta))
        self.exact = _CountTerms(x, picked, *_count_terms(x, picked))

    def at_exact(self, entries: Tensor) -> Tensor:
        """Return those of ``(..., n_entries)`` values that are evaluated in double precision."""
        return entries if self.exact_at is None else entries.index_select(-1, self.exact_at)


class _CountTerms(NamedTuple):
    """Counts, their inverse dispersions, and the loss without mu and its derivative by theta.

    All of shape ``(n_entries,)``.
    """

    x: Tensor
    theta: Tensor
    constant: Tensor
    constant_slope: Tensor


def _count_terms(x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Return lgamma(x + 1) - [lgamma(x + theta) - lgamma(theta) - x log(theta)] and its slope."""
    total = x + theta
    rising = torch.lgamma(total) - torch.lgamma(theta)
    constant = torch.lgamma(x + 1) - rising + x * torch.log(theta + _EPS)
    slope = torch.digamma(theta) - torch.digamma(total) + x / (theta + _EPS)
    return constant, slope


def _tabulate(theta: Tensor) -> Tensor:
    """Return the same for the counts 0, 1, ... of every theta, as running sums over k < x.

    Shape ``(2, n_tabulated, n_genes)``.
    """
    k = torch.arange(_N_TABULATED - 1, dtype=theta.dtype, device=theta.device).unsqueeze(1)
    positive, total = theta + _EPS, theta + k
    steps, table = theta.new_empty(2, *total.shape), theta.new_zeros(2, _N_TABULATED, len(theta))
    torch.log((positive / total).mul_(k + 1), out=steps[0])
    torch.div(k - _EPS, total.mul_(positive), out=steps[1])
    torch.cumsum(steps, 1, out=table[:, 1:])
    return table


# In the losses the dense terms are those of a zero; at the counts, the whole of an entry is put in
# their place. Dense terms have shape (n_outputs, n_cells, n_genes), entries (n_outputs, n_entries).


class _NegativeBinomialLosses(Function):
    """Negative log-likelihoods summed over genes; see :func:`reconstruction_losses`."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, theta: Tensor, library: Tensor, counts: _Counts, *outputs: Tensor
    ) -> Tensor:
        scale, mu = _means(outputs, library)
        ctx.entries = _Entries(mu, counts)
        u, log_1u = _log_1u(mu, theta, out=mu)
        # a count's whole loss, by theta because the sum weighs by it; backward overwrites it
        counts.nonzero.put(log_1u, ctx.entries.loss().div_(counts.theta))
        ctx.save_for_backward(theta, scale, u, log_1u)
        return _sum_weighted(log_1u, theta)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        theta, scale, u, log_1u = ctx.saved_tensors
        nonzero, (slopes, theta_slopes) = ctx.entries.counts.nonzero, ctx.entries.slopes()
        share, theta_grad, library_grad, output_grads = _share(u), None, None, [None] * len(grad)
        if ctx.needs_input_grad[0]:
            theta_slope = log_1u.addcmul_(share, theta / (theta + _EPS), value=-1)
            theta_grad = _sum_cells(nonzero.put(theta_slope, theta_slopes), grad, len(theta))
        if any(ctx.needs_input_grad[1:]):
            slope = nonzero.put(share.mul_(theta), slopes).mul_(grad.unsqueeze(2))
            output_grads, library_grad = _through_means(slope, scale)
        return theta_grad, library_grad, None, *output_grads


class _ZeroInflatedLosses(Function):
    """The same under a zero inflation that the outputs share."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        theta: Tensor,
        library: Tensor,
        counts: _Counts,
        zi_logits: Tensor,
        *outputs: Tensor,
    ) -> Tensor:
        scale, mu = _means(outputs, library)
        ctx.entries = _Entries(mu, counts)
        ctx.zi_logits = counts.nonzero.pick(zi_logits)
        own = ctx.entries.loss().add_(F.softplus(ctx.zi_logits))
        u, log_1u = _log_1u(mu, theta, out=mu)
        inflated = torch.sigmoid(zi_logits).clamp_(min=torch.finfo(theta.dtype).tiny)
        counted = torch.mul(log_1u, -theta).exp_()
        counted.addcmul_(counted, inflated, value=-1)
        zero = inflated + counted
        counted /= zero  # probability that a zero comes from the negative binomial
        ctx.save_for_backward(theta, scale, u, log_1u, inflated, counted)
        return -counts.nonzero.put(zero.log_(), -own).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        theta, scale, u, log_1u, inflated, counted = ctx.saved_tensors
        nonzero, (slopes, theta_slopes) = ctx.entries.counts.nonzero, ctx.entries.slopes()
        share, theta_grad, library_grad, output_grads = _share(u), None, None, [None] * len(grad)
        zi_grad = None
        if ctx.needs_input_grad[0]:
            theta_slope = log_1u.addcmul_(share, theta / (theta + _EPS), value=-1).mul_(counted)
            theta_grad = _sum_cells(nonzero.put(theta_slope, theta_slopes), grad, len(theta))
        if any(ctx.needs_input_grad[1:]):
            slope = nonzero.put(share.mul_(theta).mul_(counted), slopes).mul_(grad.unsqueeze(2))
            output_grads, library_grad = _through_means(slope, scale)
            zi_grad = _through_inflation(ctx.zi_logits, inflated, counted, nonzero, grad)
        return theta_grad, library_grad, None, zi_grad, *output_grads


def _through_inflation(
    at_counts: Tensor, inflated: Tensor, counted: Tensor, nonzero: NonZero, grad: Tensor
) -> Tensor:
    """Return the derivative by the logits of zero inflation: sums over the outputs.

    That of a zero is ``counted + inflated - 1``, that of a count ``inflated``.
    """
    every = grad.sum(0).unsqueeze(1)
    total = inflated.sub_(1).mul_(every)
    for own, weight in zip(counted, grad, strict=True):
        total.addcmul_(own, weight.unsqueeze(1))
    weights = every.squeeze(1).index_select(0, nonzero.cell)
    return nonzero.put(total, torch.sigmoid(at_counts) * weights)


def _means(outputs: Sequence[Tensor], library: Tensor) -> tuple[Tensor, Tensor]:
    """Return shares of the library, and means: new tensors."""
    scale = outputs[0].new_empty(len(outputs), *outputs[0].shape)
    for output, own in zip(outputs, scale, strict=True):
        torch.softmax(output, -1, out=own)
    return scale, scale * torch.exp(library)


def _through_means(slope: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the derivatives by the outputs, in place of those by log(mu), and by the library."""
    total = slope.sum(-1, keepdim=True)
    return slope.addcmul_(scale, total, value=-1), total.sum(0)


def _log_1u(mu: Tensor, theta: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return u, in place of ``out`` if given, and log(1 + u)."""
    u = torch.div(mu, theta + _EPS, out=out)
    return u, torch.log1p(u)


def _share(u: Tensor) -> Tensor:
    """Return u / (1 + u), a new tensor, as far as u is finite."""
    total = u + 1
    return torch.div(u, total, out=total)


def _sum_weighted(values: Tensor, theta: Tensor) -> Tensor:
    """Return the sum over genes of values times theta, ``(n_outputs, n_cells)``."""
    if len(theta) > 1:
        return (values * theta).sum(-1)
    with torch.autocast(values.device.type, enabled=False):
        return values @ theta[0]


def _sum_cells(slope: Tensor, grad: Tensor, n_thetas: int) -> Tensor:
    """Return the gradient of theta: slopes times the gradients of the losses, summed."""
    if n_thetas > 1:
        return slope.mul_(grad.unsqueeze(2)).sum(0)
    with torch.autocast(slope.device.type, enabled=False):
        return grad.reshape(1, -1) @ slope.flatten(0, 1)


class _Entries:
    """What the counts' entries of the losses owe to mu: all of ``(n_outputs, n_entries)``."""

    def __init__(self, means: Tensor, counts: _Counts) -> None:
        self.counts = counts
        mu = counts.nonzero.pick(means)
        self._small = None if counts.small is None else _AtMeans(counts.small, mu)
        self._exact = _AtMeans(counts.exact, _wide(counts.at_exact(mu)))
        self._dtype = mu.dtype

    def loss(self) -> Tensor:
        """Return the negative log-likelihood of each count."""
        small = None if self._small is None else self._small.loss()
        return self._in_place(small, self._exact.loss())

    def slopes(self) -> tuple[Tensor, Tensor]:
        """Return the derivatives of each count's loss by log(mu) and by theta."""
        exact = self._exact.slopes()
        small = (None, None) if self._small is None else self._small.slopes()
        return tuple(map(self._in_place, small, exact))

    def _in_place(self, small: Tensor | None, exact: Tensor) -> Tensor:
        """Return one value per count, the exact ones in their places."""
        exact = exact.to(self._dtype)
        return exact if small is None else small.index_copy_(1, self.counts.exact_at, exact)


class _AtMeans:
    """Counts under means: all of ``(n_outputs, n_entries)``."""

    def __init__(self, terms: _CountTerms, mu: Tensor) -> None:
        self._terms, self._mu = terms, mu
        self._positive, self._total = mu + _EPS, terms.x + terms.theta
        self._u, self._log_1u = _log_1u(mu, terms.theta)

    def loss(self) -> Tensor:
        """Return the negative log-likelihood of each count."""
        loss = torch.addcmul(self._terms.constant, self._total, self._log_1u)
        return loss.addcmul_(self._terms.x, torch.log(self._positive), value=-1)

    def slopes(self) -> tuple[Tensor, Tensor]:
        """Return the derivatives of each count's loss by log(mu) and by theta."""
        x, theta, _, constant_slope = self._terms
        total = self._positive + theta
        slope = (self._positive - x).div_(self._positive).mul_(self._mu).mul_(theta / total)
        weight = torch.div(self._total, total, out=total)
        return slope, (constant_slope + self._log_1u).addcmul_(weight, self._u, value=-1)
