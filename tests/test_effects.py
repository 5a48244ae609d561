import numpy as np
import pytest
import scipy.sparse as sp
import torch
from fitting import train_small
from sklearn.metrics import roc_auc_score

from discover_sc import DISCoVeR, TreatmentEffect
from discover_sc._sham import Pool
from discover_sc.data import simulate


def controls(adata):
    return adata[(adata.obs["condition"] == "ctrl").to_numpy()].copy()


@pytest.fixture(scope="module")
def with_resting_type():
    """Cells of four types, of which type_3 does not respond, and a model of them."""
    adata = simulate(1000, 200, effect_scale=1.5, unresponsive=["type_3"], seed=2)
    return adata, train_small(adata, {"labels_key": "cell_type"}, train={"max_epochs": None})


@pytest.fixture(scope="module")
def effect(with_resting_type):
    adata, model = with_resting_type
    return model.treatment_effect(controls(adata), to="treat_1", from_="ctrl", by_group=True)


def true_lfc(adata, name):
    """Log2 fold change of the mean fractions of a type's control cells, from the simulation."""
    cells = ((adata.obs["cell_type"] == name) & (adata.obs["condition"] == "ctrl")).to_numpy()
    shared = adata.layers["shared_expression"][cells].astype(float)
    treated = shared * np.exp(adata.uns["type_effects"]["treat_1"][int(name[-1])])
    treated /= treated.sum(axis=1, keepdims=True)
    return np.log2((1e4 * treated.mean(axis=0) + 0.1) / (1e4 * shared.mean(axis=0) + 0.1))


# ------------------------------------------------------------------------ planted truth


@pytest.mark.parametrize("name", ["type_0", "type_1", "type_2"])
def test_planted_genes_come_first(with_resting_type, effect, name):
    adata, _ = with_resting_type
    truth = true_lfc(adata, name)
    genes = effect.genes[effect.genes["group"] == name].set_index("gene").loc[adata.var_names]
    assert roc_auc_score(np.abs(truth) > 0.25, genes["probability"]) > 0.85
    assert np.corrcoef(truth, genes["lfc"])[0, 1] > 0.85
    called = (genes["fdr"] < 0.05).to_numpy()
    assert called.sum() > 15
    assert (np.abs(truth[called]) > 0.25).mean() > 0.7


def test_cells_that_respond_are_told_from_those_that_do_not(effect):
    cells = effect.cells.groupby("group")[["responder_score", "p_value"]].mean()
    assert (cells.loc[["type_0", "type_1", "type_2"], "responder_score"] > 0.9).all()
    assert (cells.loc[["type_0", "type_1", "type_2"], "p_value"] < 0.01).all()
    assert cells.loc["type_3", "responder_score"] < 0.5
    assert cells.loc["type_3", "p_value"] > 0.1
    expression = effect.cells.groupby("group")["effect_expression"].mean()
    assert expression["type_3"] < 0.4 * expression.drop("type_3").min()


def test_no_gene_of_a_group_that_does_not_respond_is_called(effect):
    genes = effect.genes[effect.genes["group"] == "type_3"]
    assert (genes["fdr"] < 0.05).sum() <= 3


def test_control_against_control_finds_responders_at_the_nominal_rate_and_no_gene(
    with_resting_type,
):
    adata, model = with_resting_type
    source = controls(adata)
    shams = [
        model.treatment_effect(source, to="ctrl", from_="ctrl", by_group=True, seed=seed)
        for seed in range(6)
    ]
    rate = np.mean([(sham.cells["p_value"] < 0.05).mean() for sham in shams])
    assert 0.02 < rate < 0.09  # cells share the way, so that one sham alone scatters widely
    assert np.mean([sham.cells["p_value"].mean() for sham in shams]) == pytest.approx(0.5, abs=0.1)
    assert max((sham.cells["fdr"] < 0.05).mean() for sham in shams) < 0.02
    assert max((sham.genes["fdr"] < 0.05).sum() for sham in shams) == 0


