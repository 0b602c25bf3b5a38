"""Shards on servers, in stores and on mounts: the same batches, bounded waits, damage told from absence."""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import obstore
import pytest

from configs import ConfigError, build
from data_pipeline import files
from data_pipeline.blocks import NONE, OpenBlocks, Wanted
from data_pipeline.cache import LAYOUT
from data_pipeline.files import Folder, files_of
from data_pipeline.order import Order, Segment, Skips, Steps, Withdrawal
from data_pipeline.shards import DamagedBlock, Manifest, ShardError, Unreachable, seal
from data_pipeline.sources import remote
from data_pipeline.sources.remote import Patience
from data_pipeline.stage import stage
from data_pipeline.stream import Batch, Corpora, Data, Stream, Validation
from data_pipeline.summary import folder_tokenizer
from data_pipeline.trace import documents_of
from tests.corpora import FORMAT, make_corpus, make_slice
from tests.data_pipeline.servers import KEY, Server, forget, moto

T = 128
STEPS = 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora") / "alpha"
    make_corpus(folder, 1, slices=2, documents=80)
    return folder


@pytest.fixture
def server(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A web server with the corpus under /a."""
    monkeypatch.setattr(remote, "PATIENCE", Patience(attempts=3, wait_s=0.01, silence_s=5, range_s=20))
    forget()
    server = Server()
    for path in corpus.rglob("*"):
        if path.is_file():
            server.files[f"/a/{path.relative_to(corpus)}"] = path.read_bytes()
    yield server
    server.close()
    forget()


def data_of(shards: Path | str, source: dict[str, Any] | None = None, **more: Any) -> Data:
    tree = {"seq_tokens": T, "sources": {"alpha": {"shards": str(shards), **(source or {})}}, "group_blocks": 2, **more}
    return build(Data, tree, "test")


def stream_of(data: Data, rank: int = 0, ranks: int = 1, skips: Skips | None = None) -> Stream:
    corpora = Corpora(data)
    pools = corpora.pools({"alpha": 1})
    order = Order(3, pools, 4, data.group_blocks, [Segment(0, {"alpha": 1.0}, {"alpha": 1})])
    return Stream(order, Steps([(0, 10)]), skips or Skips(), corpora.shards(pools), data, 3, rank, ranks)


def read(data: Data, rank: int = 0, ranks: int = 1) -> list[Batch]:
    return list(stream_of(data, rank, ranks).batches(0, STEPS))


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        x.digest == y.digest and np.array_equal(x.tokens, y.tokens) for x, y in zip(a, b, strict=True)
    )


def cached(folder: Path, gib: float = 1.0) -> dict[str, Any]:
    return {"cache": {"folder": str(folder), "gib": gib}}


def block_requests(server: Server) -> list[tuple[str, str]]:
    return [(path, asked) for path, asked in server.requests if path.endswith(".tar")]


# --- the same as from disk --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"read_threads": 3, "fetch_threads": 2}, {"prefetch_blocks": 1}])
def test_batches_from_a_web_server_are_those_from_disk(
    more: dict[str, Any], corpus: Path, server: Server, tmp_path: Path
) -> None:
    expected = read(data_of(corpus))
    assert same(read(data_of(f"{server.address}/a", **more)), expected)
    blocks = block_requests(server)
    assert len(blocks) == len(set(blocks))  # what was fetched ahead has pushed nothing out that was needed
    server.requests.clear()
    assert same(read(data_of(f"{server.address}/a", **more, **cached(tmp_path))), expected)
    blocks = block_requests(server)
    assert len(blocks) == len(set(blocks))  # each block once
    assert sum(path.endswith("index.npy") for path, _ in server.requests) < 20  # an index is fetched whole
    server.requests.clear()
    assert same(read(data_of(f"{server.address}/a", **more, **cached(tmp_path))), expected)
    assert [path for path, _ in server.requests if not path.endswith("MANIFEST.json")] == []


def test_batches_from_a_store_are_those_from_disk(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read(data_of(corpus))
    with moto(monkeypatch, "shards") as bucket:
        for path in corpus.rglob("*"):
            if path.is_file():
                obstore.put(bucket, f"b/alpha/{path.relative_to(corpus)}", path.read_bytes())
        assert same(read(data_of("s3://shards/b/alpha/")), expected)
        assert same(read(data_of("s3://shards/b/alpha", **cached(tmp_path))), expected)
        with pytest.raises(ConfigError, match=r"^data.sources.alpha.shards: s3://shards/c: no MANIFEST.json: not a"):
            Corpora(data_of("s3://shards/c"))
        obstore.put(bucket, "b/alpha/slices/s0/train-00000.tar", corpus.read_bytes() if corpus.is_file() else b"short")
        with pytest.raises(DamagedBlock, match=r"^s3://shards/b/alpha/slices/s0/train-00000.tar: block 0 is truncated"):
            Manifest.read(files_of("s3://shards/b/alpha")).shards("train", 0).read(0)


def test_ranks_of_a_node_share_what_they_read(corpus: Path, server: Server, tmp_path: Path) -> None:
    """Also the blocks that two of them need, and those of validation, which all need."""
    data = data_of(f"{server.address}/a", **cached(tmp_path))
    batches: dict[int, list[Batch]] = {}
    threads = [threading.Thread(target=lambda r=r: batches.__setitem__(r, read(data, r, 3))) for r in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(batches[rank], read(data_of(corpus), rank, 3)) for rank in range(3))
    for rank in range(3):
        rows = Validation(Corpora(data).manifests["alpha"], 1, T, 10**6).batches(2, rank, 3)
        local = Validation(Corpora(data_of(corpus)).manifests["alpha"], 1, T, 10**6).batches(2, rank, 3)
        for one, other in zip(rows, local, strict=True):
            assert all(np.array_equal(x, y) for x, y in zip(one[:2], other[:2], strict=True))
    blocks = block_requests(server)
    assert len(blocks) == len(set(blocks))


def test_a_tiny_cache_changes_nothing_but_what_is_fetched(corpus: Path, server: Server, tmp_path: Path) -> None:
    limit = 20_000  # bytes: some blocks
    data = data_of(f"{server.address}/a", **cached(tmp_path, limit / 2**30))
    assert same(read(data), read(data_of(corpus)))
    assert sum(path.stat().st_size for path in (tmp_path / LAYOUT).glob("??/*")) <= limit


def test_what_steps_will_need_is_fetched_before(corpus: Path, server: Server) -> None:
    """While the first batch is looked at, blocks of later steps arrive."""
    needed = {number for numbers in stream_of(data_of(corpus))._blocks(0, STEPS) for number in numbers.tolist()}
    batches = stream_of(data_of(f"{server.address}/a", prefetch_steps=1)).batches(0, STEPS)
    next(batches)
    deadline = time.monotonic() + 20
    while len(set(block_requests(server))) < min(len(needed), 10) and time.monotonic() < deadline:
        time.sleep(0.01)
    first = {number for numbers in stream_of(data_of(corpus))._blocks(0, 3) for number in numbers.tolist()}
    assert len(set(block_requests(server))) >= min(len(needed), 10) > 0 and len(first) <= len(needed)
    batches.close()  # type: ignore[attr-defined]


def test_where_documents_begin_is_fetched_ahead_with_the_blocks(corpus: Path, server: Server) -> None:
    """And the blocks of validation, each once, in their order."""
    masked = read(data_of(corpus, document_mask=True))
    for batch, expected in zip(read(data_of(f"{server.address}/a", document_mask=True)), masked, strict=True):
        assert batch.documents is not None and expected.documents is not None
        assert batch.documents.tolist() == expected.documents.tolist()
    blocks = block_requests(server)
    assert len(blocks) == len(set(blocks))
    rows = sum(path.endswith("index.npy") for path, _ in server.requests)
    assert rows * 2 == len(blocks)  # tokens and documents by one row of the index
    server.requests.clear()
    remote, local = (
        Validation(Corpora(data_of(place)).manifests["alpha"], 1, T, 10**6, document_mask=True, fetch_threads=4)
        for place in (f"{server.address}/a", corpus)
    )
    with remote.reading(1, 0, 1) as reading:
        assert reading.ready(20)
        deadline = time.monotonic() + 20
        while len(set(block_requests(server))) < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(set(block_requests(server))) >= 8  # of four blocks at least, while the first row is looked at
        for rows_here in local.batches(1, 0, 1):
            pairs = zip(reading.take(), rows_here, strict=True)
            assert all(a is not None and b is not None and np.array_equal(a, b) for a, b in pairs)
    blocks = block_requests(server)
    assert len(blocks) == len(set(blocks))


# --- servers that misbehave -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["500", "reset", "429"])
def test_a_passing_fault_is_passed_over(fault: str, corpus: Path, server: Server) -> None:
    for path in list(server.files):
        server.faults[path] = [fault]
    assert same(read(data_of(f"{server.address}/a")), read(data_of(corpus)))


def test_a_server_that_stays_away_is_one_line(corpus: Path, server: Server) -> None:
    stream = stream_of(data_of(f"{server.address}/a"))
    for path in server.files:
        server.faults[path] = ["503*"]
    with pytest.raises(ShardError, match=r"^http://127.*, after 3 attempts; run the same command again") as e:
        list(stream.batches(0, STEPS))
    assert not isinstance(e.value, DamagedBlock)
    with pytest.raises(Unreachable, match=r"^data.sources.alpha.shards: http://127.*, after 3 attempts; run the same "):
        Corpora(data_of(f"{server.address}/a"))  # no mistake of the configuration: a launcher starts it again
    manifest = Manifest.open(corpus)
    manifest = replace(manifest, files=files_of(f"{server.address}/a"))
    server.faults["/tokenizer.json"] = ["503*"]
    with pytest.raises(Unreachable, match=r"/tokenizer.json: .*, after 3 attempts; run the same command again"):
        folder_tokenizer(manifest)
    server.faults["/tokenizer.json"] = ["404*"]
    with pytest.raises(ConfigError, match=r"/tokenizer.json: no such tokenizer file$"):
        folder_tokenizer(manifest)
    server.faults["/tokenizer.json"] = ["403*"]
    with pytest.raises(ConfigError, match=r"its server refuses it \(HTTP 403\)"):
        folder_tokenizer(manifest)
    for path in server.files:
        server.faults[path] = ["404*"]
    with pytest.raises(ShardError, match=NOT_THERE):
        list(stream.batches(0, STEPS))


@pytest.mark.parametrize("fault", ["401*", "403*", "418*", "whole*"])
def test_a_mistake_that_lasts_is_no_outage(fault: str, corpus: Path, server: Server) -> None:
    """Nor is it taken for one in mid-run: a launcher need not start again what only its user can mend."""
    stream = stream_of(data_of(f"{server.address}/a"))
    for path in server.files:
        server.faults[path] = [fault]
    with pytest.raises(ShardError) as error:
        stream.batch(0)
    assert not isinstance(error.value, Unreachable)
    if fault != "whole*":  # which serves a small file all the same
        with pytest.raises(ConfigError, match=r"^data\.sources\.alpha\.shards: http://127.*HTTP 4"):
            Corpora(data_of(f"{server.address}/a"))


@pytest.mark.parametrize(("status", "passes"), [("503", True), ("429", True), ("403", False), ("418", False)])
def test_a_store_that_is_away_is_told_from_one_that_refuses(
    status: str, passes: bool, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {**KEY, "AWS_ENDPOINT_URL": server.address}.items():
        monkeypatch.setenv(key, value)
    server.files["/a/MANIFEST.json"], server.faults["/a/MANIFEST.json"] = b"{}", [f"{status}*"]
    with pytest.raises(ShardError) as error:
        Manifest.read(files_of("s3://a"))
    assert isinstance(error.value, Unreachable) == passes


@pytest.mark.parametrize(("number", "passes"), [(errno.EACCES, False), (errno.EIO, True), (errno.ESTALE, True)])
def test_a_folder_that_may_not_be_read_is_no_outage(
    number: int, passes: bool, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(ShardError) as error:
        Manifest.read(Folder(corpus, 0.1))
    assert isinstance(error.value, Unreachable) == passes


def test_an_end_waits_for_no_server(corpus: Path, server: Server) -> None:
    """Closed while a body stalls: the reading threads are gone soon, though the server is not."""
    stream = stream_of(data_of(f"{server.address}/a", prefetch_steps=4))
    batches = stream.batches(0, STEPS)
    next(batches)
    for path in server.files:
        server.faults[path] = ["stall*"]
    stream.open_blocks.held.numbers[:] = NONE
    stream.open_blocks.fetched.clear()
    time.sleep(0.1)
    begun = time.monotonic()
    batches.close()  # type: ignore[attr-defined]
    assert not [t.name for t in threading.enumerate() if t.name.startswith("longhaul-read")]
    assert time.monotonic() - begun < 15  # the server holds a body for 30 s


@pytest.mark.parametrize("place", ["{address}/a", "s3://a"])
def test_a_start_hears_a_signal_while_a_request_is_silent(
    place: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only between two attempts, of which a library makes its own out of hearing."""
    monkeypatch.setattr(remote, "PATIENCE", Patience(attempts=1, wait_s=0.01, silence_s=4, range_s=6))
    for key, value in {**KEY, "AWS_ENDPOINT_URL": server.address}.items():
        monkeypatch.setenv(key, value)
    server.faults["/a/MANIFEST.json"] = ["stall*"]
    with files.stopping(lambda: bool(server.requests)), pytest.raises(files.Stopped):
        Corpora(data_of(place.format(address=server.address)))


def test_documents_are_named_by_one_look_at_a_block_and_no_longer_than_wanted(corpus: Path, server: Server) -> None:
    here, far = stream_of(data_of(corpus)), stream_of(data_of(f"{server.address}/a"))
    samples = np.arange(80)
    server.requests.clear()
    looks: list[int] = []
    found = documents_of(far.order, far.open_blocks.shards, samples, T, lambda: looks.append(1))
    assert found == documents_of(here.order, here.open_blocks.shards, samples, T) and looks
    blocks = block_requests(server)
    assert len(blocks) <= 2 * len(set(far.order.locate(samples).block.tolist()))  # its own, and that behind it

    class Enough(Exception):
        pass

    def look() -> None:
        if len(server.requests) > before:
            raise Enough

    for path in server.files:
        server.faults[path] = ["stall*"]
    before = len(server.requests)
    with pytest.raises(Enough):
        documents_of(far.order, far.open_blocks.shards, samples, T, look)


def test_a_reader_that_dies_is_an_error_and_no_hang(corpus: Path, server: Server) -> None:
    """Whatever ends a fetching thread's work, the step that needs the block says so."""
    stream = stream_of(data_of(f"{server.address}/a"))

    def die(block: int, buffer: bytearray | None) -> Any:
        raise SystemExit(f"killed at {block}")

    stream.open_blocks.shards[0].read = die  # type: ignore[method-assign,assignment]
    with pytest.raises(SystemExit, match="killed at"):
        list(stream.batches(0, STEPS))


def test_what_one_thread_has_promised_is_there_though_it_fails_to_look_ahead(corpus: Path, server: Server) -> None:
    """Others wait for it without end."""
    here, far = (Manifest.read(files_of(place)).shards("train", 0) for place in (corpus, f"{server.address}/a"))
    blocks = OpenBlocks([here, far], T + 1, 8)

    def steps() -> Iterator[npt.NDArray[np.int64]]:
        raise MemoryError("no room to look ahead")
        yield np.arange(0)

    with blocks.ahead(steps()):
        with pytest.raises(MemoryError):
            blocks.fill(Wanted(np.zeros((2, T + 1), FORMAT.dtype), np.arange(2), np.zeros(2, np.int64)))
        assert 0 in blocks.held and 1 in blocks.held and not blocks.reading


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("gs://bucket/x", "expected a folder, s3://bucket/prefix or https://host/path, got 'gs://bucket/x'"),
        ("https://me:SECRET@host/x", "expected an address without user, password, query and fragment"),
        ("https://host/x?token=SECRET", "expected an address without user, password, query and fragment"),
    ],
)
def test_addresses_that_are_refused(address: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"sources.alpha.shards: {expected}")) as error:
        data_of(address)
    assert "SECRET" not in str(error.value)


