"""Dispersion of the full reconstruction, by maximum likelihood given the trained means."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scvi import REGISTRY_KEYS

from ._keys import INFLATION_KEY, LIBRARY_KEY, OUTPUTS_KEY
from ._likelihoods import reconstruction_losses

if TYPE_CHECKING:
    from torch import Tensor

    from ._model import DISCoVeR
    from ._module import DiscoverVAE

_MAX_CELLS = 1000
_BATCH_SIZE = 500
_N_STEPS = 6
_LONGEST_STEP = 2.0  # of the logarithm
_SHORTEST_STEP = 1e-4
_RANGE = (-9.0, 9.0)  # of the logarithm: beyond, a count likelihood is Poisson or all zero


def fit_dispersion(model: DISCoVeR) -> None:
    r"""Put into the module the dispersion that fits the full reconstruction best.

    During training both reconstructions share :math:`\theta`. The one from z alone cannot know
    what the condition did, which to it is dispersion: genes that answer to the condition end with
    far too much of it, and cells drawn from the model would vary too much.

    .. math:: \hat\theta = \arg\max_\theta \sum_i \log p(x_i \mid z_i, w_i, \theta)

    with one posterior draw of z and w per cell, over at most 1,000 training cells. The problem
    falls apart into one per parameter; each is solved by the secant method on the derivative by
    :math:`\log \theta`, with bounded steps, all at once.

    Parameters
    ----------
    model
        A model whose networks are trained; its ``log_theta`` changes.
    """
    module = model.module
    if module.gene_likelihood == "poisson":
        return
    cells = np.random.default_rng(0).permutation(model.train_indices)[:_MAX_CELLS]
    loader = model._make_data_loader(
        model.adata, indices=cells, batch_size=_BATCH_SIZE, load_sparse_tensor=True
    )
    parts = [_decoded(model, tensors) for tensors in loader]
    slope = _slope(module, parts)
    step = -slope.sign()
    for _ in range(_N_STEPS - 1):
        with torch.no_grad():
            module.log_theta.add_(step).clamp_(*_RANGE)
        before, slope = slope, _slope(module, parts)
        step = _secant_step(slope, (slope - before) / step)
    with torch.no_grad():
        module.log_theta.add_(step).clamp_(*_RANGE)


def _slope(module: DiscoverVAE, parts: list[tuple[Tensor, ...]]) -> Tensor:
    """Return the derivative of the loss by log theta, of the shape of ``module.log_theta``."""
    for x, output, library, zi_logits, batch_index in parts:
        told = (library, module.theta(batch_index), zi_logits)
        loss = reconstruction_losses(x, module.gene_likelihood, [output], *told)
        loss.sum().backward()
    slope, module.log_theta.grad = module.log_theta.grad, None
    return slope


def _secant_step(slope: Tensor, curvature: Tensor) -> Tensor:
    """Return the step to where the derivative vanishes; downhill where the loss is not convex."""
    step = torch.where(curvature > 0, -slope / curvature, -slope.sign() * _LONGEST_STEP)
    # never 0: the next curvature is a ratio of differences
    smallest = torch.where(slope > 0, -_SHORTEST_STEP, _SHORTEST_STEP)
    step = torch.where(step.abs() < _SHORTEST_STEP, smallest, step)
    return step.clamp(-_LONGEST_STEP, _LONGEST_STEP)


@torch.no_grad()
def _decoded(model: DISCoVeR, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Return counts, what is decoded of them, log library and batch codes of a minibatch."""
    module = model.module
    encoded = module.inference(**module._get_inference_input(tensors))
    inputs = module._get_generative_input(tensors, encoded)
    decoded = module.generative(**inputs, likelihoods=False)
    counts, batch_index = tensors[REGISTRY_KEYS.X_KEY], inputs["batch_index"]
    x, batch_index = counts.to(module.device), batch_index.to(module.device)
    return x, decoded[OUTPUTS_KEY][0], encoded[LIBRARY_KEY], decoded[INFLATION_KEY], batch_index
