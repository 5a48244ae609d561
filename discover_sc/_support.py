"""How well the training data cover a cell under a target condition."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from scvi import settings
from sklearn.neighbors import NearestNeighbors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._counterfactual import Reference

_N_NEIGHBORS = 15
_LOW = 0.05


class Support:
    """Share of well covered cells that lie as far from their neighbours as a cell does.

    Covered are the reference cells under the source condition whose group was observed under both
    conditions. Distances are to the 15th nearest of them, in z and w together, each latent in
    units of its standard deviation.

    Parameters
    ----------
    reference
        Latents of the training cells and which of them are on which side.
    parts
        Cells under each part of a target that has no cells of its own, ``(n_cells,)`` each:
        covered is what is covered under every part.
    """

    def __init__(self, reference: Reference, parts: Sequence[np.ndarray] | None = None) -> None:
        covered = reference.is_source
        for is_target in [reference.is_target] if parts is None else parts:
            one = replace(reference, is_target=is_target)
            covered = covered & np.isin(one.groups, one.matched_groups)
        self._index = None
        if covered.sum() > 1:
            latents = np.hstack([reference.z, reference.w])[covered]
            self._scale = latents.std(axis=0) + 1e-12
            n_neighbors = min(_N_NEIGHBORS, covered.sum() - 1)
            self._index = NearestNeighbors(n_neighbors=n_neighbors, algorithm="brute")
            self._index.fit(latents / self._scale)
            distances, _ = self._index.kneighbors()  # of each covered cell to the others
            self._distances = np.sort(distances[:, -1])

    def __call__(self, z: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Return the support of cells, in [0, 1], ``(n_cells,)``; 0 where no group was covered.

        Parameters
        ----------
        z, w
            Posterior means under the source condition, ``(n_cells, n_latent)`` and
            ``(n_cells, n_latent_specific)``.
        """
        if self._index is None:
            return np.zeros(len(z))
        distances, _ = self._index.kneighbors(np.hstack([z, w]) / self._scale)
        nearer = np.searchsorted(self._distances, distances[:, -1])
        return 1 - nearer / len(self._distances)


def warn_of_low_support(support: np.ndarray) -> None:
    """Warn if most cells are unlike all cells whose answer was observed.

    Parameters
    ----------
    support
        As :class:`Support` returns it, ``(n_cells,)``.
    """
    median = float(np.median(support))
    if median < _LOW:
        warnings.warn(
            f"The median support of the source cells is {median:.2g} (obs['support'], from 0 to "
            "1): most of them are unlike all cells that were observed under both conditions, and "
            "the prediction extrapolates. Read its group intervals, and add treated cells of such "
            "a group if there are any.",
            UserWarning,
            stacklevel=settings.warnings_stacklevel,
        )
