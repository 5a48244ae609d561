"""Results in, matplotlib Axes out."""

from ._benchmark import plot_counterfactual_benchmark
from ._counterfactual import counterfactual_scatter
from ._latents import latent_scatter
from ._training import training_curves

__all__ = [
    "counterfactual_scatter",
    "latent_scatter",
    "plot_counterfactual_benchmark",
    "training_curves",
]
