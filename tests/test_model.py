import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
import torch
from fitting import QUIET, train_small

from discover_sc import DISCoVeR
from discover_sc.data import simulate

OPTIONS = [
    pytest.param({"gene_likelihood": "zinb"}, id="zinb"),
    pytest.param({"gene_likelihood": "poisson"}, id="poisson"),
    pytest.param({"gene_likelihood": "normal"}, id="normal"),
    pytest.param({"dispersion": "gene-batch"}, id="dispersion-per-batch"),
    pytest.param({"prior": "class_mean"}, id="class-mean-prior"),
    pytest.param({"adversary_input": "reconstruction"}, id="adversary-on-reconstruction"),
    pytest.param({"adversary_input": "z"}, id="adversary-on-z"),
    pytest.param({"invariance": "conditional"}, id="conditional"),
    pytest.param({"decoder": "linear"}, id="linear-decoder"),
    pytest.param({"n_layers": 2, "n_hidden": 32, "dropout_rate": 0.0}, id="two-layers"),
    pytest.param({"n_latent": 4, "n_latent_specific": 3}, id="latent-sizes"),
]
SETUP = {"batch_key": "batch", "labels_key": "cell_type"}


def mean_log_likelihood(model):
    return -float(model.history["reconstruction_loss_train"].iloc[-1, 0])


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_learns_and_predicts(adata, options):
    if options.get("gene_likelihood") == "normal":
        adata.X = sp.csr_matrix(np.log1p(adata.X.toarray()))
    model = train_small(adata, SETUP, options, {"max_epochs": 8})
    losses = model.history["reconstruction_loss_train"].iloc[:, 0].astype(float)
    assert losses.iloc[-1] < losses.iloc[0]
    n_w = options.get("n_latent_specific", 10)
    assert model.get_latent_representation(latent="w").shape == (adata.n_obs, n_w)
    source = adata[adata.obs["condition"] == "ctrl"].copy()
    predicted = model.predict_counterfactual(source, to="treat_1", n_samples=2)
    assert np.isfinite(predicted.X).all()
    assert (predicted.X >= 0).all() or options.get("gene_likelihood") == "normal"


def test_covariates_size_factors_and_several_condition_keys_train_together(adata):
    adata.obs["dose"] = np.where(np.arange(adata.n_obs) % 3 == 0, "low", "high")
    adata.obs["chip"] = np.where(np.arange(adata.n_obs) % 2 == 0, "a", "b")
    adata.obs["age"] = np.linspace(-1, 1, adata.n_obs)
    adata.obs["factor"] = np.asarray(adata.X.sum(1)).ravel() / 1000
    setup = {
        "condition_key": ["condition", "dose"],
        "size_factor_key": "factor",
        "categorical_covariate_keys": ["chip"],
        "continuous_covariate_keys": ["age"],
        **SETUP,
    }
    model = train_small(adata, setup)
    assert model.conditions == {"condition": ["ctrl", "treat_1"], "dose": ["high", "low"]}
    assert model.module.adversary.n_levels == [2, 2]
    source = adata[adata.obs["condition"] == "ctrl"].copy()
    predicted = model.predict_counterfactual(source, to={"condition": "treat_1"}, n_samples=2)
    assert (predicted.obs["dose"] == source.obs["dose"]).all()  # keys not named stay
    assert set(predicted.obs["condition"]) == {"treat_1"}
    assert set(predicted.obs["condition_source"]) == {"ctrl"}


def test_the_same_seed_gives_the_same_latents_bit_for_bit(adata):
    latents = []
    for _ in range(2):
        scvi.settings.seed = 3
        latents.append(train_small(adata).get_latent_representation(latent="w"))
    assert np.array_equal(*latents)


def test_latents_mean_draw_and_variance_are_those_of_the_posterior(adata):
    model = train_small(adata)
    mean, variance = model.get_latent_representation(return_dist=True)
    draws = np.stack([model.get_latent_representation(give_mean=False) for _ in range(400)])
    assert np.array_equal(mean, model.get_latent_representation())
    # a standard deviation handed out as a variance would miss by far
    ratio = draws.var(axis=0) / variance
    assert np.median(ratio) == pytest.approx(1.0, abs=0.05)


def test_indices_choose_cells_in_their_order(adata):
    model = train_small(adata)
    every = model.get_latent_representation()
    chosen = model.get_latent_representation(indices=[7, 2, 5], batch_size=2)
    np.testing.assert_allclose(chosen, every[[7, 2, 5]], rtol=1e-4, atol=1e-5)


