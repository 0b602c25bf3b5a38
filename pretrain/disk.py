"""What a disk can do to a checkpoint: be full, refuse by quota, or give back other bytes than were written."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path


def shortage(folder: Path, needs_bytes: int, needs_files: int) -> str | None:
    """One line where a folder's file system has not the room (bytes, inodes) that is needed; None where it has."""
    found = os.statvfs(folder)
    has = found.f_bavail * found.f_frsize
    if found.f_blocks and has < needs_bytes:  # some network file systems know no sizes, and say 0
        return f"disk full at {folder}: needs {size(needs_bytes)}, has {size(has)}"
    if found.f_files and found.f_favail < needs_files:
        return f"no inodes left at {folder}: needs {needs_files}, has {found.f_favail}"
    return None


def explain(error: OSError, folder: Path, needs_bytes: int) -> str:
    """One line for an error of writing `needs_bytes` below a folder."""
    if error.errno == errno.EDQUOT:
        return f"quota exceeded at {folder}: needs {size(needs_bytes)}; raise the quota, or remove something"
    if error.errno == errno.ENOSPC:
        found = os.statvfs(folder)
        if found.f_files and not found.f_favail:
            return f"no inodes left at {folder}"
        return f"disk full at {folder}: needs {size(needs_bytes)}, has {size(found.f_bavail * found.f_frsize)}"
    return f"{error.filename or folder}: {error.strerror or error}"


def size(count: int) -> str:
    """1536 -> 1.5 KiB."""
    number, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if number < 1024:
            break
        number, unit = number / 1024, larger
    return f"{count} bytes" if unit == "bytes" else f"{number:.1f} {unit}"


def forget_cached(descriptor: int) -> None:
    """Have the next read of a synced file come from the disk, where the system does as it is told."""
    with contextlib.suppress(OSError):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
