"""A bounded cache of blocks on a node's own disk, shared by its ranks, and by any runs that name the same folder.

    FOLDER/longhaul-cache-1/ab/ab12…       what was fetched, under its xxh3-128
    FOLDER/longhaul-cache-1/ab/.ab12….part what is being fetched, locked by whoever fetches it
    FOLDER/longhaul-cache-1/size           bytes of all these files, never less than there are

Nothing here is believed: a file is checked against its name when it is read, and fetched again when it differs. So a
kill, a crash of the machine or a flipped bit cost a download. A lock goes with the process that holds it; what a killed
one left is taken over by the next who wants it, or swept away. Room is made by removing what was used longest ago.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash
from pydantic import Field

from configs import ConfigError, Float, Section
from data_pipeline.failpoints import fail_at
from data_pipeline.files import Bytes, Check, Damaged, Files

log = logging.getLogger("data-prep")

GIB = 2**30
LAYOUT = "longhaul-cache-1"
KEY = re.compile(r"[0-9a-f]{32}")
FULL_TO = 0.9  # of the limit, after room was made
TOUCH_S = 60.0  # a use is written down once in so many seconds
WAIT_S = 120.0  # for another process that fetches the same; then it is fetched twice
LOOK_S = 0.01


class Cache(Section):
    """Where a node keeps what it has read of remote shards, and how much of it."""

    folder: Path
    gib: Float = Field(gt=0)  # at most; what was used longest ago goes first

    def open(self) -> DiskCache:
        """Raises ConfigError where there can be no such folder."""
        try:
            return DiskCache(self.folder, round(self.gib * GIB))
        except OSError as error:
            raise ConfigError(f"data.cache.folder: {self.folder}: {error.strerror}") from None


class DiskCache:
    """The cache in a folder. Safe to use from any number of threads and processes."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder / LAYOUT, limit_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self.warned = False

    def get(self, key: str, fetch: Callable[[], bytes]) -> bytes:
        """The bytes whose xxh3-128 is `key` (hex): from here, else as `fetch` gives them, which checks them."""
        path = self._path(key)
        if (data := self._right(path)) is not None:
            return data
        with self._alone(path) as part:
            if (data := self._right(path)) is not None:  # another has fetched it meanwhile
                return data
            data = fetch()
            fail_at("cache.fetched")
            if part is not None:
                self._keep(part, path, data)
            return data

    def piece(self, key: str, offset: int, size: int) -> bytes | None:
        """A piece of what is kept under `key`, not checked; None where that is not here."""
        try:
            with self._path(key).open("rb", buffering=0) as file:
                self._touch(file.fileno(), self._path(key))
                return os.pread(file.fileno(), size, offset)
        except OSError:
            return None

    def drop(self, key: str) -> None:
        """Remove what turned out to be damaged."""
        log.warning("%s: damaged, fetched again", self._path(key))
        with suppress(OSError):
            self._path(key).unlink()

    # --- reading ------------------------------------------------------------------------------------------------------

    def _path(self, key: str) -> Path:
        assert KEY.fullmatch(key), key
        return self.folder / key[:2] / key

    def _right(self, path: Path) -> bytes | None:
        try:
            with path.open("rb", buffering=0) as file:
                data = file.readall()
                self._touch(file.fileno(), path)
        except OSError:  # a disk that cannot be read is one that does not have it
            return None
        if xxhash.xxh3_128_hexdigest(data) == path.name:
            return data
        self.drop(path.name)
        return None

    def _touch(self, descriptor: int, path: Path) -> None:
        if time.time() - os.fstat(descriptor).st_mtime > TOUCH_S:
            with suppress(OSError):
                os.utime(path)

    # --- writing ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _alone(self, path: Path) -> Iterator[int | None]:
        """The open part file of `path`, held by nobody else; None where the disk gives none, or another holds it on."""
        part, deadline = path.with_name(f".{path.name}.part"), time.monotonic() + WAIT_S
        descriptor: int | None = None
        try:
            while descriptor is None and time.monotonic() < deadline:
                descriptor = _locked(part, os.O_CREAT)
                if descriptor is None:
                    if path.exists():
                        break
                    time.sleep(LOOK_S)
        except OSError as error:
            self._warn(error)
        try:
            yield descriptor
        finally:
            if descriptor is not None:
                with suppress(OSError):
                    if os.path.samestat(os.fstat(descriptor), part.stat()):  # not kept
                        part.unlink()
                os.close(descriptor)

    def _keep(self, part: int, path: Path, data: bytes) -> None:
        """Write what was fetched. Not synced: what a crash of the machine spoils is found when it is read."""
        try:
            if not self._reserve(part, len(data)):
                return
            fail_at("cache.reserved")
            view = memoryview(data)
            while view:
                view = view[os.pwrite(part, view, len(data) - len(view)) :]
            fail_at("cache.written")
            path.with_name(f".{path.name}.part").rename(path)
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self.warned:
            self.warned = True
            log.warning("%s: %s: going on without keeping what is read", self.folder, error.strerror)

    # --- room ---------------------------------------------------------------------------------------------------------

    def _reserve(self, part: int, count: int) -> bool:
        """Make the part file `count` bytes long, within the limit; False where it is larger than the limit."""
        if count > self.limit_bytes:
            return False
        with (self.folder / "size").open("a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            text = os.pread(file.fileno(), 32, 0)
            total = int(text) if text.strip().isdigit() else self.limit_bytes  # not known: looked at now
            if total + count > self.limit_bytes:
                total = self._sweep(min(int(FULL_TO * self.limit_bytes), self.limit_bytes - count))
            file.truncate(0)
            file.write(b"%d" % (total + count))  # before the bytes are there: a kill leaves it too high, never too low
            os.ftruncate(part, count)
        return True

    def _sweep(self, down_to: int) -> int:
        """Remove parts of killed processes, and what was used longest ago, until `down_to` bytes are left; what is."""
        found: list[tuple[int, int, str]] = []  # (last use, bytes, path)
        total = 0
        for entry in _entries(self.folder):
            with suppress(FileNotFoundError):
                about = entry.stat()
                if KEY.fullmatch(entry.name):
                    found.append((about.st_mtime_ns, about.st_size, entry.path))
                elif _removed(Path(entry.path)):
                    continue
                total += about.st_size
        for _, size, path in sorted(found):
            if total <= down_to:
                break
            with suppress(FileNotFoundError):
                Path(path).unlink()
            total -= size
        return total


def _locked(part: Path, create: int = 0) -> int | None:
    """A part file that is locked now; None where another has it."""
    try:
        descriptor = os.open(part, os.O_RDWR | create, 0o666)
    except FileNotFoundError:
        if not create:
            return None
        part.parent.mkdir(exist_ok=True)
        descriptor = os.open(part, os.O_RDWR | create, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), part.stat()):  # else its holder has just finished with it
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _removed(part: Path) -> bool:
    """Remove a part file that nobody holds any more."""
    descriptor = _locked(part)
    if descriptor is None:
        return False
    part.unlink()
    os.close(descriptor)
    return True


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    for bucket in sorted(folder.glob("[0-9a-f][0-9a-f]")):
        with os.scandir(bucket) as entries:
            yield from entries


