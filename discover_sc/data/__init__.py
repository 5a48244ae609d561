"""AnnData in: simulated counts with a known truth, a real data set, and checks of the input."""

from ._checks import check_counts, check_finite
from ._kang import kang
from ._simulate import simulate

__all__ = ["check_counts", "check_finite", "kang", "simulate"]
