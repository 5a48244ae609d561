import numpy as np
import pytest

from discover_sc._shrinkage import denoised, sampling_variance, standing_out


def test_the_sampling_variance_is_that_of_drawn_profiles():
    rng = np.random.default_rng(0)
    theta = np.linspace(1, 5, 60)
    mean = np.linspace(5, 100, 60)
    mean *= 2000 / mean.sum()

    def draw():
        return rng.poisson(mean * rng.gamma(theta, 1 / theta, (30, 60)))

    profiles = np.array([np.log1p(draw().mean(axis=0) * 5) for _ in range(2000)])
    estimated = sampling_variance(np.log1p(mean * 5), theta, 30, 1 / 2000)
    np.testing.assert_allclose(estimated, profiles.var(axis=0), rtol=0.25)  # delta method


def test_poisson_noise_has_no_dispersion():
    variance = sampling_variance(np.log1p([3.0]), np.array([np.inf]), 10, 1 / 1000)
    np.testing.assert_allclose(variance, 3.0 * 10 / 10 / 16)


def test_a_few_large_values_are_kept_and_the_noise_is_not():
    rng = np.random.default_rng(0)
    truth = np.where(np.arange(500) < 50, rng.normal(0, 2, 500), 0.0)
    variance = rng.uniform(0.02, 0.2, 500)
    seen = truth + rng.normal(size=500) * np.sqrt(variance)
    kept = standing_out(seen, variance)
    assert np.square(kept - truth).mean() < 0.25 * np.square(seen - truth).mean()
    assert np.abs(kept[50:]).mean() < 0.25 * np.abs(seen[50:]).mean()
    large = np.abs(truth) > 1.5
    np.testing.assert_allclose(kept[large], seen[large], atol=0.5)


def test_values_without_noise_are_kept_and_noise_alone_is_not():
    rng = np.random.default_rng(0)
    values = rng.normal(size=200)
    np.testing.assert_allclose(standing_out(values, np.zeros(200)), values)
    noise = 0.3 * values
    assert np.abs(standing_out(noise, np.full(200, 0.09))).max() < 0.1


def test_a_value_far_beyond_all_others_is_kept():
    values = np.r_[500.0, np.zeros(99)]
    assert standing_out(values, np.full(100, 0.1))[0] == pytest.approx(500.0, rel=0.01)


def test_what_all_values_share_is_no_noise_whatever_stands_out():
    rng = np.random.default_rng(0)
    common, variance = rng.uniform(0.5, 1.0, 500), np.full(500, 0.04)
    truth = 0.3 * common + np.where(np.arange(500) < 100, 2.0, 0.0)  # all to one side
    seen = truth + rng.normal(size=500) * 0.2
    kept = standing_out(seen, variance, common)
    assert np.abs(kept - truth)[100:].mean() < 0.03
    assert np.abs(standing_out(seen, variance) - truth)[100:].mean() > 0.1


def test_counts_that_lack_in_one_gene_are_too_many_in_all_others_by_one_factor():
    profile = np.linspace(0.1, 5, 300)
    change = np.log1p(1.1 * np.expm1(profile)) - profile
    noise = 0.1 * np.random.default_rng(0).normal(size=300)
    found = denoised(change + noise, np.full(300, 0.01), profile + change)
    np.testing.assert_allclose(found, change, atol=0.03)
