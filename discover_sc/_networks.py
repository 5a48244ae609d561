"""Encoders and decoders: tensors in, distributions and outputs out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal

from ._conditions import ConditionVectors
from ._counts import SparseCells

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_MIN_SCALE = 1e-4  # keeps the logarithm of a posterior's standard deviation finite


class Covariates(nn.Module):
    """Sum of one learned vector per category and a linear map of continuous covariates.

    One embedding per key, so that a key that gains categories leaves the others where they are.

    Parameters
    ----------
    n_cats_per_key
        Number of categories of each categorical key.
    n_continuous
        Number of continuous covariates.
    n_output
        Length of the vector that is added to the hidden layer.
    """

    def __init__(self, n_cats_per_key: Sequence[int], n_continuous: int, n_output: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(n, n_output) for n in n_cats_per_key)
        for embedding in self.embeddings:
            nn.init.normal_(embedding.weight, std=0.01)
        self.linear = nn.Linear(n_continuous, n_output, bias=False) if n_continuous else None

    def forward(self, categories: Tensor, continuous: Tensor | None) -> Tensor | float:
        """Return the summed vectors, ``(n_cells, n_output)``; 0 where there is no covariate.

        Parameters
        ----------
        categories
            Codes, ``int64`` of shape ``(n_cells, n_keys)``.
        continuous
            Values of shape ``(n_cells, n_continuous)``, or None.
        """
        vectors = [e(categories[:, k]) for k, e in enumerate(self.embeddings)]
        if self.linear is not None:
            vectors.append(self.linear(continuous))
        return sum(vectors) if vectors else 0.0


class HiddenLayers(nn.Module):
    """Linear, batch normalisation, ReLU; covariates enter before the normalisation.

    Batch normalisation is not a detail: with layer normalisation the adversarial game oscillated
    and the cell type was lost from `z`.

    Parameters
    ----------
    n_input, n_hidden, n_layers
        Width of the input, width and number of the layers.
    covariates
        What maps covariates into the first layer; None where there are none.
    """

    def __init__(
        self,
        n_input: int,
        n_hidden: int,
        n_layers: int,
        covariates: Covariates | None = None,
    ) -> None:
        super().__init__()
        self.first = nn.Linear(n_input, n_hidden)
        self.covariates = covariates
        self.activation = _activation(n_hidden)
        self.rest = _further_layers(n_hidden, n_layers - 1)

    def forward(self, x: Tensor, *covariates: Tensor | None) -> Tensor:
        """Return the last hidden layer, ``(n_cells, n_hidden)``."""
        first = self.first(x)
        if self.covariates is not None:
            first = first + self.covariates(*covariates)
        return self.rest(self.activation(first))


def _further_layers(n_hidden: int, n_layers: int, dropout_rate: float = 0.0) -> nn.Sequential:
    return nn.Sequential(
        *(
            nn.Sequential(nn.Linear(n_hidden, n_hidden), _activation(n_hidden, dropout_rate))
            for _ in range(n_layers)
        )
    )


def _activation(n_hidden: int, dropout_rate: float = 0.0) -> nn.Sequential:
    norm = nn.BatchNorm1d(n_hidden, momentum=0.01, eps=0.001)
    return nn.Sequential(norm, nn.ReLU(), *([Dropout(dropout_rate)] if dropout_rate else []))


class Dropout(nn.Module):
    """Dropout; on the CPU with 16 random bits per entry, cheaper than PyTorch's.

    Parameters
    ----------
    rate
        Share of the entries to drop, in [0, 1); on the CPU rounded to a multiple of 1 / 65,536.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return x with some entries at 0 and the others enlarged, in training; x otherwise."""
        if not self.training or x.device.type != "cpu":
            return F.dropout(x, self.rate, self.training)
        n_dropped = min(round(self.rate * 2**16), 2**16 - 1)  # of as many equally likely values
        words = x.new_empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= n_dropped - 2**15
        return x * kept.to(x.dtype).mul_(2**16 / (2**16 - n_dropped))


class Encoders(nn.Module):
    """Amortised posteriors of z, from expression, and of w, from expression and conditions.

    Two networks without a weight in common; their first layers lie side by side, so that one
    product with the cells serves both.

    Parameters
    ----------
    n_input
        Number of genes.
    n_latents
        Dimensions of z and of w.
    n_hidden, n_layers
        Width and number of the hidden layers of each.
    dropout_rate
        In [0, 1).
    n_features
        Number of features of each condition key.
    """

    def __init__(
        self,
        n_input: int,
        n_latents: tuple[int, int],
        n_hidden: int,
        n_layers: int,
        dropout_rate: float,
        n_features: Sequence[int],
    ) -> None:
        super().__init__()
        self.first = nn.Linear(n_input, 2 * n_hidden)  # of z, then of w
        # same weights, the transpose contiguous: what products with sparse cells read
        self.first.weight = nn.Parameter(self.first.weight.detach().t().contiguous().t())
        self.conditions = ConditionVectors(n_features, n_hidden)
        self.activation = _activation(2 * n_hidden, dropout_rate)
        self.rest = nn.ModuleList(
            _further_layers(n_hidden, n_layers - 1, dropout_rate) for _ in n_latents
        )
        # means, then log variances
        self.heads = nn.ModuleList(nn.Linear(n_hidden, 2 * n) for n in n_latents)

    def forward(self, x: Tensor | SparseCells, condition_features: Tensor) -> tuple[Normal, Normal]:
        """Return the posteriors over ``(n_cells, n_latents[0])`` and ``(n_cells, n_latents[1])``.

        Parameters
        ----------
        x
            Transformed expression, ``(n_cells, n_genes)``.
        condition_features
            Shape ``(n_cells, n_features)``.
        """
        if isinstance(x, SparseCells):
            first = x.linear(self.first.weight, self.first.bias)
        else:
            first = self.first(x)
        told = self.conditions(condition_features)
        hidden = self.activation(first + F.pad(told, (told.shape[1], 0)))
        qz, qw = (
            _posterior(head(rest(half)))
            for half, rest, head in zip(hidden.chunk(2, dim=1), self.rest, self.heads, strict=True)
        )
        return qz, qw


def _posterior(output: Tensor) -> Normal:
    loc, log_var = output.chunk(2, dim=-1)
    return Normal(loc, torch.exp(0.5 * log_var) + _MIN_SCALE, validate_args=False)


class Decoder(nn.Module):
    """Latents and covariates to gene-wise outputs, through hidden layers.

    ``forward`` is ``read_out`` of ``hidden``, the last hidden layer, ``(n_cells, n_hidden)``; with
    ``inflates``, ``inflation`` reads logits of zero inflation out of the same layer.
    """

    def __init__(
        self,
        n_latent: int,
        n_output: int,
        n_hidden: int,
        n_layers: int,
        n_cats_per_key: Sequence[int],
        n_continuous: int,
        inflates: bool = False,
    ) -> None:
        super().__init__()
        covariates = None
        if n_cats_per_key or n_continuous:
            covariates = Covariates(n_cats_per_key, n_continuous, n_hidden)
        self.hidden = HiddenLayers(n_latent, n_hidden, n_layers, covariates)
        self.output = nn.Linear(n_hidden, n_output)
        self.zi_logits = nn.Linear(n_hidden, n_output) if inflates else None
        self.n_hidden = n_hidden

    def read_out(self, hidden: Tensor, categories: Tensor, continuous: Tensor | None) -> Tensor:
        """Return outputs of shape ``(n_cells, n_output)``; the covariates are in ``hidden``."""
        return self.output(hidden)

    def inflation(self, hidden: Tensor, categories: Tensor, continuous: Tensor | None) -> Tensor:
        """Return logits of zero inflation, ``(n_cells, n_output)``, as ``read_out`` does."""
        return self.zi_logits(hidden)

    def forward(self, latent: Tensor, categories: Tensor, continuous: Tensor | None) -> Tensor:
        """Return outputs of shape ``(n_cells, n_output)``."""
        covariates = (categories, continuous)
        return self.read_out(self.hidden(latent, *covariates), *covariates)


class LinearDecoder(nn.Module):
    """Latents and covariates to gene-wise outputs, each a weighted sum: readable loadings.

    There is no hidden layer; in its place stands the latent, ``(n_cells, n_hidden)``.
    """

    def __init__(
        self,
        n_latent: int,
        n_output: int,
        n_cats_per_key: Sequence[int],
        n_continuous: int,
        inflates: bool = False,
    ) -> None:
        super().__init__()
        sizes = (n_latent, n_output, n_cats_per_key, n_continuous)
        self.zi_logits = LinearDecoder(*sizes) if inflates else None
        self.loadings = nn.Linear(n_latent, n_output)
        self.covariates = Covariates(n_cats_per_key, n_continuous, n_output)
        self.n_hidden = n_latent

    def hidden(self, latent: Tensor, categories: Tensor, continuous: Tensor | None) -> Tensor:
        """Return the latent."""
        return latent

    def read_out(self, hidden: Tensor, categories: Tensor, continuous: Tensor | None) -> Tensor:
        """Return outputs of shape ``(n_cells, n_output)``."""
        return self.loadings(hidden) + self.covariates(categories, continuous)

    def inflation(self, hidden: Tensor, categories: Tensor, continuous: Tensor | None) -> Tensor:
        """Return logits of zero inflation, ``(n_cells, n_output)``, as ``read_out`` does."""
        return self.zi_logits(hidden, categories, continuous)

    def forward(self, latent: Tensor, categories: Tensor, continuous: Tensor | None) -> Tensor:
        """Return outputs of shape ``(n_cells, n_output)``."""
        return self.read_out(latent, categories, continuous)
