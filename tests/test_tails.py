import pytest
import torch

from discover_sc._tails import Tails


@pytest.mark.parametrize("n_draws", [2, 3, 25, 200])
@pytest.mark.parametrize("interval", [0.5, 0.9, 0.99])
def test_bounds_are_quantiles_of_the_draws(n_draws, interval):
    draws = torch.poisson(torch.full((n_draws, 4, 5), 3.0)) + torch.randn(4, 5)
    tails = Tails(n_draws, interval)
    for draw in draws:
        tails.add(draw)
    # the level whose expected coverage of a new draw is the interval, at the sample's ends at most
    level = max(0.0, ((n_draws + 1) * (1 - interval) / 2 - 1) / (n_draws - 1))
    expected = torch.quantile(draws, torch.tensor([level, 1 - level]), dim=0)
    torch.testing.assert_close(torch.stack(tails.bounds()), expected, rtol=1e-4, atol=1e-4)


def test_a_new_draw_falls_between_the_bounds_as_often_as_asked():
    tails = Tails(40, 0.8)
    for _ in range(40):
        tails.add(torch.randn(20_000))
    lower, upper = tails.bounds()
    new = torch.randn(20_000)
    assert ((new > lower) & (new < upper)).float().mean() == pytest.approx(0.8, abs=0.01)


def test_draws_are_left_as_they_are():
    first, second = torch.tensor([1.0, 5.0]), torch.tensor([3.0, 2.0])
    tails = Tails(2, 0.9)
    tails.add(first)
    tails.add(second)
    assert torch.equal(torch.stack(tails.bounds()), torch.tensor([[1.0, 2.0], [3.0, 5.0]]))
    assert torch.equal(first, torch.tensor([1.0, 5.0]))
    assert torch.equal(second, torch.tensor([3.0, 2.0]))
