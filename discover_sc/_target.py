"""What a prediction asks for: levels of condition keys, registered or not."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from scvi import settings

from ._counterfactual import Pieces, summed
from ._levels import DescribedLevels

if TYPE_CHECKING:
    from torch import Tensor

    from ._counterfactual import Reference
    from ._levels import Levels
    from ._model import DISCoVeR

_MIN_DOSE_CELLS = 5
ASSUMED_OVERLAP = 0.5  # halfway between adding up and counting once, where nothing tells
OVERLAPS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Target:
    """Levels asked for; keys that are not asked for keep each cell's level.

    Parameters
    ----------
    keys
        Levels of each condition key that the model knows, by the key's position.
    asked
        Level asked for, by the key's position.
    described
        Row of each level asked for that was only described, by the key's position.
    dose
        Dose asked for; None: the source's, or none is registered.
    """

    keys: list[Levels]
    asked: dict[int, str]
    described: dict[int, np.ndarray] = field(default_factory=dict)
    dose: float | None = None

    @property
    def codes(self) -> dict[int, int | None]:
        """Code of each level asked for; None where it is not registered."""
        return {
            position: None if position in self.described else self.keys[position].code(level)
            for position, level in self.asked.items()
        }

    def name(self) -> list[str]:
        """Return the levels asked for."""
        return list(self.asked.values())

    def rows(self, source_codes: np.ndarray) -> np.ndarray:
        """Return the rows of source and target, ``(2, n_columns and columns of added levels)``."""
        source = [levels.names[c] for levels, c in zip(self.keys, source_codes, strict=True)]
        target = [self.asked.get(position, level) for position, level in enumerate(source)]
        return np.stack([self._row(source, {}), self._row(target, self.described)])

    def _row(self, names: list[str], described: dict[int, np.ndarray]) -> np.ndarray:
        named = list(zip(self.keys, names, strict=True))
        rows = [
            described[position] if position in described else levels.row(name)
            for position, (levels, name) in enumerate(named)
        ]
        return np.concatenate(rows + [levels.added_row(name) for levels, name in named])

    def features(
        self, model: DISCoVeR, source_codes: np.ndarray, source_dose: float | None
    ) -> tuple[Tensor, Tensor]:
        """Return what the networks are told of source and target, ``(1, n_features)`` each."""
        conditions = model.module.conditions
        rows = torch.as_tensor(self.rows(source_codes), device=model.device)
        doses = None
        if source_dose is not None:
            dose = source_dose if self.dose is None else self.dose
            doses = torch.tensor([[source_dose], [dose]], device=model.device)
        features = conditions.respond(rows, doses)
        return features[:1], features[1:]

    def missed_changes(self, model: DISCoVeR, source_codes: np.ndarray) -> list[np.ndarray]:
        """Return what the decoder misses of levels added after training, ``(n_genes,)`` each.

        Of those that the source cells are under themselves, the anchor knows it already.
        """
        changes = []
        for position, level in self.asked.items():
            levels = self.keys[position]
            own = levels.parts(levels.names[source_codes[position]])
            new = set(levels.parts(level)) - set(own)
            changes += [c for part, c in model.missed_changes_.items() if part in new]
        return changes

    # --------------------------------------------------------------- reference cells

    def is_source(
        self,
        codes: np.ndarray,
        doses: np.ndarray | None,
        source_codes: np.ndarray,
        source_dose: float | None,
    ) -> np.ndarray:
        """Return which cells are under the source's levels (and dose) of the keys asked for."""
        mask = self._under(codes, {k: source_codes[k] for k in self.asked})
        return mask if doses is None or 0 not in self.asked else mask & (doses == source_dose)

    def is_target(self, codes: np.ndarray) -> np.ndarray:
        """Return which cells are under the levels asked for; none if one is not registered."""
        return self._under(codes, self.codes)

    def is_met(self, codes: np.ndarray, doses: np.ndarray | None) -> np.ndarray:
        """Return which cells are under the levels (and dose) asked for already."""
        mask = self.is_target(codes)
        return mask if doses is None or self.dose is None else mask & (doses == self.dose)

    @staticmethod
    def _under(codes: np.ndarray, wanted: dict[int, int | None]) -> np.ndarray:
        if None in wanted.values():
            return np.zeros(len(codes), dtype=bool)
        return (codes[:, list(wanted)] == list(wanted.values())).all(axis=1)

    def split(
        self, codes: np.ndarray, doses: np.ndarray | None
    ) -> tuple[list[Target], list[float] | None] | None:
        """Return the measured targets that tell of this one, and their weights.

        For a combination that is not registered, its parts, whose weights are to be found (None);
        for a dose, the nearest measured doses on either side.

        Parameters
        ----------
        codes, doses
            Condition codes, ``(n_cells, n_condition_keys)``, and doses of the reference cells.

        Returns
        -------
        Targets and weights; None if there is nothing to split, or no dose has enough cells.
        """
        if self.dose is not None:
            measured = _measured_doses(doses[self.is_target(codes)])
            return self._between(measured, self.dose) if len(measured) else None
        position = self._combination
        return None if position is None else (self._parts(position, self.asked[position]), None)

    def registered_alike(self, source_codes: np.ndarray) -> list[tuple[Target, list[Target]]]:
        """Return the registered combinations of the same key, none of the source, and their parts.

        Parameters
        ----------
        source_codes
            Condition codes of the source cells, ``(n_condition_keys,)``.
        """
        position = self._combination
        levels = self.keys[position]
        own = levels.parts(levels.names[source_codes[position]])
        return [
            (replace(self, asked=self.asked | {position: name}), self._parts(position, name))
            for name in levels.names
            if len(levels.parts(name)) > 1 and not set(levels.parts(name)) & set(own)
        ]

    def inner_doses(self, doses: np.ndarray) -> list[tuple[Target, list[Target], list[float]]]:
        """Return each measured dose between two others, with those and their weights.

        Parameters
        ----------
        doses
            Doses of the cells under the treatment.
        """
        measured = _measured_doses(doses, n_cells=1)
        return [
            (replace(self, dose=float(d)), *self._between(measured[measured != d], d))
            for d in measured[1:-1]
        ]

    @property
    def _combination(self) -> int | None:
        """Position of the key whose combination is asked for and not registered."""
        unknown = [k for k, code in self.codes.items() if code is None and k not in self.described]
        return unknown[0] if len(unknown) == 1 else None

    def _parts(self, position: int, level: str) -> list[Target]:
        parts = self.keys[position].parts(level)
        return [replace(self, asked=self.asked | {position: part}) for part in parts]

    def _between(self, measured: np.ndarray, dose: float) -> tuple[list[Target], list[float]]:
        weights = _between_doses(measured, dose)
        others = {position: level for position, level in self.asked.items() if position != 0}
        parts = [
            replace(self, dose=d) if d else replace(self, asked=others, dose=0.0) for d in weights
        ]
        return parts, list(weights.values())

    def pieces(
        self, model: DISCoVeR, reference: Reference, source_codes: np.ndarray, source_dose: float
    ) -> Pieces | None:
        """Return what tells of the target part by part; None if it has reference cells itself.

        Raises
        ------
        ValueError
            If the source is a part of the combination and no combination is registered that
            would tell what a part adds to another.
        """
        codes, doses = model.reference_["condition_codes"], model.reference_.get("doses")
        split = self.split(codes, doses)
        if split is None:
            return None
        targets, weights = split
        cells = [part.is_met(codes, doses) for part in targets]
        if weights is not None:
            return Pieces(cells, weights=weights)
        position = self._combination
        levels, source = self.keys[position], self.keys[position].names[source_codes[position]]
        shares = bool(set(levels.parts(source)) & set(levels.parts(self.asked[position])))
        if shares and not levels.combines:
            raise ValueError(
                f"Source cells are under {source!r}, which is a part of "
                f"{self.asked[position]!r}, and no combination is registered that would tell what "
                "a part adds to another. Predict from cells of a level that shares no part with "
                "it, the control."
            )
        if shares or not all(mask.any() for mask in cells):
            cells = None
        if levels.combines:  # the networks have learned what a sum of parts does
            return Pieces(cells, overlap=_measured_overlap(levels, codes[:, position], reference))
        features = [part.features(model, source_codes, source_dose)[1] for part in targets]
        return Pieces(cells, features, overlap=ASSUMED_OVERLAP)


