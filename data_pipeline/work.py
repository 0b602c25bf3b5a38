"""Work on a plan: make slices in several processes and jobs at once."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import signal
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from configs import ConfigError
from data_pipeline.disk import FULL, refusal
from data_pipeline.failures import forget_failure, record_failure
from data_pipeline.killers import MOST, left_out, marked, set_aside
from data_pipeline.plan import Slice
from data_pipeline.progress import Progress
from data_pipeline.publish import publish_slice
from data_pipeline.shards import ShardError
from data_pipeline.slices import Job, Work, make_slice, said
from data_pipeline.sources.inputs import InputError
from data_pipeline.tokenizer import Tokenizer

log = logging.getLogger("data-prep")

TELL_S = 0.5
LOOK_AGAIN_S = 1.0  # at a slice that another job is at
STOP_S = 20.0  # for workers to leave their slices between two documents, before they are killed
FAILED_LIMIT = 20  # slices of one call that may fail whatever their share; beyond, at most a tenth of those tried may


class WorkError(Exception):
    """A slice that could not be made. One line."""


class Unfinished(Exception):
    """Slices are missing that did not fail: whoever was to make them was stopped. One line."""


@dataclass(frozen=True)
class Task:
    """A slice to make, by its places."""

    job: int
    slice: int


@dataclass
class Done:
    """What one call of `work` came to."""

    made: int = 0  # slices, made here and not by others
    failed: list[str] = field(default_factory=list)  # a line for each slice that could not be made

    def check(self) -> None:
        """Raises WorkError where a slice failed."""
        if len(self.failed) > 1:
            raise WorkError(f"{len(self.failed)} slices could not be made, all others are; the first: {self.failed[0]}")
        if self.failed:
            raise WorkError(self.failed[0])


def work(
    jobs: Sequence[Work],
    tasks: Sequence[Task],
    workers: int,
    show: Callable[[Progress], None],
    done: Done,
    wait_for_others: bool = True,
) -> None:
    """Make slices in `workers` processes. Returns when all are made or have failed, here or by others; fills `done`.

    A slice that fails does not keep the others from being made; a process that dies (out of memory, a crash in a
    library) is replaced, and an input at which two have died is set aside. Without `wait_for_others`, slices that
    others are at are left to them. Raises WorkError for what no other slice would be spared, as a full disk.
    """
    waiting = [task for task in tasks if not jobs[task.job].is_made(jobs[task.job].plan.slices[task.slice])]
    if not waiting:
        return
    pool = _Pool(jobs, waiting, done, wait_for_others)
    try:
        pool.run(min(workers, len(waiting)), show)
    finally:
        pool.stop()


class _Pool:
    """Worker processes, each at the other end of a pipe of its own, so that a killed one can spoil no other's."""

    def __init__(self, jobs: Sequence[Work], tasks: Sequence[Task], done: Done, wait_for_others: bool) -> None:
        self.jobs, self.done, self.wait_for_others = jobs, done, wait_for_others
        self.waiting = list(reversed(tasks))
        self.elsewhere: list[tuple[float, Task]] = []  # (when to look again, task) for slices that another job is at
        self.processes: dict[Connection, Any] = {}
        self.idle: list[Connection] = []
        self.busy: dict[Connection, Task] = {}
        self.deaths: defaultdict[Task, list[int | None]] = defaultdict(list)  # the parts that were being read
        self.progress = Progress(sum(self._slice(task).bytes for task in tasks))
        self.context = multiprocessing.get_context("spawn")  # threads of libraries do not survive a fork

    def run(self, workers: int, show: Callable[[Progress], None]) -> None:
        for _ in range(workers):
            self._start()
        while self.waiting or self.busy or self.elsewhere:
            self._hand_out()
            for connection in wait(list(self.processes), timeout=TELL_S):
                assert isinstance(connection, Connection)
                self._hear(connection)
            show(self.progress)

    def stop(self) -> None:
        """End the workers: those at work leave their slices as soon as they find that nobody listens."""
        for connection, process in self.processes.items():
            connection.close()
            if connection not in self.busy:
                process.kill()
        end = time.monotonic() + STOP_S
        for process in self.processes.values():
            process.join(max(0.0, end - time.monotonic()))
            process.kill()
            process.join()

    def _slice(self, task: Task) -> Slice:
        return self.jobs[task.job].plan.slices[task.slice]

    def _start(self) -> None:
        mine, theirs = self.context.Pipe()
        process = self.context.Process(target=_worker, args=(theirs, self.jobs), daemon=True)
        process.start()
        theirs.close()
        self.processes[mine] = process

    def _hand_out(self) -> None:
        now = time.monotonic()
        self.waiting += [task for when, task in self.elsewhere if when <= now]
        self.elsewhere = [(when, task) for when, task in self.elsewhere if when > now]
        while self.idle and self.waiting:
            connection, task = self.idle.pop(), self.waiting.pop()
            self.busy[connection] = task
            with suppress(BrokenPipeError):  # a dead worker is heard of by its closed pipe
                connection.send(task)

    def _hear(self, connection: Connection) -> None:
        try:
            kind, *rest = connection.recv()
        except (EOFError, ConnectionResetError):
            self._bury(connection)
            return
        if kind == "at":
            self.progress.open[connection] = (rest[0], rest[1])
        elif kind == "broken":
            raise WorkError(rest[0])
        else:
            self.idle.append(connection)
            self.progress.open.pop(connection, None)
            if kind == "over":
                self._finish(self.busy.pop(connection), made_here=rest[0])
            elif kind == "failed":
                self._fail(self.busy.pop(connection), rest[0])

    def _fail(self, task: Task, why: str) -> None:
        """Go on without a slice, unless so many fail that the fault is none of theirs."""
        done, slice = self.done, self._slice(task)
        done.failed.append(why)
        record_failure(self.jobs[task.job].folder, slice.name, why)
        self.progress.done_bytes += slice.bytes
        log.error("%s", why)
        if len(done.failed) > max(FAILED_LIMIT, (done.made + len(done.failed)) / 10):
            raise WorkError(f"{len(done.failed)} slices failed and {done.made} did not; the last: {why}")

    def _finish(self, task: Task, made_here: bool) -> None:
        record = self.jobs[task.job].record(self._slice(task))
        if record is None:
            if self.wait_for_others:
                self.elsewhere.append((time.monotonic() + LOOK_AGAIN_S, task))
            return
        self.done.made += made_here
        forget_failure(self.jobs[task.job].folder, self._slice(task).name)
        self.progress.done_bytes += self._slice(task).bytes
        self.progress.done_documents += record["counts"]["read"]
        for line in record["counts"]["notes"]:
            log.warning("%s", line)

    def _bury(self, connection: Connection) -> None:
        """A worker has died: start another, and give it the slice, unless it is the slice that kills."""
        process = self.processes.pop(connection)
        process.join()
        self.progress.open.pop(connection, None)
        why = f"signal {-process.exitcode}" if process.exitcode < 0 else f"exit code {process.exitcode}"
        task = self.busy.pop(connection, None)
        if task is None:
            raise WorkError(f"a worker process ended before it began ({why}); its own words are above")
        self._retry(task, why)
        self._start()

    def _retry(self, task: Task, why: str) -> None:
        """Once more in a fresh process; a part at which the second dies too is set aside."""
        job, slice = self.jobs[task.job], self._slice(task)
        stage, deaths = job.folder / job.stage, self.deaths[task]
        name = f"{job.corpus}: slice {slice.name}"
        deaths.append(marked(stage, slice.name))
        part, aside = deaths[-1], left_out(stage, slice.name)
        if deaths.count(part) < 2:
            log.warning("%s: its worker died (%s); once more in a fresh process", name, why)
        elif part is None or part in aside or len(aside) >= MOST:
            inputs = ", ".join(part.input.name for part in slice.parts[:3])
            self._fail(task, f"{name} ({inputs}): its worker died twice ({why}); out of memory? try fewer workers")
            return
        else:
            log.warning(
                "%s: %s: its worker died twice (%s): set aside; with fewer workers or more memory, remove %s and its "
                "slice, and run again",
                *(name, slice.parts[part].input.name, why, set_aside(stage, slice.name, part)),
            )
        self.waiting.append(task)


