"""What a trained model answers: latents, loadings, expression, counterfactuals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch

from ._described_effects import warn_of_descriptions
from ._encoding import posteriors
from ._expression import expected_expression, sorted_cells
from ._keys import OBSM_W_KEY, OBSM_Z_KEY
from ._predicted_cells import concatenated
from ._prediction import predict_counterfactual
from ._reference import encode_reference
from ._target import targets_of
from .evaluation import log_mean_profile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from ._counterfactual import Method

_UNTRAINED = "The model has not been trained to an end. Call model.train() first."


class ReadoutMixin:
    """Public methods of a trained model."""

    @torch.inference_mode()
    def get_latent_representation(
        self,
        adata: AnnData | None = None,
        latent: Literal["z", "w"] = "z",
        give_mean: bool = True,
        return_dist: bool = False,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Shared (z) or condition-specific (w) latent of each cell.

        Parameters
        ----------
        adata
            Cells; None: those the model was set up with.
        latent
            ``"z"`` or ``"w"``.
        give_mean
            Posterior mean; otherwise one draw from the posterior.
        return_dist
            Return posterior mean and *variance* instead.
        indices
            Cells to encode, in this order; None: all.
        batch_size
            Cells in a minibatch; None: 1,024.

        Returns
        -------
        Shape ``(n_cells, n_latent)``; with ``return_dist`` a pair of them.

        Raises
        ------
        ValueError
            If ``latent`` is neither, or the cells do not fit the model.
        """
        if latent not in ("z", "w"):
            raise ValueError(f"latent is {latent!r}; it must be 'z' (shared) or 'w' (specific).")
        self._check_if_trained(warn=False, message=_UNTRAINED)
        adata = self._validate_anndata(adata)
        cells, restore = sorted_cells(adata, indices)
        first = np.empty((len(cells), self.module.n_latents[latent]), dtype=np.float32)
        second = np.empty_like(first) if return_dist else None
        for rows, found in posteriors(self, adata, cells, batch_size):
            posterior = found[latent]
            own = posterior.loc if give_mean or return_dist else posterior.sample()
            first[rows] = own.cpu().numpy()
            if return_dist:
                second[rows] = posterior.variance.cpu().numpy()
        return (first[restore], second[restore]) if return_dist else first[restore]

    def write_latents(self, adata: AnnData | None = None) -> None:
        """Write posterior means into ``.obsm["X_discover_z"]`` and ``.obsm["X_discover_w"]``.

        Parameters
        ----------
        adata
            Cells to encode and to write to; None: those the model was set up with.
        """
        target = self.adata if adata is None else adata
        self._check_if_trained(warn=False, message=_UNTRAINED)
        registered = self._validate_anndata(target)
        means = {
            latent: np.empty((target.n_obs, n), dtype=np.float32)
            for latent, n in self.module.n_latents.items()
        }
        for rows, found in posteriors(self, registered, np.arange(target.n_obs)):
            for latent, posterior in found.items():
                means[latent][rows] = posterior.loc.cpu().numpy()
        target.obsm[OBSM_Z_KEY], target.obsm[OBSM_W_KEY] = means["z"], means["w"]

    def get_loadings(self) -> pd.DataFrame:
        """Weights of z and w on the log expression of each gene, of the full reconstruction.

        Returns
        -------
        Genes x latents, columns ``z_0``, ..., ``w_0``, ...

        Raises
        ------
        ValueError
            If the decoder is not linear.
        """
        if self.init_params_["non_kwargs"]["decoder"] != "linear":
            raise ValueError(
                "decoder is 'nonlinear' and has no loadings; they exist for decoder='linear'. "
                "Train a model with DISCoVeR(adata, decoder='linear')."
            )
        weight = self.module.decoder.loadings.weight
        n_z = self.module.n_latent
        columns = [f"z_{k}" if k < n_z else f"w_{k - n_z}" for k in range(weight.shape[1])]
        return pd.DataFrame(weight.detach().cpu().numpy(), self.adata.var_names, columns)

    # ------------------------------------------------------------------ expression

    def get_normalized_expression(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        transform_batch: str | Sequence[str] | None = None,
        gene_list: Sequence[str] | None = None,
        library_size: float | Literal["latent"] = 1,
        n_samples: int = 1,
        n_samples_overall: int | None = None,
        batch_size: int | None = None,
        return_mean: bool = True,
        return_numpy: bool | None = None,
        dtype: Literal["float32", "float16"] = "float32",
    ) -> pd.DataFrame | np.ndarray:
        """Expression decoded from z and w: denoised, as fractions or at a library size.

        Parameters
        ----------
        adata
            Cells; None: those the model was set up with.
        indices
            Cells to decode; None: all.
        transform_batch
            Batch to decode under, or several that are averaged; None: each cell's own.
        gene_list
            Genes to return; None: all.
        library_size
            Total expression of each cell; ``"latent"``: the cell's own library size. Has no
            meaning, and no effect, under ``gene_likelihood="normal"``.
        n_samples
            Posterior draws.
        n_samples_overall
            Return this many draws, of cells drawn at random with replacement.
        batch_size
            Cells in a minibatch; None: 1,024.
        return_mean
            Average the draws of each cell.
        return_numpy
            Return an array; None: a DataFrame where the result is cells x genes.
        dtype
            Type of the result, the one large piece of memory. ``"float16"`` halves it and keeps
            three digits of what lies between 6e-5 and 65,504: ask for a ``library_size`` of 1e4,
            say, not for fractions.

        Returns
        -------
        ``(n_cells, n_genes)``; ``(n_samples, n_cells, n_genes)`` with ``return_mean=False`` and
        several draws; ``(n_samples_overall, n_genes)``.

        Raises
        ------
        ValueError
            If a batch, a gene or the type is unknown, a list of them is empty, a number is not
            positive, or a value is too large for the type.
        """
        self._check_if_trained(warn=False, message=_UNTRAINED)
        return expected_expression(
            self,
            False,
            adata,
            indices,
            transform_batch,
            gene_list,
            library_size,
            n_samples,
            n_samples_overall,
            batch_size,
            return_mean,
            return_numpy,
            dtype,
        )

    def get_shared_expression(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        transform_batch: str | Sequence[str] | None = None,
        gene_list: Sequence[str] | None = None,
        library_size: float | Literal["latent"] = 1,
        n_samples: int = 1,
        n_samples_overall: int | None = None,
        batch_size: int | None = None,
        return_mean: bool = True,
        return_numpy: bool | None = None,
        dtype: Literal["float32", "float16"] = "float32",
    ) -> pd.DataFrame | np.ndarray:
        """Expression decoded from z alone: what the cell is, whatever was done to it.

        Parameters
        ----------
        adata, indices, transform_batch, gene_list, library_size, n_samples
            As in :meth:`get_normalized_expression`.
        n_samples_overall, batch_size, return_mean, return_numpy, dtype
            As in :meth:`get_normalized_expression`.

        Returns
        -------
        As from :meth:`get_normalized_expression`.

        Raises
        ------
        ValueError
            If a batch, a gene or the type is unknown, a list of them is empty, a number is not
            positive, or a value is too large for the type.
        """
        self._check_if_trained(warn=False, message=_UNTRAINED)
        return expected_expression(
            self,
            True,
            adata,
            indices,
            transform_batch,
            gene_list,
            library_size,
            n_samples,
            n_samples_overall,
            batch_size,
            return_mean,
            return_numpy,
            dtype,
        )

    # -------------------------------------------------------------- counterfactuals

    def predict_counterfactual(
        self,
        adata: AnnData,
        to: str | dict[str, str] | pd.DataFrame,
        dose: float | None = None,
        method: Method = "auto",
        n_samples: int = 25,
        interval: float = 0.9,
        library_size: float = 1e4,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> AnnData:
        """Predict the same cells under another condition.

        Parameters
        ----------
        adata
            *Source* cells, for example the controls of a cell type that was never treated; cells
            that are under ``to`` already warn.
        to
            Level of the condition, or ``{condition_key: level}``; keys that are not named keep
            each cell's level. A combination of known parts (``"A+B"``) need not be registered.
            After ``condition_embedding``, also a DataFrame that describes new levels (levels x
            features): the cells are returned once under each.
        dose
            Dose of the level, after ``dose_key``; None: the only one that was measured.
        method
            How w is replaced; see the user guide. ``"shift"`` adds the mean change of w,
            ``"groups"`` that of the groups whose source cells look alike in w, ``"neighbors"``
            that of neighbours in z, ``"linear"`` the difference of two ridge regressions of w on
            z; ``"prior"`` takes the learned prior's mean, ``"abduction"`` adds the difference of
            the prior's means. ``"auto"`` averages abduction (unless ``prior="class_mean"``),
            neighbors and groups, and moves the cells so that the mean profile of each group
            weighs the model's estimate with the observed changes of like groups.
        n_samples
            Posterior draws per cell, at least 2.
        interval
            Nominal coverage of all intervals, in (0, 1).
        library_size
            Total expression of each predicted cell in ``.X``, ``lower`` and ``upper``. Has no
            effect under ``gene_likelihood="normal"``.
        batch_size
            Cells in a minibatch; None: ``scvi.settings.batch_size``.
        seed
            Seed of the draws; the global random state is left alone.

        Returns
        -------
        New AnnData, same cells and genes. ``.X``: expected expression. ``.layers["lower"]``,
        ``.layers["upper"]``: interval of what could be observed of the cell, on the scale of
        ``.X``: posterior, error between groups and sampling noise. ``.layers["counts"]``: counts
        that the cell would have had, its own noise kept, at its own library size times the
        change of library size in groups seen under both conditions.
        ``.varm["discover_mean"]``, ``..._lower``, ``..._upper``: profile of each group of source
        cells, log1p of mean counts per 10,000, and its interval (NaN where no group was observed
        under both conditions).
        ``.obsm["X_discover_w"]``: the new w. ``.obs``: as the source, with the target condition;
        the one it came from, as ``"<condition_key>_source"``; and ``support``, in [0, 1]: how
        well the training data cover the cell under this target.
        ``.uns["discover_counterfactual"]``: what was done. With ``"auto"``,
        ``model.counterfactual_choice_`` holds for each source condition the power by which like
        groups were weighted, or the number of factors of all treatments where these predict
        better (both, if some source cells are of groups that were never treated); its scores and
        those of the other choices over left-out groups; and the mean weight of observed changes
        beside the model. For a described level: the penalty of the regression of known changes
        on descriptions, and scores over left-out treatments (of the last level, if several are
        described).

        Raises
        ------
        ValueError
            If a level, key or method is unknown, an argument is out of range, or a dose does not
            fit.

        Warns
        -----
        UserWarning
            If the dose lies outside of the measured range of the level; if source cells are under
            the level already; if most of them have hardly any support; or if a description tells
            nothing of left-out treatments, or lies far from those of registered ones.
        """
        self._check_if_trained(warn=False, message=_UNTRAINED)
        if self.reference_ is None:  # training was interrupted
            self.reference_ = encode_reference(self)
        targets = targets_of(self, to, dose)
        options = (method, n_samples, interval, library_size, batch_size, seed)
        predictions, choices = [], {}
        for target in targets:
            predictions.append(predict_counterfactual(self, adata, target, *options))
            if method == "auto" and target.described:
                choices[target.asked[0]] = list(self.counterfactual_choice_.values())
        warn_of_descriptions(choices)
        return concatenated(predictions, targets)

    def predict_dose_response(
        self,
        adata: AnnData,
        treatment: str,
        doses: Sequence[float],
        method: Method = "auto",
        n_samples: int = 25,
        interval: float = 0.9,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Mean expression of the same cells under several doses of a treatment.

        Parameters
        ----------
        adata
            Source cells, for example untreated ones.
        treatment
            Level of the (first) condition key.
        doses
            Doses, not negative; between measured ones or moderately beyond.
        method, n_samples, interval, seed
            As in :meth:`predict_counterfactual`.

        Returns
        -------
        One row per dose and gene: ``dose``; ``gene``; ``mean``, the expected expression averaged
        over cells, at 10,000 counts per cell; ``lower``, ``upper``, the cells' bounds averaged in
        the same way; ``log_fold_change``, the difference of ``log1p(mean)`` and the source cells'
        observed profile (natural logarithm).

        Raises
        ------
        ValueError
            If the model was set up without doses, the treatment is unknown, or a dose is negative
            or not finite.

        Warns
        -----
        UserWarning
            If a dose lies outside of what was measured of the treatment.
        """
        key = self.condition_keys[0]
        source = log_mean_profile(self._counts_of(adata))
        parts = []
        for dose in doses:
            predicted = self.predict_counterfactual(
                adata,
                to={key: treatment},
                dose=dose,
                method=method,
                n_samples=n_samples,
                interval=interval,
                seed=seed,
            )
            mean = np.asarray(predicted.X).mean(axis=0)
            part = {"dose": float(dose), "gene": predicted.var_names, "mean": mean}
            part |= {b: predicted.layers[b].mean(axis=0) for b in ("lower", "upper")}
            parts.append(pd.DataFrame(part | {"log_fold_change": np.log1p(mean) - source}))
        return pd.concat(parts, ignore_index=True)

    def _counts_of(self, adata: AnnData) -> np.ndarray:
        """Return the expression of the model's genes."""
        genes = adata[:, self.adata.var_names]
        return genes.X if self._layer is None else genes.layers[self._layer]
