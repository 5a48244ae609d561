import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm
from scvi.distributions import NegativeBinomial, Normal, Poisson, ZeroInflatedNegativeBinomial

from discover_sc._effect_tables import (
    Sums,
    bayesian_fdr,
    cell_table,
    empirical_p_value,
    gene_table,
    log_information,
    probability_beyond,
    root_mean_square_change,
)


def sums_of(groups, before, after, information, is_log=False):
    """Sums of cells whose expression is that of their group, the same in every draw."""
    groups = np.asarray(groups)
    n_genes = len(next(iter(before.values())))
    sums = Sums.zeros(groups, n_genes, n_samples=3, n_sham=2, is_log=is_log)
    rows = np.arange(len(groups))
    side_before, side_after = (np.stack([side[g] for g in groups]) for side in (before, after))
    for draw in range(3):
        sums.add_draw(draw, rows, side_before, side_after)
    sums.add_information(rows, [np.full_like(side_before, value) for value in information])
    return sums


def test_probability_beyond_matches_closed_form():
    lfc, std = np.array([1.0, -1.0, 0.0]), np.array([0.5, 0.5, 0.1])
    expected = norm.cdf([1.5, 1.5, -2.5])  # by hand: (abs(lfc) - 0.25) / std
    np.testing.assert_allclose(probability_beyond(lfc, std, 0.25), expected)


def test_a_change_of_which_nothing_is_known_has_probability_one_half_at_most():
    assert probability_beyond(np.array([0.1]), np.array([1e6]), 0.25) <= 0.5


def test_bayesian_fdr_is_the_mean_probability_of_a_false_call():
    np.testing.assert_allclose(bayesian_fdr(np.array([0.98, 0.9, 0.6])), [0.02, 0.06, 0.52 / 3])


def test_empirical_p_values_count_the_null_at_or_above():
    null = np.array([3.0, 1.0, 2.0])
    p_values = empirical_p_value(np.array([4.0, 3.0, 2.5, 0.0]), null)
    np.testing.assert_allclose(p_values, [1 / 4, 2 / 4, 2 / 4, 4 / 4])


def test_empirical_p_values_of_null_values_are_uniform():
    rng = np.random.default_rng(0)
    p_values = empirical_p_value(rng.gamma(2.0, size=5000), rng.gamma(2.0, size=20000))
    for level in (0.01, 0.05, 0.5):
        assert (p_values <= level).mean() == pytest.approx(level, abs=4 * math.sqrt(level / 5000))


MU, THETA = torch.tensor([[0.5, 4.0]]), torch.tensor([2.0, 3.0])


@pytest.mark.parametrize(
    "px",
    [
        NegativeBinomial(mu=MU, theta=THETA),
        Poisson(rate=MU),
        ZeroInflatedNegativeBinomial(mu=MU, theta=THETA, zi_logits=torch.tensor([[-1.0, 0.5]])),
    ],
    ids=["nb", "poisson", "zinb"],
)
def test_information_is_squared_mean_over_variance_of_drawn_counts(px):
    torch.manual_seed(0)
    counts = px.sample((200_000,))
    expected = counts.mean(0) ** 2 / counts.var(0)
    torch.testing.assert_close(log_information(px), expected, rtol=0.03, atol=0.0)


def test_information_on_a_normal_mean_is_the_inverse_variance():
    px = Normal(torch.zeros(1, 2), torch.tensor([[0.5, 2.0]]), normal_mu=torch.zeros(1, 2))
    torch.testing.assert_close(log_information(px), torch.tensor([[4.0, 0.25]]))


def test_root_mean_square_change_by_hand():
    before, after = np.array([[0.9, 0.9]]), np.array([[3.9, 0.4]])  # plus 0.1: ratios 4 and 1/2
    assert root_mean_square_change(before, after, False) == pytest.approx(math.sqrt(5 / 2))
    assert root_mean_square_change(before, after, True) == pytest.approx(math.sqrt((9 + 0.25) / 2))


