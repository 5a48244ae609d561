import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from discover_sc._counts import NonZero, SparseCells

N_CELLS, N_GENES = 7, 11


def make_counts(density=0.3):
    generator = torch.Generator().manual_seed(0)
    x = torch.poisson(torch.full((N_CELLS, N_GENES), 2.0), generator=generator)
    x *= torch.rand(N_CELLS, N_GENES, generator=generator) < density
    x[2] = 0.0  # a cell and a gene without counts
    x[:, 4] = 0.0
    return x


def make_cells(x):
    return SparseCells.of_csr(csr_matrix(x.numpy()))


@pytest.mark.parametrize("kind", [NonZero.of, make_cells], ids=["of dense", "of CSR"])
def test_entries_are_those_of_the_dense_matrix(kind):
    x = make_counts()
    entries = kind(x)
    assert len(entries.values) == int((x > 0).sum())
    assert torch.equal(entries.dense(), x)
    assert torch.equal(entries.sum_per_cell(entries.values), x.sum(1))
    y = torch.arange(float(N_CELLS * N_GENES)).reshape(N_CELLS, N_GENES)
    assert torch.equal(entries.pick(y), y[x > 0])
    assert torch.equal(entries.pick(y[:1]), y[:1].expand_as(x)[x > 0])
    assert torch.equal(entries.put(y.clone(), entries.values), torch.where(x > 0, x, y))


@pytest.mark.parametrize("kind", [NonZero.of, make_cells], ids=["of dense", "of CSR"])
def test_a_stack_of_matrices_is_read_and_written_one_by_one(kind):
    x = make_counts()
    entries, stack = kind(x), torch.randn(3, N_CELLS, N_GENES)
    picked = torch.stack([entries.pick(y) for y in stack])
    assert torch.equal(entries.pick(stack), picked)
    filled = entries.put(stack.clone(), torch.zeros_like(picked))
    assert torch.equal(filled, torch.where(x > 0, 0.0, stack))
    assert torch.equal(entries.put(filled, picked), stack)


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "transposed"])
def test_sparse_products_and_their_gradients_are_the_dense_ones(contiguous):
    x = make_counts()
    weight, bias = torch.randn(5, N_GENES), torch.randn(5)
    weight = weight if contiguous else weight.t().contiguous().t()
    gradients = []
    for product in (make_cells(x).log1p().linear, lambda w, b: x.log1p() @ w.T + b):
        leaves = [t.clone().requires_grad_() for t in (weight, bias)]
        out = product(*leaves)
        gradients.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    for own, dense in zip(*gradients, strict=True):
        torch.testing.assert_close(own, dense)


def test_cells_move_to_a_device_whole():
    cells = make_cells(make_counts())
    assert cells.to(torch.device("cpu")) is cells
    moved = cells.to(torch.device("meta"))
    assert {t.device.type for t in (*moved.by_cell, *moved.by_gene)} == {"meta"}
    assert moved.shape == cells.shape


def test_cells_that_were_copied_on_the_cpu_are_still_read():
    """Page-locked memory is a copy on the CPU, without the matrix that the cells came from."""
    x = make_counts()
    copied = make_cells(x)._each(torch.clone).log1p()
    assert torch.equal(copied.dense(), x.log1p())
    weight = torch.randn(5, N_GENES, requires_grad=True)
    copied.linear(weight, torch.zeros(5)).sum().backward()
    torch.testing.assert_close(weight.grad, x.log1p().sum(0).expand(5, -1))


def test_values_of_other_types_become_single_precision():
    matrix = csr_matrix(np.array([[0, 3], [1, 0]], dtype=np.int64))
    assert SparseCells.of_csr(matrix).values.dtype == torch.float32
