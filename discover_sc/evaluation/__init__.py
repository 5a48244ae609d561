"""Numbers that say how far to trust the latents and the predictions: arrays in, numbers out."""

from ._ablation import embedding_ablation
from ._benchmark import benchmark_counterfactual, gap_closed
from ._cells import energy_distance, gene_variances, squared_mmd
from ._conservation import kmeans_ari, kmeans_nmi
from ._counterfactual import (
    additive_shift,
    change_pearson,
    counterfactual_scores,
    counterfactual_table,
    direction_match,
    interval_coverage,
    split_half_ceiling,
    top_genes,
    top_overlap,
)
from ._invariance import (
    chance_accuracy,
    composition_accuracy,
    condition_probes,
    probe_accuracy,
    probe_accuracy_within,
)
from ._profiles import log_mean_profile, mean_shift, nearest_shift
from ._report import report
from ._rivals import counterfactual_methods

__all__ = [
    "additive_shift",
    "benchmark_counterfactual",
    "chance_accuracy",
    "composition_accuracy",
    "change_pearson",
    "condition_probes",
    "counterfactual_methods",
    "counterfactual_scores",
    "counterfactual_table",
    "direction_match",
    "embedding_ablation",
    "energy_distance",
    "gap_closed",
    "gene_variances",
    "interval_coverage",
    "kmeans_ari",
    "kmeans_nmi",
    "log_mean_profile",
    "mean_shift",
    "nearest_shift",
    "probe_accuracy",
    "probe_accuracy_within",
    "report",
    "split_half_ceiling",
    "squared_mmd",
    "top_genes",
    "top_overlap",
]
