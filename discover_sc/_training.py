"""How the model is trained, and what it keeps of the cells for counterfactuals."""

from __future__ import annotations

from math import ceil

import numpy as np
from scvi.model.base import UnsupervisedTrainingMixin

from ._training_plan import DiscoverTrainingPlan, InvarianceStopping

_MIN_STEPS = 2000
_MIN_EPOCHS = 20
_MAX_REFERENCE_CELLS = 50_000


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
        load_sparse_tensor: bool = False,
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
            Move sparse minibatches to the device as sparse tensors.
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
            ``n_adversary_steps``, ``gradient_clip_val``, ``n_epochs_kl_warmup``,
            ``n_steps_kl_warmup``, ``min_kl_weight``, ``max_kl_weight``, ``reduce_lr_on_plateau``,
            ``lr_factor``, ``lr_patience``, ``lr_threshold``, ``lr_scheduler_metric``, ``lr_min``.
        **trainer_kwargs
            Arguments of :class:`scvi.train.Trainer`; ``gradient_clip_val`` goes to the plan.

        Raises
        ------
        FloatingPointError
            If a term of the loss is not finite; the model keeps its last finite state.

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
        plan_kwargs = dict(plan_kwargs or {})
        if "gradient_clip_val" in trainer_kwargs:  # Lightning refuses it under two optimisers
            plan_kwargs["gradient_clip_val"] = trainer_kwargs.pop("gradient_clip_val")
        if early_stopping and "early_stopping_monitor" not in trainer_kwargs:
            early_stopping = False
            callbacks = [*trainer_kwargs.pop("callbacks", []), InvarianceStopping()]
            trainer_kwargs["callbacks"] = callbacks
        if _has_validation_cells(train_size, validation_size, datasplitter_kwargs or {}):
            trainer_kwargs.setdefault("check_val_every_n_epoch", 1)
        if max_epochs is None:
            n_train = ceil((train_size or 0.9) * self.adata.n_obs)
            max_epochs = max(_MIN_EPOCHS, ceil(_MIN_STEPS / ceil(n_train / batch_size)))
        self.reference_ = None
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
                **trainer_kwargs,
            )
        except FloatingPointError:
            self.module.eval()
            self.is_trained_ = self.is_trained_ or "train_loss" in (self.history or {})
            raise
        self.reference_ = self._encode_reference()

    def _encode_reference(self) -> dict[str, np.ndarray | None]:
        """Return what counterfactuals learn from: latents, codes and labels of all cells.

        Validation cells are among them. Kept with the model, so that prediction needs no
        training data; at most 50,000 cells, drawn at random.
        """
        cells = np.arange(self.adata.n_obs)
        if len(cells) > _MAX_REFERENCE_CELLS:
            rng = np.random.default_rng(0)
            cells = np.sort(rng.choice(cells, _MAX_REFERENCE_CELLS, replace=False))
        labels = None
        if self.labels_key is not None:
            labels = self.adata.obs[self.labels_key].astype(str).to_numpy(dtype=str)[cells]
        return {
            "z": self.get_latent_representation(latent="z", indices=cells),
            "w": self.get_latent_representation(latent="w", indices=cells),
            "condition_codes": self._condition_codes()[cells],
            "labels": labels,
        }


def _has_validation_cells(
    train_size: float | None, validation_size: float | None, datasplitter_kwargs: dict
) -> bool:
    if (indexing := datasplitter_kwargs.get("external_indexing")) is not None:
        return len(indexing) > 1 and indexing[1] is not None and len(indexing[1]) > 0
    return (train_size or 0.9) < 1 if validation_size is None else validation_size > 0
