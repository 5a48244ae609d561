import anndata as ad
import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp
import torch
from fitting import QUIET, train_small
from sklearn.metrics import r2_score

from discover_sc import DISCoVeR
from discover_sc.evaluation import log_mean_profile

# most tests ask for a group that was never seen treated
pytestmark = pytest.mark.filterwarnings("ignore:The median support")


@pytest.fixture(scope="module")
def source(simulated):
    _, training, _ = simulated
    held_out = (training.obs["cell_type"] == "type_0") & (training.obs["condition"] == "ctrl")
    return training[held_out.to_numpy()].copy()


def test_the_prediction_has_the_same_cells_and_genes_and_says_what_was_done(trained, source):
    predicted = trained.predict_counterfactual(source, to="treat_1", n_samples=5, seed=4)
    assert list(predicted.obs_names) == list(source.obs_names)
    assert list(predicted.var_names) == list(source.var_names)
    assert set(predicted.obs["condition"]) == {"treat_1"}
    assert set(predicted.obs["condition_source"]) == {"ctrl"}
    assert predicted.obsm["X_discover_w"].shape == (source.n_obs, 10)
    done = predicted.uns["discover_counterfactual"]
    assert done["to"] == {"condition": "treat_1"}
    assert done["sources"] == ["ctrl"]
    assert done["ways"] == ["abduction + neighbors + groups"]
    assert (done["seed"], done["n_samples"]) == (4, 5)
    assert not [name for name in predicted.obs if name.startswith("_scvi")]


def test_rows_sum_to_the_library_size_whatever_it_is(trained, source):
    small, large = (
        trained.predict_counterfactual(source, to="treat_1", library_size=size)
        for size in (500.0, 2000.0)
    )
    np.testing.assert_allclose(small.X.sum(axis=1), 500.0, rtol=1e-4)
    for values in ("X", "lower", "upper"):
        a, b = (p.X if values == "X" else p.layers[values] for p in (small, large))
        np.testing.assert_allclose(4 * a, b, rtol=1e-4, atol=1e-4)


def test_intervals_cover_what_was_observed_of_the_held_out_group(trained, simulated, source):
    """Nominal 90 %: of single cells, each gene on its own, and of the group's mean profile."""
    predicted = trained.predict_counterfactual(source, to="treat_1")
    hidden = simulated[2].X.toarray()
    observed = hidden / hidden.sum(1, keepdims=True) * 1e4
    lower, upper = (np.median(predicted.layers[k], axis=0) for k in ("lower", "upper"))
    expressed = observed.mean(0) > 20  # of rare genes nearly every cell counts zero
    inside = (observed >= lower) & (observed <= upper)
    assert 0.8 < inside[:, expressed].mean() < 0.98
    profile = log_mean_profile(hidden)
    bounds = [predicted.varm[f"discover_mean_{k}"]["type_0"] for k in ("lower", "upper")]
    assert 0.8 < ((profile >= bounds[0]) & (profile <= bounds[1])).mean() < 0.99


def test_the_mean_over_predicted_cells_is_the_profile_that_is_reported(trained, source):
    predicted = trained.predict_counterfactual(source, to="treat_1", n_samples=50)
    reported = predicted.varm["discover_mean"]["type_0"]
    np.testing.assert_allclose(log_mean_profile(predicted.X), reported, atol=1e-3)


def test_the_choice_and_its_cross_validated_scores_are_kept_with_the_model(
    trained, source, tmp_path
):
    trained.predict_counterfactual(source, to="treat_1", n_samples=2)
    choice = trained.counterfactual_choice_["ctrl"]
    assert choice["n_groups"] == 3  # type_0 was never seen treated
    scores = choice["lfc_r2_by_power"]
    assert choice["power"] == max(scores, key=scores.get)
    assert 0 < choice["mean_weight_of_observed_changes"] < 1
    trained.save(tmp_path / "model", save_anndata=True)
    assert DISCoVeR.load(tmp_path / "model").counterfactual_choice_ == {"ctrl": choice}


@pytest.mark.filterwarnings("ignore:.* already; asked about the condition")
def test_each_group_and_source_condition_has_a_profile_of_its_own(trained, simulated):
    _, training, _ = simulated
    predicted = trained.predict_counterfactual(training[:200].copy(), to="treat_1", n_samples=2)
    names = list(predicted.varm["discover_mean"].columns)
    assert {"type_1 from ctrl", "type_1 from treat_1"} <= set(names)
    assert "type_0 from treat_1" not in names  # no such cells


