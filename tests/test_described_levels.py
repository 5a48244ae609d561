"""Treatments known by a description, and treatments never seen."""

import copy
import warnings

import numpy as np
import pandas as pd
import pytest
from fitting import train_small
from sklearn.metrics import r2_score

from discover_sc import DISCoVeR, _observed_changes
from discover_sc._described_effects import DescribedEffects
from discover_sc._levels import DescribedLevels, checked_table
from discover_sc._observed_changes import _treated_noise
from discover_sc._reference import GroupProfile
from discover_sc._shrinkage import dispersion_of, sampling_variance
from discover_sc.data import simulate
from discover_sc.evaluation import embedding_ablation, log_mean_profile

# descriptions that are noise
pytestmark = pytest.mark.filterwarnings("ignore:A linear regression on the description")


def described(n_conditions=4):
    """Small cells whose treatments have three features; ``new_1`` and ``new_2`` have no cells."""
    adata = simulate(400, 40, n_types=2, n_conditions=n_conditions, seed=0)
    rng = np.random.default_rng(0)
    index = [*adata.obs["condition"].cat.categories, "new_1", "new_2"]
    adata.uns["drugs"] = pd.DataFrame(
        rng.normal(size=(len(index), 3)), index, ["size", "charge", "dose"]
    )
    return adata


@pytest.fixture(scope="module")
def model():
    return train_small(described(), {"condition_embedding": "drugs", "labels_key": "cell_type"})


def controls(model):
    return model.adata[(model.adata.obs["condition"] == "ctrl").to_numpy()].copy()


def test_rows_are_standardised_over_registered_levels_and_new_ones_on_the_same_scale():
    table = pd.DataFrame({"a": [0.0, 2.0, 50.0], "b": [1.0, 5.0, 50.0]}, ["x", "y", "new"])
    levels = DescribedLevels("drug", ["x", "y"], checked_table(table, "drugs", ["x", "y"]))
    root = np.sqrt(2)  # two features
    np.testing.assert_allclose(levels.design * root, [[-1, -1], [1, 1]], rtol=1e-6)
    row = levels.describe(table.loc[["new"], ["b", "a"]])["new"]  # columns by name
    np.testing.assert_allclose(row * root, [49.0, 23.5], rtol=1e-6)


def test_new_levels_are_predicted_once_each_and_named(model):
    source, table = controls(model), model.adata.uns["drugs"]
    both = model.predict_counterfactual(source, to=table.loc[["new_1", "new_2"]], n_samples=2)
    assert both.n_obs == 2 * source.n_obs
    assert both.obs_names.is_unique
    assert both.obs["condition"].tolist() == ["new_1"] * source.n_obs + ["new_2"] * source.n_obs
    assert both.uns["discover_counterfactual"]["to"] == {"condition": ["new_1", "new_2"]}
    alone = model.predict_counterfactual(source, to=table.loc[["new_2"]], n_samples=2)
    assert np.array_equal(alone.X, both.X[source.n_obs :])
    assert not np.allclose(both.X[: source.n_obs], alone.X)


def test_a_new_level_with_the_description_of_a_known_one_has_its_prior(model):
    twin = model.adata.uns["drugs"].loc[["treat_1"]].set_axis(["twin"])
    options = {"method": "prior", "n_samples": 2}
    known, new = (
        model.predict_counterfactual(controls(model), to=to, **options) for to in ("treat_1", twin)
    )
    new_w, known_w = (predicted.obsm["X_discover_w"] for predicted in (new, known))
    np.testing.assert_allclose(new_w, known_w, rtol=1e-5, atol=1e-6)


def test_a_level_without_cells_leaves_auto_the_prior_and_refuses_comparisons(model):
    table = model.adata.uns["drugs"].loc[["new_1"]]
    predicted = model.predict_counterfactual(controls(model), to=table, n_samples=2)
    assert predicted.uns["discover_counterfactual"]["ways"] == ["abduction"]
    with pytest.raises(ValueError, match=r"no cell under \['new_1'\], which method='shift'"):
        model.predict_counterfactual(controls(model), to=table, method="shift")


