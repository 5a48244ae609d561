"""Change of each gene against how sure it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def plot_treatment_effect(
    genes: pd.DataFrame,
    *,
    fdr: float = 0.05,
    n_labels: int = 10,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draw the probability of each gene's change over its log2 fold change.

    Parameters
    ----------
    genes
        ``genes`` of :class:`~discover_sc.TreatmentEffect`, of one group: columns ``gene``,
        ``lfc``, ``probability`` and ``fdr``.
    fdr
        Genes with at most this expected share of false calls are emphasised.
    n_labels
        Called genes that are named, those that change most.
    title
        Title.
    ax
        Where to draw; None: a new figure.

    Returns
    -------
    The Axes.

    Raises
    ------
    ValueError
        If a gene occurs more than once: the table holds several groups.

    Examples
    --------
    >>> import pandas as pd
    >>> genes = pd.DataFrame(
    ...     {"gene": ["A", "B"], "lfc": [2.0, 0.1], "probability": [0.99, 0.2], "fdr": [0.01, 0.4]}
    ... )
    >>> ax = plot_treatment_effect(genes)
    >>> ax.texts[0].get_text()
    'A'
    """
    if genes["gene"].duplicated().any():
        groups = sorted(genes["group"].unique())
        raise ValueError(
            f"genes holds the groups {groups}; one is drawn at a time. Pass for example "
            f"genes[genes['group'] == {groups[0]!r}]."
        )
    ax = ax if ax is not None else plt.subplots(layout="constrained")[1]
    called = genes["fdr"] <= fdr
    for chosen, color, size, label in (
        (~called, "#0072B2", 8, "other genes"),
        (called, "#D55E00", 18, f"called at FDR {fdr:g}"),
    ):
        some = genes[chosen]
        ax.scatter(
            some["lfc"],
            some["probability"],
            s=size,
            color=color,
            alpha=0.6,
            linewidths=0,
            label=f"{label} ({len(some)})",
        )
    _name_genes(ax, genes[called], n_labels)
    ax.axvline(0, color="grey", linestyle="--", linewidth=1)
    ax.set(title=title, xlabel="log2 fold change", ylabel="probability of a change")
    ax.legend(frameon=False, loc="center", bbox_to_anchor=(0.5, -0.22), ncols=2)
    return ax


def _name_genes(ax: Axes, called: pd.DataFrame, n_labels: int) -> None:
    """Name the genes that change most, on steps below each other: they share a probability."""
    largest = called.reindex(called["lfc"].abs().sort_values(ascending=False).index)[:n_labels]
    for sign in (-1, 1):
        side = largest[largest["lfc"] * sign > 0]
        for step, row in enumerate(side.itertuples(index=False)):
            ax.annotate(
                row.gene,
                (row.lfc, row.probability),
                xytext=(-3 * sign, -14 - 10 * step),
                textcoords="offset points",
                ha="right" if sign > 0 else "left",
                fontsize="x-small",
                arrowprops={"arrowstyle": "-", "color": "grey", "linewidth": 0.5},
            )
