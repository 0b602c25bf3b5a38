"""Engines: what turns batches into updates. `plain` is torch alone, the reference and the way out; `zero` is DeepSpeed.

An engine is fed micro-batches of token rows with weights, and the number of targets that count in the whole step; loss
and gradients are sums over that count, whatever the ranks and micro-batches. It gives out and takes in its state as
named fragments (`state`), which is all that a checkpoint knows of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Protocol

from pydantic import Field
from torch import Tensor, nn

from pretrain.engine.plain import Torch
from pretrain.engine.state import Outcome, State, StepTimer
from pretrain.engine.tally import Tally
from pretrain.engine.zero import DeepSpeed
from pretrain.noise import Noise
from pretrain.objectives import Batch
from pretrain.optim import Rates

__all__ = ["Engine", "EngineSettings", "Outcome", "State", "Tally"]

EngineSettings = Annotated[Torch | DeepSpeed, Field(discriminator="kind")]


class Engine(Protocol):
    """What the loop and the checkpoints ask of an engine."""

    module: nn.Module
    timer: StepTimer

    def step(
        self,
        batches: Sequence[Batch],
        count: int,
        rates: Rates,
        noise: Noise | None = None,
        tally: Tally | None = None,
    ) -> Outcome:
        """One update from this rank's micro-batches; `count` is the number of targets of the step over all ranks.

        `noise` gives each micro-batch its random numbers; a model without dropout needs none. `tally`, whose batches
        these are, has the losses of each source added up.
        """

    def loss(self, batch: Batch) -> Tensor:
        """The weighted sum of a batch's losses in fp32, without gradients."""

    def replicas(self) -> list[Tensor]:
        """Tensors of fp32 or bf16 that every rank holds alike."""

    def state(self) -> State:
        """The training state by name; moments are created where no step has been taken yet."""

    def loaded(self, state: State) -> None:
        """Take over a state whose tensors were filled in place: refresh compute copies and step counts."""

    def release(self) -> None:
        """Let go of all memory. The engine is of no use any more."""