def test_the_interval_of_a_described_level_is_that_of_left_out_treatments(model):
    table = model.adata.uns["drugs"].loc[["new_1"]]
    predicted = model.predict_counterfactual(controls(model), to=table, n_samples=2)
    mean, lower, upper = (
        predicted.varm[f"discover_mean{end}"].to_numpy() for end in ("", "_lower", "_upper")
    )
    assert ((lower < mean) & (mean < upper)).all()
    choice = model.counterfactual_choice_["ctrl"]
    assert choice["n_left_out"] == 3 * 2  # treatments and types
    assert choice["penalty"] in choice["lfc_r2_by_penalty"]
    # by inverse variances, the network is never trusted more than what was seen to predict
    assert 0.5 <= choice["mean_weight_of_observed_changes"] <= 1


@pytest.mark.parametrize("method", ["abduction", "prior"])
def test_errors_of_the_regression_are_not_those_of_other_methods(model, method):
    table = model.adata.uns["drugs"].loc[["new_1"]]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="A linear regression")
        predicted = model.predict_counterfactual(
            controls(model), to=table, method=method, n_samples=2
        )
    assert predicted.varm["discover_mean_lower"].isna().all(axis=None)


def test_a_treated_source_is_one_of_the_treatments_and_the_control_another(model):
    table = model.adata.uns["drugs"]
    treated = model.adata[(model.adata.obs["condition"] == "treat_1").to_numpy()].copy()
    model.predict_counterfactual(treated, to=table.loc[["new_1"]], n_samples=2)
    assert model.counterfactual_choice_["treat_1"]["n_treatments"] == 3  # two and the control


def test_a_level_described_like_the_control_hardly_changes_cells():
    _, adata, table = told(np.random.default_rng(0))
    adata.obs["one_type"] = "cell"
    common = 1.0 + 5.0 * (np.arange(adata.n_vars) < 10)  # what all treatments do
    treated = (adata.obs["condition"] != "ctrl").to_numpy()
    adata.X[treated] = np.round(adata.X[treated] * common)
    table = table.assign(strength=np.append(0.0, np.random.default_rng(1).uniform(0.5, 1.5, 16)))
    adata.uns["drugs"] = table
    model = train_small(adata, {"condition_embedding": "drugs", "labels_key": "one_type"})
    new = table.loc[["ctrl", "t0"]].set_axis(["like the control", "like a drug"])
    new.loc["like a drug"] += [0.01, 0.0]
    predicted = model.predict_counterfactual(controls(model), to=new, n_samples=2)
    base = log_mean_profile(controls(model).X)
    idle, active = (
        np.abs(log_mean_profile(predicted[predicted.obs["condition"] == name].X) - base).mean()
        for name in new.index
    )
    assert idle < 0.7 * active


def test_a_level_learned_from_few_cells_has_no_description_and_tells_nothing(model, monkeypatch):
    grown = copy.deepcopy(model)
    few = model.adata[:20].copy()
    few.obs["condition"] = "learned"
    grown.add_condition(few)
    n_rows = []

    def counted(known, control, rows, noise):
        n_rows.append(len(rows))
        return DescribedEffects(known, control, rows, noise)

    monkeypatch.setattr(_observed_changes, "DescribedEffects", counted)
    table = model.adata.uns["drugs"].loc[["new_1"]]
    for source in (controls(model), few):
        grown.predict_counterfactual(source, to=table, n_samples=2)
    assert n_rows == [4, 4]  # the registered levels, whatever the source


def test_a_type_that_was_never_treated_has_a_wider_interval():
    adata = described(n_conditions=6)
    rng = np.random.default_rng(7)
    adata.obs["cell_type"] = rng.choice(["a", "b", "c", "never"], adata.n_obs)
    is_treated = (adata.obs["condition"] != "ctrl").to_numpy()
    kept = ~(is_treated & (adata.obs["cell_type"] == "never").to_numpy())
    few = train_small(adata[kept], {"condition_embedding": "drugs", "labels_key": "cell_type"})
    predicted = few.predict_counterfactual(
        controls(few), to=adata.uns["drugs"].loc[["new_1"]], n_samples=2
    )
    width = (predicted.varm["discover_mean_upper"] - predicted.varm["discover_mean_lower"]).mean()
    assert np.isfinite(width).all()
    assert width["never"] > width[["a", "b", "c"]].mean()


