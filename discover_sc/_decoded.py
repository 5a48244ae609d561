"""What the output of a decoder means: the likelihood of each count."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from scvi.distributions import NegativeBinomial, Normal, Poisson, ZeroInflatedNegativeBinomial

if TYPE_CHECKING:
    from torch import Tensor


def likelihood_of(
    gene_likelihood: Literal["nb", "zinb", "poisson", "normal"],
    output: Tensor,
    library: Tensor | None,
    theta: Tensor,
    zi_logits: Tensor | None = None,
) -> torch.distributions.Distribution:
    r"""Return the likelihood that the output of a decoder stands for.

    The mean of counts is :math:`\mu = e^l \, \mathrm{softmax}(o)`.

    Parameters
    ----------
    gene_likelihood
        Family of the distribution.
    output
        Shape ``(n_cells, n_genes)``: logits of the shares :math:`o`, means under ``"normal"``.
    library
        Log library size :math:`l`, ``(n_cells, 1)``; not read under ``"normal"``.
    theta
        Inverse dispersion, inverse variance under ``"normal"``, positive,
        ``(1 or n_cells, n_genes)``; not read under ``"poisson"``.
    zi_logits
        Logits of zero inflation, ``(n_cells, n_genes)``; read only under ``"zinb"``.
    """
    if gene_likelihood == "normal":
        scale = torch.rsqrt(theta).expand_as(output)
        return Normal(output, scale, validate_args=False, normal_mu=output)
    scale = F.softmax(output, dim=-1)
    rate = torch.exp(library) * scale
    if gene_likelihood == "poisson":
        return Poisson(rate=rate, validate_args=False, scale=scale)
    if gene_likelihood == "zinb":
        return ZeroInflatedNegativeBinomial(mu=rate, theta=theta, zi_logits=zi_logits, scale=scale)
    return NegativeBinomial(mu=rate, theta=theta, scale=scale)
