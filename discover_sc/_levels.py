"""Levels of a condition key, and the row by which the networks know each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Sequence


class Levels:
    """Levels that consist of parts: one column per part, 1 where a level has it.

    A level without the separator is its own only part, so that plain levels have unit vectors.

    Parameters
    ----------
    key
        Condition key.
    names
        Registered levels, in the order of their codes.
    separator
        What stands between the parts of a combination; None: levels share nothing.
    added
        Levels that were learned after training, each a part of its own.

    Raises
    ------
    ValueError
        If a level repeats a part, or two levels are the same parts in another order.
    """

    def __init__(
        self, key: str, names: Sequence[str], separator: str | None, added: Sequence[str] = ()
    ) -> None:
        self.key, self.names, self._separator = key, [*names, *added], separator
        self.added = list(added)
        parts = [self.parts(name) for name in self.names]
        columns = dict.fromkeys(part for level in parts[: len(names)] for part in level)
        self.columns = list(columns)
        self._codes: dict[frozenset, int] = {}
        for code, level in enumerate(parts):
            first = self._codes.setdefault(frozenset(level), code)
            if first != code:
                raise ValueError(
                    f"Levels {self.names[first]!r} and {self.names[code]!r} of {key!r} are the "
                    "same combination in two orders; the order of parts means nothing. Rename "
                    "one of them, or switch combinations off with combination_separator=None."
                )
        self.design = np.stack([_indicator(self.columns, level) for level in parts])

    def parts(self, level: str) -> list[str]:
        """Return the parts of a level; a level with an empty part (``"CD4+"``) is one part."""
        if not self._separator:
            return [level]
        parts = [part.strip() for part in level.split(self._separator)]
        if not all(parts):
            return [level]
        if len(set(parts)) < len(parts):
            raise ValueError(
                f"Level {level!r} of {self.key!r} repeats a part; a combination names each part "
                "once. Write it once, or switch combinations off with combination_separator=None."
            )
        return parts

    @property
    def combines(self) -> bool:
        """Whether a registered level has several parts."""
        return bool((self.design.sum(axis=1) > 1).any())

    def code(self, level: str) -> int | None:
        """Return the code of a level, its parts in any order; None if it is not registered."""
        return self._codes.get(frozenset(self.parts(level)))

    def known_name(self, level: str) -> str:
        """Return the registered name of a level, or the level if it combines known parts.

        Raises
        ------
        ValueError
            If the level repeats a part, or no registered level has one of its parts.
        """
        if (code := self.code(level)) is not None:
            return self.names[code]
        unknown = [part for part in self.parts(level) if part not in self.columns + self.added]
        if unknown:
            which = "" if unknown == [level] else f" (its part {' or '.join(map(repr, unknown))})"
            raise ValueError(
                f"Condition {level!r}{which} of {self.key!r} is not known; known are {self.names}. "
                "Choose one of them or combine their parts, or train with cells of that condition."
            )
        return level

    def row(self, level: str) -> np.ndarray:
        """Return the row of a level, or of another combination of known parts."""
        code = self.code(level)
        return _indicator(self.columns, self.parts(level)) if code is None else self.design[code]

    def added_row(self, level: str) -> np.ndarray:
        """Return which added levels are parts of a level, ``(n_added,)``."""
        return _indicator(self.added, self.parts(level))


def _indicator(columns: list[str], parts: list[str]) -> np.ndarray:
    return np.isin(np.array(columns, dtype=object), parts).astype(np.float32)


class DescribedLevels(Levels):
    """Levels that a table of features describes: one standardised row each.

    Parameters
    ----------
    key
        Condition key.
    names
        Registered levels, in the order of their codes.
    table
        As :func:`checked_table` returns it.
    """

    def __init__(
        self, key: str, names: Sequence[str], table: dict, added: Sequence[str] = ()
    ) -> None:
        super().__init__(key, names, None, added)
        self.columns = list(table["features"])
        order = [table["levels"].index(name) for name in names]
        values = np.asarray(table["values"])[order]
        self._center, self._scale = values.mean(axis=0), values.std(axis=0)
        # an added level has no description: it starts from the mean of all
        undescribed = np.zeros((len(self.added), len(self.columns)), dtype=np.float32)
        self.design = np.concatenate([self._standardised(values), undescribed])

    def _standardised(self, values: np.ndarray) -> np.ndarray:
        """Return features of mean 0 and rows of mean square length 1 over registered levels."""
        standard = (values - self._center) / self._scale
        return (standard / np.sqrt(len(self.columns))).astype(np.float32)

    def known_name(self, level: str) -> str:
        """Return the level if it is registered.

        Raises
        ------
        ValueError
            If it is not.
        """
        if level not in self.names:
            raise ValueError(
                f"Condition {level!r} of {self.key!r} is not known; known are {self.names}. Choose "
                "one of them, or describe new levels: to=DataFrame of levels x features."
            )
        return level

    def describe(self, table: pd.DataFrame) -> dict[str, np.ndarray]:
        """Return the row of each level of a table of new levels, by its name.

        Raises
        ------
        ValueError
            If a level stands twice or is registered, or a feature is missing or no finite number.
        """
        _check_table(table, "to")
        known = [str(name) for name in table.index if str(name) in self.names]
        if known:
            raise ValueError(
                f"to describes {known}, which are registered levels of {self.key!r}; a description "
                "is for levels that the model does not know. Ask for those by name."
            )
        missing = [name for name in self.columns if name not in table.columns]
        if missing:
            raise ValueError(
                f"to lacks the features {missing[:10]}; new levels need all {len(self.columns)} "
                "features that registered ones have. Compute them in the same way."
            )
        rows = self._standardised(table[self.columns].to_numpy(dtype=float))
        return dict(zip(table.index.astype(str), rows, strict=True))


def checked_table(table: object, key: str, names: Sequence[str]) -> dict:
    """Return the described levels that are registered, as plain lists and an array.

    Parameters
    ----------
    table
        Levels x features.
    key
        Where it stands in ``adata.uns``.
    names
        Levels that need a row.

    Raises
    ------
    TypeError
        If it is no DataFrame.
    ValueError
        If a level has no row, stands twice or has the row of another, or a feature is constant
        or no finite number.
    """
    name = f"adata.uns[{key!r}]"
    if not isinstance(table, pd.DataFrame):
        raise TypeError(
            f"{name} is of type {type(table).__name__}; condition_embedding names a DataFrame of "
            "levels x features. Put one there."
        )
    _check_table(table, name)
    table = table.set_axis(table.index.astype(str), axis=0)
    missing = [level for level in names if level not in table.index]
    if missing:
        raise ValueError(
            f"{name} has no row for the levels {missing}; every level needs one, the control "
            "included. Add them, or remove their cells."
        )
    table = table.loc[list(names)]
    constant = [str(c) for c in table.columns if table[c].nunique() == 1]
    if constant:
        raise ValueError(
            f"{name} has features with the same value for all levels: {constant[:10]}; a feature "
            "must tell levels apart. Remove these columns."
        )
    twins = table.index[table.duplicated(keep=False)]
    if len(twins):
        raise ValueError(
            f"{name} has the same row for the levels {list(twins)}; a row must tell its level "
            "apart. Add features that differ, or merge these levels."
        )
    return {
        "levels": list(table.index),
        "features": list(table.columns),
        "values": table.to_numpy(dtype=np.float64),
    }


def _check_table(table: pd.DataFrame, name: str) -> None:
    twice = table.index[table.index.duplicated()]
    if len(twice):
        raise ValueError(
            f"{name} has more than one row for the level {str(twice[0])!r}; each level has one. "
            "Remove the others."
        )
    if not len(table) or not len(table.columns):
        raise ValueError(f"{name} is empty; it needs at least one level and one feature.")
    values = table.apply(pd.to_numeric, errors="coerce").to_numpy(dtype=float)
    bad = table.index[~np.isfinite(values).all(axis=1)]
    if len(bad):
        raise ValueError(
            f"{name} holds missing, infinite or non-numeric values for the levels "
            f"{[str(level) for level in bad[:10]]}; features are finite numbers. Fill them in, or "
            "leave these levels out."
        )
