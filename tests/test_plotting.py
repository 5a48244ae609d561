import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from discover_sc.plotting import (
    counterfactual_scatter,
    latent_scatter,
    plot_counterfactual_benchmark,
    plot_treatment_effect,
    training_curves,
)

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


def legend_texts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def drawn_points(ax):
    """Positions of all points of all scatters, sorted, and their colours."""
    points, colors = [], []
    for collection in ax.collections:
        offsets = np.asarray(collection.get_offsets(), dtype=float)
        points += offsets.tolist()
        faces = collection.get_facecolors()
        colors += [to_hex(faces[i % len(faces)]) for i in range(len(offsets))]
    return sorted(zip(map(tuple, points), colors, strict=True))


def benchmark_table(scores, metric="lfc_r2"):
    """Rows of a benchmark's table from ``{method: {(group, seed): score}}``."""
    return pd.DataFrame(
        {"target": "stim", "group": group, "method": method, "seed": seed, "metric": metric}
        | {"score": score}
        for method, by_group in scores.items()
        for (group, seed), score in by_group.items()
    )


GENES = pd.DataFrame(
    {
        "group": "all",
        "gene": ["A", "B", "C", "D"],
        "lfc": [1.5, -2.0, 0.1, 3.0],
        "probability": [1.0, 0.99, 0.1, 0.98],
        "fdr": [0.0, 0.005, 0.3, 0.01],
    }
)
EVERY_PLOT = pytest.mark.parametrize(
    "draw",
    [
        lambda ax: latent_scatter([[0.0, 0.0], [1.0, 2.0]], ["a", "b"], ax=ax),
        lambda ax: counterfactual_scatter([0.0, 1.0], [0.5, 1.0], ax=ax),
        lambda ax: training_curves({"kl_z_train": pd.DataFrame({"kl_z_train": [1.0]})}, "kl_z", ax),
        lambda ax: plot_counterfactual_benchmark(benchmark_table({"a": {("B", 0): 0.5}}), ax),
        lambda ax: plot_treatment_effect(GENES, ax=ax),
    ],
    ids=[
        "latent_scatter",
        "counterfactual_scatter",
        "training_curves",
        "counterfactual_benchmark",
        "treatment_effect",
    ],
)


@EVERY_PLOT
def test_plots_draw_on_the_axes_given_and_return_them(draw):
    figure, (left, right) = plt.subplots(1, 2)
    assert draw(right) is right
    assert not left.has_data()
    assert plt.get_fignums() == [figure.number]


@EVERY_PLOT
def test_plots_make_one_figure_of_their_own_and_change_no_style(draw):
    before = dict(matplotlib.rcParams)
    ax = draw(None)
    assert plt.get_fignums() == [ax.figure.number]
    assert dict(matplotlib.rcParams) == before


# ----------------------------------------------------------------------------- latents


def test_latent_scatter_draws_each_cell_once_in_the_colour_of_its_class():
    rng = np.random.default_rng(0)
    embedding, target = rng.normal(size=(50, 2)), rng.choice(["ctrl", "stim"], 50)
    ax = latent_scatter(embedding, target, title="z", axis_name="PCA")
    palette = {"ctrl": "#0072b2", "stim": "#d55e00"}
    cells = zip(map(tuple, embedding.tolist()), target, strict=True)
    assert drawn_points(ax) == sorted((cell, palette[name]) for cell, name in cells)
    assert legend_texts(ax) == ["ctrl", "stim"]
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("z", "PCA 1", "PCA 2")
    assert len(ax.get_xticks()) == len(ax.get_yticks()) == 0


def test_latent_scatter_legend_shows_the_colours_of_the_points():
    ax = latent_scatter([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]], ["b", "a", "c"])
    colors = [to_hex(handle.get_facecolor()[0]) for handle in ax.get_legend().legend_handles]
    b, a, c = (color for _, color in drawn_points(ax))  # from left to right
    assert legend_texts(ax) == ["a", "b", "c"]
    assert colors == [a, b, c]


def test_latent_scatter_covers_no_class_with_another():
    """Cells are drawn in random order and not class after class."""
    ax = latent_scatter(np.zeros((200, 2)), np.repeat(["a", "b"], 100))
    faces = [to_hex(face) for face in ax.collections[0].get_facecolors()]
    changes = sum(first != second for first, second in zip(faces, faces[1:], strict=False))
    assert changes > 60  # 100 are expected, 1 if sorted


def looks_of(ax):
    """Per legend entry its colour and the shape of its marker."""
    looks = {}
    for text, handle in zip(legend_texts(ax), ax.get_legend().legend_handles, strict=True):
        marker = handle.get_paths()[0].vertices.round(3).tobytes()
        looks[text] = (to_hex(handle.get_facecolor()[0]), marker)
    return looks


