"""The learning rate and the batch size as pure functions of tokens.

The learning rate is a factor from 0 to 1 that multiplies `optim.lr_peak`.

`tokens` are those consumed once the step is done, this step's included: the first step of a warm-up is not lost at 0,
and the step that reaches `train_tokens` has exactly the last value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs import Float, Int, Section


class _WarmUp(Section):
    """From 0 in a straight line to 1 at `warmup_tokens`; after that, what the schedule says."""

    warmup_tokens: Int = Field(0, ge=0)  # from 0 to the peak

    def factor(self, tokens: int, train_tokens: int) -> float:
        """What multiplies the peak learning rate in the step that ends at `tokens` of `train_tokens`."""
        if tokens < self.warmup_tokens:
            return tokens / self.warmup_tokens
        return self._after(tokens, train_tokens)

    def _after(self, tokens: int, train_tokens: int) -> float:
        raise NotImplementedError


class Constant(_WarmUp):
    """The peak, after the warm-up."""

    kind: Literal["constant"] = "constant"

    def _after(self, tokens: int, train_tokens: int) -> float:
        return 1.0


class _Decay(_WarmUp):
    """From 1 at the end of the warm-up to `final_fraction` at `decay_tokens`, and that from there on.

    `decay_tokens` counts from the start of training, warm-up included; without it the decay ends with the training.
    """

    decay_tokens: Int | None = Field(None, gt=0)  # counted from the start; null: to the end of the training
    final_fraction: Float = Field(0.0, ge=0, le=1)  # of the peak

    @model_validator(mode="after")
    def _warm_up_fits(self) -> _Decay:
        if self.decay_tokens is not None and self.decay_tokens <= self.warmup_tokens:
            raise ValueError(
                f"decay_tokens counts from the start and must be above warmup_tokens ({self.warmup_tokens}), "
                f"got {self.decay_tokens}"
            )
        return self

    def _after(self, tokens: int, train_tokens: int) -> float:
        end = self.decay_tokens or train_tokens
        if end <= self.warmup_tokens:  # the training ends within the warm-up: at the peak at most
            return 1.0
        if tokens >= end:
            return self.final_fraction
        progress = (tokens - self.warmup_tokens) / (end - self.warmup_tokens)
        return self.final_fraction + (1 - self.final_fraction) * self._shape(progress)

    def _shape(self, progress: float) -> float:
        raise NotImplementedError


class Cosine(_Decay):
    """Half a cosine, to a tenth of the peak as GPT-3 does (Brown et al. 2020, appendix B; SGDR, Loshchilov 2017)."""

    kind: Literal["cosine"] = "cosine"
    final_fraction: Float = Field(0.1, ge=0, le=1)  # of the peak

    def _shape(self, progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2


class Linear(_Decay):
    """A straight line down."""

    kind: Literal["linear"] = "linear"

    def _shape(self, progress: float) -> float:
        return 1 - progress


class WarmupStableDecay(_WarmUp):
    """The peak (MiniCPM, Hu et al. 2024, section 4), then down over the last `cooldown_tokens` of the training; in a
    straight line, as Hägele et al. 2024 (section 3) have it, where MiniCPM's falls exponentially."""

    kind: Literal["warmup_stable_decay"] = "warmup_stable_decay"
    cooldown_tokens: Int = Field(gt=0)  # the last ones of the training
    final_fraction: Float = Field(0.0, ge=0, le=1)  # of the peak

    def _after(self, tokens: int, train_tokens: int) -> float:
        left = max(train_tokens - tokens, 0) / self.cooldown_tokens
        return 1.0 if left >= 1 else self.final_fraction + (1 - self.final_fraction) * left


Schedule = Annotated[Constant | Cosine | Linear | WarmupStableDecay, Field(discriminator="kind")]


class BatchRamp(Section):
    """A batch that grows with the tokens in a straight line, from `start_tokens` to the run's `batch_tokens` over the
    first `over_tokens` (Brown et al. 2020, appendix B).

    It grows by whole increments: a step takes the largest of start, start + increment, ..., `batch_tokens` that the
    line has reached where the step begins. The line counts every sample, those that are skipped too.
    """

    start_tokens: Int = Field(gt=0)  # of the first step
    over_tokens: Int = Field(gt=0)  # until the batch is whole
    increment_tokens: Int | None = Field(None, gt=0)  # null: start_tokens

    def stages(self, seq_tokens: int, batch_seqs: int) -> list[tuple[int, int]]:
        """(sample, sequences per step): the batch and from which sample on the line has reached it, growing."""
        start = self.start_tokens // seq_tokens
        increment = (self.increment_tokens or self.start_tokens) // seq_tokens
        span = batch_seqs - start
        sizes = [*range(start, batch_seqs, increment), batch_seqs]
        return [(-(-self.over_tokens * (size - start) // (max(span, 1) * seq_tokens)), size) for size in sizes]


def step_pieces(stages: Sequence[tuple[int, int]], from_sample: int) -> list[tuple[int, int]]:
    """(sample, sequences per step) from `from_sample` on, where a step begins: each stage, from the first step that
    begins in it. A stage that no step begins in is left out."""
    at, batch = from_sample, max(size for sample, size in stages if sample <= from_sample)
    pieces = [(at, batch)]
    for sample, size in stages:
        if size <= batch:
            continue
        if sample > at:
            at += -(-(sample - at) // batch) * batch
            pieces.append((at, size))
        else:
            pieces[-1] = (at, size)
        batch = size
    return pieces
