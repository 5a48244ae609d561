import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from sklearn.decomposition import PCA

from discover_sc.data import simulate
from discover_sc.evaluation import (
    counterfactual_methods,
    log_mean_profile,
    mean_shift,
    nearest_shift,
)
from discover_sc.evaluation._rivals import Design, baselines

DESIGN = Design("condition", "cell_type", "ctrl", min_cells=20)


@pytest.fixture(scope="module")
def task():
    """Training cells without the treated ones of type_0, its control cells, and all counts."""
    full = simulate(600, 60, n_types=5, effect_scale=1.5, seed=0)
    hidden = DESIGN.cells_of(full, "type_0", "treat_1")
    return full[~hidden].copy(), full[DESIGN.cells_of(full, "type_0", "ctrl")].copy()


def methods(max_epochs=None):
    keys = {"control": "ctrl", "min_cells": 20, "max_epochs": max_epochs}
    return {**baselines(DESIGN), **counterfactual_methods("condition", "cell_type", **keys)}


def counts(adata, group, condition):
    return adata.X[DESIGN.cells_of(adata, group, condition)].toarray().astype(float)


def logs(x):
    return np.log1p(1e4 * x / x.sum(axis=1, keepdims=True))


def observed(train, mean):
    """Per other group its mean under control, and its change."""
    groups = [f"type_{k}" for k in range(1, 5)]
    controls = {g: mean(counts(train, g, "ctrl")) for g in groups}
    return controls, {g: mean(counts(train, g, "treat_1")) - controls[g] for g in groups}


def profile(prediction):
    return prediction.var["log_mean_profile"].to_numpy()


# --------------------------------------------------------------------------------- shifts


@pytest.mark.parametrize("name", ["mean shift", "nearest type's shift"])
def test_profiles_of_the_baselines_are_those_of_the_public_functions(task, name):
    train, source = task
    controls, changes = observed(train, log_mean_profile)
    base = log_mean_profile(source.X)
    expected = {
        "mean shift": mean_shift(base, changes),
        "nearest type's shift": nearest_shift(base, changes, controls),
    }
    prediction = methods()[name](train, source, "treat_1", seed=0)
    np.testing.assert_allclose(profile(prediction), expected[name], rtol=0, atol=1e-12)
    assert not np.allclose(expected["mean shift"], expected["nearest type's shift"])


def test_cells_of_the_mean_shift_are_the_source_cells_moved_by_the_mean_change_of_the_logs(task):
    train, source = task
    _, changes = observed(train, lambda x: logs(x).mean(axis=0))
    expected = logs(source.X.toarray().astype(float)) + np.mean(list(changes.values()), axis=0)
    prediction = methods()["mean shift"](train, source, "treat_1", seed=0)
    np.testing.assert_allclose(prediction.layers["log_normalized"], expected)


def test_of_many_source_cells_a_shift_moves_some_and_its_profile_is_of_all(task, monkeypatch):
    train, source = task
    every = methods()["mean shift"](train, source, "treat_1", seed=0)
    monkeypatch.setattr("discover_sc.evaluation._rivals._MAX_MOVED", 10)
    some = methods()["mean shift"](train, source, "treat_1", seed=0)
    assert some.n_obs == len(set(some.obs_names)) == 10
    np.testing.assert_array_equal(profile(some), profile(every))
    same = every[some.obs_names].layers["log_normalized"]
    np.testing.assert_array_equal(some.layers["log_normalized"], same)


def test_expected_expression_of_a_shift_has_its_profile(task):
    """Up to the rescaling of each cell to a common total."""
    train, source = task
    prediction = methods()["linear"](train, source, "treat_1", seed=0)
    np.testing.assert_allclose(np.log1p(prediction.X[0]), profile(prediction), rtol=1e-5)
    assert log_mean_profile(prediction.X) == pytest.approx(profile(prediction), abs=0.2)


