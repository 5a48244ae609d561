import math

import numpy as np
import pytest
import scipy.stats
import torch
from scvi.distributions import NegativeBinomial, Normal, Poisson, ZeroInflatedNegativeBinomial

from discover_sc._likelihoods import reconstruction_losses

KINDS = ("nb", "zinb", "poisson", "normal")
N_CELLS, N_GENES = 12, 60


def make_likelihood(kind, mu, theta, zi_logits):
    if kind == "nb":
        return NegativeBinomial(mu=mu, theta=theta)
    if kind == "zinb":
        return ZeroInflatedNegativeBinomial(mu=mu, theta=theta, zi_logits=zi_logits)
    if kind == "poisson":
        return Poisson(rate=mu)
    return Normal(mu, torch.rsqrt(theta).expand_as(mu), normal_mu=mu)


def draw_case(library, theta, n_theta=1):
    """Counts, half of them of silent genes, and the parameters of a likelihood; float64."""
    rng = np.random.default_rng(0)
    mu = library * rng.dirichlet(np.ones(N_GENES), N_CELLS)
    mu = np.where(rng.random(mu.shape) < 0.5, mu, np.minimum(mu, 0.3))
    thetas = theta * rng.lognormal(0.0, 0.3, (n_theta, N_GENES))
    x = rng.poisson(mu)
    zi_logits = rng.normal(size=mu.shape)
    return [torch.as_tensor(a, dtype=torch.float64) for a in (x, mu, thetas, zi_logits)]


def loss_and_gradients(kind, case, loss_of):
    x, *parameters = case
    parameters = [p.clone().requires_grad_() for p in parameters]
    px = make_likelihood(kind, *parameters)
    loss = loss_of(x, px, parameters[1])
    gradients = torch.autograd.grad(loss.sum(), parameters, allow_unused=True)
    return loss.detach(), [g for g in gradients if g is not None]


def own_loss(x, px, theta):
    return reconstruction_losses(x, [px], theta)[0]


def scvi_loss(x, px, theta):
    return -px.log_prob(x).sum(-1)


