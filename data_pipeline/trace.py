"""From samples back to the documents whose tokens they hold.

A sample of T inputs holds T + 1 tokens: the last one as a target alone. Where it is the first token of a document, that
document is in the sample, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np

from data_pipeline.ahead import Reading
from data_pipeline.order import Ints, Order
from data_pipeline.shards import Shards

T = TypeVar("T")
Key = TypeVar("Key")

THREADS = 4  # that read sidecars: each is decompressed from its first row to its last
FAR_THREADS = 16  # that read which documents a block holds, where each is a request


@dataclass(frozen=True)
class Seen:
    """A stretch of a document that a sample holds."""

    sample: int
    source: str
    generation: int
    epoch: int
    id: str
    uri: str
    first_token: int  # of the document
    end_token: int  # behind the last one


def documents_of(
    order: Order, shards: Sequence[Shards], samples: Ints, seq_tokens: int, look: Callable[[], None] = lambda: None
) -> list[str]:
    """`SOURCE:ID` of every document with a token in the samples, each once, in their order.

    `shards[i]` are those of `order.pools[i]`, not in use by another thread. Raises ShardError. `look` is called once a
    second at least, while storage is waited for too; what it raises is the end.
    """
    seen = documents_in(order, shards, samples, seq_tokens, look)
    return list(dict.fromkeys(f"{each.source}:{each.id}" for each in seen))


def documents_in(
    order: Order, shards: Sequence[Shards], samples: Ints, seq_tokens: int, look: Callable[[], None] = lambda: None
) -> list[Seen]:
    """What each sample holds, in their order. See `documents_of`."""
    at = order.locate(samples)
    columns = (samples, at.pool, at.epoch, at.block, at.row)
    places = list(zip(*(column.tolist() for column in columns), strict=True))
    to_end: dict[tuple[int, int], bool] = {}  # of each block, whether a sample holds its extra token
    for _, pool, _, block, row in places:
        is_last = (row + 1) * seq_tokens == shards[pool].format.block_tokens
        to_end[pool, block] = to_end.get((pool, block), False) or is_last
    is_far = any(each.files.is_far for each in shards)
    held = _all(
        to_end, lambda key: _held(shards[key[0]], key[1], to_end[key]), FAR_THREADS if is_far else THREADS, look
    )
    parts = [
        (sample, pool, epoch, part)
        for sample, pool, epoch, block, row in places
        for part in _parts(held[pool, block], row * seq_tokens, seq_tokens, shards[pool].format.block_tokens)
    ]
    wanted: dict[tuple[int, int], set[int]] = defaultdict(set)
    for _, pool, _, part in parts:
        wanted[pool, part.shard].add(part.ordinal)
    found = _all(wanted, lambda key: _names(shards[key[0]], key[1], wanted[key]), THREADS, look)
    return [
        Seen(
            sample, order.pools[pool].source, order.pools[pool].generation, epoch,
            *found[pool, part.shard][part.ordinal], part.first_token, part.end_token,
        )
        for sample, pool, epoch, part in parts
    ]  # fmt: skip


def _all(keys: Collection[Key], read: Callable[[Key], T], threads: int, look: Callable[[], None]) -> dict[Key, T]:
    """What is read for each key, by threads; where it fails, those that are at work are left behind."""
    found: dict[Key, T] = {}
    with Reading((partial(read, key) for key in keys), threads, 2 * threads, "longhaul-trace", True) as reading:
        for key in keys:
            look()
            while not reading.ready(1.0):
                look()
            found[key] = reading.take()
    return found


@dataclass(frozen=True)
class _Part:
    """A stretch of a document, known by the shard in which it lies and its ordinal in the slice."""

    shard: int
    ordinal: int
    first_token: int
    end_token: int


class _Held(NamedTuple):
    """The documents of a block, in their order: the shard in which each lies, its ordinal, its start in the block."""

    whose: list[int]
    ordinals: Ints
    starts: Ints


def _held(shards: Shards, block: int, to_end: bool) -> _Held:
    """What a block holds. `to_end`: with its extra token, which may be the first of a document of the row behind it."""
    shard, row = shards.locate(block)
    ordinals, starts = shards.documents(shard, row).T
    whose = [shard] * len(starts)
    if to_end and (following := _row_after(shards, shard, row)) is not None:
        ordinal, start = shards.documents(*following)[0].tolist()
        if start == 0:
            ordinals, starts = np.append(ordinals, ordinal), np.append(starts, shards.format.block_tokens)
            whose.append(following[0])
    return _Held(whose, ordinals, starts)


def _parts(held: _Held, begin: int, seq_tokens: int, block_tokens: int) -> Iterator[_Part]:
    """What the sample at token `begin` of a block holds."""
    whose, ordinals, starts = held
    end = begin + seq_tokens + 1
    ends = np.append(starts[1:], block_tokens + 1)
    first = max(int(np.searchsorted(starts, begin, side="right")) - 1, 0)
    for i in range(first, int(np.searchsorted(starts, end))):
        start = int(starts[i])
        yield _Part(whose[i], int(ordinals[i]), max(begin, start) - start, min(end, int(ends[i])) - start)


def _row_after(shards: Shards, shard: int, row: int) -> tuple[int, int] | None:
    """The row behind a block in the stream of its slice: a block or the tail. None at the stream's end."""
    table = shards.table
    if row + 1 < table["blocks"][shard].as_py() + (table["tail_tokens"][shard].as_py() > 0):
        return shard, row + 1
    same = shard + 1 < len(shards) and table["slice"][shard + 1] == table["slice"][shard]
    return (shard + 1, 0) if same else None


def _names(shards: Shards, shard: int, ordinals: set[int]) -> dict[int, tuple[str, str]]:
    """The id and the address of documents of which a shard has tokens.

    They stand in the sidecar of the shard in which a document begins: this one, or one before it.
    """
    slice_ = shards.table["slice"][shard]
    found: dict[int, tuple[str, str]] = {}
    while (left := sorted(ordinals - found.keys())) and shard >= 0 and shards.table["slice"][shard] == slice_:
        table = shards.sidecar(shard, ["ordinal", "id", "uri"])
        for row in table.take(np.flatnonzero(np.isin(table["ordinal"].to_numpy(), left))).to_pylist():
            found[row["ordinal"]] = row["id"], row["uri"]
        shard -= 1
    return {ordinal: found.get(ordinal, (f"{slice_}#{ordinal}", "")) for ordinal in ordinals}
