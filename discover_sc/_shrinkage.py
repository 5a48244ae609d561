"""What stands out of the sampling noise of a profile, gene by gene."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.special import expit, logit

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


def denoised(change: np.ndarray, variances: np.ndarray, profile: np.ndarray) -> np.ndarray:
    r"""Observed change of a profile without its sampling noise, ``(n_genes,)``.

    .. math:: \Delta_g = b\, (1 - e^{-p_g}) + m_g + \text{noise}

    Counts add up, so what strong genes gain all others lose by the same factor (:math:`b`, on the
    log scale of the profile); and single genes change on their own (:math:`m_g`, by
    :func:`standing_out`).

    Parameters
    ----------
    change, variances
        Observed change and the variance of its noise, ``(n_genes,)`` each.
    profile
        Profile :math:`p`, ``(n_genes,)``; best one whose noise is not that of the change.
    """
    return standing_out(change, variances, -np.expm1(-np.maximum(profile, 0.0)))


def standing_out(
    values: np.ndarray, variances: np.ndarray, common: np.ndarray | None = None
) -> np.ndarray:
    r"""Posterior mean of what noisy values measure: what they share, and what stands out.

    Beside what they share, most are small and some are large:

    .. math::

        x_g \sim \mathcal N(b f_g + m_g, v_g), \qquad
        m_g \sim (1 - \pi)\, \mathcal N(0, \tau_0^2) + \pi\, \mathcal N(0, \tau_1^2)

    with :math:`b, \pi, \tau_0, \tau_1` fitted to the values by 50 steps of expectation
    maximisation.

    Parameters
    ----------
    values, variances
        Values and the variances of their noise, ``(n_genes,)`` each.
    common
        What all values may share up to a factor, :math:`f`; None: nothing.

    Returns
    -------
    Shape ``(n_genes,)``.
    """
    common = np.zeros_like(values) if common is None else common
    spread, share = None, 0.2
    precision = 1.0 / (variances + max(float((values**2 - variances).mean()), _TINY))
    for _ in range(_N_STEPS):
        factor = (precision * common) @ values / max((precision * common) @ common, _TINY)
        rest = values - factor * common
        square, excess = rest**2, rest**2 - variances
        if spread is None:
            spread = np.maximum([[0.1 * excess.mean()], [0.1 * square.max()]], _TINY)
        total = spread + variances
        log_likelihood = -0.5 * (square / total + np.log(total))
        is_wide = expit(log_likelihood[1] - log_likelihood[0] + logit(share))
        mass = np.stack([1 - is_wide, is_wide])
        spread = np.maximum(mass @ excess / np.maximum(mass.sum(axis=1), _TINY), _TINY)[:, None]
        share = float(is_wide.mean())
        precision = (mass / (spread + variances)).sum(axis=0)
    kept = (mass * spread / (spread + variances)).sum(axis=0)
    return factor * common + kept * rest
