"""The classifier of the conditions that the model plays against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

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

    def forward(self, representation: Tensor, labels: Tensor) -> list[Tensor]:
        """Return the logits of each condition key, ``(n_cells, n_levels)`` each.

        Parameters
        ----------
        representation
            Shape ``(n_cells, n_input)``.
        labels
            Label codes, ``int64`` of shape ``(n_cells, 1)``; read only if the adversary is told.
        """
        hidden = self.first(representation)
        if self.told_labels:
            hidden = hidden + self.labels(labels, None)
        logits = self.heads(F.leaky_relu(hidden, _NEGATIVE_SLOPE))
        return list(logits.split(self.n_levels, dim=1))

    def loss(self, representation: Tensor, labels: Tensor, condition_index: Tensor) -> Tensor:
        """Return the cross-entropy, a mean over cells, summed over the keys, 0-d, in nats.

        Parameters
        ----------
        representation, labels
            As for :meth:`forward`.
        condition_index
            Codes of the true conditions, ``int64`` of shape ``(n_cells, n_keys)``.

        Notes
        -----
        Its gradient reaches the adversary and not the representation.
        """
        with torch.autocast(condition_index.device.type, enabled=False):
            shift = self.labels(labels, None) if self.told_labels else None
            parameters = (*self.first.parameters(), *self.heads.parameters())
            x = representation.to(self.first.weight.dtype)
            return _CrossEntropy.apply(x, condition_index, self.n_levels, shift, *parameters)


class _CrossEntropy(Function):
    """Cross-entropy of the classifier: many small steps that autograd would track one by one."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        condition_index: Tensor,
        n_levels: list[int],
        shift: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        head: Tensor,
        head_bias: Tensor,
    ) -> Tensor:
        hidden = F.linear(x, weight, bias)
        if shift is not None:
            hidden += shift
        F.leaky_relu_(hidden, _NEGATIVE_SLOPE)
        loss, residuals = 0.0, []  # prediction minus truth, (n_cells, n_levels) per key
        for key, logits in enumerate(F.linear(hidden, head, head_bias).split(n_levels, dim=1)):
            truth = condition_index[:, key : key + 1]
            log_prediction = F.log_softmax(logits, dim=-1)
            loss = loss - log_prediction.gather(1, truth).mean()
            residual = log_prediction.exp_()
            residuals.append(residual.scatter_add_(1, truth, -torch.ones_like(residual[:, :1])))
        ctx.save_for_backward(x, hidden, torch.cat(residuals, dim=1), head)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, residual, head = ctx.saved_tensors
        residual = residual * (grad / len(x))
        slope = torch.where(hidden > 0, 1.0, _NEGATIVE_SLOPE)
        with torch.autocast(x.device.type, enabled=False):
            hidden_grad = (residual @ head) * slope
            first_grads = hidden_grad.t() @ x, hidden_grad.sum(0)
            head_grads = residual.t() @ hidden, residual.sum(0)
        shift_grad = hidden_grad if ctx.needs_input_grad[3] else None
        return None, None, None, shift_grad, *first_grads, *head_grads
