"""Cells in an embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

# Okabe and Ito's palette, which survives colour blindness
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
_MARKERS = ("o", "^", "s", "D", "v", "P")


def latent_scatter(
    embedding: ArrayLike,
    target: ArrayLike,
    *,
    title: str = "",
    axis_name: str = "UMAP",
    ax: Axes | None = None,
) -> Axes:
    """Draw cells in two dimensions, coloured by a class.

    Parameters
    ----------
    embedding
        Coordinates, for example ``adata.obsm["X_umap"]``, shape ``(n_cells, 2)``.
    target
        Class of each cell, shape ``(n_cells,)``; more than 8 also differ by marker.
    title, axis_name
        Labels.
    ax
        Where to draw; None: a new figure.

    Returns
    -------
    The Axes.

    Raises
    ------
    ValueError
        If the embedding is not ``(n_cells, 2)``.

    Examples
    --------
    >>> ax = latent_scatter([[0.0, 0.0], [1.0, 1.0]], ["a", "b"], title="z")
    >>> ax.get_title()
    'z'
    """
    embedding, target = np.asarray(embedding), np.asarray(target).astype(str)
    if embedding.shape != (len(target), 2):
        raise ValueError(
            f"embedding has shape {embedding.shape}; it must be (n_cells, 2) with n_cells="
            f"{len(target)}. Pass for example adata.obsm['X_umap']."
        )
    ax = ax if ax is not None else plt.subplots(layout="constrained")[1]
    # one draw in random order, so that no class covers the others
    order = np.random.default_rng(0).permutation(len(target))
    classes, codes = np.unique(target, return_inverse=True)
    for start in range(0, len(classes), len(PALETTE)):
        marker = _MARKERS[start // len(PALETTE) % len(_MARKERS)]
        shown = order[(codes[order] >= start) & (codes[order] < start + len(PALETTE))]
        colors = [PALETTE[c % len(PALETTE)] for c in codes[shown]]
        ax.scatter(*embedding[shown].T, s=6, c=colors, marker=marker, linewidths=0, alpha=0.8)
        for code, name in enumerate(classes[start : start + len(PALETTE)]):
            ax.scatter([], [], s=20, c=PALETTE[code], marker=marker, label=name)
    ax.set(title=title, xlabel=f"{axis_name} 1", ylabel=f"{axis_name} 2", xticks=[], yticks=[])
    ax.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax
