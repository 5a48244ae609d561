"""How the model is trained, and what it keeps of the cells for counterfactuals."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from scvi.model.base import UnsupervisedTrainingMixin

from ._dispersion import fit_dispersion
from ._invariance_stopping import InvarianceStopping
from ._new_condition import add_condition
from ._reference import encode_reference
from ._training_plan import DiscoverTrainingPlan

if TYPE_CHECKING:
    from anndata import AnnData

_MIN_STEPS = 2000
_MIN_EPOCHS = 20


class TrainingMixin(UnsupervisedTrainingMixin):
    """Training under scvi-tools' own signature."""

    _training_plan_cls = DiscoverTrainingPlan

    def train(
        self,
        max_epochs: int | None = None,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        load_sparse_tensor: bool = True,
        batch_size: int = 128,
        early_stopping: bool = False,
        datasplitter_kwargs: dict | None = None,
        plan_kwargs: dict | None = None,
        **trainer_kwargs: object,
    ) -> None:
        """Train the model against its adversary.

        Parameters
        ----------
        max_epochs
            Passes over the training cells. None: as many as make 2,000 steps, and at least 20
            (the game counts steps, not epochs).
        accelerator, devices
            Where to train; see :class:`lightning.pytorch.Trainer`.
        train_size
            Share of the cells that are trained on, in (0, 1]; None: 0.9.
        validation_size
            Share of held-out cells; None: the rest.
        shuffle_set_split
            Draw the split at random.
        load_sparse_tensor
            Hand over minibatches of sparse data as their non-zero entries; otherwise as dense
            tensors, slower, with the same result up to rounding.
        batch_size
            Cells in a minibatch.
        early_stopping
            Stop when fresh probes on held-out cells cannot tell the condition from z
            (:class:`~discover_sc.InvarianceStopping`). With ``early_stopping_monitor``, a key of
            ``history``, scvi-tools' own early stopping on that metric instead.
        datasplitter_kwargs
            Further arguments of :class:`scvi.dataloaders.DataSplitter`.
        plan_kwargs
            Arguments of the training plan: ``lr``, ``adversary_lr``, ``weight_decay``, ``eps``,
            ``averaging_decay``, ``gradient_clip_val``, ``n_epochs_kl_warmup``,
            ``n_steps_kl_warmup``, ``min_kl_weight``, ``max_kl_weight``, ``reduce_lr_on_plateau``,
            ``lr_factor``, ``lr_patience``, ``lr_threshold``, ``lr_scheduler_metric``, ``lr_min``.
        **trainer_kwargs
            Arguments of :class:`scvi.train.Trainer`; ``gradient_clip_val`` goes to the plan.

        Raises
        ------
        FloatingPointError
            If a term of the loss is not finite; the model keeps its last finite state.
        RuntimeError
            If conditions were added after training (:meth:`add_condition`).

        Notes
        -----
        ``history`` holds per epoch, with suffix ``_train`` and ``_validation``:
        ``reconstruction_loss``, ``shared_reconstruction_loss``, ``kl_z``, ``kl_w``, ``kl_local``,
        ``elbo``, ``adversary_cross_entropy``, ``adversary_accuracy``, ``adversary_entropy`` (nats
        per cell, accuracy in [0, 1]); ``train_loss`` and ``validation_loss``, the adversarial term
        included; and the level of an adversary that reads nothing,
        ``adversary_chance_accuracy`` and ``adversary_chance_cross_entropy``. The adversary's
        accuracy is no measure of invariance: judge that with
        :func:`~discover_sc.evaluation.report`.
        """
        if any(self.added_levels_.values()):
            raise RuntimeError(
                f"Conditions were added after training ({self.added_levels_}), and the cells that "
                "the model was set up with hold none of them. Train a new model on all cells "
                "together."
            )
        plan_kwargs = dict(plan_kwargs or {})
        if "gradient_clip_val" in trainer_kwargs:  # Lightning refuses it under two optimisers
            plan_kwargs["gradient_clip_val"] = trainer_kwargs.pop("gradient_clip_val")
        callbacks = _as_list(trainer_kwargs.pop("callbacks", []))
        if early_stopping and "early_stopping_monitor" not in trainer_kwargs:
            early_stopping = False
            callbacks.append(InvarianceStopping())
        n_train, n_validation = _split_sizes(
            self.adata.n_obs, train_size, validation_size, datasplitter_kwargs or {}
        )
        if n_validation:
            trainer_kwargs.setdefault("check_val_every_n_epoch", 1)
        if n_train % batch_size == 1:  # batch normalisation cannot train on a single cell
            datasplitter_kwargs = {"drop_last": True, **(datasplitter_kwargs or {})}
        if max_epochs is None:
            max_epochs = max(_MIN_EPOCHS, ceil(_MIN_STEPS / ceil(n_train / batch_size)))
        self.module.train()  # Lightning would go on in evaluation mode when training is resumed
        try:
            super().train(
                max_epochs=max_epochs,
                accelerator=accelerator,
                devices=devices,
                train_size=train_size,
                validation_size=validation_size,
                shuffle_set_split=shuffle_set_split,
                load_sparse_tensor=load_sparse_tensor,
                batch_size=batch_size,
                early_stopping=early_stopping,
                datasplitter_kwargs=datasplitter_kwargs,
                plan_kwargs=plan_kwargs,
                callbacks=[_TrainingStarts(self), *callbacks],
                **trainer_kwargs,
            )
        except FloatingPointError:
            self.is_trained_ = self.is_trained_ or "train_loss" in (self.history or {})
            raise
        finally:
            self.module.eval()
        fit_dispersion(self)
        self.reference_ = encode_reference(self)

    def add_condition(
        self, adata: AnnData, condition_key: str | None = None, seed: int = 0
    ) -> None:
        """Learn a new condition from a few of its cells; everything else stays as it is.

        Only the vectors by which the encoder of w and its prior know the new level are learned,
        on the model's own loss, starting from those of the known level that fits best.
        Predictions for other levels and latents of other cells do not change by a bit.

        Parameters
        ----------
        adata
            Cells, 10 to 200 say, of one or more cell types, all under one new level.
        condition_key
            Condition key of the level; may be left out if there is only one key.
        seed
            Seed of the posterior draws; the global random state is left alone.

        Raises
        ------
        ValueError
            If the cells are not all under one new level, or do not fit the model, or the prior is
            ``"class_mean"``.
        """
        self._check_if_trained(warn=False, message="The model is not trained. Call model.train().")
        if self.reference_ is None:  # training was interrupted
            self.reference_ = encode_reference(self)
        add_condition(self, adata, condition_key, seed)


class _TrainingStarts(pl.Callback):
    """Forget what belongs to the old parameters, and note the split, once steps are taken."""

    def __init__(self, model: TrainingMixin) -> None:
        self._model = model

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the split even if training is interrupted."""
        self._model.reference_ = None
        self._model.train_indices = trainer.datamodule.train_idx
        self._model.validation_indices = trainer.datamodule.val_idx


def _as_list(callbacks: object) -> list:
    return list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]


def _split_sizes(
    n_cells: int,
    train_size: float | None,
    validation_size: float | None,
    datasplitter_kwargs: dict,
) -> tuple[int, int]:
    """Return how many cells are trained and validated on, as the data splitter counts them."""
    if (indexing := datasplitter_kwargs.get("external_indexing")) is not None:
        sizes = [0 if part is None else len(part) for part in indexing]
        return sizes[0], sizes[1] if len(sizes) > 1 else 0
    n_train = ceil((train_size or 0.9) * n_cells)
    if validation_size is None:
        return n_train, n_cells - n_train
    return n_train, int(n_cells * validation_size)
