"""Cells to predict from, in minibatches and in groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scvi import REGISTRY_KEYS

from ._calibration import PROFILE_LIBRARY, GroupMeans
from ._expression import expression_of
from ._keys import LIBRARY_KEY, QW_KEY, QZ_KEY
from ._move import move_w
from ._reference import normalized, profile_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import anndata as ad
    from torch import Tensor

    from ._counterfactual import Way
    from ._model import DISCoVeR


@dataclass(frozen=True)
class SourceBatches:
    """Minibatches of some source cells, as often as they are asked for.

    Parameters
    ----------
    model
        A trained model.
    source
        Registered cells.
    cells
        Positions of the cells to encode.
    batch_size
        Cells in a minibatch; None: ``scvi.settings.batch_size``.
    """

    model: DISCoVeR
    source: ad.AnnData
    cells: np.ndarray
    batch_size: int | None

    def __iter__(self) -> Iterator[tuple[np.ndarray, dict[str, Tensor], dict]]:
        """Yield positions among the cells, tensors and inference outputs of each minibatch."""
        module, start = self.model.module, 0
        for tensors in self.model._make_data_loader(
            self.source, indices=self.cells, batch_size=self.batch_size
        ):
            n = len(tensors[REGISTRY_KEYS.X_KEY])
            outputs = module.inference(**module._get_inference_input(tensors))
            yield np.arange(start, start + n), tensors, outputs
            start += n


@dataclass(frozen=True)
class GroupedSource:
    """Minibatches of source cells under one condition, and their groups.

    Parameters
    ----------
    batches
        Minibatches.
    names
        Names of the groups.
    group_of_cell
        Position of each cell's group, ``(n_cells,)``.
    """

    batches: SourceBatches
    names: np.ndarray
    group_of_cell: np.ndarray

    def means(self, way: Way) -> list[GroupMeans]:
        """Return the profiles of each group, at the posterior means, w moved by a way."""
        model, n_groups = self.batches.model, len(self.names)
        sums = torch.zeros(3, n_groups, model.summary_stats.n_vars, dtype=torch.float64)
        for rows, tensors, outputs in self.batches:
            z, w, library = outputs[QZ_KEY].loc, outputs[QW_KEY].loc, outputs[LIBRARY_KEY]
            group = torch.as_tensor(self.group_of_cell[rows])
            decoded = (
                expression_of(model.module.decode(z, latent, library, tensors), PROFILE_LIBRARY)
                for latent in (w, move_w(way, z, w))
            )
            observed = normalized(model, tensors[REGISTRY_KEYS.X_KEY].to(model.device))
            for kind, values in enumerate((observed, *decoded)):
                sums[kind].index_add_(0, group, values.cpu().double())
        n_cells = np.bincount(self.group_of_cell, minlength=n_groups)
        profiles = profile_of(model, sums / torch.as_tensor(n_cells).unsqueeze(1)).numpy()
        return [GroupMeans(*profiles[:, g], n_cells[g]) for g in range(n_groups)]
