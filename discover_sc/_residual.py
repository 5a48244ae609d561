"""What the decoder misses of a new condition, gene by gene, where it stands out of the noise."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from scvi import settings

from ._reference import groups_of
from .evaluation import log_mean_profile

if TYPE_CHECKING:
    import scipy.sparse as sp
    from anndata import AnnData

    from ._model import DISCoVeR

_LIBRARY = 1e4  # counts per cell at which profiles are compared
_THRESHOLD = 2.0  # squared, in standard errors; what is closer to 0 is left to the model
_MAX_CELLS = 500
_N_SAMPLES = 5


def missed_change(model: DISCoVeR, cells: AnnData, key: str, level: str) -> np.ndarray:
    r"""Change of the log profile that the decoder, which stays as it is, cannot draw.

    With :math:`o` the observed profile of the new cells (``log1p`` of means per 10,000 counts) and
    :math:`p` that predicted for them, from known cells of the same groups under the level that
    most of those are under,

    .. math:: r_g = (o_g - p_g) \max\left(0, 1 - 2 v_g / (o_g - p_g)^2\right)

    where :math:`v_g` is the sampling variance of :math:`o_g` under the model's dispersion.

    Parameters
    ----------
    model
        Knows the new level already.
    cells
        Registered cells of the new level.
    key, level
        Condition key and new level.

    Returns
    -------
    Shape ``(n_genes,)``.

    Warns
    -----
    UserWarning
        If there are no known cells of the same groups; nothing is then added to the decoder.
    """
    model.missed_changes_[level] = np.zeros(cells.n_vars)
    predicted = _predicted(model, cells, key, level)
    if predicted is None:
        warnings.warn(
            f"None of the cells of {level!r} belongs to a group (label, or cluster of z) of the "
            "cells that the model was set up with; what the decoder misses of the condition "
            "cannot be told from what it misses of the group, and is left out. Pass cells of a "
            "known cell type if there are any.",
            UserWarning,
            stacklevel=settings.warnings_stacklevel,
        )
        return model.missed_changes_[level]
    counts = model._counts_of(cells)
    observed = log_mean_profile(counts)
    change = observed - predicted
    square = np.maximum(change**2, np.finfo(float).tiny)
    return change * np.maximum(0.0, 1.0 - _THRESHOLD * _noise(model, counts, observed) / square)


def _predicted(model: DISCoVeR, cells: AnnData, key: str, level: str) -> np.ndarray | None:
    """Return the profile predicted for the new cells, the groups in their proportions."""
    groups, known = groups_of(model, cells), groups_of(model, model.adata)
    under = model.adata.obs[key].astype(str).to_numpy()
    shared = np.isin(known, groups)
    if not shared.any():
        return None
    levels, n_cells = np.unique(under[shared], return_counts=True)
    source = under == levels[n_cells.argmax()]
    rng = np.random.default_rng(0)
    members = {g: np.flatnonzero(source & (known == g)) for g in np.unique(groups)}
    members = {g: rng.permutation(m)[:_MAX_CELLS] for g, m in members.items() if len(m)}
    chosen = np.sort(np.concatenate(list(members.values())))
    with warnings.catch_warnings():
        # raised at registration, for training
        warnings.filterwarnings("ignore", message=".*fewer than 3 cells")
        warnings.filterwarnings("ignore", message="The median support")
        prediction = model.predict_counterfactual(
            model.adata[chosen], to={key: level}, n_samples=_N_SAMPLES, library_size=_LIBRARY
        )
    means = [prediction.X[known[chosen] == g].mean(axis=0) for g in members]
    shares = [(groups == g).sum() for g in members]
    return np.log1p(np.average(means, axis=0, weights=shares))


def _noise(model: DISCoVeR, counts: np.ndarray | sp.spmatrix, profile: np.ndarray) -> np.ndarray:
    """Return the sampling variance of a log profile, (n_genes,)."""
    library = np.asarray(counts.sum(axis=1), dtype=float).reshape(-1, 1)
    mean = np.expm1(profile) * library / _LIBRARY
    variance = mean
    if model.module.gene_likelihood != "poisson":
        theta = torch.exp(model.module.log_theta).mean(0).detach().cpu().numpy()
        variance = mean + mean**2 / theta
    of_mean = ((_LIBRARY / library) ** 2 * variance).mean(axis=0) / len(library)
    return of_mean / (1.0 + np.expm1(profile)) ** 2
