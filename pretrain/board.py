"""What the ranks of an attempt tell each other every step, and what they decide from it, all alike.

One sum over a small CPU tensor runs beside the next step and is read when that one is done, so no GPU waits for it.
Decisions follow from the sums alone, never from what one rank knows, so every rank decides the same at the same step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pretrain import guard
from pretrain.checkpoint import Position
from pretrain.guard import Spike, Spikes
from pretrain.ranks import Pending, Ranks

log = logging.getLogger("pretrain")

LIMB = 2**32  # digests travel as four limbs, which float64 adds up exactly


@dataclass(frozen=True)
class Notice:
    """What one rank posts after a step."""

    loss: float  # its share of the step's mean loss
    grad_norm: float
    applied: bool
    digest_share: int
    own_s: float  # seconds of its own work, without the wait for others
    by_source: tuple[float, ...] = ()  # sums of losses (nats) of its rows, by source
    targets: tuple[int, ...] = ()  # how many count in them; as many on every rank
    exit_code: int | None = None  # what its signals and its clock ask for
    out_of_time: bool = False  # a save would not end in the time that is left
    taken_over: bool = False
    save_failed: bool = False

    def tensor(self, rank: int, ranks: int) -> torch.Tensor:
        """float64: loss, norm, flags, digest in limbs, a place for each rank's own seconds; then losses by source."""
        flags = (
            self.exit_code == guard.STOPPED,
            self.exit_code == guard.INTERRUPTED,
            self.out_of_time,
            self.taken_over,
            self.save_failed,
        )
        limbs = [self.digest_share >> (32 * i) & (LIMB - 1) for i in range(4)]
        own = [self.own_s if r == rank else 0.0 for r in range(ranks)]
        values = [self.loss, self.grad_norm / ranks, *map(float, flags), *map(float, limbs), *own]
        return torch.tensor([*values, *self.by_source, *map(float, self.targets)], dtype=torch.float64)


@dataclass(frozen=True)
class Reading:
    """What all ranks posted after a step, added up."""

    position: Position  # after the step; the digest is that of all samples fed
    loss: float
    grad_norm: float
    applied: bool
    fed: bool  # any of its samples was
    own_s: tuple[float, ...]  # by rank
    by_source: tuple[float, ...]  # sums of losses (nats)
    targets: tuple[int, ...]  # that count in them
    exit_code: int | None
    out_of_time: bool
    spike: Spike | None


class Board:
    """Posts a step, and reads the one before."""

    def __init__(self, ranks: Ranks, start: Position, spikes: Spikes) -> None:
        self.ranks, self.start, self.spikes = ranks, start, spikes
        self._posted: tuple[Pending, bool, bool, Position] | None = None

    def post(self, notice: Notice, position: Position, fed: bool) -> Reading | None:
        """Post the step that led to `position`; what was read of the one before. `fed`: not all of it was skipped."""
        reading = self.read()
        pending = self.ranks.sum_later(notice.tensor(self.ranks.rank, self.ranks.size))
        self._posted = (pending, notice.applied, fed, position)
        return reading

    def read(self) -> Reading | None:
        """What was posted last; None where that has been read."""
        if self._posted is None:
            return None
        (pending, applied, fed, position), self._posted = self._posted, None
        loss, grad_norm, *rest = pending.result().tolist()
        stopped, interrupted, out_of_time, taken_over, save_failed = map(bool, rest[:5])
        position = Position(position.step, position.samples, position.tokens, self._digest(rest[5:9]))
        spike = self.spikes.add(loss, grad_norm) if applied and fed else None
        code = _worst(taken_over, save_failed, interrupted, stopped)
        own_s, by_source = rest[9 : 9 + self.ranks.size], rest[9 + self.ranks.size :]
        half = len(by_source) // 2
        targets = tuple(map(int, by_source[half:]))
        return Reading(
            position, loss, grad_norm, applied, fed, tuple(own_s), tuple(by_source[:half]), targets, code, out_of_time,
            spike,
        )  # fmt: skip

    def _digest(self, limbs: Sequence[float]) -> str:
        share = sum(int(limb) << (32 * i) for i, limb in enumerate(limbs))
        return f"{(int(self.start.digest, 16) + share) % 2**128:032x}"


def _worst(taken_over: bool, save_failed: bool, interrupted: bool, stopped: bool) -> int | None:
    found = [
        (taken_over, guard.TAKEN_OVER),
        (save_failed, guard.FAILED),
        (interrupted, guard.INTERRUPTED),
        (stopped, guard.STOPPED),
    ]
    return next((code for is_so, code in found if is_so), None)
