"""Questions to SLURM and orders to it, each with a limit of seconds: a controller that is away must hang nobody."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

TIMEOUT_S = 5.0
DEFAULT_ARRAY_SIZE = 1001
PENDING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
RUNNING = {"RUNNING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"}
ENDING = {"COMPLETING"}
LIVE = PENDING | RUNNING | ENDING
STOP_SIGNAL = "USR2"


@dataclass(frozen=True)
class QueuedJob:
    """A job as SLURM sees it. `state` in SLURM's words, as RUNNING or CANCELLED."""

    id: str
    state: str
    reason: str = ""  # why it waits, in SLURM's words
    submitted: float | None = None  # epoch; also when it was put back into the queue

    @property
    def alive(self) -> bool:
        return self.state in LIVE


@dataclass(frozen=True)
class Answer:
    """What SLURM said of some jobs; `silent` says why nothing could be learned of those that are missing."""

    jobs: dict[str, QueuedJob] = field(default_factory=dict)
    silent: str | None = None


def ask(ids: Sequence[str]) -> Answer:
    """The state of jobs: from the controller, and from the accounting for those that it has forgotten."""
    if not ids:
        return Answer()
    output, problem = _call(["squeue", "--noheader", "--states=all", f"--jobs={','.join(ids)}", "--format=%i|%T|%V|%r"])
    if problem is not None and "invalid job id" in problem.lower():
        output, problem = "", None
    jobs = {job.id: job for job in map(_queued, output.splitlines()) if job is not None and job.id in ids}
    silent = problem
    if forgotten := [id for id in ids if id not in jobs]:
        output, unaccounted = _call(
            [
                "sacct",
                "--noheader",
                "--parsable2",
                "--allocations",
                f"--jobs={','.join(forgotten)}",
                "--format=JobID,State",
            ]
        )
        jobs |= {job.id: job for job in map(_accounted, output.splitlines()) if job is not None and job.id in forgotten}
        if silent is not None and unaccounted is None and all(id in jobs for id in ids):
            silent = None
    return Answer(jobs, silent)


def max_array_size() -> int:
    """How many tasks an array may have; where SLURM does not say, its own default."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _call(["scontrol", "show", "config"])[0], re.MULTILINE)
    return max(1, int(found[1])) if found else DEFAULT_ARRAY_SIZE


def count_states(ids: Sequence[str]) -> tuple[Counter[str], str | None]:
    """How many jobs and tasks of arrays are in each state, ended ones left out; and what went wrong, or None."""
    if not ids:
        return Counter(), None
    output, problem = _call(["squeue", "--noheader", "--array", f"--jobs={','.join(ids)}", "--format=%T"])
    if problem is not None and "invalid job id" in problem.lower():
        problem = None  # forgotten: they have ended
    return Counter(output.split()), problem


def cancel(ids: Sequence[str]) -> str | None:
    """End jobs and arrays, those that wait and those that run. What went wrong, or None."""
    return _call(["scancel", *ids])[1] if ids else None


def cancel_pending(ids: Iterable[str]) -> str | None:
    """Cancel those of the jobs that wait. What went wrong, or None."""
    return _call(["scancel", "--state=PENDING", *ids])[1]


def tell_to_stop(ids: Iterable[str]) -> str | None:
    """Send the ranks, not the batch shell, the signal to save and stop. What went wrong, or None."""
    return _call(["scancel", f"--signal={STOP_SIGNAL}", *ids])[1]


def _call(command: list[str]) -> tuple[str, str | None]:
    """The output, and what went wrong in one line or None."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        return "", f"{command[0]} is not on this machine"
    except subprocess.TimeoutExpired:
        return "", f"SLURM does not answer: {command[0]} took more than {TIMEOUT_S:g} s"
    if done.returncode:
        words = " ".join(line.strip() for line in done.stderr.splitlines() if line.strip())
        return done.stdout, f"SLURM does not answer: {words or f'{command[0]}: exit {done.returncode}'}"
    return done.stdout, None


def _queued(line: str) -> QueuedJob | None:
    fields = line.strip().split("|", 3)
    if len(fields) != 4:
        return None
    id, state, submitted, reason = fields
    return QueuedJob(id, state, "" if reason == "None" else reason, _epoch(submitted))


def _accounted(line: str) -> QueuedJob | None:
    id, bar, state = line.strip().partition("|")
    return QueuedJob(id, state.split(" ")[0]) if bar and state else None


def _epoch(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
