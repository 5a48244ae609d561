"""The stop of training when fresh probes find nothing of the condition in z."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import numpy as np
import torch

from ._keys import CONDITION_KEY
from .evaluation import condition_probes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from scvi.dataloaders import DataSplitter
    from torch import Tensor

    from ._module import DiscoverVAE
    from ._training_plan import DiscoverTrainingPlan


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
        pl_module.check_terms()  # callbacks come before the plan's own look
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
        parts["z"].append(module.posteriors(tensors)["z"].loc.cpu().numpy())
        parts["y"].append(tensors[CONDITION_KEY].long().cpu().numpy())
        n_cells += len(parts["y"][-1])
        if n_cells >= max_cells:
            break
    module.train(was_training)
    return np.concatenate(parts["z"]), np.concatenate(parts["y"])