def test_small_groups_are_not_learned_from(task):
    train, source = task
    few = np.flatnonzero(DESIGN.cells_of(train, "type_1", "treat_1"))[19:]
    train = train[np.setdiff1d(np.arange(train.n_obs), few)].copy()  # one less than min_cells
    _, changes = observed(train, log_mean_profile)
    del changes["type_1"]
    prediction = methods()["mean shift"](train, source, "treat_1", seed=0)
    expected = mean_shift(log_mean_profile(source.X), changes)
    np.testing.assert_allclose(profile(prediction), expected)


def test_no_group_to_learn_from_is_refused(task):
    train, source = task
    train = train[(train.obs["condition"] == "ctrl").to_numpy()].copy()
    message = "No group of 'cell_type' has 20 training cells under 'ctrl' and under 'treat_1'.*Low"
    with pytest.raises(ValueError, match=message):
        methods()["linear"](train, source, "treat_1", seed=0)


# --------------------------------------------------------------------------------- linear


def linear_data(n_types, rng):
    """Counts whose change, in logs, is linear in where the control cells lie on one axis."""
    axis, effect = rng.normal(0, 0.5, 40), np.zeros(40)
    effect[:10] = 1.0
    positions = np.linspace(-1, 1, n_types)
    rows, obs = [], []
    for k, position in enumerate(positions):
        for condition, moved in (("ctrl", 0.0), ("treat_1", 1.0)):
            log_mean = 2 + position * axis + moved * (1 + position) * effect
            rows.append(rng.poisson(np.exp(np.tile(log_mean, (150, 1)))))
            obs += [(f"type_{k}", condition)] * 150
    frame = pd.DataFrame(obs, columns=["cell_type", "condition"]).astype("category")
    frame.index = frame.index.astype(str)
    return ad.AnnData(sp.csr_matrix(np.concatenate(rows).astype(np.float32)), frame)


def test_the_linear_model_finds_a_change_that_is_linear_in_the_control(task):
    full = linear_data(7, np.random.default_rng(0))
    hidden = DESIGN.cells_of(full, "type_5", "treat_1")
    train = full[~hidden].copy()
    source = full[DESIGN.cells_of(full, "type_5", "ctrl")].copy()
    truth = log_mean_profile(full.X[hidden])
    errors = {
        name: np.abs(profile(methods()[name](train, source, "treat_1", seed=0)) - truth).mean()
        for name in ("linear", "mean shift", "nearest type's shift")
    }
    assert errors["linear"] < 0.5 * min(errors["mean shift"], errors["nearest type's shift"])


def test_the_linear_model_is_the_ridge_regression_of_its_formula(task):
    train, source = task
    controls = np.concatenate([counts(train, f"type_{k}", "ctrl") for k in range(5)])
    axes = PCA(10, svd_solver="full").fit(logs(controls)).components_
    groups = [f"type_{k}" for k in range(1, 5)]
    means = [logs(counts(train, g, "ctrl")).mean(axis=0) @ axes.T for g in groups]
    scores = np.array(means) - np.mean(means, axis=0)
    scale = np.sqrt((scores**2).sum(axis=1).mean())
    scores /= scale
    s = (
        logs(source.X.toarray().astype(float)).mean(axis=0) @ axes.T - np.mean(means, axis=0)
    ) / scale
    changes = np.array(list(observed(train, log_mean_profile)[1].values()))

    def predict(scores, changes, s, penalty):
        center, mean = scores.mean(axis=0), changes.mean(axis=0)
        inverse = np.linalg.inv((scores - center).T @ (scores - center) + penalty * np.eye(10))
        return mean + (s - center) @ inverse @ (scores - center).T @ (changes - mean)

    def left_out(penalty):
        kept = [np.arange(4) != k for k in range(4)]
        return sum(
            ((predict(scores[o], changes[o], scores[k], penalty) - changes[k]) ** 2).mean()
            for k, o in enumerate(kept)
        )

    penalty = min(np.logspace(-3, 3, 13), key=left_out)
    expected = log_mean_profile(source.X) + predict(scores, changes, s, penalty)
    prediction = methods()["linear"](train, source, "treat_1", seed=0)
    np.testing.assert_allclose(profile(prediction), np.maximum(expected, 0), atol=1e-6)


