"""What the decoder misses of a new condition, gene by gene."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from scvi import settings

from ._calibration import GroupMeans
from ._move import fit_move
from ._parts import Part, missed_by_group
from ._reference import GroupProfile, at_most, groups_of
from ._shrinkage import dispersion_of
from ._source_cells import GroupedSource, SourceBatches
from ._target import targets_of
from .evaluation import log_mean_profile

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData

    from ._model import DISCoVeR
    from ._target import Target

_MAX_CELLS = 500


def missed_change(model: DISCoVeR, cells: AnnData, key: str, level: str) -> np.ndarray:
    r"""Change of the log profile that the decoder, which stays as it is, cannot draw.

    The observed change of the new cells, from known cells of the same groups under the level that
    most of those are under to the profile of the new ones (``log1p`` of means per 10,000 counts),
    is taken without its noise and compared with the predicted one (:func:`missed_by_group`).

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
    groups, known = groups_of(model, cells), groups_of(model, model.adata)
    under = model.adata.obs[key].astype(str).to_numpy()
    shared = np.isin(known, groups)
    if not shared.any():
        warnings.warn(
            f"None of the cells of {level!r} belongs to a group (label, or cluster of z) of the "
            "cells that the model was set up with; what the decoder misses of the condition "
            "cannot be told from what it misses of the group, and is left out. Pass cells of a "
            "known cell type if there are any.",
            UserWarning,
            stacklevel=settings.warnings_stacklevel,
        )
        return np.zeros(cells.n_vars)
    levels, n_cells = np.unique(under[shared], return_counts=True)
    candidates = np.flatnonzero(shared & (under == levels[n_cells.argmax()]))
    chosen = candidates[at_most(_MAX_CELLS, pd.DataFrame({"group": known[candidates]}))]
    [target] = targets_of(model, {key: level}, None)
    means = _pooled(groups, list(_means_by_group(model, target, chosen, known)))
    counts = model._counts_of(cells)
    inverse_library = float((1.0 / np.asarray(counts.sum(axis=1), dtype=float)).mean())
    observed = GroupProfile(log_mean_profile(counts), cells.n_obs, inverse_library)
    part = Part({"all": observed}, [means], 0.0)
    return missed_by_group(part, ["all"], dispersion_of(model))[0]


def _means_by_group(
    model: DISCoVeR, target: Target, chosen: np.ndarray, groups: np.ndarray
) -> Iterator[tuple[str, GroupMeans]]:
    """Yield each group of some cells of the model and what is predicted for it."""
    codes = model._condition_codes(model.adata)[chosen]
    for source_codes in np.unique(codes, axis=0):
        cells = chosen[(codes == source_codes).all(axis=1)]
        names, group_of_cell = np.unique(groups[cells], return_inverse=True)
        batches = SourceBatches(model, model.adata, cells, None)
        move = fit_move(model, "auto", source_codes, None, target)
        with torch.inference_mode():
            means = GroupedSource(batches, names, group_of_cell).means(move.way)
        yield from zip(names, means, strict=True)


def _pooled(groups: np.ndarray, means: list[tuple[str, GroupMeans]]) -> GroupMeans:
    """Return the means of all cells together, the groups in the proportions of the new cells."""
    n_known = Counter()
    for name, one in means:
        n_known[name] += one.n_cells
    weights = [(groups == name).sum() * one.n_cells / n_known[name] for name, one in means]
    profiles = (
        np.log1p(np.average([np.expm1(getattr(one, side)) for _, one in means], 0, weights))
        for side in ("observed", "decoded", "predicted")
    )
    return GroupMeans(*profiles, n_cells=sum(n_known.values()))
