"""Numbers that say how far to trust the latents and the predictions: arrays in, numbers out."""

from ._ablation import embedding_ablation
from ._conservation import kmeans_ari, kmeans_nmi
from ._counterfactual import (
    additive_shift,
    change_pearson,
    counterfactual_scores,
    counterfactual_table,
    direction_match,
    log_mean_profile,
    mean_shift,
    nearest_shift,
    split_half_ceiling,
    top_genes,
)
from ._invariance import chance_accuracy, condition_probes, probe_accuracy
from ._report import report

__all__ = [
    "additive_shift",
    "chance_accuracy",
    "change_pearson",
    "condition_probes",
    "counterfactual_scores",
    "counterfactual_table",
    "direction_match",
    "embedding_ablation",
    "kmeans_ari",
    "kmeans_nmi",
    "log_mean_profile",
    "mean_shift",
    "nearest_shift",
    "probe_accuracy",
    "report",
    "split_half_ceiling",
    "top_genes",
]
