"""DISCoVeR: what a cell is whatever was done to it, and what the treatment did to it."""

from importlib.metadata import version

from . import data, evaluation, plotting
from ._effects import TreatmentEffect
from ._invariance_stopping import InvarianceStopping
from ._model import DISCoVeR

__all__ = ["DISCoVeR", "InvarianceStopping", "TreatmentEffect", "data", "evaluation", "plotting"]
__version__ = version("discover-sc")
