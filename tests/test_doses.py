"""Doses and times: what a treatment does at doses that were not measured."""

import numpy as np
import pytest
from fitting import train_small

from discover_sc import DISCoVeR
from discover_sc._target import _between_doses, _measured_doses
from discover_sc.data import simulate

# targets that no group was seen under
pytestmark = [
    pytest.mark.filterwarnings("ignore:The median support"),
    pytest.mark.filterwarnings("ignore:.* already; asked about the condition"),
]


def dosed(doses=(0.1, 1.0, 10.0)):
    adata = simulate(400, 40, n_types=2, n_conditions=3, seed=0)
    rng = np.random.default_rng(7)
    treated = adata.obs["condition"] != "ctrl"
    adata.obs["dose"] = np.where(treated, rng.choice(doses, adata.n_obs), 0.0)
    return adata


@pytest.fixture(scope="module")
def model():
    return train_small(dosed(), {"dose_key": "dose", "labels_key": "cell_type"})


def controls(model):
    return model.adata[(model.adata.obs["condition"] == "ctrl").to_numpy()].copy()


def test_scales_of_half_response_spread_over_the_measured_doses(model):
    np.testing.assert_allclose(
        model.module.conditions.dose_scales, np.geomspace(0.1, 10, 4), rtol=1e-5
    )


@pytest.mark.parametrize("method", ["auto", "abduction", "shift", "neighbors", "groups", "linear"])
def test_dose_zero_changes_nothing_and_more_dose_changes_more(model, method):
    source = controls(model)
    own = model.get_latent_representation(source, latent="w")
    moved = [
        np.abs(
            model.predict_counterfactual(
                source, to="treat_1", dose=d, method=method, n_samples=2
            ).obsm["X_discover_w"]
            - own
        ).mean()
        for d in (0.0, 0.2, 10.0)
    ]
    assert moved[0] < 1e-6
    assert moved[1] > 1e-4
    assert moved[2] != pytest.approx(moved[1])


def test_at_a_measured_dose_a_shift_is_that_doses_and_between_two_it_is_between(model):
    options = {"to": "treat_1", "method": "shift", "n_samples": 2}
    low, high, middle = (
        model.predict_counterfactual(controls(model), dose=d, **options).obsm["X_discover_w"]
        for d in (1.0, 10.0, 10.0**0.5)
    )
    np.testing.assert_allclose(middle, (low + high) / 2, atol=1e-4)


def test_doses_are_interpolated_in_log_dose_and_in_dose_below_the_lowest():
    measured = _measured_doses(np.repeat([0.0, 1.0, 10.0, 100.0], [5, 5, 5, 2]))
    np.testing.assert_array_equal(measured, [1.0, 10.0])  # 100 has too few cells
    assert _between_doses(measured, 0.0) == {0.0: 1.0}
    assert _between_doses(measured, 0.25) == {0.0: 0.75, 1.0: 0.25}
    assert _between_doses(measured, 1.0) == {1.0: 1.0}
    assert _between_doses(measured, 500.0) == {10.0: 1.0}
    assert _between_doses(measured, 10**0.75) == pytest.approx({1.0: 0.25, 10.0: 0.75})


def test_the_prediction_says_its_dose_and_the_sources(model):
    predicted = model.predict_counterfactual(controls(model), to="treat_1", dose=3.0, n_samples=2)
    assert predicted.uns["discover_counterfactual"]["to"] == {"condition": "treat_1", "dose": 3.0}
    assert (predicted.obs["dose"] == 3.0).all()
    assert (predicted.obs["dose_source"] == 0.0).all()


def test_treated_cells_are_moved_from_their_own_dose(model):
    treated = model.adata[(model.adata.obs["condition"] == "treat_1").to_numpy()].copy()
    options = {"to": "treat_1", "dose": 10.0, "method": "abduction", "n_samples": 2}
    predicted = model.predict_counterfactual(treated, **options)
    own = model.get_latent_representation(treated, latent="w")
    stays = (treated.obs["dose"] == 10.0).to_numpy()
    moved = np.abs(predicted.obsm["X_discover_w"] - own).max(axis=1)
    assert moved[stays].max() < 1e-6
    assert moved[~stays].min() > 1e-5


@pytest.mark.parametrize("method", ["shift", "linear", "abduction"])
def test_treated_cells_can_be_sent_to_dose_zero(model, method):
    """The ways that compare cells once left them where they were."""
    treated = model.adata[(model.adata.obs["condition"] == "treat_1").to_numpy()].copy()
    own = model.get_latent_representation(treated, latent="w")
    options = {"method": method, "n_samples": 2}
    undone = model.predict_counterfactual(treated, to="treat_1", dose=0.0, **options)
    control = model.predict_counterfactual(treated, to="ctrl", **options)
    assert np.abs(undone.obsm["X_discover_w"] - own).max() > 1e-3
    np.testing.assert_allclose(
        undone.obsm["X_discover_w"], control.obsm["X_discover_w"], rtol=1e-4, atol=1e-5
    )


