"""DISCoVeR: set up AnnData, build the module, load. Training and reading out are mixed in."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from scvi.data._utils import _check_if_view  # the public way refuses views
from scvi.data.fields import (
    CategoricalJointObsField,
    CategoricalObsField,
    LayerField,
    NumericalJointObsField,
    NumericalObsField,
)
from scvi.model.base import BaseModelClass

from ._arguments import (
    check_choices,
    check_columns_of,
    check_known_levels,
    check_overlap,
    check_plain_levels,
    check_ranges,
    columns_named,
    condition_keys_of,
    described_levels,
    level_names_of,
)
from ._effects import EffectsMixin
from ._keys import CONDITION_KEY, DOSE_KEY
from ._levels import DescribedLevels, Levels
from ._minibatches import CellManager
from ._module import DiscoverVAE
from ._readout import ReadoutMixin
from ._training import TrainingMixin
from .data._checks import (
    check_conditions,
    check_counts,
    check_doses,
    check_finite,
    check_names,
    match_genes,
    total_count,
)

if TYPE_CHECKING:
    from anndata import AnnData

_SEPARATOR = "combination_separator"
_N_RESPONSES = 4  # doses of half response; more of them hardly differ in shape


class DISCoVeR(ReadoutMixin, EffectsMixin, TrainingMixin, BaseModelClass):
    """What a cell is whatever was done to it (z), and what was done to it (w).

    Variational learning of disentangled representations :cite:p:`Slavutsky2025`: two latents, two
    parallel reconstructions (from z and w, and from z alone), and an adversary that must not find
    the condition in z.

    Parameters
    ----------
    adata
        Data registered with :meth:`setup_anndata`.
    n_latent
        Dimensions of the shared latent z.
    n_latent_specific
        Dimensions of the condition-specific latent w; None: ``n_latent``.
    n_hidden, n_layers
        Width and number of the hidden layers of encoders and decoders.
    dropout_rate
        Dropout of the encoders, in [0, 1).
    gene_likelihood
        ``"nb"``, ``"zinb"``, ``"poisson"`` for counts; ``"normal"`` for log-normalised data.
    dispersion
        Inverse dispersion per ``"gene"``, or per gene and batch (``"gene-batch"``).
    prior
        Mean of w's prior: ``"learned"``, a network of z and the condition, or ``"class_mean"``,
        the mean of z over the condition's cells (needs ``n_latent_specific == n_latent``).
    adversary_input
        What the adversary reads: the expression decoded from z (``"reconstruction"``, as
        published), the posterior mean ``"z"``, ``"both"``, or ``"hidden"``: the posterior mean and
        the last hidden layer of the shared decoder for a draw of z, of which the decoded
        expression is a linear map and a softmax. A linear decoder has none: ``"both"`` is read.
        Only ``"hidden"`` and ``"both"`` keep the condition from every probe (user guide); the
        others are there to compare with.
    invariance
        ``"marginal"``: z independent of the condition. ``"conditional"``: independent given the
        label, for data whose composition differs between conditions; needs ``labels_key``.
    decoder
        ``"nonlinear"``, or ``"linear"`` for gene loadings (:meth:`get_loadings`).
    reconstruction_weight, shared_reconstruction_weight
        Weights of the reconstructions from z and w, and from z alone.
    kl_z_weight, kl_w_weight
        Weights of the KL terms.
    adversarial_weight
        Weight of the adversarial term of each key; 0 trains without adversary.

    Raises
    ------
    ValueError
        If an argument is out of range, arguments contradict each other, or a count likelihood
        meets data that are not counts.

    Notes
    -----
    Defaults are chosen by measurement (user guide, *The model*). The paper's:
    ``adversary_input="reconstruction"``, ``kl_w_weight=1e-2``; its adversarial term is an entropy,
    see there.

    Examples
    --------
    >>> import discover_sc
    >>> adata = discover_sc.data.simulate(200, 50)
    >>> discover_sc.DISCoVeR.setup_anndata(adata, condition_key="condition")
    >>> model = discover_sc.DISCoVeR(adata)
    >>> model.train(max_epochs=2, enable_progress_bar=False)
    >>> model.get_latent_representation(latent="w").shape
    (200, 10)
    """

    _module_cls = DiscoverVAE

    def __init__(
        self,
        adata: AnnData,
        n_latent: int = 10,
        n_latent_specific: int | None = None,
        n_hidden: int = 128,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        gene_likelihood: Literal["nb", "zinb", "poisson", "normal"] = "nb",
        dispersion: Literal["gene", "gene-batch"] = "gene",
        prior: Literal["learned", "class_mean"] = "learned",
        adversary_input: Literal["hidden", "both", "reconstruction", "z"] = "hidden",
        invariance: Literal["marginal", "conditional"] = "marginal",
        decoder: Literal["nonlinear", "linear"] = "nonlinear",
        reconstruction_weight: float = 0.8,
        shared_reconstruction_weight: float = 0.2,
        kl_z_weight: float = 1e-2,
        kl_w_weight: float = 3.0,
        adversarial_weight: float = 100.0,
    ) -> None:
        super().__init__(adata)
        check_choices(gene_likelihood, dispersion, prior, adversary_input, invariance, decoder)
        n_latent_specific_ = n_latent if n_latent_specific is None else n_latent_specific
        check_ranges(
            {
                "n_latent": n_latent,
                "n_latent_specific": n_latent_specific_,
                "n_hidden": n_hidden,
                "n_layers": n_layers,
            },
            {
                "reconstruction_weight": reconstruction_weight,
                "shared_reconstruction_weight": shared_reconstruction_weight,
                "kl_z_weight": kl_z_weight,
                "kl_w_weight": kl_w_weight,
                "adversarial_weight": adversarial_weight,
            },
            dropout_rate,
        )
        if prior == "class_mean" and n_latent_specific not in (None, n_latent):
            raise ValueError(
                f"n_latent_specific is {n_latent_specific} and n_latent {n_latent}; the prior "
                "'class_mean' puts means of z where w lies and needs them equal. Leave "
                "n_latent_specific out, or choose prior='learned'."
            )
        if invariance == "conditional" and self.labels_key is None:
            raise ValueError(
                "invariance='conditional' means invariance given the label, and no labels are "
                "registered. Pass labels_key to setup_anndata."
            )
        if gene_likelihood != "normal":
            check_counts(self.adata, self._layer)
        self.added_levels_ = {key: [] for key in self.condition_keys}
        self.missed_changes_ = {}
        if prior == "class_mean":
            check_plain_levels(self._condition_levels, self.dose_key)
        self.module = self._module_cls(
            n_input=self.summary_stats.n_vars,
            condition_targets=self._condition_targets(given_label=invariance == "conditional"),
            label_frequencies=self._label_frequencies() if invariance == "conditional" else None,
            designs=[torch.as_tensor(levels.design) for levels in self._condition_levels],
            dose_scales=self._dose_scales(),
            n_batch=self.summary_stats.n_batch,
            n_cats_per_cov=self._n_cats_per_covariate(),
            n_continuous_cov=self.summary_stats.get("n_extra_continuous_covs", 0),
            library_scale=self._library_scale(),
            n_latent=n_latent,
            n_latent_specific=n_latent_specific_,
            n_hidden=n_hidden,
            n_layers=n_layers,
            dropout_rate=dropout_rate,
            gene_likelihood=gene_likelihood,
            dispersion=dispersion,
            prior=prior,
            adversary_input=adversary_input,
            invariance=invariance,
            decoder=decoder,
            reconstruction_weight=reconstruction_weight,
            shared_reconstruction_weight=shared_reconstruction_weight,
            kl_z_weight=kl_z_weight,
            kl_w_weight=kl_w_weight,
            adversarial_weight=adversarial_weight,
        )
        self._model_summary_string = (
            f"DISCoVeR of {self.summary_stats.n_cells} cells x {self.summary_stats.n_vars} genes; "
            f"conditions {self.conditions}; n_latent: {n_latent}, n_latent_specific: "
            f"{n_latent_specific_}, gene_likelihood: {gene_likelihood}, prior: {prior}, "
            f"adversary_input: {adversary_input}, invariance: {invariance}, decoder: {decoder}"
        )
        self.reference_ = None
        self.counterfactual_choice_ = None
        self.doses_ = self._measured_doses()
        self.init_params_ = self._get_init_params(locals())

    # ----------------------------------------------------------------------- setup

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        condition_key: str | list[str],
        batch_key: str | None = None,
        labels_key: str | None = None,
        layer: str | None = None,
        size_factor_key: str | None = None,
        categorical_covariate_keys: list[str] | None = None,
        continuous_covariate_keys: list[str] | None = None,
        combination_separator: str | None = "+",
        condition_embedding: str | None = None,
        dose_key: str | None = None,
        source_registry: dict | None = None,
    ) -> None:
        """Register the columns and the layer that the model reads.

        A view becomes a copy of its own, its parent is left as it is.

        Parameters
        ----------
        adata
            Cells x genes; in memory or backed, dense, CSR or CSC.
        condition_key
            Column of ``adata.obs`` with the condition (treatment, disease, donor, ...), or a list
            of columns: one adversary head per key.
        batch_key
            Column with the batch; both decoders are told it.
        labels_key
            Column with the cell type; read only for ``invariance="conditional"``, for the groups
            that counterfactuals compare, and for evaluation.
        layer
            Layer with the counts; None: ``adata.X``.
        size_factor_key
            Column with positive size factors; only their ratios matter. None: total counts.
        categorical_covariate_keys, continuous_covariate_keys
            Columns with further covariates that both decoders are told.
        combination_separator
            What stands between the parts of a combined condition: ``A+B`` shares what is learned
            of ``A`` and of ``B``, in any order. None: every level stands for itself.
        condition_embedding
            Key of ``adata.uns`` with a DataFrame of levels x features that describes every level
            of the (first) condition key; new levels can then be predicted from a description.
        dose_key
            Column with the dose, or the time, of the (first) condition key: not negative, 0 for
            untreated cells. Each treatment learns its own response.
        source_registry
            Registry of a saved model; passed by :meth:`load`.

        Raises
        ------
        KeyError
            If a column or the layer does not exist.
        ValueError
            If values are NaN or infinite, a condition is missing for a cell, there are fewer than
            two conditions or one has fewer than 3 cells, a combination repeats a part or is there
            in two orders, a description or a dose cannot be used, a size factor is not positive,
            names are not unique or the selection is empty.
        TypeError
            If the description is no DataFrame.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        del setup_method_args["setup_args"]["source_registry"]
        condition_keys = condition_keys_of(condition_key)
        columns = columns_named(setup_method_args["setup_args"]) | {"condition_key": condition_keys}
        check_columns_of(adata, columns)
        check_finite(adata, layer)
        check_overlap(columns)
        if source_registry is None:
            check_conditions(adata, condition_keys)
            for key in condition_keys:
                Levels(key, level_names_of(adata, key), combination_separator)
            check_doses(adata, dose_key)
            if condition_embedding is not None:
                setup_args = setup_method_args["setup_args"]
                setup_args["condition_embedding"] = described_levels(
                    adata, condition_keys[0], condition_embedding
                )
        _check_if_view(adata, copy_if_view=True)
        fields = [
            LayerField(REGISTRY_KEYS.X_KEY, layer, is_count_data=False),
            CategoricalJointObsField(CONDITION_KEY, condition_keys),
            CategoricalObsField(REGISTRY_KEYS.BATCH_KEY, batch_key),
            CategoricalObsField(REGISTRY_KEYS.LABELS_KEY, labels_key),
            NumericalObsField(REGISTRY_KEYS.SIZE_FACTOR_KEY, size_factor_key, required=False),
            NumericalObsField(DOSE_KEY, dose_key, required=False),
            CategoricalJointObsField(REGISTRY_KEYS.CAT_COVS_KEY, categorical_covariate_keys),
            NumericalJointObsField(REGISTRY_KEYS.CONT_COVS_KEY, continuous_covariate_keys),
        ]
        manager = CellManager(fields=fields, setup_method_args=setup_method_args)
        extension = {} if source_registry is None else {"extend_categories": True}
        manager.register_fields(adata, source_registry=source_registry, **extension)
        cls.register_manager(manager)

    @property
    def _setup_args(self) -> dict:
        return self.registry["setup_args"]

    @property
    def _layer(self) -> str | None:
        return self._setup_args["layer"]

    @property
    def condition_keys(self) -> list[str]:
        """Columns of ``adata.obs`` that hold the conditions."""
        keys = self._setup_args["condition_key"]
        return [keys] if isinstance(keys, str) else list(keys)

    @property
    def labels_key(self) -> str | None:
        """Column of ``adata.obs`` that holds the cell type, if one was registered."""
        return self._setup_args["labels_key"]

    @property
    def invariance(self) -> Literal["marginal", "conditional"]:
        """What z was asked to be independent of the condition in: all cells, or each label."""
        return self.module.invariance

    @property
    def conditions(self) -> dict[str, list[str]]:
        """Levels of each condition key, in the order of their codes."""
        return {key: [str(v) for v in mapping] for key, mapping in self._levels.items()}

    @property
    def _levels(self) -> dict[str, np.ndarray]:
        """Levels of each condition key as they stand in the column, of its own type."""
        mappings = self.adata_manager.get_state_registry(CONDITION_KEY).mappings
        return {
            key: np.append(mappings[key], added) if added else mappings[key]
            for key, added in self.added_levels_.items()
        }

    @property
    def _condition_levels(self) -> list[Levels]:
        """Levels of each condition key and their design, those added after training included."""
        separator, table = self._setup_args[_SEPARATOR], self._setup_args["condition_embedding"]
        mappings = self.adata_manager.get_state_registry(CONDITION_KEY).mappings
        keys = []
        for key, added in self.added_levels_.items():
            names = [str(level) for level in mappings[key]]
            if table is not None and not keys:
                keys.append(DescribedLevels(key, names, table, added))
            else:
                keys.append(Levels(key, names, separator, added))
        return keys

    def _tell_added_levels(self) -> None:
        """Make the networks' input know the levels that were added after training."""
        n_added = [len(added) for added in self.added_levels_.values()]
        self.module.conditions.tell_added(n_added)

    @property
    def dose_key(self) -> str | None:
        """Column of ``adata.obs`` that holds the dose, if one was registered."""
        return self._setup_args["dose_key"]

    def _doses_of(self, adata: AnnData) -> np.ndarray | None:
        """Return the doses of registered cells, ``(n_cells,)``; None without ``dose_key``."""
        if self.dose_key is None:
            return None
        return np.asarray(self.get_from_registry(adata, DOSE_KEY), dtype=np.float32).ravel()

    def _measured_doses(self) -> dict[str, list[float]] | None:
        """Return the doses at which each level of the first key was measured."""
        doses = self._doses_of(self.adata)
        if doses is None:
            return None
        codes = self._condition_codes()[:, 0]
        return {
            level: np.unique(doses[codes == code]).tolist()
            for code, level in enumerate(self._condition_levels[0].names)
        }

    def _dose_scales(self) -> torch.Tensor | None:
        """Return doses of half response, evenly spread in log dose over the measured ones."""
        doses = self._doses_of(self.adata)
        if doses is None:
            return None
        positive = doses[doses > 0]
        low, high = (positive.min(), positive.max()) if len(positive) else (1.0, 1.0)
        return torch.as_tensor(np.geomspace(low, high, _N_RESPONSES), dtype=torch.float32)

    def _condition_codes(self, adata: AnnData | None = None) -> np.ndarray:
        """Return the codes of registered cells, ``int64`` of shape ``(n_cells, n_keys)``."""
        adata = self.adata if adata is None else adata
        codes = self.get_from_registry(adata, CONDITION_KEY)
        return np.asarray(codes, dtype=np.int64).reshape(adata.n_obs, -1)

    def _condition_targets(self, *, given_label: bool) -> list[torch.Tensor]:
        """Return per key the level frequencies, ``(n_labels or 1, n_levels)``."""
        codes = self._condition_codes()
        labels = np.zeros(len(codes), dtype=int)
        if given_label:
            labels = self.adata_manager.get_from_registry(REGISTRY_KEYS.LABELS_KEY).ravel()
        n_labels = self.summary_stats.n_labels if given_label else 1
        targets = []
        for key, levels in enumerate(self.conditions.values()):
            counts = np.zeros((n_labels, len(levels)))
            np.add.at(counts, (labels, codes[:, key]), 1)
            frequencies = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
            targets.append(torch.as_tensor(frequencies, dtype=torch.float32))
        return targets

    def _label_frequencies(self) -> torch.Tensor:
        labels = self.adata_manager.get_from_registry(REGISTRY_KEYS.LABELS_KEY).ravel()
        counts = np.bincount(labels, minlength=self.summary_stats.n_labels)
        return torch.as_tensor(counts / counts.sum(), dtype=torch.float32)

    def _n_cats_per_covariate(self) -> list[int]:
        if REGISTRY_KEYS.CAT_COVS_KEY not in self.adata_manager.data_registry:
            return []
        return list(
            self.adata_manager.get_state_registry(REGISTRY_KEYS.CAT_COVS_KEY).n_cats_per_key
        )

    def _library_scale(self) -> float | None:
        """Return the total count that a size factor of 1 stands for, if there are size factors."""
        if REGISTRY_KEYS.SIZE_FACTOR_KEY not in self.adata_manager.data_registry:
            return None
        factors = self.adata_manager.get_from_registry(REGISTRY_KEYS.SIZE_FACTOR_KEY)
        return total_count(self.adata, self._layer) / float(np.asarray(factors, dtype=float).sum())

    # ------------------------------------------------------------- load, input, repr

    @classmethod
    def load(
        cls,
        dir_path: str,
        adata: AnnData | None = None,
        accelerator: str = "auto",
        device: int | str = "auto",
        prefix: str | None = None,
    ) -> DISCoVeR:
        """Load a saved model, with the data it was trained on or with other cells.

        Parameters
        ----------
        dir_path
            Folder that :meth:`save` wrote.
        adata
            Cells for the model; genes in another order are put in order in a copy. None: the data
            saved with the model.
        accelerator, device
            Where to load to.
        prefix
            Prefix of the file names.

        Returns
        -------
        The model; latents, counterfactuals and further training are as before.

        Raises
        ------
        ValueError
            If genes of the model are missing or a condition is not known to it.
        """
        if adata is not None:
            registry = cls.load_registry(dir_path, prefix)
            genes = registry["field_registries"]["X"]["state_registry"]["column_names"]
            adata = match_genes(adata, genes)
            check_known_levels(adata, registry)
        try:
            model = super().load(dir_path, adata, accelerator, device, prefix)
        except RuntimeError as error:
            if "condition_target" not in str(error):
                raise
            raise ValueError(
                "adata holds labels that the model, trained with invariance='conditional', does "
                "not know. Load it with the labels it was trained on and hand the new cells over "
                "to its methods."
            ) from error
        model._tell_added_levels()
        return model

    def _validate_anndata(self, adata: AnnData | None = None, copy_if_view: bool = True) -> AnnData:
        """Check cells that are new to the model, put their genes in order, register them.

        They are registered anew each time, since their columns may have changed; their labels may
        be unknown to the model, which reads none outside of training.
        """
        if adata is None or adata is self.adata:
            return super()._validate_anndata(adata, copy_if_view=copy_if_view)
        adata = self._check_new_cells(adata)
        _check_if_view(adata, copy_if_view=copy_if_view)
        self._register_manager_for_instance(self._transferred(adata))
        return adata

    def _transferred(self, adata: AnnData) -> CellManager:
        """Register cells as those of training were, with the levels added after it."""
        own = self.adata_manager
        registry = deepcopy(own.registry)
        registry["field_registries"][CONDITION_KEY]["state_registry"]["mappings"] |= self._levels
        manager = CellManager(
            fields=own.fields,
            setup_method_args=own._get_setup_method_args(),
            validation_checks=own.validation_checks,
        )
        manager.register_fields(adata, source_registry=registry, extend_categories=True)
        return manager

    def _forget(self, adata: AnnData) -> None:
        """Drop what the model keeps of cells that it was handed, which holds them alive."""
        self._per_instance_manager_store[self.id].pop(adata.uns["_scvi_uuid"], None)

    def _check_new_cells(self, adata: AnnData) -> AnnData:
        check_names(adata)
        adata = match_genes(adata, self.adata.var_names)
        check_columns_of(adata, columns_named(self._setup_args))
        check_known_levels(adata, self.registry, self._levels)
        check = check_finite if self.module.gene_likelihood == "normal" else check_counts
        with warnings.catch_warnings():
            # genes without counts among a few new cells are no news
            warnings.filterwarnings("ignore", message=".*genes of .* have zero counts")
            check(adata, self._layer)
        return adata

    def __repr__(self) -> str:
        return f"{self._model_summary_string}; trained: {self.is_trained_}"
