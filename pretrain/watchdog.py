"""The watchdog: ends a rank that makes no progress, with every rank's stack in its log and the suspect named.

Every rank beats: at each step, batch of an evaluation, and wait for a save. One thread watches the time since the last
beat; another, the gossip, publishes the beats in the store of the rendezvous, where it may block when rank 0 is away.
When a rank has not beaten for the timeout, all ranks write their stacks, look whose gossip is silent (its process is
stopped, its node is gone), else who is behind, and end with exit 4. A rank that is stuck in native code and holds the
interpreter cannot run the thread: Python's fault handler, which needs no interpreter, then writes its stacks and ends
it with exit 1.
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
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

from torch.distributed import Store  # type: ignore[attr-defined]

from data_pipeline.failpoints import fail_at
from pretrain.guard import HUNG
from pretrain.ranks import Ranks
from pretrain.suspects import accuse

log = logging.getLogger("pretrain")

STORE_TIMEOUT = timedelta(seconds=60)
READINGS = 4  # of everyone's beats, an interval apart: who has not published from the first to the last is silent


@dataclass(frozen=True)
class Beat:
    """A rank's last sign of progress."""

    count: int  # beats so far
    phase: str
    step: int
    published: int = 0  # how often it has been published: stands still where the process does


NEVER = Beat(0, "start", 0, -1)


class Gossip(threading.Thread):
    """Publishes this rank's beats, hears the alarm of any rank, and reads everyone's beats when asked to."""

    def __init__(self, ranks: Ranks, interval_s: float, beat: Callable[[], Beat]) -> None:
        super().__init__(name="longhaul-gossip", daemon=True)
        self.ranks, self.interval_s, self.beat = ranks, interval_s, beat
        self.published = 0
        self.alarm = False  # some rank hangs
        self.sounds_alarm = False  # this one does
        self.readings: list[dict[int, Beat]] | None = None
        self.has_read = False  # and may be left alone
        self.readers: set[int] = set()  # the ranks that have

    def run(self) -> None:
        while self.ranks.size > 1:
            with contextlib.suppress(Exception):  # rank 0 is away, for a moment or for good
                self._talk(self.ranks.another_store(STORE_TIMEOUT))
            time.sleep(self.interval_s)

    def _talk(self, store: Store | None) -> None:
        """Until the store fails."""
        while store is not None:
            self.published += 1
            store.set(f"beat/{self.ranks.rank}", json.dumps(asdict(replace(self.beat(), published=self.published))))
            if self.sounds_alarm:
                store.set("hang", "1")
            self.alarm = self.alarm or store.check(["hang"])
            if self.readings is not None:
                self.readings.append(self._read(store))
            if self.has_read:
                store.set(f"read/{self.ranks.rank}", "1")
                self.readers = {rank for rank in range(self.ranks.size) if store.check([f"read/{rank}"])}
            time.sleep(self.interval_s)

    def listen(self) -> list[dict[int, Beat]]:
        """READINGS of everyone's beats; fewer where rank 0 does not answer."""
        self.readings = []
        deadline = time.monotonic() + 2 * READINGS * self.interval_s + 5
        while len(self.readings) < READINGS and time.monotonic() < deadline:
            time.sleep(self.interval_s / 5)
        return list(self.readings)

    def wait_for(self, others: set[int]) -> None:
        """Until these ranks have read the beats too: a rank that ends takes its connections, rank 0 the store."""
        self.has_read = True
        deadline = time.monotonic() + 8 * self.interval_s
        while not others <= self.readers and time.monotonic() < deadline:
            time.sleep(self.interval_s / 5)

    def _read(self, store: Store) -> dict[int, Beat]:
        keys = {rank: f"beat/{rank}" for rank in range(self.ranks.size)}
        return {rank: Beat(**json.loads(store.get(key))) for rank, key in keys.items() if store.check([key])}