def _measured_overlap(levels: Levels, codes: np.ndarray, reference: Reference) -> float:
    """Return the overlap that predicts the registered combinations best from their parts."""

    def change(level: str) -> np.ndarray | None:
        under = codes == levels.code(level) if levels.code(level) is not None else []
        return reference.w[under].mean(axis=0) - control if np.any(under) else None

    if not reference.is_source.any():
        return ASSUMED_OVERLAP
    control = reference.w[reference.is_source].mean(axis=0)
    errors = []
    for name in levels.names:
        parts = levels.parts(name)
        changes = [change(level) for level in (name, *parts)]
        if len(parts) > 1 and all(c is not None for c in changes):
            each = np.stack(changes[1:])[:, None, :]
            errors.append([((summed(each, o)[0] - changes[0]) ** 2).sum() for o in OVERLAPS])
    return OVERLAPS[int(np.argmin(np.sum(errors, axis=0)))] if errors else ASSUMED_OVERLAP


def _measured_doses(doses: np.ndarray, n_cells: int = _MIN_DOSE_CELLS) -> np.ndarray:
    """Return the positive doses of so many cells at least, in order."""
    measured, counts = np.unique(doses[doses > 0], return_counts=True)
    return measured[counts >= n_cells]


def _between_doses(measured: np.ndarray, dose: float) -> dict[float, float]:
    """Interpolate linearly in log dose between measured doses, in dose below the lowest.

    Parameters
    ----------
    measured
        Positive doses in order, at least one.
    dose
        Dose asked for.

    Returns
    -------
    Weight of each dose; dose 0 are untreated cells.
    """
    if dose <= measured[0]:
        weights = {0.0: 1.0 - dose / measured[0], measured[0]: dose / measured[0]}
    elif dose >= measured[-1]:
        weights = {measured[-1]: 1.0}
    else:
        above = int(np.searchsorted(measured, dose))
        low, high = measured[above - 1 : above + 1]
        share = np.log(dose / low) / np.log(high / low)
        weights = {low: 1.0 - share, high: share}
    return {float(d): float(weight) for d, weight in weights.items() if weight > 0}