def test_other_keys_keep_their_levels():
    adata = described()
    adata.obs["donor"] = np.where(np.arange(adata.n_obs) % 2, "one", "two")
    setup = {
        "condition_key": ["condition", "donor"],
        "condition_embedding": "drugs",
        "labels_key": "cell_type",
    }
    of_donors = train_small(adata, setup)
    predicted = of_donors.predict_counterfactual(
        controls(of_donors), to=adata.uns["drugs"].loc[["new_1"]], n_samples=2
    )
    assert predicted.obs["donor"].tolist() == controls(of_donors).obs["donor"].tolist()
    assert predicted.varm["discover_mean_lower"].notna().all(axis=None)
    assert set(of_donors.counterfactual_choice_) == {"ctrl+one", "ctrl+two"}


def test_far_descriptions_warn_once_and_are_followed_part_of_the_way(model):
    table = model.adata.uns["drugs"].loc[["new_1", "new_2"]] * 1e3
    with pytest.warns(UserWarning, match="The descriptions of") as caught:
        predicted = model.predict_counterfactual(controls(model), to=table, n_samples=2)
    assert np.isfinite(predicted.X).all()
    messages = [str(w.message) for w in caught if w.category is UserWarning]
    assert sum(m.startswith(r"The descriptions of ['new_1', 'new_2']") for m in messages) == 1
    assert sum("not clearly better than the mean" in m for m in messages) <= 1
    assert not any("support" in m for m in messages)  # no cell can have any


def test_the_noise_is_that_of_the_treated_profiles_alone(model):
    sources = {"a": GroupProfile(np.full(40, 3.0), 1, 1 / 500)}  # one cell: a noisy source
    treated = [{"a": GroupProfile(np.full(40, 3.0), n, 1 / 500)} for n in (50, 100)]
    of_each = [
        sampling_variance(np.full(40, 3.0), dispersion_of(model), n, 1 / 500) for n in (50, 100)
    ]
    assert _treated_noise(model, sources, treated) == pytest.approx(np.mean(of_each))


def test_with_doses_a_described_level_is_predicted_by_the_network_alone():
    adata = described()
    adata.obs["dose"] = (adata.obs["condition"] != "ctrl").astype(float)
    dosed = train_small(
        adata, {"condition_embedding": "drugs", "dose_key": "dose", "labels_key": "cell_type"}
    )
    predicted = dosed.predict_counterfactual(
        controls(dosed), to=adata.uns["drugs"].loc[["new_1"]], dose=1.0, n_samples=2
    )
    assert predicted.varm["discover_mean_lower"].isna().all(axis=None)


def test_two_treatments_are_too_few_to_leave_any_out():
    adata = described(n_conditions=3)
    few = train_small(adata, {"condition_embedding": "drugs", "labels_key": "cell_type"})
    table = adata.uns["drugs"].loc[["new_1"]]
    predicted = few.predict_counterfactual(controls(few), to=table, n_samples=2)
    assert predicted.varm["discover_mean_lower"].isna().all(axis=None)
    assert few.counterfactual_choice_["ctrl"]["mean_weight_of_observed_changes"] == 0


def test_what_the_description_tells_is_seen_on_left_out_treatments():
    _, adata, table = told(np.random.default_rng(0))
    wrong = table.copy()
    wrong.loc["t0":] = np.roll(table.loc["t0":].to_numpy(), 5)
    held_out = ["t3", "t7", "t11"]
    training = adata[~adata.obs["condition"].isin(held_out).to_numpy()].copy()
    training.obs["one_type"] = "cell"
    base, scores = log_mean_profile(training.X[training.obs["condition"] == "ctrl"]), {}
    for name, rows in (("given", table), ("shuffled", wrong)):
        training.uns["drugs"] = rows
        model = train_small(training, {"condition_embedding": "drugs", "labels_key": "one_type"})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            predicted = model.predict_counterfactual(
                controls(model), to=rows.loc[held_out], n_samples=2
            )
        mute = any(
            "not clearly better than the mean of the others" in str(w.message) for w in caught
        )
        assert mute == (name == "shuffled")
        scores[name] = np.mean(
            [
                r2_score(
                    log_mean_profile(adata.X[adata.obs["condition"] == level]) - base,
                    log_mean_profile(predicted[predicted.obs["condition"] == level].X) - base,
                )
                for level in held_out
            ]
        )
    assert scores["given"] > 0.5 > 0.2 > scores["shuffled"]


