"""How the game went."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from matplotlib.axes import Axes


def training_curves(
    history: Mapping[str, pd.DataFrame],
    metric: str = "adversary_cross_entropy",
    ax: Axes | None = None,
) -> Axes:
    """Draw one term of the loss over epochs, on training and validation cells.

    Parameters
    ----------
    history
        ``model.history``.
    metric
        Key of the history without ``_train``; for the adversary's cross-entropy and accuracy the
        level of an adversary that reads nothing is drawn beside it.
    ax
        Where to draw; None: a new figure.

    Returns
    -------
    The Axes.

    Raises
    ------
    KeyError
        If the history has no such metric.

    Examples
    --------
    >>> import pandas as pd
    >>> ax = training_curves({"kl_z_train": pd.DataFrame({"kl_z_train": [3.0, 2.0]})}, "kl_z")
    >>> ax.get_xlabel()
    'epoch'
    """
    if f"{metric}_train" not in history:
        known = sorted(key.removesuffix("_train") for key in history if key.endswith("_train"))
        raise KeyError(f"history has no {metric!r}; it has {known}. Choose one of them.")
    ax = ax if ax is not None else plt.subplots(layout="constrained")[1]
    for suffix, label in (("train", "training cells"), ("validation", "validation cells")):
        if (key := f"{metric}_{suffix}") in history:
            curve = history[key]
            ax.plot(curve.index, curve[key].astype(float), label=label)
    chance = metric.replace("adversary_", "adversary_chance_")
    if chance != metric and chance in history:
        level = float(history[chance][chance].iloc[-1])
        ax.axhline(level, color="black", linestyle="--", label="reading nothing")
    unit = "" if metric.endswith("accuracy") else " (nats)"
    ax.set(xlabel="epoch", ylabel=metric.replace("_", " ") + unit)
    ax.legend(frameon=False)
    return ax
