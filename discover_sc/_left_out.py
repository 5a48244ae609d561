"""How far predictions were off where the truth is known, because it was left out."""

from __future__ import annotations

import numpy as np
from sklearn.neighbors import NearestNeighbors

_N_ALIKE = 300  # left-out genes whose errors tell the error of a gene like them
_MOST_COMPARED = 200_000  # left-out genes among which they are searched, drawn at random
_LEAST_SHARE = 0.1  # of the mean squared error that is not the noise of what was left out


class LeftOut:
    """Errors of predicted changes that were measured by leaving the truth out.

    Parameters
    ----------
    control
        Profiles before the change, ``(n_left_out, n_genes)``.
    predicted, observed
        Predicted and observed changes, ``(n_left_out, n_genes)`` each.
    noise
        Mean over genes of the sampling variance of the observed changes; None: not known.

    Attributes
    ----------
    errors
        Observed minus predicted changes, ``(n_left_out, n_genes)``.
    """

    _shared = 0.0  # share of the squared error that a second estimate makes, too

    def __init__(
        self,
        control: np.ndarray,
        predicted: np.ndarray,
        observed: np.ndarray,
        noise: float | None = None,
    ) -> None:
        self._levels, self._left_out = control + predicted, predicted
        self.errors = observed - predicted
        self._noise = noise

    def weight_beside(self, apart: np.ndarray) -> np.ndarray:
        r"""Weight of a change predicted like these beside a second estimate, in (0, 1), per gene.

        Inverse variances: that of this estimate is its squared error where it was left out, of
        each gene; that of the second one is the same for all genes. So genes that are badly
        predicted are left to the second estimate. Its variance is :meth:`variance_beside`, unless
        the two lie further apart than that allows. What both get wrong alike does not tell them
        apart, so only errors that are independent count:

        .. math:: \overline{(a - b)^2} = (1 - s)\, \sigma_a^2 + \sigma_b^2,

        where :math:`\sigma_a^2` is the squared error without the noise of what was left out, s the
        share of it that the second estimate makes, too (0 but for described treatments), and
        :math:`\sigma_b^2` the rest of the second one's. Where that noise is not known, how far
        they lie apart is not used.

        Parameters
        ----------
        apart
            This change minus that of the second estimate, ``(n_genes,)``.
        """
        variance = (self.errors**2).mean(axis=0)
        mean, second = float(variance.mean()), self.variance_beside()
        if mean == 0:
            return np.ones_like(variance)
        if self._noise is not None:
            own_share = (1.0 - self._shared) * max(1.0 - self._noise / mean, _LEAST_SHARE)
            # as if both variances held noise and shared errors: the weight depends on neither then
            second = max(second, float((apart**2).mean()) / own_share - mean)
        return second / (second + variance)

    def variance_beside(self) -> float:
        """Return the least variance that a second estimate's error is taken to have: as here."""
        return float((self.errors**2).mean())

    def error_variance(self, profile: np.ndarray, change: np.ndarray) -> np.ndarray:
        """Return the expected squared error of predicted genes, ``(n_genes,)``.

        What was left out tells little of a single gene, so its own mean squared error is
        averaged with that of the 300 left-out predictions nearest in level and in absolute change
        (among at most 200,000 of them, drawn at random); both count alike. It holds the sampling
        noise of an observed profile, since the errors were measured against observed profiles.

        Parameters
        ----------
        profile, change
            Predicted profile after treatment and its change, ``(n_genes,)`` each.
        """
        compared = slice(None)
        if self.errors.size > _MOST_COMPARED:
            rng = np.random.default_rng(0)
            compared = rng.choice(self.errors.size, _MOST_COMPARED, replace=False)
        levels, left_out, errors = (
            values.ravel()[compared] for values in (self._levels, self._left_out, self.errors)
        )
        features = np.column_stack([levels, np.abs(left_out)])
        index = NearestNeighbors(n_neighbors=min(_N_ALIKE, len(features))).fit(features)
        alike = index.kneighbors(np.column_stack([profile, np.abs(change)]), return_distance=False)
        of_alike = (errors[alike] ** 2).mean(axis=1)
        return ((self.errors**2).mean(axis=0) + of_alike) / 2
