"""Archival copies of chosen checkpoints, on another file system or an object store.

    <to>/<name of the run folder>/run.yaml, segments/, lineage/     so that the archive is a run folder, too
                                  checkpoints/step-<step>.b<branch>/ as in the run, MANIFEST.json written last

A thread of rank 0 copies them one after the other, hashes what it reads and what it then finds at the target, and tries
again for as long as the target is away. Training never waits for it; retention waits for at most `MOST_WAITING`. The
only file that imports fsspec.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import xxhash
from pydantic import AfterValidator, Field

from configs import ConfigError, Float, Int, Section
from data_pipeline.failpoints import fail_at
from data_pipeline.progress import Beside
from data_pipeline.shards import sync_folder, write_durably

log = logging.getLogger("pretrain")

MANIFEST = "MANIFEST.json"
FIRST = "lineage/1.json"
MOST_WAITING = 2  # checkpoints that are kept on disk only because they are not archived yet
READ_BYTES = 4 * 2**20
PART_BYTES, MOST_PARTS = 10 * 2**20, 9_000  # of an upload; S3 takes 10,000 parts
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 300.0  # between two tries


class ArchiveError(Exception):
    """A checkpoint that cannot be archived, or brought back, however often it is tried. One line."""


def _check_target(to: str) -> str:
    """A folder made absolute, or an address whose file system can be had."""
    import fsspec

    if not to.strip():
        raise ValueError("expected a folder, or an address such as s3://bucket/runs, got nothing")
    protocol, separator, _ = to.partition("://")
    if not separator:
        return str(Path(to).absolute())
    try:
        _s3() if protocol == "s3" else fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{to}: {error}") from None
    return to.rstrip("/")


def _s3() -> Any:
    """S3 as the shards are read from it. Raises ImportError with what is to be installed."""
    try:
        from obstore.fsspec import FsspecStore
    except ImportError:
        raise ImportError("s3:// needs obstore: pip install 'longhaul[s3]'") from None
    from data_pipeline.sources.remote import s3_options

    return FsspecStore("s3", **s3_options())


class Archive(Section):
    """Where copies of which checkpoints go."""

    to: Annotated[str, AfterValidator(_check_target)]  # a folder, or s3://... and other fsspec addresses
    every_steps: Int = Field(gt=0)  # of the checkpoints, those whose step is a multiple
    close_seconds: Float = Field(default=60.0, ge=0)  # how long the end of a run waits for what is not yet copied


def open_archive(archive: Archive, run_folder: Path) -> Store:
    """The archive of one run."""
    return Store(f"{archive.to}/{run_folder.name}")


class Store:
    """Checkpoints at an address, whole or absent: one without its manifest does not exist."""

    def __init__(self, address: str) -> None:
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        self.address = address
        self.is_s3 = address.startswith("s3://")
        if self.is_s3:
            self.fs, self.root = _s3(), address.removeprefix("s3://")
        else:
            self.fs, self.root = url_to_fs(address)
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def names(self) -> list[str]:
        """The checkpoints that are there."""
        self.fs.invalidate_cache()
        found = self.fs.glob(f"{self.root}/checkpoints/step-*/{MANIFEST}")
        return sorted(str(path).split("/")[-2] for path in found)

    def put(self, folder: Path, go_on: Callable[[], bool] = lambda: True) -> None:
        """Copy a checkpoint and what describes its run; nothing that counts once `go_on` is false.

        Raises ArchiveError; OSError and others when the archive is away.
        """
        data = (folder / MANIFEST).read_bytes()
        target = f"{self.root}/checkpoints/{folder.name}"
        self.fs.invalidate_cache()
        if self.fs.exists(f"{target}/{MANIFEST}"):
            if self.fs.cat_file(f"{target}/{MANIFEST}") != data:
                raise ArchiveError(
                    f"{self.address}: holds another checkpoint {folder.name}; give another checkpoint.archive.to"
                )
            return
        run_folder = folder.parents[1]
        self._check_same_run(run_folder)
        files = json.loads(data)["files"]
        progress = Beside(f"archiving {folder.name}", 2 * sum(file["bytes"] for file in files.values()), log)
        for name, file in files.items():
            if not go_on():
                return
            if self._upload(folder / name, f"{target}/{name}", progress) != file["hash"]:
                raise ArchiveError(f"{folder / name}: damaged (hash differs)")
            if self._hash(f"{target}/{name}", progress) != file["hash"]:
                raise OSError(f"{target}/{name}: not what was written")
            fail_at("archive.copied")
        self.describe(run_folder)
        if go_on():
            self._write(f"{target}/{MANIFEST}", data)

    def describe(self, run_folder: Path) -> None:
        """Copy what a run is, and which of its branches are alive. Raises what `put` does."""
        self._check_same_run(run_folder)
        branches = sorted(run_folder.glob("lineage/[0-9]*.json"), key=lambda path: int(path.stem))  # parents first
        kept = sorted(
            run_folder.glob("segments/[!.]*"), key=lambda path: path.suffix == ".json"
        )  # after what they name
        for path in [run_folder / "run.yaml", *kept, *branches]:
            if path.is_file():
                self._write(f"{self.root}/{path.relative_to(run_folder)}", path.read_bytes())

    def _check_same_run(self, run_folder: Path) -> None:
        """A run's first branch has a time, a host and a process that no other's has."""
        first, known = run_folder / FIRST, f"{self.root}/{FIRST}"
        self.fs.invalidate_cache()
        if first.is_file() and self.fs.exists(known) and self.fs.cat_file(known) != first.read_bytes():
            raise ArchiveError(f"{self.address}: holds another run of this name; give another checkpoint.archive.to")

    def bring(self, name: str, target: Path) -> None:
        """Copy a checkpoint back: whole and verified, or not at all. Raises ArchiveError."""
        source = f"{self.root}/{name}"
        temporary = target.with_name(f".tmp-{target.name}")
        temporary.mkdir(parents=True, exist_ok=True)
        data = self.fs.cat_file(f"{source}/{MANIFEST}")
        files = json.loads(data)["files"]
        progress = Beside(f"bringing {name}", sum(file["bytes"] for file in files.values()), log)
        for part, file in files.items():
            digest = xxhash.xxh3_128()
            with self.fs.open(f"{source}/{part}", "rb") as found, (temporary / part).open("wb") as copy:
                while chunk := found.read(READ_BYTES):
                    digest.update(chunk)
                    copy.write(chunk)
                    progress.add(len(chunk))
                copy.flush()
                os.fsync(copy.fileno())
            if digest.hexdigest() != file["hash"]:
                raise ArchiveError(f"{source}/{part}: damaged (hash differs)")
        write_durably(temporary / MANIFEST, data)
        temporary.rename(target)
        sync_folder(target.parent)

    def _upload(self, source: Path, target: str, progress: Beside) -> str:
        """Copy one file; the hash of what was read."""
        digest = xxhash.xxh3_128()
        if self.is_local:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as file, self._create(target, source.stat().st_size) as copy:
            while chunk := file.read(READ_BYTES):
                digest.update(chunk)
                copy.write(chunk)
                progress.add(len(chunk))
            if self.is_local:
                copy.flush()
                os.fsync(copy.fileno())
        return digest.hexdigest()

    def _create(self, target: str, size: int) -> Any:
        if self.is_local:
            return Path(target).open("wb")
        return self.fs.open(target, "wb", **({"buffer_size": part_bytes(size)} if self.is_s3 else {}))

    def _hash(self, path: str, progress: Beside) -> str:
        digest = xxhash.xxh3_128()
        with self.fs.open(path, "rb") as file:
            while chunk := file.read(READ_BYTES):
                digest.update(chunk)
                progress.add(len(chunk))
        return digest.hexdigest()

    def _write(self, target: str, data: bytes) -> None:
        """Write a small file; it is whole when it is there, as a put to an object store is by itself."""
        if self.is_local:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            write_durably(Path(target), data)
        else:
            self.fs.pipe_file(target, data)


def bring_home(address: str, target: Path) -> None:
    """Copy the checkpoint at an address to its place in a run. Raises ConfigError; ArchiveError when it is away."""
    parent, _, name = address.rstrip("/").rpartition("/")
    try:
        Store(parent).bring(name, target)
    except FileNotFoundError:
        raise ConfigError(f"resume: {address}: no such checkpoint") from None
    except Exception as error:  # of whichever store it is
        mistakes = (ArchiveError, ImportError, ValueError, PermissionError)
        if isinstance(error, mistakes) or type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError"):
            raise ConfigError(f"resume: {address}: {said(error)}") from None
        raise ArchiveError(f"resume: {address}: {said(error)}") from None


def part_bytes(size: int) -> int:
    """Of an upload of so many bytes to S3."""
    return max(PART_BYTES, -(-size // MOST_PARTS))


def said(error: Exception) -> str:
    """What went wrong, in one line: obstore's errors have a page of their insides below it."""
    return " ".join(str(error).partition("Debug source")[0].split())[:500] or type(error).__name__


