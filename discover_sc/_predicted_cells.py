"""Predicted cells: the memory that they are written into, and the AnnData that users get."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.stats import norm

from ._keys import OBSM_W_KEY

if TYPE_CHECKING:
    from ._calibration import GroupEstimate
    from ._model import DISCoVeR
    from ._target import Target


@dataclass
class Result:
    """Preallocated output, one row per source cell, and the estimates of the groups."""

    mean: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    w: np.ndarray
    support: np.ndarray
    counts: list[tuple[np.ndarray, sp.csr_matrix]] = field(default_factory=list)
    ways: dict[str, str] = field(default_factory=dict)
    choices: dict[str, dict] = field(default_factory=dict)
    estimates: dict[tuple[str, str], GroupEstimate] = field(default_factory=dict)


def empty_result(model: DISCoVeR, source: ad.AnnData) -> Result:
    """Return memory for the prediction of source cells."""
    shape = source.shape
    n_w = model.module.n_latents["w"]
    mean, lower, upper = (np.empty(shape, dtype=np.float32) for _ in range(3))
    w, support = np.empty((shape[0], n_w), dtype=np.float32), np.empty(shape[0])
    return Result(mean, lower, upper, w, support)


def finish(
    model: DISCoVeR,
    source: ad.AnnData,
    result: Result,
    target: Target,
    n_samples: int,
    interval: float,
    library_size: float,
    seed: int,
) -> ad.AnnData:
    """Return the predicted cells as AnnData of their own."""
    own = [name for name in source.obs if not name.startswith("_scvi")]
    obs = source.obs[own].copy()
    asked = {}
    for position, level in target.asked.items():
        key = model.condition_keys[position]
        asked[key] = level
        _keep_source(obs, key)
        levels, code = list(model._levels[key]), target.codes[position]
        levels, code = (levels, code) if code is not None else ([*levels, level], len(levels))
        obs[key] = pd.Categorical.from_codes([code] * len(obs), categories=levels)
    if target.dose is not None:
        asked[model.dose_key] = target.dose
        _keep_source(obs, model.dose_key)
        obs[model.dose_key] = target.dose
    prediction = ad.AnnData(result.mean, obs, source.var.copy())
    prediction.layers["lower"], prediction.layers["upper"] = result.lower, result.upper
    order = np.argsort(np.concatenate([rows for rows, _ in result.counts]))
    counts = sp.vstack([c for _, c in result.counts], format="csr")
    result.counts.clear()  # before the next copy: each is as large as the output
    prediction.layers["counts"] = counts[order]
    prediction.obsm[OBSM_W_KEY] = result.w
    prediction.obs["support"] = result.support
    for key, profiles in _group_intervals(result.estimates, interval).items():
        prediction.varm[key] = pd.DataFrame(profiles, index=prediction.var_names)
    prediction.uns["discover_counterfactual"] = {
        "to": asked,
        "sources": list(result.ways),  # not keys: anndata refuses some characters in them
        "ways": list(result.ways.values()),
        "n_samples": n_samples,
        "interval": interval,
        "library_size": float(library_size),
        "seed": seed,
    }
    return prediction


def _group_intervals(
    estimates: dict[tuple[str, str], GroupEstimate], interval: float
) -> dict[str, dict[str, np.ndarray]]:
    """Return profile and bounds of each group, by the key of ``.varm`` and the group's name."""
    several = len({source for source, _ in estimates}) > 1
    half_width = float(norm.ppf((1 + interval) / 2))
    profiles = {"discover_mean": {}, "discover_mean_lower": {}, "discover_mean_upper": {}}
    for (source, group), estimate in estimates.items():
        name = f"{group} from {source}" if several else group
        margin = half_width * estimate.error  # NaN where the error is not known
        bounds = (estimate.profile, estimate.profile - margin, estimate.profile + margin)
        for key, values in zip(profiles, bounds, strict=True):
            profiles[key][name] = values
    return profiles


def _keep_source(obs: pd.DataFrame, key: str) -> None:
    """Keep, beside the condition or dose predicted, the one that each cell came from."""
    if f"{key}_source" in obs:
        raise ValueError(
            f"adata.obs has a column {key}_source, which the prediction would overwrite with "
            "the condition that each cell came from. Rename it."
        )
    obs[f"{key}_source"] = obs[key]


def concatenated(predictions: list[ad.AnnData], targets: list[Target]) -> ad.AnnData:
    """Return predictions under several levels below each other, cells named by their level."""
    if len(predictions) == 1:
        return predictions[0]
    done = [prediction.uns["discover_counterfactual"] for prediction in predictions]
    for prediction, target in zip(predictions, targets, strict=True):
        prediction.obs_names = [f"{name}-{target.asked[0]}" for name in prediction.obs_names]
    joined = ad.concat(predictions, merge="same")
    for name in predictions[0].varm:
        joined.varm[name] = pd.concat(
            [
                p.varm[name].rename(columns=lambda group, t=t: f"{group} under {t.asked[0]}")
                for p, t in zip(predictions, targets, strict=True)
            ],
            axis=1,
        )
    key = next(iter(done[0]["to"]))
    asked = done[0]["to"] | {key: [one["to"][key] for one in done]}
    joined.uns["discover_counterfactual"] = done[0] | {"to": asked}
    return joined
