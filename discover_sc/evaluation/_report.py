"""The one function that takes a model and AnnData and returns the table of latent metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import pandas as pd

from ._conservation import kmeans_ari, kmeans_nmi
from ._invariance import chance_accuracy, probe_accuracy

if TYPE_CHECKING:
    import numpy as np
    from anndata import AnnData

_PROBE_FOLDS = 5


class _LatentModel(Protocol):
    """What a model needs for a report."""

    condition_keys: list[str]
    labels_key: str | None

    def get_latent_representation(self, adata: AnnData | None, *, latent: str) -> np.ndarray: ...


def report(model: _LatentModel, adata: AnnData, *, labels_key: str | None = None) -> pd.DataFrame:
    """Table of what z and w carry: fresh 5-fold probes beside chance, and clustering scores.

    Parameters
    ----------
    model
        A trained :class:`~discover_sc.DISCoVeR`, or any model with ``condition_keys``,
        ``labels_key`` and ``get_latent_representation(adata, latent="z" | "w")``.
    adata
        Cells to report on.
    labels_key
        Column of ``adata.obs`` with the cell type; None: the one given to ``setup_anndata``. Types
        with fewer than 20 cells are left out of the probes.

    Returns
    -------
    Columns ``question``, ``metric``, ``value`` (balanced accuracy, NMI or ARI), ``std`` (over
    folds, NaN for clustering), ``chance`` and ``wanted`` (``"chance"`` or ``"high"``).

    Raises
    ------
    KeyError
        If ``labels_key`` is not a column of ``adata.obs``.
    ValueError
        If a condition has fewer than 5 cells among these, one for each fold.

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
    labels_key = labels_key or model.labels_key
    if labels_key is not None and labels_key not in adata.obs:
        raise KeyError(
            f"labels_key {labels_key!r} is not a column of adata.obs; columns are "
            f"{list(adata.obs.columns)}. Choose one of them."
        )
    latents = {name: model.get_latent_representation(adata, latent=name) for name in ("z", "w")}
    rows = []
    for key in model.condition_keys:
        target = adata.obs[key].astype(str).to_numpy()
        rows += _probe_rows(f"{key} left in z", latents["z"], target, "chance")
        rows += _probe_rows(f"{key} found in w", latents["w"], target, "high")
    if labels_key is not None:
        labels = adata.obs[labels_key].astype(str)
        common = (labels.map(labels.value_counts()) >= 20).to_numpy()
        if labels[common].nunique() > 1:
            rows += _type_rows(labels_key, latents["z"][common], labels[common].to_numpy())
    return pd.DataFrame(rows)


def _probe_rows(question: str, latent: np.ndarray, target: np.ndarray, wanted: str) -> list[dict]:
    chance = chance_accuracy(target)
    return [
        {
            "question": question,
            "metric": probe,
            "value": folds.mean(),
            "std": folds.std(ddof=1),
            "chance": chance,
            "wanted": wanted,
        }
        for probe, folds in probe_accuracy(latent, target, n_folds=_PROBE_FOLDS).items()
    ]


def _type_rows(labels_key: str, z: np.ndarray, labels: np.ndarray) -> list[dict]:
    question = f"{labels_key} kept in z"
    rows = _probe_rows(question, z, labels, "high")
    for metric, function in (("kmeans_nmi", kmeans_nmi), ("kmeans_ari", kmeans_ari)):
        row = {"question": question, "metric": metric, "value": function(z, labels)}
        rows.append({**row, "std": float("nan"), "chance": 0.0, "wanted": "high"})
    return rows
