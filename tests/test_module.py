import pytest
import torch
from scvi import REGISTRY_KEYS

from discover_sc import DISCoVeR
from discover_sc._keys import CONDITION_KEY
from discover_sc._module import DiscoverVAE

N_CELLS, N_GENES = 16, 12


def make_tensors(n_keys=1):
    generator = torch.Generator().manual_seed(0)
    rate = torch.rand(N_CELLS, N_GENES, generator=generator) * 3
    return {
        REGISTRY_KEYS.X_KEY: torch.poisson(rate, generator=generator) + (rate > 2.9),
        # the data loader hands conditions over as float32
        CONDITION_KEY: (torch.arange(N_CELLS) % 2).float().unsqueeze(1).repeat(1, n_keys),
        REGISTRY_KEYS.BATCH_KEY: torch.arange(N_CELLS).unsqueeze(1) // 8,
        REGISTRY_KEYS.LABELS_KEY: torch.arange(N_CELLS).unsqueeze(1) % 3,
    }


def make_module(**options):
    return DiscoverVAE(
        N_GENES, [torch.tensor([[0.5, 0.5]])], n_latent=3, n_latent_specific=3, **options
    )


def step_losses(module, tensors):
    inference, generative, losses = module(tensors)
    return module.representation(tensors, inference, generative), losses


def gradient_names(module):
    return {
        name
        for name, p in module.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }


def test_the_model_loss_reaches_every_parameter_but_the_adversary():
    module, tensors = make_module(), make_tensors()
    representation, losses = step_losses(module, tensors)
    (losses.loss + 100 * module.game(representation, tensors)[0]).backward()
    expected = {n for n, _ in module.named_parameters() if not n.startswith("adversary")}
    # the linear map before a batch normalisation has a bias without effect, hence no gradient
    biases = {n for n in expected if n.endswith("hidden.first.bias")}
    assert gradient_names(module) | biases == expected | biases


def test_the_adversarys_loss_reaches_every_adversary_parameter_and_no_other():
    module, tensors = make_module(), make_tensors()
    representation, _ = step_losses(module, tensors)
    module.game(representation, tensors)[1].backward()
    expected = {n for n, _ in module.named_parameters() if n.startswith("adversary")}
    assert gradient_names(module) == expected


def test_the_shared_reconstruction_does_not_see_w():
    module, tensors = make_module().eval(), make_tensors()
    inference, _, _ = module(tensors)
    inputs = module._get_generative_input(tensors, inference)
    other = {**inputs, "w": inputs["w"] + 5.0}
    before, after = module.generative(**inputs), module.generative(**other)
    assert torch.equal(before["px_shared"].mu, after["px_shared"].mu)
    assert not torch.equal(before["px"].mu, after["px"].mu)


@pytest.mark.parametrize("gene_likelihood", ["nb", "zinb", "poisson", "normal"])
def test_outputs_stand_for_the_likelihoods_that_may_be_left_out(gene_likelihood):
    module, tensors = make_module(gene_likelihood=gene_likelihood).eval(), make_tensors()
    inference, full, losses = module(tensors)
    inputs = module._get_generative_input(tensors, inference)
    bare = module.generative(**inputs, likelihoods=False)
    assert set(full) - set(bare) == {"px", "px_shared"}
    x, loss = tensors["X"], losses.reconstruction_loss["reconstruction_loss"]
    for output, name in zip(bare["outputs"], ("px", "px_shared"), strict=True):
        px = module.likelihood(output, inference["library"], bare["theta"], bare["zi_logits"])
        torch.testing.assert_close(px.mean, full[name].mean)
    torch.testing.assert_close(-full["px"].log_prob(x).sum(-1), loss, rtol=1e-4, atol=1e-4)


def test_z_does_not_see_the_condition_label():
    module, tensors = make_module().eval(), make_tensors()
    flipped = {**tensors, CONDITION_KEY: 1 - tensors[CONDITION_KEY]}
    posteriors, others = module.posteriors(tensors), module.posteriors(flipped)
    assert torch.equal(posteriors["z"].loc, others["z"].loc)
    assert not torch.equal(posteriors["w"].loc, others["w"].loc)


