"""Where long work stands: a bar on a terminal, a line a minute elsewhere; on stderr, for stdout is for results."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

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


class Count(Display):
    """The same for things that are counted: tell it how many are done. Bytes have a unit of their own."""

    def __init__(self, title: str, unit: str, total: int) -> None:
        super().__init__(title)
        self.unit, self.progress = unit, Progress(total)

    def __enter__(self) -> Count:
        return self

    def __call__(self, done: Progress | int) -> None:
        if isinstance(done, int):
            self.progress.done_bytes = done
            done = self.progress
        super().__call__(done)

    def line(self, progress: Progress, seconds: float) -> str:
        """`evaluate: 41 % of 12,345 requests, 35.1 requests/s, 3:25 left`."""
        done, total = progress.bytes, progress.total_bytes
        rate = done / max(seconds, 1e-9)
        left = duration((total - done) / rate) if done else "?"
        words = [size(total), f"{size(rate)}/s"] if self.unit == "bytes" else [
            f"{total:,} {self.unit}", f"{rate:,.1f} {self.unit}/s"
        ]  # fmt: skip
        return f"{self.title}: {100 * done / max(total, 1):.0f} % of {words[0]}, {words[1]}, {left} left"


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
