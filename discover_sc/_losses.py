"""Reconstruction, KL and adversarial terms: pure functions, one value per cell, in nats."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from scvi.distributions import NegativeBinomial, Normal, Poisson, ZeroInflatedNegativeBinomial

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_EPS = 1e-8  # keeps log(0) away, as in scvi-tools' own distributions


def reconstruction_losses(
    x: Tensor, likelihoods: Sequence[torch.distributions.Distribution], theta: Tensor
) -> list[Tensor]:
    r"""Negative log-likelihood of each cell under each of several likelihoods, in nats.

    For counts, :math:`\log\Gamma(x + \theta) - \log\Gamma(\theta) - \log\Gamma(x + 1)` vanishes
    where :math:`x = 0` and is the same for all likelihoods that share :math:`\theta`: it is
    evaluated once, on the non-zero counts.

    Parameters
    ----------
    x
        Expression of shape ``(n_cells, n_genes)``: counts, or any real number for ``Normal``.
    likelihoods
        Likelihoods of one class of :mod:`scvi.distributions`, each over ``(n_cells, n_genes)``.
    theta
        Inverse dispersion that negative binomials share, positive, of shape ``(1, n_genes)`` or
        ``(n_cells, n_genes)``; not read for the others.

    Returns
    -------
    One tensor of shape ``(n_cells,)`` per likelihood, summed over genes.
    """
    if isinstance(likelihoods[0], Normal):
        return [-px.log_prob(x).sum(-1) for px in likelihoods]
    nonzero = _NonZero(x)
    if isinstance(likelihoods[0], Poisson):
        constant = torch.lgamma(nonzero.x + 1)
        return [_poisson_loss(px.rate, nonzero, constant) for px in likelihoods]
    theta_nonzero = nonzero.pick(theta)
    constant = (
        torch.lgamma(theta_nonzero)
        - torch.lgamma(nonzero.x + theta_nonzero)
        + torch.lgamma(nonzero.x + 1)
    )
    loss = (
        _zinb_loss
        if isinstance(likelihoods[0], ZeroInflatedNegativeBinomial)
        else _negative_binomial_loss
    )
    return [loss(px, nonzero, theta, constant) for px in likelihoods]


class _NonZero:
    """The non-zero entries of a minibatch, and sums over them."""

    def __init__(self, x: Tensor) -> None:
        self._n_cells, self._n_genes = x.shape
        self._cell, self._gene = x.nonzero(as_tuple=True)
        self._flat = self._cell * self._n_genes + self._gene
        self.x = self.pick(x)

    def pick(self, values: Tensor) -> Tensor:
        """Return the entries of ``(n_cells or 1, n_genes)`` values where x is not zero."""
        if values.shape[0] == 1:
            return values[0][self._gene]
        return values.reshape(-1)[self._flat]

    def sum_per_cell(self, values: Tensor) -> Tensor:
        """Return the sum of one value per non-zero entry over each cell."""
        return values.new_zeros(self._n_cells).index_add(0, self._cell, values)


# In the losses below the large terms of an entry are combined before the sum over genes: at deep
# libraries two sums of millions of nats would leave no digits for their difference.


def _poisson_loss(rate: Tensor, nonzero: _NonZero, constant: Tensor) -> Tensor:
    log_rate = torch.log(nonzero.pick(rate) + _EPS)
    return rate.sum(-1) + nonzero.sum_per_cell(constant - nonzero.x * log_rate)


def _negative_binomial_loss(
    px: NegativeBinomial,
    nonzero: _NonZero,
    theta: Tensor,
    constant: Tensor,
) -> Tensor:
    """Negative log-likelihood; ``constant`` holds the terms in lgamma of the non-zero counts."""
    log_sum = torch.log(theta + px.mu + _EPS)
    zero = (theta * (log_sum - torch.log(theta + _EPS))).sum(-1)
    log_mu = torch.log(nonzero.pick(px.mu) + _EPS)
    return zero + nonzero.sum_per_cell(constant + nonzero.x * (nonzero.pick(log_sum) - log_mu))


def _zinb_loss(
    px: ZeroInflatedNegativeBinomial,
    nonzero: _NonZero,
    theta: Tensor,
    constant: Tensor,
) -> Tensor:
    """Negative log-likelihood; ``constant`` holds the terms in lgamma of the non-zero counts.

    A zero comes from either source, log(pi + (1 - pi) NB(0)); a count only from the NB.
    """
    log_zero = theta * (torch.log(theta + _EPS) - torch.log(theta + px.mu + _EPS))  # log NB(0)
    logits = px.zi_logits
    zero = F.softplus(-logits) - F.softplus(log_zero - logits)
    log_mu = torch.log(nonzero.pick(px.mu) + _EPS)
    log_sum = torch.log(nonzero.pick(theta) + nonzero.pick(px.mu) + _EPS)
    count = (
        constant
        + F.softplus(nonzero.pick(logits))  # -log(1 - pi)
        - nonzero.pick(log_zero)
        + nonzero.x * (log_sum - log_mu)
    )
    return zero.sum(-1) + nonzero.sum_per_cell(count - nonzero.pick(zero))


def kl_to_standard_normal(q: torch.distributions.Normal) -> Tensor:
    r"""KL divergence of each cell's posterior from the standard normal prior, in nats.

    .. math:: \sum_d \tfrac{1}{2} (\mu_d^2 + \sigma_d^2 - 1) - \log \sigma_d

    Parameters
    ----------
    q
        Posterior whose ``loc`` and ``scale`` have shape ``(n_cells, n_latent)``.

    Returns
    -------
    Divergence summed over the latent dimensions, shape ``(n_cells,)``.
    """
    return kl_to_unit_normal(q, torch.zeros_like(q.loc))


def kl_to_unit_normal(q: torch.distributions.Normal, prior_mean: Tensor) -> Tensor:
    r"""KL divergence of each cell's posterior from a normal prior of unit variance, in nats.

    .. math:: \sum_d \tfrac{1}{2} ((\mu_d - m_d)^2 + \sigma_d^2 - 1) - \log \sigma_d

    Parameters
    ----------
    q
        Posterior whose ``loc`` and ``scale`` have shape ``(n_cells, n_latent)``.
    prior_mean
        Prior mean :math:`m` of shape ``(n_cells, n_latent)``.

    Returns
    -------
    Divergence summed over the latent dimensions, shape ``(n_cells,)``.
    """
    squared = (q.loc - prior_mean).square() + q.scale.square()
    return (0.5 * (squared - 1) - q.scale.log()).sum(-1)


def adversary_cross_entropy(logits: Tensor, condition_index: Tensor) -> Tensor:
    r"""What the adversary minimises: :math:`-\log g(y \mid h)` of each cell, in nats.

    Parameters
    ----------
    logits
        The adversary's unnormalised prediction, shape ``(n_cells, n_conditions)``.
    condition_index
        Codes of the true conditions, ``int64`` of shape ``(n_cells,)``.

    Returns
    -------
    Cross-entropy of shape ``(n_cells,)``.
    """
    return F.cross_entropy(logits, condition_index, reduction="none")


def adversary_entropy(logits: Tensor) -> Tensor:
    r"""Entropy of the adversary's prediction for each cell, in nats, in [0, log n_conditions].

    Parameters
    ----------
    logits
        The adversary's unnormalised prediction, shape ``(n_cells, n_conditions)``.

    Returns
    -------
    Entropy of shape ``(n_cells,)``.
    """
    log_prediction = F.log_softmax(logits, dim=-1)
    return -(log_prediction.exp() * log_prediction).sum(-1)


def adversarial_loss(logits: Tensor, target: Tensor) -> Tensor:
    r"""What the rest of the model minimises: the adversary's distance from knowing nothing.

    .. math:: \mathrm{KL}\left(p(y) \,\|\, g(y \mid h)\right)

    With the adversary at its optimum the expectation is zero exactly where `h` carries nothing of
    `y`: the fixed point of maximising the entropy :math:`H(g(\cdot \mid h))`, but the gradient
    does not vanish where the adversary is certain, and for unbalanced conditions the minimum lies
    at their frequencies and not at the uniform distribution.

    Parameters
    ----------
    logits
        The adversary's unnormalised prediction, shape ``(n_cells, n_conditions)``.
    target
        What is known without `h`: the frequencies of the conditions, or their frequencies given
        the cell's label; rows sum to 1, shape ``(n_cells, n_conditions)`` or
        ``(1, n_conditions)``.

    Returns
    -------
    Divergence of shape ``(n_cells,)``, in nats, at least 0.

    Notes
    -----
    The paper :cite:p:`Slavutsky2025` maximises the entropy.
    """
    log_prediction = F.log_softmax(logits, dim=-1)
    return (torch.xlogy(target, target) - target * log_prediction).sum(-1)
