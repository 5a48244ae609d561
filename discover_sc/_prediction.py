"""Counterfactual prediction: encode the source cells, move w, decode, in mini-batches."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
import torch
from scvi import REGISTRY_KEYS, settings

from ._calibration import (
    PROFILE_LIBRARY,
    GroupEstimate,
    GroupMeans,
    LogCalibration,
    ShiftCalibration,
)
from ._estimates import estimate_profiles
from ._expression import expression_of
from ._keys import LIBRARY_KEY, QW_KEY, QZ_KEY
from ._move import Move, fit_move, level_names, move_w
from ._observed_changes import library_change
from ._predicted_cells import Result, empty_result, finish
from ._reference import groups_of, profile_of
from ._sampling import carry_over, sample
from ._source_cells import GroupedSource, SourceBatches
from ._support import warn_of_low_support
from ._tails import Tails

if TYPE_CHECKING:
    from collections.abc import Iterator

    import anndata as ad
    from torch import Tensor

    from ._model import DISCoVeR
    from ._target import Target

_SETTLED_AT_ONCE = 1024  # cells


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
    source = model._validate_anndata(own_copy(adata) if adata.is_view else adata)
    try:
        result = empty_result(model, source)
        groups = groups_of(model, source)
        _warn_of_treated(model, source, target)
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(seed)
            for codes, dose, cells in _cells_by_source(model, source):
                batches = SourceBatches(model, source, cells, batch_size)
                grouped = GroupedSource(batches, *np.unique(groups[cells], return_inverse=True))
                move = fit_move(model, method, codes, dose, target)
                means = grouped.means(move.way)
                estimates, choice = estimate_profiles(model, grouped, move, means)
                name = _source_name(model, codes, dose)
                result.ways[name], result.choices[name] = move.description, choice
                draws = _Draws(n_samples, interval, library_size)
                profiles = _predict_cells(model, grouped, move, means, estimates, draws, result)
                for group, estimate, profile in zip(
                    grouped.names, estimates, profiles, strict=True
                ):
                    result.estimates[name, group] = replace(estimate, profile=profile)
        if method == "auto":
            model.counterfactual_choice_ = result.choices
        if not target.described:  # no cell was seen under it, whatever its group
            warn_of_low_support(result.support)
        return finish(model, source, result, target, n_samples, interval, library_size, seed)
    finally:
        if source is not adata:
            model._forget(source)


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
    if not 0 < library_size < np.inf:
        raise ValueError(
            f"library_size is {library_size}; it must be positive and finite. Choose 1e4."
        )


def own_copy(view: ad.AnnData) -> ad.AnnData:
    """Return a copy of a view, so that registering it leaves the user's object a view."""
    return view.to_memory() if view.isbacked else view.copy()


def _warn_of_treated(model: DISCoVeR, source: ad.AnnData, target: Target) -> None:
    n_treated = target.is_met(model._condition_codes(source), model._doses_of(source)).sum()
    if n_treated:
        warnings.warn(
            f"{n_treated} of {source.n_obs} cells are under {target.name()} already; asked about "
            "the condition that they are under, cells come back denoised and not as a prediction. "
            "Pass cells under another condition only.",
            UserWarning,
            stacklevel=settings.warnings_stacklevel,
        )


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
    name = "+".join(level_names(model, codes))
    return name if dose is None else f"{name} at {dose:g}"


# --------------------------------------------------------------------------- decode


@dataclass(frozen=True)
class _Draws:
    """What is drawn of each cell, and how it is summarised."""

    n_samples: int
    interval: float
    library_size: float


@dataclass(frozen=True)
class _Calibrations:
    """What moves decoded expression to the estimates of the groups.

    ``source`` and ``target`` move it to their profiles under each condition, ``disturbed``, one
    per draw, to the latter plus a draw of its error.
    """

    source: LogCalibration | ShiftCalibration
    target: LogCalibration | ShiftCalibration
    disturbed: list[LogCalibration | ShiftCalibration]
    wanted: Tensor


def _calibrations(
    model: DISCoVeR, means: list[GroupMeans], estimates: list[GroupEstimate], n_samples: int
) -> _Calibrations:
    decoded, base, predicted, wanted, errors = (
        torch.as_tensor(np.stack(rows), dtype=torch.float32, device=model.device)
        for rows in (
            [m.decoded for m in means],
            [e.source for e in estimates],
            [m.predicted for m in means],
            [e.profile for e in estimates],
            [e.error for e in estimates],
        )
    )
    calibration = _calibration_class(model)
    noise = torch.randn(n_samples, *errors.shape, device=model.device) * errors.nan_to_num()
    return _Calibrations(
        calibration(decoded, base),
        calibration(predicted, wanted),
        [calibration(predicted, wanted + error) for error in noise],
        wanted,
    )


def _calibration_class(model: DISCoVeR) -> type[LogCalibration | ShiftCalibration]:
    return ShiftCalibration if model.module.gene_likelihood == "normal" else LogCalibration


@dataclass(frozen=True)
class _Drawn:
    """Of a minibatch: expectations over draws before and after, bounds, the last likelihood."""

    before: Tensor
    after: Tensor
    bounds: tuple[Tensor, Tensor]
    px: torch.distributions.Distribution