@pytest.mark.parametrize("n_types", [2, 3])
def test_the_linear_model_of_one_or_two_groups_is_nearly_their_mean_shift(n_types):
    full = simulate(300, 60, n_types=n_types, seed=0)
    train = full[~DESIGN.cells_of(full, "type_0", "treat_1")].copy()
    source = full[DESIGN.cells_of(full, "type_0", "ctrl")].copy()
    linear, mean = (
        profile(methods()[name](train, source, "treat_1", seed=0))
        for name in ("linear", "mean shift")
    )
    np.testing.assert_allclose(linear, mean, atol=0.02)


# --------------------------------------------------------------------------------- others


def test_no_change_is_the_source(task):
    train, source = task
    prediction = methods()["no change"](train, source, "treat_1", seed=0)
    assert (prediction.X != source.X).nnz == 0
    assert (prediction.layers["counts"] != source.X).nnz == 0


def test_mean_of_treated_has_the_profile_of_all_treated_training_cells(task):
    train, source = task
    treated = train.X[(train.obs["condition"] == "treat_1").to_numpy()].toarray()
    first, again, other = (
        methods()["mean of treated"](train, source, "treat_1", seed=seed) for seed in (0, 0, 1)
    )
    np.testing.assert_allclose(profile(first), log_mean_profile(treated))
    cells = {cell.tobytes() for cell in treated}
    assert all(cell.tobytes() in cells for cell in first.layers["counts"].toarray())
    assert first.n_obs == source.n_obs
    assert (first.X != again.X).nnz == 0
    assert (first.X != other.X).nnz > 0


@pytest.mark.parametrize("name", ["DISCoVeR", "SCVI"])
def test_networks_predict_expression_and_counts_and_leave_the_cells_as_they_were(task, name):
    train, source = (cells.copy() for cells in task)
    prediction = methods(max_epochs=20)[name](train, source, "treat_1", seed=0)
    assert prediction.shape == source.shape
    np.testing.assert_allclose(np.asarray(prediction.X).sum(axis=1), 1e4, rtol=1e-3)
    drawn = prediction.layers["counts"]
    assert sp.issparse(drawn)
    assert (drawn.data == np.round(drawn.data)).all()
    totals = [np.asarray(x.sum(axis=1)).ravel() for x in (drawn, source.X)]
    assert np.corrcoef(*totals)[0, 1] > 0.75  # at each cell's own library size
    for cells, before in zip((train, source), task, strict=True):
        pd.testing.assert_frame_equal(cells.obs, before.obs)
        assert list(cells.uns) == list(before.uns)


def test_scvi_decodes_under_the_condition_asked_for():
    full = simulate(800, 40, n_types=3, effect_scale=2.0, specific_effect_scale=0.0, seed=0)
    train = full[~DESIGN.cells_of(full, "type_0", "treat_1")].copy()
    source = full[DESIGN.cells_of(full, "type_0", "ctrl")].copy()
    base = log_mean_profile(source.X)
    truth = log_mean_profile(full.X[DESIGN.cells_of(full, "type_0", "treat_1")]) - base
    scvi = methods(max_epochs=60)["SCVI"]
    treated, untreated = (scvi(train, source, c, seed=0) for c in ("treat_1", "ctrl"))
    for cells in ("X", "counts"):
        decoded = (p.X if cells == "X" else p.layers[cells] for p in (treated, untreated))
        changes = [log_mean_profile(expression) - base for expression in decoded]
        assert np.corrcoef(changes[0], truth)[0, 1] > 0.5
        assert np.corrcoef(changes[1], truth)[0, 1] < 0.3
