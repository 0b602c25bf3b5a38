"""The job on this machine: its ranks are processes of ours, in the foreground."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import BinaryIO, Literal

from pydantic import Field

from configs import Float, Int, Section
from launch.alone import alone
from launch.attempts import BEGUN, STOP, Attempt, newest_step, read_attempts, same_submission, write_once
from launch.ends import close_lost, record
from launch.job import ATTEMPT, Job, log, new_folder
from launch.notice import Notice, tell
from launch.policy import End, Rules, decide, verdict

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
POLL_S = 0.1
PR_SET_PDEATHSIG = 1  # prctl(2): the signal that a process gets when its parent ends


class Local(Section):
    """Ranks on this machine. Their output goes to RUN/logs/attempt-<n>/rank-<r>.log, rank 0's to stderr as well."""

    kind: Literal["local"] = "local"
    ranks: Int = Field(1, ge=1)
    restarts: Int = Field(0, ge=0)  # how often a run that failed, hung or made no headway is started again; 0: never
    crash_loop: Int = Field(3, ge=2)  # so many bad ends in a row without a newer checkpoint end the submission
    grace_s: Float = Field(10.0, ge=0)  # from a rank's bad end to TERM for the others, and from there to KILL
    notice: Notice | None = None

    def show(self, job: Job) -> str:
        """What `start` would run."""
        return "\n".join(
            " ".join(f"{key}={value}" for key, value in _environment(rank, self.ranks, "FREE").items())
            + f" {shlex.join([sys.executable, *job.arguments])}"
            for rank in range(self.ranks)
        )

    def start(self, job: Job) -> int:
        """Run the job to its end and return its exit code: the worst of those with which ranks ended by themselves.

        A signal to this process goes on to the ranks and ends the restarts.
        """
        with alone(job.run_folder):
            job.write(self)
            return self._run(job)

    def _run(self, job: Job) -> int:
        rules = Rules("here", self.restarts, self.crash_loop)
        for line in close_lost(job.run_folder, rules):
            log(line)
        told: list[int] = []

        def note(number: int, frame: FrameType | None) -> None:
            told.append(number)

        before = {number: signal.signal(number, note) for number in FORWARDED}
        try:
            while True:
                attempt = self._begin(job)
                code, words = self._attempt(job, attempt, told)
                stop = bool(told) or (job.folder / STOP).exists()
                end = End(code, words=words, step=newest_step(job.run_folder), stop=stop)
                decision = decide(end, self._attempts(job), rules)
                record(attempt, end, decision)
                log(f"attempt {attempt.number} ended with exit {decision.exit_code}: {decision.why}")
                for line in tell(attempt, decision, end.exit_code):
                    log(line)
                if decision.action != "restart":
                    return decision.exit_code
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _attempts(self, job: Job) -> list[Attempt]:
        return same_submission(read_attempts(job.logs), job.number)

    def _begin(self, job: Job) -> Attempt:
        """Take an attempt, and write down that it begins."""
        folder = new_folder(job.logs, "attempt-")
        attempt = Attempt(folder, int(folder.name.removeprefix("attempt-")))
        write_once(folder / BEGUN, {
            "attempt": attempt.number, "launcher": "local", "job": None, "submission": job.number,
            "restarts": len(self._attempts(job)), "nodes": [socket.gethostname()], "ranks": self.ranks,
            "began": time.time(), "queued": None, "host": socket.gethostname(), "pid": os.getpid(),
        })  # fmt: skip
        return attempt

    def _attempt(self, job: Job, attempt: Attempt, told: list[int]) -> tuple[int, str]:
        """Start every rank and wait until all have ended: the exit code, and the last words of a rank that failed."""
        folder = attempt.folder
        log(f"{self.ranks} rank(s), output in {folder}")
        port = _free_port()
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(self.ranks):
                environment = os.environ | _environment(rank, self.ranks, port) | {ATTEMPT: str(attempt.number)}
                ranks.append(_spawn([sys.executable, *job.arguments], environment, folder / f"rank-{rank}.log"))
            with (folder / "rank-0.log").open("rb") as output:
                own = self._wait(ranks, told, output)
        finally:
            for process in ranks:
                _kill(process)
        first = next(((rank, code) for rank, code in own.items() if code), None)
        words = attempt.words_of(first[0], "", f"exit {first[1]}") if first else ""
        return verdict(list(own.values()), self.ranks), words

    def _wait(self, ranks: list[subprocess.Popen[bytes]], told: list[int], output: BinaryIO) -> dict[int, int]:
        """The exit codes of those ranks that ended before we ended them, in the order in which they ended."""
        forwarded, own = 0, dict[int, int]()
        steps, deadline = [signal.SIGTERM, signal.SIGKILL], math.inf  # against ranks that go on after another's bad end
        while left := [str(rank) for rank, process in enumerate(ranks) if process.poll() is None]:
            for number in told[forwarded:]:
                _signal(ranks, number)
            forwarded = len(told)
            if len(steps) == 2:
                own |= _ended(ranks, own)
            if deadline == math.inf and any(own.values()):
                deadline = time.monotonic() + self.grace_s
            if steps and time.monotonic() > deadline:
                log(f"rank(s) {', '.join(left)} went on without the others: {steps[0].name}")
                _signal(ranks, steps.pop(0))
                deadline = time.monotonic() + self.grace_s
            _show(output)
            time.sleep(POLL_S)
        if len(steps) == 2:
            own |= _ended(ranks, own)
        _show(output)
        return own


def _ended(ranks: list[subprocess.Popen[bytes]], known: dict[int, int]) -> dict[int, int]:
    """The exit codes of the ranks that have ended since; a signal's is that of any failure."""
    new = {}
    for rank, process in enumerate(ranks):
        code = process.poll()
        if code is None or rank in known:
            continue
        new[rank] = code if code >= 0 else 1
        if code:
            log(f"rank {rank} ended with {f'exit {code}' if code > 0 else signal.Signals(-code).name}")
    return new


def _environment(rank: int, ranks: int, port: str) -> dict[str, str]:
    """What torchrun sets, and a fair share of the cores for torch's threads."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }


def _spawn(command: list[str], environment: dict[str, str], output: Path) -> subprocess.Popen[bytes]:
    """A process in a group of its own, that ends with this one. It writes to its file itself, so its log is whole
    whatever becomes of us."""
    with output.open("ab") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment,
            process_group=0,
            preexec_fn=_die_with(os.getpid()),
        )


def _die_with(parent: int) -> Callable[[], None]:
    """What a child does before it becomes the rank: ask Linux to kill it when its parent is gone."""
    if not sys.platform.startswith("linux"):
        return lambda: None
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it went before we asked
            os._exit(1)

    return ask


def _signal(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    for process in ranks:
        process.send_signal(number)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a rank and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _show(output: BinaryIO) -> None:
    """Pass on what was written since the last call."""
    if text := output.read():
        sys.stderr.write(text.decode(errors="replace"))
        sys.stderr.flush()


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
