"""Counterfactual prediction: encode the source cells, move w, decode, in mini-batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from scvi import REGISTRY_KEYS
from scvi.distributions import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial

from ._counterfactual import COMPARING, Reference, Way, choose_way, cluster_groups, nearest_cluster
from ._expression import expression_of
from ._keys import LIBRARY_KEY, OBSM_W_KEY, QW_KEY, QZ_KEY
from ._priors import LearnedPrior

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from ._model import DISCoVeR
    from ._target import Target

_ANCHOR_CELLS = 50  # source cells at which the anchor has half of its weight
_ANCHOR_LIBRARY = 1e4  # scale, in counts, on which log1p profiles are compared


def predict_counterfactual(
    model: DISCoVeR,
    adata: ad.AnnData,
    target: Target,
    method: str,
    n_samples: int,
    interval: float,
    library_size: float,
    batch_size: int | None,
    seed: int,
) -> ad.AnnData:
    """Predict source cells under another condition; see the model's method."""
    _check_numbers(n_samples, interval, library_size)
    source = model._validate_anndata(_own_copy(adata) if adata.is_view else adata)
    try:
        result = _empty_result(model, source)
        groups = _Groups(model, source)
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(seed)
            for codes, dose, cells in _cells_by_source(model, source):
                way, description = _fit_way(model, method, codes, dose, target, groups.of_reference)
                result.ways[_source_name(model, codes, dose)] = description
                anchor = None
                if method == "auto" and model.module.gene_likelihood != "normal":
                    anchor = _Anchor(model, source, cells, groups.of_source, batch_size)
                    anchor.add(target.missed_changes(model, codes))
                batches = _batches(model, source, cells, batch_size)
                _predict_cells(
                    model, batches, way, anchor, result, n_samples, interval, library_size
                )
        return _finish(model, source, result, target, n_samples, interval, library_size, seed)
    finally:
        if source is not adata:
            model._forget(source)


class _Groups:
    """Groups of the reference and of the source cells: labels, or clusters of z."""

    def __init__(self, model: DISCoVeR, source: ad.AnnData) -> None:
        labels = model.reference_["labels"]
        if labels is not None:
            self.of_reference = labels
            own = source.obs[model.labels_key].astype(str)
            self.of_source = pd.factorize(own)[0]
        else:
            # fixed when training ended: a reference that grows moves no old prediction
            centers = model.reference_.get("centers")
            if centers is None:  # saved before centres were kept
                centers = cluster_groups(model.reference_["z"]).cluster_centers_
            self.of_reference = nearest_cluster(model.reference_["z"], centers)
            z = model.get_latent_representation(source)
            self.of_source = nearest_cluster(z, centers)


# ---------------------------------------------------------------------------- input


def _check_numbers(n_samples: int, interval: float, library_size: float) -> None:
    if n_samples < 2:
        raise ValueError(
            f"n_samples is {n_samples}; an interval needs at least 2 posterior draws. Raise it."
        )
    if not 0 < interval < 1:
        raise ValueError(
            f"interval is {interval}; it is a coverage between 0 and 1. Choose for example 0.9."
        )
    if not library_size > 0:
        raise ValueError(f"library_size is {library_size}; it must be positive. Choose 1e4.")


def _own_copy(view: ad.AnnData) -> ad.AnnData:
    """Return a copy of a view, so that registering it leaves the user's object a view."""
    return view.to_memory() if view.isbacked else view.copy()


def _cells_by_source(
    model: DISCoVeR, source: ad.AnnData
) -> Iterator[tuple[np.ndarray, float | None, np.ndarray]]:
    """Yield each combination of condition codes (and dose) of source cells, and its cells."""
    codes, doses = model._condition_codes(source), model._doses_of(source)
    columns = codes if doses is None else np.column_stack([codes, doses])
    for combination in np.unique(columns, axis=0):
        cells = np.flatnonzero((columns == combination).all(axis=1))
        yield codes[cells[0]], None if doses is None else float(doses[cells[0]]), cells


def _source_name(model: DISCoVeR, codes: np.ndarray, dose: float | None) -> str:
    name = "+".join(_level_names(model, codes))
    return name if dose is None else f"{name} at {dose:g}"


