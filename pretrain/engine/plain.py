"""The reference engine: torch alone. Data parallel, every rank holding all of the state.

bf16 means bf16 compute copies of fp32 masters, with gradients accumulated and reduced, and moments kept, in fp32;
fp16 likewise, with a dynamic loss scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.engine.recompute import recompute_blocks
from pretrain.engine.scale import LossScale, until_applied
from pretrain.engine.settings import Computation
from pretrain.engine.state import Fragment, Outcome, State, StepTimer, lay_out, optimizer_state, share
from pretrain.engine.tally import Tally, read, to_tell
from pretrain.engine.update import add_up, clipped_step
from pretrain.models.compiled import compiled
from pretrain.models.loss import loss_plan, plan_losses
from pretrain.noise import Noise
from pretrain.objectives import Batch
from pretrain.optim import Optim, Rates, set_rates
from pretrain.ranks import Ranks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Torch(Computation):
    """torch alone: DDP-like, nothing sharded."""

    kind: Literal["torch"] = "torch"

    def build(self, model: nn.Module, optim: Optim, ranks: Ranks) -> PlainEngine:
        """An engine over a model that holds its values in fp32; on the meta device: all 0, until a state is loaded."""
        return PlainEngine(self, model, optim, ranks)


class PlainEngine:
    """Masters in one flat fp32 buffer, gradients in another; the model's parameters are views or bf16 copies."""

    def __init__(self, settings: Torch, model: nn.Module, optim: Optim, ranks: Ranks) -> None:
        settings.check_device(ranks.device)
        self.module, self.optim, self.ranks = lay_out(model, ranks.device, torch.float32), optim, ranks
        self.timer = StepTimer(ranks.device)
        self.scale = LossScale() if settings.precision == "fp16" else None
        plan_losses(model, loss_plan(settings.loss, ranks.device))
        recompute_blocks(model, settings.recompute)
        named = dict(model.named_parameters())
        self.shapes = {name: tuple(p.shape) for name, p in named.items()}
        self.parameters = list(named.values())
        sizes = [p.numel() for p in self.parameters]
        self.gradient = torch.zeros(sum(sizes), dtype=torch.float32, device=ranks.device)
        flat = torch.cat([p.detach().reshape(-1).float() for p in self.parameters])
        self.masters = _views(flat, self.parameters, sizes)
        self.gradients = _views(self.gradient, self.parameters, sizes)
        self.reduced = settings.precision != "fp32"
        for parameter, master, gradient in zip(self.parameters, self.masters, self.gradients, strict=True):
            parameter.data = master.to(DTYPES[settings.precision])
            parameter.grad = None if self.reduced else gradient
            master.grad = gradient
        masters = dict(zip(named, self.masters, strict=True))
        groups: list[dict[str, Any]] = [
            {"params": [masters[name] for name in group["names"]]} | {k: group[k] for k in ("decays", "weight_decay")}
            for group in optim.groups(model)
        ]
        self.optimizer = optim.over(groups)
        self.forward = compiled(model) if settings.compiles(ranks.device) else model

    def step(
        self,
        batches: Sequence[Batch],
        count: int,
        rates: Rates,
        noise: Noise | None = None,
        tally: Tally | None = None,
    ) -> Outcome:
        """See `Engine.step`. In fp16 an overflow is followed by another try with a lower scale."""
        set_rates(self.optimizer.param_groups, rates)
        return until_applied(self.scale, lambda: self._attempt(batches, count, noise, tally), self.ranks)

    def _attempt(self, batches: Sequence[Batch], count: int, noise: Noise | None, tally: Tally | None) -> Outcome:
        if not self.reduced:
            self.gradient.zero_()  # backward adds to it
        total = torch.zeros((), dtype=torch.float32, device=self.gradient.device)
        scale = 1.0 if self.scale is None else self.scale.scale
        for i, batch in enumerate(batches):
            if noise is not None:
                noise.begin(i)
            with self.timer.forward():
                loss = self.forward(*batch) / count
            with self.timer.part("backward"):
                (loss if scale == 1 else loss * scale).backward()
                total += loss.detach()
                if self.reduced:
                    self._accumulate(first=i == 0)
        if self.ranks.size > 1:
            with self.timer.part("communication"):
                dist.all_reduce(self.gradient)
        told = to_tell(total, tally)
        with self.timer.part("optimizer"):
            applied, norm = (self._update_on_device if self.reduced else self._update)(scale)
        loss, by_source = read(told)
        return Outcome(loss, norm, applied, self.timer.take(), by_source)

    def _update(self, scale: float) -> tuple[bool, float]:
        """Clip and step; whether the gradient was finite, and its norm."""
        norm = float(torch.linalg.vector_norm(self.gradient)) / scale
        if not math.isfinite(norm):
            return False, norm
        shrink = 1.0 / scale
        if self.optim.clip_norm is not None and norm > self.optim.clip_norm:
            shrink *= self.optim.clip_norm / (norm + 1e-6)
        if shrink != 1:
            self.gradient.mul_(shrink)
        self.optimizer.step()
        return True, norm

    def _update_on_device(self, scale: float) -> tuple[bool, float]:
        """The same, and the weights that compute brought up to date, without waiting for the norm before the end."""
        norm = torch.linalg.vector_norm(self.gradient)
        clipped_step(self.optimizer, norm, self.optim.clip_norm, scale)
        self._refresh()
        value = float(norm) / scale
        return math.isfinite(value), value

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
        owned = share(self.shapes, self.ranks.rank, self.ranks.size)
        return State(self.shapes, flats, held, owned, steps, self.scale)

    def loaded(self, state: State) -> None:
        """See `Engine.loaded`."""
        for name, master in zip(self.shapes, self.masters, strict=True):
            self.optimizer.state[master]["step"].fill_(state.steps[name])
        self.scale = state.loss_scale
        self._refresh()

    def release(self) -> None:
        """See `Engine.release`."""
        vars(self).clear()

    def _accumulate(self, first: bool) -> None:
        """Add the gradients of one micro-batch to the fp32 sum, which the first one overwrites."""
        add_up(self.gradients, self.parameters, first)

    @torch.no_grad()
    def _refresh(self) -> None:
        if self.reduced:
            torch._foreach_copy_([p.data for p in self.parameters], self.masters)


def _views(flat: Tensor, like: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    return [part.view_as(p) for part, p in zip(torch.split(flat, list(sizes)), like, strict=True)]
