"""What a trained model keeps of its cells, so that counterfactuals need no training data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from scvi import REGISTRY_KEYS
from sklearn.metrics import pairwise_distances_argmin

from ._calibration import PROFILE_LIBRARY
from ._counterfactual import MIN_GROUP_CELLS, Reference, cluster_groups
from ._group_effects import GroupEffects

if TYPE_CHECKING:
    from anndata import AnnData
    from torch import Tensor

    from ._model import DISCoVeR

_MAX_GROUP_CELLS = 2000


def encode_reference(model: DISCoVeR) -> dict[str, np.ndarray | None]:
    """Return latents, condition codes, groups and group profiles of the model's cells.

    Training and validation cells, never the test split, which a user may hold out by external
    indexing; of each combination of conditions and group at most 2,000 cells, drawn at random.
    Groups are the labels, or k-means clusters of z that stay as they are from then on.

    Parameters
    ----------
    model
        A trained model.

    Returns
    -------
    Per cell ``z``, ``w``, ``condition_codes`` and ``groups``; ``cluster_centers`` of z, or None
    where there are labels; per combination of conditions and group that occurs
    ``profile_codes``, ``profile_groups``, ``profile_n_cells`` and ``profiles``
    (:func:`profile_of`).
    """
    cells = np.sort(np.concatenate([model.train_indices, model.validation_indices]))
    codes = model._condition_codes()[cells]
    centers = None
    if model.labels_key is not None:
        groups = model.adata.obs[model.labels_key].astype(str).to_numpy(dtype=str)[cells]
    else:
        clusters = cluster_groups(model.get_latent_representation(latent="z", indices=cells))
        centers, groups = (
            clusters.cluster_centers_,
            np.array([f"cluster_{k}" for k in clusters.labels_]),
        )
    kept = at_most(_MAX_GROUP_CELLS, np.column_stack([codes.astype(str), groups]))
    cells, codes, groups = cells[kept], codes[kept], groups[kept]
    pairs, pair_of_cell = np.unique(
        np.column_stack([codes.astype(str), groups]), axis=0, return_inverse=True
    )
    return {
        "z": model.get_latent_representation(latent="z", indices=cells),
        "w": model.get_latent_representation(latent="w", indices=cells),
        "condition_codes": codes,
        "groups": groups,
        "cluster_centers": centers,
        "profile_codes": pairs[:, :-1].astype(int),
        "profile_groups": pairs[:, -1],
        "profile_n_cells": np.bincount(pair_of_cell.ravel()),
        "profiles": _profiles(model, cells, pair_of_cell.ravel()),
    }


def _profiles(model: DISCoVeR, cells: np.ndarray, pair_of_cell: np.ndarray) -> np.ndarray:
    n_pairs = pair_of_cell.max() + 1
    sums = torch.zeros(n_pairs, model.summary_stats.n_vars, dtype=torch.float64)
    start = 0
    for tensors in model._make_data_loader(model.adata, indices=cells):
        x = tensors[REGISTRY_KEYS.X_KEY]
        pair = torch.as_tensor(pair_of_cell[start : start + len(x)])
        sums.index_add_(0, pair, normalized(model, x).double().cpu())
        start += len(x)
    means = sums / torch.as_tensor(np.bincount(pair_of_cell)).unsqueeze(1)
    return profile_of(model, means).numpy().astype(np.float32)


def normalized(model: DISCoVeR, x: Tensor) -> Tensor:
    """Return observed counts per 10,000; under ``gene_likelihood="normal"``, values as they are."""
    if model.module.gene_likelihood == "normal":
        return x
    return x * (PROFILE_LIBRARY / x.sum(-1, keepdim=True))


def profile_of(model: DISCoVeR, means: Tensor) -> Tensor:
    """Return log1p of mean counts per 10,000; under ``gene_likelihood="normal"``, the means."""
    return means if model.module.gene_likelihood == "normal" else torch.log1p(means)


def groups_of(model: DISCoVeR, source: AnnData) -> np.ndarray:
    """Return the group of each source cell: its label, or the nearest cluster of z."""
    centers = model.reference_["cluster_centers"]
    if centers is None:
        return source.obs[model.labels_key].astype(str).to_numpy(dtype=str)
    z = model.get_latent_representation(source)
    return np.array([f"cluster_{k}" for k in pairwise_distances_argmin(z, centers)])


def reference_between(
    reference: dict, keys: list[int], source_codes: np.ndarray, target_codes: np.ndarray
) -> Reference:
    """Return the latents of the reference cells, and which of them are on which side.

    Parameters
    ----------
    reference
        As :func:`encode_reference` returns it.
    keys
        Positions of the condition keys that are asked about; the others are not compared.
    source_codes, target_codes
        Condition codes of both sides, ``(n_condition_keys,)``.
    """
    codes = reference["condition_codes"][:, keys]
    return Reference(
        z=reference["z"],
        w=reference["w"],
        is_source=(codes == source_codes[keys]).all(axis=1),
        is_target=(codes == target_codes[keys]).all(axis=1),
        groups=reference["groups"],
    )


def effects_between(
    reference: dict, keys: list[int], source_codes: np.ndarray, target_codes: np.ndarray
) -> GroupEffects | None:
    """Return the changes observed in the groups seen on both sides; None if there is none.

    Parameters
    ----------
    reference, keys, source_codes, target_codes
        As in :func:`reference_between`.
    """
    sides = [_group_profiles(reference, keys, codes) for codes in (source_codes, target_codes)]
    matched = [group for group in sides[0] if group in sides[1]]
    if not matched:
        return None
    return GroupEffects(*(np.stack([side[group] for group in matched]) for side in sides))


def _group_profiles(reference: dict, keys: list[int], codes: np.ndarray) -> dict[str, np.ndarray]:
    """Return the profile of each group that has enough cells under some condition codes."""
    side = (reference["profile_codes"][:, keys] == codes[keys]).all(axis=1)
    profiles = {}
    for group in np.unique(reference["profile_groups"][side]):
        rows = side & (reference["profile_groups"] == group)
        n_cells = reference["profile_n_cells"][rows]
        if n_cells.sum() >= MIN_GROUP_CELLS:
            profiles[group] = np.average(reference["profiles"][rows], axis=0, weights=n_cells)
    return profiles


def at_most(n_cells: int, groups: np.ndarray) -> np.ndarray:
    """Return positions that keep at most ``n_cells`` of each group, ``(n, n_columns)``."""
    order = np.random.default_rng(0).permutation(len(groups))
    _, codes = np.unique(groups[order], axis=0, return_inverse=True)
    rank = pd.Series(0, index=range(len(order))).groupby(codes.ravel()).cumcount().to_numpy()
    return np.sort(order[rank < n_cells])
