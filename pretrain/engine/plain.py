"""The reference engine: torch alone. Data parallel, every rank holding all of the state.

bf16 means bf16 compute copies of fp32 masters, with gradients accumulated and reduced, and moments kept, in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs import Bool, Section
from pretrain.engine.state import ForwardTimer, Fragment, Outcome, State, optimizer_state, share
from pretrain.noise import Noise
from pretrain.objectives import Batch
from pretrain.optim import Optim, Rates, set_rates
from pretrain.ranks import Ranks


class Torch(Section):
    """torch alone: DDP-like, nothing sharded."""

    kind: Literal["torch"] = "torch"
    precision: Literal["fp32", "bf16"] = "bf16"
    compile: Bool = False

    def build(self, model: nn.Module, optim: Optim, ranks: Ranks) -> PlainEngine:
        """An engine over a model that holds its initial values in fp32."""
        return PlainEngine(self, model, optim, ranks)


class PlainEngine:
    """Masters in one flat fp32 buffer, gradients in another; the model's parameters are views or bf16 copies."""

    def __init__(self, settings: Torch, model: nn.Module, optim: Optim, ranks: Ranks) -> None:
        self.module, self.optim, self.ranks = model.to(ranks.device), optim, ranks
        self.timer = ForwardTimer(ranks.device)
        named = dict(model.named_parameters())
        self.shapes = {name: tuple(p.shape) for name, p in named.items()}
        self.parameters = list(named.values())
        sizes = [p.numel() for p in self.parameters]
        self.gradient = torch.zeros(sum(sizes), dtype=torch.float32, device=ranks.device)
        flat = torch.cat([p.detach().reshape(-1).float() for p in self.parameters])
        self.masters = _views(flat, self.parameters, sizes)
        self.gradients = _views(self.gradient, self.parameters, sizes)
        self.reduced = settings.precision == "bf16"
        for parameter, master, gradient in zip(self.parameters, self.masters, self.gradients, strict=True):
            parameter.data = master.bfloat16() if self.reduced else master
            parameter.grad = None if self.reduced else gradient
            master.grad = gradient
        masters = dict(zip(named, self.masters, strict=True))
        groups: list[dict[str, Any]] = [
            {"params": [masters[name] for name in group["names"]]} | {k: group[k] for k in ("decays", "weight_decay")}
            for group in optim.groups(model)
        ]
        self.optimizer = optim.over(groups)
        self.forward = torch.compile(model, dynamic=False) if settings.compile else model

    def step(self, batches: Sequence[Batch], count: int, rates: Rates, noise: Noise | None = None) -> Outcome:
        """See `Engine.step`."""
        self.gradient.zero_()
        total = torch.zeros((), dtype=torch.float32, device=self.gradient.device)
        for i, batch in enumerate(batches):
            if noise is not None:
                noise.begin(i)
            with self.timer.forward():
                loss = self.forward(*batch) / count
            loss.backward()
            total += loss.detach()
            if self.reduced:
                self._accumulate()
        if self.ranks.size > 1:
            dist.all_reduce(self.gradient)
        norm = float(torch.linalg.vector_norm(self.gradient))
        if not math.isfinite(norm):
            return Outcome(float(total), norm, applied=False, forward_s=self.timer.take())
        if self.optim.clip_norm is not None and norm > self.optim.clip_norm:
            self.gradient.mul_(self.optim.clip_norm / (norm + 1e-6))
        set_rates(self.optimizer.param_groups, rates)
        self.optimizer.step()
        self._refresh()
        return Outcome(float(total), norm, applied=True, forward_s=self.timer.take())

    @torch.no_grad()
    def loss(self, batch: Batch) -> Tensor:
        """See `Engine.loss`."""
        loss: Tensor = self.forward(*batch)
        return loss

    def replicas(self) -> list[Tensor]:
        """See `Engine.replicas`: everything."""
        moments = [v for state in self.optimizer.state.values() for v in state.values() if v.ndim]
        return [p.data for p in self.parameters] + (self.masters if self.reduced else []) + moments

    def state(self) -> State:
        """See `Engine.state`. Every rank holds everything and owns an equal share."""
        flats = [optimizer_state(self.optimizer, master) for master in self.masters]
        held = [
            Fragment(name, 0, m.numel(), i, 0)
            for i, (name, m) in enumerate(zip(self.shapes, self.masters, strict=True))
        ]
        steps = {n: float(self.optimizer.state[m]["step"]) for n, m in zip(self.shapes, self.masters, strict=True)}
        return State(self.shapes, flats, held, share(self.shapes, self.ranks.rank, self.ranks.size), steps)

    def loaded(self, state: State) -> None:
        """See `Engine.loaded`."""
        for name, master in zip(self.shapes, self.masters, strict=True):
            self.optimizer.state[master]["step"].fill_(state.steps[name])
        self._refresh()

    @torch.no_grad()
    def _accumulate(self) -> None:
        """Add the bf16 gradients of one micro-batch to the fp32 sum."""
        grads = [p.grad for p in self.parameters]
        torch._foreach_add_(self.gradients, [g.float() for g in grads if g is not None])
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def _refresh(self) -> None:
        if self.reduced:
            torch._foreach_copy_([p.data for p in self.parameters], self.masters)


def _views(flat: Tensor, like: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    return [part.view_as(p) for part, p in zip(torch.split(flat, list(sizes)), like, strict=True)]
