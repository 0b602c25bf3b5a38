"""Where long work stands: a bar on a terminal, a line a minute elsewhere; on stderr, for stdout is for results."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

Item = TypeVar("Item")
log = logging.getLogger("data-prep")
LINE_S = 60.0


@dataclass
class Progress:
    """Input read so far, of finished slices and, by worker, of open ones (bytes, documents)."""

    total_bytes: int
    done_bytes: int = 0
    done_documents: int = 0
    open: dict[object, tuple[int, int]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return self.done_bytes + sum(read for read, _ in self.open.values())

    @property
    def documents(self) -> int:
        return self.done_documents + sum(documents for _, documents in self.open.values())


class Display:
    """Shows progress while used as a context; call it as often as you like."""

    def __init__(self, title: str) -> None:
        self.title, self.begun, self.told = title, time.monotonic(), time.monotonic()
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, progress: Progress) -> None:
        if sys.stderr.isatty():
            self._draw(progress)
        elif time.monotonic() - self.told >= LINE_S:
            self.told = time.monotonic()
            log.info("%s", self.line(progress, self.told - self.begun))

    def line(self, progress: Progress, seconds: float) -> str:
        """`prepare: 41 % of 12.3 GB, 1,234,567 documents, 35.1 MB/s, 3:25 left`."""
        rate = progress.bytes / max(seconds, 1e-9)
        share = 100 * progress.bytes / max(progress.total_bytes, 1)
        left = duration((progress.total_bytes - progress.bytes) / rate) if progress.bytes else "?"
        return (
            f"{self.title}: {share:.0f} % of {size(progress.total_bytes)}, {progress.documents:,} documents, "
            f"{size(rate)}/s, {left} left"
        )

    def _draw(self, progress: Progress) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        if self.bar is None:
            columns = (BarColumn(), TextColumn("{task.description}"))
            self.bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task(self.title, total=max(progress.total_bytes, 1))
            self.bar.start()
        text = self.line(progress, time.monotonic() - self.begun)
        self.bar.update(self.task, completed=progress.bytes, description=text)


class Count:
    """Shows how many of some things are done while used as a context; call it as often as you like.

    `unit` is what they are; of `bytes` sizes are shown. Another title begins another count.
    """

    def __init__(self, is_shown: bool = True) -> None:
        self.title, self.unit, self.is_shown = "", "", is_shown
        self.begun = self.told = time.monotonic()
        self.first = 0
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Count:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._stop()

    def __call__(self, done: int, total: int, title: str, unit: str) -> None:
        if not self.is_shown:
            return
        if (title, unit) != (self.title, self.unit):
            self._stop()
            self.title, self.unit, self.first = title, unit, done
            self.begun = time.monotonic()
        if sys.stderr.isatty():
            self._draw(done, total)
        elif time.monotonic() - self.told >= LINE_S:
            self.told = time.monotonic()
            print(self.line(done, total, self.told - self.begun), file=sys.stderr, flush=True)

    def line(self, done: int, total: int, seconds: float) -> str:
        """`verify: 3 of 12 checkpoints, 0.4/s, 0:22 left`."""
        per_s = (done - self.first) / max(seconds, 1e-9)
        left = duration(max(0, total - done) / per_s) if per_s > 0 else "?"
        if self.unit == "bytes":
            share = 100 * done / max(total, 1)
            return f"{self.title}: {share:.0f} % of {size(total)}, {size(per_s)}/s, {left} left"
        rate = f"{per_s:,.0f}/s" if per_s >= 10 else f"{per_s:.1f}/s" if per_s >= 0.1 else f"{60 * per_s:.1f}/min"
        return f"{self.title}: {done:,} of {total:,} {self.unit}, {rate}, {left} left"

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        self.bar = None

    def _draw(self, done: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        if self.bar is None:
            self.bar = Bar(BarColumn(), TextColumn("{task.description}"), console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task(self.title, total=max(total, 1))
            self.bar.start()
        text = self.line(done, total, time.monotonic() - self.begun)
        self.bar.update(self.task, total=max(total, 1), completed=done, description=text)


class Beside:
    """Bytes copied by threads beside other work: a line a minute in a log, and never a bar."""

    def __init__(self, title: str, total: int, log: logging.Logger) -> None:
        self.title, self.total, self._log = title, total, log
        self.bytes, self.begun, self.told = 0, time.monotonic(), time.monotonic()
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """So many more; from any thread."""
        with self._lock:
            self.bytes += count
            if time.monotonic() - self.told < LINE_S:
                return
            self.told = time.monotonic()
        self._log.info("%s: %s", self.title, self.line())

    def line(self) -> str:
        """`1.2 GB of 3.4 GB, 35.1 MB/s, 1:03 left`."""
        rate = self.bytes / max(time.monotonic() - self.begun, 1e-9)
        left = duration(max(self.total - self.bytes, 0) / rate) if rate else "?"
        return f"{size(self.bytes)} of {size(self.total)}, {size(rate)}/s, {left} left"


class Elapsed:
    """Says how long a call takes that tells nothing itself, while used as a context. The clock starts with `after`, or
    `at_once`."""

    def __init__(self, title: str, at_once: bool = False) -> None:
        self.title, self._at_once = title, at_once
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def after(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items; with the last one the clock starts."""
        yield from items
        self._begin()

    def _begin(self) -> None:
        self._thread = threading.Thread(target=self._tell, daemon=True)
        self._thread.start()

    def __enter__(self) -> Elapsed:
        if self._at_once:
            self._begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _tell(self) -> None:
        begun, on_terminal = time.monotonic(), sys.stderr.isatty()
        while not self._over.wait(1.0 if on_terminal else LINE_S):
            line = f"{self.title}: {duration(time.monotonic() - begun)} so far"
            if on_terminal:
                print(f"\r{line}", end="", file=sys.stderr, flush=True)
            else:
                log.info("%s", line)
        if on_terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def size(count: float) -> str:
    """1234567 -> `1.2 MB`."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """3725 -> `1:02:05`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
