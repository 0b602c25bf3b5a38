"""Batches: the same samples whatever the ranks, micro-batches, threads and caches; validation rows; refusals."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import ConfigError, build
from data_pipeline.ahead import Reading
from data_pipeline.blocks import Block, OpenBlocks, Wanted, _Held
from data_pipeline.order import Order, Segment, Skips, Steps, cut, digest
from data_pipeline.shards import Format, ShardError, Shards, Tokens, seal
from data_pipeline.stream import MIB, Batch, Corpora, Data, Stream, Validation, timed
from tests.corpora import FORMAT, make_corpus, make_slice

T = 128  # seq_tokens
BATCH = 10
LANES = 4
SHAPES = 25  # of machines, drawn
STEPS = 9  # the last three with half the batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two corpora, alpha and beta."""
    place = tmp_path_factory.mktemp("corpora")
    make_corpus(place / "alpha", 1, slices=2, documents=60)
    make_corpus(place / "beta", 2, slices=1, documents=60)
    return place


def data_of(folder: Path, names: Sequence[str] = ("alpha", "beta"), **more: Any) -> Data:
    sources = {name: {"shards": str(folder / name), "weight": 1 + i} for i, name in enumerate(names)}
    return build(Data, {"seq_tokens": T, "sources": sources, "group_blocks": 2, **more}, "test")


