"""From (z, w) under one condition to w under another: one small class per way.

Every way is fitted on the latents of the cells that the model was set up with and moves the
latents of source cells. A group (cell type) counts as *matched* if they hold it under both
conditions; the ways that compare treated with untreated cells use matched groups only, so that
the change is never read off cells of which one side is missing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import numpy as np
import torch
from scipy.stats import hmean
from sklearn.cluster import KMeans
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestNeighbors

from ._priors import LearnedPrior

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ._module import DiscoverVAE

Method = Literal["auto", "shift", "prior", "abduction", "neighbors", "groups", "linear"]
METHODS: tuple[str, ...] = get_args(Method)

MIN_GROUP_CELLS = 5
_CELLS_PER_CLUSTER = 25  # of a condition
_MAX_CLUSTERS = 10
_N_NEIGHBORS = 15
_N_VOTES = 30
_RIDGE = 1.0
_RIDGE_OF_PARTS = 1e-4  # two equal changes have a singular system


@dataclass(frozen=True)
class Reference:
    """Latents of the cells that the model was set up with, which a way may learn from.

    Parameters
    ----------
    z, w
        Posterior means, ``(n_cells, n_latent)`` and ``(n_cells, n_latent_specific)``.
    is_source, is_target
        Masks of shape ``(n_cells,)``: cells under the condition of the source cells, and under
        the one asked for.
    groups
        Group of each cell, shape ``(n_cells,)``: label, or cluster of z.
    """

    z: np.ndarray
    w: np.ndarray
    is_source: np.ndarray
    is_target: np.ndarray
    groups: np.ndarray

    @property
    def matched_groups(self) -> list:
        """Groups with enough cells under both conditions."""
        return [
            group
            for group in np.unique(self.groups)
            if min(
                (self.is_source & (self.groups == group)).sum(),
                (self.is_target & (self.groups == group)).sum(),
            )
            >= MIN_GROUP_CELLS
        ]

    def matched(self, side: np.ndarray) -> np.ndarray:
        """Return the cells of one side that belong to matched groups; all if no group does."""
        mask = side & np.isin(self.groups, self.matched_groups)
        return mask if mask.any() else side


def cluster_groups(z: np.ndarray, n_clusters: int, seed: int = 0) -> KMeans:
    """Clusters of z by k-means, which stand for cell types where none are given.

    Parameters
    ----------
    z
        Posterior means, shape ``(n_cells, n_latent)``.
    n_clusters
        Their number.
    seed
        Seed of k-means.

    Returns
    -------
    The fitted clusters: ``labels_`` of these cells, and ``predict`` for others.
    """
    return KMeans(n_clusters, n_init=3, random_state=seed).fit(z)


def n_clusters_for(condition_codes: np.ndarray) -> int:
    """Number of clusters that leaves 25 cells of a condition in each, from 1 to 10.

    The noise of a change is that of both conditions that it lies between, each as one over its
    cells; so the size of a pair of conditions is the harmonic mean of their cells, and what counts
    is the mean over pairs. With several keys, that of the key whose pairs are largest.

    Parameters
    ----------
    condition_codes
        Of the cells to be clustered, ``(n_cells, n_condition_keys)``.
    """
    n_cells = max(_pair_size(codes) for codes in condition_codes.T)
    return int(np.clip(n_cells // _CELLS_PER_CLUSTER, 1, _MAX_CLUSTERS))


def _pair_size(codes: np.ndarray) -> float:
    """Return the harmonic mean of the cells of two conditions, averaged over pairs."""
    sizes = np.bincount(codes)
    sizes = sizes[sizes >= MIN_GROUP_CELLS]
    pairs = np.stack(np.triu_indices(len(sizes), k=1))
    return float(hmean(sizes[pairs]).mean()) if pairs.size else 0.0


class Way(Protocol):
    """What moves w: fitted on a reference, then called on source cells."""

    def fit(self, reference: Reference) -> Way:
        """Learn from the latents of the training cells."""

    def __call__(self, z: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Return w under the target condition, ``(n_cells, n_latent_specific)``."""


