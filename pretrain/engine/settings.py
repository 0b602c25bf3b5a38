"""What both engines are told: how a step computes, and where. Free to change at every start, but for the precision."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import model_validator

from configs import Bool, ConfigError, Section
from pretrain.models.loss import LossKind

Recompute = Literal["none", "selective", "full"]


class Computation(Section):
    """How a step computes. None stands for what is best where the run is: on this device, with this memory."""

    precision: Literal["fp32", "bf16", "fp16"] = "bf16"  # of the weights that compute; masters and sums are fp32
    compile: Bool | None = None  # None: on a GPU; on a CPU it gains a tenth for a minute of start
    recompute: Recompute = (
        "none"  # selective keeps products, and attention that drops nothing; full keeps what enters each block
    )
    loss: LossKind | None = None  # chunked holds the logits of few tokens at a time; None: where that helps

    def check_device(self, device: torch.device) -> None:
        """Raise ConfigError where the device cannot compute so."""
        if self.precision == "fp16" and device.type != "cuda":
            raise ConfigError(
                f"engine.precision: fp16 needs a GPU, this rank is on {device.type}, where fp16 has no fast products "
                f"and DeepSpeed refuses it; use bf16 or fp32"
            )

    def compiles(self, device: torch.device) -> bool:
        """Whether the forward pass is compiled."""
        return device.type == "cuda" if self.compile is None else self.compile


class Offload(Section):
    """What lies in the host's memory instead of the GPU's (Ren et al. 2021, ZeRO-Offload)."""

    optimizer: Bool = False  # masters and moments; the update is computed there too
    parameters: Bool = False  # the weights that compute, fetched for each layer

    @model_validator(mode="after")
    def _both(self) -> Offload:
        if self.parameters and not self.optimizer:
            raise ValueError("parameters: true needs optimizer: true, whose masters they are made from")
        return self
