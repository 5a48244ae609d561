"""Best estimate of each group's profile, from the model and from observed changes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ._calibration import GroupEstimate, GroupMeans, closed, combine, uncalibrated
from ._move import Move, fit_move
from ._observed_changes import observed_changes
from ._parts import Part, composition_of, part_changes
from ._reference import group_profiles
from ._shrinkage import dispersion_of

if TYPE_CHECKING:
    from ._model import DISCoVeR
    from ._source_cells import GroupedSource
    from ._target import Target


def estimate_profiles(
    model: DISCoVeR, grouped: GroupedSource, move: Move, means: list[GroupMeans]
) -> tuple[list[GroupEstimate], dict[str, object]]:
    """Return the estimated profile of each group, and what it was made from, as plain values."""
    changes = observed_changes(model, move.target, move.codes, move.dose, grouped.names)
    choice = {"ways": move.description, "n_groups": 0}
    for change in changes:  # groups that were never treated have no factors
        if change.effects is not None:
            choice |= change.effects.summary()
    if move.method != "auto":
        # the errors of a regression on descriptions are not those of another method
        estimates = [
            uncalibrated(m, None if move.target.described else c.effects)
            for m, c in zip(means, changes, strict=True)
        ]
    elif move.parts is not None and model.module.gene_likelihood != "normal":
        composition = composition_of(
            model.reference_, move.target, move.parts[1], move.codes, move.dose
        )
        choice["overlap"] = composition.overlap
        parts = part_changes(
            composition,
            _unmoved(model, move, means),
            [_part(model, grouped, move, part) for part in move.parts[0]],
            grouped.names,
            dispersion_of(model),
        )
        estimates = [combine(m, parts=p) for m, p in zip(means, parts, strict=True)]
    else:
        missed = sum(move.target.missed_changes(model, move.codes))
        estimates = [
            combine(m, c.effects, missed, c.own) for m, c in zip(means, changes, strict=True)
        ]
        weights = [estimate.observed_weight for estimate in estimates]
        choice["mean_weight_of_observed_changes"] = sum(weights) / len(weights)
    if model.module.gene_likelihood != "normal":
        estimates = [
            replace(e, source=closed(e.source), profile=closed(e.profile)) for e in estimates
        ]
    return estimates, choice


def _unmoved(model: DISCoVeR, move: Move, means: list[GroupMeans]) -> Part:
    """Return what is known of the source condition itself."""
    reference = model.reference_
    is_source = move.target.is_source(
        reference["profile_codes"], reference["profile_doses"], move.codes, move.dose
    )
    stay = [replace(m, predicted=m.decoded) for m in means]
    return Part(group_profiles(reference, is_source), stay, 0.0)


def _part(model: DISCoVeR, grouped: GroupedSource, move: Move, target: Target) -> Part:
    """Return what is known of a part of the target."""
    reference = model.reference_
    is_met = target.is_met(reference["profile_codes"], reference["profile_doses"])
    way = fit_move(model, move.method, move.codes, move.dose, target).way
    return Part(
        group_profiles(reference, is_met),
        grouped.means(way),
        sum(target.missed_changes(model, move.codes)),
    )
