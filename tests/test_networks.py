import pytest
import torch
from drawing import N_CELLS, NO_CATEGORIES, draw, draw_codes
from torch.distributions import Normal

from discover_sc._networks import (
    Covariates,
    Decoder,
    Dropout,
    Encoders,
    HiddenLayers,
    LinearDecoder,
)


def test_covariates_are_the_sum_of_one_vector_per_key_and_a_linear_map():
    covariates = Covariates([3, 2], n_continuous=2, n_output=4)
    categories, continuous = draw_codes(3, 2), draw(N_CELLS, 2)
    result = covariates(categories, continuous)
    for i in range(N_CELLS):
        first, second = (e.weight[categories[i, k]] for k, e in enumerate(covariates.embeddings))
        linear = covariates.linear.weight @ continuous[i]
        torch.testing.assert_close(result[i], first + second + linear)


def test_absent_covariates_are_zero():
    assert Covariates([], n_continuous=0, n_output=4)(NO_CATEGORIES, None) == 0.0


def test_a_key_that_gains_categories_leaves_the_vectors_of_the_other_key_alone():
    small, large = Covariates([3, 2], 0, 4), Covariates([5, 2], 0, 4)
    large.embeddings[1].load_state_dict(small.embeddings[1].state_dict())
    with torch.no_grad():
        large.embeddings[0].weight[:3] = small.embeddings[0].weight
    categories = draw_codes(3, 2)
    torch.testing.assert_close(large(categories, None), small(categories, None))


def test_covariates_enter_before_the_batch_normalisation():
    # a vector common to all cells of a minibatch is then subtracted with the mean
    hidden = HiddenLayers(5, 8, 1, Covariates([2], 0, 8)).train()
    x, same = draw(N_CELLS, 5), torch.zeros(N_CELLS, 1, dtype=torch.long)
    torch.testing.assert_close(
        hidden(x, same, None), hidden(x, same + 1, None), rtol=1e-4, atol=1e-5
    )
    mixed = draw_codes(2)
    assert not torch.allclose(hidden(x, mixed, None), hidden(x, same, None), atol=1e-3)


@pytest.mark.parametrize("n_layers", [1, 3])
def test_hidden_layers_have_as_many_linear_maps_as_asked_for(n_layers):
    hidden = HiddenLayers(5, 8, n_layers).eval()
    linear = [m for m in hidden.modules() if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(5, 8)] + [(8, 8)] * (n_layers - 1)
    assert hidden(draw(N_CELLS, 5)).shape == (N_CELLS, 8)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_every_entry_alone_at_its_rate_and_keeps_the_mean(rate):
    n, dropout = 40_001, Dropout(rate).train()  # no multiple of the 4 entries of a word
    x = torch.ones(n, 7, requires_grad=True)
    dropped = dropout(x)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)], rel=1e-4)
    variance = rate * (1 - rate)
    for kept in (dropped > 0, (dropped > 0).flatten()[: 4 * n].view(-1, 4)):
        kept = kept.double()
        assert (kept.mean(0) - (1 - rate)).abs().max() < 4 * (variance / n) ** 0.5
        covariance = kept.T.cov()
        assert (covariance.diagonal() - variance).abs().max() < 4 * (variance / n) ** 0.5
        covariance.fill_diagonal_(0.0)
        assert covariance.abs().max() < 4 * variance / n**0.5
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped)
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize("shape", [(), (3,), (1, 1), (0, 5), (2, 3, 5)], ids=str)
def test_dropout_keeps_any_shape_and_type_on_any_device(shape):
    for options in ({"dtype": torch.bfloat16}, {"device": "meta"}):
        x = torch.ones(shape, **options)
        dropped = Dropout(0.1).train()(x)
        assert (dropped.shape, dropped.dtype, dropped.device) == (x.shape, x.dtype, x.device)


def test_dropout_follows_the_seed():
    dropout, x = Dropout(0.5).train(), draw(N_CELLS, 5)

    def after(seed):
        torch.manual_seed(seed)
        return dropout(x)

    assert torch.equal(after(1), after(1))
    assert not torch.equal(after(1), after(2))


def make_encoders(n_layers=1, dropout_rate=0.0, n_features=(2, 3)):
    return Encoders(5, (3, 4), 8, n_layers, dropout_rate, n_features).eval()


@pytest.mark.parametrize("n_layers", [1, 3])
def test_encoders_return_normals_whose_scale_is_the_root_of_the_variance_they_predict(n_layers):
    encoders, x, features = make_encoders(n_layers), draw(N_CELLS, 5), draw(N_CELLS, 5)
    halves = encoders.activation(
        encoders.first(x) + torch.cat([torch.zeros(N_CELLS, 8), encoders.conditions(features)], 1)
    ).split(8, dim=1)
    for posterior, half, rest, head, n in zip(
        encoders(x, features), halves, encoders.rest, encoders.heads, (3, 4), strict=True
    ):
        mean, log_variance = head(rest(half)).split(n, dim=1)
        assert isinstance(posterior, Normal)
        torch.testing.assert_close(posterior.loc, mean)
        root = log_variance.exp().sqrt()
        torch.testing.assert_close(posterior.scale, root, rtol=0.0, atol=2e-4)


