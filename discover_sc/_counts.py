"""A minibatch of expression as its non-zero entries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix
    from torch import Tensor


class NonZero:
    """The non-zero entries of a minibatch, and sums over them.

    Parameters
    ----------
    values, cell, gene
        Value, row and column of each entry, ``(n_entries,)``, in the order of the rows.
    shape
        ``(n_cells, n_genes)``.
    """

    def __init__(self, values: Tensor, cell: Tensor, gene: Tensor, shape: tuple[int, int]) -> None:
        self.values, self.cell, self.gene, self.shape = values, cell, gene, tuple(shape)
        self.flat = cell * shape[1] + gene

    @classmethod
    def of(cls, x: Tensor | NonZero) -> NonZero:
        """Return the non-zero entries of ``(n_cells, n_genes)`` expression."""
        if isinstance(x, NonZero):
            return x
        flat = x.reshape(-1).nonzero().squeeze(1)
        cell = torch.div(flat, x.shape[1], rounding_mode="floor")
        return cls(x.reshape(-1).index_select(0, flat), cell, flat - cell * x.shape[1], x.shape)

    @classmethod
    def of_csr(cls, matrix: csr_matrix) -> NonZero:
        """Return the entries of a sparse matrix without duplicates, in single precision."""
        cell = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
        arrays = (matrix.data.astype(np.float32), cell, matrix.indices.astype(np.int64))
        return cls(*map(torch.from_numpy, arrays), matrix.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def to(self, device: torch.device, non_blocking: bool = False) -> NonZero:
        """Return the same entries on a device."""
        if self.values.device == device:
            return self
        tensors = (self.values, self.cell, self.gene)
        moved = (t.to(device, non_blocking=non_blocking) for t in tensors)
        return NonZero(*moved, self.shape)

    def pin_memory(self) -> NonZero:
        """Return the same entries in page-locked memory."""
        tensors = (self.values, self.cell, self.gene)
        return NonZero(*(t.pin_memory() for t in tensors), self.shape)

    def dense(self, values: Tensor | None = None) -> Tensor:
        """Return the entries, or other values in their places, as ``(n_cells, n_genes)``."""
        values = self.values if values is None else values
        return self.put(values.new_zeros(self.shape), values)

    def pick(self, dense: Tensor) -> Tensor:
        """Return the entries of ``(n_cells or 1, n_genes)`` values where x is not zero."""
        if dense.shape[0] == 1 and self.shape[0] > 1:
            return dense.reshape(-1).index_select(0, self.gene)
        return dense.reshape(-1).index_select(0, self.flat)

    def put(self, dense: Tensor, values: Tensor | float) -> Tensor:
        """Overwrite these entries of a contiguous ``(n_cells, n_genes)`` tensor; return it."""
        dense.view(-1).scatter_(0, self.flat, values)
        return dense

    def sum_per_cell(self, values: Tensor) -> Tensor:
        """Return the sum of one value per entry over each cell, ``(n_cells,)``."""
        return values.new_zeros(self.shape[0]).scatter_add_(0, self.cell, values)

    def sum_per_gene(self, values: Tensor) -> Tensor:
        """Return the sum of one value per entry over each gene, ``(n_genes,)``."""
        return values.new_zeros(self.shape[1]).scatter_add_(0, self.gene, values)
