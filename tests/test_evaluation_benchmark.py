import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.stats import ttest_ind
from sklearn.decomposition import PCA
from sklearn.metrics import r2_score

from discover_sc.data import simulate
from discover_sc.evaluation import (
    benchmark_counterfactual,
    energy_distance,
    gap_closed,
    interval_coverage,
    log_mean_profile,
    squared_mmd,
    top_overlap,
)
from discover_sc.evaluation._held_out import METRICS, HeldOutGroup

COLUMNS = ["target", "group", "method", "seed", "metric", "value", "baseline", "ceiling", "score"]
BASELINES = ["mean shift", "nearest type's shift"]
KEYS = {"condition_key": "condition", "labels_key": "cell_type", "control": "ctrl"}


@pytest.fixture(scope="module")
def cells():
    return simulate(400, 60, n_types=3, effect_scale=1.5, seed=0)


def of(adata, group, condition):
    obs = adata.obs
    return ((obs["cell_type"] == group) & (obs["condition"] == condition)).to_numpy()


def doubled(train, source, target, seed):
    """Predict every second gene twice as high, as profile and as cells."""
    factor = np.where(np.arange(source.n_vars) % 2, 2.0, 1.0)
    expected = sp.csr_matrix(source.X.multiply(factor))
    prediction = ad.AnnData(expected, source.obs, pd.DataFrame(index=source.var_names))
    prediction.layers["counts"] = expected
    return prediction


def run(adata, methods=None, **options):
    return benchmark_counterfactual(
        adata, **KEYS, **({"methods": methods, "seeds": [0], "min_cells": 20} | options)
    )


@pytest.fixture(scope="module")
def table(cells):
    return run(cells, {"doubled": doubled})


def value_of(table, **where):
    rows = table[np.logical_and.reduce([table[k] == v for k, v in where.items()])]
    assert len(rows) == 1
    return rows.iloc[0]


# --------------------------------------------------------------------------------- table


def test_table_has_one_row_per_target_group_method_seed_and_metric():
    adata = simulate(600, 40, n_types=2, n_conditions=3, seed=0)
    table = run(adata, {"doubled": doubled}, seeds=[3, 5])
    assert list(table.columns) == COLUMNS
    axes = [
        ["treat_1", "treat_2"],
        ["type_0", "type_1"],
        [3, 5],
        [*BASELINES, "doubled"],
        list(METRICS),
    ]
    expected = pd.MultiIndex.from_product(axes)
    rows = pd.MultiIndex.from_frame(table[["target", "group", "seed", "method", "metric"]])
    assert rows.tolist() == expected.tolist()
    asked = run(adata, {}, target="treat_2")
    assert asked["target"].unique().tolist() == ["treat_2"]


def test_counts_of_a_layer_score_as_those_of_x(cells, table):
    moved = ad.AnnData(cells.X * 0, cells.obs, cells.var, layers={"raw": cells.X})
    pd.testing.assert_frame_equal(run(moved, {"doubled": doubled}, layer="raw"), table)


def test_methods_are_handed_neither_held_out_cells_nor_what_may_know_them(cells):
    seen = []

    def recording(train, source, target, seed):
        seen.append((train, source, target, seed))
        train.obs["condition"] = "?"  # theirs to change
        return doubled(train, source, target, seed)

    adata = cells.copy()
    adata.obsm["X_pca"] = np.ones((adata.n_obs, 2))
    adata.uns["pca"], adata.var["mean"] = {}, 1.0
    run(adata, {"first": recording, "second": recording}, seeds=[7])
    assert len(seen) == 3 * 2
    for k, (train, source, target, seed) in enumerate(seen):
        group = f"type_{k // 2}"
        hidden = of(adata, group, "treat_1")
        assert train.obs_names.tolist() == adata.obs_names[~hidden].tolist()
        assert source.obs_names.tolist() == adata.obs_names[of(adata, group, "ctrl")].tolist()
        assert (target, seed) == ("treat_1", 7)
        for given in (train, source):
            for annotation in (given.obsm, given.varm, given.obsp, given.varp, given.uns):
                assert not list(annotation)
            assert set(given.layers) <= {None}  # .X, under anndata 0.13
            assert not list(given.var)
    assert (adata.obs["condition"] == cells.obs["condition"]).all()


