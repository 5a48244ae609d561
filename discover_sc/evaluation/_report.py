"""The one function that takes a model and AnnData and returns the table of latent metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import pandas as pd

from ._conservation import kmeans_ari, kmeans_nmi
from ._invariance import (
    chance_accuracy,
    composition_accuracy,
    probe_accuracy,
    probe_accuracy_within,
)

if TYPE_CHECKING:
    from anndata import AnnData

_PROBE_FOLDS = 5
_MAX_CELLS = 20_000
_MIN_GROUP_CELLS = 50


class _LatentModel(Protocol):
    """What a model needs for a report."""

    condition_keys: list[str]
    labels_key: str | None
    invariance: str

    def get_latent_representation(self, adata: AnnData | None, *, latent: str) -> np.ndarray: ...


def report(model: _LatentModel, adata: AnnData, *, labels_key: str | None = None) -> pd.DataFrame:
    """Table of what z and w carry: fresh 5-fold probes beside chance, and clustering scores.

    Of a model with ``invariance="conditional"``, the condition left in z is asked for within
    labels (:func:`probe_accuracy_within`): over all cells z may tell it by way of the label.

    Parameters
    ----------
    model
        A trained :class:`~discover_sc.DISCoVeR`, or any model with ``condition_keys``,
        ``labels_key``, ``invariance`` (``"marginal"`` or ``"conditional"``) and
        ``get_latent_representation(adata, latent="z" | "w")``.
    adata
        Cells to report on. Of more than 20,000, about as many are drawn at random, the same at
        every call: of each combination of conditions and label its share, and at least 50.
    labels_key
        Column of ``adata.obs`` with the cell type; None: the one given to ``setup_anndata``. Types
        with fewer than 20 cells are left out of the probes.

    Returns
    -------
    Columns ``question``, ``metric``, ``value`` (balanced accuracy, NMI or ARI), ``std`` (over
    folds, NaN for clustering), ``chance``, ``wanted`` (``"chance"`` or ``"high"``) and
    ``from_labels``: what the label alone tells of the condition (:func:`composition_accuracy`),
    so that a z which keeps the label may tell as much; NaN where there are no labels or that is
    not the question.

    Raises
    ------
    KeyError
        If the column of the labels is not in ``adata.obs``.
    ValueError
        If a condition has fewer than 5 cells among these, one for each fold; if the model is
        conditional, only if no label holds two conditions with so many.

    Examples
    --------
    >>> import discover_sc
    >>> adata = discover_sc.data.simulate(200, 50)
    >>> discover_sc.DISCoVeR.setup_anndata(adata, condition_key="condition")
    >>> model = discover_sc.DISCoVeR(adata)
    >>> model.train(max_epochs=2, enable_progress_bar=False)
    >>> table = report(model, adata)
    >>> list(table["question"].unique())
    ['condition left in z', 'condition found in w']
    """
    given = model.labels_key if model.invariance == "conditional" else None
    labels_key = labels_key or model.labels_key
    for key in (labels_key, given):
        if key is not None and key not in adata.obs:
            raise KeyError(
                f"labels_key {key!r} is not a column of adata.obs; columns are "
                f"{list(adata.obs.columns)}. Choose one of them."
            )
    named = [*model.condition_keys, labels_key, given]
    groups = adata.obs[[key for key in dict.fromkeys(named) if key is not None]].astype(str)
    cells = _drawn_cells(groups)
    obs = groups.iloc[cells]
    z, w = (model.get_latent_representation(adata, latent=name)[cells] for name in ("z", "w"))
    rows = []
    for key in model.condition_keys:
        target = obs[key].to_numpy()
        if given is None:
            left = _probe_rows(f"{key} left in z", z, target, "chance")
            if labels_key is not None:
                told = composition_accuracy(target, obs[labels_key])
                left = [row | {"from_labels": told} for row in left]
            rows += left
        else:
            question = f"{key} left in z, given {given}"
            rows += _probe_rows(question, z, target, "chance", obs[given].to_numpy())
        rows += _probe_rows(f"{key} found in w", w, target, "high")
    if labels_key is not None:
        labels = obs[labels_key]
        common = (labels.map(labels.value_counts()) >= 20).to_numpy()
        if labels[common].nunique() > 1:
            rows += _type_rows(labels_key, z[common], labels[common].to_numpy())
    return pd.DataFrame(rows)


def _drawn_cells(groups: pd.DataFrame) -> np.ndarray:
    """Return positions of cells: all, or of each group its share of the most that are probed."""
    if len(groups) <= _MAX_CELLS:
        return np.arange(len(groups))
    order = np.random.default_rng(0).permutation(len(groups))
    codes = groups.groupby(list(groups)).ngroup().to_numpy()[order]
    sizes = np.bincount(codes)
    wanted = np.maximum(np.ceil(sizes * _MAX_CELLS / len(groups)), _MIN_GROUP_CELLS)
    rank = pd.Series(codes).groupby(codes).cumcount().to_numpy()
    return np.sort(order[rank < wanted[codes]])


def _probe_rows(
    question: str,
    latent: np.ndarray,
    target: np.ndarray,
    wanted: str,
    within: np.ndarray | None = None,
) -> list[dict]:
    if within is None:
        accuracies = probe_accuracy(latent, target, n_folds=_PROBE_FOLDS)
        chance = chance_accuracy(target)
    else:
        accuracies, chance = probe_accuracy_within(latent, target, within, n_folds=_PROBE_FOLDS)
    return [
        {
            "question": question,
            "metric": probe,
            "value": folds.mean(),
            "std": folds.std(ddof=1),
            "chance": chance,
            "wanted": wanted,
            "from_labels": float("nan"),
        }
        for probe, folds in accuracies.items()
    ]


def _type_rows(labels_key: str, z: np.ndarray, labels: np.ndarray) -> list[dict]:
    question = f"{labels_key} kept in z"
    rows = _probe_rows(question, z, labels, "high")
    for metric, function in (("kmeans_nmi", kmeans_nmi), ("kmeans_ari", kmeans_ari)):
        row = {"question": question, "metric": metric, "value": function(z, labels)}
        nan = float("nan")
        rows.append(row | {"std": nan, "chance": 0.0, "wanted": "high", "from_labels": nan})
    return rows