def test_the_table_is_saved_with_the_model(model, tmp_path):
    model.save(tmp_path / "model")
    cells = model.adata.copy()
    del cells.uns["drugs"]
    loaded = DISCoVeR.load(tmp_path / "model", cells, accelerator="cpu")
    table = model.adata.uns["drugs"].loc[["new_1"]]
    first, second = (
        m.predict_counterfactual(controls(model), to=table, n_samples=2).X for m in (model, loaded)
    )
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.drop(index="ctrl"), ValueError, r"no row for the levels \['ctrl'\]; every"),
        (
            lambda t: t.drop("ctrl").reindex(t.index),
            ValueError,
            r"missing.*levels \['ctrl'\].*Fill",
        ),
        (lambda t: t.assign(size=1.0), ValueError, r"same value for all levels: \['size'\].*Rem"),
        (lambda t: t * 0, ValueError, r"same value for all levels: .*tell levels apart"),
        (
            lambda t: t.T.assign(treat_1=t.loc["treat_2"]).T,
            ValueError,
            r"same row for the levels \['treat_2', 'treat_1'\]; a row must tell",
        ),
        (lambda t: pd.concat([t, t]), ValueError, "more than one row for the level 'ctrl'"),
        (lambda t: t.iloc[:0], ValueError, "is empty; it needs at least one level"),
        (lambda t: t.to_numpy(), TypeError, "of type ndarray; condition_embedding names a Data"),
    ],
    ids=["no row", "NaN", "constant feature", "constant", "twins", "twice", "empty", "array"],
)
def test_descriptions_that_cannot_be_used_are_refused(change, error, message):
    adata = described()
    adata.uns["drugs"] = change(adata.uns["drugs"])
    with pytest.raises(error, match=message):
        DISCoVeR.setup_anndata(adata, condition_key="condition", condition_embedding="drugs")


def test_a_description_that_is_not_there_is_refused():
    with pytest.raises(KeyError, match=r"condition_embedding: 'genes' is not in adata.uns; .*drug"):
        DISCoVeR.setup_anndata(described(), condition_key="condition", condition_embedding="genes")


def test_new_levels_that_cannot_be_read_are_refused(model):
    table = model.adata.uns["drugs"].loc[["new_1"]]
    for to, message in (
        (table.drop(columns="size"), r"to lacks the features \['size'\]; new levels need all 3"),
        (table * np.nan, r"to holds missing.* for the levels \['new_1'\]"),
        (table.set_axis(["treat_1"]), r"to describes \['treat_1'\], which are registered"),
        ("treat_9", r"'treat_9' of 'condition' is not known.*or describe new levels"),
    ):
        with pytest.raises(ValueError, match=message):
            model.predict_counterfactual(controls(model), to=to)


def test_a_description_is_refused_by_a_model_without_any(adata):
    plain = train_small(adata)
    with pytest.raises(ValueError, match=r"registered without descriptions. Pass condition_embed"):
        plain.predict_counterfactual(adata, to=described().uns["drugs"].loc[["new_1"]])


def test_class_means_read_no_descriptions():
    adata = described()
    DISCoVeR.setup_anndata(adata, condition_key="condition", condition_embedding="drugs")
    with pytest.raises(ValueError, match="reads neither doses nor descriptions. Choose prior"):
        DISCoVeR(adata, prior="class_mean")


# ---------------------------------------------------------------------------- ablation