# --- damage -----------------------------------------------------------------------------------------------------------


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


NOT_THERE = (
    r": missing, though MANIFEST.json names it, with block \d+; run data-prep repair .*; "
    r"or pretrain amend RUN skip_blocks=alpha:0:\d+ to go on without it$"
)


def a_block(corpus: Path, step: int) -> tuple[str, int, int]:
    """(path on the server, row, byte in its middle) of a block that a step reads."""
    stream = stream_of(data_of(corpus))
    _, block = stream.open_blocks.place(int(next(stream._blocks(step, step + 1))[0]))
    shards = Manifest.open(corpus).shards("train", 0)
    shard, row = shards.locate(block)
    offset = int(np.load(shards.path(shard, "index.npy"))[row]["offset"])
    return f"/a/{shards.name(shard, 'tar')}", row, offset + 1000


def test_damage_at_the_source_stops_the_run_with_its_name(corpus: Path, server: Server, tmp_path: Path) -> None:
    path, row, at = a_block(corpus, 2)
    server.files[path] = flipped(server.files[path], at)
    slice_, name = Path(path).parent.name, Path(path).stem
    expected = (
        rf"^{server.address}{re.escape(path)}: block {row} is damaged \(between byte \d+ and \d+\); run data-prep "
        rf"repair CONFIG alpha/{slice_}/{name} where it was made, which sends it anew; "
        r"or pretrain amend RUN skip_blocks=alpha:0:\d+ to go on without it$"
    )
    for more in ({}, cached(tmp_path)):
        with pytest.raises(DamagedBlock, match=expected):
            read(data_of(f"{server.address}/a", **more))


