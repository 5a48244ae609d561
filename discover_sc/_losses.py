"""KL and adversarial terms: pure functions, one value per cell, in nats."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

if TYPE_CHECKING:
    from torch import Tensor

_N_LEVELS_OF_FULL_WEIGHT = 50  # at which a cell's own condition counts as much as all of them


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
    return _Divergence.apply(q.loc, q.scale)


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
    return _Divergence.apply(q.loc - prior_mean, q.scale)


class _Divergence(Function):
    """That of a normal at a distance from the prior's mean: eight steps of autograd in one."""

    @staticmethod
    def forward(ctx: FunctionCtx, distance: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(distance, scale)
        twice = distance.square() + scale.square() - 2 * scale.log()
        return (twice.sum(-1) - distance.shape[-1]) / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        distance, scale = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        return grad * distance, grad * (scale - 1 / scale)


def adversary_entropy(log_prediction: Tensor) -> Tensor:
    r"""Entropy of the adversary's prediction for each cell, in nats, in [0, log n_conditions].

    Parameters
    ----------
    log_prediction
        The adversary's log probabilities, shape ``(n_cells, n_conditions)``.

    Returns
    -------
    Entropy of shape ``(n_cells,)``.
    """
    return -(log_prediction.exp() * log_prediction).sum(-1)


def adversarial_loss(log_prediction: Tensor, target: Tensor, condition_index: Tensor) -> Tensor:
    r"""What the rest of the model minimises: how much the adversary knows, seen from both sides.

    .. math::

        \mathrm{KL}\left(p(y) \,\|\, g(\cdot \mid h)\right) + \lambda_K \log g(y \mid h),
        \qquad \lambda_K = \min(K / 50, 1)

    with the cell's own condition :math:`y` among :math:`K`. With the adversary at its optimum the
    expectation is least exactly where `h` carries nothing of `y`: that of the first term is the
    divergence of the product of the marginals :math:`p(h) p(y)` from the joint distribution, that
    of the second, but for a constant, :math:`\lambda_K` times the divergence the other way round,
    the mutual information.

    The first term has a gradient where the adversary is certain, and for unbalanced conditions its
    minimum lies at their frequencies and not at the uniform distribution. But it asks for
    uncertainty about every condition alike, so that what it does about a small shift of one of
    them falls with their number. The second moves each cell away from its own condition, whatever
    their number; with its full weight on two conditions the probes found more than with this one.

    Parameters
    ----------
    log_prediction
        The adversary's log probabilities, shape ``(n_cells, n_conditions)``.
    target
        What is known without `h`: the frequencies of the conditions, or their frequencies given
        the cell's label; rows sum to 1, shape ``(n_cells, n_conditions)`` or
        ``(1, n_conditions)``.
    condition_index
        Codes of the true conditions, ``int64`` of shape ``(n_cells,)``.

    Returns
    -------
    Loss of shape ``(n_cells,)``, in nats.

    Notes
    -----
    The paper :cite:p:`Slavutsky2025` maximises the entropy of the prediction.
    """
    divergence = (torch.xlogy(target, target) - target * log_prediction).sum(-1)
    own = log_prediction.gather(-1, condition_index.unsqueeze(-1)).squeeze(-1)
    return divergence + _weight_of_own(log_prediction) * own


def _weight_of_own(log_prediction: Tensor) -> float:
    return min(log_prediction.shape[-1] / _N_LEVELS_OF_FULL_WEIGHT, 1.0)


def adversarial_slope(log_prediction: Tensor, target: Tensor, to_own: Tensor) -> Tensor:
    r"""Derivative of each cell's :func:`adversarial_loss` by the adversary's logits.

    .. math:: g - p - \lambda_K (g - e_y)

    with :math:`e_y` 1 at the cell's own condition and 0 elsewhere.

    Parameters
    ----------
    log_prediction, target
        As for :func:`adversarial_loss`.
    to_own
        That of the cross-entropy, :math:`g - e_y` (:func:`cross_entropy_slope`).

    Returns
    -------
    Derivatives of shape ``(n_cells, n_conditions)``.
    """
    return log_prediction.exp() - target - _weight_of_own(log_prediction) * to_own


def cross_entropy_slope(log_prediction: Tensor, condition_index: Tensor) -> Tensor:
    r"""Derivative of each cell's cross-entropy by the adversary's logits.

    .. math:: g - e_y

    Parameters
    ----------
    log_prediction, condition_index
        As for :func:`adversarial_loss`.

    Returns
    -------
    Derivatives of shape ``(n_cells, n_conditions)``.
    """
    slope, truth = log_prediction.exp(), condition_index.unsqueeze(-1)
    return slope.scatter_add_(-1, truth, torch.full_like(truth, -1, dtype=slope.dtype))