class Plan:
    """Corpora, and their order."""

    def __init__(self, data: Data, skips: Skips | None = None) -> None:
        self.data, self.corpora, self.skips = data, Corpora(data), skips or Skips()
        generations = dict.fromkeys(data.sources, 1)
        self.pools = self.corpora.pools(generations)
        segment = Segment(0, {name: source.weight for name, source in data.sources.items()}, generations)
        self.order = Order(3, self.pools, LANES, data.group_blocks, [segment])
        self.steps = Steps([(0, BATCH), (6 * BATCH, BATCH // 2)])

    def stream(self, micro_batch_seqs: int = 3, rank: int = 0, ranks: int = 1, **more: Any) -> Stream:
        data = self.data.model_copy(update=more)
        shards = self.corpora.shards(self.pools)
        return Stream(self.order, self.steps, self.skips, shards, data, micro_batch_seqs, rank, ranks)

    def samples(self, step: int) -> npt.NDArray[np.int64]:
        return np.arange(self.steps.start(step), self.steps.start(step + 1))

    def rows(self, samples: npt.NDArray[np.int64]) -> list[list[int]]:
        """The tokens of samples, read one by one from their blocks."""
        at, shards = self.order.locate(samples), self.corpora.shards(self.pools)
        places = zip(at.pool.tolist(), at.block.tolist(), at.row.tolist(), strict=True)
        return [shards[pool].read(block)[row * T : row * T + T + 1].tolist() for pool, block, row in places]


@pytest.fixture(scope="module")
def plan(folder: Path) -> Plan:
    return Plan(data_of(folder))


def flat(batch: Batch) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    return batch.tokens.reshape(-1, batch.tokens.shape[-1]), batch.valid.reshape(-1)


def same(a: Batch, b: Batch) -> bool:
    parts = np.array_equal(a.tokens, b.tokens) and np.array_equal(a.valid, b.valid)
    return parts and (a.step, a.digest) == (b.step, b.digest)


# --- what a batch is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("micro_batch_seqs", [1, 3, 100])
def test_a_step_is_the_same_for_any_ranks_and_micro_batches(ranks: int, micro_batch_seqs: int, plan: Plan) -> None:
    streams = [plan.stream(micro_batch_seqs, rank, ranks) for rank in range(ranks)]
    for step in range(STEPS):
        samples = plan.samples(step)
        expected = plan.rows(samples)
        batches = [stream.batch(step) for stream in streams]
        assert len({batch.tokens.shape for batch in batches}) == 1  # as many micro-batches of the same size everywhere
        assert batches[0].tokens.shape[0] == streams[0].micro_steps(step)
        assert batches[0].tokens.shape[1] <= micro_batch_seqs
        fed: Counter[tuple[int, ...]] = Counter()
        for rank, batch in enumerate(batches):
            tokens, valid = flat(batch)
            mine = cut(samples, LANES, rank, ranks)
            assert tokens[: len(mine)].tolist() == plan.rows(mine)
            assert valid.tolist() == [T] * len(mine) + [0] * (len(valid) - len(mine))
            assert not tokens[len(mine) :].any()
            fed.update(map(tuple, tokens[: len(mine)].tolist()))
        assert fed == Counter(map(tuple, expected))
        assert sum(batch.digest for batch in batches) % 2**128 == digest(samples, np.array(expected))


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_skipped_sample_keeps_its_place_and_counts_nothing(ranks: int, folder: Path, plan: Plan) -> None:
    skipping = Plan(plan.data, Skips([(13, 17), (19, 20), (30, 40)]))
    for step in range(STEPS):
        samples = plan.samples(step)
        fed = np.array([not (13 <= n < 17 or n == 19 or 30 <= n < 40) for n in samples])
        total = 0
        for rank in range(ranks):
            batch, whole = skipping.stream(3, rank, ranks).batch(step), plan.stream(3, rank, ranks).batch(step)
            mine = cut(samples, LANES, rank, ranks)
            tokens, valid = flat(batch)
            assert valid[: len(mine)].tolist() == [T if fed[n - samples[0]] else 0 for n in mine]
            assert np.array_equal(tokens[valid > 0], flat(whole)[0][valid > 0])
            assert batch.tokens.shape == whole.tokens.shape and not tokens[valid == 0].any()  # which is not read
            total += batch.digest
        assert total % 2**128 == digest(samples[fed], np.array(plan.rows(samples))[fed])


def test_a_batch_that_grows_has_few_shapes(plan: Plan) -> None:
    sizes = range(3, 60, 2)
    begins = np.cumsum([0, *sizes]).tolist()
    growing = Steps([*zip(begins, sizes, strict=False), (begins[-1], 60)])
    one, shared = plan.stream(64), [plan.stream(24, rank, 2) for rank in range(2)]
    for stream in (one, *shared):
        stream.steps = growing
    shapes = set()
    for step in range(len(sizes) + 1):
        alone, batches = one.batch(step), [stream.batch(step) for stream in shared]
        assert sum(batch.digest for batch in batches) % 2**128 == alone.digest
        assert sum(int((batch.valid > 0).sum()) for batch in batches) == growing.batch(step)
        shapes |= {batch.tokens.shape[1] for batch in batches}
    assert shapes == {2, 4, 8, 16, 24}
    assert one.batch(len(sizes)).tokens.shape[1] == 60  # the last one has no fillers


def hold(stream: Stream, blocks: int) -> None:
    """Let a stream hold so few blocks at once."""
    shards, mask = stream.open_blocks.shards, stream.data.document_mask
    stream.open_blocks = OpenBlocks(shards, stream.data.seq_tokens + 1, blocks, with_starts=mask)


def fed_rows(batches: Sequence[Batch]) -> Counter[tuple[int, ...]]:
    """The rows of a step that count, with their tokens, whichever rank has them."""
    pairs = [flat(batch) for batch in batches]
    return Counter(
        tuple(row) for tokens, valid in pairs for row, count in zip(tokens.tolist(), valid, strict=True) if count
    )


@pytest.mark.trials(SHAPES)
@given(data=st.data())
@settings(max_examples=SHAPES, deadline=None)
def test_any_shape_of_the_machine_gives_the_same_steps(data: st.DataObject, folder: Path) -> None:
    """Resumed at any step on other ranks, micro-batches, threads, caches: the same samples, the same digest."""
    draw, sizes = data.draw, st.integers(1, 40)
    seq_tokens, lanes = draw(st.sampled_from([32, 128, 512])), draw(st.sampled_from([1, 2, 4, 8]))
    plan = Plan(data_of(folder, seq_tokens=seq_tokens, group_blocks=draw(st.integers(1, 5))))
    skips = Skips([(n, n + draw(sizes)) for n in draw(st.lists(st.integers(0, 150), max_size=2))])
    order = Order(draw(st.integers(0, 99)), plan.pools, lanes, plan.data.group_blocks, plan.order.segments)
    batch, then = draw(sizes), draw(sizes)
    steps, end = Steps([(0, batch), (3 * batch, then)]), 5

    def streams(ranks: int) -> list[Stream]:
        more = {"read_threads": draw(st.integers(1, 3)), "prefetch_steps": draw(st.integers(1, 3))}
        settings, micro = plan.data.model_copy(update=more), draw(st.integers(1, 12))
        shards = [plan.corpora.shards(plan.pools) for _ in range(ranks)]
        found = [Stream(order, steps, skips, shards[r], settings, micro, r, ranks) for r in range(ranks)]
        for stream in found:
            hold(stream, draw(st.integers(1, 9)))
        return found

    whole = [[batch] for batch in streams(1)[0].batches(0, end)]
    first = 0
    while first < end:  # an attempt after the other
        last = draw(st.integers(first + 1, end))
        for batches in zip(*(s.batches(first, last) for s in streams(draw(st.integers(1, 6)))), strict=True):
            step = batches[0].step
            assert fed_rows(batches) == fed_rows(whole[step])
            assert sum(b.digest for b in batches) % 2**128 == whole[step][0].digest
            assert sum(int(b.valid.sum()) for b in batches) == int(whole[step][0].valid.sum())
        first = last


# --- documents --------------------------------------------------------------------------------------------------------


def numbers_by_marks(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Documents told apart by their <|endoftext|>, which random documents do not hold elsewhere."""
    ends = tokens[..., :-1] == FORMAT.end_of_text
    numbers: npt.NDArray[np.int64] = np.cumsum(ends, axis=-1) - ends
    return numbers


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_masked_run_is_told_where_documents_begin(ranks: int, plan: Plan) -> None:
    for rank in range(ranks):
        masked, plain = (plan.stream(3, rank, ranks, document_mask=mask) for mask in (True, False))
        hold(masked, 2)
        for step in range(STEPS):
            batch, without = masked.batch(step), plain.batch(step)
            assert same(batch, without) and without.documents is None
            assert batch.documents is not None and batch.documents.dtype == np.int32
            assert np.array_equal(batch.documents, numbers_by_marks(batch.tokens))
            assert batch.documents[batch.valid == 0].sum() == 0
        assert len(masked.open_blocks.held) <= 2


def test_masked_validation_is_told_where_documents_begin(plan: Plan) -> None:
    validation = Validation(plan.corpora.manifests["alpha"], 1, T, 10**9, document_mask=True)
    most = 0
    for tokens, valid, documents in validation.batches(4, 0, 1):
        assert documents is not None
        for row, count, numbers in zip(tokens, valid.tolist(), documents, strict=True):
            assert np.array_equal(numbers[:count], numbers_by_marks(row)[:count])
            most = max(most, *numbers.tolist())
    assert most > 1


# --- how it comes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read_threads", [1, 2, 3, 4])
@pytest.mark.parametrize("prefetch_steps", [1, 5])
def test_reading_ahead_changes_nothing(read_threads: int, prefetch_steps: int, plan: Plan) -> None:
    stream = plan.stream(read_threads=read_threads, prefetch_steps=prefetch_steps)
    ahead = list(stream.batches(0, STEPS))
    assert [batch.step for batch in ahead] == list(range(STEPS))
    assert all(same(batch, plan.stream().batch(batch.step)) for batch in ahead)


def test_a_start_imports_no_pandas(folder: Path) -> None:
    """pyarrow does where it is given Python's objects or asked for numpy's: most of the time and memory of a start."""
    program = f"""
import sys
from configs import build
from data_pipeline.order import Order, Segment, Skips, Steps
from data_pipeline.stream import Corpora, Data, Stream, Validation
data = build(Data, {{"seq_tokens": {T}, "sources": {{"alpha": {{"shards": {str(folder / "alpha")!r}}}}}}}, "test")
corpora = Corpora(data)
pools = corpora.pools({{"alpha": 1}})
order = Order(3, pools, {LANES}, 2, [Segment(0, {{"alpha": 1.0}}, {{"alpha": 1}})])
next(Stream(order, Steps([(0, {BATCH})]), Skips(), corpora.shards(pools), data, 3).batches(0, 2))
next(Validation(corpora.manifests["alpha"], 1, {T}, 10**6).batches(2, 0, 1))
print("pandas" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "False\n"


def test_threads_read_local_blocks_at_the_same_time(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two readers meet within a read: neither holds up the other."""
    stream, alone = plan.stream(read_threads=2, prefetch_steps=4), plan.stream()
    barrier, met, read = threading.Barrier(2), threading.Event(), Shards.read

    def together(shards: Shards, block: int, buffer: bytearray | None) -> Tokens:
        if not met.is_set():
            barrier.wait(20)
            met.set()  # once is enough
        return read(shards, block, buffer)

    expected = [alone.batch(step) for step in range(STEPS)]
    monkeypatch.setattr(Shards, "read", together)
    assert all(same(a, b) for a, b in zip(stream.batches(0, STEPS), expected, strict=True))


@pytest.mark.parametrize("at_once", [1, BATCH, 4 * BATCH, 10**6])
def test_how_many_places_are_found_at_once_changes_nothing(
    at_once: int, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [plan.stream(rank=1, ranks=2).batch(step) for step in range(STEPS)]
    monkeypatch.setattr("data_pipeline.stream.LOCATED_AT_FIRST", max(1, min(at_once // 4, 2**10)))
    monkeypatch.setattr("data_pipeline.stream.LOCATED_AT_ONCE", at_once)
    stream = plan.stream(rank=1, ranks=2)
    assert all(same(stream.batch(step), expected[step]) for step in [*range(STEPS), 7, 2, 8, 0])


def test_going_on_in_the_middle_is_the_same(plan: Plan) -> None:
    whole = list(plan.stream().batches(0, STEPS))
    for first in (1, 6, STEPS):
        later = list(plan.stream().batches(first, STEPS))
        assert len(later) == STEPS - first
        assert all(same(a, b) for a, b in zip(whole[first:], later, strict=True))


@pytest.mark.parametrize("capacity", [1, 2])
def test_a_cache_that_is_too_small_changes_nothing(capacity: int, plan: Plan) -> None:
    stream = plan.stream(read_threads=4)
    hold(stream, capacity)
    assert all(same(batch, plan.stream().batch(batch.step)) for batch in stream.batches(0, STEPS))
    assert len(stream.open_blocks.held) == capacity


@given(st.lists(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 1)), max_size=12)), st.integers(1, 9))
def test_rows_come_from_the_blocks_that_are_held(steps: list[list[tuple[int, int]]], slots: int) -> None:
    held, blocks = _Held(slots, 4, 3, np.dtype("<u2")), np.arange(31 * 5, dtype="<u2").reshape(31, 5)
    inside: set[int] = set()
    for step in steps:
        numbers = np.array([number for number, _ in step], np.int64)
        wanted = Wanted(np.zeros((len(step), 3), "<u2"), numbers, np.array([2 * row for _, row in step], np.int64))
        missing = held.fill(wanted, np.arange(len(step))).tolist()
        assert missing == [i for i, (number, _) in enumerate(step) if number not in inside]
        for i, (number, row) in enumerate(step):
            assert i in missing or wanted.rows[i].tolist() == blocks[number, 2 * row : 2 * row + 3].tolist()
        for number in dict.fromkeys(numbers[missing].tolist()):
            block = Block(blocks[number], None)
            held.put(number, block, wanted.fill_from(block, number))
            inside = {n for n in {*inside, number} if n in held}
            assert number in inside and len(inside) == len(held) <= slots


def test_what_is_read_through_goes_before_what_was_used_least_recently() -> None:
    held, block = _Held(3, 4, 3, np.dtype("<u2")), Block(np.zeros(5, "<u2"), None)  # of two rows

    def read(number: int) -> None:
        assert not len(held.fill(Wanted(np.zeros((1, 3), "<u2"), np.array([number]), np.array([0])), np.arange(1)))

    for number in (5, 3, 8):
        held.put(number, block, 0)
    for number in (5, 3, 8, 8):
        read(number)
    held.put(9, block, 0)
    assert 8 not in held and 5 in held and 3 in held
    held.put(1, block, 0)
    assert 5 not in held and 3 in held and 9 in held


@pytest.mark.parametrize(("vocab_size", "blocks"), [(509, 31), (70_000, 15)])
def test_open_blocks_keep_to_their_memory(vocab_size: int, blocks: int, tmp_path: Path) -> None:
    """A block of 2^14 tokens takes a little over 32 or 64 KiB."""
    format = Format(2**14, vocab_size, vocab_size - 1)
    seal(tmp_path / "alpha", format, {}, [make_slice(tmp_path / "alpha", "s0", 1, 500, format)])
    data = data_of(tmp_path, ["alpha"], group_blocks=64, open_blocks_mib=1)
    plan = Plan(data)
    capacity = plan.stream().open_blocks.capacity
    assert capacity == blocks
    assert capacity * plan.corpora.shards(plan.pools)[0].read(0).nbytes <= MIB


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("longhaul-read")]


@pytest.mark.parametrize("read_threads", [1, 3])
def test_a_damaged_block_ends_the_stream_with_its_name(read_threads: int, folder: Path, plan: Plan) -> None:
    at = plan.order.locate(plan.samples(4))
    pool, block = int(at.pool[0]), int(at.block[0])
    shards = plan.corpora.shards(plan.pools)[pool]
    shard, row = shards.locate(block)
    path = shards.path(shard, "tar")
    data = path.read_bytes()
    damaged = bytearray(data)
    offset = int(np.load(shards.path(shard, "index.npy"))[row]["offset"])
    damaged[offset + 1000] ^= 1
    used = [plan.order.locate(plan.samples(step)) for step in range(STEPS)]
    first = next(i for i, x in enumerate(used) if ((x.pool == pool) & (x.block == block)).any())
    path.write_bytes(damaged)
    seen = []
    try:
        with pytest.raises(
            ShardError, match=f"^{re.escape(str(path))}: block {row} is damaged .*; run data-prep repair"
        ):
            for batch in plan.stream(read_threads=read_threads, prefetch_steps=4).batches(0, STEPS):
                seen.append(batch.step)
    finally:
        path.write_bytes(data)
    assert seen == list(range(first))  # what is whole comes first
    assert reading_threads() == []


def test_closing_in_the_middle_leaves_no_threads(plan: Plan) -> None:
    batches = plan.stream(read_threads=3, prefetch_steps=4).batches(0, STEPS)
    next(batches)
    assert reading_threads()
    batches.close()  # type: ignore[attr-defined]
    assert reading_threads() == []


def test_the_wait_for_each_batch_is_given(plan: Plan) -> None:
    found = list(timed(plan.stream().batches(0, 3)))
    assert [batch.step for batch, _ in found] == [0, 1, 2]
    assert all(waited >= 0 for _, waited in found)


# --- validation -------------------------------------------------------------------------------------------------------


def validation_streams(corpora: Corpora, name: str) -> list[list[int]]:
    """The validation stream of each slice, joined from its blocks and tail."""
    shards = corpora.manifests[name].shards("validation", 0)
    streams: dict[str, list[int]] = {}
    for shard in range(len(shards)):
        stream = streams.setdefault(str(shards.table["slice"][shard]), [])
        for row in range(shards.table["blocks"][shard].as_py()):
            stream += shards.member(shard, row)[:-1].tolist()
        if shards.table["tail_tokens"][shard].as_py():
            stream += shards.member(shard, shards.table["blocks"][shard].as_py()).tolist()
    return list(streams.values())


def validation_rows(validation: Validation, rows: int = 1, ranks: int = 1) -> list[list[int]]:
    """Every row's valid tokens (inputs and the last target), put back in order."""
    by_rank = [list(validation.batches(rows, rank, ranks)) for rank in range(ranks)]
    assert len({len(batches) for batches in by_rank}) == 1
    found = []
    for batches in zip(*by_rank, strict=True):
        for i in range(rows):
            for tokens, valid, documents in batches:
                assert documents is None
                assert tokens.shape == (rows, T + 1)
                assert not tokens[i, valid[i] + 1 :].any()
                if valid[i]:
                    found.append(tokens[i, : valid[i] + 1].tolist())
                else:
                    assert not tokens[i].any()
    return found


def test_validation_has_every_target_once(plan: Plan) -> None:
    for name in ("alpha", "beta"):
        streams = validation_streams(plan.corpora, name)
        validation = Validation(plan.corpora.manifests[name], 1, T, 10**9)
        expected = [
            stream[begin : begin + T + 1] for stream in streams for begin in range(0, len(stream) - 1, T)
        ]  # blocks hold whole rows, so that rows are the stream's runs of T
        assert len(streams) == len(set(plan.corpora.manifests[name].table["slice"].to_pylist()))
        assert validation_rows(validation) == expected
        assert validation.tokens == sum(len(row) - 1 for row in expected) == sum(len(s) - 1 for s in streams)
        assert any(len(stream) > FORMAT.block_tokens for stream in streams)
        for ranks in (1, 2, 3):
            for rows in (2, 5):
                assert validation_rows(validation, rows, ranks) == expected


@pytest.mark.parametrize("most", [1, T, 500, 1500])
def test_validation_stops_at_its_most(most: int, plan: Plan) -> None:
    validation = Validation(plan.corpora.manifests["alpha"], 1, T, most)
    rows = validation_rows(validation)
    assert validation.tokens == most == sum(len(row) - 1 for row in rows)
    whole = validation_rows(Validation(plan.corpora.manifests["alpha"], 1, T, 10**9))
    assert rows == [row[: len(mine)] for row, mine in zip(whole, rows, strict=False)]


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(make: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as error:
        make()
    return str(error.value)


@pytest.mark.parametrize(
    ("format", "head", "message"),
    [
        (
            FORMAT,
            {"tokenizer_sha256": "1" * 64},
            f"data.sources.other: tokenizer_sha256 is {'1' * 64}, but alpha has {'0' * 64}; "
            "prepare all sources of a run with one tokenizer",
        ),
        (
            Format(2**10, 600, 508),
            {"tokenizer_sha256": "0" * 64},
            "data.sources.other: vocab_size is 600, but alpha has 509; prepare all sources of a run with one tokenizer",
        ),
        (
            Format(2**10, 509, 507),
            {"tokenizer_sha256": "0" * 64},
            "data.sources.other: end_of_text is 507, but alpha has 508; "
            "prepare all sources of a run with one tokenizer",
        ),
        (
            Format(2**6, 509, 508),
            {"tokenizer_sha256": "0" * 64},
            "data.seq_tokens: 128 does not divide the 64 tokens of the blocks of other",
        ),
    ],
)
def test_corpora_that_do_not_go_together(
    format: Format, head: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    seal(tmp_path / "other", format, head, [make_slice(tmp_path / "other", "s0", 9, 3, format)])
    sources = {"alpha": {"shards": str(folder / "alpha")}, "other": {"shards": str(tmp_path / "other")}}
    assert refused(lambda: Corpora(data_of(folder, sources=sources))) == message


def test_a_corpus_without_a_full_block(tmp_path: Path) -> None:
    seal(tmp_path / "alpha", FORMAT, {}, [make_slice(tmp_path / "alpha", "s0", 9, 2)])
    corpora = Corpora(data_of(tmp_path, ["alpha"]))
    assert refused(lambda: corpora.pools({"alpha": 1})) == (
        f"data.sources.alpha: no full block of 1024 tokens in generation 0 of {tmp_path / 'alpha'}; "
        "give it more text, or prepare it with smaller block_tokens"
    )


def test_a_corpus_without_a_shard(tmp_path: Path) -> None:
    (tmp_path / "alpha").mkdir()
    seal(tmp_path / "alpha", FORMAT, {}, [])
    assert refused(lambda: Corpora(data_of(tmp_path, ["alpha"]))) == (
        f"data.sources.alpha.shards: {tmp_path / 'alpha'} has no shards; give its preparation text"
    )


def test_a_corpus_that_is_not_there(tmp_path: Path) -> None:
    assert refused(lambda: Corpora(data_of(tmp_path, ["alpha"]))) == (
        f"data.sources.alpha.shards: {tmp_path / 'alpha'}: no MANIFEST.json: not a corpus, or not finished; "
        "run data-prep run"
    )


def test_generations_that_are_not_there(folder: Path) -> None:
    sources = {"alpha": {"shards": str(folder / "alpha"), "generations": 2}}
    assert refused(lambda: Corpora(data_of(folder, sources=sources))) == (
        f"data.sources.alpha.generations: 2 asked for, {folder / 'alpha'} has 1"
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seq_tokens", "100", "seq_tokens: expected a power of two, got 100"),
        ("lanes", "12", "lanes: expected a power of two, got 12"),
        ("lanes", "1Ki", "lanes: input should be less than or equal to 512, got '1Ki'"),
        ("sources", {"a.b": {"shards": "x"}}, "sources: expected names of letters, digits, - and _, got 'a.b'"),
        ("on_exhausted", "wait", "on_exhausted: expected 'refuse', 'stop' or 'reweight', got 'wait'"),
    ],
)
def test_impossible_settings(key: str, value: Any, message: str, folder: Path) -> None:
    assert refused(lambda: data_of(folder, **{key: value})) == f"test: {message}"


class _Late(Future[int]):
    """Done at the very moment at which somebody has had enough of waiting for it."""

    def result(self, timeout: float | None = None) -> int:
        if timeout is not None and not self.done():
            self.set_result(7)
            raise TimeoutError
        return super().result(timeout)


def test_a_batch_that_comes_as_the_wait_for_it_ends_is_taken() -> None:
    with Reading(iter([lambda: 1]), 1, 1, "test") as reading:
        reading._ahead.append(_Late())
        assert reading.take() == 7

    def times_out() -> int:
        raise TimeoutError("its own")

    with Reading(iter([times_out]), 1, 1, "test") as reading, pytest.raises(TimeoutError, match=r"^its own$"):
        reading.take()