@pytest.mark.parametrize("far", [True, False])
def test_a_missing_shard_is_named_and_can_be_gone_on_without(
    far: bool, corpus: Path, server: Server, tmp_path: Path
) -> None:
    path, _, _ = a_block(corpus, 2)
    place = tmp_path / "alpha"
    shutil.copytree(corpus, place)
    for suffix in ("tar", "index.npy"):
        server.files.pop(path.replace(".tar", f".{suffix}"))
        (place / path.removeprefix("/a/").replace(".tar", f".{suffix}")).unlink()
    data = data_of(f"{server.address}/a" if far else place)
    with pytest.raises(ShardError, match=NOT_THERE) as error:
        read(data)
    assert path.removeprefix("/a/").removesuffix("tar") in str(error.value)
    shards = Manifest.open(corpus).shards("train", 0)
    (gone,) = (i for i in range(len(shards)) if shards.name(i, "tar") == path.removeprefix("/a/"))
    rows = shards.format.block_tokens // data.seq_tokens
    spans = np.array([[shards.ends[gone] - shards.block_counts[gone], shards.ends[gone]]]) * rows
    whole = stream_of(data_of(corpus))
    skips = Skips([], whole.order, [Withdrawal(0, {0: spans})])
    batches = [list(stream_of(each, skips=skips).batches(0, STEPS)) for each in (data, data_of(corpus))]
    assert any((batch.valid == 0).any() for batch in batches[0])
    assert [batch.digest for batch in batches[0]] == [batch.digest for batch in batches[1]]


