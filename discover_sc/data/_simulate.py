"""Counts with a known shared part, condition effects and batch effects."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

_N_PROGRAMS = 4  # continuous shared variation within types


def simulate(
    n_cells: int = 1000,
    n_genes: int = 300,
    *,
    n_types: int = 4,
    n_conditions: int = 2,
    n_batches: int = 1,
    effect_scale: float = 1.0,
    specific_effect_scale: float = 0.5,
    affected_fraction: float = 0.1,
    batch_scale: float = 0.2,
    mean_library_size: float = 2000.0,
    library_scale: float = 0.4,
    dispersion: float = 3.0,
    drop: dict[str, list[str]] | None = None,
    unresponsive: list[str] | None = None,
    seed: int = 0,
) -> ad.AnnData:
    r"""Simulated counts whose shared part and condition effects are known.

    .. math::

        x_{ig} &\sim \mathrm{NB}(\ell_i \, \rho_{ig}, \theta_g) \\
        \rho_i &= \mathrm{softmax}(\beta + \tau_{t_i} + A u_i
                  + \gamma_{y_i} + \delta_{y_i, t_i} + \eta_{b_i})

    with cell type :math:`t`, condition :math:`y`, batch :math:`b`, library size :math:`\ell`
    (log-normal), shared programs :math:`u_i \sim N(0, I)`, a condition effect common to all types
    :math:`\gamma` and one of each type :math:`\delta`. The first condition, ``ctrl``, has no
    effect.

    Parameters
    ----------
    n_cells, n_genes
        Size of the data.
    n_types, n_conditions, n_batches
        Number of cell types, of conditions (at least 2) and of batches; all independent of each
        other unless ``drop`` says otherwise.
    effect_scale, specific_effect_scale
        Standard deviation of the common and of the type-specific effects, natural logarithm.
    affected_fraction
        Share of genes that a condition moves, in (0, 1]; half as many again are moved in single
        types.
    batch_scale
        Standard deviation of the batch effects, natural logarithm.
    mean_library_size, library_scale
        Median of the library sizes, in counts, and standard deviation of their logarithm.
    dispersion
        Mean over genes of the inverse dispersion :math:`\theta` (log-normal).
    drop
        Per condition the cell types that are left out of it, for changed composition.
    unresponsive
        Cell types that no condition moves.
    seed
        Seed of everything.

    Returns
    -------
    ``.X`` counts (csr, float32); ``.obs``: ``condition`` (``ctrl``, ``treat_1``, ...),
    ``cell_type``, ``batch``, ``library_size``. The truth: ``.layers["shared_expression"]``, the
    fractions without condition and batch effect; ``.obsm["shared_programs"]``;
    ``.varm["common_effect"]``, ``(n_genes, n_conditions)``; ``.uns["type_effects"]``, per
    condition an array ``(n_types, n_genes)`` of common plus specific effect, 0 for unresponsive
    types; ``.uns["simulation"]`` the arguments.

    Raises
    ------
    ValueError
        If there are fewer than two conditions or a name in ``drop`` or ``unresponsive`` does not
        exist.

    Examples
    --------
    >>> adata = simulate(200, 50, seed=1)
    >>> adata.shape
    (200, 50)
    """
    arguments = {name: value for name, value in locals().items() if value is not None}
    conditions = ["ctrl", *(f"treat_{k}" for k in range(1, n_conditions))]
    types = [f"type_{k}" for k in range(n_types)]
    _check_arguments(n_conditions, conditions, types, drop or {}, unresponsive or [])
    rng = np.random.default_rng(seed)

    t, y = _draw_groups(rng, n_cells, conditions, types, drop or {})
    b = rng.integers(n_batches, size=n_cells)
    programs = rng.normal(size=(n_cells, _N_PROGRAMS))
    common = _sparse_effects(rng, (n_conditions, n_genes), affected_fraction, effect_scale)
    specific = _sparse_effects(
        rng, (n_conditions, n_types, n_genes), affected_fraction / 2, specific_effect_scale
    )
    common[0], specific[0] = 0.0, 0.0
    type_effects = common[:, None, :] + specific
    type_effects[:, [types.index(name) for name in unresponsive or []]] = 0.0

    shared = (
        rng.normal(0.0, 1.2, n_genes)
        + _sparse_effects(rng, (n_types, n_genes), 0.3, 1.0)[t]
        + programs @ _sparse_effects(rng, (_N_PROGRAMS, n_genes), 0.3, 0.3)
    )
    batch_effects = rng.normal(0.0, batch_scale, (n_batches, n_genes)) * (n_batches > 1)
    fractions = _softmax(shared + type_effects[y, t] + batch_effects[b])
    library = mean_library_size * rng.lognormal(0.0, library_scale, n_cells)
    theta = dispersion * rng.lognormal(0.0, 0.3, n_genes)
    counts = _negative_binomial(rng, library[:, None] * fractions, theta)

    adata = ad.AnnData(
        sp.csr_matrix(counts.astype(np.float32)),
        pd.DataFrame(
            {
                "condition": pd.Categorical.from_codes(y, conditions),
                "cell_type": pd.Categorical.from_codes(t, types),
                "batch": pd.Categorical.from_codes(b, [f"batch_{k}" for k in range(n_batches)]),
                "library_size": library,
            },
            index=[f"cell_{i}" for i in range(n_cells)],
        ),
        pd.DataFrame(index=[f"gene_{g}" for g in range(n_genes)]),
    )
    adata.layers["shared_expression"] = _softmax(shared).astype(np.float32)
    adata.obsm["shared_programs"] = programs
    adata.varm["common_effect"] = common.T
    adata.uns["type_effects"] = dict(zip(conditions, type_effects, strict=True))
    adata.uns["simulation"] = arguments
    return adata


def _check_arguments(
    n_conditions: int,
    conditions: list[str],
    types: list[str],
    drop: dict[str, list[str]],
    unresponsive: list[str],
) -> None:
    if n_conditions < 2:
        raise ValueError(
            f"n_conditions is {n_conditions}; at least 2 are needed, a control and a treatment."
        )
    for condition, dropped in drop.items():
        if condition not in conditions or not set(dropped) < set(types):
            raise ValueError(
                f"drop names {condition!r}: {dropped}; conditions are {conditions}, cell types "
                f"are {types}, and each condition keeps at least one type."
            )
    if not set(unresponsive) <= set(types):
        raise ValueError(
            f"unresponsive names {unresponsive}; cell types are {types}. Name some of them."
        )


def _draw_groups(
    rng: np.random.Generator,
    n_cells: int,
    conditions: list[str],
    types: list[str],
    drop: dict[str, list[str]],
) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes of type and condition; types dropped from a condition are not drawn."""
    y = rng.integers(len(conditions), size=n_cells)
    t = np.empty(n_cells, dtype=int)
    for code, condition in enumerate(conditions):
        kept = [k for k, name in enumerate(types) if name not in drop.get(condition, [])]
        cells = y == code
        t[cells] = rng.choice(kept, size=cells.sum())
    return t, y


def _sparse_effects(
    rng: np.random.Generator, shape: tuple[int, ...], fraction: float, scale: float
) -> np.ndarray:
    return rng.normal(0.0, scale, shape) * (rng.random(shape) < fraction)


def _softmax(log_values: np.ndarray) -> np.ndarray:
    values = np.exp(log_values - log_values.max(axis=1, keepdims=True))
    return values / values.sum(axis=1, keepdims=True)


def _negative_binomial(rng: np.random.Generator, mean: np.ndarray, theta: np.ndarray) -> np.ndarray:
    return rng.poisson(mean * rng.gamma(theta, 1.0 / theta, size=mean.shape))