def _draw(
    model: DISCoVeR,
    move: Move,
    calibrations: _Calibrations,
    interval: float,
    tensors: dict[str, Tensor],
    outputs: dict,
    group: Tensor,
    treated_library: Tensor,
) -> _Drawn:
    """Draw latents of a minibatch, and from each draw what could be observed.

    What could be observed adds to the expectation an error of the group, which its cells share,
    and the noise of the likelihood.
    """
    library, n_samples = outputs[LIBRARY_KEY], len(calibrations.disturbed)
    before, after, tails = 0.0, 0.0, Tails(n_samples, interval)
    for disturb in calibrations.disturbed:
        z, w = outputs[QZ_KEY].sample(), outputs[QW_KEY].sample()
        own = expression_of(model.module.decode(z, w, library, tensors), PROFILE_LIBRARY)
        before = before + calibrations.source(own, group)
        px = model.module.decode(z, move_w(move.way, z, w), library, tensors)
        expression = expression_of(px, PROFILE_LIBRARY)
        after = after + calibrations.target(expression, group)
        tails.add(sample(px, disturb(expression, group), treated_library))
    return _Drawn(before / n_samples, after / n_samples, tails.bounds(), px)


def _predict_cells(
    model: DISCoVeR,
    grouped: GroupedSource,
    move: Move,
    means: list[GroupMeans],
    estimates: list[GroupEstimate],
    draws: _Draws,
    result: Result,
) -> np.ndarray:
    """Fill the rows of some cells, all under one source condition; return each group's profile.

    The expectation is calibrated to the estimate of the group; counts follow it with the noise of
    the cell itself.
    """
    is_normal = model.module.gene_likelihood == "normal"
    batches = grouped.batches
    calibrations = _calibrations(model, means, estimates, draws.n_samples)
    sums = torch.zeros(calibrations.wanted.shape, dtype=torch.float64)
    log_factor = library_change(model, move.target, move.codes, move.dose)
    for positions, tensors, outputs in batches:
        rows = batches.cells[positions]
        group = torch.as_tensor(grouped.group_of_cell[positions], device=model.device)
        library = outputs[LIBRARY_KEY]
        treated_library = library + log_factor
        drawn = _draw(
            model, move, calibrations, draws.interval, tensors, outputs, group, treated_library
        )
        scale = 1.0 if is_normal else draws.library_size / torch.exp(treated_library)
        for out, bound in zip((result.lower, result.upper), drawn.bounds, strict=True):
            out[rows] = (bound * scale).cpu().numpy()
        mean = drawn.after
        if not is_normal:
            mean = mean * (draws.library_size / mean.sum(-1, keepdim=True))
        result.mean[rows] = mean.cpu().numpy()
        sums.index_add_(0, group.cpu(), mean.cpu().double())
        z, w = outputs[QZ_KEY].loc, outputs[QW_KEY].loc
        result.w[rows] = move_w(move.way, z, w).cpu().numpy()
        result.support[rows] = move.support(z.cpu().numpy(), w.cpu().numpy())
        x = tensors[REGISTRY_KEYS.X_KEY].to(model.device)
        counts = carry_over(drawn.px, x, drawn.before, drawn.after, library, log_factor)
        result.counts.append((rows, sp.csr_matrix(counts.cpu().numpy())))
    wanted = calibrations.wanted.cpu().double()
    settle = _calibration_class(model)(_profiles_of_sums(model, sums, means), wanted)
    return _settle(model, grouped, means, settle, draws, result)


def _settle(
    model: DISCoVeR,
    grouped: GroupedSource,
    means: list[GroupMeans],
    settle: LogCalibration | ShiftCalibration,
    draws: _Draws,
    result: Result,
) -> np.ndarray:
    """Let expectations over posterior draws agree with the estimates; return groups' profiles.

    The decoder is not linear: cells that agree at the posterior means do not over draws.
    """
    is_normal = model.module.gene_likelihood == "normal"
    scale = 1.0 if is_normal else PROFILE_LIBRARY / draws.library_size
    sums = torch.zeros(len(means), result.mean.shape[1], dtype=torch.float64)
    cells = grouped.batches.cells
    for start in range(0, len(cells), _SETTLED_AT_ONCE):
        rows = cells[start : start + _SETTLED_AT_ONCE]
        group = torch.as_tensor(grouped.group_of_cell[start : start + _SETTLED_AT_ONCE])
        mean = settle(torch.as_tensor(result.mean[rows]).double() * scale, group)
        if not is_normal:
            mean = mean * (PROFILE_LIBRARY / mean.sum(-1, keepdim=True))
        sums.index_add_(0, group, mean)
        result.mean[rows] = (mean / scale).numpy()
    return _profiles_of_sums(model, sums, means).numpy()


def _profiles_of_sums(model: DISCoVeR, sums: Tensor, means: list[GroupMeans]) -> Tensor:
    """Return the profiles of groups of cells from the sums over their cells."""
    if model.module.gene_likelihood == "normal":
        return sums / torch.tensor([[m.n_cells] for m in means])
    return profile_of(model, sums * (PROFILE_LIBRARY / sums.sum(-1, keepdim=True)))
