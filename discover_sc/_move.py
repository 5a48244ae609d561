"""What replaces w of the source cells, fitted on the reference cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ._counterfactual import COMPARING, Reference, Way, choose_way
from ._priors import LearnedPrior
from ._support import Support

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ._model import DISCoVeR
    from ._target import Target


@dataclass(frozen=True)
class Move:
    """From cells under one condition to the target: how, and from what.

    Parameters
    ----------
    method
        As asked for.
    target
        Levels asked for.
    codes, dose
        Condition codes, ``(n_condition_keys,)``, and dose of the source cells.
    way
        What replaces w, fitted.
    description
        What it consists of.
    support
        Of source cells.
    parts
        Measured parts of the target and their weights; None if it was measured itself, or not
        all of its parts were.
    """

    method: str
    target: Target
    codes: np.ndarray
    dose: float | None
    way: Way
    description: str
    support: Support
    parts: tuple[list[Target], list[float] | None] | None


def fit_move(
    model: DISCoVeR,
    method: str,
    source_codes: np.ndarray,
    source_dose: float | None,
    target: Target,
) -> Move:
    """Fit what replaces w on the reference cells.

    Raises
    ------
    ValueError
        If a way compares cells of which one side is missing.
    """
    trained = model.reference_
    reference = Reference(
        z=trained["z"],
        w=trained["w"],
        is_source=target.is_source(
            trained["condition_codes"], trained["doses"], source_codes, source_dose
        ),
        is_target=target.is_target(trained["condition_codes"]),
        groups=trained["groups"],
    )
    pieces = target.pieces(model, reference, source_codes, source_dose)
    told = reference.is_target.any() if pieces is None else pieces.cells is not None
    compares = reference.is_source.any() and told
    if not compares and (method in COMPARING or not isinstance(model.module.prior, LearnedPrior)):
        missing = target.name() if reference.is_source.any() else level_names(model, source_codes)
        raise ValueError(
            f"The model was set up with no cell under {missing}, which method={method!r} compares "
            "with others. Ask for one key at a time, or use method='abduction', which asks the "
            "learned prior."
        )
    features = target.features(model, source_codes, source_dose)
    way, description = choose_way(method, model.module, *features, pieces, compares)
    parts = None
    if pieces is not None and pieces.cells is not None and compares:
        parts = target.split(trained["condition_codes"], trained["doses"])
        parts = None if parts[0] == [target] else parts
    return Move(
        method=method,
        target=target,
        codes=source_codes,
        dose=source_dose,
        way=way.fit(reference),
        description=description,
        support=Support(reference, None if pieces is None else pieces.cells),
        parts=parts,
    )


def level_names(model: DISCoVeR, codes: np.ndarray) -> list[str]:
    """Return the name of each key's level."""
    return [levels[c] for levels, c in zip(model.conditions.values(), codes, strict=True)]


def move_w(way: Way, z: Tensor, w: Tensor) -> Tensor:
    """Return w as a way moves it, on the device of w."""
    moved = way(z.cpu().numpy(), w.cpu().numpy())
    return torch.as_tensor(moved, dtype=w.dtype, device=w.device)