def test_encoders_scale_stays_positive_and_its_logarithm_finite():
    encoders = make_encoders()
    for head in encoders.heads:
        torch.nn.init.constant_(head.bias, -1e4)
    for posterior in encoders(draw(N_CELLS, 5), draw(N_CELLS, 5)):
        torch.testing.assert_close(posterior.scale, torch.full_like(posterior.scale, 1e-4))


def test_the_encoder_of_w_alone_is_told_the_condition():
    encoders = make_encoders()
    x, features = draw(N_CELLS, 5), torch.zeros(N_CELLS, 5)
    other = features.clone()
    other[:4, 3] = 2
    (z, w), (other_z, other_w) = encoders(x, features), encoders(x, other)
    assert (w.loc != other_w.loc).any(dim=1).tolist() == [True] * 4 + [False] * (N_CELLS - 4)
    assert torch.equal(z.loc, other_z.loc)


@pytest.mark.parametrize("n_layers", [1, 3])
def test_the_encoders_have_no_weight_in_common(n_layers):
    encoders, x, features = make_encoders(n_layers), draw(N_CELLS, 5), draw(N_CELLS, 5)
    names, parameters = zip(*encoders.named_parameters(), strict=True)

    def moved_by(posterior):
        """Return what a posterior depends on; of what both lie in, which half."""
        found = set()
        gradients = torch.autograd.grad(
            posterior.loc.sum(), parameters, retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None and gradient.any():
                halves = gradient.split(8) if name.startswith(("first", "activation")) else ()
                found |= {f"{name} {k}" for k, half in enumerate(halves) if half.any()} or {name}
        return found

    of_z, of_w = map(moved_by, encoders(x, features))
    assert not of_z & of_w
    assert {name.split(".")[0] for name in of_w - of_z} >= {"first", "conditions", "heads"}
    assert not any(name.startswith("conditions") for name in of_z)
    for own, k in ((of_z, 0), (of_w, 1)):
        assert {f"first.weight {k}", f"heads.{k}.weight"} <= own
        assert any(name.startswith(f"rest.{k}.") for name in own) == (n_layers > 1)


def test_dropout_acts_on_both_posteriors_in_training_and_not_in_evaluation():
    encoders, x, features = make_encoders(dropout_rate=0.5), draw(N_CELLS, 5), draw(N_CELLS, 5)
    for training in (True, False):
        encoders.train(training)
        for first, second in zip(encoders(x, features), encoders(x, features), strict=True):
            assert torch.equal(first.loc, second.loc) != training


def test_permuted_cells_have_permuted_posteriors_and_outputs():
    order = torch.randperm(N_CELLS, generator=torch.Generator().manual_seed(2))
    x, codes, continuous = draw(N_CELLS, 5), draw_codes(3), draw(N_CELLS, 2)
    encoders = make_encoders(n_layers=2, dropout_rate=0.1, n_features=[2])
    decoder = Decoder(5, 7, 8, 2, [3], n_continuous=2).eval()
    for permuted, posterior in zip(
        encoders(x[order], continuous[order]), encoders(x, continuous), strict=True
    ):
        torch.testing.assert_close(permuted.scale, posterior.scale[order])
    torch.testing.assert_close(
        decoder(x[order], codes[order], continuous[order]), decoder(x, codes, continuous)[order]
    )


@pytest.mark.parametrize("linear", [False, True], ids=["nonlinear", "linear"])
def test_decoders_return_one_output_per_gene_and_read_every_covariate(linear):
    decoder = LinearDecoder(5, 7, [3], 2) if linear else Decoder(5, 7, 8, 1, [3], 2).eval()
    latent, codes, continuous = draw(N_CELLS, 5), draw_codes(3), draw(N_CELLS, 2)
    output = decoder(latent, codes, continuous)
    assert output.shape == (N_CELLS, 7)
    for changed in (
        decoder(latent, (codes + 1) % 3, continuous),
        decoder(latent, codes, continuous + 1),
    ):
        assert ((changed - output).abs().sum(dim=1) > 0).all()


def test_linear_decoder_is_linear_in_the_latent_and_adds_the_covariates():
    decoder = LinearDecoder(5, 7, [3], 0)
    first, second, codes = draw(N_CELLS, 5), draw(N_CELLS, 5).flip(0), draw_codes(3)
    base = decoder(torch.zeros(N_CELLS, 5), codes, None)
    mixed = decoder(2 * first - 3 * second, codes, None) - base
    apart = 2 * (decoder(first, codes, None) - base) - 3 * (decoder(second, codes, None) - base)
    torch.testing.assert_close(mixed, apart, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed, (2 * first - 3 * second) @ decoder.loadings.weight.T)


def test_nonlinear_decoder_is_not_linear():
    decoder = Decoder(5, 7, 32, 1, [], 0).eval()
    latent = 3 * draw(N_CELLS, 5)
    base = decoder(torch.zeros(N_CELLS, 5), NO_CATEGORIES, None)
    opposite = decoder(latent, NO_CATEGORIES, None) + decoder(-latent, NO_CATEGORIES, None)
    assert not torch.allclose(opposite, 2 * base, atol=1e-2)
