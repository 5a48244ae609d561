"""What stands out of the sampling noise of a profile, gene by gene."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ._calibration import PROFILE_LIBRARY

if TYPE_CHECKING:
    from ._model import DISCoVeR

_N_STEPS = 50
_TINY = 1e-6


def dispersion_of(model: DISCoVeR) -> np.ndarray:
    """Return the inverse dispersion of each gene, ``(n_genes,)``; infinite if it is Poisson."""
    if model.module.gene_likelihood == "poisson":
        return np.full(model.summary_stats.n_vars, np.inf)
    return torch.exp(model.module.log_theta).mean(0).detach().cpu().double().numpy()


def sampling_variance(
    profile: np.ndarray, theta: np.ndarray, n_cells: int, inverse_library: float
) -> np.ndarray:
    r"""Variance of a profile, log1p of mean counts per 10,000, by the delta method.

    .. math:: v = \frac{10^4\, \mu\, \overline{1 / L} + \mu^2 / \theta}{n\, (1 + \mu)^2}

    Parameters
    ----------
    profile
        ``log1p`` of :math:`\mu`, ``(n_genes,)``.
    theta
        Inverse dispersion, ``(n_genes,)``.
    n_cells
        Number :math:`n` of cells.
    inverse_library
        Mean over the cells of one over the library size :math:`L`.

    Returns
    -------
    Shape ``(n_genes,)``.
    """
    mean = np.expm1(np.maximum(profile, 0.0))
    variance = PROFILE_LIBRARY * mean * inverse_library + mean**2 / theta
    return variance / (n_cells * (1.0 + mean) ** 2)


def standing_out(values: np.ndarray, variances: np.ndarray) -> np.ndarray:
    r"""Posterior mean of what noisy values measure, if most are small and some are large.

    .. math::

        x_g \sim \mathcal N(m_g, v_g), \qquad
        m_g \sim (1 - \pi)\, \mathcal N(0, \tau_0^2) + \pi\, \mathcal N(0, \tau_1^2)

    with :math:`\pi, \tau_0, \tau_1` fitted to the values by 50 steps of expectation maximisation.

    Parameters
    ----------
    values, variances
        Values and the variances of their noise, ``(n_genes,)`` each.

    Returns
    -------
    Shape ``(n_genes,)``.
    """
    square = values**2
    excess = square - variances
    share = 0.2
    narrow, wide = max(0.1 * excess.mean(), _TINY), max(0.1 * square.max(), _TINY)
    for _ in range(_N_STEPS):
        likelihoods = [
            weight * np.exp(-0.5 * square / total) / np.sqrt(total)
            for weight, total in ((1 - share, narrow + variances), (share, wide + variances))
        ]
        is_wide = likelihoods[1] / np.maximum(sum(likelihoods), np.finfo(float).tiny)
        share = is_wide.mean()
        wide, narrow = (
            max(float((mass * excess).sum() / max(mass.sum(), _TINY)), _TINY)
            for mass in (is_wide, 1 - is_wide)
        )
    kept = [prior / np.maximum(prior + variances, _TINY) for prior in (narrow, wide)]
    return values * ((1 - is_wide) * kept[0] + is_wide * kept[1])


def missed(
    error: np.ndarray, variance: np.ndarray, change: np.ndarray, profile: np.ndarray
) -> np.ndarray:
    r"""Part of a decoder's error on one condition that is not noise, ``(n_genes,)``.

    .. math:: e_g = a\, \delta_g + b\, (1 - e^{-p_g}) + m_g + \text{noise}

    A decoder shrinks changes (:math:`a`); since counts add up, what it misses of strong genes all
    others are wrong by the same factor (:math:`b`, on the log scale of the profile); and
    single genes are missed on their own (:math:`m_g`, by :func:`standing_out`).

    Parameters
    ----------
    error, variance
        Observed minus predicted profile, and its sampling variance, ``(n_genes,)`` each.
    change, profile
        Predicted change :math:`\delta` and profile :math:`p`, ``(n_genes,)`` each.
    """
    common = np.stack([change, -np.expm1(-np.maximum(profile, 0.0))])
    weight = 1.0 / (variance + max(float((error**2 - variance).mean()), _TINY))
    system = (common * weight) @ common.T + _TINY * np.eye(2)
    explained = np.linalg.solve(system, (common * weight) @ error) @ common
    return explained + standing_out(error - explained, variance)
