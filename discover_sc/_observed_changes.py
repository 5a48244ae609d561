"""What the changes of profiles that were observed tell of the change that is asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ._borrowed_effects import BorrowedEffects, KnownChanges
from ._calibration import OwnChange
from ._group_effects import GroupEffects
from ._reference import GroupProfile, group_profiles
from ._shrinkage import dispersion_of, sampling_variance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._model import DISCoVeR
    from ._target import Target


class ObservedChanges(NamedTuple):
    """What tells of the change of one group of source cells; None where nothing does."""

    effects: GroupEffects | BorrowedEffects | None
    own: OwnChange | None


def observed_changes(
    model: DISCoVeR,
    target: Target,
    source_codes: np.ndarray,
    source_dose: float | None,
    groups: Sequence[str],
) -> list[ObservedChanges]:
    """Return what observed changes tell of each group of source cells.

    Parameters
    ----------
    model
        A trained model.
    target
        Levels asked for.
    source_codes, source_dose
        Condition codes, ``(n_condition_keys,)``, and dose of the source cells.
    groups
        Groups of the source cells.
    """
    reference = model.reference_
    codes, doses = reference["profile_codes"], reference["profile_doses"]
    sources, targets = (
        group_profiles(reference, side)
        for side in (
            target.is_source(codes, doses, source_codes, source_dose),
            target.is_met(codes, doses),
        )
    )
    matched = [group for group in sources if group in targets]
    if not matched:
        return [ObservedChanges(None, None) for _ in groups]
    if (known := _known_levels(model, target, source_codes)) is not None:
        return _borrowed(model, known, sources, targets, groups)
    profiles = (np.stack([side[g].profile for g in matched]) for side in (sources, targets))
    effects = GroupEffects(*profiles)
    own = {
        group: OwnChange(
            targets[group].profile - sources[group].profile,
            min(targets[group].n_cells, sources[group].n_cells),
        )
        for group in matched
    }
    return [ObservedChanges(effects, own.get(group)) for group in groups]


def _known_levels(model: DISCoVeR, target: Target, source_codes: np.ndarray) -> list[Target] | None:
    """Return the known treatments beside one that was added after training; None: none was."""
    if model.module.gene_likelihood == "normal" or model.dose_key is not None:
        return None
    for position, level in target.asked.items():
        levels = target.keys[position]
        if level in levels.added:
            source = levels.names[source_codes[position]]
            known = [n for n in levels.names if n != source and n not in levels.added]
            return [replace(target, asked=target.asked | {position: n}) for n in known]
    return None


def _borrowed(
    model: DISCoVeR,
    known: list[Target],
    sources: dict[str, GroupProfile],
    targets: dict[str, GroupProfile],
    groups: Sequence[str],
) -> list[ObservedChanges]:
    """Return what known treatments tell of a new one, for each group of source cells."""
    reference, names, theta = model.reference_, list(sources), dispersion_of(model)
    codes, doses = reference["profile_codes"], reference["profile_doses"]
    treated = [group_profiles(reference, level.is_met(codes, doses)) for level in known]
    seen = [k for k, group in enumerate(names) if group in targets]
    if not any(names[k] in profiles for profiles in treated for k in seen):
        return [ObservedChanges(None, None) for _ in groups]

    def changes_of(profiles: dict[str, GroupProfile]) -> np.ndarray:
        missing = np.full(len(theta), np.nan)
        return np.stack(
            [profiles[g].profile - sources[g].profile if g in profiles else missing for g in names]
        )

    def variance_of(group: str) -> np.ndarray:
        sides = (sources[group], targets[group])
        between = (sides[0].profile + sides[1].profile) / 2
        return sum(sampling_variance(between, theta, s.n_cells, s.inverse_library) for s in sides)

    effects = BorrowedEffects(
        KnownChanges(
            np.stack([changes_of(profiles) for profiles in treated]),
            np.array([[p[g].n_cells if g in p else 0 for g in names] for p in treated]),
        ),
        control=np.stack([sources[g].profile for g in names]),
        new=changes_of(targets)[seen],
        variances=np.stack([variance_of(names[k]) for k in seen]),
        seen=seen,
        n_cells=np.array([targets[names[k]].n_cells for k in seen]),
    )
    return [
        ObservedChanges(effects.of(names.index(g) if g in names else None), None) for g in groups
    ]
