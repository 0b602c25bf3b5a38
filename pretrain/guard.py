"""What watches over a run: exit codes, stop signals and the time left, gradients that are not finite, spikes."""

from __future__ import annotations

import math
import os
import signal
import statistics
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

from pydantic import Field

from configs import Float, Int, Section

DONE = 0
FAILED = 1
USAGE = 2
STOPPED = 3
HUNG = 4
OUT_OF_MEMORY = 5
TAKEN_OVER = 6
GAVE_UP = 7
CRASH_LOOP = 8
INTERRUPTED = 130

END_TIME, KILL_WAIT = "LONGHAUL_END_TIME", "LONGHAUL_KILL_WAIT_S"  # from the launcher: epoch seconds; seconds


class Rollback(Section):
    """Going back to the last good checkpoint by itself, with the samples of the bad steps skipped from then on."""

    on: tuple[Literal["nan", "spike"], ...] = ("nan", "spike")  # what makes a run go back
    skip_steps_before: Int = Field(default=0, ge=0)  # steps before the bad ones whose samples are skipped as well
    skip_steps_after: Int = Field(default=0, ge=0)  # and after them
    at_most: Int = Field(default=3, gt=0)  # in the whole run; one more, and the run ends with exit 7


class Guard(Section):
    """When a run that goes wrong is marked, rolled back or ended."""

    max_skipped_steps: Int = Field(default=10, gt=0)  # steps in a row whose gradient is not finite
    spike_sigmas: Float = Field(default=6.0, gt=0)  # how far loss or gradient norm lie above the steps before
    spike_window_steps: Int = Field(default=128, ge=8)  # steps that a spike is measured against
    rollback: Rollback | None = None  # null: marked, not rolled back
    hang_timeout_s: Float = Field(default=600.0, gt=0)  # without progress of a rank
    start_timeout_s: Float = Field(default=1800.0, gt=0)  # the same until the first step is done, which may compile
    rendezvous_timeout_s: Float = Field(default=600.0, gt=0)  # until every rank has come
    check_weights_every_steps: Int | None = Field(default=500, gt=0)  # that they are equal on all ranks
    slow_rank_factor: Float = Field(default=1.5, gt=1)  # of the median rank's own time, over 50 steps


# --- stop signals and time ------------------------------------------------------------------------------------------


class StopSignals:
    """TERM, USR1 and USR2 ask for a save and a later start, INT for a save and an end. A signal sets a flag, no more.

    A second INT ends the process at once: somebody is waiting at the keyboard. The end of the allocation, which the
    launcher hands in, is a request to stop as well, as soon as a save would otherwise not end before it.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    MARGIN_S = 15.0  # for what comes after a save

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self.received: int | None = None
        self._kill_wait_s = float(environment.get(KILL_WAIT, "inf"))
        self._killed_at = math.inf  # on the monotonic clock, as `_ends_at`
        end = float(environment.get(END_TIME, "inf"))
        self._ends_at = time.monotonic() + end - time.time()
        for number in self.SIGNALS:
            signal.signal(number, self._handle)

    def exit_code(self, needed_s: float = 0.0) -> int | None:
        """The exit code that is asked for, or None. `needed_s`: what another step and a save would take."""
        if self.received is not None:
            return INTERRUPTED if self.received == signal.SIGINT else STOPPED
        return STOPPED if self._ends_at - time.monotonic() < needed_s + self.MARGIN_S else None

    def left_s(self) -> float:
        """Seconds until this process is killed, as far as that is known."""
        return min(self._ends_at, self._killed_at) - time.monotonic()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            os._exit(INTERRUPTED)
        if number == signal.SIGTERM and self._killed_at == math.inf:
            self._killed_at = time.monotonic() + self._kill_wait_s
        self.received = number


# --- bad steps ------------------------------------------------------------------------------------------------------


class SkippedSteps:
    """Counts steps whose gradient was not finite; the same on every rank, as the gradient is."""

    def __init__(self, settings: Guard, in_a_row: int = 0) -> None:
        self.settings, self.in_a_row = settings, in_a_row

    def gives_up(self, applied: bool) -> bool:
        """Count a step; True when too many in a row were skipped."""
        self.in_a_row = 0 if applied else self.in_a_row + 1
        return self.in_a_row >= self.settings.max_skipped_steps


@dataclass(frozen=True)
class Spike:
    """A step whose loss or gradient norm lies far above those before it."""

    quantity: str  # loss or grad_norm
    value: float
    sigmas: float


class Spikes:
    """Compares each step with those before it. A spike is not added to what later steps are compared with."""

    FEWEST = 16  # steps before the first comparison
    LEAST_SIGMA = 0.01  # of the mean: what a very quiet stretch is taken to vary by

    def __init__(self, settings: Guard, state: Mapping[str, Any] | None = None) -> None:
        self.settings = settings
        before = state or {}
        self._past = {
            name: deque(map(float, before.get(name, ())), maxlen=settings.spike_window_steps)
            for name in ("loss", "grad_norm")
        }

    def add(self, loss: float, grad_norm: float) -> Spike | None:
        """Count a step; the spike that it is, if it is one."""
        found = [self._compare("loss", loss), self._compare("grad_norm", grad_norm)]
        spikes = [spike for spike in found if spike is not None]
        if spikes:
            return max(spikes, key=lambda spike: spike.sigmas)
        self._past["loss"].append(loss)
        self._past["grad_norm"].append(grad_norm)
        return None

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint keeps, so that a resumed run decides as an undisturbed one."""
        return {name: list(values) for name, values in self._past.items()}

    def _compare(self, name: str, value: float) -> Spike | None:
        past = self._past[name]
        if len(past) < self.FEWEST:
            return None
        mean = statistics.fmean(past)
        sigma = max(statistics.pstdev(past, mean), self.LEAST_SIGMA * abs(mean))
        sigmas = (value - mean) / sigma if sigma else 0.0
        return Spike(name, value, sigmas) if sigmas > self.settings.spike_sigmas else None
