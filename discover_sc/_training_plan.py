"""The two-optimiser game under Lightning, and the stop when fresh probes find nothing."""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from scvi import REGISTRY_KEYS
from scvi.train import TrainingPlan
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ._keys import CONDITION_KEY
from ._optimizer import AdamW
from .evaluation import condition_probes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from scvi.dataloaders import DataSplitter
    from scvi.module.base import LossOutput
    from torch import Tensor

    from ._module import DiscoverVAE


class DiscoverTrainingPlan(TrainingPlan):
    """Step the adversary on what it reads, then everything else against it.

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
    n_adversary_steps
        Steps of the adversary per step of the model, each on its own part of the minibatch.
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
        n_adversary_steps: int = 3,
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
        if n_adversary_steps < 1:
            raise ValueError(
                f"n_adversary_steps is {n_adversary_steps}; it must be at least 1. "
                "To train without an adversary, set adversarial_weight=0 in the model."
            )
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
        self.n_adversary_steps = n_adversary_steps
        self.gradient_clip_val = gradient_clip_val
        self._average = _RunningAverage(module, averaging_decay)
        self._sums: dict[str, dict[str, Tensor]] = {"train": {}, "validation": {}}
        self._n_cells = {"train": 0, "validation": 0}

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
        """Step the adversary on what it reads, detached, then the model against it."""
        model_optimizer, adversary_optimizer = self.optimizers()
        inference_outputs, generative_outputs, losses = self.module(
            batch, loss_kwargs={"kl_weight": self.kl_weight}
        )
        representation = self.module.representation(batch, inference_outputs, generative_outputs)
        if self.module.adversarial_weight > 0:
            self._step_adversary(adversary_optimizer.optimizer, representation, batch)
        adversarial_loss, metrics = self._game(representation, batch)
        loss = losses.loss + self.module.adversarial_weight * adversarial_loss
        terms = self._terms(loss, losses, metrics)
        if not torch.isfinite(loss):
            self._stop_at_finite_state(terms)
        self._step_model(model_optimizer, loss)
        self._average.update()
        self._record("train", terms, losses.n_obs_minibatch)
        return loss.detach()

    def _step_adversary(
        self, optimizer: torch.optim.Optimizer, representation: Tensor, batch: dict
    ) -> None:
        """Take each step on cells of its own: several steps at the price of one on all cells."""
        detached = representation.detach()
        told = {key: batch[key] for key in (CONDITION_KEY, REGISTRY_KEYS.LABELS_KEY)}
        n_cells = len(batch[CONDITION_KEY])
        size = -(-n_cells // self.n_adversary_steps)
        for start in range(0, n_cells, size):
            part = slice(start, start + size)
            optimizer.zero_grad()
            loss = self.module.adversary_loss(
                detached[part], {key: tensor[part] for key, tensor in told.items()}
            )
            self.manual_backward(loss)
            optimizer.step()

    def _game(self, representation: Tensor, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the model's adversarial loss; no gradient reaches the adversary itself."""
        self.module.adversary.requires_grad_(False)
        game = self.module.game(representation, batch)
        self.module.adversary.requires_grad_(True)
        return game

    def _step_model(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.gradient_clip_val is not None:
            torch.nn.utils.clip_grad_norm_(self._model_parameters(), self.gradient_clip_val)
        optimizer.step()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Record the same terms on held-out cells, the adversary's among them."""
        inference_outputs, generative_outputs, losses = self.module(
            batch, loss_kwargs={"kl_weight": self.kl_weight}
        )
        representation = self.module.representation(batch, inference_outputs, generative_outputs)
        adversarial_loss, metrics = self.module.game(representation, batch)
        loss = losses.loss + self.module.adversarial_weight * adversarial_loss
        terms = self._terms(loss, losses, metrics)
        self._record("validation", terms, losses.n_obs_minibatch)

    # --------------------------------------------------------------------- metrics

    @staticmethod
    def _terms(loss: Tensor, losses: LossOutput, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return every term of a minibatch, as means over its cells."""
        n = losses.n_obs_minibatch
        terms = {
            "loss": loss,
            "reconstruction_loss": losses.reconstruction_loss_sum / n,
            "kl_local": losses.kl_local_sum / n,
            **losses.extra_metrics,
            **metrics,
        }
        return {name: value.detach() for name, value in terms.items()}

    def _record(self, mode: str, terms: dict[str, Tensor], n_cells: int) -> None:
        """Add a minibatch to the sums of the epoch, on the device."""
        sums = self._sums[mode]
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + n_cells * value
        self._n_cells[mode] += n_cells

    def _log_epoch(self, mode: str) -> dict[str, float]:
        """Log the means over the cells of the epoch under the keys of ``model.history``."""
        means = {name: float(s) / self._n_cells[mode] for name, s in self._sums[mode].items()}
        means["elbo"] = means["reconstruction_loss"] + means["kl_local"]
        self._sums[mode], self._n_cells[mode] = {}, 0
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
        """Judge the averaged parameters."""
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
        if not all(bool(torch.isfinite(p).all()) for p in self.module.parameters()):
            self._stop_at_finite_state({})
        self._log_epoch("train")
        self.log_dict(self.module.chance())
        self._remember_state()

    def _remember_state(self) -> None:
        with self.averaged():
            state = self.module.state_dict()
            self._finite_state = {name: value.detach().clone() for name, value in state.items()}

    def _stop_at_finite_state(self, terms: dict[str, Tensor]) -> None:
        """Go back to the last finite state and say which terms of the loss were not finite."""
        self.module.load_state_dict(self._finite_state)
        broken = [
            name
            for name, value in terms.items()
            if name not in ("loss", "kl_local") and not torch.isfinite(value)
        ]
        what = f"The term {' and '.join(broken)}" if broken else "A parameter of the model"
        raise FloatingPointError(
            f"{what} is not finite in epoch {self.current_epoch}; training stopped and the model "
            "keeps its state from the end of the epoch before. Try a smaller learning rate "
            f"(plan_kwargs={{'lr': {self.lr / 10:g}}}; now {self.lr:g}), gradient clipping "
            "(plan_kwargs={'gradient_clip_val': 10.0}), or a smaller adversarial_weight."
        )

    def on_validation_epoch_end(self) -> None:
        """Log the epoch's validation terms and step the learning-rate schedule."""
        if self._n_cells["validation"]:
            means = self._log_epoch("validation")
            if self.reduce_lr_on_plateau:
                named = {f"{k}_validation": v for k, v in means.items()}
                named["validation_loss"] = means["loss"]
                self.lr_schedulers().step(named[self.lr_scheduler_metric])


class _RunningAverage:
    """Exponential average over steps of a module's parameters and floating-point buffers.

    A few steps are taken together, weighted as the one at their end: moving all parameters costs
    as much as a large layer.
    """

    _N_TOGETHER = 4

    def __init__(self, module: DiscoverVAE, decay: float) -> None:
        self._module = module
        self._decay = decay

    def start(self) -> None:
        """Begin at the present state."""
        self._n_steps, self._n_waiting = 0, 0
        state = self._module.state_dict().values()  # detached, and sharing memory with the module
        self._present = [value for value in state if value.is_floating_point()]
        self._average = [value.clone() for value in self._present]

    def update(self) -> None:
        """Count a step, and move towards the present state when enough have been taken."""
        self._n_steps += 1
        self._n_waiting += 1
        if self._n_waiting == self._N_TOGETHER:
            self._move()

    @torch.no_grad()
    def _move(self) -> None:
        """Early steps count less, or the start would linger."""
        decay = min(self._decay, self._n_steps / (self._n_steps + 10)) ** self._n_waiting
        torch._foreach_lerp_(self._average, self._present, 1 - decay)
        self._n_waiting = 0

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average, brought up to the last step, and the module's state."""
        if self._n_waiting:
            self._move()
        for average, present in zip(self._average, self._present, strict=True):
            kept = present.clone()
            present.copy_(average)
            average.copy_(kept)


class InvarianceStopping(pl.Callback):
    """End training when fresh probes on held-out cells cannot tell the condition from z.

    Every ``every_n_epochs`` epochs a logistic and a 15-nearest-neighbour probe are fitted on the
    posterior means of training cells and judged on validation cells. A check is passed if the
    balanced accuracy of both lies within two standard errors of chance, for each condition key;
    ``patience`` passed checks in a row end the training. The worst excess over chance, scaled so
    that a perfect probe has 1, stands in ``model.history["condition_excess_validation"]``.

    Parameters
    ----------
    every_n_epochs
        Epochs between checks; None: about every 200 steps.
    patience
        Passed checks in a row that end the training.
    min_steps
        Steps of the model before the first check: a young z can be blind to everything.
    max_cells
        Most training cells the probes are fitted on.

    Raises
    ------
    ValueError
        When training starts without validation cells, or with such of one condition only.

    Examples
    --------
    >>> stop = InvarianceStopping(patience=5)
    >>> stop.patience
    5
    """

    def __init__(
        self,
        every_n_epochs: int | None = None,
        patience: int = 3,
        min_steps: int = 600,
        max_cells: int = 4000,
    ) -> None:
        self.every_n_epochs = every_n_epochs
        self.patience = patience
        self.min_steps = min_steps
        self.max_cells = max_cells
        self._n_passed = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: DiscoverTrainingPlan) -> None:
        """Start afresh; refuse to judge without held-out cells."""
        self._n_passed = 0
        if len(trainer.datamodule.val_idx) == 0:
            raise ValueError(
                "Stopping on invariance needs validation cells and there are none. "
                "Choose train_size below 1, or train without early stopping."
            )
        self._check_conditions(trainer.datamodule)

    @staticmethod
    def _check_conditions(data: DataSplitter) -> None:
        codes = np.asarray(data.adata_manager.get_from_registry(CONDITION_KEY))
        for key, column in enumerate(codes.T):
            for name, cells in (("training", data.train_idx), ("validation", data.val_idx)):
                if len(np.unique(column[cells])) < 2:
                    raise ValueError(
                        f"Stopping on invariance needs {name} cells of at least two levels of each "
                        f"condition key; the {len(cells)} {name} cells hold one level of key "
                        f"{key}. Choose another train_size or split, or train without early "
                        "stopping."
                    )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: DiscoverTrainingPlan) -> None:
        """Probe, log, and stop if nothing was found often enough."""
        every = self.every_n_epochs or max(1, round(200 / trainer.num_training_batches))
        due = (trainer.current_epoch + 1) % every == 0
        if not due or trainer.global_step < self.min_steps:
            return
        with pl_module.averaged():
            excess, passed = self._check(trainer, pl_module)
        pl_module.log("condition_excess_validation", excess)
        self._n_passed = self._n_passed + 1 if passed else 0
        if self._n_passed >= self.patience:
            trainer.should_stop = True

    def _check(self, trainer: pl.Trainer, pl_module: DiscoverTrainingPlan) -> tuple[float, bool]:
        data = trainer.datamodule
        z_train, y_train = _encode(pl_module.module, data.train_dataloader(), self.max_cells)
        z_test, y_test = _encode(pl_module.module, data.val_dataloader(), self.max_cells)
        excesses, passed = [], True
        for key in range(y_train.shape[1]):
            accuracies, chance, error = condition_probes(
                z_train, y_train[:, key], z_test, y_test[:, key]
            )
            worst = max(accuracies.values())
            excesses.append((worst - chance) / (1 - chance))
            passed &= worst <= chance + 2 * error
        return max(excesses), passed


@torch.no_grad()
def _encode(
    module: DiscoverVAE, dataloader: Iterable[dict[str, Tensor]], max_cells: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return posterior means of z and condition codes of at most ``max_cells`` cells."""
    was_training = module.training
    module.eval()
    parts = defaultdict(list)
    n_cells = 0
    for tensors in dataloader:
        parts["z"].append(module.posterior(tensors, "z").loc.cpu().numpy())
        parts["y"].append(tensors[CONDITION_KEY].long().cpu().numpy())
        n_cells += len(parts["y"][-1])
        if n_cells >= max_cells:
            break
    module.train(was_training)
    return np.concatenate(parts["z"]), np.concatenate(parts["y"])