def test_a_group_that_was_never_seen_treated_has_low_support_and_warns(trained, simulated, source):
    _, training, _ = simulated
    with pytest.warns(UserWarning, match="median support of the source cells"):
        low = trained.predict_counterfactual(source, to="treat_1", n_samples=2).obs["support"]
    seen = (training.obs["cell_type"] == "type_1") & (training.obs["condition"] == "ctrl")
    known = training[seen.to_numpy()].copy()
    high = trained.predict_counterfactual(known, to="treat_1", n_samples=2).obs["support"]
    assert low.between(0, 1).all()
    assert low.mean() < 0.1 < 0.3 < high.mean()


def test_a_group_that_was_seen_treated_is_predicted_as_it_was_observed(trained, simulated):
    _, training, _ = simulated
    known = training[(training.obs["cell_type"] == "type_1").to_numpy()]
    control, treated = (
        known[(known.obs["condition"] == c).to_numpy()] for c in ("ctrl", "treat_1")
    )
    predicted = log_mean_profile(trained.predict_counterfactual(control.copy(), to="treat_1").X)
    true, base = log_mean_profile(treated.X), log_mean_profile(control.X)
    assert r2_score(true - base, predicted - base) > 0.85


def test_values_are_moved_by_adding_where_the_likelihood_is_normal(simulated):
    """Log-normalised data: no library, and profiles are plain means."""
    _, training, _ = simulated
    logged = training.copy()
    sc.pp.normalize_total(logged, target_sum=1e4)
    sc.pp.log1p(logged)
    model = train_small(
        logged, {"labels_key": "cell_type"}, {"gene_likelihood": "normal"}, {"max_epochs": 120}
    )
    known = logged[(logged.obs["cell_type"] == "type_1").to_numpy()]
    control, treated = (
        known[(known.obs["condition"] == c).to_numpy()] for c in ("ctrl", "treat_1")
    )
    predicted = model.predict_counterfactual(control.copy(), to="treat_1")
    true, base = (np.asarray(side.X.mean(0)).ravel() for side in (treated, control))
    assert r2_score(true - base, predicted.X.mean(0) - base) > 0.7
    np.testing.assert_allclose(
        predicted.X.mean(0), predicted.varm["discover_mean"]["type_1"], atol=1e-5
    )


def test_a_wider_interval_is_wider(trained, source):
    widths = [
        np.mean(p.layers["upper"] - p.layers["lower"])
        for p in (
            trained.predict_counterfactual(source, to="treat_1", interval=i) for i in (0.5, 0.95)
        )
    ]
    assert widths[1] > 1.5 * widths[0]


def test_counts_are_a_draw_at_the_cells_own_library_size(trained, source):
    counts = trained.predict_counterfactual(source, to="treat_1").layers["counts"]
    assert sp.issparse(counts)
    assert (counts.data == np.round(counts.data)).all()
    drawn, own = (np.asarray(m.sum(axis=1)).ravel() for m in (counts, source.X))
    assert np.corrcoef(drawn, own)[0, 1] > 0.9
    assert drawn.mean() == pytest.approx(own.mean(), rel=0.1)


def test_the_library_size_changes_as_in_groups_that_were_seen_under_both(simulated):
    """Treated cells have twice the counts of others; so would have those that are predicted."""
    _, training, _ = simulated
    deeper = training.copy()
    factor = np.where(deeper.obs["condition"] == "treat_1", 2.0, 1.0)
    deeper.X = sp.diags(factor).dot(deeper.X).astype(np.float32).tocsr()
    model = train_small(deeper, {"labels_key": "cell_type"}, train={"max_epochs": 40})
    is_source = (deeper.obs["cell_type"] == "type_0") & (deeper.obs["condition"] == "ctrl")
    source = deeper[is_source.to_numpy()].copy()
    predicted = model.predict_counterfactual(source, to="treat_1", n_samples=5)
    drawn, own = (np.asarray(m.sum(axis=1)).ravel() for m in (predicted.layers["counts"], source.X))
    assert np.median(drawn) == pytest.approx(2 * np.median(own), rel=0.1)
    np.testing.assert_allclose(predicted.X.sum(axis=1), 1e4, rtol=1e-4)