def _level_names(model: DISCoVeR, codes: np.ndarray) -> list[str]:
    return [levels[c] for levels, c in zip(model.conditions.values(), codes, strict=True)]


# ------------------------------------------------------------------------------ way


def _fit_way(
    model: DISCoVeR,
    method: str,
    source_codes: np.ndarray,
    source_dose: float | None,
    target: Target,
    groups: np.ndarray,
) -> tuple[Way, str]:
    """Return a way fitted on the latents of the training cells, and its description."""
    trained = model.reference_
    codes, doses = trained["condition_codes"], trained.get("doses")
    reference = Reference(
        z=trained["z"],
        w=trained["w"],
        is_source=target.is_source(codes, doses, source_codes, source_dose),
        is_target=target.is_target(codes),
        groups=groups,
    )
    pieces = target.pieces(model, reference, source_codes, source_dose)
    told = reference.is_target.any() if pieces is None else pieces.cells is not None
    compares = reference.is_source.any() and told
    if not compares and (method in COMPARING or not isinstance(model.module.prior, LearnedPrior)):
        missing = target.name() if reference.is_source.any() else _level_names(model, source_codes)
        raise ValueError(
            f"The model was set up with no cell under {missing}, which method={method!r} compares "
            "with others. Ask for one key at a time, or use method='abduction', which asks the "
            "learned prior."
        )
    features = target.features(model, source_codes, source_dose)
    way, description = choose_way(method, model.module, *features, pieces, compares)
    return way.fit(reference), description


# --------------------------------------------------------------------------- decode


@dataclass
class _Result:
    """Preallocated output, one row per source cell."""

    mean: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    w: np.ndarray
    counts: list[tuple[np.ndarray, sp.csr_matrix]]
    ways: dict[str, str]


def _empty_result(model: DISCoVeR, source: ad.AnnData) -> _Result:
    shape = source.shape
    n_w = model.module.w_encoder.loc.out_features
    mean, lower, upper = (np.empty(shape, dtype=np.float32) for _ in range(3))
    return _Result(mean, lower, upper, np.empty((shape[0], n_w), dtype=np.float32), [], {})


def _batches(
    model: DISCoVeR, source: ad.AnnData, cells: np.ndarray, batch_size: int | None
) -> Iterator[tuple[np.ndarray, dict[str, Tensor], dict]]:
    """Yield cells, tensors and inference outputs of each minibatch of some cells."""
    start = 0
    for tensors in model._make_data_loader(source, indices=cells, batch_size=batch_size):
        outputs = model.module.inference(**model.module._get_inference_input(tensors))
        n = len(tensors[REGISTRY_KEYS.X_KEY])
        yield cells[start : start + n], tensors, outputs
        start += n


def _move(way: Way, z: Tensor, w: Tensor) -> Tensor:
    moved = way(z.cpu().numpy(), w.cpu().numpy())
    return torch.as_tensor(moved, dtype=w.dtype, device=w.device)


def _predict_cells(
    model: DISCoVeR,
    batches: Iterator[tuple[np.ndarray, dict[str, Tensor], dict]],
    way: Way,
    anchor: _Anchor | None,
    result: _Result,
    n_samples: int,
    interval: float,
    library_size: float,
) -> None:
    """Fill the rows of some cells, all under one source condition."""
    tails = torch.tensor([(1 - interval) / 2, (1 + interval) / 2], device=model.device)
    for rows, tensors, outputs in batches:
        qz, qw, library = outputs[QZ_KEY], outputs[QW_KEY], outputs[LIBRARY_KEY]
        draws = []
        for _ in range(n_samples):
            z, w = qz.sample(), qw.sample()
            px = model.module.decode(z, _move(way, z, w), library, tensors)
            draws.append(_expression(px, library_size, anchor, rows))
        lower, upper = torch.quantile(torch.stack(draws), tails, dim=0)
        result.mean[rows] = torch.stack(draws).mean(0).cpu().numpy()
        result.lower[rows], result.upper[rows] = lower.cpu().numpy(), upper.cpu().numpy()
        result.w[rows] = _move(way, qz.loc, qw.loc).cpu().numpy()
        # the last draw of the latents, and a draw of the counts given it
        counts = _sample_counts(px, draws[-1] / library_size, library)
        result.counts.append((rows, sp.csr_matrix(counts.cpu().numpy())))


