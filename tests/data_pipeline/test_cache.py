"""The cache on a node's disk: bounded, shared by processes, right whatever was killed or spoiled."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import xxhash

from data_pipeline.cache import LAYOUT, DiskCache
from tests.processes import HERE

KIB = 2**10


def block(number: int, size: int = 4 * KIB) -> bytes:
    return bytes([number]) * size


def key(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


class Source:
    """Gives blocks, and counts how often."""

    def __init__(self) -> None:
        self.given: list[bytes] = []

    def of(self, data: bytes) -> Callable[[], bytes]:
        def fetch() -> bytes:
            self.given.append(data)
            return data

        return fetch


def bytes_kept(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / LAYOUT).glob("??/*") if path.is_file())


def kept(cache: DiskCache) -> set[str]:
    return {path.name for path in cache.folder.glob("??/[0-9a-f]*")}


def test_what_is_fetched_once_is_there_after_a_restart(tmp_path: Path) -> None:
    source, data = Source(), block(1)
    for _ in range(3):
        assert DiskCache(tmp_path, 64 * KIB).get(key(data), source.of(data)) == data
    assert source.given == [data]
    assert DiskCache(tmp_path, 64 * KIB).piece(key(data), 10, 5) == data[10:15]
    assert DiskCache(tmp_path, 64 * KIB).piece(key(block(2)), 10, 5) is None


def test_the_limit_holds_and_the_longest_unused_goes(tmp_path: Path) -> None:
    cache, source = DiskCache(tmp_path, 40 * KIB), Source()
    for number in range(10):
        cache.get(key(block(number)), source.of(block(number)))
        os.utime(cache._path(key(block(number))), (1000 + number, 1000 + number))
    assert bytes_kept(tmp_path) == 40 * KIB
    cache.get(key(block(0)), source.of(block(0)))  # used now, long after its last use
    cache.get(key(block(10)), source.of(block(10)))
    assert bytes_kept(tmp_path) <= 40 * KIB
    assert kept(cache) == {key(block(n)) for n in (0, *range(2, 11))}
    large = block(11, 41 * KIB)
    assert cache.get(key(large), source.of(large)) == large
    assert key(large) not in kept(cache)


@pytest.mark.parametrize("spoil", ["flip", "cut", "empty", "zeros"])
def test_what_is_damaged_is_fetched_again(spoil: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache, source, data = DiskCache(tmp_path, 64 * KIB), Source(), block(7)
    cache.get(key(data), source.of(data))
    path = cache._path(key(data))
    path.write_bytes(
        {"flip": data[:100] + b"\0" + data[101:], "cut": data[:-1], "empty": b"", "zeros": bytes(len(data))}[spoil]
    )
    assert cache.get(key(data), source.of(data)) == data
    assert path.read_bytes() == data and len(source.given) == 2
    assert caplog.messages == [f"{path}: damaged, fetched again"]


def test_a_failed_fetch_leaves_nothing_that_counts(tmp_path: Path) -> None:
    cache, data = DiskCache(tmp_path, 64 * KIB), block(1)

    def fail() -> bytes:
        raise KeyError("away")

    with pytest.raises(KeyError):
        cache.get(key(data), fail)
    assert not list(cache.folder.glob("??/*"))
    assert cache.get(key(data), lambda: data) == data


def test_a_disk_that_takes_nothing_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache, source = DiskCache(tmp_path, 64 * KIB), Source()
    (cache.folder / "size").mkdir()
    for number in range(2):
        assert cache.get(key(block(number)), source.of(block(number))) == block(number)
    assert not kept(cache)
    assert caplog.messages == [f"{cache.folder}: Is a directory: going on without keeping what is read"]  # once


def test_threads_fetch_a_block_once(tmp_path: Path) -> None:
    cache, source, got = DiskCache(tmp_path, 64 * KIB), Source(), list[bytes]()

    def slow() -> bytes:
        time.sleep(0.2)
        return source.of(block(3))()

    threads = [threading.Thread(target=lambda: got.append(cache.get(key(block(3)), slow))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [block(3)] * 8 and len(source.given) == 1


PROGRAM = """
import sys, xxhash
from pathlib import Path
from data_pipeline.cache import DiskCache
folder, first, count, limit = Path(sys.argv[1]), *map(int, sys.argv[2:])
cache = DiskCache(folder, limit)
def fetch(data):
    with (folder / "fetched").open("ab", buffering=0) as file:
        file.write(data[:1])
    return data
for number in range(first, first + count):
    data = bytes([number % 256]) * 4096
    assert cache.get(xxhash.xxh3_128_hexdigest(data), lambda: fetch(data)) == data
"""


def process(folder: Path, first: int, count: int, limit: int, fail_at: str = "") -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(HERE), "LONGHAUL_FAIL_AT": fail_at}
    arguments = map(str, (folder, first, count, limit))
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], env=environment)


def test_processes_share_it_and_fetch_nothing_twice(tmp_path: Path) -> None:
    started = [process(tmp_path, 0, 100, 2**20) for _ in range(3)]
    assert [each.wait(60) for each in started] == [0, 0, 0]
    assert sorted((tmp_path / "fetched").read_bytes()) == list(range(100))
    assert bytes_kept(tmp_path) == 100 * 4096


@pytest.fixture(params=["cache.fetched", "cache.reserved", "cache.written"])
def killed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A cache whose user was killed at a failpoint, at its third block."""
    assert process(tmp_path, 0, 10, 2**20, f"{request.param}#3=kill").wait(60) == -9
    yield tmp_path


def test_killed_at_any_point_it_is_whole_and_goes_on(killed: Path) -> None:
    cache, source = DiskCache(killed, 10 * 4096), Source()
    assert len(kept(cache)) == 2
    for number in range(20):
        data = bytes([number]) * 4096
        assert cache.get(key(data), source.of(data)) == data
        assert bytes_kept(killed) <= 10 * 4096
    assert len(source.given) == 18
    assert not list(cache.folder.glob("??/.*"))  # the part that the killed one left was taken over
