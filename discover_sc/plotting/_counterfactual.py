"""Predicted against observed change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike


def counterfactual_scatter(
    predicted_change: ArrayLike,
    true_change: ArrayLike,
    *,
    gene_names: Sequence[str] | None = None,
    top: ArrayLike = (),
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draw the predicted over the observed log fold change of each gene.

    Parameters
    ----------
    predicted_change, true_change
        Treated minus control profile (log1p of mean counts per 10,000), shape ``(n_genes,)``.
    gene_names
        Names that label the top genes.
    top
        Indices of genes to emphasise.
    title
        Title.
    ax
        Where to draw; None: a new figure.

    Returns
    -------
    The Axes.

    Examples
    --------
    >>> ax = counterfactual_scatter([0.1, 1.0], [0.0, 1.2], gene_names=["A", "B"], top=[1])
    >>> ax.texts[0].get_text()
    'B'
    """
    predicted_change, true_change = np.asarray(predicted_change), np.asarray(true_change)
    top = np.asarray(top, dtype=int)
    ax = ax if ax is not None else plt.subplots(layout="constrained")[1]
    both = np.concatenate([predicted_change, true_change])
    ends = [both.min(), both.max()]
    ax.plot(ends, ends, color="grey", linestyle="--", linewidth=1, label="perfect prediction")
    ax.scatter(true_change, predicted_change, s=8, color="#0072B2", alpha=0.5, linewidths=0)
    if len(top):
        ax.scatter(
            true_change[top], predicted_change[top], s=18, color="#D55E00", label="top genes"
        )
        for gene in top if gene_names is not None else ():
            ax.annotate(
                gene_names[gene],
                (true_change[gene], predicted_change[gene]),
                xytext=(3, 3),
                textcoords="offset points",
                fontsize="x-small",
            )
    ax.set(
        title=title,
        xlabel="observed change (log1p of counts per 10,000)",
        ylabel="predicted change (log1p of counts per 10,000)",
    )
    ax.legend(frameon=False)
    return ax