class Watchdog:
    """Watches this rank, and asks the others' watchdogs when it is stuck."""

    def __init__(self, ranks: Ranks, run_folder: Path, start_timeout_s: float, timeout_s: float) -> None:
        self.ranks, self.run_folder, self.timeout_s = ranks, run_folder, timeout_s
        self.start_timeout_s = start_timeout_s
        self.limit_s = max(start_timeout_s, timeout_s)  # until `started`
        self._stopped = self._ending = False
        self.interval_s = min(5.0, timeout_s / 5)
        self.on_hang: Callable[[int, str], None] = lambda step, why: None
        self._beat, self._at = Beat(0, "start", 0), time.monotonic()
        self._gossip = Gossip(ranks, self.interval_s, lambda: self._beat)
        self._gossip.start()
        self._thread = threading.Thread(target=self._watch, name="longhaul-watchdog", daemon=True)
        self._thread.start()

    def beat(self, phase: str, step: int) -> None:
        """This rank makes progress."""
        self._beat, self._at = Beat(self._beat.count + 1, phase, step), time.monotonic()

    def alive(self) -> None:
        """This rank waits for something that may take long, which is no progress of the run but no hang either."""
        self._at = time.monotonic()

    def starting(self) -> None:
        """A start is going on, in which the longer time counts."""
        self._at, self.limit_s = time.monotonic(), max(self.start_timeout_s, self.timeout_s)

    def started(self) -> None:
        """The first step is done: from now on the shorter time counts."""
        self.limit_s = self.timeout_s

    def stop(self) -> None:
        """What comes now has limits of its own."""
        self._stopped = True
        faulthandler.cancel_dump_traceback_later()

    def wait_if_it_ends(self) -> None:
        """Where it is ending this process, which it then does; what is raised meanwhile comes of the others' ends."""
        if self._ending:
            self._thread.join()

    @property
    def where(self) -> str:
        """What this rank is at, as `evaluation at step 20`."""
        return f"{self._beat.phase} at step {self._beat.step}"

    def _watch(self) -> None:
        while not self._stopped:
            faulthandler.dump_traceback_later(self.limit_s + 20 * self.interval_s + 60, exit=True)
            late = time.monotonic() - self._at > self.limit_s
            if (late or self._gossip.alarm) and not self._stopped:
                self._end(late)
            time.sleep(self.interval_s)
        faulthandler.cancel_dump_traceback_later()

    def _end(self, late: bool) -> None:
        """Write the stacks, name the suspect, and end this process."""
        self._ending = True
        seconds = time.monotonic() - self._at
        me = f"rank {self.ranks.rank} ({self.ranks.hosts[self.ranks.rank]})"
        log.error("%s made no progress for %.0f s, in %s; its stacks follow", me, seconds, self.where)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        self._gossip.sounds_alarm = late
        fail_at("watchdog.stacks")
        suspects, why = self._suspects()
        log.error("%s", why)
        if self.ranks.rank == min(set(range(self.ranks.size)) - set(suspects), default=0):
            for rank in suspects:
                accuse(self.run_folder, rank, self.ranks.hosts[rank], f"hang: {why}")
        self.on_hang(self._beat.step, why)
        self._gossip.wait_for(set(range(self.ranks.size)) - set(suspects))  # the launcher ends all with the first
        sys.stderr.flush()
        os._exit(HUNG)

    def _suspects(self) -> tuple[list[int], str]:
        """The ranks that hold up the others, and a line that says so."""
        if self.ranks.size == 1:
            return [], "hang: this rank is the only one"
        readings = self._gossip.listen()
        if len(readings) < READINGS:
            return [0], f"hang: {self._names([0])} does not answer: stopped, or its node is gone"
        first, last = readings[0], readings[-1]
        known = {rank: last[rank].published for rank in last if rank in first}
        silent = [rank for rank in range(self.ranks.size) if known.get(rank, -1) == first.get(rank, NEVER).published]
        if silent:
            return silent, f"hang: {self._names(silent)} shows no sign of life: stopped, or its node is gone"
        least = min(beat.count for beat in last.values())
        behind = [rank for rank, beat in last.items() if beat.count == least]
        if len(behind) == self.ranks.size:
            return [], "hang: every rank waits at the same place"
        where = f"{last[behind[0]].phase} at step {last[behind[0]].step}"
        return behind, f"hang: {self._names(behind)} is behind the others, in {where}"

    def _names(self, ranks: list[int]) -> str:
        return ", ".join(f"rank {rank} ({self.ranks.hosts[rank]})" for rank in ranks)
