"""A minibatch of expression as its non-zero entries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


class NonZero:
    """The non-zero entries of a minibatch, and sums over them.

    Parameters
    ----------
    x
        Expression of shape ``(n_cells, n_genes)``, dense or sparse CSR.

    Attributes
    ----------
    shape
        ``(n_cells, n_genes)``.
    values, cell, gene, flat
        Value, row, column and position in the flattened matrix of each entry, ``(n_entries,)``.
    """

    def __init__(self, x: Tensor) -> None:
        self.shape = x.shape
        n_genes = x.shape[1]
        if x.layout is torch.sparse_csr:
            self.values, self.gene = x.values(), x.col_indices().long()
            per_cell = x.crow_indices().diff()
            cells = torch.arange(len(per_cell), device=x.device)
            self.cell = torch.repeat_interleave(cells, per_cell, output_size=len(self.values))
            self.flat = self.cell * n_genes + self.gene
        else:
            self.flat = x.reshape(-1).nonzero().squeeze(1)
            self.cell = torch.div(self.flat, n_genes, rounding_mode="floor")
            self.gene = self.flat - self.cell * n_genes
            self.values = self.pick(x)

    def pick(self, dense: Tensor) -> Tensor:
        """Return the entries of ``(n_cells or 1, n_genes)`` values where x is not zero."""
        if dense.shape[0] == 1 and self.shape[0] > 1:
            return dense.reshape(-1).index_select(0, self.gene)
        return dense.reshape(-1).index_select(0, self.flat)

    def put(self, dense: Tensor, values: Tensor | float) -> Tensor:
        """Overwrite these entries of a contiguous ``(n_cells, n_genes)`` tensor; return it."""
        if isinstance(values, float):
            dense.view(-1).index_fill_(0, self.flat, values)
        else:
            dense.view(-1).scatter_(0, self.flat, values)
        return dense

    def sum_per_cell(self, values: Tensor) -> Tensor:
        """Return the sum of one value per entry over each cell, ``(n_cells,)``."""
        return values.new_zeros(self.shape[0]).scatter_add_(0, self.cell, values)

    def sum_per_gene(self, values: Tensor) -> Tensor:
        """Return the sum of one value per entry over each gene, ``(n_genes,)``."""
        return values.new_zeros(self.shape[1]).scatter_add_(0, self.gene, values)
