"""Checks at the border: counts are counts, cells and conditions are there; nothing is repaired."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from anndata import AnnData

_MIN_CELLS = 3
_CHUNK = 4096
_LOG_DATA_HINT = "for log-normalised data use DISCoVeR(adata, gene_likelihood='normal')"


def _source(layer: str | None) -> str:
    return "adata.X" if layer is None else f"adata.layers[{layer!r}]"


def _matrix(adata: AnnData, layer: str | None) -> object:
    if layer is not None and layer not in adata.layers:
        raise KeyError(
            f"Layer {layer!r} is not in adata.layers; layers are "
            f"{[name for name in adata.layers if name is not None]}. "
            "Choose one of them, or layer=None for adata.X."
        )
    matrix = adata.X if layer is None else adata.layers[layer]
    if matrix is None:
        raise ValueError(
            f"{_source(layer)} is empty (None); it must hold the expression of each cell. "
            "Put the counts there or name a layer."
        )
    return matrix


def _chunks(matrix: object) -> Iterator[np.ndarray | sp.spmatrix]:
    """Yield blocks of rows, so that a backed matrix is never read whole."""
    for start in range(0, matrix.shape[0], _CHUNK):
        yield matrix[start : start + _CHUNK]


def _stored_values(block: np.ndarray | sp.spmatrix) -> np.ndarray:
    return block.data if sp.issparse(block) else np.asarray(block)


def check_finite(adata: AnnData, layer: str | None = None) -> None:
    """Refuse expression that is NaN or infinite.

    Parameters
    ----------
    adata
        Cells with expression; may be backed.
    layer
        Layer to check; None: ``adata.X``.

    Raises
    ------
    KeyError
        If the layer does not exist.
    ValueError
        If the matrix is missing or a value is NaN or infinite.

    Examples
    --------
    >>> from discover_sc.data import simulate
    >>> check_finite(simulate(20, 10))
    """
    for block in _chunks(_matrix(adata, layer)):
        values = _stored_values(block)
        n_bad = values.size - np.isfinite(values).sum()
        if n_bad:
            raise ValueError(
                f"{_source(layer)} holds NaN or infinite values ({n_bad} among the first that were "
                "read); every value must be finite. Remove those cells or genes, or go back to "
                "the counts from which they were computed."
            )


def check_counts(adata: AnnData, layer: str | None = None) -> None:
    """Refuse expression that is not counts.

    Parameters
    ----------
    adata
        Cells with expression; may be backed.
    layer
        Layer to check; None: ``adata.X``.

    Raises
    ------
    KeyError
        If the layer does not exist.
    ValueError
        If a value is NaN, infinite, negative or not an integer, or a cell has no counts at all.

    Warns
    -----
    UserWarning
        If genes have no counts in any cell.

    Examples
    --------
    >>> from discover_sc.data import simulate
    >>> adata = simulate(20, 10)
    >>> adata.X = adata.X.log1p()
    >>> check_counts(adata)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    ValueError: adata.X holds values that are not integers ...
    """
    check_finite(adata, layer)
    gene_totals = np.zeros(adata.n_vars)
    n_empty_cells = 0
    for block in _chunks(_matrix(adata, layer)):
        _check_count_values(_stored_values(block), layer)
        gene_totals += np.asarray(block.sum(axis=0)).ravel()
        n_empty_cells += int((np.asarray(block.sum(axis=1)).ravel() == 0).sum())
    if n_empty_cells:
        raise ValueError(
            f"{n_empty_cells} cells of {_source(layer)} are empty: all their counts are zero. "
            "Each cell needs at least one count. Remove them, for example with "
            "sc.pp.filter_cells(adata, min_counts=1)."
        )
    n_empty_genes = int((gene_totals == 0).sum())
    if n_empty_genes:
        warnings.warn(
            f"{n_empty_genes} genes of {_source(layer)} have zero counts in all cells. They are "
            "kept, cost time and teach nothing. To leave them out: "
            "sc.pp.filter_genes(adata, min_counts=1) before setup_anndata.",
            UserWarning,
            stacklevel=3,
        )


def _check_count_values(values: np.ndarray, layer: str | None) -> None:
    if values.size == 0:
        return
    if values.min() < 0:
        raise ValueError(
            f"{_source(layer)} holds negative values (smallest {values.min():g}); counts are "
            f"integers from 0. Name the layer with raw counts, or {_LOG_DATA_HINT}."
        )
    fraction = np.mod(values, 1) != 0
    if fraction.any():
        raise ValueError(
            f"{_source(layer)} holds values that are not integers (for example "
            f"{values[fraction].flat[0]:g}); counts are integers from 0. Name the layer with raw "
            f"counts (layer=...), or {_LOG_DATA_HINT}."
        )


def check_columns(adata: AnnData, **columns: str | list[str] | None) -> None:
    """Refuse columns that ``adata.obs`` lacks, by the name of the argument that named them."""
    for argument, names in columns.items():
        for name in [names] if isinstance(names, str) else (names or []):
            if name not in adata.obs:
                raise KeyError(
                    f"{argument}: {name!r} is not a column of adata.obs; columns are "
                    f"{list(adata.obs.columns)}. Choose one of them."
                )


def check_no_missing(adata: AnnData, **columns: str | list[str] | None) -> None:
    """Refuse missing values in columns of ``adata.obs``."""
    for argument, names in columns.items():
        for name in [names] if isinstance(names, str) else (names or []):
            n_missing = int(pd.isna(adata.obs[name]).sum())
            if n_missing:
                raise ValueError(
                    f"{argument}: adata.obs[{name!r}] is missing (NaN) for {n_missing} cells; "
                    "every cell needs a value. Remove those cells, for example with "
                    f"adata[adata.obs[{name!r}].notna()].copy(), or name the level."
                )


def check_names(adata: AnnData) -> None:
    """Refuse an empty selection, and names of cells that stand twice."""
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise ValueError(
            f"adata has {adata.n_obs} cells and {adata.n_vars} genes: the selection is empty. "
            "At least one of each is needed. Check the mask that made it."
        )
    for axis, names in (("obs_names", adata.obs_names), ("var_names", adata.var_names)):
        if not names.is_unique:
            twice = names[names.duplicated()][0]
            raise ValueError(
                f"adata.{axis} are not unique ({twice!r} is a duplicate); results are matched by "
                f"name, so each must stand once. Call adata.{axis}_make_unique() first."
            )


def check_finite_columns(adata: AnnData, **columns: str | list[str] | None) -> None:
    """Refuse continuous columns of ``adata.obs`` that are infinite or not numbers."""
    for argument, names in columns.items():
        for name in [names] if isinstance(names, str) else (names or []):
            values = pd.to_numeric(adata.obs[name], errors="coerce").to_numpy(dtype=float)
            if not np.isfinite(values).all():
                raise ValueError(
                    f"{argument}: adata.obs[{name!r}] holds values that are infinite or no "
                    "numbers; continuous values are finite numbers. Correct them, or pass the "
                    "column as categorical."
                )


def check_conditions(adata: AnnData, condition_keys: list[str]) -> None:
    """Refuse a condition key with a single level, or levels with too few cells to learn from."""
    for key in condition_keys:
        levels = adata.obs[key]
        counts = levels.value_counts()  # unused categories count as zero
        if len(counts) < 2:
            raise ValueError(
                f"adata.obs[{key!r}] has only one condition, {str(counts.index[0])!r}; at least "
                "two are needed to tell what a condition does. Add cells of another condition."
            )
        rare = counts[counts < _MIN_CELLS]
        if len(rare):
            raise ValueError(
                f"Conditions of adata.obs[{key!r}] with fewer than {_MIN_CELLS} cells: "
                f"{rare.to_dict()}. Each needs at least {_MIN_CELLS} cells. Remove these, merge "
                "the level with another, or drop an unused category with "
                f"adata.obs[{key!r}].cat.remove_unused_categories()."
            )


def check_doses(adata: AnnData, dose_key: str | None) -> None:
    """Refuse doses that are negative, and doses without untreated or without treated cells."""
    if dose_key is None:
        return
    doses = adata.obs[dose_key].to_numpy(dtype=float)
    if (doses < 0).any():
        raise ValueError(
            f"dose_key: adata.obs[{dose_key!r}] goes down to {doses.min():g}; doses are 0 or "
            "positive, on their natural scale (not logarithms). Correct them."
        )
    for missing, what in ((0 not in doses, "dose 0"), (not (doses > 0).any(), "a positive dose")):
        if missing:
            raise ValueError(
                f"dose_key: no cell of adata.obs[{dose_key!r}] has {what}; a response needs "
                "untreated cells, at dose 0, and treated ones. Add the control's cells with dose "
                "0, or leave dose_key out."
            )


def match_genes(adata: AnnData, genes: Sequence[str]) -> AnnData:
    """Return the data with the model's genes in the model's order; a copy if that changes it."""
    check_names(adata)
    missing = [gene for gene in genes if gene not in adata.var_names]
    if missing:
        raise ValueError(
            f"{len(missing)} genes of the model are missing in adata: {missing[:10]}"
            f"{' ...' if len(missing) > 10 else ''}. All {len(genes)} are needed. Use the genes "
            "the model was trained on."
        )
    same = len(genes) == adata.n_vars and all(adata.var_names == np.asarray(genes))
    if same:
        return adata
    matched = adata[:, list(genes)]
    return matched.to_memory() if adata.isbacked else matched.copy()


def total_count(adata: AnnData, layer: str | None) -> float:
    """Return the sum of all expression values."""
    return float(sum(block.sum() for block in _chunks(_matrix(adata, layer))))
