"""The stream: batches of token samples for (step, rank), read ahead by threads; and validation rows in plain order.

A batch is a function of (order, step, rank, ranks). Position is a number that the caller holds, so a resume is a call
with another first step; threads, caches and micro-batches decide how fast it comes, never what it is.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from configs import Bool, ConfigError, Float, Int, Section
from data_pipeline.order import Order, Pool, Skips, Steps, cut, digest
from data_pipeline.shards import Manifest, ShardError, Shards, Tokens

MIB = 2**20


class Source(Section):
    """A corpus as a run draws from it."""

    shards: Path
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
            manifest = Manifest.open(source.shards)
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
                        f"{generation} of {manifest.folder}; give it more text, or prepare it with smaller block_tokens"
                    )
                pools.append(Pool(name, generation, blocks, manifest.format.block_tokens // self.data.seq_tokens))
        return pools

    def shards(self, pools: Sequence[Pool]) -> list[Shards]:
        """The training shards of each pool."""
        return [self.manifests[pool.source].shards("train", pool.generation) for pool in pools]

    def identities(self, generations: dict[str, int]) -> dict[str, list[str]]:
        """The sha256 identity of each generation in use."""
        return {n: [g["identity"] for g in self.manifests[n].generations[:count]] for n, count in generations.items()}


@dataclass(frozen=True)
class Batch:
    """What a rank feeds in one step."""

    step: int
    tokens: npt.NDArray[np.int64]  # (micro_steps, rows, T + 1); filler rows are 0
    valid: npt.NDArray[np.int64]  # (micro_steps, rows): targets that count in each row, T or 0
    digest: int  # of this rank's samples with weight above 0
    documents: npt.NDArray[np.int32] | None = None  # (micro_steps, rows, T), see `document_numbers`; with document_mask


def document_numbers(starts: npt.NDArray[np.int64], begin: int, length: int) -> npt.NDArray[np.int32]:
    """Which document of its row each of `length` tokens is of: int32 (length,), 0 at first, never less than before it.

    `starts` are the places in the block at which documents begin, `begin` is the row's. A document's <|endoftext|> is
    part of it. Cumulative lengths and positions that begin again at every document follow from these.
    """
    numbers = np.zeros(length, np.int32)
    numbers[starts[(starts > begin) & (starts < begin + length)] - begin] = 1
    np.cumsum(numbers, out=numbers)
    return numbers


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
        self.open_blocks = _OpenBlocks(shards, self._open_blocks_needed(shards))

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
        samples = cut(
            np.arange(self.steps.start(step), self.steps.start(step + 1)), self.order.lanes, self.rank, self.ranks
        )
        length = self.data.seq_tokens
        shape = (self.micro_steps(step), min(self.micro_batch_seqs, math.ceil(self.steps.batch(step) / self.ranks)))
        tokens = np.zeros((shape[0] * shape[1], length + 1), np.int64)
        valid = np.zeros(shape[0] * shape[1], np.int64)
        documents = np.zeros((len(tokens), length), np.int32) if self.data.document_mask else None
        fed = ~self.skips.mask(samples)
        where = self.order.locate(samples)
        for i, (pool, block, row) in enumerate(zip(where.pool, where.block, where.row, strict=True)):
            ids = self.open_blocks.read(int(pool), int(block))
            tokens[i] = ids[row * length : row * length + length + 1]
            if documents is not None:
                starts = self.open_blocks.starts(int(pool), int(block))
                documents[i] = document_numbers(starts, int(row) * length, length)
        valid[: len(samples)] = np.where(fed, length, 0)
        share = digest(samples[fed], tokens[: len(samples)][fed])
        documents = None if documents is None else documents.reshape(*shape, length)
        return Batch(step, tokens.reshape(*shape, length + 1), valid.reshape(shape), share, documents)

    def batches(self, first_step: int, end_step: int) -> Iterator[Batch]:
        """The batches of steps [first_step, end_step), read ahead by `data.read_threads` threads."""
        with ThreadPoolExecutor(self.data.read_threads, thread_name_prefix="longhaul-read") as pool:
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


class _OpenBlocks:
    """The blocks in use, least recently used out first; shared by the reading threads."""

    def __init__(self, shards: Sequence[Shards], capacity: int) -> None:
        self.shards, self.capacity = shards, capacity
        self.blocks: OrderedDict[tuple[int, int], Tokens] = OrderedDict()
        self.documents: OrderedDict[tuple[int, int], npt.NDArray[np.int64]] = OrderedDict()
        self.lock = threading.Lock()

    def read(self, pool: int, block: int) -> Tokens:
        with self.lock:
            ids = self.blocks.pop((pool, block), None)
            if ids is None:
                ids = self.shards[pool].read(block)
                while len(self.blocks) >= self.capacity:
                    self.blocks.popitem(last=False)
            self.blocks[(pool, block)] = ids
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
        held: tuple[tuple[Any, ...], Tokens, Any] | None = None
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
                if documents is not None:
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