def test_interferon_genes_rise_in_every_cell_type(kang_data):
    model = train_small(kang_data, {"labels_key": "cell_type"}, train={"max_epochs": 40})
    effect = model.treatment_effect(controls(kang_data), to="stim", from_="ctrl", by_group=True)
    for _, genes in effect.genes.groupby("group"):
        known = genes.set_index("gene").loc[["ISG15", "IFI6", "ISG20", "CXCL10"]]
        assert (known["lfc"] > 1).all()
        assert (known["fdr"] < 0.05).all()
    assert (effect.cells["fdr"] < 0.05).mean() > 0.95


# ------------------------------------------------------------------- what comes back


def test_tables_have_a_row_per_source_cell_and_per_group_and_gene(with_resting_type, effect):
    adata, _ = with_resting_type
    source = controls(adata)
    assert isinstance(effect, TreatmentEffect)
    assert list(effect.cells.index) == list(source.obs_names)
    assert list(effect.cells["group"]) == list(source.obs["cell_type"])
    assert len(effect.genes) == 4 * adata.n_vars
    assert (
        effect.genes.groupby("group")["probability"]
        .apply(lambda p: (p.diff() <= 0).sum())
        .eq(adata.n_vars - 1)
        .all()
    )


def test_means_agree_with_the_cells_before_and_the_prediction_after(with_resting_type, effect):
    adata, model = with_resting_type
    source = controls(adata)
    before = model.get_normalized_expression(source, library_size=1e4, n_samples=20)
    after = model.predict_counterfactual(source, to="treat_1", method="neighbors")
    for name in ("type_0", "type_3"):
        cells = (source.obs["cell_type"] == name).to_numpy()
        genes = effect.genes[effect.genes["group"] == name].set_index("gene").loc[adata.var_names]
        np.testing.assert_allclose(genes["mean_before"], before[cells].mean(), rtol=0.05, atol=0.2)
        np.testing.assert_allclose(genes["mean_after"], after.X[cells].mean(0), rtol=0.1, atol=0.5)


def test_effect_on_w_is_the_distance_of_the_predicted_w(with_resting_type, effect):
    adata, model = with_resting_type
    source = controls(adata)
    predicted = model.predict_counterfactual(source, to="treat_1", method="neighbors", n_samples=2)
    own = model.get_latent_representation(source, latent="w")
    distance = np.linalg.norm(predicted.obsm["X_discover_w"] - own, axis=1)
    np.testing.assert_allclose(effect.cells["effect_w"], distance, rtol=1e-4)


def test_minibatches_and_the_order_of_cells_change_no_effect(with_resting_type, effect):
    adata, model = with_resting_type
    source = controls(adata)[::-1].copy()
    again = model.treatment_effect(
        source, to="treat_1", from_="ctrl", n_samples=2, n_sham=2, batch_size=50
    )
    columns = ["effect_w", "effect_expression"]
    expected = effect.cells.loc[source.obs_names, columns]
    np.testing.assert_allclose(again.cells[columns], expected, rtol=1e-3)


def test_the_same_seed_gives_the_same_tables_and_leaves_the_global_state_alone(with_resting_type):
    adata, model = with_resting_type
    source = controls(adata)[:60].copy()
    few = {"to": "treat_1", "from_": "ctrl", "n_samples": 3, "n_sham": 3}
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = model.treatment_effect(source, **few, seed=1)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002
    torch.manual_seed(99)
    second = model.treatment_effect(source, **few, seed=1)
    other = model.treatment_effect(source, **few, seed=2)
    assert first.cells.equals(second.cells)
    assert first.genes.equals(second.genes)
    assert not first.genes["lfc"].equals(other.genes["lfc"])


def test_the_source_is_left_alone_and_views_work(with_resting_type):
    adata, model = with_resting_type
    view = adata[(adata.obs["condition"] == "ctrl").to_numpy()][:60]
    before = view.copy()
    model.treatment_effect(view, to="treat_1", from_="ctrl", n_samples=2, n_sham=2)
    assert view.is_view
    assert (view.X != before.X).nnz == 0
    assert list(view.obs.columns) == list(before.obs.columns)


