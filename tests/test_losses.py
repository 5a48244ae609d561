import math

import numpy as np
import pytest
import scipy.stats
import torch
from scvi.distributions import NegativeBinomial, Normal, Poisson, ZeroInflatedNegativeBinomial
from torch.distributions import kl_divergence

from discover_sc._losses import (
    adversarial_loss,
    adversary_cross_entropy,
    adversary_entropy,
    kl_to_standard_normal,
    kl_to_unit_normal,
    reconstruction_losses,
)

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


@pytest.mark.parametrize("theta", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("library", [10.0, 1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("kind", KINDS)
def test_reconstruction_loss_in_single_precision_is_as_exact_as_scvi(kind, library, theta):
    """Both are judged by double precision; x log(mu) and (x + theta) log(theta + mu) cancel."""
    case = draw_case(library, theta)
    exact, _ = loss_and_gradients(kind, case, scvi_loss)
    single = [tensor.float() for tensor in case]
    own, scvi = (loss_and_gradients(kind, single, f)[0].double() for f in (own_loss, scvi_loss))
    allowed = torch.maximum(3 * (scvi - exact).abs().max(), 1e-4 * exact.abs())
    assert ((own - exact).abs() <= allowed).all(), (own - exact).abs() / exact


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


# -------------------------------------------------------------------------- divergences


def test_kl_to_standard_normal_by_hand():
    q = torch.distributions.Normal(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 2.0]]))
    expected = torch.tensor([0.5 + (1.5 - math.log(2.0))])  # one term per latent dimension
    torch.testing.assert_close(kl_to_standard_normal(q), expected)


def test_kl_to_unit_normal_by_hand():
    # q is as wide as the prior and 3 away from its mean: 3^2 / 2
    q = torch.distributions.Normal(torch.tensor([[1.0]]), torch.tensor([[1.0]]))
    torch.testing.assert_close(kl_to_unit_normal(q, torch.tensor([[4.0]])), torch.tensor([4.5]))


def test_kl_divergences_are_those_of_torch():
    generator = torch.Generator().manual_seed(0)
    loc, mean = torch.randn(2, 20, 5, generator=generator)
    q = torch.distributions.Normal(loc, torch.rand(20, 5, generator=generator) + 0.05)
    prior = torch.distributions.Normal(mean, torch.ones_like(mean))
    standard = torch.distributions.Normal(torch.zeros(20, 5), torch.ones(20, 5))
    torch.testing.assert_close(kl_to_unit_normal(q, mean), kl_divergence(q, prior).sum(-1))
    torch.testing.assert_close(kl_to_standard_normal(q), kl_divergence(q, standard).sum(-1))


def test_kl_is_zero_where_posterior_equals_prior():
    mean = torch.tensor([[0.3, -2.0]])
    q = torch.distributions.Normal(mean, torch.ones(1, 2))
    torch.testing.assert_close(kl_to_unit_normal(q, mean), torch.zeros(1))
    assert kl_to_standard_normal(q).item() > 0


# ----------------------------------------------------------------------------- the game


def softmax_rows(logits):
    exponentials = [[math.exp(v) for v in row] for row in logits.tolist()]
    return [[e / sum(row) for e in row] for row in exponentials]


def test_adversary_cross_entropy_equals_a_plain_loop():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    truth = torch.tensor([0, 3, 1, 1, 2, 0])
    predictions = softmax_rows(logits)
    expected = [-math.log(row[y]) for row, y in zip(predictions, truth.tolist(), strict=True)]
    torch.testing.assert_close(adversary_cross_entropy(logits, truth), torch.tensor(expected))


def test_adversary_entropy_equals_a_plain_loop():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    expected = [-sum(p * math.log(p) for p in row) for row in softmax_rows(logits)]
    torch.testing.assert_close(adversary_entropy(logits), torch.tensor(expected))


def test_adversary_entropy_is_log_n_where_it_guesses_and_zero_where_it_is_certain():
    logits = torch.tensor([[5.0, 5.0, 5.0], [500.0, 0.0, 0.0]])
    torch.testing.assert_close(adversary_entropy(logits), torch.tensor([math.log(3), 0.0]))


@pytest.mark.parametrize("n_targets", [1, 5], ids=["one target", "target per cell"])
def test_adversarial_loss_equals_a_plain_loop(n_targets):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, generator=generator)
    target = torch.softmax(torch.randn(n_targets, 3, generator=generator), -1)
    expected = []
    for i, prediction in enumerate(softmax_rows(logits)):
        frequencies = target[i % n_targets].tolist()
        pairs = zip(frequencies, prediction, strict=True)
        expected.append(sum(p * math.log(p / g) for p, g in pairs))
    torch.testing.assert_close(adversarial_loss(logits, target), torch.tensor(expected))


def test_adversarial_loss_is_zero_exactly_where_the_adversary_knows_the_frequencies_only():
    target = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.3, 0.5], [0.0, 1.0, 0.0]])
    logits = torch.log(target).clamp(min=-1e4)  # exp(-1e4) is 0: impossible given the label
    loss = adversarial_loss(logits, target)
    torch.testing.assert_close(loss, torch.zeros(3), rtol=0.0, atol=1e-7)
    others = adversarial_loss(logits + torch.tensor([0.0, 0.5, 0.0]), target)
    assert (others[:2] > 1e-3).all()


def test_adversarial_loss_of_a_uniform_adversary_by_hand():
    # KL(p || uniform) = log n - H(p): for unbalanced conditions the optimum is not uniform
    target = torch.tensor([[0.9, 0.1]])
    expected = math.log(2) + 0.9 * math.log(0.9) + 0.1 * math.log(0.1)
    torch.testing.assert_close(
        adversarial_loss(torch.zeros(1, 2), target), torch.tensor([expected])
    )


def test_adversarial_loss_has_the_gradient_prediction_minus_target():
    target = torch.tensor([[0.7, 0.3, 0.0]])
    logits = torch.tensor([[1.0, -1.0, 0.5]], requires_grad=True)
    (gradient,) = torch.autograd.grad(adversarial_loss(logits, target).sum(), logits)
    torch.testing.assert_close(gradient, torch.softmax(logits, -1).detach() - target)


def test_adversarial_loss_pulls_where_the_gradient_of_the_entropy_vanishes():
    logits = torch.tensor([[40.0, 0.0]], requires_grad=True)  # a certain adversary
    loss = adversarial_loss(logits, torch.tensor([[0.5, 0.5]]))
    (pull,) = torch.autograd.grad(loss.sum(), logits)
    (entropy_pull,) = torch.autograd.grad(adversary_entropy(logits).sum(), logits)
    torch.testing.assert_close(pull, torch.tensor([[0.5, -0.5]]))
    assert entropy_pull.abs().max().item() < 1e-12