def test_one_bad_row_of_an_index_spoils_no_other(corpus: Path, server: Server, tmp_path: Path) -> None:
    shards = Manifest.open(corpus).shards("train", 0)
    index = f"/a/{shards.name(0, 'index.npy')}"
    row_bytes = shards.format.index_dtype.itemsize
    server.files[index] = flipped(server.files[index], len(server.files[index]) - row_bytes // 2)  # of the last row
    last = shards.block_counts[0] - 1 + (shards.tail_tokens[0] > 0)
    data = data_of(f"{server.address}/a", **cached(tmp_path))
    (far,) = Corpora(data).shards(Corpora(data_of(corpus)).pools({"alpha": 1}))
    for row in range(last):
        assert np.array_equal(far.member(0, row), shards.member(0, row))
    with pytest.raises(DamagedBlock, match=rf"index.npy: row {last} is damaged"):
        far.member(0, last)


def test_bytes_spoiled_on_the_way_are_read_once_more(corpus: Path, server: Server) -> None:
    path, _, at = a_block(corpus, 2)
    good, asked = server.files[path], 0

    class Once(dict[str, bytes]):
        def get(self, key: str, default: Any = None) -> Any:  # the server's look at a path
            nonlocal asked
            asked += key == path
            return flipped(good, at) if key == path and asked == 1 else super().get(key, default)

    server.files = Once(server.files)
    assert same(read(data_of(f"{server.address}/a", fetch_threads=1)), read(data_of(corpus)))
    assert asked > 1


def test_damage_in_the_cache_is_fetched_again(corpus: Path, server: Server, tmp_path: Path) -> None:
    data = data_of(f"{server.address}/a", **cached(tmp_path))
    expected = read(data)
    for path in (tmp_path / LAYOUT).glob("??/*"):  # blocks, indices and the table
        path.write_bytes(flipped(path.read_bytes(), path.stat().st_size * 2 // 3))
    server.requests.clear()
    assert same(read(data), expected)
    assert len(block_requests(server)) > 10


def test_a_damaged_block_whose_samples_are_skipped_is_not_needed(corpus: Path, server: Server) -> None:
    path, _, at = a_block(corpus, 0)
    server.files[path] = flipped(server.files[path], at)
    stream = stream_of(data_of(f"{server.address}/a"), skips=Skips([(0, 10)]))
    batch = stream.batch(0)
    assert not batch.valid.any() and batch.digest == 0
    with pytest.raises(DamagedBlock):
        stream_of(data_of(f"{server.address}/a")).batch(0)


# --- shared mounts ----------------------------------------------------------------------------------------------------


def test_late_files_of_a_mount_are_waited_for(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing, then too short, then whole: as a mount shows what another host has just written."""
    monkeypatch.setattr(files, "MOUNT_PATIENCE_S", 20.0)
    place = tmp_path / "alpha"
    shutil.copytree(corpus, place)
    tars = sorted(place.rglob("train*.tar"))
    whole = {path: path.read_bytes() for path in tars}
    for path in tars:
        path.unlink()

    def arrive() -> None:
        time.sleep(0.3)
        for path in tars:
            path.write_bytes(whole[path][:5000])
        time.sleep(0.3)
        for path in tars:
            path.write_bytes(whole[path])

    late = threading.Thread(target=arrive)
    late.start()
    try:
        assert same(read(data_of(place, {"shared_mount": "true"}, **cached(tmp_path))), read(data_of(corpus)))
    finally:
        late.join()


def test_what_a_mount_never_shows_is_no_damage(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOUNT_PATIENCE_S", 2.5)
    place = tmp_path / "alpha"
    shutil.copytree(corpus, place)
    data = data_of(place, {"shared_mount": "true"}, **cached(tmp_path))
    stream = stream_of(data)
    shutil.rmtree(place / "slices")
    with pytest.raises(ShardError, match=NOT_THERE) as error:
        list(stream.batches(0, 1))
    assert not isinstance(error.value, DamagedBlock)


def test_a_stale_handle_is_opened_again(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, times = Folder(corpus, 5.0), 0
    shards = Manifest.read(folder).shards("train", 0)
    good, pread = shards.read(0), os.pread

    def stale(*arguments: Any) -> bytes:
        nonlocal times
        times += 1
        if times in (1, 2, 4):
            raise OSError(errno.ESTALE, "Stale file handle")
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", stale)
    assert np.array_equal(shards.read(0), good)
    assert times == 5

    def broken(*_: Any) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    folder.patience_s = 0.2
    with pytest.raises(ShardError, match=r"index.npy: Input/output error$"):
        shards.read(0)


# --- staging ----------------------------------------------------------------------------------------------------------


def test_staged_shards_are_read_from_this_disk(corpus: Path, server: Server, tmp_path: Path) -> None:
    data = data_of(f"{server.address}/a", stage=str(tmp_path / "disk"))
    manifest = Manifest.read(files_of(f"{server.address}/a"))
    stage(tmp_path / "disk", [(manifest, 1)])
    server.requests.clear()
    assert same(read(data), read(data_of(corpus)))
    assert block_requests(server) == []
    stage(tmp_path / "disk", [(manifest, 1)])  # nothing is left to do
    assert block_requests(server) == []
    path = next((tmp_path / "disk").rglob("train-00000.tar"))
    path.write_bytes(bytes(path.stat().st_size))
    assert same(read(data), read(data_of(corpus)))  # what is damaged on this disk is read from the server
    assert {name for name, _ in block_requests(server)} == {f"/a/slices/{path.parent.name}/train-00000.tar"}


def test_staging_goes_on_where_it_was_broken_off(
    corpus: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.stage.PIECE_BYTES", 8192)
    monkeypatch.setattr("data_pipeline.stage.COPIED_AT_ONCE", 1)
    manifest = Manifest.read(files_of(f"{server.address}/a"))

    def over() -> bool:
        return any(part.stat().st_size for part in tmp_path.rglob(".*.tar.part"))

    stage(tmp_path, [(manifest, 1)], over)
    parts = list(tmp_path.rglob(".*.part"))
    assert len(parts) == 1 and parts[0].stat().st_size == 8192
    begun = parts[0].stat().st_size
    path = f"/a/slices/{parts[0].parent.name}/{parts[0].name.removeprefix('.').removesuffix('.part')}"
    server.requests.clear()
    stage(tmp_path, [(manifest, 1)])
    assert next(asked for name, asked in server.requests if name == path).startswith(f"bytes={begun}-")
    assert not list(tmp_path.rglob(".*.part"))
    for copy in tmp_path.rglob("*.tar"):
        assert copy.read_bytes() == (corpus / "slices" / copy.parent.name / copy.name).read_bytes()


def test_a_part_that_is_wrong_is_copied_anew_and_a_wrong_source_refused(
    corpus: Path, server: Server, tmp_path: Path
) -> None:
    manifest = Manifest.read(files_of(f"{server.address}/a"))
    name = manifest.shards("train", 0).name(0, "tar")
    part = tmp_path / manifest.generations[0]["identity"][:16] / name
    part.parent.mkdir(parents=True)
    part.with_name(f".{part.name}.part").write_bytes(b"of another time")
    stage(tmp_path, [(manifest, 1)])
    assert part.read_bytes() == (corpus / name).read_bytes()
    part.unlink()
    server.files[f"/a/{name}"] = flipped(server.files[f"/a/{name}"], 5000)
    with pytest.raises(ShardError, match=rf"^{server.address}/a/{name}: damaged at its source \(hash differs\)"):
        stage(tmp_path, [(manifest, 1)])


def test_of_a_corpus_that_has_grown_only_what_is_new_is_staged(tmp_path: Path) -> None:
    head = {"tokenizer_sha256": "0" * 64}
    parts = [replace(make_slice(tmp_path / "alpha", f"s{g}", g, 60), generation=g) for g in range(2)]
    seal(tmp_path / "alpha", FORMAT, head, parts[:1])
    stage(tmp_path / "disk", [(Manifest.open(tmp_path / "alpha"), 1)])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "disk").rglob("*.*") if path.is_file()}
    seal(tmp_path / "alpha", FORMAT, head, parts)
    stage(tmp_path / "disk", [(Manifest.open(tmp_path / "alpha"), 2)])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list((tmp_path / "disk").rglob("*.tar"))) == len(list((tmp_path / "alpha").rglob("*.tar")))


def test_a_disk_too_small_for_staging_is_said_before(
    corpus: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest.read(files_of(f"{server.address}/a"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ConfigError, match=rf"^data.stage: {tmp_path}: the shards need .* kB, its disk has 1.0 kB free"):
        stage(tmp_path, [(manifest, 1)])
    assert not list(tmp_path.rglob("*.tar"))
