"""Minibatches gathered from data in memory without work per cell or per column."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.sparse import csc_array, csc_matrix, csr_array, csr_matrix
from scvi.data import AnnDataManager, AnnTorchDataset
from torch.utils.data import Subset

from ._counts import SparseCells

if TYPE_CHECKING:
    from collections.abc import Sequence


class CellDataset(AnnTorchDataset):
    """Cells of an AnnData, in the minibatches of scvi-tools' loader: same cells, same values.

    What lies in memory is gathered directly; backed files go scvi-tools' own way, arriving dense.

    Parameters
    ----------
    adata_manager, getitem_tensors
        As for :class:`scvi.data.AnnTorchDataset`.
    load_sparse_tensor
        Hand over sparse expression as its non-zero entries,
        :class:`~discover_sc._counts.SparseCells`.
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        getitem_tensors: list | dict[str, type] | None = None,
        load_sparse_tensor: bool = False,
    ) -> None:
        super().__init__(adata_manager, getitem_tensors=getitem_tensors)
        self._as_entries = load_sparse_tensor
        in_memory = (np.ndarray, pd.DataFrame, csr_matrix, csr_array, csc_matrix, csc_array)
        fields = [] if adata_manager.adata.isbacked else self.data.values()
        self._direct = bool(fields) and all(isinstance(f, in_memory) for f in fields)
        self._columns = self._as_arrays() if self._direct else {}

    def _as_arrays(self) -> dict[str, np.ndarray]:
        """Return every dense field as one array of the type in which it is handed over."""
        return {
            key: np.asarray(self.data[key]).astype(dtype, copy=False)
            for key, dtype in self.keys_and_dtypes.items()
            if isinstance(self.data[key], np.ndarray | pd.DataFrame)
        }

    def __getitem__(self, indexes: int | list[int] | slice) -> dict[str, np.ndarray | SparseCells]:
        """Return the fields of some cells, each of shape ``(n_cells, ...)``."""
        if not self._direct:
            return super().__getitem__(indexes)
        indexes = [indexes] if isinstance(indexes, int) else indexes
        fields = {}
        for key in self.keys_and_dtypes:
            if key in self._columns:
                fields[key] = self._columns[key][indexes]
            else:
                fields[key] = self._expression(self.data[key][indexes])
        return fields

    def _expression(self, rows: csr_matrix | csc_matrix) -> np.ndarray | SparseCells:
        rows = rows.tocsr()
        rows.sum_duplicates()
        if self._as_entries:
            return SparseCells.of_csr(rows)
        return rows.astype(np.float32, copy=False).toarray()


class CellManager(AnnDataManager):
    """scvi-tools' manager, handing out :class:`CellDataset`."""

    def create_torch_dataset(
        self,
        indices: Sequence[int] | Sequence[bool] | None = None,
        data_and_attributes: list[str] | dict[str, type] | None = None,
        load_sparse_tensor: bool = False,
    ) -> CellDataset | Subset:
        """Return the cells, or those at ``indices``; see :class:`scvi.data.AnnDataManager`."""
        dataset = CellDataset(self, data_and_attributes, load_sparse_tensor)
        return dataset if indices is None else Subset(dataset, indices)
