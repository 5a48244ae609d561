"""What a treatment does to cells and genes: the same cells before and after, draw by draw."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scvi import settings

from ._counterfactual import MIN_GROUP_CELLS, Neighbors
from ._effect_tables import (
    LIBRARY,
    Sums,
    cell_table,
    gene_table,
    log_information,
    root_mean_square_change,
)
from ._expression import expression_of
from ._keys import LIBRARY_KEY, QW_KEY, QZ_KEY
from ._move import move_w
from ._prediction import own_copy
from ._readout import _UNTRAINED
from ._reference import encode_reference
from ._sham import Pool, level_names, pools
from ._source_cells import SourceBatches
from ._target import registered_levels

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from ._model import DISCoVeR


@dataclass(frozen=True)
class TreatmentEffect:
    """Effect of a treatment on cells and on genes, as ``DISCoVeR.treatment_effect`` returns it.

    Parameters
    ----------
    cells
        One row per source cell, indexed by its name. ``group``: label, or cluster of z.
        ``effect_w``: Euclidean distance of the new w from the cell's own, in standard deviations
        of the prior of w. ``effect_expression``: root mean square over genes of the log2 fold
        change. ``sham_w``, ``sham_expression``: the same under a sham treatment, averaged.
        ``responder_score``: share of posterior draws whose effect on expression exceeds 95 % of
        the sham effects, in [0, 1]. ``p_value`` of the effect on expression among the sham
        effects on cells of the group; ``fdr``, its Benjamini-Hochberg adjustment.
    genes
        One row per group and gene, the most probable first. ``group``: ``"all"``, or a label or
        cluster. ``mean_before``, ``mean_after``: mean over the group's cells, per 10,000 counts.
        ``lfc``: log2 fold change of these means; ``lfc_std``, its standard deviation.
        ``probability`` that the change exceeds ``delta`` in its direction, in [0, 1]. ``fdr``:
        expected share of false calls if this gene and all above it are called.

    Examples
    --------
    >>> import pandas as pd
    >>> genes = pd.DataFrame({"gene": ["A", "B"], "fdr": [0.01, 0.4]})
    >>> effect = TreatmentEffect(cells=pd.DataFrame(), genes=genes)
    >>> list(effect.genes.query("fdr < 0.05")["gene"])
    ['A']
    """

    cells: pd.DataFrame
    genes: pd.DataFrame


class EffectsMixin:
    """Public method of a trained model that measures effects."""

    def treatment_effect(
        self,
        adata: AnnData,
        to: str | dict[str, str],
        from_: str | dict[str, str],
        by_group: bool = False,
        delta: float = 0.25,
        n_samples: int = 25,
        n_sham: int = 20,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> TreatmentEffect:
        """What a treatment does to each cell and to each gene: who responds, and with what.

        Each cell is decoded before and after w is moved as the nearest cells in z say (way
        ``"neighbors"`` of :meth:`predict_counterfactual`); the user guide has the formulas.

        Parameters
        ----------
        adata
            Cells under ``from_``. Cells under ``to`` are left out with a warning.
        to
            Level that the effect leads to, or ``{condition_key: level}``.
        from_
            Level that it starts from, in the same form. The level of ``to`` itself asks for a
            sham: the cells against themselves.
        by_group
            Test the genes in each group, the labels or else clusters of z, instead of over all
            cells.
        delta
            Log2 fold change that a gene must exceed to be called, positive.
        n_samples
            Posterior draws, each with a random half of the cells that w is learned from; at
            least 2.
        n_sham
            Sham treatments that make the null distribution, at least 2.
        batch_size
            Cells in a minibatch; None: ``scvi.settings.batch_size``.
        seed
            Seed of draws, halves and sham treatments; the global random state is left alone.

        Returns
        -------
        Table of cells and table of genes, see :class:`~discover_sc.TreatmentEffect`.

        Raises
        ------
        ValueError
            If a level or key is unknown, ``to`` and ``from_`` name different keys, a cell is
            under neither or fewer than 2 are under ``from_``, or a number is out of range.
        RuntimeError
            If the model is not trained.
        """
        self._check_if_trained(warn=False, message=_UNTRAINED)
        if self.reference_ is None:  # training was interrupted
            self.reference_ = encode_reference(self)
        _check_numbers(delta, n_samples, n_sham)
        target, origin = registered_levels(self, to), registered_levels(self, from_, "from_")
        source = self._validate_anndata(own_copy(adata) if adata.is_view else adata)
        try:
            cells = _source_cells(self, source, target, origin)
            rng = np.random.default_rng(seed)
            with torch.random.fork_rng(), torch.inference_mode():
                torch.manual_seed(seed)
                real, sham, groups = pools(self, source, cells, target, origin, batch_size)
                ways = _fit_ways(real, sham, n_samples, n_sham, rng)
                sums = _compare(self, source, cells, groups, ways, batch_size)
            if not real.is_sham:
                _warn_of_unseen(sums.group_names, real.n_cells_of(sums.group_names)[1])
            n_learned_from = real.n_learned_from(sums.group_names)
            return TreatmentEffect(
                cells=cell_table(source.obs_names[cells], sums),
                genes=gene_table(source.var_names, sums, n_learned_from, by_group, delta),
            )
        finally:
            if source is not adata:
                self._forget(source)


# ---------------------------------------------------------------------------- input


def _check_numbers(delta: float, n_samples: int, n_sham: int) -> None:
    if not delta > 0:
        raise ValueError(
            f"delta is {delta}; it is the smallest log2 fold change that matters, and positive. "
            "Choose for example 0.25."
        )
    for name, number in (("n_samples", n_samples), ("n_sham", n_sham)):
        if number < 2:
            raise ValueError(f"{name} is {number}; at least 2 are needed. Choose for example 25.")


def _source_cells(
    model: DISCoVeR, source: AnnData, target: dict[int, int], origin: dict[int, int]
) -> np.ndarray:
    """Return the cells under the condition that the effect starts from; refuse third ones."""
    if set(target) != set(origin):
        to, from_ = ([list(model.conditions)[k] for k in side] for side in (target, origin))
        raise ValueError(
            f"to names the keys {to} and from_ names {from_}; an effect leads from one level of a "
            "key to another. Name the same keys in both."
        )
    codes = model._condition_codes(source)
    is_source, is_target = (
        (codes[:, list(side)] == list(side.values())).all(axis=1) for side in (origin, target)
    )
    levels = level_names(model, origin)
    n_others = (~is_source & ~is_target).sum()
    if n_others or is_source.sum() < 2:
        raise ValueError(
            f"adata holds {is_source.sum()} cells under from_={levels} and {n_others} that are "
            "neither under it nor under the condition asked about; at least 2 of the former and "
            "none of the latter are accepted. Select the cells under from_."
        )
    n_treated = (~is_source).sum()
    if n_treated:
        warnings.warn(
            f"{n_treated} of {len(codes)} cells are under the condition asked about already and "
            f"are left out; an effect is measured on cells under {levels}. Pass those only.",
            UserWarning,
            stacklevel=settings.warnings_stacklevel,
        )
    return np.flatnonzero(is_source)


def _warn_of_unseen(names: np.ndarray, n_treated: np.ndarray) -> None:
    unseen = [str(name) for name in names[n_treated < MIN_GROUP_CELLS]]
    if unseen:
        warnings.warn(
            f"Groups {unseen} have fewer than {MIN_GROUP_CELLS} cells under the condition asked "
            "about among those that the model was trained on: their effect is that on other "
            "groups, and probability and fdr do not know how far groups differ. Read them as a "
            "prediction.",
            UserWarning,
            stacklevel=settings.warnings_stacklevel,
        )


# ----------------------------------------------------------------------------- ways


@dataclass(frozen=True)
class _Ways:
    """What moves w to measure the effect, and to say how sure the measurement is."""

    point: Neighbors
    draws: list[Neighbors]
    sham: list[Neighbors]


def _fit_ways(
    real: Pool, sham: Pool, n_samples: int, n_sham: int, rng: np.random.Generator
) -> _Ways:
    """Fit on all cells, on random halves of them, and on sham treatments."""
    return _Ways(
        point=Neighbors().fit(real.half(rng) if real.is_sham else real.whole()),
        draws=[Neighbors().fit(real.half(rng)) for _ in range(n_samples)],
        sham=[Neighbors().fit(sham.half(rng)) for _ in range(n_sham)],
    )


# -------------------------------------------------------------------------- compare


def _compare(
    model: DISCoVeR,
    source: AnnData,
    cells: np.ndarray,
    groups: np.ndarray,
    ways: _Ways,
    batch_size: int | None,
) -> Sums:
    """Decode each cell with its own and with its new w, in mini-batches."""
    is_log = model.module.gene_likelihood == "normal"
    sums = Sums.zeros(groups, source.n_vars, len(ways.draws), len(ways.sham), is_log=is_log)
    for rows, tensors, outputs in SourceBatches(model, source, cells, batch_size):
        qz, qw, library = outputs[QZ_KEY], outputs[QW_KEY], outputs[LIBRARY_KEY]

        def change(way, z, w, library=library, tensors=tensors):
            """Return the likelihoods before and after, and the distance of the two w."""
            moved = move_w(way, z, w)
            pair = [model.module.decode(z, latent, library, tensors) for latent in (w, moved)]
            return pair, torch.linalg.vector_norm(moved - w, dim=1).cpu().numpy()

        def expression(pair):
            return [expression_of(px, LIBRARY).cpu().numpy() for px in pair]

        pair, sums.effect_w[rows] = change(ways.point, qz.loc, qw.loc)
        sums.effect[rows] = root_mean_square_change(*expression(pair), is_log)
        sums.add_information(rows, [log_information(px).cpu().numpy() for px in pair])
        for k, way in enumerate(ways.sham):
            pair, sums.sham_w[rows, k] = change(way, qz.loc, qw.loc)
            sums.sham[rows, k] = root_mean_square_change(*expression(pair), is_log)
        for s, way in enumerate(ways.draws):
            pair, _ = change(way, qz.sample(), qw.sample())
            before, after = expression(pair)
            sums.effect_draws[rows, s] = root_mean_square_change(before, after, is_log)
            sums.add_draw(s, rows, before, after)
    return sums
