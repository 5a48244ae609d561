"""From effects on cells and sums over groups to the tables: arrays in, tables out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from scipy.stats import false_discovery_control, norm
from scvi.distributions import Poisson, ZeroInflatedNegativeBinomial

if TYPE_CHECKING:
    from torch import Tensor

LIBRARY = 1e4  # counts per cell at which expression is compared
_PSEUDOCOUNT = 0.1  # of those counts: a gene far below it counts as not expressed
_SHAM_TAIL = 0.05  # share of sham effects above the threshold of the responder score
_ALL = "all"


@dataclass(frozen=True)
class Sums:
    """What is kept of the cells: numbers per cell, and sums over the cells of each group.

    Parameters
    ----------
    group_names
        Names of the groups, shape ``(n_groups,)``.
    codes
        Position of each cell's group among them, shape ``(n_cells,)``.
    is_log
        Expression is on a logarithmic scale already.
    effect_w, effect
        Size of the effect on w and on expression, shape ``(n_cells,)``.
    effect_draws
        Size of the effect on expression of each posterior draw, ``(n_cells, n_samples)``.
    sham_w, sham
        Sizes of the effects of sham treatments, ``(n_cells, n_sham)``.
    before, after
        Expression summed over the cells of each group, ``(n_samples, n_groups, n_genes)``.
    information
        Information of one cell on the logarithm of the mean, before and after, summed likewise,
        ``(2, n_groups, n_genes)``.
    """

    group_names: np.ndarray
    codes: np.ndarray
    is_log: bool
    effect_w: np.ndarray
    effect: np.ndarray
    effect_draws: np.ndarray
    sham_w: np.ndarray
    sham: np.ndarray
    before: np.ndarray
    after: np.ndarray
    information: np.ndarray

    @classmethod
    def zeros(
        cls, groups: np.ndarray, n_genes: int, n_samples: int, n_sham: int, *, is_log: bool
    ) -> Sums:
        """Return empty sums for cells of these groups."""
        names, codes = np.unique(groups, return_inverse=True)
        n = len(groups)
        shapes = {
            "effect_w": (n,),
            "effect": (n,),
            "effect_draws": (n, n_samples),
            "sham_w": (n, n_sham),
            "sham": (n, n_sham),
            "before": (n_samples, len(names), n_genes),
            "after": (n_samples, len(names), n_genes),
            "information": (2, len(names), n_genes),
        }
        arrays = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
        return cls(names, codes, is_log, **arrays)

    @property
    def n_cells(self) -> np.ndarray:
        """Number of cells of each group."""
        return np.bincount(self.codes, minlength=len(self.group_names))

    def add_draw(self, draw: int, rows: np.ndarray, before: np.ndarray, after: np.ndarray) -> None:
        """Add one draw of the expression of some cells, ``(n_rows, n_genes)``."""
        membership = self._membership(rows)
        self.before[draw] += membership @ before
        self.after[draw] += membership @ after

    def add_information(self, rows: np.ndarray, pair: list[np.ndarray]) -> None:
        """Add the information that cells like these carry, before and after."""
        for side, information in enumerate(pair):
            self.information[side] += self._membership(rows) @ information

    def _membership(self, rows: np.ndarray) -> np.ndarray:
        return (self.codes[rows] == np.arange(len(self.group_names))[:, None]).astype(np.float32)


# ---------------------------------------------------------------------------- sizes


def log_fold_change(before: np.ndarray, after: np.ndarray, is_log: bool) -> np.ndarray:
    """Return log2 of the ratio, or the difference of values that are logarithms already."""
    if is_log:
        return after - before
    return np.log2(after + _PSEUDOCOUNT) - np.log2(before + _PSEUDOCOUNT)


def root_mean_square_change(before: np.ndarray, after: np.ndarray, is_log: bool) -> np.ndarray:
    """Return the root mean square over genes of the log fold change of each cell."""
    return np.sqrt((log_fold_change(before, after, is_log) ** 2).mean(axis=1))


def log_information(px: torch.distributions.Distribution) -> Tensor:
    r"""Fisher information of one count on the logarithm of its mean.

    .. math:: \mu^2 / \mathrm{Var}(x)

    which is :math:`\mu` for Poisson and :math:`\mu / (1 + \mu / \theta)` for the negative binomial
    whose inverse dispersion is known; with zero inflation it is the best that an estimate by
    moments can use. For ``Normal`` the mean itself is asked about: :math:`1 / \sigma^2`.

    Parameters
    ----------
    px
        Likelihood of cells, ``(n_cells, n_genes)``.

    Returns
    -------
    Information, shape ``(n_cells, n_genes)``.
    """
    if isinstance(px, torch.distributions.Normal):
        return px.scale**-2
    if isinstance(px, Poisson):
        return px.rate
    if isinstance(px, ZeroInflatedNegativeBinomial):
        zero = torch.sigmoid(px.zi_logits)
        return (1 - zero) * px.mu / (1 + px.mu * (zero + 1 / px.theta))
    return px.mu / (1 + px.mu / px.theta)


# --------------------------------------------------------------------------- cells


def cell_table(names: pd.Index, sums: Sums) -> pd.DataFrame:
    """Judge the effect on each cell by the sham effects on the cells of its group."""
    p_value, score = np.empty(len(names)), np.empty(len(names))
    for code in range(len(sums.group_names)):
        rows = sums.codes == code
        null = sums.sham[rows].ravel()
        p_value[rows] = empirical_p_value(sums.effect[rows], null)
        threshold = np.quantile(null, 1 - _SHAM_TAIL)
        score[rows] = (sums.effect_draws[rows] > threshold).mean(axis=1)
    columns = {
        "group": sums.group_names[sums.codes],
        "effect_w": sums.effect_w,
        "effect_expression": sums.effect,
        "sham_w": sums.sham_w.mean(axis=1),
        "sham_expression": sums.sham.mean(axis=1),
        "responder_score": score,
        "p_value": p_value,
        "fdr": false_discovery_control(p_value),
    }
    return pd.DataFrame(columns, index=names)


def empirical_p_value(values: np.ndarray, null: np.ndarray) -> np.ndarray:
    """Share of null values at or above each value, the value itself counted among them.

    Parameters
    ----------
    values
        Shape ``(n,)``.
    null
        Shape ``(n_null,)``.

    Returns
    -------
    In (0, 1], shape ``(n,)``.
    """
    n_above = len(null) - np.searchsorted(np.sort(null), values, side="left")
    return (1 + n_above) / (1 + len(null))


# --------------------------------------------------------------------------- genes


def gene_table(
    genes: pd.Index, sums: Sums, n_learned_from: np.ndarray, by_group: bool, delta: float
) -> pd.DataFrame:
    """Judge the change of the mean of each gene, over all cells or group by group.

    Parameters
    ----------
    genes
        Names, shape ``(n_genes,)``.
    sums
        Sums over the cells.
    n_learned_from
        Cells that the change of each group was learned from, before and after, ``(2, n_groups)``.
    by_group
        One test for each group and gene.
    delta
        Log2 fold change that counts.

    Returns
    -------
    One row per group and gene, see :class:`~discover_sc.TreatmentEffect`.
    """
    every = np.arange(len(sums.group_names))
    tested = {name: [k] for k, name in enumerate(sums.group_names)} if by_group else {_ALL: every}
    tables = []
    for name, members in tested.items():
        table = _test_group(sums, n_learned_from, list(members), delta)
        table.insert(0, "gene", genes)
        table.insert(0, "group", name)
        table["_size"] = -table["lfc"].abs()
        table = table.sort_values(["probability", "_size"], ascending=[False, True], kind="stable")
        table["fdr"] = bayesian_fdr(table["probability"].to_numpy())
        tables.append(table.drop(columns="_size"))
    return pd.concat(tables, ignore_index=True)


def _test_group(
    sums: Sums, n_learned_from: np.ndarray, members: list[int], delta: float
) -> pd.DataFrame:
    """Return the change of the mean over the cells of some groups, and how sure it is."""
    n_cells = sums.n_cells[members]
    sides = [total[:, members].astype(float) for total in (sums.before, sums.after)]
    before, after = (side.sum(axis=1) / n_cells.sum() for side in sides)  # (n_samples, n_genes)
    change = log_fold_change(before, after, sums.is_log)
    variance = change.var(axis=0, ddof=1)
    for side, total in enumerate(sides):
        contribution = total.mean(axis=0) / n_cells.sum()  # of each group to the mean
        information = sums.information[side, members] / n_cells[:, None]
        information = information * n_learned_from[side, members][:, None]
        variance += _sampling_variance(contribution, information, n_cells, sums.is_log)
    lfc, std = change.mean(axis=0), np.sqrt(variance)
    return pd.DataFrame(
        {
            "mean_before": before.mean(axis=0),
            "mean_after": after.mean(axis=0),
            "lfc": lfc,
            "lfc_std": std,
            "probability": probability_beyond(lfc, std, delta),
        }
    )


def _sampling_variance(
    contribution: np.ndarray, information: np.ndarray, n_cells: np.ndarray, is_log: bool
) -> np.ndarray:
    """Variance of the log2 of a mean over groups, each known from the counts of some cells."""
    if is_log:
        weight = (n_cells / n_cells.sum())[:, None]
        return (weight**2 / information).sum(axis=0)
    # delta method: d log2(m + c) = dm / (m + c) / ln 2, and dm = m dlog(m) within each group
    total = contribution.sum(axis=0) + _PSEUDOCOUNT
    return (contribution**2 / information).sum(axis=0) / (total * np.log(2)) ** 2


def probability_beyond(lfc: np.ndarray, std: np.ndarray, delta: float) -> np.ndarray:
    r"""Probability that a normal change exceeds delta in the direction of its mean.

    .. math:: \Phi\left((|m| - \delta) / s\right)

    One direction only: with both, a change of which nothing is known would be called for its wide
    tails.

    Parameters
    ----------
    lfc, std
        Mean and standard deviation, shape ``(n_genes,)``.
    delta
        Positive.

    Returns
    -------
    In [0, 1], shape ``(n_genes,)``.
    """
    return norm.cdf((np.abs(lfc) - delta) / std)


def bayesian_fdr(probability: np.ndarray) -> np.ndarray:
    """Expected share of false calls among each item and all that are more probable.

    Parameters
    ----------
    probability
        Probability that a call is true, in descending order, shape ``(n,)``.

    Returns
    -------
    In [0, 1], ascending, shape ``(n,)``.
    """
    return np.cumsum(1 - probability) / np.arange(1, len(probability) + 1)
