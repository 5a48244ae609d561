"""Results in, matplotlib Axes out."""

from ._counterfactual import counterfactual_scatter
from ._effects import plot_treatment_effect
from ._latents import latent_scatter
from ._training import training_curves

__all__ = ["counterfactual_scatter", "latent_scatter", "plot_treatment_effect", "training_curves"]
