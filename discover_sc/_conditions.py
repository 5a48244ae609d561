"""What the networks are told of a condition: rows that describe its level, and its dose."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Conditions(nn.Module):
    r"""Turn condition codes (and doses) into features that the networks read.

    Each level of a key has a row of the key's *design*, ``(n_levels, n_columns)``: a unit vector
    for a plain level, one 1 for each part of a combination, the features of a described level.
    With a dose, the row :math:`r` of the first key becomes
    :math:`r \otimes (d / (d + k_b))_b`, 0 at dose 0; each treatment learns its own weights of the
    responses :math:`b`, hence its own course, monotone or not.

    Parameters
    ----------
    designs
        One per condition key, ``(n_levels, n_columns)``.
    dose_scales
        Doses :math:`k_b` of half response, positive, ``(n_responses,)``; None: no dose.
    """

    def __init__(self, designs: Sequence[Tensor], dose_scales: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("dose_scales", dose_scales)
        self.n_columns = [design.shape[1] for design in designs]
        self._n_levels = [len(design) for design in designs]
        self.n_added = [0] * len(designs)
        for key, design in enumerate(designs):
            # built anew from the registry on load, hence not saved
            self.register_buffer(f"design_{key}", design.float(), persistent=False)
            self.register_buffer(f"added_{key}", design[:, :0].float(), persistent=False)

    @property
    def n_features(self) -> list[int]:
        """Number of features of each key, without those of added levels."""
        n_responses = 1 if self.dose_scales is None else len(self.dose_scales)
        return [n_responses * self.n_columns[0], *self.n_columns[1:]]

    def tell_added(self, n_added: Sequence[int]) -> None:
        """Know so many levels of each key beyond those designed; each has a column of its own.

        The columns stand behind all others and are 0 for every other level.
        """
        self.n_added = list(n_added)
        for key, (n, n_levels) in enumerate(zip(n_added, self._n_levels, strict=True)):
            design = getattr(self, f"design_{key}")[:n_levels]
            every = torch.eye(n_levels + n, device=design.device)
            setattr(self, f"design_{key}", torch.cat([design, design.new_zeros(n, len(design.T))]))
            setattr(self, f"added_{key}", every[:, n_levels:])

    def rows(self, condition_index: Tensor) -> Tensor:
        """Return the rows of levels, ``(n_cells, n_columns of all keys, then of added levels)``.

        Parameters
        ----------
        condition_index
            Codes, ``int64`` of shape ``(n_cells, n_keys)``.
        """
        codes = condition_index.to(self.design_0.device)
        names = ("design", "added") if any(self.n_added) else ("design",)
        rows = [
            getattr(self, f"{name}_{key}").index_select(0, codes[:, key])
            for name in names
            for key in range(len(self.n_columns))
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)

    def respond(self, rows: Tensor, dose: Tensor | None = None) -> Tensor:
        """Return the features of rows at doses, ``(n_cells, n_features)``.

        Parameters
        ----------
        rows
            As :meth:`rows` returns them, or of levels that were never registered.
        dose
            Not negative, shape ``(n_cells, 1)``; read only if doses were registered.
        """
        if self.dose_scales is None:
            return rows
        first, others = self.n_columns[0], sum(self.n_columns[1:])
        dosed, others, added = rows.split([first, others, rows.shape[1] - first - others], dim=1)
        dose = dose.to(rows)
        response = dose / (dose + self.dose_scales)  # (n_cells, n_responses)

        def respond(part: Tensor) -> Tensor:
            return (response.unsqueeze(2) * part.unsqueeze(1)).flatten(1)

        # with doses, only levels of the first key are added
        return torch.cat([respond(dosed), others, respond(added)], dim=1)

    def forward(self, condition_index: Tensor, dose: Tensor | None = None) -> Tensor:
        """Return the features of cells, ``(n_cells, n_features)``."""
        return self.respond(self.rows(condition_index), dose)


class ConditionVectors(nn.Module):
    """Linear map from condition features into a hidden layer: one learned vector per feature.

    Parameters
    ----------
    n_features
        Number of features of each condition key.
    n_output
        Length of the vector that is added to the hidden layer.
    """

    def __init__(self, n_features: Sequence[int], n_output: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(n, n_output) for n in n_features)
        for embedding in self.embeddings:
            nn.init.normal_(embedding.weight, std=0.01)
        # vectors of levels that were added after training; no gradient of training reaches them
        self.register_buffer("added", torch.zeros(0, n_output))

    def forward(self, features: Tensor) -> Tensor:
        """Return the summed vectors, ``(n_cells, n_output)``.

        Parameters
        ----------
        features
            Shape ``(n_cells, n_features)``, those of added levels last.
        """
        weights = [embedding.weight for embedding in self.embeddings]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        if len(self.added) == 0:
            return features @ weight
        # two products: what is added to other levels is 0 exactly, so that they keep every bit
        return features[:, : len(weight)].contiguous() @ weight + (
            features[:, len(weight) :] @ self.added
        )

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        """Take as many added levels as were saved."""
        saved = state_dict.get(f"{prefix}added", self.added)
        self.added = self.added.new_zeros(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