@pytest.mark.parametrize("reads", ["hidden", "both", "reconstruction", "z"])
def test_the_adversary_reads_what_it_is_told_to(reads):
    module, tensors = make_module(adversary_input=reads).eval(), make_tensors()
    inference, generative, _ = module(tensors)
    z = inference["qz"].loc
    reconstruction = torch.log1p(N_GENES * generative["px_shared"].scale)
    hidden = module.shared_decoder.hidden(inference["z"], torch.zeros(N_CELLS, 0).long(), None)
    expected = {
        "hidden": [z, hidden],
        "both": [z, reconstruction],
        "reconstruction": [reconstruction],
        "z": [z],
    }[reads]
    read = module.representation(tensors, inference, generative)
    torch.testing.assert_close(read, torch.cat(expected, dim=1))


def test_with_a_linear_decoder_the_adversary_reads_the_reconstruction():
    """It has no hidden layer, and z alone does not do."""
    module, tensors = make_module(decoder="linear").eval(), make_tensors()
    inference, generative, _ = module(tensors)
    read = module.representation(tensors, inference, generative)
    reconstruction = torch.log1p(N_GENES * generative["px_shared"].scale)
    torch.testing.assert_close(read, torch.cat([inference["qz"].loc, reconstruction], dim=1))


def test_an_adversary_that_reads_z_alone_decodes_nothing_again():
    module, tensors = make_module(n_batch=2, adversary_input="z"), make_tensors()
    inference, generative, _ = module(tensors)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    module.representation(tensors, inference, generative)
    torch.testing.assert_close(dict(module.state_dict()), before)


def test_the_reconstruction_that_the_adversary_reads_is_free_of_depth():
    """Library size can go with the condition and would tell it."""
    module, tensors = make_module(adversary_input="reconstruction").eval(), make_tensors()
    inference, _, _ = module(tensors)
    inputs = module._get_generative_input(tensors, inference)
    read = [
        module.representation(
            tensors,
            inference,
            module.generative(**{**inputs, "library": inputs["library"] + shift}),
        )
        for shift in (0.0, 3.0)
    ]
    torch.testing.assert_close(read[0], read[1])


def test_zero_inflation_is_part_of_what_the_adversary_reads():
    """Otherwise the inflation tells what the rates must not."""
    module = make_module(gene_likelihood="zinb", adversary_input="reconstruction").eval()
    tensors = make_tensors()
    inference, generative, _ = module(tensors)
    px = generative["px_shared"]
    read = module.representation(tensors, inference, generative)
    expected = px.mean / inference["library"].exp()  # scvi-tools' mean, inflation included
    torch.testing.assert_close(read, torch.log1p(N_GENES * expected))
    generative["zi_logits"] += 1.0
    other = module.representation(tensors, inference, generative)
    assert (other < read).all()


@pytest.mark.parametrize("decoder", ["nonlinear", "linear"])
def test_zero_inflation_is_decoded_from_z_alone_for_both_reconstructions(decoder):
    module, tensors = make_module(gene_likelihood="zinb", decoder=decoder).eval(), make_tensors()
    inference, generative, _ = module(tensors)
    zi_logits = generative["px"].zi_logits
    assert torch.equal(zi_logits, generative["px_shared"].zi_logits)
    assert zi_logits.std() > 0
    other = {**module._get_generative_input(tensors, inference), "w": inference["w"] + 5.0}
    torch.testing.assert_close(module.generative(**other)["px"].zi_logits, zi_logits)
    decoded = module.decode(*(inference[k] for k in ("z", "w", "library")), tensors)
    torch.testing.assert_close(decoded.zi_logits, zi_logits)
    torch.testing.assert_close(decoded.mu, generative["px"].mu)


