"""Predicted cells agree in the mean with the best estimate of their group's profile."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ._borrowed_effects import BorrowedEffects
    from ._described_effects import DescribedChange
    from ._group_effects import GroupEffects
    from ._left_out import LeftOut
    from ._parts import PartChanges
    from ._response_factors import FactorEffects

PROFILE_LIBRARY = 1e4  # counts per cell on whose log1p group profiles are compared
_HALF_TRUST = 50  # cells of a group at which what they show counts half


@dataclass(frozen=True)
class GroupMeans:
    """Means over the source cells of one group, ``(n_genes,)`` each.

    Parameters
    ----------
    observed
        As counted, under the source condition.
    decoded
        As decoded under the source condition.
    predicted
        As decoded under the target condition.
    n_cells
        Number of these cells.
    """

    observed: np.ndarray
    decoded: np.ndarray
    predicted: np.ndarray
    n_cells: int


@dataclass(frozen=True)
class OwnChange:
    """Observed change of a group, ``(n_genes,)``, and the cells of the side that has fewer."""

    change: np.ndarray
    n_cells: int


@dataclass(frozen=True)
class GroupEstimate:
    """Profile under source and target condition, and its standard error, ``(n_genes,)`` each.

    ``observed_weight`` is the mean weight of observed changes in it; 0 where there were none.
    """

    source: np.ndarray
    profile: np.ndarray
    error: np.ndarray
    observed_weight: float = 0.0


def trust(n_cells: int | np.ndarray) -> float | np.ndarray:
    """Return how far what some cells of a group show is trusted, in [0, 1)."""
    return n_cells / (n_cells + _HALF_TRUST)


def anchored(means: GroupMeans) -> tuple[np.ndarray, np.ndarray]:
    """Return source and target profile with what the decoder misses of the group added to both.

    A decoder smooths, and misses part of what is particular to a group. The part is seen on the
    source cells, never on treated ones, and shrunk by their number.
    """
    missed = trust(means.n_cells) * (means.observed - means.decoded)
    return means.decoded + missed, means.predicted + missed


def combine(
    means: GroupMeans,
    effects: GroupEffects | BorrowedEffects | FactorEffects | DescribedChange | None = None,
    missed: np.ndarray | float = 0.0,
    own: OwnChange | None = None,
    parts: PartChanges | None = None,
) -> GroupEstimate:
    """Weigh the model's estimate and the observed changes, gene by gene.

    Parameters
    ----------
    means
        Profiles of the source cells.
    effects
        Changes observed in other groups, or borrowed from other treatments, of a new treatment or
        of a described one; None where there are none.
    missed
        Change that the decoder is known to miss of the target condition, ``(n_genes,)``.
    own
        Change that was observed of this very group, if it was: trusted by the number of its cells.
    parts
        Changes under the parts of a target that was not measured.

    Returns
    -------
    The estimate; its error is not known (NaN) where no truth was left out to measure it.
    """
    base, profile = anchored(means)
    profile = profile + missed
    if parts is not None:
        # the parts are put together in w, before decoding, or as changes of the profile
        base, profile = base + parts.before, profile + parts.before
        together, apart = profile + parts.missed, base + parts.change
        return _with_error(base, (together + apart) / 2, parts.left_out, (together - apart) / 2)
    weight = np.zeros_like(profile)
    if effects is not None:
        apart = base + effects.change(base) - profile
        weight = effects.weight_beside(apart)
        profile = profile + weight * apart
    if own is not None:
        profile = profile + trust(own.n_cells) * (base + own.change - profile)
    return replace(_with_error(base, profile, effects), observed_weight=float(weight.mean()))


def uncalibrated(means: GroupMeans, left_out: LeftOut | None) -> GroupEstimate:
    """Return the decoded profiles as they are.

    Parameters
    ----------
    means
        Profiles of the source cells.
    left_out
        What the error is known by; None: it is not known (NaN).
    """
    return _with_error(means.decoded, means.predicted, left_out)


def _with_error(
    base: np.ndarray,
    profile: np.ndarray,
    left_out: LeftOut | None,
    disagreement: np.ndarray | float = 0.0,
) -> GroupEstimate:
    if left_out is None:
        return GroupEstimate(base, profile, np.full_like(profile, np.nan))
    variance = left_out.error_variance(profile, profile - base) + disagreement**2
    return GroupEstimate(base, profile, np.sqrt(variance))


def closed(profile: np.ndarray) -> np.ndarray:
    """Return a log1p profile whose counts per 10,000 are not negative and add up to 10,000."""
    counts = np.expm1(profile).clip(min=0)
    return np.log1p(counts * (PROFILE_LIBRARY / counts.sum()))


class LogCalibration:
    """Moves expression to group profiles that are log1p of mean counts per 10,000.

    Of a gene that must rise, (1 + expression) is multiplied; of one that must fall, expression:
    the mean over the cells is exact and nothing falls below zero.

    Parameters
    ----------
    predicted, wanted
        Present and wanted profiles of the groups, ``(n_groups, n_genes)``.
    """

    def __init__(self, predicted: Tensor, wanted: Tensor) -> None:
        mean, wanted = torch.expm1(predicted), torch.expm1(wanted).clamp(min=0)
        self._falls = wanted < mean
        self._factor = torch.where(
            self._falls, wanted / mean.clamp(min=1e-12), (1 + wanted) / (1 + mean)
        )

    def __call__(self, expression: Tensor, group: Tensor) -> Tensor:
        """Return calibrated counts per 10,000, ``(n_cells, n_genes)``."""
        factor = self._factor[group]
        return torch.where(self._falls[group], expression * factor, (1 + expression) * factor - 1)


class ShiftCalibration:
    """Moves expression to group profiles that are plain means, by adding.

    Parameters
    ----------
    predicted, wanted
        Present and wanted profiles of the groups, ``(n_groups, n_genes)``.
    """

    def __init__(self, predicted: Tensor, wanted: Tensor) -> None:
        self._shift = wanted - predicted

    def __call__(self, expression: Tensor, group: Tensor) -> Tensor:
        """Return calibrated values, ``(n_cells, n_genes)``."""
        return expression + self._shift[group]