def test_write_latents_is_ready_for_scanpy(adata):
    model = train_small(adata)
    model.write_latents()
    assert np.array_equal(model.adata.obsm["X_discover_z"], model.get_latent_representation())
    other = adata[:50].copy()
    model.write_latents(other)
    assert other.obsm["X_discover_w"].shape == (50, 10)


def test_normalized_expression_sums_to_the_library_size_and_averages_draws(adata):
    model = train_small(adata)
    frame = model.get_normalized_expression(library_size=1e4, n_samples=3)
    assert frame.shape == adata.shape
    assert list(frame.columns) == list(adata.var_names)
    np.testing.assert_allclose(frame.sum(axis=1), 1e4, rtol=1e-4)
    draws = model.get_normalized_expression(n_samples=3, return_mean=False, indices=[4, 1])
    assert draws.shape == (3, 2, adata.n_vars)
    assert not np.array_equal(draws[0], draws[1])  # drawn, never repeated
    draws = model.get_normalized_expression(
        n_samples=2, return_mean=False, library_size="latent", batch_size=64
    )
    depth = np.asarray(adata.X.sum(axis=1)).ravel()
    np.testing.assert_allclose(draws.sum(axis=2), [depth, depth], rtol=1e-4)
    overall = model.get_normalized_expression(n_samples_overall=7, batch_size=64)
    assert overall.shape == (7, adata.n_vars)
    np.testing.assert_allclose(overall.sum(axis=1), 1, rtol=1e-4)


def test_latent_library_size_gives_back_the_observed_depth(adata):
    model = train_small(adata)
    depth = model.get_normalized_expression(library_size="latent", return_numpy=True).sum(axis=1)
    np.testing.assert_allclose(depth, np.asarray(adata.X.sum(axis=1)).ravel(), rtol=1e-4)


def test_expression_stands_in_the_order_asked_for_across_minibatches(adata):
    model = train_small(adata)
    order = [7, 2, 2, 40, 0]
    found = model.get_normalized_expression(library_size="latent", indices=order, batch_size=2)
    assert list(found.index) == list(adata.obs_names[order])
    depth = np.asarray(adata.X.sum(axis=1)).ravel()[order]
    np.testing.assert_allclose(found.sum(axis=1), depth, rtol=1e-4)


def test_expression_in_half_precision_is_that_in_single_precision_rounded(adata):
    model = train_small(adata)
    arguments = {"library_size": 1e4, "return_numpy": True, "n_samples": 2}
    found = []
    for dtype in ("float32", "float16"):
        scvi.settings.seed = 0
        found.append(model.get_normalized_expression(**arguments, dtype=dtype))
    assert found[1].dtype == np.float16
    np.testing.assert_array_equal(found[0].astype(np.float16), found[1])


def test_gene_list_and_transform_batch(adata):
    model = train_small(adata, SETUP, train={"max_epochs": 4})
    genes = ["gene_5", "gene_2"]
    frame = model.get_normalized_expression(gene_list=genes)
    assert list(frame.columns) == ["gene_2", "gene_5"]  # in the order of the data
    as_first, as_second = (
        model.get_normalized_expression(transform_batch=b, return_numpy=True, n_samples=50)
        for b in ("batch_0", "batch_1")
    )
    both = model.get_normalized_expression(
        transform_batch=["batch_0", "batch_1"], return_numpy=True, n_samples=50
    )
    np.testing.assert_allclose(both, (as_first + as_second) / 2, rtol=0.3, atol=1e-3)
    assert not np.allclose(as_first, as_second, rtol=1e-3)


def test_shared_expression_comes_from_z_alone(adata):
    model = train_small(adata)
    with torch.no_grad():
        for p in model.module.decoder.parameters():
            p.zero_()
    uniform = model.get_normalized_expression(return_numpy=True)
    np.testing.assert_allclose(uniform, 1 / adata.n_vars, rtol=1e-4)
    assert model.get_shared_expression(return_numpy=True).std() > 1e-4


def test_loadings_are_the_weights_of_the_linear_decoder(adata):
    model = train_small(adata, model={"decoder": "linear", "n_latent": 3, "n_latent_specific": 2})
    loadings = model.get_loadings()
    assert list(loadings.columns) == ["z_0", "z_1", "z_2", "w_0", "w_1"]
    z, w = torch.zeros(2, 3), torch.zeros(2, 2)
    w[1, 0] = 1.0
    logits = model.module.decoder(torch.cat([z, w], 1), torch.zeros(2, 0).long(), None)
    difference = (logits[1] - logits[0]).detach().numpy()
    np.testing.assert_allclose(loadings["w_0"], difference, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"prior": "class_mean"}], ids=["learned", "class-mean"])