@pytest.mark.parametrize("decoder", ["nonlinear", "linear"])
def test_zero_inflation_may_depend_on_the_batch(decoder):
    module = make_module(gene_likelihood="zinb", decoder=decoder, n_batch=2).eval()
    tensors = make_tensors()
    inference, _, _ = module(tensors)
    latents = (torch.zeros_like(inference[k]) for k in ("z", "w", "library"))
    zi_logits = module.decode(*latents, tensors).zi_logits
    assert len(torch.unique(zi_logits.round(decimals=5), dim=0)) == 2


@pytest.mark.parametrize("reads", ["hidden", "reconstruction"])
def test_the_adversary_cannot_read_the_batch_from_what_is_decoded(reads):
    """A batch that goes with the condition must not tell it: covariates are permuted first."""
    module, tensors = make_module(n_batch=2, adversary_input=reads), make_tensors()
    with torch.no_grad():
        module.shared_decoder.hidden.covariates.embeddings[0].weight[1] += 50.0
    module.eval()
    inference, generative, _ = module(tensors)
    inference["z"] = torch.zeros_like(inference["z"])  # only the batch could differ
    inference["qz"] = torch.distributions.Normal(inference["z"], 1.0)
    read = module.representation(tensors, inference, generative)
    batch = tensors[REGISTRY_KEYS.BATCH_KEY].squeeze()
    distinct = torch.unique(read.round(decimals=3), dim=0)
    assert len(distinct) == 2  # both batches are decoded,
    own = (read == read[0]).all(1)
    assert not torch.equal(own, batch == batch[0])  # but not each cell under its own


def test_size_factors_replace_total_counts_up_to_scale():
    tensors = make_tensors()
    total = tensors[REGISTRY_KEYS.X_KEY].sum(1, keepdim=True)
    scaled = make_module(library_scale=10.0)
    inputs = scaled._get_inference_input(tensors) | {"size_factor": total / 10}
    library = scaled.inference(**inputs)["library"]
    torch.testing.assert_close(library, torch.log(total))


def test_conditional_targets_are_the_frequencies_given_the_label():
    targets = torch.tensor([[0.2, 0.8], [0.5, 0.5], [1.0, 0.0]])
    module = DiscoverVAE(N_GENES, [targets], invariance="conditional")
    tensors = make_tensors()
    labels = tensors[REGISTRY_KEYS.LABELS_KEY].squeeze()
    assert torch.equal(module._targets(tensors)[0], targets[labels])


def test_chance_is_the_most_frequent_level_and_the_entropy():
    module = DiscoverVAE(N_GENES, [torch.tensor([[0.25, 0.75]])], n_latent_specific=10)
    entropy = -(0.25 * torch.log(torch.tensor(0.25)) + 0.75 * torch.log(torch.tensor(0.75)))
    assert module.chance()["adversary_chance_accuracy"] == pytest.approx(0.75)
    assert module.chance()["adversary_chance_cross_entropy"] == pytest.approx(float(entropy))


def test_chance_given_the_label_counts_each_label_by_its_cells():
    """A mean over labels, as if all held as many cells, is not what the accuracy is."""
    targets = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    module = DiscoverVAE(
        N_GENES,
        [targets],
        label_frequencies=torch.tensor([0.25, 0.75]),
        n_latent_specific=10,
        invariance="conditional",
    )
    entropies = torch.special.entr(targets).sum(-1)
    assert module.chance()["adversary_chance_accuracy"] == pytest.approx(0.25 * 0.5 + 0.75 * 0.9)
    assert module.chance()["adversary_chance_cross_entropy"] == pytest.approx(
        float(0.25 * entropies[0] + 0.75 * entropies[1])
    )


