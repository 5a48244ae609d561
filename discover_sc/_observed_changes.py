"""What the changes of profiles that were observed tell of the change that is asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ._borrowed_effects import BorrowedEffects, KnownChanges
from ._calibration import OwnChange
from ._described_effects import DescribedChange, DescribedEffects
from ._group_effects import GroupEffects
from ._reference import GroupProfile, group_profiles
from ._response_factors import FactorEffects
from ._shrinkage import dispersion_of, sampling_variance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._model import DISCoVeR
    from ._target import Target

_LEAST_TREATMENTS = 3  # below, they tell nothing of how groups differ


class ObservedChanges(NamedTuple):
    """What tells of the change of one group of source cells; None where nothing does."""

    effects: GroupEffects | BorrowedEffects | FactorEffects | DescribedChange | None
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
    sources, targets = _sides(model, target, source_codes, source_dose)
    if target.described and model.dose_key is None:
        return _described(model, target, source_codes, sources, groups)
    matched = [group for group in sources if group in targets]
    if not matched:
        return [ObservedChanges(None, None) for _ in groups]
    if (known := _known_levels(model, target, source_codes)) is not None:
        return _borrowed(model, known, sources, targets, groups)
    profiles = (np.stack([side[g].profile for g in matched]) for side in (sources, targets))
    variances = _variances(model, [(sources[g], targets[g]) for g in matched])
    effects = GroupEffects(*profiles, variances)
    factors = _factors(model, target, source_codes, sources, effects, variances)
    own = {
        group: OwnChange(
            targets[group].profile - sources[group].profile,
            min(targets[group].n_cells, sources[group].n_cells),
        )
        for group in matched
    }
    return [ObservedChanges(factors.get(group, effects), own.get(group)) for group in groups]


def library_change(
    model: DISCoVeR, target: Target, source_codes: np.ndarray, source_dose: float | None
) -> float:
    """Return the change of the log library size in groups seen under both; 0 if there is none.

    The mean over the groups, each weighted by what its cells say of it. Means of logarithms: single
    cells that are very large or very small move them little.

    Parameters
    ----------
    model
        A trained model.
    target
        Levels asked for.
    source_codes, source_dose
        Condition codes, ``(n_condition_keys,)``, and dose of the source cells.
    """
    sources, targets = _sides(model, target, source_codes, source_dose)
    pairs = [(sources[group], targets[group]) for group in sources if group in targets]
    if not pairs:
        return 0.0
    changes = [after.log_library - before.log_library for before, after in pairs]
    precisions = [1 / (1 / before.n_cells + 1 / after.n_cells) for before, after in pairs]
    return float(np.average(changes, weights=precisions))


def _sides(
    model: DISCoVeR, target: Target, source_codes: np.ndarray, source_dose: float | None
) -> tuple[dict[str, GroupProfile], dict[str, GroupProfile]]:
    """Return the reference's groups under the source condition, and under the target."""
    reference = model.reference_
    codes, doses = reference["profile_codes"], reference["profile_doses"]
    is_source = target.is_source(codes, doses, source_codes, source_dose)
    return tuple(
        group_profiles(reference, side) for side in (is_source, target.is_met(codes, doses))
    )


def _variances(
    model: DISCoVeR, sides: list[tuple[GroupProfile, GroupProfile]]
) -> np.ndarray | None:
    """Return the sampling variances of groups' changes; None where they are not known."""
    if model.module.gene_likelihood == "normal":
        return None
    theta = dispersion_of(model)
    return np.stack([_change_variance(theta, *pair) for pair in sides])


def _change_variance(theta: np.ndarray, source: GroupProfile, target: GroupProfile) -> np.ndarray:
    """Return the sampling variance of the change between two profiles, ``(n_genes,)``."""
    between = (source.profile + target.profile) / 2
    return sum(
        sampling_variance(between, theta, side.n_cells, side.inverse_library)
        for side in (source, target)
    )


def _factors(
    model: DISCoVeR,
    target: Target,
    source_codes: np.ndarray,
    sources: dict[str, GroupProfile],
    effects: GroupEffects,
    variances: np.ndarray | None,
) -> dict[str, FactorEffects]:
    """Return what all treatments together tell of each group, where they tell it better.

    Empty where there are fewer than three treatments, or where the changes of alike groups under
    this treatment alone predict left-out groups better.
    """
    if model.dose_key is not None or len(target.asked) > 1 or not effects.scores:
        return {}
    [(position, level)] = target.asked.items()
    levels = _registered_levels(target, position, source_codes)
    if len(levels) < _LEAST_TREATMENTS:
        return {}
    treated = _profiles_under(model, [replace(target, asked={position: n}) for n in levels])
    factors = FactorEffects(
        np.stack([_changes(sources, profiles) for profiles in treated]),
        levels.index(level),
        control=np.stack([source.profile for source in sources.values()]),
        second_variance=effects.variance_beside(),
        noise=None if variances is None else float(variances.mean()),
    )
    if max(factors.scores.values()) <= max(effects.scores.values()):
        return {}
    answered = [g for g in sources if any(g in profiles for profiles in treated)]
    return {group: factors.of(list(sources).index(group)) for group in answered}