def targets_of(
    model: DISCoVeR, to: str | dict[str, str] | pd.DataFrame, dose: float | None
) -> list[Target]:
    """Return the targets that a user names: one, or one per described level.

    Raises
    ------
    ValueError
        If a key or a level is not known, a key of several has to be named, levels are described
        to a model that knows no descriptions, or the dose does not fit.
    """
    if isinstance(to, pd.DataFrame):
        return _described_targets(model, to, _checked_dose(model, dose, None))
    asked = _asked_levels(model, to)
    return [Target(model._condition_levels, asked, {}, _checked_dose(model, dose, asked.get(0)))]


def registered_levels(
    model: DISCoVeR, to: str | dict[str, str], argument: str = "to"
) -> dict[int, int]:
    """Return the code of each level that a user names, by the key's position.

    Raises
    ------
    ValueError
        If a key or a level is not known, or a level is a combination that is not registered.
    """
    codes = {}
    for position, level in _asked_levels(model, to, argument).items():
        codes[position] = model._condition_levels[position].code(level)
        if codes[position] is None:
            raise ValueError(
                f"{argument} asks for {level!r}, which no cell of the model is under; known are "
                f"{list(model.conditions.values())[position]}. Choose one of them."
            )
    return codes


def _asked_levels(
    model: DISCoVeR, to: str | dict[str, str], argument: str = "to"
) -> dict[int, str]:
    """Return the level asked for of each key that is asked for, by the key's position."""
    conditions = model.conditions
    if not isinstance(to, dict):
        if len(conditions) > 1:
            raise ValueError(
                f"{argument} is {to!r} and there are several condition keys, {list(conditions)}. "
                f"Say which: {argument}={{key: level}}."
            )
        to = {next(iter(conditions)): to}
    asked = {}
    for key, level in to.items():
        if key not in conditions:
            raise ValueError(
                f"{argument} names the key {key!r}; condition keys are {list(conditions)}. Use one "
                "of them."
            )
        position = list(conditions).index(key)
        asked[position] = model._condition_levels[position].known_name(str(level))
    if not asked:
        raise ValueError(f"{argument} is empty; name a level of one of {list(conditions)}.")
    return asked


def _described_targets(model: DISCoVeR, to: pd.DataFrame, dose: float | None) -> list[Target]:
    levels = model._condition_levels[0]
    if not isinstance(levels, DescribedLevels):
        raise ValueError(
            f"to is a DataFrame of new levels, and the levels of {levels.key!r} were registered "
            "without descriptions. Pass condition_embedding to setup_anndata and train."
        )
    return [
        Target(model._condition_levels, {0: name}, {0: row}, dose)
        for name, row in levels.describe(to).items()
    ]


def _checked_dose(model: DISCoVeR, dose: float | None, level: str | None) -> float | None:
    """Return the dose asked for: not negative, and the only measured one if none is named."""
    ranges = model.doses_
    if ranges is None:
        if dose is not None:
            raise ValueError(
                f"dose is {dose} and the model was set up without doses. Pass dose_key to "
                "setup_anndata and train, or leave dose out."
            )
        return None
    measured = ranges.get(level, [])
    if dose is None:
        if len(measured) == 1:
            return float(measured[0])
        if level is None:
            return None
        raise ValueError(
            f"No dose is named for {level!r}; measured are {[float(d) for d in measured]}. Say "
            "which: dose=..."
        )
    if not (np.isfinite(dose) and dose >= 0):
        raise ValueError(f"dose is {dose}; doses are finite and not negative. Choose another.")
    positive = [d for d in measured if d > 0]
    if len(measured) and dose > 0 and not (positive and min(positive) <= dose <= max(positive)):
        span = f"from {min(positive):g} to {max(positive):g}" if positive else "0 only"
        warnings.warn(
            f"Dose {dose:g} of {level!r} lies outside of what was measured ({span}); the response "
            "there is an extrapolation. Ask for doses inside, or trust it little.",
            UserWarning,
            stacklevel=settings.warnings_stacklevel,
        )
    return float(dose)