def test_the_same_seed_gives_the_same_prediction_and_leaves_the_global_state_alone(trained, source):
    state = torch.get_rng_state()
    first = trained.predict_counterfactual(source, to="treat_1", seed=1)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    second = trained.predict_counterfactual(source, to="treat_1", seed=1)
    other = trained.predict_counterfactual(source, to="treat_1", seed=2)
    assert np.array_equal(first.X, second.X)
    assert (first.layers["counts"] != second.layers["counts"]).nnz == 0
    assert not np.array_equal(first.X, other.X)


@pytest.mark.parametrize("method", ["auto", "shift", "abduction", "neighbors", "groups", "linear"])
def test_planted_genes_move_as_planted_and_others_do_not(trained, simulated, source, method):
    """type_0 was never seen treated; its true effect is known from the simulation."""
    full, _, _ = simulated
    truth = full.uns["type_effects"]["treat_1"][0]
    with pytest.warns(UserWarning, match="are under"):
        base = trained.predict_counterfactual(source, to="ctrl", method=method)
    predicted = trained.predict_counterfactual(source, to="treat_1", method=method)
    change = np.log(predicted.X.mean(axis=0) + 0.5) - np.log(base.X.mean(axis=0) + 0.5)
    expressed = base.X.mean(axis=0) > 10
    moved = expressed & (np.abs(full.varm["common_effect"][:, 1]) > 0.5)
    still = expressed & (full.uns["type_effects"]["treat_1"] == 0).all(axis=0)
    assert moved.sum() > 8
    assert (np.sign(change[moved]) == np.sign(truth[moved])).mean() > 0.9
    assert np.abs(change[still]).mean() < 0.35 * np.abs(change[moved]).mean()


def test_treated_cells_of_the_held_out_group_are_never_seen(simulated):
    """Noise in the place of the held-out cells changes no prediction by one bit."""
    full, training, hidden = simulated
    predictions = []
    for seed in (0, 1):
        noisy = full.copy()
        x = noisy.X.toarray()
        rows = noisy.obs_names.isin(hidden.obs_names)
        x[rows] = np.random.default_rng(seed).poisson(3.0, x[rows].shape)
        noisy.X = sp.csr_matrix(x)
        kept = noisy[training.obs_names].copy()
        torch.manual_seed(0)
        model = train_small(kept, {"labels_key": "cell_type"}, train={"max_epochs": 2})
        source = kept[(kept.obs["cell_type"] == "type_0").to_numpy()].copy()
        predictions.append(model.predict_counterfactual(source, to="treat_1").X)
    assert np.array_equal(*predictions)


def test_minibatches_bound_memory_and_do_not_change_the_expectation(trained, source):
    by_size = [
        trained.predict_counterfactual(source, to="treat_1", n_samples=200, batch_size=b).X
        for b in (16, 512)
    ]
    np.testing.assert_allclose(by_size[0].mean(0), by_size[1].mean(0), rtol=0.05, atol=0.5)


def test_views_work_and_the_source_is_left_alone(trained, simulated):
    _, training, _ = simulated
    view = training[(training.obs["condition"] == "ctrl").to_numpy()]
    before = view.X.copy()
    trained.predict_counterfactual(view, to="treat_1", n_samples=2)
    assert view.is_view
    assert (view.X != before).nnz == 0


def test_without_labels_clusters_of_z_serve(simulated, source):
    _, training, _ = simulated
    model = train_small(training, train={"max_epochs": 20})
    predicted = model.predict_counterfactual(source, to="treat_1", method="shift", n_samples=2)
    assert np.isfinite(predicted.X).all()
    centers = model.reference_["cluster_centers"]
    assert set(model.reference_["groups"]) == {f"cluster_{k}" for k in range(len(centers))}