def _registered_levels(target: Target, position: int, source_codes: np.ndarray) -> list[str]:
    """Return the levels that the model was trained on, but for that of the source cells."""
    levels = target.keys[position]
    source = levels.names[source_codes[position]]
    return [n for n in levels.names if n != source and n not in levels.added]


def _profiles_under(model: DISCoVeR, targets: list[Target]) -> list[dict[str, GroupProfile]]:
    reference = model.reference_
    codes, doses = reference["profile_codes"], reference["profile_doses"]
    return [group_profiles(reference, target.is_met(codes, doses)) for target in targets]


def _changes(sources: dict[str, GroupProfile], treated: dict[str, GroupProfile]) -> np.ndarray:
    """Return the change of each group of source profiles, NaN where it was not treated."""
    return np.stack(
        [
            treated[group].profile - source.profile
            if group in treated
            else np.full_like(source.profile, np.nan)
            for group, source in sources.items()
        ]
    )


def _known_changes(
    sources: dict[str, GroupProfile], treated: list[dict[str, GroupProfile]]
) -> KnownChanges:
    """Return the changes of groups under known treatments, given the profiles under each."""
    return KnownChanges(
        np.stack([_changes(sources, profiles) for profiles in treated]),
        np.array([[p[g].n_cells if g in p else 0 for g in sources] for p in treated]),
    )


def _known_levels(model: DISCoVeR, target: Target, source_codes: np.ndarray) -> list[Target] | None:
    """Return the known treatments beside one that was added after training; None: none was."""
    if model.module.gene_likelihood == "normal" or model.dose_key is not None:
        return None
    for position, level in target.asked.items():
        if level in target.keys[position].added:
            known = _registered_levels(target, position, source_codes)
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
    names, theta = list(sources), dispersion_of(model)
    treated = _profiles_under(model, known)
    seen = [k for k, group in enumerate(names) if group in targets]
    if not any(names[k] in profiles for profiles in treated for k in seen):
        return [ObservedChanges(None, None) for _ in groups]

    effects = BorrowedEffects(
        _known_changes(sources, treated),
        control=np.stack([sources[g].profile for g in names]),
        new=_changes(sources, targets)[seen],
        variances=np.stack(
            [_change_variance(theta, sources[names[k]], targets[names[k]]) for k in seen]
        ),
        seen=seen,
        n_cells=np.array([targets[names[k]].n_cells for k in seen]),
    )
    return [
        ObservedChanges(effects.of(names.index(g) if g in names else None), None) for g in groups
    ]


def _described(
    model: DISCoVeR,
    target: Target,
    source_codes: np.ndarray,
    sources: dict[str, GroupProfile],
    groups: Sequence[str],
) -> list[ObservedChanges]:
    """Return what known treatments tell of a described one, for each group of source cells."""
    [(position, new)] = target.described.items()
    levels, names = target.keys[position], list(sources)
    known = _registered_levels(target, position, source_codes)
    treated = _profiles_under(
        model, [replace(target, asked={position: n}, described={}) for n in known]
    )
    seen = [k for k, profiles in enumerate(treated) if any(g in profiles for g in names)]
    if len(seen) < _LEAST_TREATMENTS:
        return [ObservedChanges(None, None) for _ in groups]
    known, treated = [known[k] for k in seen], [treated[k] for k in seen]
    noise = _treated_noise(model, sources, treated)
    source = levels.names[source_codes[position]]
    if source not in levels.added:  # described, too: without any change, and never left out
        known, treated = [*known, source], [*treated, {}]
    effects = DescribedEffects(
        _known_changes(sources, treated),
        control=np.stack([sources[g].profile for g in names]),
        rows=np.stack([levels.row(name) for name in known]),
        noise=noise,
    )
    changes = {g: effects.change(new, names.index(g) if g in names else None) for g in groups}
    return [ObservedChanges(changes[group], None) for group in groups]


def _treated_noise(
    model: DISCoVeR,
    sources: dict[str, GroupProfile],
    treated: list[dict[str, GroupProfile]],
) -> float | None:
    """Return the mean sampling variance of treated profiles; None if it is not known.

    Not of the source profiles: what they add to every change of a group cancels in differences.
    """
    if model.module.gene_likelihood == "normal":
        return None
    theta = dispersion_of(model)
    variances = [
        sampling_variance(
            (sources[group].profile + after.profile) / 2,
            theta,
            after.n_cells,
            after.inverse_library,
        )
        for profiles in treated
        for group, after in profiles.items()
        if group in sources
    ]
    return float(np.mean(variances))
