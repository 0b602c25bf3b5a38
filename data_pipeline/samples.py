"""Texts out of finished shards, decoded, with where they came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.shards import Manifest, Shards, Split, read_parquet
from data_pipeline.tokenizer import Tokenizer

SAMPLE_TOKENS = 150


@dataclass(frozen=True)
class Sample:
    """The beginning of a document as the shards hold it."""

    split: Split
    slice: str
    shard: str
    row: int  # block, or the tail behind the last one
    id: str
    uri: str
    tokens: int  # of the document
    text: str


def samples(manifest: Manifest, tokenizer: Tokenizer, split: Split, count: int) -> Iterator[Sample]:
    """Up to `count` documents, one of a row, from rows spread evenly over a corpus. Raises ShardError on damage."""
    places = [
        (shards, shard, row)
        for generation in range(len(manifest.generations))
        for shards in [manifest.shards(split, generation)]
        for shard in range(len(shards))
        for row in _rows(shards, shard)
    ]
    count = min(count, len(places))
    for i in range(count):
        shards, shard, row = places[i * len(places) // count]
        sample = _first_document(shards, shard, row, tokenizer, split)
        if sample is not None:
            yield sample
        shards.close()


def _rows(shards: Shards, shard: int) -> range:
    return range(shards.table["blocks"][shard].as_py() + (shards.table["tail_tokens"][shard].as_py() > 0))


def _first_document(shards: Shards, shard: int, row: int, tokenizer: Tokenizer, split: Split) -> Sample | None:
    """The first document that begins in a row, else the one that is open there."""
    ids, documents = shards.member(shard, row), shards.documents(shard, row)
    if not len(documents):
        return None
    begins = documents[documents[:, 1] >= 0]
    ordinal, start = begins[0] if len(begins) else documents[0]
    begun = ids[max(0, int(start)) :][:SAMPLE_TOKENS]
    ends = np.flatnonzero(begun == tokenizer.end_of_text)
    entry = sidecar(shards, shard, int(ordinal))
    return Sample(
        split=split,
        slice=str(shards.table["slice"][shard]),
        shard=str(shards.table["name"][shard]),
        row=row,
        id=entry.get("id", "(begins in an earlier shard)"),
        uri=entry.get("uri", ""),
        tokens=entry.get("tokens", 0),
        text=tokenizer.decode(begun[: int(ends[0])] if len(ends) else begun),
    )


def sidecar(shards: Shards, shard: int, ordinal: int) -> dict[str, Any]:
    """What a shard's sidecar says of a document; nothing where it does not begin in that shard."""
    table = read_parquet(shards.path(shard, "docs.parquet").read_bytes())
    rows = table.slice(int(np.searchsorted(table["ordinal"].to_numpy(), ordinal)), 1).to_pylist()
    return rows[0] if rows and rows[0]["ordinal"] == ordinal else {}
