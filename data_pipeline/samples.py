"""Texts out of finished shards, decoded, with where they came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.shards import Manifest, Shards, Split
from data_pipeline.tokenizer import Tokenizer

SAMPLE_TOKENS = 150  # cut anywhere, so half a character may stand at either end of a text: it is stripped


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
    for shards, shard, row in _spread(manifest, split, count):
        sample = _first_document(shards, shard, row, tokenizer, split)
        if sample is not None:
            yield sample


def excerpts(manifest: Manifest, tokenizer: Tokenizer, split: Split, count: int, tokens: int) -> Iterator[str]:
    """The text at the beginning of up to `count` rows spread evenly over a corpus, of up to `tokens` tokens each."""
    for shards, shard, row in _spread(manifest, split, count):
        ids = shards.member(shard, row)[:tokens]
        yield tokenizer.decode(ids[ids != tokenizer.end_of_text]).strip("\ufffd")


def _spread(manifest: Manifest, split: Split, count: int) -> Iterator[tuple[Shards, int, int]]:
    """(shards, shard, row) of up to `count` rows, from all generations."""
    parts = [manifest.shards(split, generation) for generation in range(len(manifest.generations))]
    ends = np.cumsum([rows for shards in parts for rows in _rows(shards)], dtype=np.int64)
    first = np.cumsum([0, *map(len, parts)])  # shard of each generation, among all
    total = int(ends[-1]) if len(ends) else 0
    count = min(count, total)
    for place in (i * total // count for i in range(count)):
        number = int(np.searchsorted(ends, place, side="right"))
        generation = int(np.searchsorted(first, number, side="right")) - 1
        shards = parts[generation]
        yield shards, number - int(first[generation]), place - int(ends[number - 1] if number else 0)
        shards.close()


def _rows(shards: Shards) -> list[int]:
    """How many rows each shard has, its tail's too."""
    table = shards.table
    rows: list[int] = (table["blocks"].to_numpy() + (table["tail_tokens"].to_numpy() > 0)).tolist()
    return rows


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
        text=tokenizer.decode(begun[: int(ends[0])] if len(ends) else begun).strip("\ufffd"),
    )


def sidecar(shards: Shards, shard: int, ordinal: int) -> dict[str, Any]:
    """What a shard's sidecar says of a document; nothing where it does not begin in that shard."""
    table = shards.sidecar(shard)
    rows = table.slice(int(np.searchsorted(table["ordinal"].to_numpy(), ordinal)), 1).to_pylist()
    return rows[0] if rows and rows[0]["ordinal"] == ordinal else {}
