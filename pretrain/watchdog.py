"""The watchdog: ends a rank that makes no progress, with every rank's stack in its log and the suspect named.

Every rank beats: at each step, batch of an evaluation, and wait for a save. A thread of each rank publishes its beats
in the store of the rendezvous. When a rank has not beaten for the timeout, all ranks write their stacks, look whose
thread no longer publishes (its process is stopped, its node is gone), else who is behind, and end with exit 4. A rank
whose interpreter is stuck in native code cannot run the thread: Python's fault handler, which needs no interpreter,
then writes its stacks and ends it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from torch.distributed import Store  # type: ignore[attr-defined]

from pretrain.guard import HUNG
from pretrain.ranks import Ranks
from pretrain.suspects import accuse

log = logging.getLogger("pretrain")

STORE_TIMEOUT = timedelta(seconds=5)


@dataclass(frozen=True)
class Beat:
    """A rank's last sign of progress."""

    count: int  # beats so far
    phase: str
    step: int
    published: int = 0  # how often the thread has published: it stands still where the process does


class Watchdog:
    """Watches this rank, and asks the others' watchdogs when it is stuck."""

    def __init__(self, ranks: Ranks, run_folder: Path, timeout_s: float) -> None:
        self.ranks, self.run_folder, self.timeout_s = ranks, run_folder, timeout_s
        self.interval_s = min(5.0, timeout_s / 5)
        self.on_hang: Callable[[int, str], None] = lambda step, why: None
        self._beat, self._at = Beat(0, "start", 0), time.monotonic()
        self._store: Store | None = None
        self._thread = threading.Thread(target=self._watch, name="longhaul-watchdog", daemon=True)
        self._thread.start()

    def beat(self, phase: str, step: int) -> None:
        """This rank makes progress."""
        self._beat, self._at = Beat(self._beat.count + 1, phase, step), time.monotonic()

    @property
    def where(self) -> str:
        """What this rank is at, as `evaluation at step 20`."""
        return f"{self._beat.phase} at step {self._beat.step}"

    def _watch(self) -> None:
        published = 0
        with contextlib.suppress(Exception):
            self._store = self.ranks.another_store(STORE_TIMEOUT)
        while True:
            faulthandler.dump_traceback_later(self.timeout_s + 10 * self.interval_s + 60, exit=True)
            published += 1
            self._publish(published)
            late = time.monotonic() - self._at > self.timeout_s
            if late or self._somebody_hangs():
                self._end(late)
            time.sleep(self.interval_s)

    def _publish(self, published: int) -> None:
        beat = Beat(self._beat.count, self._beat.phase, self._beat.step, published)
        if self._store is not None:
            with contextlib.suppress(Exception):
                self._store.set(f"beat/{self.ranks.rank}", json.dumps(asdict(beat)))

    def _somebody_hangs(self) -> bool:
        try:
            return self._store is not None and self._store.check(["hang"])
        except Exception:
            return False  # rank 0 is gone or stopped: this rank's own timeout will tell

    def _end(self, late: bool) -> None:
        """Write the stacks, name the suspect, and end this process."""
        seconds = time.monotonic() - self._at
        me = f"rank {self.ranks.rank} ({self.ranks.hosts[self.ranks.rank]})"
        log.error("%s made no progress for %.0f s, in %s; its stacks follow", me, seconds, self.where)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        if late and self._store is not None:
            with contextlib.suppress(Exception):
                self._store.set("hang", "1")
        suspects, why = self._suspects()
        log.error("%s", why)
        if self.ranks.rank == min(set(range(self.ranks.size)) - set(suspects), default=0):
            for rank in suspects:
                accuse(self.run_folder, rank, self.ranks.hosts[rank], f"hang: {why}")
        self.on_hang(self._beat.step, why)
        time.sleep(3 * self.interval_s)  # the launcher ends all ranks with the first: let them write
        sys.stderr.flush()
        os._exit(HUNG)

    def _suspects(self) -> tuple[list[int], str]:
        """The ranks that hold up the others, and a line that says so."""
        if self._store is None:
            return [], "this rank is alone"
        before = self._beats()
        time.sleep(2.5 * self.interval_s)
        self._publish(10**9)
        beats = self._beats()
        if not beats:
            return [0], f"hang: rank 0 ({self.ranks.hosts[0]}) does not answer: stopped, or its node is gone"
        everyone = range(self.ranks.size)
        still = [r for r in everyone if r not in beats or (r in before and beats[r].published == before[r].published)]
        if still:
            return still, f"hang: {self._names(still)} shows no sign of life: stopped, or its node is gone"
        least = min(beat.count for beat in beats.values())
        behind = [rank for rank, beat in beats.items() if beat.count == least]
        if len(behind) == self.ranks.size:
            return [], "hang: every rank waits at the same place"
        first = beats[behind[0]]
        return behind, f"hang: {self._names(behind)} is behind the others, in {first.phase} at step {first.step}"

    def _beats(self) -> dict[int, Beat]:
        """The beats of all ranks that have published; nothing where the store is away."""
        found = {}
        try:
            for rank in range(self.ranks.size):
                if self._store is not None and self._store.check([f"beat/{rank}"]):
                    found[rank] = Beat(**json.loads(self._store.get(f"beat/{rank}")))
        except Exception:
            return {}
        return found

    def _names(self, ranks: list[int]) -> str:
        return ", ".join(f"rank {rank} ({self.ranks.hosts[rank]})" for rank in ranks)
