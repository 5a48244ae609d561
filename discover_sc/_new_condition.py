"""A new level of a condition key, learned from a few of its cells; all else stays as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ._priors import LearnedPrior
from ._reference import grow_reference
from ._residual import missed_change
from .data._checks import check_columns

if TYPE_CHECKING:
    from anndata import AnnData
    from torch import Tensor

    from ._conditions import ConditionVectors
    from ._model import DISCoVeR
    from ._module import DiscoverVAE

_N_STEPS = 200
_LR = 1e-2


def add_condition(model: DISCoVeR, adata: AnnData, condition_key: str | None, seed: int) -> None:
    """Learn a new level; see the model's method."""
    key, level = _new_level(model, adata, condition_key)
    before = {k: list(added) for k, added in model.added_levels_.items()}
    vectors = _vectors(model.module)
    kept = [v.added for v in vectors]
    model.added_levels_[key].append(level)
    try:
        model._tell_added_levels()
        cells = model._validate_anndata(adata.copy() if adata.is_view else adata)
        with torch.random.fork_rng():  # data loaders draw from the global state, too
            torch.manual_seed(seed)
            [tensors] = model._make_data_loader(cells, batch_size=cells.n_obs)
            _learn(model.module, tensors, vectors, _starts(model, key))
            _join_reference(model, cells, level)
            if model.module.gene_likelihood != "normal" and model.dose_key is None:
                model.missed_changes_[level] = missed_change(model, cells, key, level)
    except BaseException:
        model.added_levels_ = before
        model.missed_changes_.pop(level, None)
        for one, added in zip(vectors, kept, strict=True):
            one.added = added
        model._tell_added_levels()
        raise
    model._forget(cells)


def _new_level(model: DISCoVeR, adata: AnnData, key: str | None) -> tuple[str, str]:
    """Return the key and the one level of the cells, which must be new to the model."""
    if not isinstance(model.module.prior, LearnedPrior):
        raise ValueError(
            "prior is 'class_mean', whose means need the cells of training; a new condition can "
            "be learned under prior='learned'. Train such a model."
        )
    keys = model.condition_keys
    if key is None and len(keys) > 1:
        raise ValueError(f"There are several condition keys, {keys}. Say which: condition_key=...")
    key = keys[0] if key is None else key
    if key not in keys:
        raise ValueError(f"condition_key is {key!r}; condition keys are {keys}. Choose one.")
    if model.dose_key is not None and key != keys[0]:
        raise ValueError(
            f"condition_key is {key!r}, and doses belong to {keys[0]!r}; with doses, only levels "
            "of that key can be added. Train with cells of the new level."
        )
    check_columns(adata, condition_key=key)
    found = [str(level) for level in adata.obs[key].unique()]
    if len(found) != 1:
        raise ValueError(
            f"adata.obs[{key!r}] holds the levels {found}; one new level is learned at a time. "
            "Pass the cells of one of them."
        )
    levels = model._condition_levels[keys.index(key)]
    if levels.code(found[0]) is not None:
        raise ValueError(
            f"Level {found[0]!r} of {key!r} is known to the model; known are {levels.names}. Name "
            "the new condition otherwise, or predict the known one."
        )
    if len(levels.parts(found[0])) > 1:
        raise ValueError(
            f"Level {found[0]!r} of {key!r} is a combination; what is learned is a part. Predict "
            "the combination of known parts, or name the level without the separator."
        )
    return key, found[0]


def _vectors(module: DiscoverVAE) -> list[ConditionVectors]:
    """Return what holds the vectors of levels: in the encoder of w and in its prior."""
    return [module.encoders.conditions, module.prior.conditions]


def _starts(model: DISCoVeR, key: str) -> list[list[Tensor]]:
    """Return the vectors of each registered level of the key, from which learning may start."""
    position = model.condition_keys.index(key)
    rows = getattr(model.module.conditions, f"design_{position}")
    rows = rows[: len(rows) - len(model.added_levels_[key])]
    n_responses = model.module.conditions.n_features[position] // rows.shape[1]
    per_vectors = [
        torch.einsum("lc,rch->lrh", rows, weight.reshape(n_responses, rows.shape[1], -1))
        for weight in (v.embeddings[position].weight.detach() for v in _vectors(model.module))
    ]
    return [[vectors[level] for vectors in per_vectors] for level in range(len(rows))]


def _learn(
    module: DiscoverVAE,
    tensors: dict[str, Tensor],
    vectors: list[ConditionVectors],
    starts: list[list[Tensor]],
) -> None:
    """Step the new vectors alone on the model's loss, from the best of the known levels."""
    known = [one.added for one in vectors]

    def loss_of(new: list[Tensor]) -> Tensor:
        for one, old, vector in zip(vectors, known, new, strict=True):
            one.added = torch.cat([old, vector])
        return module(tensors, generative_kwargs={"likelihoods": False})[2].loss

    with torch.no_grad():
        best = min(starts, key=lambda start: float(loss_of(start)))
    new = [vector.clone().requires_grad_() for vector in best]
    optimizer = torch.optim.Adam(new, lr=_LR)
    for _ in range(_N_STEPS):
        for vector, gradient in zip(new, torch.autograd.grad(loss_of(new), new), strict=True):
            vector.grad = gradient
        optimizer.step()
    for one, old, vector in zip(vectors, known, new, strict=True):
        one.added = torch.cat([old, vector.detach()])


def _join_reference(model: DISCoVeR, cells: AnnData, level: str) -> None:
    """Add the cells to what counterfactuals learn from; note their doses."""
    grow_reference(model, cells)
    doses = model._doses_of(cells)
    if doses is not None:
        model.doses_ = model.doses_ | {level: np.unique(doses).tolist()}
