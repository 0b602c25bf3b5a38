"""The optimizer, and which parameters it decays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import nn

from configs import Float, Section

Group = dict[str, Any]  # params: list of parameters; names: theirs, in the same order; decays; weight_decay; lr


class Rates(NamedTuple):
    """What of the optimizer may be another from step to step."""

    lr: float
    weight_decay: float


class AdamW(Section):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019); defaults as GPT-3's (Brown 2020, appendix B)."""

    kind: Literal["adamw"] = "adamw"
    lr_peak: Float = Field(gt=0)  # the schedule multiplies it
    beta1: Float = Field(0.9, ge=0, lt=1)  # decay of the mean of gradients
    beta2: Float = Field(0.95, ge=0, lt=1)  # of the mean of their squares
    eps: Float = Field(1e-8, gt=0)
    weight_decay: Float = Field(0.1, ge=0)  # of matrices and embeddings; biases and norms have none
    clip_norm: Float | None = Field(1.0, gt=0)  # of the whole gradient; null: no clipping

    def groups(self, model: nn.Module) -> list[Group]:
        """Matrices, which decay, and the rest, which does not: biases and the gains of norms.

        Embeddings are matrices, positions too. Call it before an engine flattens or splits the parameters.
        """
        named = list(model.named_parameters())
        matrices = [(name, parameter) for name, parameter in named if parameter.ndim >= 2]
        rest = [(name, parameter) for name, parameter in named if parameter.ndim < 2]
        return [_group(matrices, self.weight_decay, decays=True), _group(rest, 0.0, decays=False)]

    def rates(self, factor: float) -> Rates:
        """The rates of a step for which the schedule gives `factor`."""
        return Rates(factor * self.lr_peak, self.weight_decay)

    def over(self, groups: list[Group]) -> torch.optim.AdamW:
        """torch's AdamW over `groups`, in one fused kernel per step; `set_rates` gives it its rates each step."""
        return torch.optim.AdamW(groups, lr=self.lr_peak, betas=(self.beta1, self.beta2), eps=self.eps, fused=True)


def set_rates(groups: Iterable[Group], rates: Rates) -> None:
    """Write the rates of the coming step into an optimizer's groups."""
    for group in groups:
        group["lr"] = rates.lr
        group["weight_decay"] = rates.weight_decay if group["decays"] else 0.0


def _group(named: list[tuple[str, nn.Parameter]], weight_decay: float, decays: bool) -> Group:
    params, names = [p for _, p in named], [name for name, _ in named]
    return {"params": params, "names": names, "decays": decays, "weight_decay": weight_decay}


Optim = AdamW
