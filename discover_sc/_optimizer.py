"""AdamW for many small tensors: one fused update, one step counter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW, to the bit, for parameters that are always stepped together.

    PyTorch counts the steps of each parameter in a tensor of its own; counting those costs more
    than the update itself where most parameters are small. Here parameters that begin together
    share one counter.
    """

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; see :meth:`torch.optim.Optimizer.zero_grad`."""
        if not set_to_none:
            return super().zero_grad(set_to_none)
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient; see :class:`torch.optim.AdamW`."""
        if not self.defaults["fused"]:
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update(group)
        return loss

    def _update(self, group: dict) -> None:
        tensors, steps = [], []
        counter = None
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                if counter is None:
                    counter = torch.zeros((), dtype=torch.float32, device=p.device)
                state["step"] = counter
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            own = (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
            tensors.append(own if p.is_contiguous() else _transposed(own))
            steps.append(state["step"])
        if not tensors:
            return
        for step in {id(step): step for step in steps}.values():
            step += 1
        params, grads, means, squares = map(list, zip(*tensors, strict=True))
        torch._fused_adamw_(
            params,
            grads,
            means,
            squares,
            [],
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


def _transposed(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the same memory as contiguous matrices: the fused update copies others."""
    transposed = tuple(t.mT for t in tensors) if tensors[0].ndim == 2 else tensors
    return transposed if all(t.is_contiguous() for t in transposed) else tensors
