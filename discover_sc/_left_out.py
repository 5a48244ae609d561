"""How far predictions were off where the truth is known, because it was left out."""

from __future__ import annotations

import numpy as np
from sklearn.neighbors import NearestNeighbors

_N_ALIKE = 300  # left-out genes whose errors tell the error of a gene like them


class LeftOut:
    """Errors of predicted changes that were measured by leaving the truth out.

    Parameters
    ----------
    control
        Profiles before the change, ``(n_left_out, n_genes)``.
    predicted, observed
        Predicted and observed changes, ``(n_left_out, n_genes)`` each.

    Attributes
    ----------
    errors
        Observed minus predicted changes, ``(n_left_out, n_genes)``.
    """

    def __init__(self, control: np.ndarray, predicted: np.ndarray, observed: np.ndarray) -> None:
        self._levels, self._left_out = control + predicted, predicted
        self.errors = observed - predicted

    def weight_beside(self) -> np.ndarray:
        """Weight of a change predicted like these beside a second estimate, in (0, 1), per gene.

        Inverse variances: that of this estimate is its squared error where it was left out, of
        each gene; that of the second one is taken to be half of this one's mean over genes, and
        the same for all genes. So genes that are badly predicted are left to the second estimate.
        """
        variance = (self.errors**2).mean(axis=0)
        second = self.variance_beside()
        return second / (second + variance) if second > 0 else np.ones_like(variance)

    def variance_beside(self) -> float:
        """Return the variance that a second estimate's error is taken to have."""
        return float((self.errors**2).mean() / 2)

    def error_variance(self, profile: np.ndarray, change: np.ndarray) -> np.ndarray:
        """Return the expected squared error of predicted genes, ``(n_genes,)``.

        What was left out tells little of a single gene, so its own mean squared error is
        averaged with that of the 300 left-out predictions nearest in level and in absolute change;
        both count alike. It holds the sampling noise of an observed
        profile, since the errors were measured against observed profiles.

        Parameters
        ----------
        profile, change
            Predicted profile after treatment and its change, ``(n_genes,)`` each.
        """
        features = np.column_stack([self._levels.ravel(), np.abs(self._left_out).ravel()])
        index = NearestNeighbors(n_neighbors=min(_N_ALIKE, len(features))).fit(features)
        alike = index.kneighbors(np.column_stack([profile, np.abs(change)]), return_distance=False)
        of_alike = (self.errors.ravel()[alike] ** 2).mean(axis=1)
        return ((self.errors**2).mean(axis=0) + of_alike) / 2
