"""Cells that the model did not see, and trainings that did not end."""

import lightning.pytorch as pl
import numpy as np
import pytest
import scipy.sparse as sp
import scvi
from fitting import QUIET, train_small

from discover_sc import DISCoVeR


def controls(adata):
    return adata[(adata.obs["condition"] == "ctrl").to_numpy()].copy()


class _Interrupt(pl.Callback):
    def on_train_batch_end(self, *args):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        ({"plan_kwargs": {"warmup": 1}}, TypeError),
        ({"callbacks": [_Interrupt()]}, (KeyboardInterrupt, SystemExit)),
    ],
    ids=["wrong-argument", "interrupted"],
)
def test_a_training_that_fails_leaves_the_model_in_evaluation_mode(adata, broken, error):
    """It went on with dropout and batch statistics, and latents differed from call to call."""
    model = train_small(adata)
    before = model.get_latent_representation()
    with pytest.raises(error):
        model.train(max_epochs=2, **broken, **QUIET)
    first, second = (model.get_latent_representation() for _ in range(2))
    assert np.array_equal(first, second)
    if error is TypeError:
        assert np.array_equal(first, before)
    assert model.predict_counterfactual(controls(adata), to="treat_1", n_samples=2).n_obs > 0


@pytest.mark.parametrize("method", ["auto", "shift", "neighbors", "groups", "linear"])
def test_cells_held_out_by_external_indexing_never_reach_a_prediction(simulated, method):
    full, _, hidden = simulated
    small = full[::3].copy()
    test = np.flatnonzero(small.obs_names.isin(hidden.obs_names))
    rest = np.setdiff1d(np.arange(small.n_obs), test)
    split = {"external_indexing": [rest[20:], rest[:20], test]}
    predictions = []
    for scramble in (False, True):
        cells = small.copy()
        if scramble:
            x = cells.X.toarray()
            x[test] = x[test][:, ::-1]
            cells.X = sp.csr_matrix(x)
        scvi.settings.seed = 0
        setup = {"labels_key": "cell_type"}
        model = train_small(cells, setup, train={"datasplitter_kwargs": split})
        source = controls(cells)[:40].copy()
        predicted = model.predict_counterfactual(source, to="treat_1", method=method, n_samples=2)
        predictions.append(predicted.X)
    assert np.array_equal(*predictions)


def test_a_cell_type_that_was_never_seen_can_be_encoded_and_predicted(adata, tmp_path):
    model = train_small(adata, {"labels_key": "cell_type"})
    new = controls(adata)
    expected = model.get_latent_representation(new)
    new.obs["cell_type"] = "brand new"
    assert np.array_equal(model.get_latent_representation(new), expected)
    assert np.isfinite(model.predict_counterfactual(new, to="treat_1", n_samples=2).X).all()
    model.save(str(tmp_path / "model"))
    loaded = DISCoVeR.load(str(tmp_path / "model"), new, accelerator="cpu")
    assert np.array_equal(loaded.get_latent_representation(), expected)


def test_new_labels_cannot_replace_those_of_a_conditional_model(adata, tmp_path):
    model = train_small(adata, {"labels_key": "cell_type"}, {"invariance": "conditional"})
    model.save(str(tmp_path / "model"))
    new = controls(adata)
    new.obs["cell_type"] = "brand new"
    with pytest.raises(ValueError, match=r"labels that the model, trained with invariance="):
        DISCoVeR.load(str(tmp_path / "model"), new, accelerator="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"age": np.nan}, r"'age'\] is missing \(NaN\)"),
        ({"age": np.inf}, r"'age'\] holds values that are infinite"),
        ({"factor": 0.0}, r"goes down to 0; size factors are positive"),
        ({"batch": "batch_9"}, r"Levels \['batch_9'\] of adata.obs\['batch'\] are not known"),
        ({"chip": "c"}, r"Levels \['c'\] of adata.obs\['chip'\] are not known"),
    ],
)
def test_columns_of_new_cells_are_checked_like_those_of_the_first(adata, change, message):
    adata.obs["chip"] = np.where(np.arange(adata.n_obs) % 2 == 0, "a", "b")
    adata.obs["age"] = np.linspace(-1, 1, adata.n_obs)
    adata.obs["factor"] = 1.0
    setup = {
        "batch_key": "batch",
        "size_factor_key": "factor",
        "categorical_covariate_keys": ["chip"],
        "continuous_covariate_keys": ["age"],
    }
    model = train_small(adata, setup)
    new = controls(adata)
    for column, value in change.items():
        new.obs[column] = value
    with pytest.raises(ValueError, match=message):
        model.get_normalized_expression(new)


