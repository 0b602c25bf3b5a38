"""An update that no host waits for: gradients summed in fp32, and clipped where the optimizer reads them.

A step in which the host reads the norm before it asks for the update leaves a GPU idle for as long as the optimizer's
Python takes; here the norm, and whether it is finite, stay on the device until the step is all asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def add_up(sums: Sequence[Tensor], parameters: Sequence[nn.Parameter], first: bool) -> None:
    """Add each parameter's gradient to its fp32 sum, or put it there, and let it go. One without a gradient adds 0."""
    pairs = [(total, p.grad) for total, p in zip(sums, parameters, strict=True) if p.grad is not None]
    if first and len(pairs) < len(sums):
        torch._foreach_zero_([total for total, p in zip(sums, parameters, strict=True) if p.grad is None])
    into, grads = [total for total, _ in pairs], [gradient for _, gradient in pairs]
    if first:
        torch._foreach_copy_(into, grads)  # one pass: nothing to zero before, no fp32 copy beside
    else:
        torch._foreach_add_(into, grads)
    for parameter in parameters:
        parameter.grad = None


@torch.no_grad()
def clipped_step(optimizer: torch.optim.Optimizer, norm: Tensor, clip_norm: float | None, scale: float = 1.0) -> None:
    """A step with gradients divided by `scale` and clipped; none at all where their norm, still scaled, is not finite.

    torch's fused optimizers divide by `grad_scale` as they read a gradient, and keep still where `found_inf` is 1: what
    torch.amp.GradScaler gives them.
    """
    fused: Any = optimizer
    divisor = torch.full_like(norm, scale, dtype=torch.float32)
    if clip_norm is not None:
        unscaled = norm / scale
        divisor = torch.where(unscaled > clip_norm, (unscaled + 1e-6) / clip_norm, 1.0).mul_(scale)
    fused.grad_scale, fused.found_inf = divisor, norm.isfinite().logical_not().float()
    optimizer.step()
    del fused.grad_scale, fused.found_inf
