"""A minibatch of expression as its non-zero entries, and what is computed on these alone."""

from __future__ import annotations

from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

if TYPE_CHECKING:
    from collections.abc import Callable

    from scipy.sparse import csc_matrix, csr_matrix
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

    @cached_property
    def flat(self) -> Tensor:
        """Position of each entry in the flattened matrix, ``(n_entries,)``."""
        return self.cell * self.shape[1] + self.gene

    @classmethod
    def of(cls, x: Tensor | NonZero) -> NonZero:
        """Return the non-zero entries of ``(n_cells, n_genes)`` expression."""
        if isinstance(x, NonZero):
            return x
        flat = x.reshape(-1).nonzero().squeeze(1)
        cell = torch.div(flat, x.shape[1], rounding_mode="floor")
        return cls(x.reshape(-1).index_select(0, flat), cell, flat - cell * x.shape[1], x.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def dense(self, values: Tensor | None = None) -> Tensor:
        """Return the entries, or other values in their places, as ``(n_cells, n_genes)``."""
        values = self.values if values is None else values
        return self.put(values.new_zeros(self.shape), values)

    def sum_per_cell(self, values: Tensor) -> Tensor:
        """Return the sum of one value per entry over each cell, ``(n_cells,)``."""
        return values.new_zeros(self.shape[0]).scatter_add_(0, self.cell, values)

    # what follows also takes a stack of matrices, (..., n_cells, n_genes), and of their entries

    def pick(self, dense: Tensor) -> Tensor:
        """Return the entries of ``(n_cells or 1, n_genes)`` values where x is not zero."""
        if dense.ndim > 2:
            flat = dense.flatten(-2)
            return flat.gather(-1, self.flat.expand(*flat.shape[:-1], -1))
        if dense.shape[0] == 1 and self.shape[0] > 1:
            return dense.reshape(-1).index_select(0, self.gene)
        return dense.reshape(-1).index_select(0, self.flat)

    def put(self, dense: Tensor, values: Tensor) -> Tensor:
        """Overwrite these entries of a contiguous ``(n_cells, n_genes)`` tensor; return it."""
        flat = dense.view(*dense.shape[:-2], -1)
        flat.scatter_(-1, self.flat.expand(values.shape), values)
        return dense


class SparseCells(NonZero):
    """A minibatch of sparse data: its entries in the order of the cells and in that of the genes.

    Parameters
    ----------
    by_cell
        Values, genes, and where each cell begins: as CSR.
    shape
        ``(n_cells, n_genes)``.
    by_gene
        Values, cells, and where each gene begins: as CSC; None: sorted when first needed.
    csr
        The matrix that is sorted then; not read if ``by_gene`` is given.
    """

    def __init__(
        self,
        by_cell: tuple[Tensor, Tensor, Tensor],
        shape: tuple[int, int],
        by_gene: tuple[Tensor, Tensor, Tensor] | None = None,
        csr: csr_matrix | None = None,
    ) -> None:
        self.by_cell, self.shape, self._csr = by_cell, tuple(shape), csr
        self.values, self.gene, _ = by_cell
        if by_gene is not None:
            self.by_gene = by_gene

    @cached_property
    def cell(self) -> Tensor:
        """Row of each entry, ``(n_entries,)``."""
        cells = torch.arange(len(self), device=self.values.device)
        per_cell = self.by_cell[2].diff()
        return torch.repeat_interleave(cells, per_cell, output_size=len(self.values))

    def sum_per_cell(self, values: Tensor) -> Tensor:
        """Return the sum of one value per entry over each cell, ``(n_cells,)``."""
        return torch.segment_reduce(values, "sum", offsets=self.by_cell[2])

    @cached_property
    def by_gene(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values, cells, and where each gene begins; what gradients of products read."""
        return _as_tensors(self._csr.tocsc())

    @classmethod
    def of_csr(cls, matrix: csr_matrix) -> SparseCells:
        """Return the entries of a sparse matrix without duplicates, in single precision."""
        return cls(_as_tensors(matrix), matrix.shape, csr=matrix)

    def _each(self, function: Callable[[Tensor], Tensor]) -> SparseCells:
        by_cell, by_gene = (tuple(map(function, o)) for o in (self.by_cell, self.by_gene))
        return SparseCells(by_cell, self.shape, by_gene)

    def to(self, device: torch.device, non_blocking: bool = False) -> SparseCells:
        """Return the same cells on a device, sorted in both orders before they leave the CPU."""
        if self.values.device == torch.device(device):
            return self
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> SparseCells:
        """Return the same cells in page-locked memory."""
        return self._each(torch.Tensor.pin_memory)

    def log1p(self) -> SparseCells:
        """Return log(1 + x), which is zero where x is."""
        if self._csr is not None:
            same_places = copy(self._csr)  # shallow
            same_places.data = torch.log1p(self.values).numpy()
            return SparseCells.of_csr(same_places)
        by_cell, by_gene = (
            (torch.log1p(values), *places) for values, *places in (self.by_cell, self.by_gene)
        )
        return SparseCells(by_cell, self.shape, by_gene)

    def linear(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias``, of shape ``(n_cells, n_output)``.

        Parameters
        ----------
        weight
            Shape ``(n_output, n_genes)``; fastest if its transpose is contiguous.
        bias
            Shape ``(n_output,)``.
        """
        if torch.is_grad_enabled():
            return _SparseProduct.apply(weight, self) + bias
        return _weighted_sums(weight.t(), self.by_cell) + bias


def _as_tensors(matrix: csr_matrix | csc_matrix) -> tuple[Tensor, Tensor, Tensor]:
    # products read half as many bytes in 32 bits as in 64; a minibatch has fewer entries than 2^31
    parts = ((matrix.data, np.float32), (matrix.indices, np.int32), (matrix.indptr, np.int32))
    return tuple(torch.from_numpy(array.astype(dtype, copy=False)) for array, dtype in parts)


def _weighted_sums(rows: Tensor, order: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return for each group of entries the sum of the rows they point at, times their values."""
    values, index, start = order
    return F.embedding_bag(
        index,
        rows.contiguous(),
        start,
        mode="sum",
        per_sample_weights=values.to(rows.dtype),
        include_last_offset=True,
    )


class _SparseProduct(Function):
    """``x @ weight.T`` at the price of the non-zero entries, forward and backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, weight: Tensor, x: SparseCells) -> Tensor:
        ctx.by_gene = x.by_gene
        return _weighted_sums(weight.t(), x.by_cell)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return _weighted_sums(grad, ctx.by_gene).t(), None
