"""The change under a target that was not measured, from the changes under measured parts of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ._calibration import anchored
from ._left_out import LeftOut
from ._reference import GroupProfile, group_profiles
from ._shrinkage import denoised, sampling_variance, standing_out
from ._target import ASSUMED_OVERLAP, OVERLAPS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ._calibration import GroupMeans
    from ._target import Target

Profiles = dict[str, GroupProfile]


def united(changes: np.ndarray, overlap: float) -> np.ndarray:
    r"""Sum of changes, gene by gene, whose overlap counts in part.

    .. math:: (1 - \lambda) \sum_k \delta_k^+ + \lambda \max_k \delta_k^+

    minus the same of the negative parts: at 0 changes add up, at 1 of those of one sign the
    largest counts alone. Changes of opposite sign add up.

    Parameters
    ----------
    changes
        Shape ``(n_parts, n_genes)``.
    overlap
        :math:`\lambda` in [0, 1].

    Returns
    -------
    Shape ``(n_genes,)``.
    """
    up, down = (
        (1 - overlap) * side.sum(axis=0) + overlap * side.max(axis=0)
        for side in (np.maximum(changes, 0), np.maximum(-changes, 0))
    )
    return up - down


@dataclass(frozen=True)
class Composition:
    """How changes under parts make the change under the whole, and how far off that is.

    Parameters
    ----------
    weights
        Weight of each part; None: from the overlap.
    overlap
        In [0, 1].
    left_out
        Errors on measured wholes; None where there are none.
    """

    weights: list[float] | None
    overlap: float = 0.0
    left_out: LeftOut | None = None

    def __call__(self, changes: np.ndarray) -> np.ndarray:
        """Return the change under the whole, ``(n_genes,)``, of ``(n_parts, n_genes)``."""
        if self.weights is None:
            return united(changes, self.overlap)
        return np.tensordot(self.weights, changes, axes=1)


@dataclass(frozen=True)
class Part:
    """A measured part of a target: its profiles of groups, and what a decoder makes of it.

    Parameters
    ----------
    profiles
        Observed profile of each group.
    means
        Of each group of source cells, moved to the part.
    added
        Change that the decoder is known to miss, where no group was observed, ``(n_genes,)``.
    """

    profiles: Profiles
    means: list[GroupMeans]
    added: np.ndarray | float


@dataclass(frozen=True)
class PartChanges:
    """What the parts tell of one group of source cells, ``(n_genes,)`` each.

    Parameters
    ----------
    before
        What the decoder and the anchor miss of the source condition.
    missed
        What the decoder misses of the parts, put together.
    change
        The changes under the parts, with what it misses, put together.
    left_out
        Errors of such changes; None where they are not known.
    """

    before: np.ndarray
    missed: np.ndarray
    change: np.ndarray
    left_out: LeftOut | None


def part_changes(
    composition: Composition,
    unmoved: Part,
    parts: list[Part],
    groups: Sequence[str],
    theta: np.ndarray,
) -> list[PartChanges]:
    """Put the changes under the parts together, for each group of source cells.

    Parameters
    ----------
    composition
        How.
    unmoved
        The source condition itself: what is missed of it already is no part's.
    parts
        Measured parts.
    groups
        Names of the groups of source cells.
    theta
        Inverse dispersion, ``(n_genes,)``.
    """
    before = missed_by_group(unmoved, groups, theta)
    missing = np.stack([missed_by_group(part, groups, theta, before) for part in parts])
    decoded = np.stack([[m.predicted - m.decoded for m in part.means] for part in parts])
    return [
        PartChanges(
            before[k],
            composition(missing[:, k]),
            composition(decoded[:, k] + missing[:, k]),
            composition.left_out if all(group in p.profiles for p in parts) else None,
        )
        for k, group in enumerate(groups)
    ]


def missed_by_group(
    part: Part, groups: Sequence[str], theta: np.ndarray, before: np.ndarray | None = None
) -> np.ndarray:
    """Return what the decoder misses of a part in each group, ``(n_groups, n_genes)``.

    It is what lacks to the observed change without its noise. That of all groups together, weighted
    by source cells, is taken for common; what a group shows beyond it, where that stands out of its
    own noise, is its own. What is common is not measured against the decoder, which was trained
    on these very cells and follows their noise; what is a group's own is.

    Parameters
    ----------
    part
        A measured part.
    groups
        Names of the groups of source cells.
    theta
        Inverse dispersion, ``(n_genes,)``.
    before
        What is known to be missed of each group already, ``(n_groups, n_genes)``.
    """
    seen = [k for k, group in enumerate(groups) if group in part.profiles]
    if not seen:
        return np.stack([m.predicted * 0 + part.added for m in part.means])
    means = [part.means[k] for k in seen]
    share = np.array([m.n_cells for m in means]) / sum(m.n_cells for m in means)
    observed = [_change(part.means[k], part.profiles[groups[k]], theta) for k in seen]
    changes, variances = (np.stack(rows) for rows in zip(*observed, strict=True))
    if before is not None:
        changes = changes - before[seen]
    decoded = np.stack([m.predicted - m.decoded for m in means])
    profile = share @ np.stack([m.predicted for m in means])
    common = denoised(share @ changes, share**2 @ variances, profile) - share @ decoded
    by_group = np.tile(common, (len(groups), 1))
    if len(seen) > 1:
        for k, missed, variance in zip(seen, changes - decoded, variances, strict=True):
            by_group[k] += standing_out(missed - common, variance)
    return by_group


def _change(
    means: GroupMeans, observed: GroupProfile, theta: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the observed change of a group, and the sampling variance of its profile after it."""
    before, predicted = anchored(means)
    between = (observed.profile + predicted) / 2
    return observed.profile - before, sampling_variance(
        between, theta, observed.n_cells, observed.inverse_library
    )


