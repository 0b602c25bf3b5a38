"""Staging: the shards that a run needs, copied to a node's own disk before it starts.

    FOLDER/<identity of the corpus>/slices/…   as in the corpus; each file whole under its name, checked, synced
    FOLDER/.stage.lease                        held by the process of this node that copies

The identity is that of the first generation, so that of a corpus that has grown only the new generations are copied;
a corpus' folder may be removed when no run reads it. A copy that is broken off goes on where it was. What is not
staged, or is damaged there, is read from where it was staged from.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from configs import ConfigError
from data_pipeline.disk import writing
from data_pipeline.failpoints import fail_at
from data_pipeline.files import Bytes, Check, Damaged, Files, Folder, Outage, Unreadable
from data_pipeline.lease import Lease
from data_pipeline.progress import Beside, size
from data_pipeline.shards import SPLITS, Manifest, ShardError, sync_folder, unread

log = logging.getLogger("pretrain")

COPIED_AT_ONCE = 8
PIECE_BYTES = 8 * 2**20
LINE_S = 30.0
BESIDE = 0.05  # of the bytes of tars, for their indices and sidecars


@dataclass(frozen=True)
class _File:
    """A file to be staged. Only those of tars have their sizes in the manifest."""

    files: Files
    name: str
    to: Path
    hash: str
    bytes: int

    @property
    def part(self) -> Path:
        return self.to.with_name(f".{self.to.name}.part")


class Staged:
    """The files of a corpus as far as they are staged, the others from where they come from."""

    is_far = True

    def __init__(self, here: Folder, below: Files) -> None:
        self.here, self.below, self.address = here, below, below.address
        self.warned: set[str] = set()

    def part(self, name: str, offset: int, size: int, hash: bytes, buffer: bytearray | None = None) -> Bytes:
        try:
            return self.here.part(name, offset, size, hash, buffer)
        except (Damaged, Unreadable) as error:
            self._warn(name, error)
            return self.below.part(name, offset, size, hash, buffer)

    def row(self, name: str, offset: int, size: int, is_right: Check, file_hash: str) -> bytes:
        try:
            return self.here.row(name, offset, size, is_right, file_hash)
        except (Damaged, Unreadable) as error:
            self._warn(name, error)
            return self.below.row(name, offset, size, is_right, file_hash)

    def whole(self, name: str, hash: str | None = None) -> bytes:
        try:
            return self.here.whole(name, hash)
        except (Damaged, Unreadable) as error:
            self._warn(name, error)
            return self.below.whole(name, hash)

    def raw(self, name: str, offset: int, size: int) -> bytes:
        return self.below.raw(name, offset, size)

    def expect(self, name: str, offset: int, size: int) -> None:
        self.here.expect(name, offset, size)

    def close(self) -> None:
        self.here.close()
        self.below.close()

    def _warn(self, name: str, error: Exception) -> None:
        if name not in self.warned:
            self.warned.add(name)
            what = "damaged" if isinstance(error, Damaged) else str(error).rpartition(": ")[2]
            log.warning("%s/%s: %s on this disk, read from %s", self.here.address, name, what, self.below.address)


def staged(manifest: Manifest, folder: Path) -> Manifest:
    """A corpus, read from what is staged of it in a folder, if anything is."""
    here = _place(manifest, folder)
    return replace(manifest, files=Staged(Folder(here), manifest.files)) if here.is_dir() else manifest


def _place(manifest: Manifest, folder: Path) -> Path:
    return folder / str(manifest.generations[0]["identity"])[:16]


class Staging:
    """The copying, in a thread of its own. `corpora` are (manifest, generations in use), to be read from elsewhere."""

    def __init__(self, folder: Path, corpora: Sequence[tuple[Manifest, int]]) -> None:
        self.folder, self.corpora = folder, corpora
        self.error: Exception | None = None
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True, name="longhaul-stage")
        self.thread.start()

    def done(self, timeout_s: float) -> bool:
        """Whether it has ended, well or not."""
        self.thread.join(timeout_s)
        return not self.thread.is_alive()

    def stop(self) -> None:
        """End soon; what is copied stays."""
        self.over.set()

    def _run(self) -> None:
        try:
            stage(self.folder, self.corpora, self.over.is_set)
        except Exception as error:
            self.error = error


def stage(folder: Path, corpora: Sequence[tuple[Manifest, int]], is_over: Callable[[], bool] = lambda: False) -> None:
    """Copy what is not there yet; one process of a node does, the others wait for it.

    Raises ConfigError where the disk is too small, ShardError where a file is damaged, or Unreachable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"data.stage: {folder}: {error.strerror}") from None
    with Lease.wait(folder / ".stage.lease", lambda line: log.info("%s", line)):
        wanted = (file for manifest, count in corpora for file in _files(manifest, count, folder))
        if missing := [file for file in wanted if not _is_here(file)]:
            _check_room(folder, missing)
            _copy_all(folder, missing, is_over)


