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
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field, field_validator

from configs import Bool, ConfigError, Float, Int, Section
from data_pipeline.cache import Cache, Cached
from data_pipeline.files import files_of, is_remote
from data_pipeline.order import Located, Order, Pool, Skips, Steps, cut_range, digest
from data_pipeline.shards import DamagedBlock, Manifest, ShardError, Shards, Tokens
from data_pipeline.stage import staged

MIB = 2**20
LOOK_AHEAD_STEPS = 4
LOCATED_AT_ONCE = 4096  # samples: numpy's price per call, some hundred calls, is shared by many steps


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
    weight: Float = Field(default=1.0, ge=0)
    max_epochs: Float | None = Field(default=None, gt=0)
    generations: Int | None = Field(default=None, gt=0)  # None: those sealed when the run began


class Data(Section):
    """What a run trains on, and how its order is laid out. Lanes not given are chosen at the start and recorded."""

    seq_tokens: Int = Field(gt=0)
    sources: dict[str, Source] = Field(min_length=1)
    on_exhausted: Literal["refuse", "stop", "reweight"] = "refuse"
    lanes: Int | None = Field(default=None, gt=0, le=512)
    group_blocks: Int = Field(default=8, gt=0)
    document_mask: Bool = False  # a token sees those of its own document only
    read_threads: Int = Field(default=1, gt=0)
    prefetch_steps: Int = Field(default=2, gt=0)
    open_blocks_mib: Int = Field(default=1024, gt=0)  # upper bound of the memory for open blocks, per rank
    cache: Cache | None = None  # of remote shards, on the node's own disk
    stage: Path | None = None  # a folder of the node's own disk: remote shards are copied there before the start
    fetch_threads: Int = Field(default=16, gt=0)  # requests for remote blocks at once, per rank
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
    """The opened corpora of a run, all of one tokenizer. Raises ConfigError with the source's name."""

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
            manifest = open_source(source, self.data)
        except ShardError as error:
            raise ConfigError(f"data.sources.{name}.shards: {error}") from None
        sealed = len(manifest.generations)
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
    where: Located


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
        self.open_blocks = _OpenBlocks(
            shards, self._open_blocks_needed(shards), data.fetch_threads, data.prefetch_blocks
        )
        self._dtype = shards[0].format.dtype
        self.sources = list(dict.fromkeys(pool.source for pool in order.pools))
        self._source_of = np.array([self.sources.index(pool.source) for pool in order.pools], np.int64)
        self._stride = max(1, LOCATED_AT_ONCE * ranks // max(batch for _, batch in steps.pieces))  # steps
        self._shares: OrderedDict[int, list[_Share]] = OrderedDict()
        self._locating = threading.Lock()

    def _open_blocks_needed(self, shards: Sequence[Shards]) -> int:
        """How many blocks this rank has open at once: a group per lane and pool, within the memory allowed."""
        lanes = math.ceil(self.order.lanes / self.ranks) + 1
        needed = min(lanes, self.order.lanes) * self.order.group_blocks * len(self.order.pools) * 2
        block_bytes = max((s.format.block_tokens + 1) * s.format.dtype.itemsize for s in shards)
        return max(4, min(needed, self.data.open_blocks_mib * MIB // block_bytes))

    def micro_steps(self, step: int) -> int:
        """How many micro-batches every rank runs in a step."""
        return math.ceil(math.ceil(self.steps.batch(step) / self.ranks) / self.micro_batch_seqs)

    def batch(self, step: int) -> Batch:
        """The batch of a step, read now."""
        share, length = self._share(step), self.data.seq_tokens
        count, where = len(share.samples), share.where
        shape = (self.micro_steps(step), min(self.micro_batch_seqs, math.ceil(self.steps.batch(step) / self.ranks)))
        rows = np.empty((count, length + 1), self._dtype)  # as stored: half or a quarter of what is written below
        places = zip(where.pool.tolist(), where.block.tolist(), (where.row * length).tolist(), strict=True)
        read = self.open_blocks.read
        parts = []
        documents = np.zeros((shape[0] * shape[1], length), np.int32) if self.data.document_mask else None
        for number, (pool, block, begin) in enumerate(places):
            try:
                parts.append(read(pool, block)[begin : begin + length + 1])
                if documents is not None:
                    documents[number] = document_numbers(self.open_blocks.starts(pool, block), begin, length)
            except DamagedBlock as damage:
                if share.fed[number]:
                    raise self._without(damage, pool, block) from None
                parts.append(np.zeros(length + 1, self._dtype))  # nobody looks at what is skipped
        if parts:
            np.concatenate(parts, out=rows.reshape(-1))
        tokens = np.empty((shape[0] * shape[1], length + 1), np.int64)
        tokens[:count], tokens[count:] = rows, 0
        valid = np.zeros(len(tokens), np.int64)
        valid[:count] = np.where(share.fed, length, 0)
        sources = np.zeros(len(tokens), np.int64)
        sources[:count] = self._source_of[where.pool]
        whole = share.fed.all()
        mine = digest(share.samples, rows) if whole else digest(share.samples[share.fed], rows[share.fed])
        shaped = None if documents is None else documents.reshape(*shape, length)
        return Batch(
            step, tokens.reshape(*shape, length + 1), valid.reshape(shape), mine, sources.reshape(shape), shaped
        )

    def _share(self, step: int) -> _Share:
        """This rank's share of a step, found together with those of the steps around it."""
        number = step // self._stride
        with self._locating:
            shares = self._shares.get(number)
            if shares is None:
                shares = self._shares[number] = self._locate(number * self._stride)
                while len(self._shares) > 3:  # where batches are made, and where blocks are fetched ahead
                    self._shares.popitem(last=False)
        return shares[step - number * self._stride]

    def _locate(self, first: int) -> list[_Share]:
        """The shares of `_stride` steps."""
        starts = [self.steps.start(step) for step in range(first, first + self._stride + 1)]
        mine = [
            cut_range(begin, end, self.order.lanes, self.rank, self.ranks) for begin, end in itertools.pairwise(starts)
        ]
        samples = np.concatenate(mine)
        fed, where = ~self.skips.mask(samples), self.order.locate(samples)
        ends = np.cumsum([0, *map(len, mine)]).tolist()
        parts = [slice(begin, end) for begin, end in itertools.pairwise(ends)]
        return [
            _Share(samples[p], fed[p], Located(where.pool[p], where.epoch[p], where.block[p], where.row[p]))
            for p in parts
        ]

    def _without(self, damage: DamagedBlock, pool: int, block: int) -> DamagedBlock:
        """The same, with the way to go on without the block."""
        its = self.order.pools[pool]
        line = f"{damage}; or pretrain amend RUN skip_blocks={its.source}:{its.generation}:{block} to go on without it"
        return DamagedBlock(line, damage.slice, damage.shard, damage.row)

    def batches(self, first_step: int, end_step: int) -> Iterator[Batch]:
        """The batches of steps [first_step, end_step), read ahead by `data.read_threads` threads."""
        readers = ThreadPoolExecutor(self.data.read_threads, thread_name_prefix="longhaul-read")
        with readers as pool, self.open_blocks.ahead(self._blocks(first_step, end_step)):
            ahead: deque[Future[Batch]] = deque()
            upcoming = iter(range(first_step, end_step))
            try:
                for step in upcoming:
                    ahead.append(pool.submit(self.batch, step))
                    if len(ahead) > self.data.prefetch_steps:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def _blocks(self, first_step: int, end_step: int) -> Iterator[list[tuple[int, int]]]:
        """(pool, block) of all that each step reads."""
        for step in range(first_step, end_step):
            where = self._share(step).where
            yield list(dict.fromkeys(zip(where.pool.tolist(), where.block.tolist(), strict=True)))


class _OpenBlocks:
    """The blocks in use, least recently used out first; shared by the reading threads.

    Those of remote shards are fetched by threads of their own, ahead of need: `ahead` is told what steps will read.
    """

    def __init__(
        self, shards: Sequence[Shards], capacity: int, fetch_threads: int = 1, prefetch_blocks: int | None = None
    ) -> None:
        self.shards, self.capacity, self.fetch_threads = shards, capacity, fetch_threads
        self.depth = min(prefetch_blocks or capacity // 2, capacity // 2)  # the rest is for those in use
        self.remote = [each.files.is_far for each in shards]
        self.blocks: OrderedDict[tuple[int, int], Tokens | Future[Tokens]] = OrderedDict()
        self.documents: OrderedDict[tuple[int, int], npt.NDArray[np.int64]] = OrderedDict()
        self.fetched: dict[tuple[int, int], Tokens | Future[Tokens]] = {}  # ahead, not read yet: not to be pushed out
        self.steps: Iterator[list[tuple[int, int]]] = iter(())
        self.wanted: deque[tuple[int, int]] = deque()  # of the step that is looked at
        self.fetchers: ThreadPoolExecutor | None = None
        self.lock = threading.Lock()

    def read(self, pool: int, block: int) -> Tokens:
        """The token ids of a block. Raises ShardError; CancelledError where the reading has ended meanwhile."""
        key = (pool, block)
        with self.lock:
            ids = self.fetched.pop(key, None)
            if ids is None:
                ids = self.blocks.pop(key, None)
            if ids is None:
                ids = self._begin(key)
            self._make_room()
            self.blocks[key] = ids
            if self.fetchers is not None:
                self._go_ahead()
        if isinstance(ids, Future):
            ids = self._result(key, ids)
        return ids

    @contextmanager
    def ahead(self, steps: Iterator[list[tuple[int, int]]]) -> Iterator[None]:
        """While this lasts, remote blocks are fetched ahead in the order in which `steps` names them."""
        if not any(self.remote):
            yield
            return
        with self.lock:
            self.fetchers = ThreadPoolExecutor(self.fetch_threads, thread_name_prefix="longhaul-fetch")
            self.steps = steps
        try:
            yield
        finally:
            with self.lock:
                fetchers, self.fetchers, self.steps = self.fetchers, None, iter(())
                self.fetched.clear()
                self.wanted.clear()
                for key in [key for key, ids in self.blocks.items() if isinstance(ids, Future) and not ids.done()]:
                    del self.blocks[key]
            fetchers.shutdown(wait=False, cancel_futures=True)  # a server that does not answer holds up no end

    def _begin(self, key: tuple[int, int]) -> Tokens | Future[Tokens]:
        """A block's tokens, or the promise of them."""
        pool, block = key
        if self.remote[pool] and self.fetchers is not None:
            return self.fetchers.submit(self.shards[pool].read, block)
        return self.shards[pool].read(block)

    def _make_room(self) -> None:
        while self.blocks and len(self.blocks) + len(self.fetched) >= self.capacity:
            self.blocks.popitem(last=False)

    def _go_ahead(self) -> None:
        """Order what the next steps need. Few steps at a time, for it holds up the readers."""
        for _ in range(LOOK_AHEAD_STEPS):
            while self.wanted and len(self.fetched) < self.depth:
                key = self.wanted.popleft()
                if self.remote[key[0]] and key not in self.blocks and key not in self.fetched:
                    self._make_room()
                    self.fetched[key] = self._begin(key)
            if self.wanted:
                return
            self.wanted.extend(next(self.steps, ()))

    def _result(self, key: tuple[int, int], promise: Future[Tokens]) -> Tokens:
        while wait([promise], timeout=1.0).not_done:
            if self.fetchers is None:
                raise CancelledError
        try:
            ids = promise.result()
        except BaseException:
            with self.lock:
                self.blocks.pop(key, None)  # who asks again reads again
            raise
        with self.lock:
            if self.blocks.get(key) is promise:
                self.blocks[key] = ids
        return ids

    def starts(self, pool: int, block: int) -> npt.NDArray[np.int64]:
        """Where documents begin in a block; the first entry is that of the one open at its first token."""
        with self.lock:
            starts = self.documents.pop((pool, block), None)
            if starts is None:
                starts = self.shards[pool].documents(*self.shards[pool].locate(block))[:, 1]
                while len(self.documents) >= self.capacity:
                    self.documents.popitem(last=False)
            self.documents[(pool, block)] = starts
            return starts


class Rows(NamedTuple):
    """A batch of validation rows."""

    tokens: npt.NDArray[np.int64]  # (rows, T + 1)
    valid: npt.NDArray[np.int64]  # (rows,): targets that count
    documents: npt.NDArray[np.int32] | None  # (rows, T), as in Batch


class Validation:
    """A corpus' validation rows in plain order: blocks, then their shard's tail, shard by shard."""

    def __init__(
        self, manifest: Manifest, generations: int, seq_tokens: int, max_tokens: int, document_mask: bool = False
    ) -> None:
        self.seq_tokens, self.document_mask = seq_tokens, document_mask
        self.rows: list[tuple[Shards, int, int, int, int]] = []  # shards, shard, row in it, first token, valid targets
        self.tokens = 0
        for generation in range(generations):
            shards = manifest.shards("validation", generation)
            tails = dict(shards.tails())
            for shard in range(len(shards)):
                blocks, tail = (
                    int(shards.table["blocks"][shard].as_py()),
                    int(shards.table["tail_tokens"][shard].as_py()),
                )
                for row in range(blocks):
                    self._add(shards, shard, row, manifest.format.block_tokens, max_tokens)
                if tail:
                    self._add(shards, shard, tails[shard], tail - 1, max_tokens)

    def _add(self, shards: Shards, shard: int, row: int, targets: int, max_tokens: int) -> None:
        for begin in range(0, targets, self.seq_tokens):
            valid = min(self.seq_tokens, targets - begin, max_tokens - self.tokens)
            if valid <= 0:
                return
            self.rows.append((shards, shard, row, begin, valid))
            self.tokens += valid

    def batches(self, rows: int, rank: int, ranks: int) -> Iterator[Rows]:
        """Equally many batches on every rank, filled up with rows of valid 0."""
        held: tuple[tuple[Any, ...], Tokens, npt.NDArray[np.int64] | None] | None = None
        for begin in range(0, len(self.rows), rows * ranks):
            tokens = np.zeros((rows, self.seq_tokens + 1), np.int64)
            valid = np.zeros(rows, np.int64)
            documents = np.zeros((rows, self.seq_tokens), np.int32) if self.document_mask else None
            for i, (shards, shard, row, first, count) in enumerate(
                self.rows[begin + rank : begin + rows * ranks : ranks]
            ):
                if held is None or held[0] != (id(shards), shard, row):
                    starts = shards.documents(shard, row)[:, 1] if self.document_mask else None
                    held = ((id(shards), shard, row), shards.member(shard, row), starts)
                tokens[i, : count + 1] = held[1][first : first + count + 1]
                valid[i] = count
                if documents is not None and held[2] is not None:
                    documents[i] = document_numbers(held[2], first, self.seq_tokens)
            yield Rows(tokens, valid, documents)


def timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Each batch with the seconds that its consumer waited for it."""
    while True:
        begun = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - begun