@pytest.mark.parametrize("n_classes", [2, 8, 9, 48])
def test_latent_scatter_gives_each_class_its_own_look(n_classes):
    classes = [f"class {k:02d}" for k in range(n_classes)]
    ax = latent_scatter(np.random.default_rng(0).normal(size=(n_classes, 2)), classes)
    looks = looks_of(ax)
    assert list(looks) == classes
    assert len(set(looks.values())) == n_classes


@pytest.mark.parametrize("shape", [(4, 3), (5, 2), (4,)], ids=["3 columns", "5 cells", "flat"])
def test_latent_scatter_refuses_what_is_no_embedding(shape):
    with pytest.raises(
        ValueError, match=r"embedding has shape .*it must be \(n_cells, 2\).*X_umap"
    ):
        latent_scatter(np.zeros(shape), list("aabb"))


# ---------------------------------------------------------------------- counterfactual


def test_counterfactual_scatter_draws_predicted_over_observed_change():
    predicted, true = [0.1, 1.0, -2.0], [0.0, 1.2, -1.5]
    ax = counterfactual_scatter(predicted, true, title="held-out B cells")
    assert [point for point, _ in drawn_points(ax)] == sorted(zip(true, predicted, strict=True))
    assert ax.get_title() == "held-out B cells"
    assert ax.get_xlabel() == "observed change (log1p of counts per 10,000)"
    assert ax.get_ylabel() == "predicted change (log1p of counts per 10,000)"
    assert legend_texts(ax) == ["perfect prediction"]
    (line,) = ax.get_lines()
    assert line.get_xdata().tolist() == line.get_ydata().tolist() == [-2.0, 1.2]


@pytest.mark.parametrize("named", [True, False], ids=["gene names", "no names"])
def test_counterfactual_scatter_emphasises_the_top_genes(named):
    predicted, true = np.array([0.1, 1.0, -2.0]), np.array([0.0, 1.2, -1.5])
    names = pd.Index(["A", "B", "C"]) if named else None
    ax = counterfactual_scatter(predicted, true, gene_names=names, top=np.array([2, 1]))
    every_gene, top = ax.collections
    assert every_gene.get_offsets().shape == (3, 2)
    np.testing.assert_allclose(top.get_offsets(), [[-1.5, -2.0], [1.2, 1.0]])
    assert legend_texts(ax) == ["perfect prediction", "top genes"]
    assert [text.get_text() for text in ax.texts] == (["C", "B"] if named else [])
    if named:
        assert ax.texts[0].xy == (-1.5, -2.0)


# --------------------------------------------------------------------------- benchmark


def offsets(collection):
    return np.asarray(collection.get_offsets()).round(6).tolist()


def test_benchmark_draws_means_over_seeds_of_each_group_and_a_bar_at_their_mean():
    better = {("B", 0): 0.6, ("B", 1): 0.8, ("T", 0): 0.1, ("T", 1): 0.3}
    ax = plot_counterfactual_benchmark(
        benchmark_table({"good": better, "bad": {("B", 0): -0.5, ("T", 0): float("nan")}})
    )
    points, bars = ax.collections
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["bad", "good"]  # upwards
    assert sorted(offsets(points)) == [[-0.5, 0.15], [0.2, 1.15], [0.7, 1.15]]
    assert sorted(offsets(bars)) == [[-0.5, 0.15], [0.45, 1.15]]
    assert sorted(line.get_xdata()[0] for line in ax.get_lines()) == [0, 1]
    assert ax.get_xlabel() == "(value - better baseline) / (ceiling - better baseline)"
    (top,) = ax.child_axes
    assert [tick.get_text() for tick in top.get_xticklabels()] == ["better baseline", "ceiling"]


def test_benchmark_draws_all_genes_above_the_top_genes_in_another_colour():
    tables = [
        benchmark_table({"a": {("B", 0): score}}, metric)
        for metric, score in (("lfc_r2", 0.6), ("lfc_r2_top20", 0.2), ("lfc_pearson", 0.9))
    ]
    ax = plot_counterfactual_benchmark(pd.concat(tables))
    every_gene, _, top, _ = ax.collections
    assert (offsets(every_gene), offsets(top)) == ([[0.6, 0.15]], [[0.2, -0.15]])
    colors = {to_hex(collection.get_facecolors()[0]) for collection in (every_gene, top)}
    assert colors == {"#0072b2", "#d55e00"}
    assert legend_texts(ax) == [
        "R2 of the log fold change, all genes",
        "R2 of the log fold change, top 20 genes",
    ]