def test_doses_survive_saving(model, tmp_path):
    model.save(tmp_path / "model")
    cells = model.adata[model.adata.obs["dose"] <= 1].copy()  # other measured doses
    loaded = DISCoVeR.load(tmp_path / "model", cells, accelerator="cpu")
    first, second = (
        m.predict_counterfactual(controls(model), to="treat_1", dose=3.0, n_samples=2).X
        for m in (model, loaded)
    )
    assert np.array_equal(first, second)
    assert loaded.doses_ == model.doses_


def test_the_dose_response_is_the_mean_prediction_at_each_dose(model):
    source, doses = controls(model), [0.0, 1.0, 3.0]
    table = model.predict_dose_response(source, "treat_1", doses, n_samples=2)
    assert list(table.columns) == ["dose", "gene", "mean", "lower", "upper", "log_fold_change"]
    assert len(table) == 3 * source.n_vars
    predicted = model.predict_counterfactual(source, to="treat_1", dose=3.0, n_samples=2)
    last = table[table["dose"] == 3.0]
    np.testing.assert_allclose(last["mean"], predicted.X.mean(axis=0), rtol=1e-5)
    x = source.X.toarray()
    profile = np.log1p((1e4 * x / x.sum(axis=1, keepdims=True)).mean(axis=0))
    np.testing.assert_allclose(
        last["log_fold_change"], np.log1p(predicted.X.mean(axis=0)) - profile, atol=1e-5
    )


def test_outside_of_the_measured_range_it_warns(model):
    for dose in (0.01, 50.0):
        with pytest.warns(UserWarning, match=r"'treat_1' lies outside .* \(from 0.1 to 10\)"):
            model.predict_counterfactual(controls(model), to="treat_1", dose=dose, n_samples=2)


def test_a_single_measured_dose_need_not_be_named():
    model = train_small(dosed(doses=(5.0,)), {"dose_key": "dose"})
    predicted = model.predict_counterfactual(controls(model), to="treat_1", n_samples=2)
    assert (predicted.obs["dose"] == 5.0).all()


@pytest.mark.parametrize(
    ("dose", "message"),
    [
        (None, r"No dose is named for 'treat_1'; measured are \[0.1"),
        (-1.0, "dose is -1.0; doses are finite and not negative"),
        (np.nan, "dose is nan; doses are finite and not negative"),
    ],
)
def test_doses_that_cannot_be_predicted_are_refused(model, dose, message):
    with pytest.raises(ValueError, match=message):
        model.predict_counterfactual(controls(model), to="treat_1", dose=dose)


def test_a_dose_is_refused_by_a_model_without_any(adata):
    with pytest.raises(ValueError, match="dose is 1.0 and the model was set up without doses"):
        train_small(adata).predict_counterfactual(adata, to="treat_1", dose=1.0)


@pytest.mark.parametrize(
    ("doses", "message"),
    [
        (lambda d: d.where(d > 0, np.nan), r"'dose'\] is missing \(NaN\) for"),
        (lambda d: d - 5, r"'dose'\] goes down to -5; doses are 0 or positive"),
        (lambda d: d + 1, r"no cell of adata.obs\['dose'\] has dose 0; a response needs untreated"),
        (lambda d: d * 0, r"no cell of adata.obs\['dose'\] has a positive dose"),
        (lambda d: d.where(d < 10, np.inf), r"'dose'\] holds values that are infinite"),
    ],
    ids=["NaN", "negative", "no control", "no treatment", "infinite"],
)
def test_doses_that_cannot_be_learned_are_refused(doses, message):
    adata = dosed()
    adata.obs["dose"] = doses(adata.obs["dose"])
    with pytest.raises(ValueError, match=message):
        DISCoVeR.setup_anndata(adata, condition_key="condition", dose_key="dose")


@pytest.mark.parametrize(("doses", "known"), [((0.1, 1.0, 10.0), True), ((0.1, 10.0), False)])
def test_a_measured_dose_between_two_others_tells_the_error(doses, known):
    model = train_small(dosed(doses), {"dose_key": "dose", "labels_key": "cell_type"})
    predicted = model.predict_counterfactual(controls(model), to="treat_1", dose=3.0, n_samples=2)
    assert predicted.varm["discover_mean"].notna().all(axis=None)
    assert predicted.varm["discover_mean_lower"].notna().all(axis=None) == known


def test_a_dose_between_follows_the_observed_profiles_on_either_side(model):
    source = controls(model)
    auto, decoded = (
        model.predict_counterfactual(
            source, to="treat_1", dose=10**0.5, method=method, n_samples=2
        ).varm["discover_mean"]
        for method in ("auto", "shift")
    )
    reference = model.reference_
    code = model.conditions["condition"].index("treat_1")
    for group in auto:
        rows = [
            (reference["profile_codes"][:, 0] == code)
            & (reference["profile_doses"] == dose)
            & (reference["profile_groups"] == group)
            for dose in (1.0, 10.0)
        ]
        between = np.mean([reference["profiles"][row][0] for row in rows], axis=0)
        errors = [np.abs(varm[group] - between).mean() for varm in (auto, decoded)]
        assert errors[0] < 0.8 * errors[1]
