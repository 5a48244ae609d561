"""How far each method gets from the better baseline to the noise ceiling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from ._latents import PALETTE

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_METRICS = {
    "lfc_r2": "R2 of the log fold change, all genes",
    "lfc_r2_top20": "R2 of the log fold change, top 20 genes",
}
_LEFT_END = -2.0  # scores below it are drawn there


def plot_counterfactual_benchmark(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the score of each method, one point per held-out group.

    A point is the mean over seeds; the vertical bar is the mean over groups. Scores below -2 are
    drawn at -2 as triangles that point to the left, and their bar is drawn there too. Methods
    stand in order of that mean over all genes, the best on top; those without any score are left
    out.

    Parameters
    ----------
    table
        Result of :func:`~discover_sc.evaluation.benchmark_counterfactual`.
    ax
        Where to draw; None: a new figure.

    Returns
    -------
    The Axes.

    Raises
    ------
    ValueError
        If the table has no score of ``lfc_r2`` and ``lfc_r2_top20``.

    Examples
    --------
    >>> import pandas as pd
    >>> row = {"target": "stim", "group": "B", "seed": 0, "metric": "lfc_r2"}
    >>> rows = [row | {"method": "a", "score": 0.1}, row | {"method": "b", "score": 0.7}]
    >>> ax = plot_counterfactual_benchmark(pd.DataFrame(rows))
    >>> [tick.get_text() for tick in ax.get_yticklabels()]
    ['a', 'b']
    """
    scores = table[table["metric"].isin(_METRICS)].dropna(subset="score")
    if scores.empty:
        raise ValueError(
            f"table has no score of {list(_METRICS)}; its metrics are "
            f"{sorted(table['metric'].unique())}. Pass the result of benchmark_counterfactual."
        )
    points = scores.groupby(["metric", "method", "target", "group"], observed=True)["score"].mean()
    means = points.groupby(["metric", "method"], observed=True).mean()
    order = _ascending(means)
    ax = ax if ax is not None else plt.subplots(layout="constrained")[1]
    for k, (metric, label) in enumerate(_METRICS.items()):
        if metric in points.index.get_level_values("metric"):
            _draw(ax, points[metric], means[metric], order, 0.15 - 0.3 * k, PALETTE[k], label)
    ax.axvline(0, color="black", linestyle="--", linewidth=1)
    ax.axvline(1, color="black", linestyle=":", linewidth=1)
    top = ax.secondary_xaxis("top")
    top.set_xticks([0, 1], ["better baseline", "ceiling"])
    ax.set_yticks(range(len(order)), order)
    ax.set(xlabel="(value - better baseline) / (ceiling - better baseline)")
    ax.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15))
    return ax


def _ascending(means: pd.Series) -> list[str]:
    """Return the methods by their mean over all genes, the worst first."""
    first = next(metric for metric in _METRICS if metric in means.index.get_level_values("metric"))
    ranked = means[first].sort_values(kind="stable").index
    return [*means.index.get_level_values("method").unique().difference(ranked), *ranked]


def _draw(
    ax: Axes,
    points: pd.Series,
    means: pd.Series,
    order: list[str],
    offset: float,
    color: str,
    label: str,
) -> None:
    """Draw one metric of all methods in one colour."""
    height = points.index.get_level_values("method").map(order.index).to_numpy() + offset
    values = points.to_numpy()
    far = values < _LEFT_END
    ax.scatter(values[~far], height[~far], s=14, color=color, alpha=0.6, linewidths=0, label=label)
    if far.any():
        ends = np.full(far.sum(), _LEFT_END)
        ax.scatter(ends, height[far], s=14, color=color, alpha=0.6, linewidths=0, marker="<")
    bars = means.clip(lower=_LEFT_END)
    rows = [order.index(method) + offset for method in bars.index]
    ax.scatter(bars, rows, s=120, color=color, marker="|")