def test_benchmark_keeps_scores_far_below_the_baseline_at_the_left_end():
    ax = plot_counterfactual_benchmark(benchmark_table({"a": {("B", 0): -70.0, ("T", 0): 0.5}}))
    inside, far, bars = ax.collections
    assert (offsets(inside), offsets(far)) == ([[0.5, 0.15]], [[-2.0, 0.15]])
    assert offsets(bars) == [[-2.0, 0.15]]


def test_benchmark_without_scores_is_refused():
    table = benchmark_table({"a": {("B", 0): 0.5}}, "e_distance")
    with pytest.raises(ValueError, match=r"table has no score .*\['e_distance'\]. Pass the result"):
        plot_counterfactual_benchmark(table)


# --------------------------------------------------------------------- treatment effect


def test_treatment_effect_draws_probability_over_fold_change_and_emphasises_called_genes():
    ax = plot_treatment_effect(GENES, fdr=0.02, title="B cells")
    other, called = ax.collections
    np.testing.assert_allclose(other.get_offsets(), [[0.1, 0.1]])
    np.testing.assert_allclose(called.get_offsets(), [[1.5, 1.0], [-2.0, 0.99], [3.0, 0.98]])
    assert legend_texts(ax) == ["other genes (1)", "called at FDR 0.02 (3)"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("log2 fold change", "probability of a change")
    assert ax.get_title() == "B cells"


@pytest.mark.parametrize(("n_labels", "expected"), [(10, ["B", "D", "A"]), (2, ["B", "D"])])
def test_treatment_effect_names_the_called_genes_that_change_most_where_they_lie(
    n_labels, expected
):
    ax = plot_treatment_effect(GENES, n_labels=n_labels)
    assert [text.get_text() for text in ax.texts] == expected
    positions = GENES.set_index("gene").loc[expected, ["lfc", "probability"]]
    np.testing.assert_allclose([text.xy for text in ax.texts], positions)


def test_treatment_effect_draws_one_group_at_a_time():
    both = pd.concat([GENES, GENES.assign(group="B cells")])
    with pytest.raises(ValueError, match=r"groups \['B cells', 'all'\]; one is drawn at a time"):
        plot_treatment_effect(both)


# ---------------------------------------------------------------------------- training


@pytest.fixture
def history():
    def curve(name, values):
        return pd.DataFrame({name: values}, index=pd.RangeIndex(len(values), name="epoch"))

    curves = {
        "adversary_cross_entropy_train": [0.7, 0.6, 0.65],
        "adversary_cross_entropy_validation": [0.8, 0.75, 0.72],
        "adversary_accuracy_train": [0.5, 0.6, 0.55],
        "adversary_chance_cross_entropy": [0.69, 0.69, 0.69],
        "adversary_chance_accuracy": [0.52, 0.52, 0.52],
        "kl_z_train": [3.0, 2.0, 1.0],
    }
    return {name: curve(name, values) for name, values in curves.items()}


def test_training_curves_draw_training_and_validation_cells_over_epochs(history):
    ax = training_curves(history)
    train, validation, chance = ax.get_lines()
    assert train.get_xdata().tolist() == validation.get_xdata().tolist() == [0, 1, 2]
    assert train.get_ydata().tolist() == [0.7, 0.6, 0.65]
    assert validation.get_ydata().tolist() == [0.8, 0.75, 0.72]
    assert set(chance.get_ydata()) == {0.69}
    assert legend_texts(ax) == ["training cells", "validation cells", "reading nothing"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "adversary cross entropy (nats)")


def test_an_accuracy_has_no_unit_and_its_own_chance_level(history):
    ax = training_curves(history, "adversary_accuracy")
    assert ax.get_ylabel() == "adversary accuracy"
    assert set(ax.get_lines()[-1].get_ydata()) == {0.52}
    assert legend_texts(ax) == ["training cells", "reading nothing"]


def test_a_term_without_chance_level_is_drawn_alone(history):
    ax = training_curves(history, "kl_z")
    assert legend_texts(ax) == ["training cells"]
    assert ax.get_lines()[0].get_ydata().tolist() == [3.0, 2.0, 1.0]
    assert ax.get_ylabel() == "kl z (nats)"


def test_training_curves_refuse_an_unknown_metric_and_list_the_known(history):
    known = r"\['adversary_accuracy', 'adversary_cross_entropy', 'kl_z'\]"
    with pytest.raises(KeyError, match=f"history has no 'kl_q'; it has {known}. Choose one"):
        training_curves(history, "kl_q")
