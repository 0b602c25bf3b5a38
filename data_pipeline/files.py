"""Where the files of a corpus are, and how their bytes are read and checked: a folder, a mount, a server, a store.

What is read is compared with its hash, and read once more before it is called damaged. Bytes that cannot be had are
another matter (`Unreadable`): they are waited for, as a shared mount may show a file late, and never taken for damage.
"""

from __future__ import annotations

import errno
import functools
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeVar

import xxhash

from configs import ConfigError

T = TypeVar("T")
REMOTE = ("s3://", "https://", "http://")
LATE = (errno.ENOENT, errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.ETIMEDOUT, errno.EREMOTEIO)
PATIENCE_S = 2.0  # of a run, for a file of a folder that is not there, or not as long as it should be
LOOK_S = 0.5  # between two looks whether this process is to stop
MOUNT_PATIENCE_S = 75.0  # on a shared mount; NFS looks at a folder again after up to 60 s


class Stopped(Exception):
    """This process was asked to stop while its main thread waited for files."""


_asked: list[Callable[[], bool]] = []


@contextmanager
def stopping(when: Callable[[], bool]) -> Iterator[None]:
    """While this lasts, the main thread waits for no files any more once `when` is true: it raises Stopped."""
    _asked.append(when)
    try:
        yield
    finally:
        _asked.remove(when)


