"""The process that follows the journal: one per run, started by rank 0, so that the training loop never waits for it.

The client of a tracker is a lot of Python: MLflow's takes 0.13 ms of processor per metric on sqlite, and seconds to be
imported. In a thread of the training process it would hold the interpreter lock that the loop needs; here a thread only
passes on what the process says. The process outlives a crash of the loop by the trackers' `close_seconds` at most, to
carry the end.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from configs import Section
from pretrain.track.follower import Followers, Tracker

logger = logging.getLogger(__name__)

NICE = 10  # the loop goes first
GRACE_S = 1.0  # to hear the last words of a process that has given up
# Meant for the loop, and sent by launchers to every process of a job.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Trackers:
    """Follows the journal of a run in a process of its own. With no trackers, nothing. Never raises."""

    def __init__(self, track: Sequence[Section], run_folder: Path) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._listener: threading.Thread | None = None
        self._complete = not track
        self._closing = False
        self._longest_close_s = max((getattr(config, "close_seconds", 0.0) for config in track), default=0.0)
        if not track:
            return
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        order = {
            "track": [config.model_dump(mode="json") for config in track],
            "run_folder": str(run_folder.absolute()),
        }
        try:
            with _blocked(SIGNALS):  # a process begins with the mask of its parent
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-W", "ignore", "-m", "pretrain.track"],
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            self._say(json.dumps(order))
        except OSError as error:
            logger.warning("trackers: no process can be started: %s; %s", error, _REMEDY)
            return
        self._listener = threading.Thread(target=self._listen, name="trackers", daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def close(self, deadline_s: float | None = None) -> bool:
        """Wait until everything is carried, at most `deadline_s` (default: each tracker's `close_seconds`).

        False where something is left. Called after the journal's last record.
        """
        if self._process is None or self._listener is None:
            return self._complete
        self._closing = True
        with contextlib.suppress(OSError):
            self._say("close" if deadline_s is None else f"close {deadline_s}")
        self._listener.join((self._longest_close_s if deadline_s is None else deadline_s) + GRACE_S)
        return self._complete

    def _say(self, line: str) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def _listen(self) -> None:
        """Pass on what the process logs, and note whether it could finish."""
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            word = json.loads(line)
            if "complete" in word:
                self._complete = word["complete"]
            else:
                logger.log(word["level"], "%s", word["message"])
        exit_code = self._process.wait()
        if not self._closing:
            logger.warning("trackers: their process has ended (exit %s); %s", exit_code, _REMEDY)


_REMEDY = "training goes on and the journal keeps everything; `pretrain track-sync RUN` carries it"


@contextlib.contextmanager
def _blocked(signals: Sequence[signal.Signals]) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow(trackers: Sequence[Tracker], orders: IO[str], answers: IO[str]) -> None:
    """The life of the process: follow until told to close, or until the loop's process is gone."""
    os.nice(NICE)
    logging.basicConfig(level=logging.INFO, handlers=[_Answers(answers)])
    followers = Followers(trackers)
    order = orders.readline().split()  # nothing: the other end of the pipe was closed
    complete = followers.close(float(order[1]) if len(order) > 1 else None)
    with contextlib.suppress(OSError):
        print(json.dumps({"complete": complete}), file=answers, flush=True)
    os._exit(0)  # a request that hangs keeps nothing alive


class _Answers(logging.Handler):
    """Sends log records to the training process, which may be gone."""

    def __init__(self, answers: IO[str]) -> None:
        super().__init__()
        self._answers = answers

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("pretrain.") or record.levelno >= logging.WARNING:
            with contextlib.suppress(OSError):
                word = {"level": record.levelno, "message": record.getMessage()}
                print(json.dumps(word), file=self._answers, flush=True)
