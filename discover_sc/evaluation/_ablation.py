"""Does a description of treatments tell anything? The same model with its rows shuffled."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ._counterfactual import counterfactual_scores, log_mean_profile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anndata import AnnData
    from numpy.typing import ArrayLike

    Predict = Callable[[AnnData, pd.DataFrame, list[str]], dict[str, ArrayLike]]

_PENALTIES = np.logspace(-2, 4, 13)


def embedding_ablation(
    predict: Predict,
    adata: AnnData,
    embedding: pd.DataFrame,
    *,
    condition_key: str,
    control: str,
    held_out: Sequence[str] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Scores of treatments never seen, predicted from their description and from a wrong one.

    The same model is fitted twice on the treatments that are not held out: with the embedding,
    and with its rows dealt out anew among all treatments but the control. A description that
    tells something must beat the shuffled one, and the mean of the treatments that were seen.

    Parameters
    ----------
    predict
        Fits a model and predicts: called with the training cells, an embedding and the held-out
        levels, returns each level's predicted expression, ``(n_cells, n_genes)``.
    adata
        Counts of all treatments; those held out are kept from ``predict``.
    embedding
        Levels x features, a row for each level.
    condition_key
        Column with the treatment.
    control
        Its untreated level.
    held_out
        Levels to hold out; None: a quarter of the treatments, drawn at random.
    seed
        Seed of the draw and of the shuffling.

    Returns
    -------
    One row each for ``embedding``, ``shuffled embedding``, ``ridge regression`` (of the changes of
    seen treatments on their standardised rows; its penalty has the least error when each is left
    out in turn), ``mean of seen treatments`` and ``no change``, one column per score of
    :func:`counterfactual_scores`, averaged over the held-out levels.

    Raises
    ------
    ValueError
        If the control or a held-out level has no cells or no row in the embedding, the embedding
        holds anything but finite numbers, or fewer than two treatments remain.

    Warns
    -----
    UserWarning
        If the shuffled embedding, or the mean of the seen treatments, predicts as well (log fold
        change R2) as the embedding.

    Examples
    --------
    >>> import discover_sc
    >>> adata = discover_sc.data.simulate(300, 40, n_conditions=6, seed=0)
    >>> levels = adata.obs["condition"].cat.categories
    >>> table = pd.DataFrame(np.random.default_rng(0).normal(size=(6, 3)), index=levels)
    >>> def nearest(training, embedding, held_out):
    ...     seen = embedding.drop(index=held_out)
    ...     near = {h: ((seen - embedding.loc[h]) ** 2).sum(axis=1).idxmin() for h in held_out}
    ...     condition = training.obs["condition"]
    ...     return {h: training.X[(condition == near[h]).to_numpy()] for h in held_out}
    >>> arguments = {"condition_key": "condition", "control": "ctrl"}
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")  # the table is noise, and the function says so
    ...     scores = embedding_ablation(nearest, adata, table, **arguments)
    >>> list(scores.index)[:3]
    ['embedding', 'shuffled embedding', 'ridge regression']
    """
    rng = np.random.default_rng(seed)
    condition = adata.obs[condition_key].astype(str).to_numpy()
    embedding = embedding.set_axis(embedding.index.astype(str), axis=0)
    treatments = [level for level in np.unique(condition) if level != control]
    if held_out is None:
        held_out = sorted(rng.choice(treatments, max(1, len(treatments) // 4), replace=False))
    held_out = [str(level) for level in held_out]
    _check(condition, embedding, control, treatments, held_out)
    shuffled = embedding.copy()
    shuffled.loc[treatments] = embedding.loc[_without_fixed_points(rng, treatments)].to_numpy()

    training = adata[~np.isin(condition, held_out)].copy()
    counts = {level: adata.X[condition == level] for level in [control, *treatments]}
    base = log_mean_profile(counts[control])
    seen = [level for level in treatments if level not in held_out]
    changes = np.stack([log_mean_profile(counts[level]) for level in seen]) - base
    profiles = {
        name: {level: log_mean_profile(x) for level, x in predict(training, t, held_out).items()}
        for name, t in (("embedding", embedding), ("shuffled embedding", shuffled))
    }
    told = base + _regression(embedding, seen, changes, held_out)
    profiles["ridge regression"] = dict(zip(held_out, told.clip(min=0), strict=True))
    profiles["mean of seen treatments"] = dict.fromkeys(held_out, base + changes.mean(axis=0))
    profiles["no change"] = dict.fromkeys(held_out, base)
    table = pd.DataFrame(
        {
            name: pd.DataFrame(
                [counterfactual_scores(each[h], counts[h], counts[control]) for h in held_out]
            ).mean()
            for name, each in profiles.items()
        }
    ).T
    _warn_if_mute(table["lfc_r2"])
    return table


def _regression(
    embedding: pd.DataFrame, seen: list[str], changes: np.ndarray, held_out: list[str]
) -> np.ndarray:
    """Return the changes of held-out levels by ridge regression, ``(n_held_out, n_genes)``."""
    of_seen, of_held_out = (embedding.loc[names].to_numpy(float) for names in (seen, held_out))
    regression = make_pipeline(StandardScaler(), RidgeCV(_PENALTIES))
    return regression.fit(of_seen, changes).predict(of_held_out)


def _without_fixed_points(rng: np.random.Generator, names: list[str]) -> list[str]:
    """Return the names in a random order that leaves none in its place: one random cycle."""
    order = rng.permutation(len(names))
    dealt = np.empty(len(names), dtype=int)
    dealt[order] = np.roll(order, 1)
    return [names[k] for k in dealt]


def _check(
    condition: np.ndarray,
    embedding: pd.DataFrame,
    control: str,
    treatments: list[str],
    held_out: list[str],
) -> None:
    for level in [control, *held_out]:
        if level not in condition:
            raise ValueError(
                f"There are no cells under {level!r}; control and held-out levels need cells. "
                f"Levels are {sorted(set(condition))}. Choose among them."
            )
    values = embedding.apply(pd.to_numeric, errors="coerce").to_numpy(dtype=float)
    bad = list(embedding.index[~np.isfinite(values).all(axis=1)])
    if bad:
        raise ValueError(
            f"The embedding holds missing, infinite or non-numeric values for {bad[:10]}; features "
            "are finite numbers. Fill them in, or leave these levels out."
        )
    missing = [level for level in [control, *treatments] if level not in embedding.index]
    if missing:
        raise ValueError(
            f"The embedding has no row for {missing}; every level needs one. Add them, or leave "
            "their cells out."
        )
    if len(set(treatments) - set(held_out)) < 2 or control in held_out:
        raise ValueError(
            f"held_out is {held_out} of the treatments {treatments}; at least two of them must "
            "remain, and the control. Hold out fewer."
        )


def _warn_if_mute(r2: pd.Series) -> None:
    rivals = ["shuffled embedding", "mean of seen treatments"]
    better = {rival: round(r2[rival], 3) for rival in rivals if r2["embedding"] <= r2[rival]}
    if better:
        warnings.warn(
            f"The embedding predicts treatments never seen no better than the "
            f"{' and the '.join(better)} (log fold change R2 {r2['embedding']:.3f} against "
            f"{list(better.values())}). Do not trust predictions from it; use another "
            "description, or more treatments.",
            UserWarning,
            stacklevel=3,
        )