def test_standard_deviation_is_that_of_means_of_drawn_counts():
    """The log2 fold change of two groups of cells together, measured again and again."""
    rng = np.random.default_rng(0)
    before = {"a": np.array([20.0, 2.0]), "b": np.array([60.0, 4.0])}  # per 10,000 counts
    after = {"a": np.array([80.0, 2.0]), "b": np.array([90.0, 1.0])}
    n_learned_from = np.array([[40, 80], [30, 50]])  # cells of 2,000 counts each
    n_cells = {"a": 10, "b": 30}

    def drawn(side, n):
        means = [
            rng.poisson(n[k] * side[g] / 5, (20_000, 2)) * 5 / n[k] for k, g in enumerate("ab")
        ]
        return (n_cells["a"] * means[0] + n_cells["b"] * means[1]) / 40

    ratio = (drawn(after, n_learned_from[1]) + 0.1) / (drawn(before, n_learned_from[0]) + 0.1)
    groups = np.repeat(["a", "b"], [10, 30])
    sums = sums_of(groups, before, after, (1.0, 1.0))
    for side, expression in enumerate((before, after)):  # a Poisson count informs by its mean
        for k, group in enumerate("ab"):
            sums.information[side, k] = n_cells[group] * expression[group] / 5
    table = gene_table(pd.Index(["x", "y"]), sums, n_learned_from, False, 0.25).set_index("gene")
    np.testing.assert_allclose(table.loc[["x", "y"], "lfc_std"], np.log2(ratio).std(0), rtol=0.08)


def test_genes_of_a_group_are_ordered_and_groups_are_tested_alone():
    before = {"a": np.array([5.0, 5.0, 5.0]), "b": np.array([5.0, 5.0, 5.0])}
    after = {"a": np.array([5.0, 50.0, 4.0]), "b": np.array([5.0, 5.0, 5.0])}
    sums = sums_of(["b", "a", "a"], before, after, (1.0, 1.0))
    table = gene_table(pd.Index(["g0", "g1", "g2"]), sums, np.full((2, 2), 100), True, 0.25)
    assert list(table["group"]) == ["a"] * 3 + ["b"] * 3
    assert list(table["gene"][:3]) == ["g1", "g2", "g0"]
    assert table["lfc"][0] == pytest.approx(math.log2(50.1 / 5.1), abs=1e-5)
    np.testing.assert_allclose(table["lfc"][3:], 0.0, atol=1e-6)
    np.testing.assert_allclose(table["lfc_std"][:1], math.sqrt(2 / 100) / math.log(2), rtol=0.02)
    together = gene_table(pd.Index(["g0", "g1", "g2"]), sums, np.full((2, 2), 100), False, 0.25)
    top = together.iloc[0]
    assert (top["group"], top["gene"]) == ("all", "g1")
    assert top["mean_after"] == pytest.approx((2 * 50 + 5) / 3)


def test_values_on_a_log_scale_are_compared_by_difference():
    sums = sums_of(["a", "a"], {"a": np.array([1.0])}, {"a": np.array([3.0])}, (4.0, 1.0), True)
    table = gene_table(pd.Index(["g"]), sums, np.array([[5], [20]]), False, 0.25)
    assert table["lfc"][0] == 2.0
    assert table["lfc_std"][0] == pytest.approx(math.sqrt(1 / (5 * 4) + 1 / (20 * 1)))


def test_cells_are_judged_by_the_sham_effects_of_their_own_group():
    sums = Sums.zeros(np.array(["a", "b"]), 1, n_samples=4, n_sham=3, is_log=False)
    sums.effect[:] = 2.0
    sums.effect_draws[:] = [1.5, 2.0, 2.5, 3.0]
    sums.sham[:] = [[1.0, 1.0, 1.0], [5.0, 2.2, 2.2]]
    table = cell_table(pd.Index(["cell_a", "cell_b"]), sums)
    assert list(table["group"]) == ["a", "b"]
    np.testing.assert_allclose(table["p_value"], [1 / 4, 1.0])
    np.testing.assert_allclose(table["fdr"], [1 / 2, 1.0])
    np.testing.assert_allclose(table["responder_score"], [1.0, 0.0])
    np.testing.assert_allclose(table["sham_expression"], [1.0, 9.4 / 3], rtol=1e-6)
