"""The ranks of an attempt as forks of this process, which has imported everything: a start takes a second, not ten.

What a rank runs is `pretrain train` itself. As under `srun --kill-on-bad-exit`, the first rank that ends badly takes
the others with it. The process that forks must not have threads.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from tests.processes import environment, free_port

GRACE_S = 20.0  # from a rank's bad end by itself to the end of the others: they may have something to say


def import_everything() -> None:
    """What every rank would import by itself."""
    import tests.imported  # noqa: F401


class Fleet:
    """The ranks of one attempt, started."""

    def __init__(self, config: Path, ranks: int, *overrides: str, fault: str = "") -> None:
        self.log = config.parent / f"attempt.{time.time_ns()}.log"
        port = free_port()
        self.began = time.time()
        self.running = {self._fork(config, overrides, rank, ranks, port, fault): rank for rank in range(ranks)}
        self.codes: dict[int, int] = {}  # by rank, -9 after a SIGKILL
        self._ends_at = float("inf")

    def kill(self, rank: int | None = None) -> None:
        """SIGKILL one rank, or all that still run."""
        for pid, number in self.running.items():
            if rank in (None, number):
                os.kill(pid, signal.SIGKILL)

    def poll(self) -> bool:
        """Whether all ranks have ended."""
        for pid, rank in list(self.running.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                del self.running[pid]
                self.codes[rank] = os.waitstatus_to_exitcode(status)
                wait = 0.0 if self.codes[rank] < 0 else GRACE_S
                if self.codes[rank]:
                    self._ends_at = min(self._ends_at, time.monotonic() + wait)
        if self.running and time.monotonic() > self._ends_at:
            self.kill()
        return not self.running

    def wait(self, seconds: float) -> bool:
        """Wait for the end of all ranks, at most so long; whether they have ended."""
        deadline = time.monotonic() + seconds
        while not self.poll():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    @property
    def text(self) -> str:
        """What all ranks have written."""
        return self.log.read_text(errors="replace")

    def _fork(self, config: Path, overrides: tuple[str, ...], rank: int, ranks: int, port: int, fault: str) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            os.environ |= environment(rank, ranks, port) | {"LONGHAUL_FAIL_AT": fault}
            file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.argv = ["pretrain", "train", str(config), *overrides]
            from pretrain.cli import main

            main()
        finally:
            os._exit(1)
