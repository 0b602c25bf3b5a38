"""A follower calls a tracker again and again, in a thread, until everything in the journal has been carried.

While the tracker cannot be reached the follower waits, longer each time, and then goes on from where it was: the
journal keeps everything meanwhile. What is left at the end is for `pretrain track-sync RUN`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from pretrain.track.mask import mask_text

logger = logging.getLogger(__name__)

LONGEST_WAIT_S = 60.0


class Busy(Exception):
    """Another process is carrying this run's journal to the same place at this moment."""


class Tracker(Protocol):
    """Somewhere that a run's journal is carried to."""

    name: str  # where to, as messages call it; holds no secret
    every_seconds: float
    close_seconds: float

    def carry(self) -> bool:
        """Carry the next part of the journal; whether there was one. Any exception: nothing was lost, try again."""


class Follower(threading.Thread):
    """Calls a tracker's `carry` every so many seconds. A daemon: a tracker that hangs keeps no process alive."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__(name=f"follower of {tracker.name}", daemon=True)
        self.tracker = tracker
        self.complete = False  # closed, and everything carried
        self._wake = threading.Event()
        self._closing = False
        self._given_up = False
        self._failures = 0  # in a row

    def run(self) -> None:
        while not self._given_up:
            last_pass = self._closing  # one that begins after the last record finds them all
            if self._pass() and last_pass:
                self.complete = True
                return
            self._wait(self._pause())

    def ask_to_close(self) -> None:
        """Carry what is there, then end."""
        self._closing = True
        self._wake.set()

    def give_up(self) -> None:
        self._given_up = True
        self._wake.set()

    def _pass(self) -> bool:
        """Carry everything that is there. Whether that was possible."""
        try:
            while not self._given_up and self.tracker.carry():
                pass
        except Busy:
            return False
        except Exception as error:
            self._failures += 1
            if self._failures == 1:
                logger.warning(
                    "%s: %s; training goes on and the journal keeps everything; trying again",
                    self.tracker.name,
                    cause(error),
                )
            return False
        if self._failures:
            logger.warning("%s: reached again, nothing was lost", self.tracker.name)
        self._failures = 0
        return True

    def _pause(self) -> float:
        if self._closing:
            return min(1.0, self.tracker.every_seconds)
        return min(self.tracker.every_seconds * 2.0 ** min(self._failures, 10), LONGEST_WAIT_S)

    def _wait(self, seconds: float) -> None:
        """Wait, but not through a call of ask_to_close or give_up."""
        self._wake.wait(seconds)
        self._wake.clear()


class Followers:
    """The followers of one run."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._followers = [Follower(tracker) for tracker in trackers]
        for follower in self._followers:
            follower.start()

    def close(self, deadline_s: float | None = None) -> bool:
        """Wait until everything is carried, at most `deadline_s` (default: each tracker's `close_seconds`).

        False where something is left. Called after the journal's last record; never raises.
        """
        for follower in self._followers:
            follower.ask_to_close()
        began = time.monotonic()
        for follower in self._followers:
            allowed = follower.tracker.close_seconds if deadline_s is None else deadline_s
            follower.join(max(0.0, allowed - (time.monotonic() - began)))
            follower.give_up()
            if not follower.complete:
                logger.warning(
                    "%s: the end of the run has not been carried; `pretrain track-sync RUN` does it from the journal",
                    follower.tracker.name,
                )
        return all(follower.complete for follower in self._followers)

    def alive(self) -> bool:
        """Whether a follower is still at work; after `close` has given up, for as long as its request takes."""
        return any(follower.is_alive() for follower in self._followers)


def cause(error: BaseException) -> str:
    """An error in one line, without secrets: its type and the beginning of its message."""
    text = " ".join(str(error).split())
    return mask_text(f"{type(error).__name__}: {text[:200]}{'…' if len(text) > 200 else ''}")


def carry_all(tracker: Tracker, progress: Callable[[], None], patience_s: float = 60.0) -> None:
    """Carry everything now, in this thread. Raises what the tracker raises, and Busy after `patience_s` of others."""
    busy_since: float | None = None
    while True:
        try:
            if not tracker.carry():
                return
            busy_since = None
            progress()
        except Busy:
            busy_since = busy_since or time.monotonic()
            if time.monotonic() - busy_since > patience_s:
                raise
            time.sleep(0.2)
