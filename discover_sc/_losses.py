"""KL and adversarial terms: pure functions, one value per cell, in nats."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor


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
