"""The stream: batches of token samples for (step, rank), read ahead by threads; and validation rows in plain order.

A batch is a function of (order, step, rank, ranks). Position is a number that the caller holds, so a resume is a call
with another first step; threads, caches and micro-batches decide how fast it comes, never what it is.
"""

from __future__ import annotations

import itertools
import math
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field, field_validator

from configs import Bool, ConfigError, Float, Int, Section
from data_pipeline.ahead import Reading
from data_pipeline.blocks import LOOK_AHEAD, Block, OpenBlocks, Wanted
from data_pipeline.cache import Cache, Cached
from data_pipeline.files import files_of, is_remote, watched
from data_pipeline.order import Order, Pool, Skips, Steps, cut_range, digest
from data_pipeline.shards import DamagedBlock, Manifest, ShardError, Shards, Tokens, Unreachable
from data_pipeline.stage import staged

MIB = 2**20
LOCATED_AT_ONCE = 2**15  # samples: numpy's price per call, some thousand calls, is shared by many steps
LOCATED_AT_FIRST = 2**10  # then twice as many each time: a start need not wait for so many, nor a short run


def _place(value: object) -> object:
    """An address stays text, a folder becomes a path."""
    if isinstance(value, str) and "://" not in value:
        return Path(value)
    if isinstance(value, str) and not is_remote(value):
        raise ValueError(f"expected a folder, s3://bucket/prefix or https://host/path, got {value!r}")
    if isinstance(value, str) and re.search(r"//[^/]*@|[?#]", value):
        raise ValueError("expected an address without user, password, query and fragment: it goes into logs")
    return value


class Source(Section):
    """A corpus as a run draws from it."""

    shards: Annotated[Path | str, BeforeValidator(_place)]  # a folder, s3://bucket/prefix or https://host/path
    shared_mount: Bool = False  # the folder is of another machine (Lustre, NFS): read through the cache, waited for
    weight: Float = Field(default=1.0, ge=0)  # share of the samples, beside those of the others
    max_epochs: Float | None = Field(default=None, gt=0)  # how often each of its generations may be read through
    generations: Int | None = Field(default=None, gt=0)  # None: those sealed when the run began


class Data(Section):
    """What a run trains on, and how its order is laid out. Lanes not given are chosen at the start and recorded."""

    seq_tokens: Int = Field(gt=0)  # of a sample
    sources: dict[str, Source] = Field(min_length=1)  # by name; the names stand in losses, traces and amendments
    on_exhausted: Literal["refuse", "stop", "reweight"] = "refuse"  # at max_epochs: no start, the end, or without it
    lanes: Int | None = Field(default=None, gt=0, le=512)  # read from at once; null: chosen at the start
    group_blocks: Int = Field(default=8, gt=0)  # blocks of a source that a lane shuffles together
    document_mask: Bool = False  # a token sees those of its own document only
    read_threads: Int = Field(default=1, gt=0)  # that make batches ahead
    prefetch_steps: Int = Field(default=2, gt=0)  # batches made ahead by each of them
    open_blocks_mib: Int = Field(default=1024, gt=0)  # upper bound of the memory for open blocks, per rank
    cache: Cache | None = None  # of remote shards, on the node's own disk
    stage: Path | None = None  # a folder of the node's own disk: remote shards are copied there before the start
    fetch_threads: Int = Field(default=32, gt=0)  # requests for remote blocks at once, per rank
    prefetch_blocks: Int | None = Field(default=None, gt=0)  # remote blocks fetched ahead; None: half the open blocks

    @field_validator("sources")
    @classmethod
    def _names(cls, sources: dict[str, Source]) -> dict[str, Source]:
        for name in sources:
            if not re.fullmatch(r"[\w-]+", name):
                raise ValueError(f"expected names of letters, digits, - and _, got {name!r}")  # they stand in key paths
        return sources

    @field_validator("seq_tokens", "lanes")
    @classmethod
    def _power_of_two(cls, value: int | None) -> int | None:
        if value is not None and value & (value - 1):
            raise ValueError(f"expected a power of two, got {value}")
        return value