def _expression(
    px: torch.distributions.Distribution,
    library_size: float,
    anchor: _Anchor | None,
    rows: np.ndarray,
) -> Tensor:
    if anchor is None:
        return expression_of(px, library_size)
    return anchor.apply(expression_of(px, _ANCHOR_LIBRARY), rows, library_size)


def _sample_counts(
    px: torch.distributions.Distribution, fractions: Tensor, library: Tensor
) -> Tensor:
    """Draw from the likelihood, with its mean at the (anchored) fractions; values if normal."""
    rate = fractions * torch.exp(library)
    if isinstance(px, Poisson):
        return torch.poisson(rate)
    if isinstance(px, ZeroInflatedNegativeBinomial):
        # px.scale is the mean before zero inflation, as everywhere else in this package
        return ZeroInflatedNegativeBinomial(
            mu=rate, theta=px.theta, zi_logits=px.zi_logits, scale=fractions
        ).sample()
    if isinstance(px, NegativeBinomial):
        return NegativeBinomial(mu=rate, theta=px.theta, scale=fractions).sample()
    return px.sample()


class _Anchor:
    """The log difference between observed and decoded source profile, per group.

    A decoder smooths: it misses part of what is particular to a group. The part is seen on the
    source cells themselves, never on treated ones, shrunk by the number of cells that it was
    seen on, and added to the prediction.
    """

    def __init__(
        self,
        model: DISCoVeR,
        source: ad.AnnData,
        cells: np.ndarray,
        groups: np.ndarray,
        batch_size: int | None,
    ) -> None:
        self._groups = groups
        observed, decoded, n_cells = (
            torch.zeros(groups.max() + 1, n, device=model.device)
            for n in (source.n_vars, source.n_vars, 1)
        )
        for rows, tensors, outputs in _batches(model, source, cells, batch_size):
            group = torch.as_tensor(groups[rows], device=model.device)
            x = tensors[REGISTRY_KEYS.X_KEY].to(model.device)
            px = model.module.decode(
                outputs[QZ_KEY].loc, outputs[QW_KEY].loc, outputs[LIBRARY_KEY], tensors
            )
            observed.index_add_(0, group, x / x.sum(-1, keepdim=True))
            decoded.index_add_(0, group, px.scale)
            n_cells.index_add_(0, group, torch.ones(len(rows), 1, device=model.device))
        per_cell = _ANCHOR_LIBRARY / n_cells.clamp(min=1)
        weight = n_cells / (n_cells + _ANCHOR_CELLS)
        self._log_factor = weight * (
            torch.log1p(observed * per_cell) - torch.log1p(decoded * per_cell)
        )

    def add(self, changes: list[np.ndarray]) -> None:
        """Add changes of the log profile that the decoder misses of a new condition."""
        for change in changes:
            self._log_factor += torch.as_tensor(change).to(self._log_factor)

    def apply(self, expression: Tensor, rows: np.ndarray, library_size: float) -> Tensor:
        """Return expression, given at the anchor's library, anchored and at another library."""
        group = torch.as_tensor(self._groups[rows], device=expression.device)
        anchored = torch.expm1(torch.log1p(expression) + self._log_factor[group]).clamp(min=0)
        return anchored * (library_size / anchored.sum(-1, keepdim=True))


# --------------------------------------------------------------------------- output


def _finish(
    model: DISCoVeR,
    source: ad.AnnData,
    result: _Result,
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
    prediction.layers["counts"] = sp.vstack([c for _, c in result.counts]).tocsr()[order]
    prediction.obsm[OBSM_W_KEY] = result.w
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
    key = next(iter(done[0]["to"]))
    asked = done[0]["to"] | {key: [one["to"][key] for one in done]}
    joined.uns["discover_counterfactual"] = done[0] | {"to": asked}
    return joined
