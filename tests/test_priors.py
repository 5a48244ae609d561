import torch

from discover_sc._priors import ClassMeanPrior, LearnedPrior


def one_hot(codes, *n_levels):
    """Unit vectors of the levels of each key, side by side."""
    columns = zip(codes.T, n_levels, strict=True)
    return torch.cat([torch.nn.functional.one_hot(c, n) for c, n in columns], dim=1).float()


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_class_mean_prior_runs_towards_the_class_means_of_the_minibatches():
    prior = ClassMeanPrior(n_latent=2, n_levels=[3])
    generator = torch.Generator().manual_seed(1)
    expected = [torch.zeros(2) for _ in range(3)]
    for _ in range(5):
        z = torch.randn(8, 2, generator=generator)
        codes = torch.randint(3, (8, 1), generator=generator)
        prior.update(z, one_hot(codes, 3))
        for level in range(3):
            cells = [z[i] for i in range(8) if codes[i, 0] == level]
            if cells:
                mean = sum(cells) / len(cells)
                expected[level] = 0.95 * expected[level] + 0.05 * mean
    means = prior(torch.zeros(3, 2), torch.eye(3))
    torch.testing.assert_close(means, torch.stack(expected))


def test_class_mean_prior_converges_to_the_mean_of_z_in_the_class():
    prior = ClassMeanPrior(n_latent=2, n_levels=[2])
    z = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, -4.0]])
    codes = one_hot(torch.tensor([[0], [0], [1]]), 2)
    for _ in range(400):
        prior.update(z, codes)
    expected = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, -4.0]])
    torch.testing.assert_close(prior(z, codes), expected, rtol=1e-4, atol=1e-5)


def test_classes_absent_from_a_minibatch_keep_their_mean():
    prior = ClassMeanPrior(n_latent=2, n_levels=[3])
    prior.update(draw(6, 2), torch.eye(3).repeat(2, 1))
    codes = torch.eye(3)
    before = prior(torch.zeros(3, 2), codes)
    prior.update(draw(4, 2) + 5, torch.eye(3)[[1, 1, 1, 1]])
    after = prior(torch.zeros(3, 2), codes)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert not torch.allclose(after[1], before[1])


def test_class_mean_prior_of_several_keys_averages_their_class_means():
    both = ClassMeanPrior(2, [2, 3])
    first, second = ClassMeanPrior(2, [2]), ClassMeanPrior(2, [3])
    codes = torch.tensor([[0, 0], [1, 1], [0, 2], [1, 0], [0, 1], [1, 2]])
    z, levels = draw(6, 2), one_hot(codes, 2, 3)
    both.update(z, levels)
    first.update(z, levels[:, :2])
    second.update(z, levels[:, 2:])
    expected = (first(z, levels[:, :2]) + second(z, levels[:, 2:])) / 2
    torch.testing.assert_close(both(z, levels), expected)


def test_class_means_are_saved_with_the_model_and_not_trained():
    prior = ClassMeanPrior(2, [2])
    prior.update(draw(4, 2), torch.eye(2).repeat(2, 1))
    restored = ClassMeanPrior(2, [2])
    restored.load_state_dict(prior.state_dict())
    codes = torch.eye(2)
    assert torch.equal(restored(draw(2, 2), codes), prior(draw(2, 2), codes))
    assert list(prior.parameters()) == []


def test_learned_prior_depends_on_the_condition_and_on_z():
    prior = LearnedPrior(n_latent=3, n_latent_specific=4, n_hidden=8, n_features=[2, 2])
    z, features = draw(5, 3), torch.zeros(5, 4)
    mean = prior(z, features)
    assert mean.shape == (5, 4)
    for feature in range(4):
        other = features.clone()
        other[:, feature] = 1
        assert ((prior(z, other) - mean).abs().sum(dim=1) > 0).all()
    assert ((prior(z + 1, features) - mean).abs().sum(dim=1) > 0).all()


def test_learned_prior_is_moved_by_gradient_and_not_by_minibatches():
    prior = LearnedPrior(3, 4, 8, [2])
    z, codes = draw(5, 3), torch.eye(2)[[0, 1, 0, 1, 0]]
    before = prior(z, codes)
    prior.update(z, codes)
    assert torch.equal(prior(z, codes), before)
    before.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in prior.parameters())
