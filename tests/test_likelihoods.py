import math

import numpy as np
import pytest
import scipy.stats
import torch
from scvi.distributions import NegativeBinomial, Normal, Poisson, ZeroInflatedNegativeBinomial

from discover_sc._decoded import likelihood_of
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


def decoder_output(kind, mu):
    """Return the output and the log library that stand for these means."""
    return mu if kind == "normal" else mu.log(), mu.sum(-1, keepdim=True).log()


def draw_case(library, theta, n_theta=1):
    """Counts, half of them of silent genes, and the parameters of a likelihood; float64."""
    rng = np.random.default_rng(0)
    mu = library * rng.dirichlet(np.ones(N_GENES), N_CELLS)
    mu = np.where(rng.random(mu.shape) < 0.5, mu, np.minimum(mu, 0.3))
    thetas = theta * rng.lognormal(0.0, 0.3, (n_theta, N_GENES))
    x = rng.poisson(mu)
    zi_logits = rng.normal(size=mu.shape)
    return [torch.as_tensor(a, dtype=torch.float64) for a in (x, mu, thetas, zi_logits)]


def own_loss(kind, x, mu, theta, zi_logits):
    output, library = decoder_output(kind, mu)
    return reconstruction_losses(x, kind, [output], library, theta, zi_logits)[0]


def scvi_loss(kind, x, *parameters):
    return -make_likelihood(kind, *parameters).log_prob(x).sum(-1)


def loss_and_gradients(kind, case, loss_of, weight=1.0):
    x, *parameters = case
    parameters = [p.clone().requires_grad_() for p in parameters]
    loss = loss_of(kind, x, *parameters)
    gradients = torch.autograd.grad((weight * loss).sum(), parameters, allow_unused=True)
    return loss.detach(), [g for g in gradients if g is not None]


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
    x, mu, theta, zi_logits = (tensor.float() for tensor in draw_case(library, theta))
    leaves = [theta, *decoder_output(kind, mu), zi_logits]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    theta, output, library, zi_logits = leaves
    (loss,) = reconstruction_losses(x, kind, [output], library, theta, zi_logits)
    gradients = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    # the means that both see are those that single precision gives
    px = likelihood_of(kind, output, library, theta, zi_logits)
    mu, scale = (
        (px.rate if kind == "poisson" else px.mu).detach().double(),
        px.scale.detach().double(),
    )
    exact, exact_gradients = loss_and_gradients(
        kind, [t.detach().double() for t in (x, mu, theta, zi_logits)], scvi_loss
    )
    slope = mu * exact_gradients[0]
    to_output = slope - scale * slope.sum(-1, keepdim=True)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0.0)
    # the gradient to theta sums log(1 + u) - u / (1 + u), equal to first order in u = mu / theta
    u = mu / theta.detach().double()
    rounding = 1e-7 * float(torch.minimum(u, torch.ones_like(u)).sum(0).max())
    expected = {"output": to_output, "library": slope.sum(-1, keepdim=True)}
    if kind != "poisson":
        expected["theta"] = exact_gradients[1]
    if kind == "zinb":
        expected["zi_logits"] = exact_gradients[2]
    found = dict(zip(("theta", "output", "library", "zi_logits"), gradients, strict=True))
    for name, gradient in expected.items():
        atol = 1e-5 * float(gradient.detach().abs().max()) + (rounding if name == "theta" else 0.0)
        torch.testing.assert_close(found[name].double(), gradient, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("kind", ["nb", "zinb"])
def test_reconstruction_loss_is_finite_where_the_mean_vanishes_or_is_immense(kind):
    x = torch.tensor([[0.0, 1.0, 1e6, 0.0, 3.0, 1e6]])
    mu = torch.tensor([[0.0, 0.0, 0.0, 1e30, 1e30, 1e6]])
    zi_logits = torch.tensor([[-200.0, 80.0, 0.0, -200.0, -80.0, 0.0]])
    for theta in (1e-30, 1e-4, 1e4, 1e30):
        leaves = [torch.full((1, 6), theta), *decoder_output(kind, mu), zi_logits.clone()]
        theta, output, library, inflation = (leaf.requires_grad_() for leaf in leaves)
        (loss,) = reconstruction_losses(x, kind, [output], library, theta, inflation)
        assert torch.isfinite(loss).all()
        read = leaves if kind == "zinb" else leaves[:3]
        for gradient in torch.autograd.grad(loss.sum(), read):
            assert torch.isfinite(gradient).all(), theta


@pytest.mark.parametrize("kind", KINDS)
def test_cells_weigh_in_the_gradient_as_they_weigh_in_the_loss(kind):
    case = draw_case(1e3, 2.0)
    weight = torch.linspace(0.1, 2.0, N_CELLS, dtype=torch.float64)
    found, expected = (
        loss_and_gradients(kind, case, loss_of, weight)[1] for loss_of in (own_loss, scvi_loss)
    )
    torch.testing.assert_close(found, expected)


def test_negative_binomial_loss_by_hand():
    # theta = 1 is the geometric distribution: p(x) = 1 / (1 + mu) * (mu / (1 + mu))^x
    x, mu = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[1.0, 1.0, 3.0]])
    loss = own_loss("nb", x, mu, torch.ones(1, 3), None)
    expected = math.log(2) + 2 * math.log(2) - math.log(0.25 * 0.75**2)
    torch.testing.assert_close(loss, torch.tensor([expected]))