class Archiver:
    """Copies checkpoints to the archive of a run, in a thread."""

    def __init__(self, archive: Archive, run_folder: Path) -> None:
        self.archive, self.run_folder = archive, run_folder
        self.pause_s = FIRST_PAUSE_S
        self._waiting: list[Path] = []
        self._stale = False  # what the archive says of the run
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def add(self, folder: Path) -> None:
        """Have a checkpoint copied, unless the archive has it."""
        with self._changed:
            if self._closed or folder in self._waiting:
                return
            self._waiting.append(folder)
            if len(self._waiting) > MOST_WAITING:
                log.warning("%s: not archived: %s is too slow or away", self._waiting.pop(0), self.archive.to)
            self._wake()

    def refresh(self) -> None:
        """Have the run described anew: each attempt does as it begins, so that the archive, too, knows what it has
        retired."""
        with self._changed:
            self._stale = not self._closed
            self._wake()

    def _wake(self) -> None:
        self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="longhaul-archive", daemon=True)
            self._thread.start()

    def waiting(self) -> set[Path]:
        """Checkpoints that must stay until they are copied."""
        with self._changed:
            return set(self._waiting)

    def close(self, seconds: float) -> None:
        """Wait for what is under way, say what is left, and end. A later start of the run takes it up again."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._stale, seconds)
            self._closed = True
            self._changed.notify()
            for folder in self._waiting:
                log.warning("%s: not yet archived in %s; starting the run again does it", folder.name, self.archive.to)

    def _work(self) -> None:
        pause = self.pause_s
        while (folder := self._next()) is not None:
            try:
                store = open_archive(self.archive, self.run_folder)
                if folder == self.run_folder:
                    store.describe(folder)
                else:
                    store.put(folder, lambda: not self._closed)
            except ArchiveError as error:
                log.warning("%s: not archived", error)
                self._drop(folder)
            except Exception as error:
                if not folder.is_dir():
                    self._drop(folder)
                    continue
                if pause == self.pause_s:
                    log.warning("archive %s: %s; tried again until it works", self.archive.to, said(error))
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                pause = self.pause_s
                if not self._closed and folder != self.run_folder:
                    log.info("archived %s in %s", folder.name, self.archive.to)
                self._drop(folder)

    def _next(self) -> Path | None:
        """A checkpoint to copy, or first the run folder where that is to be described; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._stale or bool(self._waiting) or self._closed)
            return None if self._closed else self.run_folder if self._stale else self._waiting[0]

    def _drop(self, folder: Path) -> None:
        with self._changed:
            self._stale = self._stale and folder != self.run_folder
            if folder in self._waiting and not self._closed:
                self._waiting.remove(folder)
            self._changed.notify_all()