def test_source_cells_of_several_conditions_are_each_moved_from_their_own(trained, simulated):
    _, training, _ = simulated
    mixed = training[:200].copy()
    n_treated = (mixed.obs["condition"] == "treat_1").sum()
    message = rf"{n_treated} of 200 cells are under \['treat_1'\] already; .* not as a prediction"
    with pytest.warns(UserWarning, match=message):
        predicted = trained.predict_counterfactual(mixed, to="treat_1", n_samples=2)
    assert predicted.uns["discover_counterfactual"]["sources"] == ["ctrl", "treat_1"]
    assert list(predicted.obs["condition_source"]) == list(mixed.obs["condition"])
    alone = mixed[(mixed.obs["condition"] == "ctrl").to_numpy()].copy()
    expected = trained.predict_counterfactual(alone, to="treat_1", n_samples=2)
    got = predicted[expected.obs_names].obsm["X_discover_w"]
    np.testing.assert_allclose(got, expected.obsm["X_discover_w"], rtol=1e-4, atol=1e-4)


def test_a_class_mean_prior_predicts_with_neighbors_and_groups(adata):
    model = train_small(adata, model={"prior": "class_mean"})
    source = adata[adata.obs["condition"] == "ctrl"].copy()
    predicted = model.predict_counterfactual(source, to="treat_1", n_samples=2)
    assert predicted.uns["discover_counterfactual"]["ways"] == ["neighbors + groups"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "treat_9"}, r"Condition 'treat_9' of 'condition' is not known; known are \['ctrl'"),
        ({"to": {"dose": "high"}}, r"to names the key 'dose'; condition keys are \['condition'\]"),
        ({"to": {}}, "to is empty; name a level"),
        ({"to": "treat_1", "method": "magic"}, "method is 'magic'; methods are"),
        ({"to": "treat_1", "n_samples": 1}, "n_samples is 1; an interval needs at least 2"),
        ({"to": "treat_1", "interval": 1.0}, "interval is 1.0; it is a coverage between"),
        ({"to": "treat_1", "library_size": 0}, "library_size is 0; it must be positive"),
    ],
)
def test_what_cannot_be_predicted_is_refused(trained, source, arguments, message):
    with pytest.raises(ValueError, match=message):
        trained.predict_counterfactual(source, **arguments)


def test_an_empty_selection_is_refused(trained, source):
    with pytest.raises(ValueError, match="0 cells and 200 genes: the selection is empty"):
        trained.predict_counterfactual(source[:0].copy(), to="treat_1")


def test_several_keys_need_to_be_named(adata):
    adata.obs["dose"] = np.where(np.arange(adata.n_obs) % 3 == 0, "low", "high")
    model = train_small(adata, {"condition_key": ["condition", "dose"]})
    with pytest.raises(ValueError, match=r"several condition keys, \['condition', 'dose'\]"):
        model.predict_counterfactual(adata.copy(), to="treat_1")


def test_an_untrained_model_does_not_predict(adata):
    DISCoVeR.setup_anndata(adata, condition_key="condition")
    model = DISCoVeR(adata)
    with pytest.raises(RuntimeError, match="has not been trained"):
        model.predict_counterfactual(adata, to="treat_1")
    model.train(max_epochs=1, **QUIET)
    source = adata[(adata.obs["condition"] == "ctrl").to_numpy()].copy()
    assert model.predict_counterfactual(source, to="treat_1", n_samples=2).n_obs == source.n_obs


def test_a_combination_without_cells_is_refused_but_the_prior_can_be_asked(adata):
    adata.obs["dose"] = np.where(adata.obs["condition"] == "ctrl", "none", "high")
    adata.obs.loc[adata.obs_names[::3], "dose"] = "low"
    kept = adata[~((adata.obs["condition"] == "treat_1") & (adata.obs["dose"] == "low"))].copy()
    model = train_small(kept, {"condition_key": ["condition", "dose"]})
    source = kept[(kept.obs["condition"] == "ctrl").to_numpy()].copy()
    to = {"condition": "treat_1", "dose": "low"}
    with pytest.raises(ValueError, match=r"no cell under \['treat_1', 'low'\].*'abduction'"):
        model.predict_counterfactual(source, to=to, method="shift")
    predicted = model.predict_counterfactual(source, to=to, method="abduction", n_samples=2)
    assert np.isfinite(predicted.X).all()


def test_a_view_of_a_backed_file_can_be_predicted(adata, tmp_path):
    model = train_small(adata)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    chosen = (adata.obs["condition"] == "ctrl").to_numpy()
    predicted = model.predict_counterfactual(backed[chosen], to="treat_1", n_samples=2)
    expected = model.predict_counterfactual(adata[chosen].copy(), to="treat_1", n_samples=2)
    np.testing.assert_allclose(predicted.X, expected.X, rtol=1e-5)
