"""What users hand over at set-up, construction and prediction: named, checked at the border."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scvi import REGISTRY_KEYS

from ._keys import CONDITION_KEY
from ._levels import DescribedLevels, Levels, checked_table
from .data._checks import (
    check_columns,
    check_finite_columns,
    check_names,
    check_no_missing,
)

if TYPE_CHECKING:
    from anndata import AnnData


def condition_keys_of(condition_key: str | list[str]) -> list[str]:
    keys = [condition_key] if isinstance(condition_key, str) else list(condition_key or [])
    if not keys or len(set(keys)) < len(keys):
        raise ValueError(
            f"condition_key is {condition_key!r}; it must name a column of adata.obs, or several "
            "that differ. Name the column that holds the treatment."
        )
    return keys


def level_names_of(adata: AnnData, key: str) -> list[str]:
    return list(adata.obs[key].astype(str).unique())


def described_levels(adata: AnnData, key: str, embedding: str) -> dict:
    """Return the checked descriptions of the levels of a key."""
    if embedding not in adata.uns:
        raise KeyError(
            f"condition_embedding: {embedding!r} is not in adata.uns; there are "
            f"{sorted(map(str, adata.uns))}. Put a DataFrame of levels x features there."
        )
    return checked_table(adata.uns[embedding], embedding, level_names_of(adata, key))


def columns_named(setup_args: dict) -> dict[str, str | list[str] | None]:
    """Return the columns of ``adata.obs`` that set-up arguments name."""
    return {name: columns for name, columns in setup_args.items() if "_key" in name}


def check_columns_of(adata: AnnData, columns: dict[str, str | list[str] | None]) -> None:
    """Check that the columns are there, filled, and finite where they are continuous."""
    check_names(adata)
    check_columns(adata, **columns)
    check_no_missing(adata, **columns)
    continuous = ("size_factor_key", "continuous_covariate_keys", "dose_key")
    check_finite_columns(adata, **{name: columns.get(name) for name in continuous})
    _check_size_factor(adata, columns["size_factor_key"])


def check_overlap(columns: dict[str, str | list[str] | None]) -> None:
    """Refuse a condition that the decoders would be told as batch or covariate."""
    told = [columns["batch_key"], *(columns["categorical_covariate_keys"] or [])]
    overlap = [key for key in columns["condition_key"] if key in told]
    if overlap:
        raise ValueError(
            f"{overlap} are condition keys and batch or covariate keys at once; decoders that are "
            "told the condition leave nothing for w. Name each column in one role."
        )


def check_known_levels(
    adata: AnnData, registry: dict, conditions: dict[str, np.ndarray] | None = None
) -> None:
    """Refuse levels of conditions, batches and covariates that the model was not trained with."""
    fields = registry["field_registries"]
    known = dict(conditions or fields[CONDITION_KEY]["state_registry"]["mappings"])
    known |= fields[REGISTRY_KEYS.CAT_COVS_KEY]["state_registry"].get("mappings", {})
    batch_key = registry["setup_args"]["batch_key"]
    if batch_key is not None:
        known[batch_key] = fields[REGISTRY_KEYS.BATCH_KEY]["state_registry"]["categorical_mapping"]
    for key, mapping in known.items():
        check_columns(adata, registered=key)
        levels = [str(level) for level in mapping]
        unknown = sorted(set(adata.obs[key].astype(str)) - set(levels))
        if unknown:
            raise ValueError(
                f"Levels {unknown} of adata.obs[{key!r}] are not known to the model; known are "
                f"{levels}. Remove these cells, train with them, or put one of the known levels "
                "there to decode as if they were of it."
            )


def check_plain_levels(keys: list[Levels], dose_key: str | None) -> None:
    """Refuse parts, descriptions and doses under a prior that keeps one mean per level."""
    if dose_key is not None or isinstance(keys[0], DescribedLevels):
        raise ValueError(
            "prior='class_mean' keeps one mean per level and reads neither doses nor descriptions. "
            "Choose prior='learned', or set up the model without dose_key and condition_embedding."
        )
    for levels in keys:
        if levels.combines:
            raise ValueError(
                f"Levels of {levels.key!r} are combinations, which prior='class_mean' cannot take "
                "apart; it keeps one mean per level. Choose prior='learned', or switch "
                "combinations off with combination_separator=None in setup_anndata."
            )


def check_choices(
    gene_likelihood: str,
    dispersion: str,
    prior: str,
    adversary_input: str,
    invariance: str,
    decoder: str,
) -> None:
    accepted = {
        "gene_likelihood": (gene_likelihood, ("nb", "zinb", "poisson", "normal")),
        "dispersion": (dispersion, ("gene", "gene-batch")),
        "prior": (prior, ("learned", "class_mean")),
        "adversary_input": (adversary_input, ("hidden", "both", "reconstruction", "z")),
        "invariance": (invariance, ("marginal", "conditional")),
        "decoder": (decoder, ("nonlinear", "linear")),
    }
    for name, (value, choices) in accepted.items():
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; it must be one of {list(choices)}. Choose one.")


def check_ranges(sizes: dict[str, float], weights: dict[str, float], dropout: float) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1. Choose for example 10.")
    for name, value in weights.items():
        if not value >= 0:
            raise ValueError(
                f"{name} is {value}; weights are 0 or positive. Choose 0 to switch off."
            )
    if not 0 <= dropout < 1:
        raise ValueError(
            f"dropout_rate is {dropout}; it must lie in [0, 1). Choose for example 0.1."
        )


def _check_size_factor(adata: AnnData, size_factor_key: str | None) -> None:
    if size_factor_key is None:
        return
    smallest = float(np.min(adata.obs[size_factor_key].to_numpy(dtype=float)))
    if not smallest > 0:
        raise ValueError(
            f"size_factor_key: adata.obs[{size_factor_key!r}] goes down to {smallest:g}; size "
            "factors are positive. Recompute them, or remove these cells."
        )