class Cached:
    """Files read through a cache. A damaged piece of the cache is fetched again, a damaged one of the files is not."""

    is_far = True

    def __init__(self, below: Files, cache: DiskCache) -> None:
        self.below, self.cache, self.address = below, cache, below.address
        self.spoiled: set[str] = set()  # files that are damaged below, of which single rows may be whole

    def part(self, name: str, offset: int, size: int, hash: bytes, buffer: bytearray | None = None) -> Bytes:
        return self.cache.get(hash.hex(), lambda: bytes(self.below.part(name, offset, size, hash)))

    def row(self, name: str, offset: int, size: int, is_right: Check, file_hash: str) -> bytes:
        """Of a file that is fetched as a whole, unless it is damaged at its source."""
        if file_hash in self.spoiled:
            return self.below.row(name, offset, size, is_right, file_hash)
        data = self.cache.piece(file_hash, offset, size)
        if data is not None and is_right(data):
            return data
        if data is not None:
            self.cache.drop(file_hash)
        try:
            data = self.whole(name, file_hash)[offset : offset + size]
        except Damaged:
            self.spoiled.add(file_hash)
            return self.below.row(name, offset, size, is_right, file_hash)
        if not is_right(data):
            raise Damaged(data)
        return data

    def whole(self, name: str, hash: str | None = None) -> bytes:
        if hash is None:
            return self.below.whole(name)
        return self.cache.get(hash, lambda: self.below.whole(name, hash))

    def raw(self, name: str, offset: int, size: int) -> bytes:
        return self.below.raw(name, offset, size)

    def expect(self, name: str, offset: int, size: int) -> None:
        pass

    def close(self) -> None:
        self.below.close()
