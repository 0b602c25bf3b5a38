"""Small corpora of random tokens in the real format, for the tests of what reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_pipeline.document import Document
from data_pipeline.shards import Format, Manifest, SealedSlice, SliceWriter, file_hash, seal

FORMAT = Format(block_tokens=2**10, vocab_size=509, end_of_text=508, shard_bytes=16 * 2**10)


def make_slice(folder: Path, name: str, seed: int, documents: int, format: Format = FORMAT) -> SealedSlice:
    """Write one slice of `documents` random documents, a tenth of them for validation."""
    rng = np.random.default_rng(seed)
    place = folder / "slices" / name
    place.mkdir(parents=True)
    writer = SliceWriter(place, format)
    for i in range(documents):
        document = Document(
            "", f"{name}/{i}", folder.name, f"https://example.org/{name}/{i}", {"input": name, "offset": i}
        )
        # Zipf-like, so that there is something to learn
        ids = np.minimum(rng.zipf(1.3, int(rng.integers(20, 400))), format.vocab_size - 1) - 1
        writer.add(document, ids, "validation" if i % 10 == 9 else "train")
    shards = writer.close()
    (place / "slice.json").write_text("{}")
    return SealedSlice(name, 0, shards, file_hash(place / "ids.npy"), file_hash(place / "slice.json"))


def make_corpus(
    folder: Path, seed: int = 1, slices: int = 2, documents: int = 300, format: Format = FORMAT
) -> Manifest:
    """Write and seal a corpus."""
    made = [make_slice(folder, f"s{i}", seed * 1000 + i, documents, format) for i in range(slices)]
    return seal(folder, format, {"corpus": folder.name, "tokenizer_sha256": "0" * 64}, made)
