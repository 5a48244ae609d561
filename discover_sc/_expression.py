"""Expression decoded from the latents, cell by cell, in mini-batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch
from scvi import REGISTRY_KEYS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from torch import Tensor

    from ._model import DISCoVeR


@torch.inference_mode()
def expected_expression(
    model: DISCoVeR,
    px_key: str,
    adata: AnnData | None,
    indices: Sequence[int] | None,
    transform_batch: str | Sequence[str] | None,
    gene_list: Sequence[str] | None,
    library_size: float | Literal["latent"],
    n_samples: int,
    n_samples_overall: int | None,
    batch_size: int | None,
    return_mean: bool,
    return_numpy: bool | None,
) -> pd.DataFrame | np.ndarray:
    """Return the expected expression of one of the two likelihoods; see the model's methods."""
    model._check_if_trained(warn=False, message="The model is not trained. Call model.train().")
    adata = model._validate_anndata(adata)
    cells, restore = sorted_cells(adata, indices)
    if n_samples_overall is not None:
        n_samples = n_samples_overall // len(cells) + 1
    genes = _gene_columns(adata, gene_list)
    batch_codes = _batch_codes(model, transform_batch)
    average = return_mean and n_samples_overall is None
    parts = []
    for tensors in model._make_data_loader(adata, indices=cells, batch_size=batch_size):
        draws = np.stack(
            [
                _decode_average(model, px_key, tensors, batch_codes, library_size)[:, genes]
                for _ in range(n_samples)
            ]
        )  # (n_samples, n_cells, n_genes)
        parts.append(draws.mean(axis=0, keepdims=True) if average else draws)
    expression = np.concatenate(parts, axis=1)[:, restore]
    if n_samples_overall is not None:
        pool = expression.reshape(-1, expression.shape[-1])
        return pool[np.random.default_rng(0).choice(len(pool), n_samples_overall)]
    if len(expression) > 1:
        return expression
    if return_numpy:
        return expression[0]
    return pd.DataFrame(expression[0], adata.obs_names[cells[restore]], adata.var_names[genes])


def sorted_cells(adata: AnnData, indices: Sequence[int] | None) -> tuple[np.ndarray, np.ndarray]:
    """Return cells in ascending order, and where each one asked for then stands.

    The data loader reads minibatches of a backed file in ascending order, whatever it is asked.
    """
    if indices is None:
        every = np.arange(adata.n_obs)
        return every, every
    indices = np.asarray(indices)
    if indices.dtype == bool:
        if len(indices) != adata.n_obs:
            raise ValueError(
                f"indices is a mask of {len(indices)} and there are {adata.n_obs} cells. Pass one "
                "value per cell."
            )
        indices = np.flatnonzero(indices)
    indices = np.where(indices < 0, indices + adata.n_obs, indices)
    if len(indices) == 0:
        raise ValueError("indices selects no cell; at least one is needed. Check the selection.")
    order = np.argsort(indices, kind="stable")
    return indices[order], np.argsort(order, kind="stable")


def _decode_average(
    model: DISCoVeR,
    px_key: str,
    tensors: dict[str, Tensor],
    batch_codes: list[int | None],
    library_size: float | Literal["latent"],
) -> np.ndarray:
    """Average one draw over the batches that it is decoded under."""
    return np.mean([_decode(model, px_key, tensors, b, library_size) for b in batch_codes], axis=0)


def _decode(
    model: DISCoVeR,
    px_key: str,
    tensors: dict[str, Tensor],
    batch_code: int | None,
    library_size: float | Literal["latent"],
) -> np.ndarray:
    """Decode one posterior draw of a minibatch, under its own or another batch."""
    if batch_code is not None:
        own = tensors[REGISTRY_KEYS.BATCH_KEY]
        tensors = {**tensors, REGISTRY_KEYS.BATCH_KEY: torch.full_like(own, batch_code)}
    _, outputs = model.module(tensors, compute_loss=False)
    return expression_of(outputs[px_key], library_size).cpu().numpy()


def expression_of(
    px: torch.distributions.Distribution, library_size: float | Literal["latent"]
) -> Tensor:
    """Return the mean of a likelihood at a library size, ``(n_cells, n_genes)``.

    Fractions times the library size for counts; the mean itself for ``Normal``.
    """
    if isinstance(px, torch.distributions.Normal):
        return px.loc
    if library_size == "latent":
        return px.rate if isinstance(px, torch.distributions.Poisson) else px.mu
    return px.scale * library_size


def _gene_columns(adata: AnnData, gene_list: Sequence[str] | None) -> np.ndarray:
    """Return the positions of the genes asked for, in the order of the data."""
    if gene_list is None:
        return np.arange(adata.n_vars)
    gene_list = [gene_list] if isinstance(gene_list, str) else list(gene_list)
    unknown = [gene for gene in gene_list if gene not in adata.var_names]
    if unknown:
        raise ValueError(
            f"gene_list holds {unknown}, which adata.var_names lacks. Ask for genes of the data."
        )
    return np.flatnonzero(adata.var_names.isin(gene_list))


def _batch_codes(model: DISCoVeR, transform_batch: str | Sequence[str] | None) -> list[int | None]:
    if transform_batch is None:
        return [None]
    known = list(
        model.adata_manager.get_state_registry(REGISTRY_KEYS.BATCH_KEY).categorical_mapping
    )
    names = transform_batch if isinstance(transform_batch, list | tuple) else [transform_batch]
    names, known = [str(name) for name in names], [str(name) for name in known]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"transform_batch holds {unknown}; registered batches are {known}. Choose among them."
        )
    return [known.index(name) for name in names]
