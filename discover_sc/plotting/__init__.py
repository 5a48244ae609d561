"""Results in, matplotlib Axes out."""

from ._benchmark import plot_counterfactual_benchmark
from ._counterfactual import counterfactual_scatter
from ._effects import plot_treatment_effect
from ._latents import latent_scatter
from ._training import training_curves

__all__ = [
    "counterfactual_scatter",
    "latent_scatter",
    "plot_counterfactual_benchmark",
    "plot_treatment_effect",
    "training_curves",
]