class Corpora:
    """The opened corpora of a run, all of one tokenizer. Raises ConfigError with the source's name, and Unreachable."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.manifests = {name: self._open(name, source) for name, source in data.sources.items()}
        first_name, first = next(iter(self.manifests.items()))
        for name, manifest in self.manifests.items():
            for key in ("tokenizer_sha256", "vocab_size", "end_of_text"):
                if manifest.head.get(key) != first.head.get(key):
                    raise ConfigError(
                        f"data.sources.{name}: {key} is {manifest.head.get(key)}, but {first_name} has "
                        f"{first.head.get(key)}; prepare all sources of a run with one tokenizer"
                    )
            if manifest.format.block_tokens % data.seq_tokens:
                raise ConfigError(
                    f"data.seq_tokens: {data.seq_tokens} does not divide the {manifest.format.block_tokens} tokens of "
                    f"the blocks of {name}"
                )
        self.vocab_size, self.end_of_text = first.format.vocab_size, first.format.end_of_text
        self.tokenizer_sha256 = str(first.head.get("tokenizer_sha256"))

    def _open(self, name: str, source: Source) -> Manifest:
        try:
            manifest = watched(lambda: open_source(source, self.data))
        except Unreachable as error:  # the same command is to be run again, as a launcher does
            raise Unreachable(f"data.sources.{name}.shards: {error}") from None
        except ShardError as error:
            raise ConfigError(f"data.sources.{name}.shards: {error}") from None
        sealed = len(manifest.generations)
        if not sealed:
            raise ConfigError(f"data.sources.{name}.shards: {source.shards} has no shards; give its preparation text")
        if source.generations is not None and source.generations > sealed:
            raise ConfigError(
                f"data.sources.{name}.generations: {source.generations} asked for, {source.shards} has {sealed}"
            )
        return manifest

    def pools(self, generations: dict[str, int]) -> list[Pool]:
        """A pool per source and generation, in the order of their names; an empty one is refused."""
        pools = []
        for name in sorted(generations):
            manifest = self.manifests[name]
            for generation in range(generations[name]):
                blocks = manifest.generations[generation]["train"]["blocks"]
                if not blocks:
                    raise ConfigError(
                        f"data.sources.{name}: no full block of {manifest.format.block_tokens} tokens in generation "
                        f"{generation} of {manifest.address}; give it more text, or prepare it with smaller "
                        "block_tokens"
                    )
                pools.append(Pool(name, generation, blocks, manifest.format.block_tokens // self.data.seq_tokens))
        return pools

    def shards(self, pools: Sequence[Pool]) -> list[Shards]:
        """The training shards of each pool."""
        return [self.manifests[pool.source].shards("train", pool.generation) for pool in pools]

    def identities(self, generations: dict[str, int]) -> dict[str, list[str]]:
        """The sha256 identity of each generation in use."""
        return {n: [g["identity"] for g in self.manifests[n].generations[:count]] for n, count in generations.items()}


def open_source(source: Source, data: Data) -> Manifest:
    """A corpus, read through the run's cache and from what is staged where it is remote. Raises ShardError."""
    files = files_of(source.shards, source.shared_mount)
    if not (is_remote(source.shards) or source.shared_mount):
        return Manifest.read(files)
    if data.cache is not None:
        files = Cached(files, data.cache.open())
    manifest = Manifest.read(files)
    return manifest if data.stage is None else staged(manifest, data.stage)


@dataclass(frozen=True)
class Batch:
    """What a rank feeds in one step."""

    step: int
    tokens: npt.NDArray[np.int64]  # (micro_steps, rows, T + 1); filler rows are 0
    valid: npt.NDArray[np.int64]  # (micro_steps, rows): targets that count in each row, T or 0
    digest: int  # of this rank's samples with weight above 0
    sources: npt.NDArray[np.int64]  # (micro_steps, rows): index into Stream.sources; of filler rows 0
    documents: npt.NDArray[np.int32] | None = None  # (micro_steps, rows, T), see `document_numbers`; with document_mask

    def targets(self, sources: int) -> tuple[int, ...]:
        """How many targets count, by source."""
        found = np.bincount(self.sources.ravel(), self.valid.ravel(), minlength=sources)
        return tuple(int(count) for count in found)


def document_numbers(starts: npt.NDArray[np.int64], begin: int, length: int) -> npt.NDArray[np.int32]:
    """Which document of its row each of `length` tokens is of: int32 (length,), 0 at first, never less than before it.

    `starts` are the places in the block at which documents begin, `begin` is the row's. A document's <|endoftext|> is
    part of it. Cumulative lengths and positions that begin again at every document follow from these.
    """
    numbers = np.zeros(length, np.int32)
    numbers[starts[(starts > begin) & (starts < begin + length)] - begin] = 1
    np.cumsum(numbers, out=numbers)
    return numbers


