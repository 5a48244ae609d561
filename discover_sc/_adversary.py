"""The classifiers of the conditions that the model plays against."""

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
    """Classifiers of the conditions: one per representation that they read, one head per key.

    Parameters
    ----------
    n_inputs
        Width of each representation, by its name.
    n_cats_per_condition
        Number of levels of each condition key.
    n_labels
        Number of labels the adversary is told; 0 where it is told none.
    """

    def __init__(
        self, n_inputs: dict[str, int], n_cats_per_condition: Sequence[int], n_labels: int
    ) -> None:
        super().__init__()
        labels = [n_labels] if n_labels else []
        self.told_labels = n_labels > 0
        self.first = nn.ModuleDict({name: nn.Linear(n, _N_HIDDEN) for name, n in n_inputs.items()})
        self.labels = nn.ModuleDict({name: Covariates(labels, 0, _N_HIDDEN) for name in n_inputs})
        self.heads = nn.ModuleDict(
            {
                name: nn.ModuleList(nn.Linear(_N_HIDDEN, n) for n in n_cats_per_condition)
                for name in n_inputs
            }
        )

    def forward(self, representations: dict[str, Tensor], labels: Tensor) -> list[list[Tensor]]:
        """Return for each condition key the logits of each classifier.

        Parameters
        ----------
        representations
            Shape ``(n_cells, n)`` each, by name.
        labels
            Label codes, ``int64`` of shape ``(n_cells, 1)``; read only if the adversary is told.

        Returns
        -------
        Per key, one tensor of shape ``(n_cells, n_levels)`` per representation.
        """
        per_representation = []
        for name, representation in representations.items():
            hidden = self.first[name](representation)
            if self.told_labels:
                hidden = hidden + self.labels[name](labels, None)
            hidden = F.leaky_relu(hidden, _NEGATIVE_SLOPE)
            per_representation.append([head(hidden) for head in self.heads[name]])
        return [list(logits) for logits in zip(*per_representation, strict=True)]

    def loss(
        self, representations: dict[str, Tensor], labels: Tensor, condition_index: Tensor
    ) -> Tensor:
        """Return the cross-entropy of all classifiers: means over cells, summed, 0-d, in nats.

        Parameters
        ----------
        representations, labels
            As for :meth:`forward`.
        condition_index
            Codes of the true conditions, ``int64`` of shape ``(n_cells, n_keys)``.

        Notes
        -----
        Its gradient reaches the adversary and not the representations.
        """
        total = 0.0
        with torch.autocast(condition_index.device.type, enabled=False):
            for name, representation in representations.items():
                first = self.first[name]
                shift = self.labels[name](labels, None) if self.told_labels else None
                heads = [parameter for head in self.heads[name] for parameter in head.parameters()]
                x = representation.to(first.weight.dtype)
                total = total + _ClassifierLoss.apply(
                    x, condition_index, shift, first.weight, first.bias, *heads
                )
        return total


class _ClassifierLoss(Function):
    """Cross-entropy of one classifier, its heads summed: small steps that autograd would track.

    Heads are given as weight and bias in turn.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        condition_index: Tensor,
        shift: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        *heads: Tensor,
    ) -> Tensor:
        hidden = F.linear(x, weight, bias)
        if shift is not None:
            hidden += shift
        F.leaky_relu_(hidden, _NEGATIVE_SLOPE)
        loss, ctx.residuals = 0.0, []  # prediction minus truth, (n_cells, n_levels) per head
        for key, (head, head_bias) in enumerate(zip(heads[::2], heads[1::2], strict=True)):
            truth = condition_index[:, key : key + 1]
            log_prediction = F.log_softmax(F.linear(hidden, head, head_bias), dim=-1)
            loss = loss - log_prediction.gather(1, truth).mean()
            residual = log_prediction.exp_()
            ctx.residuals.append(residual.scatter_add_(1, truth, -torch.ones_like(residual[:, :1])))
        ctx.save_for_backward(x, hidden, *heads[::2])
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, *heads = ctx.saved_tensors
        weight, head_grads, hidden_grad = grad / len(x), [], None
        for residual, head in zip(ctx.residuals, heads, strict=True):
            residual = residual * weight
            own = residual @ head
            hidden_grad = own if hidden_grad is None else hidden_grad + own
            head_grads += [residual.t() @ hidden, residual.sum(0)]
        slope = torch.where(hidden > 0, 1.0, _NEGATIVE_SLOPE)
        hidden_grad = hidden_grad * slope
        shift_grad = hidden_grad if ctx.needs_input_grad[2] else None
        return None, None, shift_grad, hidden_grad.t() @ x, hidden_grad.sum(0), *head_grads
