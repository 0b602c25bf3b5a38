"""What a file system refuses, as one line that says what it needs."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.progress import size

FULL = (errno.ENOSPC, errno.EDQUOT)
FEW_INODES, MUCH_ROOM = 100, 2**20  # what a failed step gives back when it cleans up behind itself; bytes


@contextmanager
def writing(path: Path, count: int) -> Iterator[None]:
    """Around a write of `count` bytes: where they find no room, the error says how many they are and where."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise OSError(error.errno, f"needs {size(count)}", str(path)) from None
        raise


def refusal(error: OSError, folder: Path | None = None) -> str:
    """An error of the file system as one line; `folder` is where it was at work, for errors that name no file."""
    name = error.filename2 or error.filename  # of a link, its own name comes second
    name = name if isinstance(name, str | Path) else folder
    if error.errno not in FULL:
        return str(error) if name is None else f"{name}: {error.strerror or error}"
    place = Path(name or folder or Path.cwd()).absolute()
    while not place.exists():
        place = place.parent
    status = os.statvfs(place)
    free = status.f_bavail * status.f_frsize
    if error.errno == errno.ENOSPC and status.f_files and status.f_favail < FEW_INODES and free > MUCH_ROOM:
        return f"no inodes left at {place}: remove files that are not needed and run again"
    what = "disk full" if error.errno == errno.ENOSPC else "disk quota exceeded"
    needs = f"{error.strerror}, " if str(error.strerror).startswith("needs ") else ""
    return f"{what} at {place}: {needs}has {size(free)}; make room and run again"