@dataclass(frozen=True)
class _Share:
    """A rank's samples of a step: which are fed, and where they lie."""

    samples: npt.NDArray[np.int64]
    fed: npt.NDArray[np.bool_]
    pools: npt.NDArray[np.int64]
    blocks: npt.NDArray[np.int64]  # as OpenBlocks numbers them
    firsts: npt.NDArray[np.int64]  # the first token of each in its block


class Stream:
    """The training batches of one rank."""

    def __init__(
        self,
        order: Order,
        steps: Steps,
        skips: Skips,
        shards: Sequence[Shards],
        data: Data,
        micro_batch_seqs: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.order, self.steps, self.skips, self.data = order, steps, skips, data
        self.micro_batch_seqs, self.rank, self.ranks = micro_batch_seqs, rank, ranks
        self.open_blocks = OpenBlocks(
            shards,
            data.seq_tokens + 1,
            self._open_blocks_needed(shards),
            data.fetch_threads,
            data.prefetch_blocks,
            data.document_mask,
        )
        self._dtype = shards[0].format.dtype
        self.sources = list(dict.fromkeys(pool.source for pool in order.pools))
        self._source_of = np.array([self.sources.index(pool.source) for pool in order.pools], np.int64)
        most = max(batch for _, batch in steps.pieces)
        times = (LOCATED_AT_ONCE // LOCATED_AT_FIRST).bit_length()
        self._strides = [max(1, (LOCATED_AT_FIRST << i) * ranks // most) for i in range(times)]  # steps
        self._level, self._located_to = 0, -1  # which of them was located last, and up to which step
        self._shares: OrderedDict[tuple[int, int], list[_Share]] = OrderedDict()
        self._locating = threading.Lock()

    def _open_blocks_needed(self, shards: Sequence[Shards]) -> int:
        """How many blocks this rank holds: a group per lane and pool, and a quarter for what a resume has begun within.

        As many again where blocks are fetched ahead; all within the memory allowed.
        """
        lanes = min(math.ceil(self.order.lanes / self.ranks) + 1, self.order.lanes)
        needed = lanes * self.order.group_blocks * len(self.order.pools) * 5 // 4
        if any(each.files.is_far for each in shards):
            needed *= 2
        block_bytes = max((s.format.block_tokens + 1) * s.format.dtype.itemsize for s in shards)
        return max(4, min(needed, self.data.open_blocks_mib * MIB // block_bytes))

    def micro_steps(self, step: int) -> int:
        """How many micro-batches every rank runs in a step."""
        return math.ceil(math.ceil(self.steps.batch(step) / self.ranks) / self.micro_batch_seqs)

    def micro_rows(self, step: int) -> int:
        """How many rows each of them has, fillers included.

        While the batch grows they are a power of two: a model is compiled for each number that comes.
        """
        batch = self.steps.batch(step)
        rows = math.ceil(batch / self.ranks)
        if batch != self.steps.pieces[-1][1]:
            rows = 1 << (rows - 1).bit_length()
        return min(self.micro_batch_seqs, rows)

    def batch(self, step: int) -> Batch:
        """The batch of a step, read now."""
        share, length = self._share(step), self.data.seq_tokens
        count = len(share.samples)
        shape = self.micro_steps(step), self.micro_rows(step)
        rows = np.empty((count, length + 1), self._dtype)  # as stored: half or a quarter of what is written below
        documents = np.zeros((shape[0] * shape[1], length), np.int32) if self.data.document_mask else None
        at_once = self.open_blocks.capacity  # whose blocks are held meanwhile
        for begin in range(0, count, at_once):
            self._read_rows(share, begin, rows[begin : begin + at_once], documents)
        tokens = np.empty((shape[0] * shape[1], length + 1), np.int64)
        tokens[:count], tokens[count:] = rows, 0
        valid = np.zeros(len(tokens), np.int64)
        valid[:count] = np.where(share.fed, length, 0)
        sources = np.zeros(len(tokens), np.int64)
        sources[:count] = self._source_of[share.pools]
        whole = share.fed.all()
        mine = digest(share.samples, rows) if whole else digest(share.samples[share.fed], rows[share.fed])
        shaped = None if documents is None else documents.reshape(*shape, length)
        return Batch(
            step, tokens.reshape(*shape, length + 1), valid.reshape(shape), mine, sources.reshape(shape), shaped
        )

    def _read_rows(self, share: _Share, begin: int, rows: Tokens, documents: npt.NDArray[np.int32] | None) -> None:
        """Fill `rows` with the samples of a share from `begin` on, and their places in `documents`.

        What is skipped is not read, as it may not be there: its rows are 0.
        """
        these = slice(begin, begin + len(rows))
        fed = np.flatnonzero(share.fed[these])
        filled = rows if len(fed) == len(rows) else np.empty((len(fed), rows.shape[1]), rows.dtype)
        starts: list[npt.NDArray[np.int64] | None] | None = None if documents is None else [None] * len(fed)
        wanted = Wanted(filled, share.blocks[these][fed], share.firsts[these][fed], starts)
        if (failed := self.open_blocks.fill(wanted)) is not None:
            raise self._without(*failed) from None
        if filled is not rows:
            rows[:] = 0
            rows[fed] = filled
        if documents is not None and starts is not None:
            for row, its_starts, first in zip(fed.tolist(), starts, wanted.firsts.tolist(), strict=True):
                if its_starts is not None:
                    documents[begin + row] = document_numbers(its_starts, first, self.data.seq_tokens)

    def _share(self, step: int) -> _Share:
        """This rank's share of a step, found together with those of the steps around it."""
        with self._locating:
            for stride in self._strides:
                shares = self._shares.get((stride, step // stride))
                if shares is not None:
                    return shares[step % stride]
            goes_on = self._located_to <= step < self._located_to + self._strides[-1]
            self._level = min(self._level + 1, len(self._strides) - 1) if goes_on else 0
            stride = self._strides[self._level]
            shares = self._shares[stride, step // stride] = self._locate(step // stride * stride, stride)
            self._located_to = (step // stride + 1) * stride
            while len(self._shares) > 4:  # where batches are made, and where blocks are fetched ahead
                self._shares.popitem(last=False)
            return shares[step % stride]

    def _locate(self, first: int, stride: int) -> list[_Share]:
        """The shares of `stride` steps."""
        starts = [self.steps.start(step) for step in range(first, first + stride + 1)]
        mine = [
            cut_range(begin, end, self.order.lanes, self.rank, self.ranks) for begin, end in itertools.pairwise(starts)
        ]
        samples = np.concatenate(mine)
        fed, where = ~self.skips.mask(samples), self.order.locate(samples)
        blocks = self.open_blocks.numbers(where.pool, where.block)
        columns = where.pool, blocks, where.row * self.data.seq_tokens
        ends = np.cumsum([0, *map(len, mine)]).tolist()
        parts = (slice(begin, end) for begin, end in itertools.pairwise(ends))
        return [_Share(samples[part], fed[part], *(column[part] for column in columns)) for part in parts]

    def _without(self, number: int, error: ShardError) -> ShardError:
        """The same, with the way to go on without the block."""
        pool, block = self.open_blocks.place(number)
        its = self.order.pools[pool]
        line = f"{error}; or pretrain amend RUN skip_blocks={its.source}:{its.generation}:{block} to go on without it"
        if isinstance(error, DamagedBlock):
            return DamagedBlock(line, error.slice, error.shard, error.row)
        return ShardError(line)

    def batches(self, first_step: int, end_step: int) -> Iterator[Batch]:
        """The batches of steps [first_step, end_step), read ahead by `data.read_threads` threads."""
        with self.reading(first_step, end_step) as reading:
            for _ in range(first_step, end_step):
                yield reading.take()

    @contextmanager
    def reading(self, first_step: int, end_step: int) -> Iterator[Reading[Batch]]:
        """The same, for who looks first whether the next one is there."""
        calls = (partial(self.batch, step) for step in range(first_step, end_step))
        reading = Reading(calls, self.data.read_threads, self.data.prefetch_steps, "longhaul-read")
        try:
            with reading, self.open_blocks.ahead(self._blocks(first_step, end_step)):
                yield reading
        finally:
            self.open_blocks.ended = False

    def _blocks(self, first_step: int, end_step: int) -> Iterator[npt.NDArray[np.int64]]:
        """The numbers of the blocks that steps read, those of many steps at a time, as they come."""
        while first_step < end_step:
            end = min(first_step + max(1, LOOK_AHEAD * self.ranks // self.steps.batch(first_step)), end_step)
            shares = [self._share(step) for step in range(first_step, end)]
            numbers = np.concatenate([share.blocks[share.fed] for share in shares])
            yield numbers[np.sort(np.unique(numbers, return_index=True)[1])]
            first_step = end


class Rows(NamedTuple):
    """A batch of validation rows."""

    tokens: npt.NDArray[np.int64]  # (rows, T + 1)
    valid: npt.NDArray[np.int64]  # (rows,): targets that count
    documents: npt.NDArray[np.int32] | None  # (rows, T), as in Batch


_Place = tuple[Shards, int, int]  # shards, shard, row in it: a block or a tail


class _Row(NamedTuple):
    """A row of validation."""

    place: _Place
    first: int  # token
    targets: int  # that count


class Validation:
    """A corpus' validation rows in plain order: blocks, then their shard's tail, shard by shard."""

    def __init__(
        self,
        manifest: Manifest,
        generations: int,
        seq_tokens: int,
        max_tokens: int,
        document_mask: bool = False,
        fetch_threads: int = 1,
    ) -> None:
        self.seq_tokens, self.document_mask, self.fetch_threads = seq_tokens, document_mask, fetch_threads
        self.rows: list[_Row] = []
        self.tokens = 0
        for generation in range(generations):
            shards = manifest.shards("validation", generation)
            for shard, (blocks, tail) in enumerate(zip(shards.block_counts, shards.tail_tokens, strict=True)):
                if self.tokens >= max_tokens:
                    return
                for row in range(blocks):
                    self._add(shards, shard, row, manifest.format.block_tokens, max_tokens)
                if tail:
                    self._add(shards, shard, blocks, tail - 1, max_tokens)

    def _add(self, shards: Shards, shard: int, row: int, targets: int, max_tokens: int) -> None:
        for begin in range(0, targets, self.seq_tokens):
            valid = min(self.seq_tokens, targets - begin, max_tokens - self.tokens)
            if valid <= 0:
                return
            self.rows.append(_Row((shards, shard, row), begin, valid))
            self.tokens += valid

    def batches(self, rows: int, rank: int, ranks: int) -> Iterator[Rows]:
        """Equally many batches on every rank, filled up with rows of valid 0."""
        with self.reading(rows, rank, ranks) as reading:
            for _ in range(self.batch_count(rows, ranks)):
                yield reading.take()

    def batch_count(self, rows: int, ranks: int) -> int:
        """How many batches every rank reads."""
        return math.ceil(len(self.rows) / (rows * ranks))

    @contextmanager
    def reading(self, rows: int, rank: int, ranks: int) -> Iterator[Reading[Rows]]:
        """The same, for who looks first whether the next one is there. Remote blocks are fetched ahead, in order."""
        shares = [
            self.rows[begin + rank : begin + rows * ranks : ranks] for begin in range(0, len(self.rows), rows * ranks)
        ]
        places = [place for place, _ in itertools.groupby(row.place for share in shares for row in share)]
        is_far = any(shards.files.is_far for shards, _, _ in places)
        threads = self.fetch_threads if is_far else 1
        calls = (partial(self._block, *place) for place in places)
        blocks = Reading(calls, threads, threads, "longhaul-fetch", is_remote=is_far)
        make = _RowMaker(blocks, rows, self.seq_tokens, self.document_mask)
        batches = (partial(make.batch, share) for share in shares)
        with Reading(batches, 1, 1, "longhaul-read") as reading, blocks:  # one thread: blocks come in its order
            yield reading

    def _block(self, shards: Shards, shard: int, row: int) -> Block:
        if not self.document_mask:
            return Block(shards.member(shard, row), None)
        ids, documents = shards.member_with_documents(shard, row)
        return Block(ids, documents[:, 1])


class _RowMaker:
    """Makes batches of validation rows from blocks, which it takes one after the other."""

    def __init__(self, blocks: Reading[Block], rows: int, seq_tokens: int, document_mask: bool) -> None:
        self.blocks, self.rows, self.seq_tokens, self.document_mask = blocks, rows, seq_tokens, document_mask
        self.held: tuple[_Place, Block] | None = None

    def batch(self, share: Sequence[_Row]) -> Rows:
        tokens = np.zeros((self.rows, self.seq_tokens + 1), np.int64)
        valid = np.zeros(self.rows, np.int64)
        documents = np.zeros((self.rows, self.seq_tokens), np.int32) if self.document_mask else None
        for i, row in enumerate(share):
            if self.held is None or self.held[0] != row.place:
                self.held = row.place, self.blocks.take()
            ids, starts = self.held[1]
            tokens[i, : row.targets + 1] = ids[row.first : row.first + row.targets + 1]
            valid[i] = row.targets
            if documents is not None and starts is not None:
                documents[i] = document_numbers(starts, row.first, self.seq_tokens)
        return Rows(tokens, valid, documents)


def timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Each batch with the seconds that its consumer waited for it."""
    while True:
        begun = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - begun