def wait(seconds: float) -> None:
    """Sleep between two attempts. Raises Stopped, see `stopping`."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if threading.current_thread() is threading.main_thread() and any(when() for when in _asked):
            raise Stopped
        time.sleep(min(left, LOOK_S))


def watched(call: Callable[[], T]) -> T:
    """What `call` gives, made in a thread of its own where this is the main thread within `stopping`.

    Raises Stopped, and leaves the call behind: a request that nobody answers returns late, and a library that asks
    again by itself returns never in between.
    """
    if not _asked or threading.current_thread() is not threading.main_thread():
        return call()
    result: Future[T] = Future()

    def make() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=make, daemon=True, name="longhaul-open").start()
    while futures.wait([result], LOOK_S).not_done:
        if any(when() for when in _asked):
            raise Stopped
    return result.result()


class Unreadable(Exception):
    """Bytes that could not be had, however long they were waited for. One line."""


class Missing(Unreadable):
    """A file that is not there."""


class Outage(Unreadable):
    """Bytes that could not be had now: storage that is away. Any other Unreadable is for somebody to mend."""


class Damaged(Exception):
    """Bytes that are there, and are not those that were written. `data` is what was read."""

    def __init__(self, data: Bytes) -> None:
        super().__init__(f"{len(data)} bytes")
        self.data = data


Bytes = bytes | memoryview
Check = Callable[[Bytes], bool]


class Files(Protocol):
    """The files of a corpus. Each may be read by several threads. All reads raise Unreadable, and Damaged."""

    address: str
    is_far: bool  # so that it pays to fetch ahead

    def part(self, name: str, offset: int, size: int, hash: bytes, buffer: bytearray | None = None) -> Bytes:
        """Bytes of a file whose xxh3-128 is known. They may be read into a buffer, and lie in it then."""
        ...

    def row(self, name: str, offset: int, size: int, is_right: Check, file_hash: str) -> bytes:
        """Bytes that check themselves, of a file whose xxh3-128 (hex) is known."""
        ...

    def whole(self, name: str, hash: str | None = None) -> bytes:
        """A small file, checked where its xxh3-128 (hex) is known."""
        ...

    def raw(self, name: str, offset: int, size: int) -> bytes:
        """Bytes as they are, fewer only where the file ends."""
        ...

    def expect(self, name: str, offset: int, size: int) -> None:
        """Bytes that will be read soon: where the kernel reads them, it may begin to."""
        ...

    def close(self) -> None:
        """Close what is open; it opens again when it is needed."""
        ...


class _Checked:
    """What all places have in common: the checks."""

    address: str

    def raw(self, name: str, offset: int, size: int) -> bytes:
        raise NotImplementedError

    def full(self, name: str, offset: int, size: int, buffer: bytearray | None = None) -> Bytes:
        """The same where there ought to be so many."""
        return self.raw(name, offset, size)

    def size(self, name: str) -> int:
        raise NotImplementedError

    def renew(self, name: str) -> None:
        """Before a file is read again because what came was not right."""

    def part(self, name: str, offset: int, size: int, hash: bytes, buffer: bytearray | None = None) -> Bytes:
        return self._right(name, offset, size, lambda data: xxhash.xxh3_128_digest(data) == hash, buffer)

    def row(self, name: str, offset: int, size: int, is_right: Check, file_hash: str) -> bytes:
        return bytes(self._right(name, offset, size, is_right))

    def whole(self, name: str, hash: str | None = None) -> bytes:
        return bytes(self._right(name, 0, None, lambda data: hash is None or xxhash.xxh3_128_hexdigest(data) == hash))

    def expect(self, name: str, offset: int, size: int) -> None:
        pass

    def _right(
        self, name: str, offset: int, size: int | None, is_right: Check, buffer: bytearray | None = None
    ) -> Bytes:
        for _ in range(2):
            count = self.size(name) if size is None else size
            data = self.full(name, offset, count, buffer)
            if len(data) < count:
                break
            if is_right(data):
                return data
            self.renew(name)
        raise Damaged(data)

    def close(self) -> None:
        pass


class Folder(_Checked):
    """A folder of this machine, or one on a mount, which is waited for longer."""

    MAX_OPEN = 32  # files, two of a shard: more would seldom be asked for again, as blocks are dealt from all shards

    def __init__(self, folder: Path, patience_s: float = 0.0) -> None:
        self.folder, self.address, self.patience_s = folder, str(folder), patience_s
        self.is_far = patience_s > PATIENCE_S
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def raw(self, name: str, offset: int, size: int) -> bytes:
        return bytes(self._patiently(name, lambda: self._pread(name, offset, size), lambda _: True))

    def full(self, name: str, offset: int, size: int, buffer: bytearray | None = None) -> Bytes:
        with suppress(OSError):  # as it nearly always goes
            if len(data := self._pread(name, offset, size, buffer)) == size:
                return data
        return self._patiently(name, lambda: self._pread(name, offset, size), lambda data: len(data) == size)

    def size(self, name: str) -> int:
        def count() -> int:
            opened = self._opened(name)
            return os.fstat(opened.number).st_size

        return self._patiently(name, count, lambda _: True)

    def renew(self, name: str) -> None:
        with self._lock:
            self._open.pop(name, None)

    def whole(self, name: str, hash: str | None = None) -> bytes:
        try:
            return super().whole(name, hash)
        finally:
            self.renew(name)

    def close(self) -> None:
        with self._lock:
            self._open.clear()

    def expect(self, name: str, offset: int, size: int) -> None:
        with suppress(OSError):  # whoever reads it will say so
            opened = self._opened(name)
            os.posix_fadvise(opened.number, offset, size, os.POSIX_FADV_WILLNEED)

    def _pread(self, name: str, offset: int, size: int, buffer: bytearray | None = None) -> Bytes:
        opened = self._opened(name)  # held, so that it stays open
        if buffer is None:
            return os.pread(opened.number, size, offset)
        view = memoryview(buffer)[:size]
        return view[: os.preadv(opened.number, [view], offset)]

    def _opened(self, name: str) -> _Descriptor:
        with self._lock:
            if name in self._open:
                self._open.move_to_end(name)
                return self._open[name]
            while len(self._open) >= self.MAX_OPEN:
                self._open.popitem(last=False)
        opened = _Descriptor(f"{self.address}/{name}")  # not under the lock: it may take a mount its time
        with self._lock:
            self._open[name] = opened
        return opened

    def _patiently(self, name: str, read: Callable[[], T], is_enough: Callable[[T], bool]) -> T:
        """Read again, through a new descriptor, what is not there, stale, or too short; the last result counts."""
        deadline, pause = time.monotonic() + self.patience_s, 0.05
        while True:
            over = time.monotonic() >= deadline
            try:
                if is_enough(result := read()) or over:
                    return result
            except OSError as error:
                if over or error.errno not in LATE:
                    raise self._refusal(name, error) from None
            self.renew(name)
            wait(min(pause, max(deadline - time.monotonic(), 0.01)))
            pause = min(2 * pause, 5.0)

    def _refusal(self, name: str, error: OSError) -> Unreadable:
        if error.errno == errno.ENOENT:
            return Missing(f"{self.folder / name}: missing")
        return (Outage if error.errno in LATE else Unreadable)(f"{self.folder / name}: {error.strerror}")


class _Descriptor:
    """An open file, closed when nobody uses it any more."""

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class Remote(_Checked):
    """Files on a web server or in a store that speaks S3, read by ranges (see sources/remote.py)."""

    is_far = True

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")

    def raw(self, name: str, offset: int, size: int) -> bytes:
        from data_pipeline.sources import remote

        return self._asked(name, lambda: remote.read_range(f"{self.address}/{name}", offset, offset + size))

    def size(self, name: str) -> int:
        from data_pipeline.sources import remote

        return self._asked(name, lambda: remote.describe(f"{self.address}/{name}")[0])

    def _asked(self, name: str, ask: Callable[[], T]) -> T:
        from data_pipeline.sources.inputs import InputError
        from data_pipeline.sources.remote import Gone, Unanswered

        try:
            return ask()
        except Gone:
            raise Missing(f"{self.address}/{name}: missing") from None
        except Unanswered as error:
            raise Outage(str(error)) from None
        except InputError as error:
            raise Unreadable(str(error)) from None


def is_remote(place: Path | str) -> bool:
    """Whether shards lie on a server or in a store."""
    return str(place).startswith(REMOTE)


@functools.lru_cache(maxsize=64)
def _remote(address: str) -> Remote:
    return Remote(address)


def files_of(place: Path | str, shared_mount: bool = False) -> Files:
    """The files at a folder or an address. Raises ConfigError for an address of another kind."""
    if is_remote(place):
        return _remote(str(place))
    if "://" in str(place):
        raise ConfigError(f"expected a folder, s3://bucket/prefix or https://..., got {str(place)!r}")
    return Folder(Path(place), MOUNT_PATIENCE_S if shared_mount else PATIENCE_S)
