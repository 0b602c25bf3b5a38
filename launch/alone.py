"""One launch at a time: a run that is queued or running is not submitted again.

Should two attempts ever live at once all the same, the later one takes over (`pretrain/lineage.py`); this spares the
user the loss. A launcher of this machine holds a lock for as long as it lives, and nothing can leave it behind; of
jobs, SLURM is asked.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from configs import ConfigError
from launch.history import read_history
from launch.queue import ask

LOCK = "launcher.lock"  # in the run folder


@contextlib.contextmanager
def alone(run_folder: Path) -> Iterator[None]:
    """Hold the run's lock. Raises ConfigError where another launcher holds it, or a job of the run is alive."""
    created = [path for path in (run_folder, *run_folder.parents) if not path.exists()]
    run_folder.mkdir(parents=True, exist_ok=True)
    path = run_folder / LOCK
    try:
        with path.open("a+") as lock:
            _lock(lock.fileno(), run_folder)
            _no_jobs(run_folder)
            yield
    except BaseException:
        if created:  # nothing was started: leave nothing
            path.unlink(missing_ok=True)
        for folder in created:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _lock(file: int, run_folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.lseek(file, 0, os.SEEK_SET)
        owner = os.read(file, 200).decode(errors="replace").strip()
        raise ConfigError(
            f"{run_folder}: a launcher runs it ({owner}); wait for its end, or stop it: launch stop {run_folder}"
        ) from None
    except OSError:
        return  # a file system without locks
    os.ftruncate(file, 0)
    os.write(file, f"host {socket.gethostname()}, pid {os.getpid()}\n".encode())


def _no_jobs(run_folder: Path) -> None:
    answer = ask(read_history(run_folder).jobs)
    jobs = [f"job {job.id} ({job.state})" for job in answer.jobs.values() if job.alive]
    if jobs:
        raise ConfigError(
            f"{run_folder}: {', '.join(jobs)} of this run goes on by itself; to start it another way, stop it first: "
            f"launch stop {run_folder}"
        )
