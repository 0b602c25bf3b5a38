"""From sample numbers back to the documents whose tokens they hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from data_pipeline.order import Ints, Order
from data_pipeline.samples import sidecar
from data_pipeline.shards import Shards


def documents_of(order: Order, shards: Sequence[Shards], samples: Ints, seq_tokens: int) -> list[str]:
    """`SOURCE:ID` of every document with a token in the samples, each once, in their order.

    `shards[i]` are those of `order.pools[i]`, not in use by another thread. Raises ShardError, OSError.
    """
    found: dict[str, None] = {}
    where = order.locate(samples)
    for pool, block, row in zip(where.pool.tolist(), where.block.tolist(), where.row.tolist(), strict=True):
        begin = row * seq_tokens
        for id_ in _of_block(shards[pool], block, begin, begin + seq_tokens):
            found[f"{order.pools[pool].source}:{id_}"] = None
    return list(found)


def _of_block(shards: Shards, block: int, begin: int, end: int) -> Iterator[str]:
    """The ids of the documents with a token in [begin, end) of a block."""
    shard, row = shards.locate(block)
    ordinals, starts = shards.documents(shard, row).T
    first = max(int(np.searchsorted(starts, begin, side="right")) - 1, 0)
    for ordinal in ordinals[first : int(np.searchsorted(starts, end))].tolist():
        yield _id(shards, shard, ordinal)


def _id(shards: Shards, shard: int, ordinal: int) -> str:
    """A document's id stands in the sidecar of the shard in which it begins: this one, or one before it."""
    slice_ = shards.table["slice"][shard]
    while shard >= 0 and shards.table["slice"][shard] == slice_:
        if entry := sidecar(shards, shard, ordinal):
            return str(entry["id"])
        shard -= 1
    return f"{slice_}#{ordinal}"
