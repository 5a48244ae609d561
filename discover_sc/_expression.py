"""Expression decoded from the latents, cell by cell, in mini-batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch
from scvi import REGISTRY_KEYS

from ._encoding import BATCH_SIZE
from ._keys import LIBRARY_KEY, QW_KEY, QZ_KEY

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from anndata import AnnData
    from torch import Tensor

    from ._counts import SparseCells
    from ._model import DISCoVeR

_LARGEST_HALF = float(np.finfo(np.float16).max)


@torch.inference_mode()
def expected_expression(
    model: DISCoVeR,
    shared: bool,
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
    dtype: Literal["float32", "float16"],
) -> pd.DataFrame | np.ndarray:
    """Return the expected expression, decoded from z alone or from both; see the methods."""
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype is {dtype!r}; it must be 'float32' or 'float16'.")
    _check_numbers(n_samples, n_samples_overall, library_size)
    adata = model._validate_anndata(adata)
    cells, restore = sorted_cells(adata, indices)
    if n_samples_overall is not None:
        n_samples = n_samples_overall // len(cells) + 1
    genes = _gene_columns(adata, gene_list)
    batch_codes = _batch_codes(model, transform_batch)
    average = return_mean and n_samples_overall is None
    expression = np.empty((1 if average else n_samples, len(cells), len(genes)), dtype)
    position, start = np.argsort(restore), 0
    for tensors in model._make_data_loader(
        adata, indices=cells, batch_size=batch_size or BATCH_SIZE, load_sparse_tensor=True
    ):
        rows = position[start : start + len(tensors[REGISTRY_KEYS.X_KEY])]
        draws = _draws(model, shared, tensors, batch_codes, library_size, n_samples)
        if average:
            draws = [sum(draws) / n_samples]
        for own, draw in zip(expression, draws, strict=True):
            own[rows] = _as_array(draw, genes, dtype)
        start += len(rows)
    if n_samples_overall is not None:
        pool = expression.reshape(-1, expression.shape[-1])
        return pool[np.random.default_rng(0).choice(len(pool), n_samples_overall)]
    if len(expression) > 1:
        return expression
    if return_numpy:
        return expression[0]
    return pd.DataFrame(expression[0], adata.obs_names[cells[restore]], adata.var_names[genes])


def _check_numbers(
    n_samples: int, n_samples_overall: int | None, library_size: float | Literal["latent"]
) -> None:
    name, number = "n_samples", n_samples
    if n_samples_overall is not None:
        name, number = "n_samples_overall", n_samples_overall
    if number < 1:
        raise ValueError(f"{name} is {number}; at least one draw is needed. Raise it.")
    if isinstance(library_size, str) and library_size == "latent":
        return
    if isinstance(library_size, str) or not 0 < library_size < np.inf:
        raise ValueError(
            f"library_size is {library_size!r}; it is positive, or 'latent' for each cell's own. "
            "Choose for example 1e4."
        )


def _draws(
    model: DISCoVeR,
    shared: bool,
    tensors: dict[str, Tensor | SparseCells],
    batch_codes: list[int | None],
    library_size: float | Literal["latent"],
    n_samples: int,
) -> Iterator[Tensor]:
    """Yield the expression of a minibatch under each draw, averaged over the batches."""
    module = model.module
    outputs = module.inference(**module._get_inference_input(tensors))
    library = outputs[LIBRARY_KEY]
    covariates = {k: v for k, v in tensors.items() if k != REGISTRY_KEYS.X_KEY}
    for _ in range(n_samples):
        z = outputs[QZ_KEY].sample()
        w = None if shared else outputs[QW_KEY].sample()
        decoded = [
            expression_of(module.decode(z, w, library, _under(covariates, code)), library_size)
            for code in batch_codes
        ]
        yield sum(decoded) / len(decoded)


def _under(tensors: dict[str, Tensor], batch_code: int | None) -> dict[str, Tensor]:
    """Return the covariates of a minibatch under another batch; None: under its own."""
    if batch_code is None:
        return tensors
    own = tensors[REGISTRY_KEYS.BATCH_KEY]
    return {**tensors, REGISTRY_KEYS.BATCH_KEY: torch.full_like(own, batch_code)}


def _as_array(values: Tensor, genes: np.ndarray, dtype: str) -> np.ndarray:
    """Return some columns, where they fit into the type."""
    if len(genes) < values.shape[1]:
        values = values[:, torch.as_tensor(genes, device=values.device)]
    if dtype == "float16" and bool((values.abs() > _LARGEST_HALF).any()):
        raise ValueError(
            f"The expression reaches {float(values.abs().max()):g}; dtype='float16' holds at most "
            f"{_LARGEST_HALF:g}. Choose a smaller library_size, or dtype='float32'."
        )
    return values.cpu().numpy().astype(dtype, copy=False)


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
    if not gene_list:
        raise ValueError("gene_list is empty; name genes of the data, or pass None for all.")
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
    if not names:
        raise ValueError(
            f"transform_batch is empty; registered batches are {known}. Choose among them, or pass "
            "None for each cell's own."
        )
    return [known.index(name) for name in names]
