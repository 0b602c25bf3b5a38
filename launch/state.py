"""In which state a run is: as SLURM says, else as its files and the processes of this machine say."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import psutil

from launch.attempts import Attempt
from launch.history import History
from launch.queue import ENDING, PENDING, Answer, QueuedJob
from pretrain.guard import CRASH_LOOP, DONE, GAVE_UP, INTERRUPTED, STOPPED
from pretrain.track.journal import Record

STATES = {
    "pending": "in the queue, for the first time or again",
    "starting": "an attempt has begun, and made no step yet",
    "running": "makes steps",
    "stalled": "runs, but has recorded nothing for far longer than its steps take",
    "stopping": "asked to stop; it saves and ends",
    "ending": "its ranks have ended, and its job or launcher is about to",
    "done": "has had its tokens",
    "stopped": "stopped on purpose, to be submitted again at will",
    "failed": "ended badly, and is not started again by itself",
    "gave_up": "the guard gave up: NaN, spikes",
    "crash_loop": "came to nothing several times in a row",
    "cancelled": "its job was cancelled",
    "lost": "nothing of it lives, and nobody wrote why",
    "unknown": "SLURM does not answer, and the files do not tell",
}
BY_EXIT_CODE = {
    DONE: "done",
    STOPPED: "stopped",
    INTERRUPTED: "stopped",
    GAVE_UP: "gave_up",
    CRASH_LOOP: "crash_loop",
}
CLOCK_SLACK_S = 5.0  # by which a process may seem to have begun after it wrote that it had


@dataclass(frozen=True)
class State:
    """`name` is one of STATES; `detail` says more in a few words."""

    name: str
    detail: str = ""
    jobs: tuple[QueuedJob, ...] = ()  # of it, those that SLURM has not done with
    pid: int | None = None  # of its launcher, or of rank 0 without one, on this machine
    alive: bool = False

    @property
    def over(self) -> bool:
        """Nothing of it runs, waits or may do so."""
        return not self.alive and self.name != "unknown"


def find_state(history: History, answer: Answer, newest: list[Record], owner: dict[str, Any], fresh: bool) -> State:
    """The state of a run.

    `newest` are the records of its newest branch, `owner` that branch's record in the lineage; `fresh` tells whether
    the newest record is younger than a stall.
    """
    jobs = tuple(job for id in history.jobs if (job := answer.jobs.get(id)) is not None and job.alive)
    if running := [job for job in jobs if job.state not in PENDING | ENDING]:
        detail = ", ".join(job.state.lower() for job in running if job.state != "RUNNING")
        return State(_running(history, newest, fresh), detail, jobs, alive=True)
    if jobs:
        job = next((job for job in jobs if job.state in PENDING), jobs[0])
        if job.state in ENDING:
            return State("ending", jobs=jobs, alive=True)
        return State("pending", _waits(job), jobs, alive=True)
    if (pid := _process(history, newest, owner)) is not None:
        return State(_running(history, newest, fresh), pid=pid, alive=True)
    unseen = answer.silent if answer.silent is not None and _may_live(history) else _elsewhere(history, newest, owner)
    if unseen:
        return (
            State(_running(history, newest, fresh), unseen, alive=True)
            if newest and fresh
            else State("unknown", unseen)
        )
    return _over(history, answer, newest)


def _running(history: History, newest: list[Record], fresh: bool) -> str:
    if history.attempts and history.attempts[-1].ended.get("action") in ("done", "stop"):
        return "ending"
    if history.stop_asked:
        return "stopping"
    if history.attempts and history.attempts[-1].ended:
        return "starting"  # the next one
    if not (_is_of(newest, history.attempts[-1:]) and any(record.type == "step" for record in newest)):
        return "starting"
    return "running" if fresh else "stalled"


def _is_of(newest: list[Record], last: list[Attempt]) -> bool:
    """Whether the newest branch is that of the last attempt, or of one that no launcher began."""
    number = newest[0].fields.get("attempt") if newest else None
    return bool(newest) and (number is None or not last or number == last[0].number)


def _waits(job: QueuedJob) -> str:
    if job.state != "PENDING":
        return job.state.lower().replace("_", " ")
    return {"BeginTime": "SLURM's delay before a restart", "Dependency": "behind the job before it"}.get(
        job.reason, job.reason
    )


def _process(history: History, newest: list[Record], owner: dict[str, Any]) -> int | None:
    """The process on this machine that runs it."""
    pid, host, since = _claim(history, newest, owner)
    return _alive(pid, since) if host == socket.gethostname() else None


def _elsewhere(history: History, newest: list[Record], owner: dict[str, Any]) -> str:
    """In a few words, the process on another machine that may run it."""
    pid, host, _ = _claim(history, newest, owner)
    return f"process {pid} on {host} runs it, or was lost" if host and host != socket.gethostname() else ""


def _claim(history: History, newest: list[Record], owner: dict[str, Any]) -> tuple[object, object, object]:
    """(pid, host, since when) of who runs it by itself: its local launcher, or rank 0 of a bare `pretrain train`."""
    last = history.attempts[-1] if history.attempts else None
    if last is not None and last.begun.get("launcher") == "local":
        over = last.ended.get("action", "restart") != "restart"
        return (None, None, None) if over else (last.begun.get("pid"), last.begun.get("host"), last.begun.get("began"))
    if last is not None or history.jobs or any(record.type == "end" for record in newest):
        return None, None, None
    return owner.get("pid"), owner.get("host"), owner.get("time")


def _alive(pid: object, since: object) -> int | None:
    """The process, if it is not gone, and not a younger one of the same number."""
    if not isinstance(pid, int) or pid <= 0:
        return None
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        younger = isinstance(since, int | float) and process.create_time() > since + CLOCK_SLACK_S
    except psutil.Error:
        return None
    return None if younger else pid


def _may_live(history: History) -> bool:
    """Whether a job of it may live that SLURM says nothing of."""
    if not history.jobs:
        return False
    last = history.attempts[-1] if history.attempts else None
    if last is None or (history.submissions and history.submissions[-1].number != last.submission):
        return True
    return bool(last.ended.get("action", "restart") == "restart")


def _over(history: History, answer: Answer, newest: list[Record]) -> State:
    last = history.attempts[-1] if history.attempts else None
    words = _final_words(history.jobs, answer)
    if not newest and last is None:
        return State("cancelled" if "cancelled" in words or history.stop_asked else "lost", words)
    end = last.ended if last is not None else {}
    if not end and newest and newest[-1].type == "end" and _is_of(newest, history.attempts[-1:]):
        end = newest[-1].fields
    code = end.get("exit_code")
    if not isinstance(code, int):
        if history.stop_asked:
            return State("stopped", words or "its last attempt did not say how it ended")
        return State("cancelled" if "cancelled" in words else "lost", words)
    if end.get("action") == "restart" and not history.stop_asked:
        return State(
            "cancelled" if "cancelled" in words else "lost", f"was to be started again; {words or 'nobody did'}"
        )
    why = str(end.get("why", ""))
    return State(BY_EXIT_CODE.get(code, "failed"), why if code == DONE or not why else f"{why} (exit {code})")


def _final_words(jobs: Iterable[str], answer: Answer) -> str:
    """What SLURM says of the last job that it still knows."""
    known = [job for id in jobs if (job := answer.jobs.get(id)) is not None]
    return f"job {known[-1].id} {known[-1].state.lower().replace('_', ' ')}" if known else ""
