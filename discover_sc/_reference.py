"""What a trained model keeps of its cells, so that counterfactuals need no training data."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix
from scvi import REGISTRY_KEYS
from sklearn.metrics import pairwise_distances_argmin

from ._calibration import PROFILE_LIBRARY
from ._counterfactual import MIN_GROUP_CELLS, cluster_groups, n_clusters_for
from ._counts import SparseCells
from ._encoding import BATCH_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from torch import Tensor

    from ._model import DISCoVeR

_MAX_GROUP_CELLS = 2000
_MAX_CLUSTERED = 5000


def encode_reference(model: DISCoVeR) -> dict[str, np.ndarray | None]:
    """Return latents, condition codes, groups and group profiles of the model's cells.

    Training and validation cells, never the test split, which a user may hold out by external
    indexing; of each combination of conditions (and dose) and group at most 2,000 cells, drawn at
    random. Groups are the labels, or k-means clusters of z that stay as they are from then on.

    Parameters
    ----------
    model
        A trained model.

    Returns
    -------
    Per cell ``z``, ``w``, ``condition_codes``, ``doses`` (None if there are none) and ``groups``;
    ``cluster_centers`` of z, or None where there are labels; per combination of conditions, dose
    and group that occurs ``profile_codes``, ``profile_doses``, ``profile_groups``,
    ``profile_n_cells``, ``profile_inverse_library`` and ``profile_log_library`` (means over the
    cells of one over the library size, and of its logarithm) and ``profiles``
    (:func:`profile_of`).
    """
    cells = np.sort(np.concatenate([model.train_indices, model.validation_indices]))
    if model.labels_key is not None:
        groups = _labels(model, model.adata)[cells]
        return {"cluster_centers": None} | _encode(model, model.adata, cells, groups)
    z = model.get_latent_representation(indices=cells)
    some = np.random.default_rng(0).permutation(len(cells))[:_MAX_CLUSTERED]
    n_clusters = n_clusters_for(model._condition_codes(model.adata)[cells])
    centers = cluster_groups(z[np.sort(some)], n_clusters).cluster_centers_
    return {"cluster_centers": centers} | _encode(model, model.adata, cells, _nearest(z, centers))


def grow_reference(model: DISCoVeR, adata: AnnData) -> None:
    """Let cells that were added after training join the reference of the model.

    Parameters
    ----------
    model
        A trained model.
    adata
        Registered cells; their conditions are new, so that no profile of the reference changes.
    """
    reference = model.reference_
    joining = _encode(model, adata, np.arange(adata.n_obs), groups_of(model, adata))
    model.reference_ = reference | {
        name: np.concatenate([reference[name], new])
        for name, new in joining.items()
        if new is not None
    }


def _encode(
    model: DISCoVeR, adata: AnnData, cells: np.ndarray, groups: np.ndarray
) -> dict[str, np.ndarray | None]:
    """Return what the reference holds of some cells, given their groups."""
    codes, doses = model._condition_codes(adata)[cells], model._doses_of(adata)
    keys = pd.DataFrame(codes).assign(group=groups)
    if doses is not None:
        keys["dose"] = doses[cells]
    kept = at_most(_MAX_GROUP_CELLS, keys)
    cells, keys = cells[kept], keys.iloc[kept]
    grouped = keys.groupby(list(keys), sort=True)
    pair_of_cell, pairs = grouped.ngroup().to_numpy(), grouped.size().reset_index(name="n_cells")
    return _read(model, adata, cells, pair_of_cell) | {
        "condition_codes": codes[kept],
        "doses": None if doses is None else doses[cells],
        "groups": groups[kept],
        "profile_codes": pairs[list(range(codes.shape[1]))].to_numpy(),
        "profile_doses": None if doses is None else pairs["dose"].to_numpy(),
        "profile_groups": pairs["group"].to_numpy(dtype=str),
        "profile_n_cells": pairs["n_cells"].to_numpy(),
    }


@torch.inference_mode()
def _read(
    model: DISCoVeR, adata: AnnData, cells: np.ndarray, pair_of_cell: np.ndarray
) -> dict[str, np.ndarray]:
    """Return, in one pass over the cells, what is kept of them.

    Posterior means of z and w; of each pair's cells the profile, ``(n_pairs, n_genes)``,
    and the means of one over the library size and of its logarithm (0, 0 without counts).
    """
    sizes = model.module.n_latents.items()
    means = {latent: np.empty((len(cells), n), dtype=np.float32) for latent, n in sizes}
    n_cells = np.bincount(pair_of_cell)
    sums, start = np.zeros((len(n_cells), adata.n_vars)), 0
    libraries = np.zeros((2, len(n_cells)))
    for tensors in model._make_data_loader(
        adata, indices=cells, batch_size=BATCH_SIZE, load_sparse_tensor=True
    ):
        x = tensors[REGISTRY_KEYS.X_KEY]
        rows = slice(start, start + len(x))
        for latent, posterior in model.module.posteriors(tensors).items():
            means[latent][rows] = posterior.loc.cpu().numpy()
        x = csr_matrix(_arrays(x.by_cell), x.shape) if isinstance(x, SparseCells) else x.numpy()
        pair = pair_of_cell[rows]
        weight = np.ones(len(pair))
        if model.module.gene_likelihood != "normal":
            library = np.asarray(x.sum(axis=1), dtype=float).ravel()
            weight = PROFILE_LIBRARY / library
            for total, of_cell in zip(libraries, (1 / library, np.log(library)), strict=True):
                total += np.bincount(pair, of_cell, len(n_cells))
        sums += csr_matrix((weight, (pair, np.arange(len(pair)))), (len(n_cells), len(pair))) @ x
        start = rows.stop
    inverse_library, log_library = libraries / n_cells
    profiles = profile_of(model, torch.as_tensor(sums / n_cells[:, None]))
    return means | {
        "profiles": profiles.numpy().astype(np.float32),
        "profile_inverse_library": inverse_library,
        "profile_log_library": log_library,
    }


def _arrays(tensors: Sequence[Tensor]) -> tuple[np.ndarray, ...]:
    return tuple(tensor.numpy() for tensor in tensors)


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
        return _labels(model, source)
    return _nearest(model.get_latent_representation(source), centers)


def _labels(model: DISCoVeR, adata: AnnData) -> np.ndarray:
    return adata.obs[model.labels_key].astype(str).to_numpy(dtype=str)


def _nearest(z: np.ndarray, centers: np.ndarray) -> np.ndarray:
    return np.array([f"cluster_{k}" for k in pairwise_distances_argmin(z, centers)])


class GroupProfile(NamedTuple):
    """Profile of the reference cells of a group under some condition."""

    profile: np.ndarray
    n_cells: int
    inverse_library: float
    log_library: float = 0.0


def group_profiles(reference: dict, side: np.ndarray) -> dict[str, GroupProfile]:
    """Return the profile of each group that has enough cells on a side.

    Parameters
    ----------
    reference
        As :func:`encode_reference` returns it.
    side
        Which of its profiles are on this side, ``(n_pairs,)``.
    """
    profiles = {}
    for group in np.unique(reference["profile_groups"][side]):
        rows = side & (reference["profile_groups"] == group)
        n_cells = reference["profile_n_cells"][rows]
        if n_cells.sum() >= MIN_GROUP_CELLS:
            mean, inverse_library, log_library = (
                np.average(reference[name][rows], axis=0, weights=n_cells)
                for name in ("profiles", "profile_inverse_library", "profile_log_library")
            )
            profiles[str(group)] = GroupProfile(
                mean, int(n_cells.sum()), float(inverse_library), float(log_library)
            )
    return profiles


def at_most(n_cells: int, keys: pd.DataFrame) -> np.ndarray:
    """Return positions that keep at most ``n_cells`` of each combination of keys, at random."""
    order = np.random.default_rng(0).permutation(len(keys))
    rank = keys.iloc[order].groupby(list(keys)).cumcount().to_numpy()
    return np.sort(order[rank < n_cells])
