import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import kl_divergence

from discover_sc._losses import (
    adversarial_loss,
    adversarial_slope,
    adversary_entropy,
    cross_entropy_slope,
    kl_to_standard_normal,
    kl_to_unit_normal,
)

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


@pytest.mark.parametrize("learned", [False, True], ids=["standard normal", "mean given"])
def test_gradients_of_kl_divergences_are_those_of_torch(learned):
    generator = torch.Generator().manual_seed(0)
    loc, mean, scale = torch.randn(3, 20, 5, generator=generator)
    of = loc.requires_grad_(), scale.exp().requires_grad_(), mean.requires_grad_()
    q = torch.distributions.Normal(*of[:2])
    if learned:
        own, prior = kl_to_unit_normal(q, mean), torch.distributions.Normal(mean, 1.0)
    else:
        own, prior = kl_to_standard_normal(q), torch.distributions.Normal(0.0, 1.0)
    weights = torch.rand(20, generator=generator)
    reference = kl_divergence(q, prior).sum(-1)
    gradients, expected = (
        torch.autograd.grad(kl @ weights, of, allow_unused=True) for kl in (own, reference)
    )
    torch.testing.assert_close(gradients, expected)


def test_kl_is_zero_where_posterior_equals_prior():
    mean = torch.tensor([[0.3, -2.0]])
    q = torch.distributions.Normal(mean, torch.ones(1, 2))
    torch.testing.assert_close(kl_to_unit_normal(q, mean), torch.zeros(1))
    assert kl_to_standard_normal(q).item() > 0


# ----------------------------------------------------------------------------- the game


def softmax_rows(logits):
    exponentials = [[math.exp(v) for v in row] for row in logits.tolist()]
    return [[e / sum(row) for e in row] for row in exponentials]


def test_adversary_entropy_equals_a_plain_loop():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    expected = [-sum(p * math.log(p) for p in row) for row in softmax_rows(logits)]
    torch.testing.assert_close(adversary_entropy(logits.log_softmax(-1)), torch.tensor(expected))


def test_adversary_entropy_is_log_n_where_it_guesses_and_zero_where_it_is_certain():
    logits = torch.tensor([[5.0, 5.0, 5.0], [500.0, 0.0, 0.0]])
    entropy = adversary_entropy(logits.log_softmax(-1))
    torch.testing.assert_close(entropy, torch.tensor([math.log(3), 0.0]))


@pytest.mark.parametrize("n_targets", [1, 5], ids=["one target", "target per cell"])
@pytest.mark.parametrize("n_levels", [3, 60])
def test_adversarial_loss_equals_a_plain_loop(n_targets, n_levels):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, n_levels, generator=generator)
    target = torch.softmax(torch.randn(n_targets, n_levels, generator=generator), -1)
    truth = torch.randint(n_levels, (5,), generator=generator)
    expected = []
    for i, prediction in enumerate(softmax_rows(logits)):
        frequencies = target[i % n_targets].tolist()
        pairs = zip(frequencies, prediction, strict=True)
        divergence = sum(p * math.log(p / g) for p, g in pairs)
        expected.append(divergence + min(n_levels / 50, 1) * math.log(prediction[truth[i]]))
    torch.testing.assert_close(
        adversarial_loss(logits.log_softmax(-1), target, truth), torch.tensor(expected)
    )


def expected_loss(joint):
    """Expected loss where the adversary is at its optimum for a joint table of h and y."""
    logits = torch.log(joint / joint.sum(1, keepdim=True))
    target = joint.sum(0, keepdim=True)
    losses = [
        adversarial_loss(logits.log_softmax(-1), target, torch.full((len(joint),), y))
        for y in range(2)
    ]
    return float((joint * torch.stack(losses, dim=1)).sum())


def test_against_the_best_adversary_the_loss_is_least_where_nothing_is_known():
    """A joint table of two values of h and two unbalanced conditions, independent and not."""
    independent = torch.tensor([[0.4, 0.1], [0.4, 0.1]])
    least = expected_loss(independent)
    entropy = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    assert least == pytest.approx(-2 / 50 * entropy)
    for leak in (0.01, 0.05, -0.05, 0.09):
        assert expected_loss(independent + leak * torch.tensor([[1, -1], [-1, 1]])) > least


def test_the_loss_of_a_uniform_adversary_by_hand():
    # KL(p || uniform) = log n - H(p): for unbalanced conditions the optimum is not uniform
    expected = math.log(2) + 0.9 * math.log(0.9) + 0.1 * math.log(0.1) - 2 / 50 * math.log(2)
    loss = adversarial_loss(
        torch.full((1, 2), -math.log(2)), torch.tensor([[0.9, 0.1]]), torch.tensor([0])
    )
    torch.testing.assert_close(loss, torch.tensor([expected]))


def test_conditions_that_the_label_rules_out_cost_nothing():
    target = torch.tensor([[0.5, 0.5, 0.0]])
    logits = torch.log(target).clamp(min=-1e4)  # exp(-1e4) is 0
    loss = adversarial_loss(logits.log_softmax(-1), target, torch.tensor([1]))
    torch.testing.assert_close(loss, torch.tensor([-3 / 50 * math.log(2)]))


@pytest.mark.parametrize("n_levels", [3, 60])
def test_slopes_are_the_gradients_of_the_losses_by_the_logits(n_levels):
    """Away from all conditions alike, and away from the cell's own."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, n_levels, generator=generator).requires_grad_()
    target = torch.softmax(torch.randn(1, n_levels, generator=generator), -1)
    truth = torch.randint(n_levels, (5,), generator=generator)
    log_prediction = logits.log_softmax(-1)
    to_own = cross_entropy_slope(log_prediction.detach(), truth)
    adversarial = adversarial_slope(log_prediction.detach(), target, to_own)
    for losses, slope in (
        (F.nll_loss(log_prediction, truth, reduction="none"), to_own),
        (adversarial_loss(log_prediction, target, truth), adversarial),
    ):
        (gradient,) = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
        torch.testing.assert_close(slope, gradient)


def test_adversarial_loss_pulls_where_the_gradient_of_the_entropy_vanishes():
    logits = torch.tensor([[40.0, 0.0]], requires_grad=True)  # a certain adversary
    prediction = logits.log_softmax(-1)
    loss = adversarial_loss(prediction, torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
    (pull,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    (entropy_pull,) = torch.autograd.grad(adversary_entropy(prediction).sum(), logits)
    torch.testing.assert_close(pull, torch.tensor([[0.5, -0.5]]))
    assert entropy_pull.abs().max().item() < 1e-12
