import numpy as np
import pytest
import scipy.sparse as sp
import scvi
import torch
from scvi.data import AnnTorchDataset
from scvi.dataloaders import AnnDataLoader

from discover_sc import DISCoVeR
from discover_sc._counts import SparseCells


def make_model(adata, x):
    data = adata.copy()
    data.X = x
    data.obs["depth"] = np.arange(data.n_obs) + 1.0
    data.obs["half"] = np.where(np.arange(data.n_obs) % 2, "a", "b")
    DISCoVeR.setup_anndata(
        data,
        condition_key="condition",
        size_factor_key="depth",
        categorical_covariate_keys=["half"],
        continuous_covariate_keys=["depth"],
    )
    return DISCoVeR(data)


def unordered(x):
    """The same matrix with each row's entries in reverse and one gene stored twice in the first."""
    rows = [np.arange(*x.indptr[k : k + 2])[::-1] for k in range(x.shape[0])]
    order = np.concatenate(rows)
    data, indices = x.data[order].copy(), x.indices[order]
    data, indices = np.insert(data, 0, 1.0), np.insert(indices, 0, indices[0])
    return sp.csr_matrix((data, indices, x.indptr + (np.arange(len(x.indptr)) > 0)), x.shape)


@pytest.mark.filterwarnings("ignore:Training will be faster when sparse matrix is formatted as CSR")
@pytest.mark.parametrize("sparse", [True, False], ids=["entries", "dense"])
@pytest.mark.parametrize(
    "kind", [sp.csr_matrix, sp.csc_matrix, sp.csr_array, unordered, sp.csr_matrix.toarray]
)
def test_minibatches_are_those_of_scvi_tools_in_the_same_order(adata, kind, sparse):
    model = make_model(adata, kind(adata.X))
    manager = model.adata_manager
    own = AnnDataLoader(manager, shuffle=True, batch_size=64, load_sparse_tensor=sparse)
    scvi.settings.seed = 3
    found = list(own)
    plain = torch.utils.data.DataLoader(
        AnnTorchDataset(manager), sampler=own.sampler, batch_size=None
    )
    scvi.settings.seed = 3
    expected = list(plain)
    assert len(found) == len(expected)
    for tensors, reference in zip(found, expected, strict=True):
        if isinstance(tensors["X"], SparseCells):
            assert sparse
            tensors["X"] = tensors["X"].dense()
        assert set(tensors) == set(reference)
        for key, tensor in tensors.items():
            assert tensor.dtype == reference[key].dtype
            assert torch.equal(tensor, reference[key]), key


def test_training_is_the_same_when_a_process_of_its_own_reads_ahead(adata):
    latents = []
    for datasplitter_kwargs in ({}, {"num_workers": 1}):
        scvi.settings.seed = 0
        model = make_model(adata, adata.X)
        model.train(max_epochs=2, accelerator="cpu", datasplitter_kwargs=datasplitter_kwargs)
        latents.append(model.get_latent_representation())
    np.testing.assert_array_equal(*latents)
