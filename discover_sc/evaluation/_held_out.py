"""The observed treated cells of one group: scores of a prediction against them, and the ceiling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import PCA

from ._cells import energy_distance, gene_variances, median_distance, squared_mmd, variance_scores
from ._counterfactual import change_scores, gene_sets, interval_coverage
from ._profiles import log_mean_profile, log_normalized
from ._rivals import COUNTS, LOG_CELLS, LOG_PROFILE

if TYPE_CHECKING:
    from anndata import AnnData

LOWER, UPPER = "discover_mean_lower", "discover_mean_upper"  # of ``varm``: interval of the mean
METRICS = (
    "lfc_r2",
    "lfc_r2_top20",
    "lfc_r2_top50",
    "lfc_pearson",
    "lfc_pearson_top20",
    "lfc_pearson_top50",
    "direction_match",
    "top50_overlap",
    "e_distance",
    "squared_mmd",
    "variance_r2",
    "variance_r2_top20",
    "interval_coverage",
)
LOWER_IS_BETTER = ("e_distance", "squared_mmd")

_MAX_CELLS = 2000  # of each population, in distances between populations
_N_COMPONENTS = 50
_N_SPLITS = 20


class HeldOutGroup:
    """Scores of predicted cells of one group under one treatment.

    Genes are ranked and tested on the observed cells; distances are taken on principal components
    of log1p of counts per 10,000, fitted on the observed control and treated cells. So all
    methods are judged in one space, which depends on none of them, and which none of them sees.
    """

    def __init__(
        self, group: str, treated: np.ndarray | sp.spmatrix, control: np.ndarray | sp.spmatrix
    ) -> None:
        self._group, self._treated = group, treated
        self._base, self._true = log_mean_profile(control), log_mean_profile(treated)
        self._ranking, self._significant = gene_sets(treated, control, n_top=control.shape[1])
        observed = [_some_dense(log_normalized(cells)) for cells in (treated, control)]
        both = np.concatenate(observed)
        self._axes = PCA(min(_N_COMPONENTS, *both.shape), random_state=0).fit(both)
        self._bandwidth = median_distance(self._axes.transform(observed[0]))

    def scores(self, prediction: AnnData) -> dict[str, float]:
        """Return all metrics of a prediction; NaN for what it does not offer."""
        profile = prediction.var.get(LOG_PROFILE)
        profile = log_mean_profile(prediction.X) if profile is None else profile.to_numpy()
        scores = dict.fromkeys(METRICS, float("nan"))
        scores |= self._change_scores(profile, self._true)
        if LOG_CELLS in prediction.layers:
            cells = prediction.layers[LOG_CELLS]
            scores |= self._population_scores(cells, log_normalized(self._treated))
        elif COUNTS in prediction.layers:
            cells = log_normalized(prediction.layers[COUNTS])
            scores |= self._population_scores(cells, log_normalized(self._treated))
        if LOWER in prediction.varm:
            ends = (self._interval_end(prediction, name) for name in (LOWER, UPPER))
            scores["interval_coverage"] = interval_coverage(*ends, self._true)
        return scores

    def ceiling(self) -> dict[str, float]:
        """Return all metrics of one half of the treated cells as a prediction of the other.

        Means over 20 random splits; coverage has no ceiling.
        """
        rng, splits = np.random.default_rng(0), []
        for _ in range(_N_SPLITS):
            order = rng.permutation(self._treated.shape[0])
            half = len(order) // 2
            first, second = self._treated[order[:half]], self._treated[order[half:]]
            changes = self._change_scores(log_mean_profile(first), log_mean_profile(second))
            cells = self._population_scores(log_normalized(first), log_normalized(second))
            splits.append(changes | cells)
        means = {name: float(np.mean([split[name] for split in splits])) for name in splits[0]}
        return dict.fromkeys(METRICS, float("nan")) | means

    def _change_scores(self, predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
        return change_scores(
            predicted - self._base, true - self._base, self._ranking, self._significant
        )

    def _population_scores(
        self, predicted: np.ndarray | sp.spmatrix, observed: np.ndarray | sp.spmatrix
    ) -> dict[str, float]:
        first, second = (self._axes.transform(_some_dense(c)) for c in (predicted, observed))
        variances = (gene_variances(cells) for cells in (predicted, observed))
        return {
            "e_distance": energy_distance(first, second),
            "squared_mmd": squared_mmd(first, second, bandwidth=self._bandwidth),
            **variance_scores(*variances, self._ranking),
        }

    def _interval_end(self, prediction: AnnData, name: str) -> np.ndarray:
        ends = prediction.varm[name]
        if self._group not in ends.columns:
            raise KeyError(
                f"varm[{name!r}] has the columns {list(ends.columns)}; the interval of the group "
                f"{self._group!r} is read from the column of that name. Name it so."
            )
        return ends[self._group].to_numpy()


def _some_dense(cells: np.ndarray | sp.spmatrix) -> np.ndarray:
    """Return the cells as a dense array, or 2,000 of them drawn at random if they are more."""
    if cells.shape[0] > _MAX_CELLS:
        drawn = np.random.default_rng(0).choice(cells.shape[0], _MAX_CELLS, replace=False)
        cells = cells[np.sort(drawn)]
    return cells.toarray() if sp.issparse(cells) else cells