def test_without_labels_clusters_of_z_are_the_groups(adata):
    model = train_small(adata)
    effect = model.treatment_effect(
        controls(adata), to="treat_1", from_="ctrl", by_group=True, n_samples=2, n_sham=2
    )
    assert set(effect.cells["group"]) == set(effect.genes["group"])
    assert all(name.startswith("cluster_") for name in effect.cells["group"])


@pytest.mark.parametrize("likelihood", ["poisson", "zinb", "normal"])
def test_other_likelihoods_have_finite_effects(adata, likelihood):
    if likelihood == "normal":
        adata.X = sp.csr_matrix(np.log1p(adata.X.toarray()))
    model = train_small(adata, model={"gene_likelihood": likelihood})
    effect = model.treatment_effect(
        controls(adata), to="treat_1", from_="ctrl", n_samples=2, n_sham=2
    )
    assert np.isfinite(effect.genes.drop(columns=["group", "gene"])).all(axis=None)
    difference = effect.genes["mean_after"] - effect.genes["mean_before"]
    is_difference = np.allclose(effect.genes["lfc"], difference, atol=1e-4)
    assert is_difference == (likelihood == "normal")


def test_several_keys_lead_from_one_level_of_a_key_to_another(adata):
    adata.obs["dose"] = np.where(np.arange(adata.n_obs) % 3 == 0, "low", "high")
    model = train_small(adata, {"condition_key": ["condition", "dose"]})
    source = adata[(adata.obs["dose"] == "low").to_numpy()].copy()
    effect = model.treatment_effect(
        source, to={"dose": "high"}, from_={"dose": "low"}, n_samples=2, n_sham=2
    )
    assert len(effect.cells) == source.n_obs  # of both conditions
    with pytest.raises(
        ValueError, match=r"to names the keys \['dose'\] and from_ names \['condition'\]"
    ):
        model.treatment_effect(source, to={"dose": "high"}, from_={"condition": "ctrl"})
    with pytest.raises(ValueError, match=r"from_ is 'low' and there are several condition keys"):
        model.treatment_effect(source, to={"dose": "high"}, from_="low")


# ---------------------------------------------------------------------- sham treatment


def test_halves_part_each_group_in_two_and_a_sham_uses_every_cell_once():
    groups = np.repeat(["a", "b"], [10, 21])
    every = np.full(31, True)
    w = np.zeros((31, 2))
    pool = Pool(w, w, w + 1.0, every, every, groups, is_sham=True)
    reference = pool.half(np.random.default_rng(0))
    assert (reference.is_source ^ reference.is_target).all()
    for name, sizes in (("a", {5}), ("b", {10, 11})):
        assert reference.is_source[groups == name].sum() in sizes
    np.testing.assert_array_equal(reference.w[:, 0], reference.is_target.astype(float))
    np.testing.assert_array_equal(pool.n_cells_of(np.array(["a", "b"])), [[5, 10.5], [5, 10.5]])


def test_halves_of_a_real_comparison_are_drawn_from_each_side():
    is_source = np.arange(40) < 24
    z = np.zeros((40, 1))
    pool = Pool(z, z, z, is_source, ~is_source, np.repeat(["a"], 40), is_sham=False)
    reference = pool.half(np.random.default_rng(0))
    assert reference.is_source.sum() == 12
    assert reference.is_target.sum() == 8
    assert not (reference.is_source & ~is_source).any()
    assert not (reference.is_target & is_source).any()


def test_a_group_that_holds_too_few_treated_cells_learns_from_those_of_others():
    groups = np.repeat(["a", "b"], [20, 13])
    is_source = np.concatenate([np.arange(20) < 16, np.arange(13) < 6])  # 4 and 7 treated
    z = np.zeros((33, 1))
    pool = Pool(z, z, z, is_source, ~is_source, groups, is_sham=False)
    names = np.array(["a", "b", "new"])
    np.testing.assert_array_equal(pool.n_cells_of(names), [[16, 6, 0], [4, 7, 0]])
    np.testing.assert_array_equal(pool.n_learned_from(names), [[16, 6, 22], [11, 7, 11]])


