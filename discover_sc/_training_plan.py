"""The two-optimiser game under Lightning."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from scvi.train import TrainingPlan
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ._epoch_terms import EpochTerms
from ._optimizer import AdamW
from ._running_average import RunningAverage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning.pytorch.core.optimizer import LightningOptimizer
    from scvi.module.base import LossOutput
    from torch import Tensor

    from ._module import DiscoverVAE


_N_STEPS_UNWATCHED = 50  # between looks at whether all is finite: each look waits for the device


class DiscoverTrainingPlan(TrainingPlan):
    """Step the adversary on what it reads, and everything else against it, at once.

    Parameters
    ----------
    module
        The module to train; it holds the adversary.
    lr, adversary_lr
        Learning rates of the model and of the adversary (AdamW).
    weight_decay
        Weight decay of both optimisers; the dispersion is left out of it.
    eps
        Term added to AdamW's denominator.
    averaging_decay
        Decay per step, in [0, 1), of the exponential average of all parameters that validation
        judges and that training ends with; 0: the last parameters.
    gradient_clip_val
        Largest norm of the model's gradient; None: not clipped.
    n_epochs_kl_warmup, n_steps_kl_warmup
        Epochs, or steps of the model, over which the KL terms' weight grows from
        ``min_kl_weight`` to ``max_kl_weight``; None: no warm-up.
    min_kl_weight, max_kl_weight
        Range of the factor on both KL terms.
    reduce_lr_on_plateau
        Multiply the model's learning rate by ``lr_factor`` when ``lr_scheduler_metric`` has not
        improved by ``lr_threshold`` for ``lr_patience`` epochs, down to ``lr_min``.
    lr_factor, lr_patience, lr_threshold, lr_scheduler_metric, lr_min
        See ``reduce_lr_on_plateau``; the metric is a key of ``model.history``.

    Notes
    -----
    Only the model's optimiser is counted in ``global_step``, so step-based warm-ups and
    ``max_steps`` mean steps of the model. Training in 16-bit floats with a gradient scaler is not
    supported; bfloat16 is.

    The last iterate of a game circles around the solution that the average of the iterates
    approaches, so the average is what training ends with.
    """

    def __init__(
        self,
        module: DiscoverVAE,
        *,
        lr: float = 1e-3,
        adversary_lr: float = 1e-3,
        weight_decay: float = 0.1,
        eps: float = 1e-8,
        averaging_decay: float = 0.99,
        gradient_clip_val: float | None = None,
        n_epochs_kl_warmup: int | None = None,
        n_steps_kl_warmup: int | None = None,
        min_kl_weight: float = 0.0,
        max_kl_weight: float = 1.0,
        reduce_lr_on_plateau: bool = False,
        lr_factor: float = 0.6,
        lr_patience: int = 30,
        lr_threshold: float = 0.0,
        lr_scheduler_metric: Literal[
            "elbo_validation", "reconstruction_loss_validation", "validation_loss"
        ] = "reconstruction_loss_validation",
        lr_min: float = 0.0,
    ) -> None:
        if not 0 <= averaging_decay < 1:
            raise ValueError(
                f"averaging_decay is {averaging_decay}; it must be at least 0 and below 1. Choose "
                "0.99, or 0 to end with the last parameters."
            )
        super().__init__(
            module,
            optimizer="AdamW",
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            n_epochs_kl_warmup=n_epochs_kl_warmup,
            n_steps_kl_warmup=n_steps_kl_warmup,
            min_kl_weight=min_kl_weight,
            max_kl_weight=max_kl_weight,
            reduce_lr_on_plateau=reduce_lr_on_plateau,
            lr_factor=lr_factor,
            lr_patience=lr_patience,
            lr_threshold=lr_threshold,
            lr_scheduler_metric=lr_scheduler_metric,
            lr_min=lr_min,
        )
        self.automatic_optimization = False
        self.adversary_lr = adversary_lr
        self.gradient_clip_val = gradient_clip_val
        self._average = RunningAverage(module, averaging_decay)
        self._epoch = {"train": EpochTerms(), "validation": EpochTerms()}

    # ------------------------------------------------------------------ optimisers

    def _adversary_parameters(self) -> list[torch.nn.Parameter]:
        return list(self.module.adversary.parameters())

    def _model_parameters(self) -> list[torch.nn.Parameter]:
        adversary = {id(p) for p in self._adversary_parameters()}
        return [p for p in self.module.parameters() if id(p) not in adversary and p.requires_grad]

    def configure_optimizers(self) -> tuple[list, list]:
        """Return the model's and the adversary's optimiser, and the model's schedule if any."""
        fused = self.device.type in ("cpu", "cuda", "mps")  # a quarter of the step, unfused
        options = {"eps": self.eps, "weight_decay": self.weight_decay, "fused": fused}
        decayed = [p for p in self._model_parameters() if p is not self.module.log_theta]
        groups = [{"params": decayed}, {"params": [self.module.log_theta], "weight_decay": 0.0}]
        model = AdamW(groups, lr=self.lr, **options)
        adversary = AdamW(self._adversary_parameters(), lr=self.adversary_lr, **options)
        schedulers = []
        if self.reduce_lr_on_plateau:
            schedule = ReduceLROnPlateau(
                model,
                patience=self.lr_patience,
                factor=self.lr_factor,
                threshold=self.lr_threshold,
                min_lr=self.lr_min,
                threshold_mode="abs",
            )
            schedulers.append(schedule)
        return [model, adversary], schedulers

    # ----------------------------------------------------------------------- steps

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Step the model and the adversary against each other, on one forward pass."""
        optimizers = self.optimizers()
        losses, loss, cross_entropy, metrics = self._play(batch)
        if self.module.adversarial_weight > 0:
            self._step(optimizers, loss + cross_entropy)  # see Adversary.play
        else:
            self._step(optimizers[:1], loss)
        self._average.update()
        self._epoch["train"].add(self._terms(loss, losses, metrics), losses.n_obs_minibatch)
        if batch_idx % _N_STEPS_UNWATCHED == 0:
            self.check_terms()
        return loss.detach()

    def _play(self, batch: dict[str, Tensor]) -> tuple[LossOutput, Tensor, Tensor, dict]:
        """Return the model's own losses, its whole loss, the adversary's, and its metrics."""
        inference_outputs, generative_outputs, losses = self.module(
            batch,
            generative_kwargs={"likelihoods": False},
            loss_kwargs={"kl_weight": self.kl_weight},
        )
        read = self.module.representation(batch, inference_outputs, generative_outputs)
        adversarial_loss, cross_entropy, metrics = self.module.game(read, batch)
        loss = losses.loss + self.module.adversarial_weight * adversarial_loss
        return losses, loss, cross_entropy, metrics

    def _step(self, optimizers: Sequence[LightningOptimizer], loss: Tensor) -> None:
        """Take one step of each optimiser; the model's, which comes first, is counted."""
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        if self.gradient_clip_val is not None:
            torch.nn.utils.clip_grad_norm_(self._model_parameters(), self.gradient_clip_val)
        model, *adversary = optimizers
        model.step()
        for optimizer in adversary:
            optimizer.optimizer.step()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Record the same terms on held-out cells, the adversary's among them."""
        losses, loss, _, metrics = self._play(batch)
        self._epoch["validation"].add(self._terms(loss, losses, metrics), losses.n_obs_minibatch)

    # --------------------------------------------------------------------- metrics

    @staticmethod
    def _terms(loss: Tensor, losses: LossOutput, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return every term of a minibatch, as means over its cells."""
        n = losses.n_obs_minibatch
        return {
            "loss": loss,
            "reconstruction_loss": losses.reconstruction_loss_sum / n,
            "kl_local": losses.kl_local_sum / n,
            **losses.extra_metrics,
            **metrics,
        }

    def _log_epoch(self, mode: str) -> dict[str, float]:
        """Log the means over the cells of the epoch under the keys of ``model.history``."""
        means = self._epoch[mode].pop_means()
        means["elbo"] = means["reconstruction_loss"] + means["kl_local"]
        self.log_dict({f"{name}_{mode}": mean for name, mean in means.items() if name != "loss"})
        self.log(f"{mode}_loss", means["loss"], prog_bar=mode == "train")
        return means

    def on_fit_start(self) -> None:
        """Start the average: the module lies on its device now."""
        self._average.start()

    def on_train_start(self) -> None:
        """Remember the state that training can fall back to."""
        self._remember_state()

    def on_train_end(self) -> None:
        """End with the averaged parameters."""
        self._average.swap()

    def on_validation_start(self) -> None:
        """Judge the averaged parameters, if they are finite."""
        self.check_terms()
        self._average.swap()

    def on_validation_end(self) -> None:
        """Go on training with the last parameters."""
        self._average.swap()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged parameters in place for the time of a ``with`` block."""
        self._average.swap()
        try:
            yield
        finally:
            self._average.swap()

    def on_train_epoch_end(self) -> None:
        """Log the epoch and remember its last state, if the last step left it finite."""
        self.check_terms()
        if not all(bool(torch.isfinite(p).all()) for p in self.module.parameters()):
            self._stop_at_finite_state([])
        self._log_epoch("train")
        self.log_dict(self.module.chance())
        self._remember_state()

    def _remember_state(self) -> None:
        with self.averaged():
            state = self.module.state_dict()
            self._finite_state = {name: value.detach().clone() for name, value in state.items()}

    def check_terms(self) -> None:
        """Stop at the last finite state if a term of the loss was not finite in this epoch."""
        if broken := self._epoch["train"].find_broken():
            self._stop_at_finite_state(broken)

    def _stop_at_finite_state(self, terms: list[str]) -> None:
        """Go back to the last finite state and say which terms of the loss were not finite."""
        self.module.load_state_dict(self._finite_state)
        named = [name for name in terms if name not in ("loss", "kl_local")]
        what = "The loss" if terms else "A parameter of the model"
        if named:
            what = f"The term {' and '.join(named)}"
        raise FloatingPointError(
            f"{what} is not finite in epoch {self.current_epoch}; training stopped and the model "
            "keeps its state from the end of the epoch before. Try a smaller learning rate "
            f"(plan_kwargs={{'lr': {self.lr / 10:g}}}; now {self.lr:g}), gradient clipping "
            "(plan_kwargs={'gradient_clip_val': 10.0}), or a smaller adversarial_weight."
        )

    def on_validation_epoch_end(self) -> None:
        """Log the epoch's validation terms and step the learning-rate schedule."""
        if self._epoch["validation"].n_cells:
            means = self._log_epoch("validation")
            if self.reduce_lr_on_plateau:
                named = {f"{k}_validation": v for k, v in means.items()}
                named["validation_loss"] = means["loss"]
                self.lr_schedulers().step(named[self.lr_scheduler_metric])