# ------------------------------------------------------------------------------- metrics


def profile(fractions):
    return np.log1p(fractions.mean(axis=0))


def plain(adata, group, n_splits=20):
    """The shared figures of one held-out group in plain numpy, SciPy and scikit-learn."""
    x = adata.X.toarray().astype(float)
    fractions = x / x.sum(axis=1, keepdims=True) * 1e4
    types, conditions = (adata.obs[k].astype(str).to_numpy() for k in ("cell_type", "condition"))

    def cells(t, c):
        return fractions[(types == t) & (conditions == c)]

    treated, control = cells(group, "treat_1"), cells(group, "ctrl")
    statistic, _ = ttest_ind(np.log1p(treated), np.log1p(control))
    top = np.argsort(-np.abs(np.nan_to_num(statistic)))
    base = profile(control)

    def scores(predicted, true):
        change, predicted = true - base, predicted - base
        found = {
            "lfc_r2": r2_score(change, predicted),
            "lfc_pearson": np.corrcoef(change, predicted)[0, 1],
        }
        for n in (20, 50):
            some = top[:n]
            found[f"lfc_r2_top{n}"] = r2_score(change[some], predicted[some])
            found[f"lfc_pearson_top{n}"] = np.corrcoef(change[some], predicted[some])[0, 1]
        return found

    others = [t for t in np.unique(types) if t != group]
    changes = {t: profile(cells(t, "treat_1")) - profile(cells(t, "ctrl")) for t in others}
    away = {t: np.linalg.norm(profile(cells(t, "ctrl")) - base) for t in others}
    shifts = {
        "mean shift": sum(changes.values()) / len(changes),
        "nearest type's shift": changes[min(away, key=away.get)],
    }
    rng, halves = np.random.default_rng(0), []
    for _ in range(n_splits):
        order = rng.permutation(np.arange(len(treated)))
        first, second = treated[order[: len(order) // 2]], treated[order[len(order) // 2 :]]
        halves.append(scores(profile(first), profile(second)))
    true = profile(treated)
    factor = np.where(np.arange(x.shape[1]) % 2, 2.0, 1.0)
    double = control * factor
    predictions = {name: np.maximum(base + shift, 0) for name, shift in shifts.items()}
    predictions["doubled"] = profile(double / double.sum(axis=1, keepdims=True) * 1e4)
    ceiling = pd.DataFrame(halves).mean().to_dict()
    return {name: scores(p, true) for name, p in predictions.items()}, ceiling


@pytest.mark.parametrize("group", ["type_0", "type_1", "type_2"])
def test_scores_of_the_change_are_those_of_a_plain_implementation(cells, table, group):
    methods, ceiling = plain(cells, group)
    for method, scores in methods.items():
        for metric, expected in scores.items():
            row = value_of(table, group=group, method=method, metric=metric)
            assert row["value"] == pytest.approx(expected, abs=1e-9), (method, metric)
            assert row["ceiling"] == pytest.approx(ceiling[metric], abs=1e-9), metric
            better = max(methods[name][metric] for name in BASELINES)
            assert row["baseline"] == pytest.approx(better, abs=1e-9)
            if ceiling[metric] > better:
                closed = (expected - better) / (ceiling[metric] - better)
                assert row["score"] == pytest.approx(closed, abs=1e-6)
            else:
                assert np.isnan(row["score"])


def test_distances_are_taken_on_components_of_the_observed_cells(cells, table):
    treated, control = (cells.X[of(cells, "type_1", c)].toarray() for c in ("treat_1", "ctrl"))

    def logs(x):
        x = x.astype(float)
        return np.log1p(1e4 * x / x.sum(axis=1, keepdims=True))

    axes = PCA(50, svd_solver="full").fit(np.concatenate([logs(treated), logs(control)]))
    double = control * np.where(np.arange(60) % 2, 2.0, 1.0)
    pair = axes.transform(logs(double)), axes.transform(logs(treated))
    for metric, distance in (("e_distance", energy_distance), ("squared_mmd", squared_mmd)):
        row = value_of(table, group="type_1", method="doubled", metric=metric)
        assert row["value"] == pytest.approx(distance(*pair), rel=1e-6)
        better = min(
            value_of(table, group="type_1", method=name, metric=metric)["value"]
            for name in BASELINES
        )
        assert row["baseline"] == better
        closed = (better - row["value"]) / (better - row["ceiling"])
        assert row["score"] == pytest.approx(closed)


def test_variances_are_those_of_the_predicted_and_observed_logs(cells, table):
    def variances(x):
        x = x.toarray().astype(float)
        return np.log1p(1e4 * x / x.sum(axis=1, keepdims=True)).var(axis=0, ddof=1)

    treated = cells.X[of(cells, "type_2", "treat_1")]
    source = cells[of(cells, "type_2", "ctrl")]
    expected = r2_score(variances(treated), variances(doubled(None, source, "", 0).X))
    row = value_of(table, group="type_2", method="doubled", metric="variance_r2")
    assert row["value"] == pytest.approx(expected)


def test_the_truth_itself_scores_at_the_top(cells):
    def truth(train, source, target, seed):
        group = source.obs["cell_type"].iloc[0]
        prediction = cells[of(cells, group, target)].copy()
        prediction.layers["counts"] = prediction.X
        mean = pd.DataFrame({group: log_mean_profile(prediction.X)}, index=prediction.var_names)
        prediction.varm["discover_mean_lower"] = mean - 0.1
        prediction.varm["discover_mean_upper"] = mean + 0.1
        return prediction

    table = run(cells, {"truth": truth})
    values = table[table["method"] == "truth"].groupby("metric")["value"].mean()
    for metric, value in values.items():
        if metric == "e_distance":
            assert value < 0  # distances of distinct cells: below 0 where both are the same cells
        elif metric == "squared_mmd":
            assert value < 0
        else:
            assert value == pytest.approx(1.0), metric


def test_many_cells_are_sampled_for_distances(cells, monkeypatch):
    monkeypatch.setattr("discover_sc.evaluation._held_out._MAX_CELLS", 30)
    treated, control = (cells.X[of(cells, "type_1", c)] for c in ("treat_1", "ctrl"))
    sampled = HeldOutGroup("type_1", treated, control)
    prediction = doubled(None, cells[of(cells, "type_1", "ctrl")], "", 0)
    first, again = sampled.scores(prediction), sampled.scores(prediction)
    assert first == pytest.approx(again, nan_ok=True)
    monkeypatch.undo()
    every = HeldOutGroup("type_1", treated, control).scores(prediction)
    assert first["e_distance"] != every["e_distance"]
    assert first["lfc_r2"] == every["lfc_r2"]  # means are over all cells


# ------------------------------------------------------------------- what a method offers


def test_a_method_without_cells_has_no_distances_and_without_interval_no_coverage(cells):
    def mean_only(train, source, target, seed):
        return ad.AnnData(source.X, source.obs, pd.DataFrame(index=source.var_names))

    table = run(cells, {"mean only": mean_only})
    missing = table[(table["method"] == "mean only") & table["value"].isna()]["metric"].unique()
    of_cells = ["e_distance", "squared_mmd", "variance_r2", "variance_r2_top20"]
    of_no_change = ["lfc_pearson", "lfc_pearson_top20", "lfc_pearson_top50", "top50_overlap"]
    assert sorted(missing) == sorted([*of_cells, *of_no_change, "interval_coverage"])


def with_interval(columns):
    def method(train, source, target, seed):
        prediction = doubled(train, source, target, seed)
        lower = pd.DataFrame(0.0, index=source.var_names, columns=columns)
        prediction.varm["discover_mean_lower"] = lower
        prediction.varm["discover_mean_upper"] = lower + 4.0
        return prediction

    return method


def test_coverage_is_the_share_of_observed_group_means_inside(cells):
    table = run(cells, {"method": with_interval(["type_0", "type_1", "type_2"])})
    for group in ("type_0", "type_1"):
        row = value_of(table, group=group, method="method", metric="interval_coverage")
        observed = log_mean_profile(cells.X[of(cells, group, "treat_1")])
        assert row["value"] == (observed <= 4.0).mean()
        assert 0 < row["value"] < 1
        assert row[["baseline", "ceiling", "score"]].isna().all()


def test_an_interval_of_other_groups_is_refused(cells):
    with pytest.raises(KeyError, match=r"columns \['T'\]; the interval of the group 'type_0' is"):
        run(cells, {"method": with_interval(["T"])})


def test_a_prediction_of_other_genes_is_refused(cells):
    def reordered(train, source, target, seed):
        return doubled(train, source, target, seed)[:, ::-1].copy()

    with pytest.raises(ValueError, match="prediction of 'odd' has 60 genes that are not those"):
        run(cells, {"odd": reordered})


# ------------------------------------------------------------------------------- leakage


def test_no_method_sees_the_held_out_cells(monkeypatch):
    """With noise in their place, every prediction of that group is the same to the last bit."""
    adata = simulate(300, 40, n_types=3, seed=0)
    hidden = of(adata, "type_0", "treat_1")
    noisy = adata.copy()
    counts = noisy.X.toarray()
    counts[hidden] = np.random.default_rng(0).poisson(5.0, counts[hidden].shape)
    noisy.X = sp.csr_matrix(counts)
    predictions = {"clean": [], "noise": []}
    score = HeldOutGroup.scores
    for name, cells in (("clean", adata), ("noise", noisy)):

        def recording(held_out, prediction, name=name):
            predictions[name].append((held_out._group, prediction))
            return score(held_out, prediction)

        monkeypatch.setattr(HeldOutGroup, "scores", recording)
        table = run(cells, max_epochs=2)
    n_methods = table["method"].nunique()
    assert n_methods == 7
    differing = set()
    pairs = zip(predictions["clean"], predictions["noise"], strict=True)
    for k, ((group, clean), (_, noise)) in enumerate(pairs):
        same = [np.array_equal(*map(dense, (clean.X, noise.X)))]
        for layer in clean.layers:
            if layer is not None:  # .X, under anndata 0.13
                same.append(np.array_equal(*(dense(p.layers[layer]) for p in (clean, noise))))
        for key in clean.varm:
            same.append(np.array_equal(*(np.asarray(p.varm[key]) for p in (clean, noise))))
        if "log_mean_profile" in clean.var:
            same.append(clean.var["log_mean_profile"].equals(noise.var["log_mean_profile"]))
        if group == "type_0":
            assert all(same), table["method"].unique()[k % n_methods]
        elif not all(same):
            differing.add(table["method"].unique()[k % n_methods])
    # the other groups' predictions do learn from those cells, but for one method that learns not
    assert differing == set(table["method"]) - {"no change"}


def dense(x):
    return x.toarray() if sp.issparse(x) else np.asarray(x)


def test_the_seed_decides_what_the_networks_predict(cells):
    options = {"max_epochs": 1, "target": "treat_1"}
    first, again, other = (run(cells, seeds=[s], **options)["value"] for s in (0, 0, 1))
    pd.testing.assert_series_equal(first, again)
    assert (first != other).any()


# --------------------------------------------------------------------------------- score


def test_gap_closed_by_hand():
    value, baseline = np.array([0.7, 0.4, 0.9, 0.5]), np.array([0.5, 0.5, 0.5, 0.5])
    ceiling = np.array([0.9, 0.9, 0.52, 0.5])
    np.testing.assert_allclose(
        gap_closed(value, baseline, ceiling), [0.5, -0.25, 20.0, np.nan], atol=1e-12
    )
    np.testing.assert_allclose(
        gap_closed(value, baseline, ceiling, min_gap=0.05), [0.5, -0.25, 8.0, 0.0], atol=1e-12
    )


def test_a_ceiling_below_the_baseline_leaves_no_way_to_go():
    assert np.isnan(gap_closed(0.6, 0.5, 0.4))
    assert gap_closed(0.6, 0.5, 0.4, min_gap=0.05) == pytest.approx(2.0)


def test_a_negative_way_is_refused():
    with pytest.raises(ValueError, match="min_gap is -0.1; it must not be negative. Choose 0"):
        gap_closed(0.6, 0.5, 0.4, min_gap=-0.1)


# ------------------------------------------------------------------- overlap and coverage


def test_top_overlap_by_hand():
    true = [5.0, -4.0, 3.0, 0.0, 0.1]
    assert top_overlap([0.0, 9.0, -8.0, 7.0, 0.0], true, n_top=3) == pytest.approx(2 / 3)
    assert top_overlap(np.negative(true), true, n_top=3) == 1.0  # size, not sign
    assert top_overlap([0.0, 9.0, -8.0, 7.0, 0.0], true) == 1.0  # fewer genes than 50
    assert np.isnan(top_overlap([0.0] * 5, true))


def test_interval_coverage_by_hand():
    assert interval_coverage([0, 0, 0, 1], [1, 1, 1, 2], [0.0, 1.0, 1.1, 0.9]) == 0.5


@pytest.mark.parametrize("lower", [2.0, np.nan], ids=["reversed", "NaN"])
def test_intervals_that_are_none_are_refused(lower):
    with pytest.raises(ValueError, match="1 of 2 intervals .*lower <= upper. Check which"):
        interval_coverage([lower, 0.0], [1.0, 1.0], [0.5, 0.5])


# ------------------------------------------------------------------------------- refusal


@pytest.mark.parametrize("key", ["condition_key", "labels_key"])
def test_a_missing_column_is_refused(cells, key):
    with pytest.raises(KeyError, match=f"{key} 'no' is not a column of adata.obs; .*Choose one"):
        benchmark_counterfactual(cells, **(KEYS | {key: "no"}))


def test_a_missing_layer_is_refused(cells):
    with pytest.raises(KeyError, match="layer 'no' is not in adata.layers; .*or None for adata.X"):
        run(cells, {}, layer="no")


@pytest.mark.parametrize("target", ["no", "ctrl"])
def test_an_unknown_target_or_the_control_is_no_target(cells, target):
    with pytest.raises(ValueError, match=rf"target is '{target}'; .* \['treat_1'\]. Choose one"):
        run(cells, {}, target=target)


def test_an_unknown_control_is_refused(cells):
    with pytest.raises(ValueError, match=r"control is 'no'; levels .*'treat_1'\]. Choose one"):
        benchmark_counterfactual(cells, **(KEYS | {"control": "no"}))


def test_fewer_than_two_groups_cannot_be_left_out(cells):
    one = cells[(cells.obs["cell_type"] == "type_1").to_numpy()]
    with pytest.raises(ValueError, match=r"min_cells=20 cells .*: \['type_1'\]. .* at least two"):
        run(one, {})


def test_a_method_cannot_take_a_baseline_s_name(cells):
    with pytest.raises(ValueError, match=r"methods names \['mean shift'\], .*another name"):
        run(cells, {"mean shift": doubled})