def test_a_pool_is_thinned_group_by_group():
    groups = np.repeat(["a", "b"], [3, 30])
    z, every = np.arange(33.0)[:, None], np.full(33, True)
    thinned = Pool(z, z, -z, every, every, groups, is_sham=True).at_most(5)
    assert [(thinned.groups == name).sum() for name in "ab"] == [3, 5]
    np.testing.assert_array_equal(groups[thinned.z[:, 0].astype(int)], thinned.groups)
    np.testing.assert_array_equal(thinned.w_target, -thinned.w_source)


# -------------------------------------------------------------------------- bad input


def test_cells_that_are_treated_already_are_left_out_with_a_warning(with_resting_type, effect):
    adata, model = with_resting_type
    n_treated = (adata.obs["condition"] == "treat_1").sum()
    message = rf"{n_treated} of 1000 cells are under the condition asked about already and are left"
    with pytest.warns(UserWarning, match=message):
        found = model.treatment_effect(adata, to="treat_1", from_="ctrl", n_samples=2, n_sham=2)
    assert list(found.cells.index) == list(effect.cells.index)
    np.testing.assert_allclose(found.cells["effect_w"], effect.cells["effect_w"], rtol=1e-3)


def test_cells_under_a_third_condition_are_refused():
    adata = simulate(300, 40, n_conditions=3)
    model = train_small(adata)
    with pytest.raises(ValueError, match=r"under from_={'condition': 'ctrl'} and \d+ that are nei"):
        model.treatment_effect(adata, to="treat_1", from_="ctrl")


def test_a_group_that_was_never_seen_treated_warns(trained, simulated):
    _, training, _ = simulated
    with pytest.warns(UserWarning, match=r"Groups \['type_0'\] have fewer than 5 cells"):
        trained.treatment_effect(
            controls(training), to="treat_1", from_="ctrl", n_samples=2, n_sham=2
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"from_": "treat_9"}, "Condition 'treat_9' of 'condition' is not known"),
        ({"from_": {"dose": "low"}}, "from_ names the key 'dose'; condition keys are"),
        ({"from_": {}}, "from_ is empty; name a level"),
        ({"from_": "treat_1", "to": "ctrl"}, "adata holds 0 cells under from_={'condition'"),
        ({"delta": 0.0}, "delta is 0.0; it is the smallest log2 fold change that matters"),
        ({"n_samples": 1}, "n_samples is 1; at least 2 are needed"),
        ({"n_sham": 0}, "n_sham is 0; at least 2 are needed"),
    ],
)
def test_what_cannot_be_measured_is_refused(with_resting_type, arguments, message):
    adata, model = with_resting_type
    with pytest.raises(ValueError, match=message):
        model.treatment_effect(controls(adata), **({"to": "treat_1", "from_": "ctrl"} | arguments))


@pytest.mark.filterwarnings("ignore:Category .* has fewer than 3 cells:UserWarning")
def test_one_cell_is_no_comparison(with_resting_type):
    adata, model = with_resting_type
    with pytest.raises(ValueError, match="adata holds 1 cells under from_.*at least 2"):
        model.treatment_effect(controls(adata)[:1].copy(), to="treat_1", from_="ctrl")


def test_a_combination_that_was_never_seen_is_refused(adata):
    adata.obs["dose"] = np.where(np.arange(adata.n_obs) % 3 == 0, "low", "high")
    kept = adata[~((adata.obs["condition"] == "treat_1") & (adata.obs["dose"] == "low"))].copy()
    model = train_small(kept, {"condition_key": ["condition", "dose"]})
    source = kept[((kept.obs["condition"] == "ctrl") & (kept.obs["dose"] == "low")).to_numpy()]
    with pytest.raises(ValueError, match=r"0 cells under {'condition': 'treat_1', 'dose': 'low'}"):
        model.treatment_effect(
            source.copy(),
            to={"condition": "treat_1", "dose": "low"},
            from_={"condition": "ctrl", "dose": "low"},
        )


def test_an_untrained_model_measures_no_effect(adata):
    DISCoVeR.setup_anndata(adata, condition_key="condition")
    with pytest.raises(RuntimeError, match="has not been trained"):
        DISCoVeR(adata).treatment_effect(adata, to="treat_1", from_="ctrl")