def test_a_round_trip_through_disk_changes_nothing(adata, tmp_path, options):
    model = train_small(adata, {"labels_key": "cell_type"}, options)
    model.save(str(tmp_path / "model"))
    loaded = DISCoVeR.load(str(tmp_path / "model"), adata.copy(), accelerator="cpu")
    for latent in ("z", "w"):
        before, after = (m.get_latent_representation(latent=latent) for m in (model, loaded))
        assert np.array_equal(before, after)
    source = adata[adata.obs["condition"] == "ctrl"].copy()
    predictions = [m.predict_counterfactual(source, to="treat_1").X for m in (model, loaded)]
    assert np.array_equal(*predictions)
    for name, tensor in model.module.adversary.state_dict().items():
        assert torch.equal(tensor, loaded.module.adversary.state_dict()[name])


def test_prediction_needs_no_training_data_after_loading(adata, tmp_path):
    model = train_small(adata, {"labels_key": "cell_type"})
    model.save(str(tmp_path / "model"))
    source = adata[adata.obs["condition"] == "ctrl"].copy()
    loaded = DISCoVeR.load(str(tmp_path / "model"), source.copy(), accelerator="cpu")
    expected = model.predict_counterfactual(source, to="treat_1")
    assert np.array_equal(loaded.predict_counterfactual(source, to="treat_1").X, expected.X)


def test_training_resumes_in_training_mode_and_history_goes_on(adata, tmp_path):
    model = train_small(adata)
    model.save(str(tmp_path / "model"))
    loaded = DISCoVeR.load(str(tmp_path / "model"), adata.copy(), accelerator="cpu")
    mean = loaded.module.encoders.activation[0].running_mean.clone()
    loaded.train(max_epochs=3, **QUIET)
    # in evaluation mode batch normalisation would stand still
    assert not torch.equal(mean, loaded.module.encoders.activation[0].running_mean)
    assert len(loaded.history["train_loss"]) == 5
    assert not loaded.module.training


def test_genes_in_another_order_are_reordered_and_missing_ones_refused(adata, tmp_path):
    model = train_small(adata)
    shuffled = adata[:, ::-1].copy()
    expected = model.get_latent_representation(adata.copy())
    assert np.array_equal(model.get_latent_representation(shuffled), expected)
    assert list(shuffled.var_names) == list(adata.var_names[::-1])  # the user's data stay
    model.save(str(tmp_path / "model"))
    loaded = DISCoVeR.load(str(tmp_path / "model"), shuffled, accelerator="cpu")
    assert np.array_equal(loaded.get_latent_representation(), expected)
    with pytest.raises(ValueError, match=r"1 genes of the model are missing.*gene_0"):
        model.get_latent_representation(adata[:, 1:].copy())


@pytest.mark.filterwarnings("ignore:Training will be faster when sparse matrix is formatted as CSR")
def test_dense_sparse_and_backed_data_give_the_same_latents(adata, tmp_path):
    latents = []
    adata.write_h5ad(tmp_path / "cells.h5ad")
    dense, csc = adata.copy(), adata.copy()
    dense.X, csc.X = adata.X.toarray(), adata.X.tocsc()
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    for data in (adata.copy(), dense, csc, backed):
        scvi.settings.seed = 0
        DISCoVeR.setup_anndata(data, condition_key="condition")
        model = DISCoVeR(data)
        # one minibatch of all cells, since a backed file is read in sorted order
        model.train(max_epochs=1, batch_size=400, train_size=1.0, **QUIET)
        latents.append(model.get_latent_representation())
    assert np.array_equal(latents[2], latents[0])
    np.testing.assert_allclose(latents[1], latents[0], rtol=1e-4, atol=1e-5)
    assert np.isfinite(latents[3]).all()  # its cells meet other draws of the latents
    chosen = model.get_latent_representation(indices=[7, 2, 5])
    np.testing.assert_allclose(chosen, latents[3][[7, 2, 5]], rtol=1e-4, atol=1e-5)


def test_a_layer_is_read_instead_of_x(adata):
    adata.layers["counts"] = adata.X.copy()
    adata.X = sp.csr_matrix(np.log1p(adata.X.toarray()))
    model = train_small(adata, {"layer": "counts"})
    source = adata[:20].copy()
    assert model.get_latent_representation(source).shape == (20, 10)


def test_a_view_works_and_its_parent_is_left_alone(adata):
    parent = adata.copy()
    view = parent[:200]
    DISCoVeR.setup_anndata(view, condition_key="condition")
    DISCoVeR(view).train(max_epochs=1, **QUIET)
    assert list(parent.obs.columns) == list(adata.obs.columns)
    assert not parent.uns.get("_scvi_uuid")


