"""Leave one group's treated cells out, predict them by every method, and score the predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd

from ._held_out import LOWER_IS_BETTER, HeldOutGroup
from ._rivals import BASELINES, Design, baselines, counterfactual_methods

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import ArrayLike

    from ._rivals import CounterfactualMethod


def gap_closed(
    value: ArrayLike, baseline: ArrayLike, ceiling: ArrayLike, *, min_gap: float = 0.0
) -> np.ndarray:
    r"""How much of the way from a baseline to the noise ceiling a prediction goes.

    .. math:: \frac{\text{value} - \text{baseline}}
                   {\max(\text{ceiling} - \text{baseline}, \text{min\_gap})}

    Parameters
    ----------
    value, baseline, ceiling
        Scores of which higher is better (turn the sign of distances), arrays that broadcast.
    min_gap
        Smallest way to divide by. A ceiling that is close to the baseline makes the ratio large
        and noisy; 0.05 bounds it, and gives a number where the ceiling is below the baseline.

    Returns
    -------
    1 at the ceiling, 0 at the baseline, negative below it; NaN where there is no way to go: the
    ceiling is not above the baseline and ``min_gap`` is 0.

    Raises
    ------
    ValueError
        If ``min_gap`` is negative.

    Examples
    --------
    >>> gap_closed([0.6, 0.6], [0.5, 0.5], [0.7, 0.4]).round(2)
    array([0.5, nan])
    >>> gap_closed([0.6, 0.6], [0.5, 0.5], [0.7, 0.4], min_gap=0.05).round(2)
    array([0.5, 2. ])
    """
    if not min_gap >= 0:
        raise ValueError(f"min_gap is {min_gap}; it must not be negative. Choose 0 or 0.05.")
    baseline, ceiling = np.asarray(baseline, dtype=float), np.asarray(ceiling, dtype=float)
    gap = np.maximum(ceiling - baseline, min_gap)
    return (np.asarray(value) - baseline) / np.where(gap > 0, gap, np.nan)


def benchmark_counterfactual(
    adata: ad.AnnData,
    condition_key: str,
    labels_key: str,
    *,
    control: str,
    target: str | None = None,
    methods: Mapping[str, CounterfactualMethod] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    layer: str | None = None,
    min_cells: int = 50,
    max_epochs: int | None = None,
) -> pd.DataFrame:
    """Table of how well each method predicts treated cells that it has not seen.

    For each group and each target in turn, the treated cells of that group are taken out, each
    method is fitted anew on what is left and predicts them from the group's control cells. Methods
    are handed nothing but counts, ``obs`` and gene names: no other layer, embedding or
    annotation of genes, which might have been computed with the held-out cells. (Columns of
    ``obs`` are handed over as they are.)

    Parameters
    ----------
    adata
        Cells with counts; not modified.
    condition_key, labels_key
        Columns of ``adata.obs`` with the condition and with the group.
    control
        Level of ``condition_key`` that the prediction starts from.
    target
        Level to predict; None: each other level in turn.
    methods
        Per name a function of (training cells, source cells, target, seed) that returns the
        predicted cells as AnnData; see the user guide for what it may hold. None: all of
        :func:`counterfactual_methods`. The baselines ``"mean shift"`` and ``"nearest type's
        shift"``, which the score needs, are always run beside them.
    seeds
        Seeds; each method is fitted and scored once with each.
    layer
        Layer of the counts; None: ``.X``.
    min_cells
        Cells under control and under the target that a group must have to be held out, and to be
        learned from by the baselines.
    max_epochs
        Epochs of the networks that ``methods=None`` trains; None: the default of each.

    Returns
    -------
    One row per ``target``, ``group``, ``method``, ``seed`` and ``metric``, with the columns
    ``value``; ``baseline``, the better value of the two baselines; ``ceiling``, that of one half
    of the treated cells as a prediction of the other; ``score``, the :func:`gap_closed` between
    the two: 1 at the ceiling, 0 at the better baseline, NaN where the ceiling is not better than
    the baseline. All four follow the metric: ``e_distance`` and ``squared_mmd`` are better when
    lower, their ``score`` when higher. ``interval_coverage`` is NaN for methods without interval,
    and has no baseline, ceiling and score.

    Raises
    ------
    KeyError
        If a column or the layer does not exist.
    ValueError
        If the control or the target is not a level, if fewer than two groups have enough cells
        under both, or if ``methods`` names a baseline.

    Notes
    -----
    The networks that ``methods=None`` trains set ``scvi.settings.seed``.

    Examples
    --------
    >>> import discover_sc
    >>> adata = discover_sc.data.simulate(300, 40, n_types=3)
    >>> fits = counterfactual_methods("condition", "cell_type", control="ctrl", min_cells=20)
    >>> table = benchmark_counterfactual(
    ...     adata,
    ...     "condition",
    ...     "cell_type",
    ...     control="ctrl",
    ...     methods={"linear": fits["linear"]},
    ...     seeds=[0],
    ...     min_cells=20,
    ... )
    >>> list(table["method"].unique())
    ['mean shift', "nearest type's shift", 'linear']
    """
    design = Design(condition_key, labels_key, control, min_cells)
    counts = _counts_only(adata, design, layer)
    if methods is None:
        options = {"control": control, "min_cells": min_cells, "max_epochs": max_epochs}
        methods = counterfactual_methods(condition_key, labels_key, **options)
    _check_methods(methods)
    methods = {**baselines(design), **methods}
    pairs = [(t, g) for t in _targets(counts, design, target) for g in _groups(counts, design, t)]
    rows = []
    for level, group in pairs:
        rows += _hold_out(counts, design, level, group, methods, seeds)
    return _scored(pd.DataFrame(rows))


def _hold_out(
    adata: ad.AnnData,
    design: Design,
    target: str,
    group: str,
    methods: Mapping[str, CounterfactualMethod],
    seeds: Iterable[int],
) -> list[dict]:
    """Return one row per method, seed and metric for one group under one target."""
    hidden = design.cells_of(adata, group, target)
    source = adata[design.cells_of(adata, group, design.control)]
    held_out = HeldOutGroup(group, adata.X[hidden], source.X)
    ceiling = held_out.ceiling()
    rows = []
    for seed in seeds:
        for name, method in methods.items():
            # copies, since methods may register columns of their own
            prediction = method(adata[~hidden].copy(), source.copy(), target, seed)
            _check_prediction(prediction, name, adata)
            row = {"target": target, "group": group, "method": name, "seed": seed}
            rows += [
                {**row, "metric": metric, "value": value, "ceiling": ceiling[metric]}
                for metric, value in held_out.scores(prediction).items()
            ]
    return rows


def _scored(table: pd.DataFrame) -> pd.DataFrame:
    """Add the better baseline and the score."""
    sign = np.where(table["metric"].isin(LOWER_IS_BETTER), -1.0, 1.0)
    is_baseline = table["method"].isin(BASELINES).to_numpy()
    task = [table[column] for column in ("target", "group", "seed", "metric")]
    of_baselines = (sign * table["value"]).where(is_baseline)
    better = of_baselines.groupby(task).transform("max")
    table["score"] = gap_closed(sign * table["value"], better, sign * table["ceiling"])
    table.insert(table.columns.get_loc("ceiling"), "baseline", sign * better)
    return table


# -------------------------------------------------------------------------------- checks


def _counts_only(adata: ad.AnnData, design: Design, layer: str | None) -> ad.AnnData:
    """Return counts, ``obs`` and gene names, and nothing that may know the held-out cells."""
    for name in ("condition_key", "labels_key"):
        column = getattr(design, name)
        if column not in adata.obs:
            raise KeyError(
                f"{name} {column!r} is not a column of adata.obs; columns are "
                f"{list(adata.obs.columns)}. Choose one of them."
            )
    if layer is not None and layer not in adata.layers:
        raise KeyError(
            f"layer {layer!r} is not in adata.layers; layers are {list(adata.layers)}. Choose one "
            "of them, or None for adata.X."
        )
    counts = adata.X if layer is None else adata.layers[layer]
    return ad.AnnData(counts, adata.obs.copy(), pd.DataFrame(index=adata.var_names))


def _targets(adata: ad.AnnData, design: Design, target: str | None) -> list[str]:
    levels = sorted(adata.obs[design.condition_key].astype(str).unique())
    if design.control not in levels:
        raise ValueError(
            f"control is {design.control!r}; levels of {design.condition_key!r} are {levels}. "
            "Choose one of them."
        )
    others = [level for level in levels if level != design.control]
    if target is not None and target not in others:
        raise ValueError(
            f"target is {target!r}; levels of {design.condition_key!r} beside the control are "
            f"{others}. Choose one of them, or None for each in turn."
        )
    return others if target is None else [target]


def _groups(adata: ad.AnnData, design: Design, target: str) -> list[str]:
    groups = design.groups_of(adata, target)
    if len(groups) < 2:
        raise ValueError(
            f"Groups of {design.labels_key!r} with at least min_cells={design.min_cells} cells "
            f"under {design.control!r} and under {target!r}: {groups}. Leaving one out needs at "
            "least two. Lower min_cells, or choose another target."
        )
    return groups


def _check_methods(methods: Mapping[str, CounterfactualMethod]) -> None:
    taken = sorted(set(methods) & set(BASELINES))
    if taken:
        raise ValueError(
            f"methods names {taken}, the baselines that are always run. Give these another name "
            "or leave them out."
        )


def _check_prediction(prediction: ad.AnnData, name: str, adata: ad.AnnData) -> None:
    if not prediction.var_names.equals(adata.var_names):
        raise ValueError(
            f"The prediction of {name!r} has {prediction.n_vars} genes that are not those of adata "
            f"({adata.n_vars}), in their order. Return all genes in the order that they were given."
        )