# ------------------------------------------------------------- from measured wholes


def composition_of(
    reference: dict,
    target: Target,
    weights: list[float] | None,
    source_codes: np.ndarray,
    source_dose: float | None,
) -> Composition:
    """Return how parts are put together, as measured wholes tell.

    Parameters
    ----------
    reference
        As :func:`encode_reference` returns it.
    target
        A target that was not measured.
    weights
        Weights of its parts, if they are known.
    source_codes, source_dose
        Condition codes, ``(n_condition_keys,)``, and dose of the source cells.
    """
    codes, doses = reference["profile_codes"], reference["profile_doses"]
    sources = group_profiles(reference, target.is_source(codes, doses, source_codes, source_dose))
    if weights is None:
        wholes = [(*whole, None) for whole in target.registered_alike(source_codes)]
    else:
        wholes = target.inner_doses(doses[target.is_target(codes)])
    measured = [
        one
        for whole, parts, of_parts in wholes
        for one in _changes(reference, sources, [whole, *parts], of_parts)
    ]
    if not measured:
        return Composition(weights, ASSUMED_OVERLAP)
    if weights is not None:
        return Composition(weights, left_out=_left_out(measured, 0.0))
    errors = [(_left_out(measured, overlap).errors ** 2).sum() for overlap in OVERLAPS]
    overlap = OVERLAPS[int(np.argmin(errors))]
    return Composition(None, overlap, _left_out(measured, overlap))


@dataclass(frozen=True)
class _Measured:
    """Changes of one group under a whole, ``(n_genes,)``, and under its parts."""

    control: np.ndarray
    whole: np.ndarray
    parts: np.ndarray
    weights: list[float] | None


def _changes(
    reference: dict, sources: Profiles, targets: list[Target], weights: list[float] | None
) -> Iterator[_Measured]:
    """Yield the changes of each group that was seen under a whole, the first, and its parts."""
    codes, doses = reference["profile_codes"], reference["profile_doses"]
    sides = [group_profiles(reference, target.is_met(codes, doses)) for target in targets]
    for group, source in sources.items():
        if all(group in side for side in sides):
            whole, *parts = (side[group].profile - source.profile for side in sides)
            yield _Measured(source.profile, whole, np.stack(parts), weights)


def _left_out(measured: list[_Measured], overlap: float) -> LeftOut:
    predicted = [Composition(one.weights, overlap)(one.parts) for one in measured]
    return LeftOut(
        *(
            np.stack(rows)
            for rows in ([m.control for m in measured], predicted, [m.whole for m in measured])
        )
    )
