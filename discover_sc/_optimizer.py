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
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict) -> None:
        new = [p for p in params if not self.state[p]]
        if new:
            step = torch.zeros((), dtype=torch.float32, device=new[0].device)
            for p in new:
                moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                self.state[p].update(step=step, **moments)
        states = [self.state[p] for p in params]
        steps = [state["step"] for state in states]
        for step in {id(step): step for step in steps}.values():
            step += 1
        tensors = (
            _contiguous(p, p.grad, state["exp_avg"], state["exp_avg_sq"])
            for p, state in zip(params, states, strict=True)
        )
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


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the same memory as contiguous matrices: the fused update copies others."""
    transposed = tuple(t.mT for t in tensors) if tensors[0].ndim == 2 else tensors
    return transposed if all(t.is_contiguous() for t in transposed) else tensors
