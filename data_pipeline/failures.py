"""Slices that could not be made: on record in the shared folder, for everyone to see, until they are planned anew."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.shards import write_durably

LOG = "LONGHAUL_LOG"  # in the environment of a job: where its output goes


@dataclass(frozen=True)
class Failure:
    """One slice that could not be made. `why` is one line, `log` the output of the job that tried, if it was one."""

    slice: str
    why: str
    host: str
    log: str | None
    time: float  # of the epoch


def record_failure(corpus_folder: Path, slice_name: str, why: str) -> None:
    """Put it on record where the disk lets us; it has been said on stderr in any case."""
    failure = Failure(slice_name, why, socket.gethostname(), os.environ.get(LOG), time.time())
    with suppress(OSError):
        write_durably(_path(corpus_folder, slice_name), json.dumps(asdict(failure), ensure_ascii=False).encode())


def has_failed(corpus_folder: Path, slice_name: str) -> bool:
    return _path(corpus_folder, slice_name).exists()


def failures(corpus_folder: Path) -> list[Failure]:
    """Those on record, by slice."""
    found = []
    for path in sorted((corpus_folder / "slices").glob(".*.failed")):
        with suppress(OSError, ValueError, TypeError):
            found.append(Failure(**json.loads(path.read_text(encoding="utf-8"))))
    return found


def forget_failure(corpus_folder: Path, slice_name: str) -> None:
    _path(corpus_folder, slice_name).unlink(missing_ok=True)


def forget_failures(corpus_folder: Path) -> None:
    """Every slice may be tried again."""
    for path in (corpus_folder / "slices").glob(".*.failed*"):
        path.unlink(missing_ok=True)


def _path(corpus_folder: Path, slice_name: str) -> Path:
    return corpus_folder / "slices" / f".{slice_name}.failed"
