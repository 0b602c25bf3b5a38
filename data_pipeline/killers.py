"""Inputs that kill the process that reads them (memory, a crash in a library): set aside when they did so twice.

While a worker reads a part of a slice, a mark in the slice's temporary folder says which; it outlives the worker.
"""

from __future__ import annotations

import json
from pathlib import Path

from data_pipeline.shards import write_durably

MARK = "reading"
KILLS = "kills its worker"  # the reason under which such a part is counted
MOST = 3  # parts of a slice that may be set aside; with more of them, the fault is none of theirs


def mark(temporary: Path, part: int | None) -> None:
    """Say which part of the slice is being read, None: no more any."""
    if part is None:
        (temporary / MARK).unlink(missing_ok=True)
    else:
        (temporary / MARK).write_text(str(part))


def marked(stage: Path, slice_name: str) -> int | None:
    """The part that the last worker of a slice was reading, if it left a mark."""
    marks = [path / MARK for path in stage.glob(f".tmp-{slice_name}-*") if (path / MARK).is_file()]
    newest = max(marks, key=lambda path: path.stat().st_mtime_ns, default=None)
    return int(newest.read_text() or 0) if newest else None


def set_aside(stage: Path, slice_name: str, part: int) -> Path:
    """Have a part left out from now on; the file that says so, which to remove is to try again."""
    path = _path(stage, slice_name)
    write_durably(path, json.dumps(sorted({*left_out(stage, slice_name), part})).encode())
    return path


def left_out(stage: Path, slice_name: str) -> frozenset[int]:
    """The parts of a slice that are set aside, by their places."""
    try:
        return frozenset(json.loads(_path(stage, slice_name).read_text()))
    except FileNotFoundError:
        return frozenset()


def _path(stage: Path, slice_name: str) -> Path:
    return stage / f".{slice_name}.aside"
