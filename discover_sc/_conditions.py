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
        for key, design in enumerate(designs):
            # built anew from the registry on load, hence not saved
            self.register_buffer(f"design_{key}", design.float(), persistent=False)
        self.register_buffer("dose_scales", dose_scales)
        self.n_columns = [design.shape[1] for design in designs]

    @property
    def n_features(self) -> list[int]:
        """Number of features of each key."""
        n_responses = 1 if self.dose_scales is None else len(self.dose_scales)
        return [n_responses * self.n_columns[0], *self.n_columns[1:]]

    def rows(self, condition_index: Tensor) -> Tensor:
        """Return the rows of registered levels, ``(n_cells, n_columns of all keys)``.

        Parameters
        ----------
        condition_index
            Codes, ``int64`` of shape ``(n_cells, n_keys)``.
        """
        designs = [getattr(self, f"design_{key}") for key in range(len(self.n_columns))]
        codes = condition_index.to(designs[0].device)
        return torch.cat([design[codes[:, key]] for key, design in enumerate(designs)], dim=1)

    def respond(self, rows: Tensor, dose: Tensor | None = None) -> Tensor:
        """Return the features of rows at doses, ``(n_cells, sum of n_features)``.

        Parameters
        ----------
        rows
            As :meth:`rows` returns them, or of levels that were never registered.
        dose
            Not negative, shape ``(n_cells, 1)``; read only if doses were registered.
        """
        if self.dose_scales is None:
            return rows
        dosed, others = rows[:, : self.n_columns[0]], rows[:, self.n_columns[0] :]
        dose = dose.to(rows)
        response = dose / (dose + self.dose_scales)  # (n_cells, n_responses)
        dosed = (response.unsqueeze(2) * dosed.unsqueeze(1)).flatten(1)
        return torch.cat([dosed, others], dim=1)

    def forward(self, condition_index: Tensor, dose: Tensor | None = None) -> Tensor:
        """Return the features of cells, ``(n_cells, sum of n_features)``."""
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

    def forward(self, features: Tensor) -> Tensor:
        """Return the summed vectors, ``(n_cells, n_output)``.

        Parameters
        ----------
        features
            Shape ``(n_cells, sum of n_features)``.
        """
        return features @ torch.cat([embedding.weight for embedding in self.embeddings])
