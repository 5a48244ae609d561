"""The classifier of the conditions that the model plays against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from ._losses import adversarial_loss, adversarial_slope, cross_entropy_slope
from ._networks import Covariates

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_N_HIDDEN = 128
_NEGATIVE_SLOPE = 0.2


class Adversary(nn.Module):
    """Classifier of the conditions, with one hidden layer that all condition keys share.

    Parameters
    ----------
    n_input
        Width of what it reads of a cell.
    n_cats_per_condition
        Number of levels of each condition key.
    n_labels
        Number of labels the adversary is told; 0 where it is told none.
    """

    def __init__(self, n_input: int, n_cats_per_condition: Sequence[int], n_labels: int) -> None:
        super().__init__()
        self.told_labels = n_labels > 0
        self.n_levels = list(n_cats_per_condition)
        self.first = nn.Linear(n_input, _N_HIDDEN)
        self.labels = Covariates([n_labels] if n_labels else [], 0, _N_HIDDEN)
        self.heads = nn.Linear(_N_HIDDEN, sum(self.n_levels))

    def play(
        self,
        representation: Tensor,
        labels: Tensor,
        condition_index: Tensor,
        targets: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return what either player minimises, and the log predictions of each condition key.

        Parameters
        ----------
        representation
            Shape ``(n_cells, n_input)``.
        labels
            Label codes, ``int64`` of shape ``(n_cells, 1)``; read only if the adversary is told.
        condition_index
            Codes of the true conditions, ``int64`` of shape ``(n_cells, n_keys)``.
        targets
            Per condition key what is known without the representation,
            ``(1 or n_cells, n_levels)``.

        Returns
        -------
        The model's loss (:func:`~discover_sc._losses.adversarial_loss`) and the classifier's, its
        cross-entropy: means over cells, summed over the keys, 0-d, in nats. Then the logarithms
        of the predictions, ``(n_cells, n_levels)`` each.

        Notes
        -----
        The gradient of the first reaches the representation and not the classifier, that of the
        second the classifier and not the representation. So one backward pass through their sum
        serves both players.
        """
        with torch.autocast(condition_index.device.type, enabled=False):
            shift = self.labels(labels, None) if self.told_labels else None
            first, heads = self.first, self.heads
            parameters = (first.weight, first.bias, heads.weight, heads.bias)
            x = representation.to(self.first.weight.dtype)
            model_loss, cross_entropy, log_prediction = _Game.apply(
                x, condition_index, self.n_levels, targets, shift, *parameters
            )
        return model_loss, cross_entropy, list(log_prediction.split(self.n_levels, dim=1))


class _Game(Function):
    """Both losses of the game: many small steps that autograd would track one by one, twice."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        condition_index: Tensor,
        n_levels: list[int],
        targets: Sequence[Tensor],
        shift: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        head: Tensor,
        head_bias: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden = F.linear(x, weight, bias)
        if shift is not None:
            hidden += shift
        F.leaky_relu_(hidden, _NEGATIVE_SLOPE)
        model_loss, cross_entropy, log_predictions, slopes = 0.0, 0.0, [], []
        logits = F.linear(hidden, head, head_bias).split(n_levels, dim=1)
        for key, (own, target) in enumerate(zip(logits, targets, strict=True)):
            truth, log_prediction = condition_index[:, key], F.log_softmax(own, dim=-1)
            model_loss = model_loss + adversarial_loss(log_prediction, target, truth).mean()
            cross_entropy = cross_entropy + F.nll_loss(log_prediction, truth)
            log_predictions.append(log_prediction)
            to_own = cross_entropy_slope(log_prediction, truth)
            slopes.append(torch.stack([adversarial_slope(log_prediction, target, to_own), to_own]))
        log_prediction = torch.cat(log_predictions, dim=1)
        ctx.mark_non_differentiable(log_prediction)
        ctx.save_for_backward(x, hidden, torch.cat(slopes, dim=2), weight, head)
        return model_loss, cross_entropy, log_prediction

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, model_grad: Tensor, cross_entropy_grad: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, hidden, slopes, weight, head = ctx.saved_tensors
        grads = torch.stack([model_grad, cross_entropy_grad]) / len(x)
        with torch.autocast(x.device.type, enabled=False):
            slopes = slopes * grads.view(2, 1, 1)
            to_hidden = (slopes @ head) * torch.where(hidden > 0, 1.0, _NEGATIVE_SLOPE)
            of_model, of_classifier = to_hidden
            x_grad = of_model @ weight if ctx.needs_input_grad[0] else None
            first_grads = of_classifier.t() @ x, of_classifier.sum(0)
            head_grads = slopes[1].t() @ hidden, slopes[1].sum(0)
        shift_grad = of_classifier if ctx.needs_input_grad[4] else None
        return x_grad, None, None, None, shift_grad, *first_grads, *head_grads
