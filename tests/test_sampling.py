import math

import pytest
import torch
from scvi.distributions import NegativeBinomial, Normal, Poisson, ZeroInflatedNegativeBinomial

from discover_sc._sampling import carry_over, negative_binomial, sample

N_CELLS = 40_000
BEFORE = torch.tensor([[1.0, 4.0, 0.001, 5.0]])
AFTER = torch.tensor([[3.0, 1.0, 1.0, 5.0]])
LIBRARY = torch.log(torch.full((N_CELLS, 1), 50.0))


def counts_likelihood(expression, name):
    fractions = (expression / expression.sum()).expand(N_CELLS, -1)
    rate = fractions * 50.0
    theta = torch.tensor([[2.0, 3.0, 1.0, 5.0]])
    if name == "poisson":
        return Poisson(rate=rate, scale=fractions), rate
    px = NegativeBinomial(mu=rate, theta=theta, scale=fractions)
    return px, rate + rate**2 / theta


@pytest.mark.parametrize("name", ["nb", "poisson"])
def test_carried_over_counts_have_the_distribution_of_the_other_mean(name):
    px, _ = counts_likelihood(BEFORE, name)
    target, variance = counts_likelihood(AFTER, name)
    drawn = carry_over(px, px.sample(), BEFORE, AFTER, LIBRARY)
    torch.testing.assert_close(drawn.mean(0), target.mean[0], rtol=0.03, atol=0.02)
    torch.testing.assert_close(drawn.var(0), variance[0], rtol=0.06, atol=0.02)
    for count in (0, 3):  # and not the first two moments only
        expected = torch.exp(target.log_prob(torch.full((N_CELLS, 4), float(count))))[0]
        share = (drawn == count).float().mean(0)
        torch.testing.assert_close(share, expected, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("name", ["nb", "zinb"])
def test_a_larger_library_gives_more_counts_of_every_gene(name):
    px, _ = counts_likelihood(BEFORE, "nb")
    if name == "zinb":
        never = torch.full_like(px.mu, -30.0)
        px = ZeroInflatedNegativeBinomial(mu=px.mu, theta=px.theta, zi_logits=never, scale=px.scale)
    drawn = carry_over(px, px.sample(), BEFORE, AFTER, LIBRARY, library_change=math.log(1.5))
    torch.testing.assert_close(drawn.mean(0), 75.0 * AFTER[0] / AFTER.sum(), rtol=0.03, atol=0.03)


def test_a_cell_keeps_its_own_noise():
    px, _ = counts_likelihood(BEFORE, "nb")
    x = px.sample()
    same = carry_over(px, x, BEFORE, 7 * BEFORE, LIBRARY)  # a factor per cell says nothing
    assert torch.equal(same, x)
    moved = carry_over(px, x, BEFORE, AFTER, LIBRARY)
    for gene in (0, 1):
        assert torch.corrcoef(torch.stack([x[:, gene], moved[:, gene]]))[0, 1] > 0.5


def test_normal_values_move_by_the_change_of_the_mean():
    px = Normal(torch.zeros(2, 2), torch.ones(2, 2))
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    moved = carry_over(px, x, torch.ones(2, 2), torch.full((2, 2), 1.5), None)
    torch.testing.assert_close(moved, x + 0.5)


def test_zero_inflated_counts_are_drawn_afresh_at_the_other_mean():
    logits = torch.full((N_CELLS, 4), -1.0)
    px, _ = counts_likelihood(BEFORE, "nb")
    zinb = ZeroInflatedNegativeBinomial(mu=px.mu, theta=px.theta, zi_logits=logits, scale=px.scale)
    drawn = carry_over(zinb, zinb.sample(), BEFORE, AFTER, LIBRARY)
    expected = (1 - torch.sigmoid(logits[0])) * 50.0 * AFTER[0] / AFTER.sum()
    torch.testing.assert_close(drawn.mean(0), expected, rtol=0.05, atol=0.05)


def test_fresh_draws_have_the_wanted_mean_at_the_library():
    px, _ = counts_likelihood(BEFORE, "nb")
    drawn = sample(px, AFTER.expand(N_CELLS, -1), LIBRARY)
    torch.testing.assert_close(drawn.mean(0), 50.0 * AFTER[0] / AFTER.sum(), rtol=0.03, atol=0.02)


@pytest.mark.parametrize("theta", [0.02, 1.0, 30.0, 1e4])
def test_negative_binomial_counts_have_their_distribution(theta):
    mean = torch.tensor([[1e-3, 0.1, 1.0, 6.0, 50.0, 4000.0]]).expand(N_CELLS, -1)
    torch.manual_seed(0)
    drawn = negative_binomial(mean, torch.full((1, 1), theta))
    reference = NegativeBinomial(mu=mean[0].double(), theta=torch.tensor(theta).double())
    spread = reference.variance.sqrt()
    assert ((drawn.double().mean(0) - reference.mean).abs() < 5 * spread / N_CELLS**0.5).all()
    for count in (0, 1, 2, 3, 5, 8, 13, 40, 60):
        expected = reference.log_prob(torch.full((6,), float(count)).double()).exp()
        error = ((drawn == count).double().mean(0) - expected).abs()
        assert (error < 5 * (expected / N_CELLS).sqrt() + 3 / N_CELLS).all()


def test_no_count_where_the_mean_is_zero():
    assert (negative_binomial(torch.zeros(100, 3), torch.ones(1, 3)) == 0).all()


@pytest.mark.parametrize("name", ["nb", "zinb"])
def test_fresh_draws_are_zero_as_often_as_the_likelihood_says(name):
    px, _ = counts_likelihood(AFTER, "nb")
    if name == "zinb":
        logits = torch.tensor([[-2.0, 0.0, 1.0, -1.0]]).expand(N_CELLS, -1)
        px = ZeroInflatedNegativeBinomial(
            mu=px.mu, theta=px.theta, zi_logits=logits, scale=px.scale
        )
    drawn = sample(px, AFTER.expand(N_CELLS, -1), LIBRARY)
    expected = px.log_prob(torch.zeros(N_CELLS, 4)).exp()[0]
    torch.testing.assert_close((drawn == 0).float().mean(0), expected, rtol=0.05, atol=0.01)


def test_no_count_is_drawn_from_what_is_not_a_number():
    with pytest.raises(ValueError, match="is not a number. Check the cells for NaN"):
        negative_binomial(torch.tensor([[1.0, float("nan")]]), torch.ones(1, 2))


@pytest.mark.parametrize("expected", [1.0, 9.0], ids=["few clusters", "many"])
def test_counts_stand_at_their_means_whatever_the_layout(expected):
    mean = torch.tensor([[0.0], [expected]]).repeat(1, 2000)
    drawn = negative_binomial(mean.T.contiguous().T, torch.full((1, 2000), 5.0))
    assert (drawn[0] == 0).all()
    assert drawn[1].mean().item() == pytest.approx(expected, rel=0.15)