def _worker(pipe: Connection, jobs: Sequence[Work]) -> None:
    """The life of a worker process: a slice after the other, until the pipe closes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the parent hears it too, and closes the pipe, which ends us
    sys.modules["torch"] = None  # type: ignore[assignment]  # webdataset would import it: 2 s and 200 MB, for nothing
    told = 0.0

    def tell(read: int, documents: int) -> None:
        nonlocal told
        if time.monotonic() - told > TELL_S:
            pipe.send(("at", read, documents))  # raises when the parent is gone, which ends us
            told = time.monotonic()

    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        pipe.send(("idle",))
        tokenizer = Tokenizer.load(jobs[0].tokenizer)
        tokenizer.use(jobs[0].encoder)
        while True:
            task: Task = pipe.recv()
            job = jobs[task.job]
            try:
                made_here = make_slice(job, job.plan.slices[task.slice], tokenizer, tell)
                if made_here and isinstance(job, Job) and job.publish is not None:
                    publish_slice(job, job.plan.slices[task.slice])
            except (InputError, ConfigError, ShardError) as error:
                pipe.send(("failed", f"{job.corpus}: {error}"))
            except OSError as error:
                if isinstance(error, BrokenPipeError | ConnectionResetError):
                    raise
                kind = "broken" if _is_of_output(error, job.folder) else "failed"
                pipe.send((kind, f"{job.corpus}: {refusal(error, job.folder)}"))
            except Exception as error:
                traceback.print_exc()
                pipe.send(("failed", f"{job.corpus}: slice {job.plan.slices[task.slice].name}: {said(error)}"))
            else:
                pipe.send(("over", made_here))


def _is_of_output(error: OSError, folder: Path) -> bool:
    """Whether the fault lies where shards are written, so that every other slice would meet it."""
    full = error.errno in (*FULL, errno.EROFS, errno.EMFILE, errno.ENFILE)
    name = error.filename
    return full or not isinstance(name, str | Path) or Path(name).absolute().is_relative_to(folder.absolute())
