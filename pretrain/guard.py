"""What watches over a run: stop signals, and gradients that are not finite."""

from __future__ import annotations

import os
import signal
from types import FrameType

from pydantic import Field

from configs import Int, Section

DONE, FAILED, USAGE, STOPPED, HUNG, OUT_OF_MEMORY, TAKEN_OVER, GAVE_UP, CRASH_LOOP, INTERRUPTED = (
    0,
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    130,
)


class Guard(Section):
    """When a run that goes wrong is ended."""

    max_skipped_steps: Int = Field(default=10, gt=0)  # steps in a row whose gradient is not finite


class StopSignals:
    """TERM, USR1 and USR2 ask for a save and a later start, INT for a save and an end. A signal sets a flag, no more.

    A second INT ends the process at once: somebody is waiting at the keyboard.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.received: int | None = None
        for number in self.SIGNALS:
            signal.signal(number, self._handle)

    @property
    def exit_code(self) -> int | None:
        """The exit code that is asked for, or None."""
        if self.received is None:
            return None
        return INTERRUPTED if self.received == signal.SIGINT else STOPPED

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            os._exit(INTERRUPTED)
        self.received = number


class SkippedSteps:
    """Counts steps whose gradient was not finite; the same on every rank, as the gradient is."""

    def __init__(self, settings: Guard) -> None:
        self.settings, self.in_a_row = settings, 0

    def gives_up(self, applied: bool) -> bool:
        """Count a step; True when too many in a row were skipped."""
        self.in_a_row = 0 if applied else self.in_a_row + 1
        return self.in_a_row >= self.settings.max_skipped_steps
