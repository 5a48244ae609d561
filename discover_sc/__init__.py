"""DISCoVeR: what a cell is whatever was done to it, and what the treatment did to it."""

from importlib.metadata import version

from . import data, evaluation, plotting
from ._effects import TreatmentEffect
from ._model import DISCoVeR
from ._training_plan import InvarianceStopping

__all__ = ["DISCoVeR", "InvarianceStopping", "TreatmentEffect", "data", "evaluation", "plotting"]
__version__ = version("discover-sc")