def test_a_new_batch_level_leaves_reference_cells_as_they_are():
    """One embedding per key: padding one key with a category shifts no column of another."""
    old = make_module(n_batch=2, n_cats_per_cov=[3]).eval()
    new = make_module(n_batch=3, n_cats_per_cov=[3]).eval()
    state = new.state_dict()
    for name, tensor in old.state_dict().items():
        state[name] = (
            torch.cat([tensor, state[name][len(tensor) :]])
            if (tensor.shape != state[name].shape)
            else tensor
        )
    new.load_state_dict(state)
    tensors = make_tensors() | {REGISTRY_KEYS.CAT_COVS_KEY: torch.arange(N_CELLS).unsqueeze(1) % 3}
    z, w, library = torch.zeros(N_CELLS, 3), torch.ones(N_CELLS, 3), torch.zeros(N_CELLS, 1)
    assert torch.equal(old.decode(z, w, library, tensors).mu, new.decode(z, w, library, tensors).mu)


@torch.no_grad()
@pytest.mark.parametrize("n_labels", [1, 3], ids=["marginal", "given the label"])
def test_the_game_sums_over_keys_and_averages_over_cells(n_labels):
    generator = torch.Generator().manual_seed(1)
    targets = [torch.softmax(torch.randn(n_labels, 2, generator=generator), -1) for _ in range(2)]
    invariance = "marginal" if n_labels == 1 else "conditional"
    module = DiscoverVAE(N_GENES, targets, invariance=invariance).eval()
    tensors = make_tensors(n_keys=2)
    representation, _ = step_losses(module, tensors)
    loss, own_loss, metrics = module.game(representation, tensors)
    labels = tensors[REGISTRY_KEYS.LABELS_KEY]
    rows = labels.squeeze(1) if n_labels > 1 else torch.zeros(N_CELLS, dtype=torch.long)
    expected, cross_entropy = 0.0, 0.0
    truths = tensors[CONDITION_KEY].long()
    _, _, predictions = module.adversary.play(
        representation, labels, truths, module._targets(tensors)
    )
    for key, log_prediction in enumerate(predictions):
        truth = truths[:, key]
        for i in range(N_CELLS):
            log_g, p = log_prediction[i], targets[key][rows[i]]
            divergence = (p * (p.log() - log_g)).sum()
            expected += float(divergence + 2 / 50 * log_g[truth[i]]) / N_CELLS
            cross_entropy -= float(log_g[truth[i]]) / N_CELLS
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert float(metrics["adversary_cross_entropy"]) == pytest.approx(cross_entropy / 2, rel=1e-4)
    assert float(own_loss) == pytest.approx(cross_entropy, rel=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_module_has_the_same_loss_and_gradients(adata):
    graphs = []

    def compile_graph(graph, _):
        graphs.append(graph)
        return graph.forward

    DISCoVeR.setup_anndata(adata, condition_key="condition")
    model = DISCoVeR(adata)
    tensors = next(iter(model._make_data_loader(adata, load_sparse_tensor=True)))
    module, found = model.module.train(), []
    for forward in (module, torch.compile(module, backend=compile_graph)):
        torch.manual_seed(0)
        module.zero_grad()
        forward(tensors)[2].loss.backward()
        found.append(
            {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
        )
    assert graphs
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("options", [{}, {"gene_likelihood": "zinb"}, {"decoder": "linear"}])
def test_without_w_the_shared_reconstruction_is_decoded(options):
    module, tensors = make_module(**options).eval(), make_tensors()
    inference, generative, _ = module(tensors)
    decoded = module.decode(inference["z"], None, inference["library"], tensors)
    torch.testing.assert_close(decoded.mean, generative["px_shared"].mean)


def test_sparse_cells_follow_the_module_to_its_device(adata):
    DISCoVeR.setup_anndata(adata, condition_key="condition")
    model = DISCoVeR(adata)
    tensors = next(iter(model._make_data_loader(adata, load_sparse_tensor=True)))
    module = model.module.to("meta")
    outputs = module.inference(**module._get_inference_input(tensors))
    assert {outputs[name].device.type for name in ("z", "w", "library")} == {"meta"}
    for posterior in module.posteriors(tensors).values():
        assert posterior.loc.device.type == "meta"
