"""Ways to predict cells under a treatment, the model's and its rivals', each in one function.

Every method has the same form: training cells, source cells, the condition asked for and a seed
in, predicted cells out. Those here read the condition and the group from two columns of ``obs``.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import scvi
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge, RidgeCV

from ._profiles import TARGET_SUM, log_mean_profile, log_normalized

if TYPE_CHECKING:
    from collections.abc import Callable

LOG_PROFILE = "log_mean_profile"  # of ``var``: a predicted profile
LOG_CELLS = "log_normalized"  # of ``layers``: predicted cells, log1p of counts per 10,000
COUNTS = "counts"  # of ``layers``: predicted cells, counts
BASELINES = ("mean shift", "nearest type's shift")

_N_COMPONENTS = 10
_CELLS_PER_GROUP = 500  # for the axes of the PCA; the scores are of all cells
_MAX_MOVED = 5000  # source cells that a shift moves one by one; its profile is of all
_PENALTIES = np.logspace(-3, 3, 13)
_N_SAMPLES = 25  # posterior draws that SCVI's expected expression averages


class CounterfactualMethod(Protocol):
    """What can be benchmarked."""

    def __call__(
        self, train: ad.AnnData, source: ad.AnnData, target: str, seed: int
    ) -> ad.AnnData: ...


@dataclass(frozen=True)
class Design:
    """Which columns hold condition and group, the control, and how many cells make a group."""

    condition_key: str
    labels_key: str
    control: str
    min_cells: int

    def cells_of(self, adata: ad.AnnData, group: str, condition: str) -> np.ndarray:
        """Return the mask of the cells of a group under a condition."""
        groups, conditions = (
            adata.obs[k].astype(str) for k in (self.labels_key, self.condition_key)
        )
        return ((groups == group) & (conditions == condition)).to_numpy()

    def groups_of(self, adata: ad.AnnData, target: str) -> list[str]:
        """Return the groups with at least ``min_cells`` under control and under the target."""
        return [
            group
            for group in sorted(adata.obs[self.labels_key].astype(str).unique())
            if min(self.cells_of(adata, group, c).sum() for c in (self.control, target))
            >= self.min_cells
        ]


def counterfactual_methods(
    condition_key: str,
    labels_key: str,
    *,
    control: str,
    min_cells: int = 50,
    max_epochs: int | None = None,
) -> dict[str, CounterfactualMethod]:
    r"""Methods to predict a treatment that a group of cells has not been seen under.

    ``DISCoVeR``
        The model of this package with its defaults, ``labels_key`` registered:
        ``predict_counterfactual(source, to=target)``.
    ``no change``
        The source cells as they are.
    ``mean of treated``
        The profile of all training cells under the target; as cells, such cells drawn with
        replacement, as many as there are source cells.
    ``linear``
        Ridge regression of a group's change on where its control cells lie: the profile plus

        .. math:: \hat\Delta = \bar\Delta + (s - \bar s)^\top
                  (S^\top S + \lambda I)^{-1} S^\top (D - 1 \bar\Delta^\top)

        One row per other group: :math:`D` are the changes of all genes (treated minus control
        profile); :math:`S`, centred and scaled to unit mean squared length, are the group means
        of the control cells on the first 10 principal components (fewer where cells or genes are
        fewer) of log1p of counts per 10,000 of all control cells in the training data, of each
        group at most 500; :math:`s` is that of the source cells. :math:`\lambda`, one of 13
        values from :math:`10^{-3}` to :math:`10^3`, has the least leave-one-group-out error; with
        fewer than three other groups it is the largest, which is nearly the mean shift.
    ``SCVI``
        scvi-tools' SCVI with the condition as batch, trained on the training cells:
        ``get_normalized_expression(source, transform_batch=target)``, averaged over 25 posterior
        draws; cells from ``posterior_predictive_sample``. Its defaults, but for the negative
        binomial likelihood: under zero inflation the normalised expression is the mean of the
        counts that are not zeroed, and cannot be compared with observed means.

    The two networks set ``scvi.settings.seed``. The mean shift and the nearest type's shift are
    not among these methods: they are the baselines that :func:`benchmark_counterfactual` always
    runs.

    Parameters
    ----------
    condition_key, labels_key
        Columns of ``adata.obs`` with the condition and with the group.
    control
        Level of ``condition_key`` of the untreated cells.
    min_cells
        Cells under control and under the target that another group must have to be learned from
        by ``linear``.
    max_epochs
        Epochs of the two networks; None: the default of each.

    Returns
    -------
    Per name a function of (training cells, source cells, target, seed) that returns the predicted
    cells as AnnData, with counts in ``.X`` of both arguments; see the user guide for what it may
    hold.

    Examples
    --------
    >>> import discover_sc
    >>> adata = discover_sc.data.simulate(400, 50, drop={"treat_1": ["type_0"]})
    >>> methods = counterfactual_methods("condition", "cell_type", control="ctrl", min_cells=20)
    >>> list(methods)
    ['DISCoVeR', 'no change', 'mean of treated', 'linear', 'SCVI']
    >>> source = adata[(adata.obs["cell_type"] == "type_0").to_numpy()].copy()
    >>> predicted = methods["linear"](adata, source, "treat_1", seed=0)
    >>> predicted.shape == source.shape
    True
    """
    design = Design(condition_key, labels_key, control, min_cells)
    return {
        "DISCoVeR": partial(_discover, design, max_epochs),
        "no change": _no_change,
        "mean of treated": partial(_mean_of_treated, design),
        "linear": partial(_shifted, design, _linear_weights),
        "SCVI": partial(_scvi, design, max_epochs),
    }


def baselines(design: Design) -> dict[str, CounterfactualMethod]:
    """Return the two baselines that every score is measured from."""
    weights = (_mean_weights, _nearest_weights)
    return {n: partial(_shifted, design, w) for n, w in zip(BASELINES, weights, strict=True)}


def _no_change(train: ad.AnnData, source: ad.AnnData, target: str, seed: int) -> ad.AnnData:
    prediction = _as_cells(source.X, source)
    prediction.layers[COUNTS] = source.X
    return prediction


def _mean_of_treated(
    design: Design, train: ad.AnnData, source: ad.AnnData, target: str, seed: int
) -> ad.AnnData:
    treated = train.X[(train.obs[design.condition_key].astype(str) == target).to_numpy()]
    drawn = treated[np.random.default_rng(seed).integers(treated.shape[0], size=source.n_obs)]
    prediction = _as_cells(drawn, source)
    prediction.layers[COUNTS] = drawn
    prediction.var[LOG_PROFILE] = log_mean_profile(treated)
    return prediction


# --------------------------------------------------------------------------------- shifts


class _OtherGroups:
    """The groups that the training cells show under control and under the target."""

    def __init__(self, design: Design, train: ad.AnnData, target: str) -> None:
        self._design, self.train, self._target = design, train, target
        self.names = design.groups_of(train, target)
        if not self.names:
            raise ValueError(
                f"No group of {design.labels_key!r} has {design.min_cells} training cells under "
                f"{design.control!r} and under {target!r}, so there is no change to learn from. "
                "Lower min_cells, or train with more cells."
            )

    def controls(self, mean: Callable) -> np.ndarray:
        """Return one mean per group of its control cells, ``(n_groups, n_genes)``."""
        return self._means(mean, self._design.control)

    def changes(self, mean: Callable) -> np.ndarray:
        """Return the change of that mean per group, ``(n_groups, n_genes)``."""
        return self._means(mean, self._target) - self.controls(mean)

    def sample_of_controls(self, seed: int) -> np.ndarray:
        """Return log1p of counts per 10,000 of control cells of all groups, dense."""
        rng = np.random.default_rng(seed)
        rows = []
        for group in sorted(self.train.obs[self._design.labels_key].astype(str).unique()):
            cells = np.flatnonzero(self._design.cells_of(self.train, group, self._design.control))
            rows.append(rng.permutation(cells)[:_CELLS_PER_GROUP])
        return _dense(log_normalized(self.train.X[np.sort(np.concatenate(rows))]))

    def _means(self, mean: Callable, condition: str) -> np.ndarray:
        cells = (self._design.cells_of(self.train, name, condition) for name in self.names)
        return np.stack([mean(self.train.X[mask]) for mask in cells])


def _shifted(
    design: Design,
    weights_of: Callable[[_OtherGroups, ad.AnnData, int], np.ndarray],
    train: ad.AnnData,
    source: ad.AnnData,
    target: str,
    seed: int,
) -> ad.AnnData:
    """Predict the source plus a weighted mean of the other groups' changes.

    The profile moves by changes of profiles, not below 0; each cell, log1p of its counts per
    10,000, by changes of the mean over cells of the same, and is not clipped, which would move
    the mean of the cells.
    """
    others = _OtherGroups(design, train, target)
    weights = weights_of(others, source, seed)
    profile = log_mean_profile(source.X) + weights @ others.changes(log_mean_profile)
    if source.n_obs > _MAX_MOVED:
        source = source[np.random.default_rng(seed).permutation(source.n_obs)[:_MAX_MOVED]]
    cells = _dense(log_normalized(source.X)) + weights @ others.changes(_mean_log)
    profile = np.clip(profile, 0, None)
    prediction = _as_cells(np.tile(np.expm1(profile).astype(np.float32), (len(cells), 1)), source)
    prediction.var[LOG_PROFILE] = profile
    prediction.layers[LOG_CELLS] = cells
    return prediction


def _mean_weights(others: _OtherGroups, source: ad.AnnData, seed: int) -> np.ndarray:
    return np.full(len(others.names), 1 / len(others.names))


def _nearest_weights(others: _OtherGroups, source: ad.AnnData, seed: int) -> np.ndarray:
    """All weight on the group whose control profile is nearest, by Euclidean distance."""
    away = others.controls(log_mean_profile) - log_mean_profile(source.X)
    weights = np.zeros(len(away))
    weights[np.linalg.norm(away, axis=1).argmin()] = 1.0
    return weights


def _linear_weights(others: _OtherGroups, source: ad.AnnData, seed: int) -> np.ndarray:
    """Weights of the groups' changes in the ridge regression's prediction of the source."""
    cells = others.sample_of_controls(seed)
    axes = PCA(min(_N_COMPONENTS, *cells.shape), random_state=seed).fit(cells)
    scores = axes.transform(others.controls(_mean_log))
    center = scores.mean(axis=0)
    scale = np.sqrt(((scores - center) ** 2).sum(axis=1).mean()) or 1.0
    scores = (scores - center) / scale
    penalty = _PENALTIES.max()
    if len(scores) >= 3:
        penalty = RidgeCV(_PENALTIES).fit(scores, others.changes(log_mean_profile)).alpha_
    # the prediction is linear in the changes: regressing the groups' indicators gives the weights
    indicators = Ridge(penalty).fit(scores, np.eye(len(scores)))
    position = (axes.transform(_mean_log(source.X)[None]) - center) / scale
    return np.ravel(indicators.predict(position))


def _mean_log(counts: np.ndarray | sp.spmatrix) -> np.ndarray:
    return np.asarray(log_normalized(counts).mean(axis=0)).ravel()


def _dense(cells: np.ndarray | sp.spmatrix) -> np.ndarray:
    return cells.toarray() if sp.issparse(cells) else cells


def _as_cells(expression: np.ndarray | sp.spmatrix, source: ad.AnnData) -> ad.AnnData:
    return ad.AnnData(expression, source.obs.copy(), pd.DataFrame(index=source.var_names))


# ------------------------------------------------------------------------------- networks


def _discover(
    design: Design,
    max_epochs: int | None,
    train: ad.AnnData,
    source: ad.AnnData,
    target: str,
    seed: int,
) -> ad.AnnData:
    # imported here: the model's training imports this package, for its probes, when it is loaded
    from discover_sc import DISCoVeR

    scvi.settings.seed = seed
    train, source = train.copy(), source.copy()
    DISCoVeR.setup_anndata(train, condition_key=design.condition_key, labels_key=design.labels_key)
    model = DISCoVeR(train)
    model.train(max_epochs=max_epochs, enable_progress_bar=False)
    with warnings.catch_warnings():
        # the group is held out: that it lacks support is the point
        warnings.filterwarnings("ignore", message="The median support")
        return model.predict_counterfactual(source, to=target)


def _scvi(
    design: Design,
    max_epochs: int | None,
    train: ad.AnnData,
    source: ad.AnnData,
    target: str,
    seed: int,
) -> ad.AnnData:
    scvi.settings.seed = seed
    train, source = train.copy(), source.copy()
    scvi.model.SCVI.setup_anndata(train, batch_key=design.condition_key)
    model = scvi.model.SCVI(train, gene_likelihood="nb")
    model.train(max_epochs=max_epochs, enable_progress_bar=False)
    expected = model.get_normalized_expression(
        source,
        transform_batch=target,
        library_size=TARGET_SUM,
        n_samples=_N_SAMPLES,
        return_numpy=True,
    )
    counts = model.posterior_predictive_sample(source, transform_batch=target)
    prediction = _as_cells(expected, source)
    prediction.layers[COUNTS] = counts.to_scipy_sparse().tocsr()
    return prediction