def test_a_missing_label_column_is_named(adata):
    model = train_small(adata, {"labels_key": "cell_type"})
    new = controls(adata)
    del new.obs["cell_type"]
    with pytest.raises(KeyError, match="labels_key: 'cell_type' is not a column"):
        model.get_latent_representation(new)


def test_relabelled_cells_are_read_anew(adata):
    model = train_small(adata)
    new = controls(adata)
    before = model.get_latent_representation(new, latent="w")
    new.obs["condition"] = "treat_1"
    after = model.get_latent_representation(new, latent="w")
    assert not np.array_equal(before, after)


@pytest.mark.parametrize("levels", [(0, 1), (False, True), ("PBS/0h", "drug/24h")], ids=str)
def test_levels_keep_their_type_and_predictions_can_be_saved_and_fed_back(adata, tmp_path, levels):
    adata.obs["condition"] = np.where(adata.obs["condition"] == "ctrl", *levels)
    model = train_small(adata)
    source = adata[(adata.obs["condition"] == levels[0]).to_numpy()].copy()
    predicted = model.predict_counterfactual(source, to=str(levels[1]), n_samples=2)
    assert set(predicted.obs["condition"]) == {levels[1]}
    predicted.write_h5ad(tmp_path / "predicted.h5ad")
    predicted.X = predicted.layers["counts"]
    filled = predicted[np.asarray(predicted.X.sum(axis=1)).ravel() > 0].copy()
    assert model.get_latent_representation(filled).shape == (filled.n_obs, 10)


def test_a_column_of_the_users_is_not_overwritten(adata):
    model = train_small(adata)
    source = controls(adata)
    source.obs["condition_source"] = "mine"
    with pytest.raises(ValueError, match="column condition_source, which the prediction would"):
        model.predict_counterfactual(source, to="treat_1", n_samples=2)


def test_predictions_from_views_keep_nothing_alive(adata):
    model = train_small(adata)
    kept = len(model._per_instance_manager_store[model.id])
    for _ in range(3):
        view = adata[(adata.obs["condition"] == "ctrl").to_numpy()]
        model.predict_counterfactual(view, to="treat_1", n_samples=2)
    assert len(model._per_instance_manager_store[model.id]) == kept


def test_a_last_minibatch_of_one_cell_does_not_end_training(adata):
    model = train_small(adata, train={"train_size": 1.0, "batch_size": 299})
    assert model.is_trained


def test_a_single_callback_needs_no_list(adata):
    timer = pl.callbacks.Timer()
    model = train_small(adata, train={"callbacks": timer})
    assert timer in model.trainer.callbacks


def test_a_condition_cannot_be_batch_or_covariate_too(adata):
    with pytest.raises(ValueError, match=r"\['condition'\] are condition keys and batch"):
        DISCoVeR.setup_anndata(adata, "condition", batch_key="condition")


def test_the_same_condition_key_twice_is_refused(adata):
    with pytest.raises(ValueError, match="or several that differ"):
        DISCoVeR.setup_anndata(adata, ["condition", "condition"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_latent": 0}, "n_latent is 0; it must be at least 1"),
        ({"n_latent_specific": 0}, "n_latent_specific is 0; it must be at least 1"),
        ({"adversarial_weight": -5.0}, "adversarial_weight is -5.0; weights are 0 or positive"),
        ({"dropout_rate": 1.0}, r"dropout_rate is 1.0; it must lie in \[0, 1\)"),
    ],
)
def test_numbers_out_of_range_are_refused(adata, options, message):
    DISCoVeR.setup_anndata(adata, condition_key="condition")
    with pytest.raises(ValueError, match=message):
        DISCoVeR(adata, **options)


def test_a_mask_of_the_wrong_length_is_refused(adata):
    with pytest.raises(ValueError, match="indices is a mask of 10 and there are 300 cells"):
        train_small(adata).get_latent_representation(indices=np.ones(10, dtype=bool))


def test_the_reference_keeps_every_group_of_large_data(adata, monkeypatch):
    monkeypatch.setattr("discover_sc._reference._MAX_GROUP_CELLS", 10)
    model = train_small(adata, {"labels_key": "cell_type"})
    codes = model.reference_["condition_codes"].ravel()
    _, counts = np.unique(
        np.stack([codes.astype(str), model.reference_["groups"]]), axis=1, return_counts=True
    )
    assert counts.tolist() == [10] * 6  # two conditions of three types