class Shift:
    """Add the mean change of w: averaged over matched groups, each counting once."""

    def fit(self, reference: Reference) -> Shift:
        """Learn one vector."""
        groups = reference.matched_groups or [None]
        self.change = np.mean([_mean_change(reference, group) for group in groups], axis=0)
        return self

    def __call__(self, z: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Return w plus the change."""
        return w + self.change


def _mean_change(reference: Reference, group: object | None) -> np.ndarray:
    """Return the mean change of w of one group, or of all cells."""
    inside = np.full(len(reference.w), True) if group is None else reference.groups == group
    treated, control = (
        reference.w[inside & side].mean(axis=0)
        for side in (reference.is_target, reference.is_source)
    )
    return treated - control


class Neighbors:
    """Add the difference of w between the nearest treated and untreated cells in z."""

    def fit(self, reference: Reference) -> Neighbors:
        """Index the cells of matched groups of both sides."""
        self._sides = []
        for side in (reference.is_target, reference.is_source):
            mask = reference.matched(side)
            index = NearestNeighbors(n_neighbors=min(_N_NEIGHBORS, mask.sum()), algorithm="brute")
            self._sides.append((index.fit(reference.z[mask]), reference.w[mask]))
        return self

    def __call__(self, z: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Return w plus the neighbours' difference."""
        treated, control = (
            side_w[index.kneighbors(z, return_distance=False)].mean(axis=1)
            for index, side_w in self._sides
        )
        return w + treated - control


class Groups:
    """Add the change of w of the groups whose source cells look alike in w.

    Both sides of the comparison are under the source condition, where w can be compared between
    groups; each matched group votes with its share among the nearest cells.
    """

    def fit(self, reference: Reference) -> Groups:
        """Learn the change of each matched group and index its source cells."""
        groups = reference.matched_groups
        if not groups:
            self._shift = Shift().fit(reference)
            return self
        self._shift = None
        self._changes = np.stack([_mean_change(reference, group) for group in groups])
        cells = reference.matched(reference.is_source)
        self._membership = reference.groups[cells][:, None] == np.asarray(groups)
        self._index = NearestNeighbors(n_neighbors=min(_N_VOTES, cells.sum()), algorithm="brute")
        self._index.fit(reference.w[cells])
        return self

    def __call__(self, z: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Return w plus the groups' changes, weighted by their votes."""
        if self._shift is not None:
            return self._shift(z, w)
        nearest = self._index.kneighbors(w, return_distance=False)
        return w + self._membership[nearest].mean(axis=1) @ self._changes


class Linear:
    """Add the difference of two ridge regressions of w on z, of treated and untreated cells."""

    def fit(self, reference: Reference) -> Linear:
        """Fit both regressions on matched groups."""
        masks = [reference.matched(s) for s in (reference.is_target, reference.is_source)]
        self._sides = [Ridge(_RIDGE).fit(reference.z[m], reference.w[m]) for m in masks]
        return self

    def __call__(self, z: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Return w plus the difference of the two predictions."""
        treated, control = (regression.predict(z) for regression in self._sides)
        return w + treated - control


COMPARING: dict[str, type[Way]] = {
    "shift": Shift,
    "neighbors": Neighbors,
    "groups": Groups,
    "linear": Linear,
}


class Parts:
    r"""Add the changes under several parts, each with its weight.

    The weights are given, or (parts of a combination) such that what parts have in common counts
    only in part a second time: with changes :math:`\delta_k` of a cell's w and overlap
    :math:`\lambda`, the weights solve

    .. math::

        c_k \lVert\delta_k\rVert^2 + \lambda \sum_{l \ne k} c_l \max(\delta_k^\top\delta_l, 0)
        = \lVert\delta_k\rVert^2

    At 0 the changes add up. At 1 the sum goes along each part's own direction as far as that part
    goes alone, so that two equal changes are one.

    Parameters
    ----------
    ways
        One per part.
    cells
        Reference cells under each part, ``(n_cells,)`` each; None: as the reference says.
    weights
        One per part; None: from the overlap.
    overlap
        In [0, 1].
    """

    def __init__(
        self,
        ways: Sequence[Way],
        cells: Sequence[np.ndarray] | None = None,
        weights: Sequence[float] | None = None,
        overlap: float = 0.0,
    ) -> None:
        self._ways, self._cells = ways, cells
        self._weights, self._overlap = weights, overlap

    def fit(self, reference: Reference) -> Parts:
        """Fit each way with its part as target."""
        for k, way in enumerate(self._ways):
            cells = reference.is_target if self._cells is None else self._cells[k]
            way.fit(replace(reference, is_target=cells))
        return self

    def __call__(self, z: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Return w plus the parts' weighted changes."""
        changes = np.stack([way(z, w) - w for way in self._ways])
        if self._weights is not None:
            return w + np.tensordot(np.asarray(self._weights), changes, axes=1)
        return w + summed(changes, self._overlap)


def summed(changes: np.ndarray, overlap: float) -> np.ndarray:
    """Sum of changes whose overlap counts in part; see :class:`Parts`.

    Parameters
    ----------
    changes
        Shape ``(n_parts, n_cells, n_latent_specific)``.
    overlap
        In [0, 1].

    Returns
    -------
    Shape ``(n_cells, n_latent_specific)``.
    """
    products = np.einsum("knd,lnd->nkl", changes, changes)  # (n_cells, n_parts, n_parts)
    squares = np.einsum("nkk->nk", products).copy()
    system = overlap * np.maximum(products, 0)
    np.einsum("nkk->nk", system)[:] = squares * (1 + _RIDGE_OF_PARTS) + np.finfo("float32").tiny
    weights = np.linalg.solve(system, squares[..., None])[..., 0]
    return np.einsum("nk,knd->nd", weights, changes)


class Then:
    """One way after another."""

    def __init__(self, first: Way, second: Way) -> None:
        self._first, self._second = first, second

    def fit(self, reference: Reference) -> Then:
        """Fit both."""
        self._first.fit(reference)
        self._second.fit(reference)
        return self

    def __call__(self, z: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Return w moved twice."""
        return self._second(z, self._first(z, w))


class Prior:
    """Replace w by the model's prior mean under the target condition."""

    def __init__(self, module: DiscoverVAE, target: Tensor) -> None:
        self._module = module
        self._target = target

    def fit(self, reference: Reference) -> Prior:
        """Learned with the model already: nothing to fit."""
        return self

    def __call__(self, z: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Return the prior mean given z."""
        return _prior_mean(self._module, z, self._target)


class Abduction:
    """Keep the cell's residual from its own prior: m(z, target) + (w - m(z, source))."""

    def __init__(self, module: DiscoverVAE, source: Tensor, target: Tensor) -> None:
        self._module = module
        self._source, self._target = source, target

    def fit(self, reference: Reference) -> Abduction:
        """Learned with the model already: nothing to fit."""
        return self

    def __call__(self, z: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Return w plus the difference of the prior means."""
        means = [_prior_mean(self._module, z, side) for side in (self._target, self._source)]
        return w + means[0] - means[1]


@torch.no_grad()
def _prior_mean(module: DiscoverVAE, z: np.ndarray, features: Tensor) -> np.ndarray:
    mean = module.prior(torch.as_tensor(z).to(features), features.expand(len(z), -1))
    return mean.cpu().numpy()


class Blend:
    """The mean of several ways."""

    def __init__(self, ways: Sequence[Way]) -> None:
        self.ways = ways

    def fit(self, reference: Reference) -> Blend:
        """Fit each way."""
        for way in self.ways:
            way.fit(reference)
        return self

    def __call__(self, z: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Return the mean of what the ways return."""
        return np.mean([way(z, w) for way in self.ways], axis=0)


@dataclass(frozen=True)
class Pieces:
    """What tells of a target that has no reference cells of its own, part by part.

    Parameters
    ----------
    cells
        Reference cells of each part, ``(n_cells,)`` each; None: some part has none.
    features
        Condition features of each part, ``(1, n_features)`` each; None: the networks know the
        target itself.
    weights
        Weight of each part; None: from the overlap.
    overlap
        In [0, 1].
    """

    cells: list[np.ndarray] | None
    features: list[Tensor] | None = None
    weights: list[float] | None = None
    overlap: float = 0.0


def choose_way(
    method: str,
    module: DiscoverVAE,
    source: Tensor,
    target: Tensor,
    pieces: Pieces | None = None,
    compares: bool = True,
) -> tuple[Way, str]:
    """Return the way that a method names, not fitted, and what it consists of.

    Parameters
    ----------
    method
        One of ``METHODS``.
    module
        The trained module, whose prior some ways use.
    source, target
        Condition features, shape ``(1, n_features)``, on the module's device.
    pieces
        What tells of the target part by part, if it has no reference cells of its own.
    compares
        Whether there are reference cells on both sides; if not, ``"auto"`` asks the prior alone.

    Returns
    -------
    The way and its description.

    Raises
    ------
    ValueError
        If there is no such method.
    """
    if method not in METHODS:
        raise ValueError(
            f"method is {method!r}; methods are {list(METHODS)}. Choose one of them; "
            "'auto' is the default."
        )
    ways = _ways_of_the_prior(module, source, target, pieces)
    for name, way in COMPARING.items():
        ways[name] = way()
        if pieces is not None and pieces.cells is not None:
            each = [way() for _ in pieces.cells]
            ways[name] = Parts(each, pieces.cells, pieces.weights, pieces.overlap)
    if method != "auto":
        return ways[method], method
    names = ["abduction"] if isinstance(module.prior, LearnedPrior) else []
    names += ["neighbors", "groups"] if compares else []
    return Blend([ways[name] for name in names]), " + ".join(names)


def _ways_of_the_prior(
    module: DiscoverVAE, source: Tensor, target: Tensor, pieces: Pieces | None
) -> dict[str, Way]:
    if pieces is None or pieces.features is None:
        return {"prior": Prior(module, target), "abduction": Abduction(module, source, target)}
    each = [Abduction(module, source, features) for features in pieces.features]
    abduction = Parts(each, overlap=pieces.overlap)
    return {"prior": Then(Prior(module, source), abduction), "abduction": abduction}