def _files(manifest: Manifest, generations: int, folder: Path) -> Iterator[_File]:
    place = _place(manifest, folder)
    for generation in range(generations):
        for split in SPLITS:
            shards = manifest.shards(split, generation)
            columns = [shards.table[name].to_pylist() for name in ("bytes", "hash", "index_hash", "docs_hash")]
            for i, (count, hash, index_hash, docs_hash) in enumerate(zip(*columns, strict=True)):
                for suffix, its_hash, its_bytes in (
                    ("tar", hash, count), ("index.npy", index_hash, 0), ("docs.parquet", docs_hash, 0),
                ):  # fmt: skip
                    name = shards.name(i, suffix)
                    yield _File(manifest.files, name, place / name, its_hash, its_bytes)


def _is_here(file: _File) -> bool:
    """Whole, since it has its name; checked when it was copied, and again block by block when it is read."""
    try:
        found = file.to.stat().st_size
    except OSError:
        return False
    return found == file.bytes or not file.bytes


def _check_room(folder: Path, missing: Sequence[_File]) -> None:
    begun = sum(file.part.stat().st_size for file in missing if file.bytes and file.part.exists())
    needed = round((1 + BESIDE) * sum(file.bytes for file in missing)) - begun
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"data.stage: {folder}: the shards need {size(needed)}, its disk has {size(free)} free; name a larger "
            "disk, or leave data.stage out and set data.cache, which needs less"
        )


def _copy_all(folder: Path, missing: Sequence[_File], is_over: Callable[[], bool]) -> None:
    progress = Beside("staging", sum(file.bytes for file in missing), log)
    log.info("staging %d files, %s, to %s", len(missing), size(progress.total), folder)
    failed = threading.Event()
    with ThreadPoolExecutor(COPIED_AT_ONCE, thread_name_prefix="longhaul-stage") as pool:
        futures = [pool.submit(_copy, file, progress, lambda: is_over() or failed.is_set()) for file in missing]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            failed.set()  # what is being copied is left where it is
            for future in futures:
                future.cancel()
    if not is_over():
        log.info("staged: %s", progress.line())


def _copy(file: _File, progress: Beside, is_over: Callable[[], bool]) -> None:
    """One file, gone on with where a copy was broken off; what is begun and turns out wrong is copied anew."""
    file.to.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):
        if is_over():
            return
        resumed = file.part.exists() and file.part.stat().st_size > 0
        try:
            if _fetched(file, progress, is_over) == file.hash:
                file.part.replace(file.to)
                sync_folder(file.to.parent)
                fail_at("stage.copied")
                return
        except Unreadable as error:
            raise unread(error) from None
        if is_over():
            return
        file.part.unlink(missing_ok=True)
        if not resumed:
            break
    raise ShardError(f"{file.files.address}/{file.name}: damaged at its source (hash differs); see data-prep verify")


def _fetched(file: _File, progress: Beside, is_over: Callable[[], bool]) -> str:
    """The xxh3-128 of the part file when it has all the bytes."""
    digest = xxhash.xxh3_128()
    with file.part.open("a+b") as part:
        part.seek(0)
        while data := part.read(PIECE_BYTES):
            digest.update(data)
        at = part.tell()
        while not is_over():
            data = file.files.raw(file.name, at, PIECE_BYTES)
            with writing(file.part, len(data)):
                part.write(data)
            digest.update(data)
            progress.add(len(data) if file.bytes else 0)
            fail_at("stage.piece")
            at += len(data)
            if len(data) < PIECE_BYTES:
                break
        if file.bytes > at and not is_over():  # a mount that shows it later, or a copy that was cut short
            raise Outage(f"{file.files.address}/{file.name}: {at} bytes, expected {file.bytes}; try again")
        part.flush()
        os.fsync(part.fileno())
    return digest.hexdigest()