def test_setup_and_training_leave_counts_and_columns_as_they_were(adata):
    before = adata.copy()
    DISCoVeR.setup_anndata(adata, condition_key="condition")
    DISCoVeR(adata).train(max_epochs=1, **QUIET)
    assert (adata.X != before.X).nnz == 0
    pd.testing.assert_frame_equal(adata.obs[before.obs.columns], before.obs)


def test_repr_says_what_the_model_is(adata):
    model = train_small(adata)
    assert "300 cells x 60 genes" in repr(model)
    assert "['ctrl', 'treat_1']" in repr(model)
    assert "trained: True" in repr(model)


def test_the_default_length_counts_steps(simulated, trained):
    n_train = len(trained.train_indices)
    steps_per_epoch = -(-n_train // 128)
    n_epochs = len(trained.history["train_loss"])
    assert (n_epochs - 1) * steps_per_epoch < 2000 <= n_epochs * steps_per_epoch


# ------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gene_likelihood": "nbinom"}, r"gene_likelihood is 'nbinom'; it must be one of"),
        ({"dispersion": "cell"}, r"dispersion is 'cell'; it must be one of"),
        ({"prior": "class_mean", "n_latent_specific": 3}, "needs them equal"),
        ({"invariance": "conditional"}, "no labels are registered"),
    ],
)
def test_options_that_cannot_be_are_refused(adata, options, message):
    DISCoVeR.setup_anndata(adata, condition_key="condition")
    with pytest.raises(ValueError, match=message):
        DISCoVeR(adata, **options)


def test_log_data_are_refused_with_the_way_to_use_them(adata):
    adata.X = sp.csr_matrix(np.log1p(adata.X.toarray()))
    DISCoVeR.setup_anndata(adata, condition_key="condition")
    with pytest.raises(ValueError, match=r"adata.X holds values that are not integers.*'normal'"):
        DISCoVeR(adata)


def test_size_factors_must_be_positive(adata):
    adata.obs["factor"] = 0.0
    with pytest.raises(ValueError, match=r"size_factor_key.*goes down to 0; size factors"):
        DISCoVeR.setup_anndata(adata, "condition", size_factor_key="factor")


def test_an_untrained_model_refuses_to_answer(adata):
    DISCoVeR.setup_anndata(adata, condition_key="condition")
    with pytest.raises(RuntimeError, match=r"Call model.train\(\) first"):
        DISCoVeR(adata).get_latent_representation()


@pytest.mark.parametrize("use", ["latents", "load"])
def test_conditions_that_the_model_does_not_know_are_refused(adata, tmp_path, use):
    model = train_small(adata)
    other = simulate(60, 60, n_conditions=3, seed=2)
    message = r"Levels \['treat_2'\] .* not known to the model; known are \['ctrl', 'treat_1'\]"
    model.save(str(tmp_path / "model"))
    call = {
        "latents": model.get_latent_representation,
        "load": lambda cells: DISCoVeR.load(str(tmp_path / "model"), cells),
    }[use]
    with pytest.raises(ValueError, match=message):
        call(other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.get_latent_representation(latent="x"), "latent is 'x'; it must be 'z'"),
        (lambda m: m.get_normalized_expression(gene_list=["G"]), r"gene_list holds \['G'\]"),
        (
            lambda m: m.get_normalized_expression(dtype="int8"),
            "dtype is 'int8'; it must",
        ),
        (
            lambda m: m.get_normalized_expression(dtype="float16", library_size=1e9),
            r"reaches .*; dtype='float16' holds at most 65504. Choose a smaller library_size",
        ),
        (lambda m: m.get_normalized_expression(transform_batch="b"), "registered batches are"),
        (lambda m: m.get_normalized_expression(transform_batch=[]), "transform_batch is empty"),
        (lambda m: m.get_normalized_expression(gene_list=[]), "gene_list is empty; name genes"),
        (lambda m: m.get_shared_expression(n_samples=0), "n_samples is 0; at least one draw"),
        (
            lambda m: m.get_shared_expression(n_samples_overall=0),
            "n_samples_overall is 0; at least one draw",
        ),
        (lambda m: m.get_normalized_expression(library_size=0), "library_size is 0; it is pos"),
        (lambda m: m.get_normalized_expression(library_size="own"), "library_size is 'own'; it"),
        (lambda m: m.get_loadings(), "decoder is 'nonlinear' and has no loadings"),
    ],
)
def test_calls_that_cannot_be_answered_say_why(adata, call, message):
    with pytest.raises(ValueError, match=message):
        call(train_small(adata))