def told(rng, n_treatments=16):
    """Counts whose treatments move genes along a feature, and a predictor that reads it."""
    names = ["ctrl", *(f"t{k}" for k in range(n_treatments))]
    value = pd.Series([0.0, *rng.uniform(-1.5, 1.5, n_treatments)], names)
    direction, base = rng.normal(size=30), rng.uniform(1, 4, 30)
    condition = np.repeat(names, 40)
    rate = np.exp(base + value[condition].to_numpy()[:, None] * direction)
    rate = 3000 * rate / rate.sum(axis=1, keepdims=True)
    adata = simulate(len(condition), 30)
    adata.X = rng.poisson(rate).astype("float32")
    adata.obs["condition"] = condition
    table = value.to_frame("value")

    def predict(training, embedding, levels):
        conditions = training.obs["condition"].unique()
        profiles = np.stack(
            [log_mean_profile(training.X[training.obs["condition"] == c]) for c in conditions]
        )
        x = np.column_stack([np.ones(len(conditions)), embedding.loc[conditions, "value"]])
        weights = np.linalg.lstsq(x, profiles, rcond=None)[0]
        return {h: np.expm1([1, embedding.loc[h, "value"]] @ weights)[None] for h in levels}

    return predict, adata, table


def test_a_telling_description_beats_its_shuffled_rows_and_the_mean():
    predict, adata, table = told(np.random.default_rng(0))
    scores = embedding_ablation(predict, adata, table, condition_key="condition", control="ctrl")
    assert scores.loc["embedding", "lfc_r2"] > 0.8
    assert scores.loc["shuffled embedding", "lfc_r2"] < 0.2 * scores.loc["embedding", "lfc_r2"]
    assert scores.loc["ridge regression", "lfc_r2"] > 0.8
    assert abs(scores.loc["no change", "lfc_r2"]) < 0.3


def test_a_description_that_is_not_better_than_its_shuffled_rows_is_named():
    _, adata, table = told(np.random.default_rng(0))

    def deaf(training, embedding, levels):
        return dict.fromkeys(levels, training.X.mean(axis=0, keepdims=True))

    with pytest.warns(UserWarning, match="no better than the shuffled embedding .*Do not trust"):
        embedding_ablation(deaf, adata, table, condition_key="condition", control="ctrl")


def test_held_out_cells_are_kept_from_the_predictor_and_the_control_keeps_its_row():
    predict, adata, table = told(np.random.default_rng(0))
    calls = []

    def watched(training, embedding, levels):
        calls.append((set(training.obs["condition"]), embedding, levels))
        return predict(training, embedding, levels)

    options = {"condition_key": "condition", "control": "ctrl", "held_out": ["t1", "t2"]}
    embedding_ablation(watched, adata, table, **options)
    assert all(not seen & {"t1", "t2"} and levels == ["t1", "t2"] for seen, _, levels in calls)
    given, shuffled = (embedding for _, embedding, _ in calls)
    pd.testing.assert_frame_equal(given, table)
    assert (shuffled.loc["ctrl"] == table.loc["ctrl"]).all()
    assert (shuffled.drop("ctrl") != table.drop("ctrl")).all().all()
    assert sorted(shuffled["value"]) == sorted(table["value"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"control": "dmso"}, "There are no cells under 'dmso'; control and held-out"),
        ({"held_out": ["t99"]}, "There are no cells under 't99'"),
        ({"held_out": [f"t{k}" for k in range(15)]}, "at least two of them must remain"),
    ],
)
def test_what_cannot_be_ablated_is_refused(options, message):
    predict, adata, table = told(np.random.default_rng(0))
    arguments = {"condition_key": "condition", "control": "ctrl"} | options
    with pytest.raises(ValueError, match=message):
        embedding_ablation(predict, adata, table, **arguments)


def test_an_embedding_that_is_not_finite_is_refused_before_anything_is_fitted():
    _, adata, table = told(np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"The embedding holds missing.*for \['t3'\]"):
        embedding_ablation(
            lambda *_: pytest.fail("fitted"),
            adata,
            table.assign(value=table["value"].where(table.index != "t3")),
            condition_key="condition",
            control="ctrl",
        )


def test_an_embedding_without_a_row_is_refused():
    predict, adata, table = told(np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"The embedding has no row for \['t3'\]; every level"):
        embedding_ablation(
            predict, adata, table.drop("t3"), condition_key="condition", control="ctrl"
        )
