"""Posteriors of many cells, in minibatches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from anndata import AnnData
    from torch.distributions import Normal

    from ._model import DISCoVeR

BATCH_SIZE = 1024  # without a gradient, larger minibatches cost less


@torch.inference_mode()
def posteriors(
    model: DISCoVeR,
    adata: AnnData,
    cells: np.ndarray,
    batch_size: int | None = None,
) -> Iterator[tuple[slice, dict[str, Normal]]]:
    """Yield the positions of a minibatch among the cells, and its posteriors of z and w."""
    loader = model._make_data_loader(
        adata, indices=cells, batch_size=batch_size or BATCH_SIZE, load_sparse_tensor=True
    )
    start = 0
    for tensors in loader:
        found = model.module.posteriors(tensors)
        rows = slice(start, start + len(found["z"].loc))
        yield rows, found
        start = rows.stop
