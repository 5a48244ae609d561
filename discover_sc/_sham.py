"""What effects are learned from: cells of both sides, or source cells as a sham treatment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from ._counterfactual import MIN_GROUP_CELLS, Reference
from ._keys import CONDITION_KEY, QW_KEY, QZ_KEY
from ._reference import at_most, groups_of
from ._source_cells import SourceBatches

if TYPE_CHECKING:
    from anndata import AnnData

    from ._model import DISCoVeR

_MAX_SHAM_CELLS = 2000  # of each group, as many as the reference keeps


@dataclass(frozen=True)
class Pool:
    """Cells of both sides of a comparison, from which references are drawn.

    Under a sham treatment there is one set of cells: each may be drawn for either side, with the
    w that it has there.
    """

    z: np.ndarray
    w_source: np.ndarray
    w_target: np.ndarray
    is_source: np.ndarray
    is_target: np.ndarray
    groups: np.ndarray
    is_sham: bool

    def whole(self) -> Reference:
        """Return all cells of both sides."""
        return self._reference(self.is_source, self.is_target)

    def half(self, rng: np.random.Generator) -> Reference:
        """Return a random half of each side; under a sham treatment, two halves of the cells."""
        half = self._half_of(self.is_source, rng)
        rest = self.is_source & ~half if self.is_sham else self._half_of(self.is_target, rng)
        return self._reference(half, rest)

    def _half_of(self, side: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return every other cell, in random order, group after group."""
        cells = rng.permutation(np.flatnonzero(side))
        _, codes = np.unique(self.groups[cells], return_inverse=True)
        half = np.zeros_like(side)
        half[cells[np.argsort(codes, kind="stable")][::2]] = True
        return half

    def _reference(self, is_source: np.ndarray, is_target: np.ndarray) -> Reference:
        w = np.where(is_target[:, None], self.w_target, self.w_source)
        return Reference(self.z, w, is_source, is_target, self.groups)

    def at_most(self, n_cells: int) -> Pool:
        """Return a pool of at most so many cells of each group, drawn at random."""
        cells = at_most(n_cells, pd.DataFrame({"group": self.groups}))
        arrays = (self.z, self.w_source, self.w_target, self.is_source, self.is_target, self.groups)
        return Pool(*(array[cells] for array in arrays), self.is_sham)

    def n_cells_of(self, groups: np.ndarray) -> np.ndarray:
        """Return the number of cells of each group on either side, ``(2, n_groups)``."""
        share = 2 if self.is_sham else 1
        return np.stack(
            [
                [(side & (self.groups == group)).sum() / share for group in groups]
                for side in (self.is_source, self.is_target)
            ]
        )

    def n_learned_from(self, groups: np.ndarray) -> np.ndarray:
        """Return the same, with all cells of a side for groups that hold too few to count."""
        n_cells = self.n_cells_of(groups)
        every = [[side.sum()] for side in (self.is_source, self.is_target)]
        return np.where(n_cells >= MIN_GROUP_CELLS, n_cells, every)


def level_names(model: DISCoVeR, levels: dict[int, int]) -> dict[str, str]:
    """Return the names of condition keys and levels that are given as codes."""
    conditions = list(model.conditions.items())
    return {conditions[key][0]: conditions[key][1][code] for key, code in levels.items()}


def pools(
    model: DISCoVeR,
    source: AnnData,
    cells: np.ndarray,
    target: dict[int, int],
    origin: dict[int, int],
    batch_size: int | None,
) -> tuple[Pool, Pool, np.ndarray]:
    """Return what the effect is learned from, the source cells as a sham, and their groups.

    Sham-treated cells are source cells that carry the label of the target: their counts are
    untreated, so that whatever then moves in w is the label's doing and not the treatment's.
    """
    z, w, w_relabelled = _encode(model, source, cells, target, batch_size)
    of_source = groups_of(model, source)[cells]
    every = np.full(len(cells), True)
    sham = Pool(z, w, w_relabelled, every, every, of_source, is_sham=True)
    sham = sham.at_most(_MAX_SHAM_CELLS)
    if target == origin:
        return sham, sham, of_source
    trained = model.reference_
    sides = [
        (trained["condition_codes"][:, list(side)] == list(side.values())).all(axis=1)
        for side in (origin, target)
    ]
    for side, levels in zip(sides, (origin, target), strict=True):
        if side.sum() < 2:
            raise ValueError(
                f"The model was set up with {side.sum()} cells under "
                f"{level_names(model, levels)}; an effect is learned from at least 2 on each side. "
                "Ask for one key at a time."
            )
    real = Pool(trained["z"], trained["w"], trained["w"], *sides, trained["groups"], is_sham=False)
    return real, sham, of_source


def _encode(
    model: DISCoVeR,
    source: AnnData,
    cells: np.ndarray,
    target: dict[int, int],
    batch_size: int | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return z, w, and w as if the same counts were under the target, posterior means."""
    parts = []
    for _, tensors, outputs in SourceBatches(model, source, cells, batch_size):
        condition = tensors[CONDITION_KEY].clone()
        condition[:, list(target)] = torch.as_tensor(
            list(target.values()), dtype=condition.dtype, device=condition.device
        )
        relabelled = model.module.posteriors({**tensors, CONDITION_KEY: condition})["w"]
        latents = (outputs[QZ_KEY].loc, outputs[QW_KEY].loc, relabelled.loc)
        parts.append([latent.cpu().numpy() for latent in latents])
    return tuple(np.concatenate(latent) for latent in zip(*parts, strict=True))