@pytest.mark.parametrize("n_theta", [1, N_CELLS], ids=["theta per gene", "theta per cell and gene"])
@pytest.mark.parametrize("theta", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("library", [10.0, 1e3, 1e6])
@pytest.mark.parametrize("kind", KINDS)
def test_reconstruction_loss_and_its_gradients_are_those_of_scvi(kind, library, theta, n_theta):
    case = draw_case(library, theta, n_theta)
    loss, gradients = loss_and_gradients(kind, case, own_loss)
    expected_loss, expected_gradients = loss_and_gradients(kind, case, scvi_loss)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0.0)
    assert len(gradients) == len(expected_gradients)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        # a gradient is a difference of terms that nearly cancel: judge it on its own scale
        atol = 1e-6 * float(expected.abs().max())
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("theta", [1e-4, 1e-2, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("library", [10.0, 1e3, 1e5, 1e7])
@pytest.mark.parametrize("kind", ["nb", "zinb", "poisson"])
def test_reconstruction_loss_in_single_precision_is_that_of_scvi_in_double(kind, library, theta):
    """Its terms cancel, x log(mu) against (x + theta) log(theta + mu): digits are easily lost."""
    single = [tensor.float() for tensor in draw_case(library, theta)]
    exact, exact_gradients = loss_and_gradients(kind, [t.double() for t in single], scvi_loss)
    loss, gradients = loss_and_gradients(kind, single, own_loss)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0.0)
    # the gradient to theta sums log(1 + u) - u / (1 + u), equal to first order in u = mu / theta
    u = (single[1] / single[2]).double()
    rounding = 1e-7 * float(torch.minimum(u, torch.ones_like(u)).sum(0).max())
    for gradient, expected in zip(gradients, exact_gradients, strict=True):
        atol = 1e-5 * float(expected.abs().max())
        atol += rounding if gradient.shape == single[2].shape else 0.0
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("kind", ["nb", "zinb"])
def test_reconstruction_loss_is_finite_where_the_mean_vanishes_or_is_immense(kind):
    x = torch.tensor([[0.0, 1.0, 1e6, 0.0, 3.0, 1e6]])
    mu = torch.tensor([[0.0, 0.0, 0.0, 1e30, 1e30, 1e6]])
    zi_logits = torch.tensor([[-80.0, 80.0, 0.0, 80.0, -80.0, 0.0]])
    for theta in (1e-30, 1e-4, 1e4, 1e30):
        case = (x, mu, torch.full((1, 6), theta), zi_logits)
        loss, gradients = loss_and_gradients(kind, case, own_loss)
        assert torch.isfinite(loss).all()
        assert all(torch.isfinite(g).all() for g in gradients), theta


@pytest.mark.parametrize("kind", KINDS)
def test_cells_weigh_in_the_gradient_as_they_weigh_in_the_loss(kind):
    x, *parameters = draw_case(1e3, 2.0)
    weight = torch.linspace(0.1, 2.0, N_CELLS, dtype=torch.float64)
    gradients = []
    for loss_of in (own_loss, scvi_loss):
        leaves = [p.clone().requires_grad_() for p in parameters]
        loss = loss_of(x, make_likelihood(kind, *leaves), leaves[1])
        found = torch.autograd.grad((weight * loss).sum(), leaves, allow_unused=True)
        gradients.append([g for g in found if g is not None])
    torch.testing.assert_close(*gradients)


def test_negative_binomial_loss_by_hand():
    # theta = 1 is the geometric distribution: p(x) = 1 / (1 + mu) * (mu / (1 + mu))^x
    px = NegativeBinomial(mu=torch.tensor([[1.0, 1.0, 3.0]]), theta=torch.ones(1, 3))
    (loss,) = reconstruction_losses(torch.tensor([[0.0, 1.0, 2.0]]), [px], torch.ones(1, 3))
    expected = math.log(2) + 2 * math.log(2) - math.log(0.25 * 0.75**2)
    torch.testing.assert_close(loss, torch.tensor([expected]))


def test_zero_inflated_loss_by_hand():
    # pi = 1/2, theta = 1, mu = 1: p(0) = 1/2 + 1/2 * 1/2, p(2) = 1/2 * 1/8
    theta, zi_logits = torch.ones(1, 2), torch.zeros(1, 2)
    px = ZeroInflatedNegativeBinomial(mu=torch.ones(1, 2), theta=theta, zi_logits=zi_logits)
    (loss,) = reconstruction_losses(torch.tensor([[0.0, 2.0]]), [px], theta)
    torch.testing.assert_close(loss, torch.tensor([-math.log(0.75) - math.log(1 / 16)]))


def test_negative_binomial_loss_equals_a_plain_loop_over_lgamma():
    x, mu, theta, _ = draw_case(1e3, 2.0)
    (loss,) = reconstruction_losses(x, [NegativeBinomial(mu=mu, theta=theta)], theta)
    for i in range(N_CELLS):
        log_p = 0.0
        for g in range(N_GENES):
            k, m, t = x[i, g].item(), mu[i, g].item(), theta[0, g].item()
            log_p += math.lgamma(k + t) - math.lgamma(t) - math.lgamma(k + 1)
            log_p += t * math.log(t / (t + m)) + k * math.log(m / (t + m))
        assert loss[i].item() == pytest.approx(-log_p, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_reconstruction_loss_is_that_of_scipy(kind):
    case = draw_case(1e3, 2.0)
    x, mu, theta, zi_logits = (tensor.numpy() for tensor in case)
    negative_binomial = scipy.stats.nbinom(theta, theta / (theta + mu))
    pi = 1 / (1 + np.exp(-zi_logits))
    log_p = {
        "nb": negative_binomial.logpmf(x),
        "zinb": np.log(pi * (x == 0) + (1 - pi) * negative_binomial.pmf(x)),
        "poisson": scipy.stats.poisson(mu).logpmf(x),
        "normal": scipy.stats.norm(mu, theta**-0.5).logpdf(x),
    }[kind]
    loss, _ = loss_and_gradients(kind, case, own_loss)
    np.testing.assert_allclose(loss, -log_p.sum(axis=1), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_reconstruction_losses_of_two_likelihoods_are_those_of_each_alone(kind):
    x, mu, theta, zi_logits = draw_case(1e3, 2.0)
    full = make_likelihood(kind, mu, theta, zi_logits)
    shared = make_likelihood(kind, mu.flip(1), theta, -zi_logits)
    both = reconstruction_losses(x, [full, shared], theta)
    for loss, px in zip(both, (full, shared), strict=True):
        torch.testing.assert_close(loss, own_loss(x, px, theta))
    assert not torch.allclose(*both)


def test_reconstruction_loss_of_cells_without_counts_by_hand():
    # log NB(0) = theta * log(theta / (theta + mu)), log Poisson(0) = -mu
    mu, theta = torch.tensor([[1.0, 3.0], [2.0, 0.5]]), torch.tensor([[1.0, 2.0]])
    x = torch.zeros(2, 2)
    (loss,) = reconstruction_losses(x, [NegativeBinomial(mu=mu, theta=theta)], theta)
    torch.testing.assert_close(loss, (theta * torch.log((theta + mu) / theta)).sum(-1))
    (loss,) = reconstruction_losses(x, [Poisson(rate=mu)], theta)
    torch.testing.assert_close(loss, torch.tensor([4.0, 2.5]))


@pytest.mark.parametrize("kind", KINDS)
def test_permuted_cells_have_permuted_reconstruction_losses(kind):
    x, mu, theta, zi_logits = draw_case(1e3, 2.0, n_theta=N_CELLS)
    loss = own_loss(x, make_likelihood(kind, mu, theta, zi_logits), theta)
    order = torch.randperm(N_CELLS, generator=torch.Generator().manual_seed(0))
    permuted = make_likelihood(kind, mu[order], theta[order], zi_logits[order])
    torch.testing.assert_close(own_loss(x[order], permuted, theta[order]), loss[order])


@pytest.mark.parametrize("kind", ["nb", "zinb", "poisson"])
def test_mixed_precision_does_not_round_the_loss_nor_its_gradients(kind):
    case = [tensor.float() for tensor in draw_case(1e3, 2.0)]
    expected = loss_and_gradients(kind, case, own_loss)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss_and_gradients(kind, case, own_loss)
    torch.testing.assert_close(found, expected)
