import numpy as np
import pytest
import scipy.sparse as sp
import torch
from fitting import QUIET, train_small
from scipy.optimize import minimize_scalar
from scipy.stats import nbinom

from discover_sc._dispersion import fit_dispersion


def means_of(model):
    """One posterior draw's means of the training cells, and their counts, in the same order."""
    module = model.module
    cells = np.sort(model.train_indices)
    with torch.no_grad():
        (tensors,) = model._make_data_loader(model.adata, indices=cells, batch_size=len(cells))
        outputs = module.inference(**module._get_inference_input(tensors))
        px = module.decode(outputs["z"], outputs["w"], outputs["library"], tensors)
    return model.adata.X[cells].toarray(), px.mu.numpy().astype(float)


def test_the_dispersion_is_the_one_that_a_search_gene_by_gene_finds(simulated):
    model = train_small(simulated[1], train={"max_epochs": 15})
    fit_dispersion(model)
    counts, means = means_of(model)
    fitted = np.exp(model.module.log_theta.detach().numpy()[0])
    for gene in np.argsort(-counts.mean(0))[:10]:
        x, mu = counts[:, gene], means[:, gene]

        def loss(log_theta, x=x, mu=mu):
            theta = np.exp(log_theta)
            return -nbinom.logpmf(x, theta, theta / (theta + mu)).sum()

        best = minimize_scalar(loss, bounds=(-5, 8), method="bounded")
        assert loss(np.log(fitted[gene])) - best.fun < 2.0  # the draws of z and w differ


def test_genes_that_answer_to_the_condition_are_not_left_overdispersed(trained, simulated):
    """Shared with the reconstruction from z alone, their theta ended far below the truth."""
    full = simulated[0]
    moved = np.abs(full.varm["common_effect"][:, 1]) > 1.0
    expressed = np.asarray(full.X.mean(0)).ravel() > 2
    theta = np.exp(trained.module.log_theta.detach().numpy()[0])
    median = [np.median(theta[expressed & side]) for side in (moved, ~moved)]
    assert median[0] > 0.6 * median[1]


@pytest.mark.parametrize(
    "options",
    [{"gene_likelihood": "zinb"}, {"gene_likelihood": "normal"}, {"dispersion": "gene-batch"}],
    ids=lambda options: next(iter(options.values())),
)
def test_the_fit_lowers_the_reconstruction_loss(adata, options):
    if "normal" in options.values():
        adata.X = adata.X.log1p()
    model = train_small(adata, {"batch_key": "batch"}, options, {"max_epochs": 20})

    def loss():
        torch.manual_seed(0)
        with torch.no_grad():
            cells = np.sort(model.train_indices)
            loader = model._make_data_loader(model.adata, indices=cells, batch_size=len(cells))
            return sum(float(model.module(t)[2].reconstruction_loss_sum) for t in loader)

    fitted, state = loss(), model.module.log_theta.detach().clone()
    assert state.abs().max() <= 9.0
    for shift in (-0.5, 0.5):
        model.module.log_theta.data = state + shift
        assert loss() > fitted


def test_the_fit_does_not_depend_on_where_it_starts(simulated):
    model, losses = train_small(simulated[1], train={"max_epochs": 15}), []
    counts, means = means_of(model)
    start = model.module.log_theta.detach().clone()
    for shift in (-2.0, 0.0, 2.0):
        model.module.log_theta.data = start + shift
        torch.manual_seed(0)
        fit_dispersion(model)
        theta = np.exp(model.module.log_theta.detach().numpy())
        losses.append(-nbinom.logpmf(counts, theta, theta / (theta + means)).sum(0))
    np.testing.assert_allclose(losses[0], losses[1], atol=0.5)
    np.testing.assert_allclose(losses[2], losses[1], atol=0.5)


def test_poisson_has_no_dispersion_to_fit(adata):
    model = train_small(adata, model={"gene_likelihood": "poisson"}, train={"max_epochs": 1})
    before = model.module.log_theta.detach().clone()
    fit_dispersion(model)
    assert torch.equal(before, model.module.log_theta)


def test_training_goes_on_from_the_fitted_dispersion(adata):
    model = train_small(adata, train={"max_epochs": 1})
    model.train(max_epochs=1, **QUIET)
    assert torch.isfinite(model.module.log_theta).all()
    assert sp.issparse(model.adata.X)
