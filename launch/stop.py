"""`launch stop`: a run saves and ends, wherever it is, and is not started again until it is submitted."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from launch import queue
from launch.attempts import STOP
from launch.history import read_history
from launch.job import LaunchError
from launch.state import State
from launch.status import Status, look

POLL_S = 1.0
ASK_AGAIN_S = 5.0  # ranks that were only starting when they were told may not have heard it

OVER_ALREADY = ("invalid job id specified", "already completing or completed")  # in SLURM's words


def stop(folder: Path, wait: bool, say: Callable[[str], None]) -> Status:
    """Ask a run to save and stop; with `wait`, return when it is over. Its status then. Raises LaunchError.

    What is written down first holds whatever happens: a queued or requeued job does not begin again.
    """
    [status] = look([folder])
    if status.state.over:
        return status
    _mark(folder)
    [status] = look([folder])
    said, asked_at = "", -ASK_AGAIN_S
    while not status.state.over:
        if status.state.name == "unknown":
            raise LaunchError(f"{status.run}: {status.state.detail}; marked as stopped, so it is not started again")
        if time.monotonic() - asked_at >= ASK_AGAIN_S:
            _ask(status)
            asked_at = time.monotonic()
        if not wait:
            break
        if (line := _line(status)) != said:
            said = line
            say(line)
        time.sleep(POLL_S)
        [status] = look([folder])
    return status


def outcome(status: Status) -> str:
    """One line: how the run is, and what of it is saved."""
    state, saved, step = status.state, status.checkpoint, status.step
    name = state.name.replace("_", " ")
    if not state.over:
        return f"{status.run}: asked to stop, {name}"
    if saved is None:
        return f"{status.run}: {name}, nothing was saved"
    more = f"; {step - saved.step} steps after it were not saved" if step is not None and step > saved.step else ""
    return f"{status.run}: {name} at step {status.step}, saved in {saved.path.name}{more}"


def _mark(folder: Path) -> None:
    """Write down that the newest submission is to stop."""
    submissions = read_history(folder).submissions
    if submissions:
        (submissions[-1].folder / STOP).touch()


def _ask(status: Status) -> None:
    """Cancel what waits, and signal what runs."""
    state = status.state
    if state.pid is not None:
        _signal(state.pid)
        return
    waiting = [job.id for job in state.jobs if job.state in queue.PENDING]
    running = [job.id for job in state.jobs if job.state in queue.RUNNING]
    problems = [
        queue.cancel_pending(waiting) if waiting else None,
        queue.tell_to_stop(running) if running else None,
    ]
    if not state.jobs:
        problems.append(f"cannot be reached from here: {state.detail}")
    for problem in problems:
        if problem is not None and not any(words in problem.lower() for words in OVER_ALREADY):
            raise LaunchError(f"{status.run}: {problem}")


def _signal(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    except PermissionError as error:
        raise LaunchError(f"process {pid}: {error.strerror}: it is of another user") from None


def _line(status: Status) -> str:
    step = f" at step {status.step}" if status.step is not None else ""
    return f"{status.run}: {_words(status.state)}{step}"


def _words(state: State) -> str:
    return {"pending": "taken out of the queue", "stopping": "saving"}.get(state.name, state.name)