def test_zero_inflated_loss_by_hand():
    # pi = 1/2, theta = 1, mu = 1: p(0) = 1/2 + 1/2 * 1/2, p(2) = 1/2 * 1/8
    theta, zi_logits = torch.ones(1, 2), torch.zeros(1, 2)
    loss = own_loss("zinb", torch.tensor([[0.0, 2.0]]), torch.ones(1, 2), theta, zi_logits)
    torch.testing.assert_close(loss, torch.tensor([-math.log(0.75) - math.log(1 / 16)]))


def test_negative_binomial_loss_equals_a_plain_loop_over_lgamma():
    x, mu, theta, _ = draw_case(1e3, 2.0)
    loss = own_loss("nb", x, mu, theta, None)
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
    full, library = decoder_output(kind, mu)
    shared, _ = decoder_output(kind, mu.flip(1))
    theta.requires_grad_(), zi_logits.requires_grad_()
    told = (library, theta, zi_logits)
    weights = torch.linspace(0.1, 2.0, 2 * N_CELLS, dtype=torch.float64).view(2, N_CELLS)

    def gradients(loss):
        if not loss.requires_grad:  # Poisson's shares neither
            return None, None
        return torch.autograd.grad(loss, (theta, zi_logits), allow_unused=True)

    both = reconstruction_losses(x, kind, [full, shared], *told)
    sums = gradients((weights * both).sum())
    for loss, output, weight in zip(both, (full, shared), weights, strict=True):
        (alone,) = reconstruction_losses(x, kind, [output], *told)
        torch.testing.assert_close(loss, alone)
        own = gradients((weight * alone).sum())
        sums = [s if s is None else s - g for s, g in zip(sums, own, strict=True)]
    assert not torch.allclose(*both)
    for left in sums:  # each output's share of the gradients was taken off
        assert left is None or left.abs().max() < 1e-9


@pytest.mark.parametrize("kind", ["nb", "zinb"])
def test_the_loss_gives_the_gradient_to_theta_alone(kind):
    """The means may be given: the dispersion is fitted afterwards."""
    x, mu, theta, zi_logits = draw_case(1e3, 2.0)
    _, gradients = loss_and_gradients(kind, (x, mu, theta, zi_logits), own_loss)
    theta.requires_grad_()
    own_loss(kind, x, mu, theta, zi_logits).sum().backward()
    torch.testing.assert_close(theta.grad, gradients[1])


def test_reconstruction_loss_of_cells_without_counts_by_hand():
    # log NB(0) = theta * log(theta / (theta + mu)), log Poisson(0) = -mu
    mu, theta = torch.tensor([[1.0, 3.0], [2.0, 0.5]]), torch.tensor([[1.0, 2.0]])
    x = torch.zeros(2, 2)
    loss = own_loss("nb", x, mu, theta, None)
    torch.testing.assert_close(loss, (theta * torch.log((theta + mu) / theta)).sum(-1))
    loss = own_loss("poisson", x, mu, theta, None)
    torch.testing.assert_close(loss, torch.tensor([4.0, 2.5]))


@pytest.mark.parametrize("kind", ["nb", "zinb"])
def test_a_second_backward_pass_is_refused(kind):
    """The first one works in the memory of what was kept for it."""
    x, mu, theta, zi_logits = draw_case(1e3, 2.0)
    loss = own_loss(kind, x, mu.requires_grad_(), theta.requires_grad_(), zi_logits).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_permuted_cells_have_permuted_reconstruction_losses(kind):
    x, mu, theta, zi_logits = draw_case(1e3, 2.0, n_theta=N_CELLS)
    loss = own_loss(kind, x, mu, theta, zi_logits)
    order = torch.randperm(N_CELLS, generator=torch.Generator().manual_seed(0))
    permuted = (tensor[order] for tensor in (x, mu, theta, zi_logits))
    torch.testing.assert_close(own_loss(kind, *permuted), loss[order])


@pytest.mark.parametrize("kind", ["nb", "zinb", "poisson"])
def test_mixed_precision_does_not_round_the_loss_nor_its_gradients(kind):
    case = [tensor.float() for tensor in draw_case(1e3, 2.0)]
    expected = loss_and_gradients(kind, case, own_loss)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss_and_gradients(kind, case, own_loss)
    torch.testing.assert_close(found, expected)
