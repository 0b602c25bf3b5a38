"""Signatures of near duplicates: ours against datatrove's (and datasketch's), on the same texts, in one run.

    python -m benchmarks.dedup [--texts FOLDER]

The same work: from a text to its bands, 14 of 8 hashes over word 5-grams, on one core, CPU time, the best of three
rounds, sides in turn. Then the bytes that each stage leaves per document, and what that is for a billion documents.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import xxhash

from data_pipeline.dedup import MARKS, TEXTS, Dedup, Near, TextWriter, exact_marks, near_marks
from data_pipeline.document import Document

WORDS = 600  # of a document
BILLION = 1e9


def texts(folder: Path, count: int) -> list[str]:
    """Passages of the folder's .txt files, which differ."""
    words = " ".join(
        path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.txt"))
    ).split()
    rng = random.Random(1)
    starts = [rng.randrange(max(1, len(words) - WORDS)) for _ in range(count)]
    return [" ".join(words[start : start + WORDS]) for start in starts]


def ours(documents: Sequence[str]) -> None:
    for start in range(0, len(documents), 64):
        near_marks(documents[start : start + 64], Near())
        exact_marks(documents[start : start + 64])


def datatrove(documents: Sequence[str]) -> None:
    """Its signature step without the reading and writing of files: n-grams of words, hashes, the smallest of each."""
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature

    step = MinhashDedupSignature("unused", MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8))
    step._hash_func = lambda text: xxhash.xxh64_intdigest(text.encode())  # 0.10.1 gives str, which xxhash 4 refuses
    for document in documents:
        step.get_signature(step.get_shingles(document))


def datasketch(documents: Sequence[str]) -> None:
    from datasketch import MinHash

    for document in documents:
        words = document.lower().split()
        grams = {" ".join(words[i : i + 5]).encode() for i in range(max(1, len(words) - 4))}
        minhash = MinHash(num_perm=112, seed=1)
        minhash.update_batch(grams)


def seconds(side: Callable[[Sequence[str]], None], documents: Sequence[str]) -> float:
    begun = time.process_time()
    side(documents)
    return time.process_time() - begun


def bytes_per_document(documents: Sequence[str]) -> dict[str, float]:
    """What the first stage leaves, by file."""
    with tempfile.TemporaryDirectory() as folder:
        writer = TextWriter(Path(folder), Dedup())
        for number, text in enumerate(documents):
            uri = f"https://example.org/{number}"
            writer.add(Document(text, f"<urn:uuid:{number:032x}>", "c", uri, {"input": "a.warc.gz", "offset": number}))
        return {name: (Path(folder) / name).stat().st_size / len(documents) for name in writer.close()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", type=Path, default=Path("../shared/data/books"))
    parser.add_argument("--documents", type=int, default=2000)
    options = parser.parse_args()
    documents = texts(options.texts, options.documents)
    sides = {
        "ours": (ours, documents),
        "datasketch": (datasketch, documents[:200]),
        "datatrove": (datatrove, documents[:100]),
    }
    for side, some in sides.values():
        side(some[:64])  # what is loaded once
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(3):
        for name, (side, some) in sides.items():
            best[name] = min(best[name], seconds(side, some) / sum(map(len, some)))
    per_text = sum(map(len, documents)) / len(documents)
    print(
        f"{len(documents)} texts of {per_text:.0f} characters; per core:\n\n| | MB/s | texts/s | ours is |\n|-|-|-|-|"
    )
    for name, each in best.items():
        print(f"| {name} | {1e-6 / each:.2f} | {1 / each / per_text:.0f} | {each / best['ours']:.1f}x |")
    sizes = bytes_per_document(documents)
    print("\n| left by the first stage | bytes per document | of a billion |\n|-|-|-|")
    for name, size in sizes.items():
        print(f"| {name}{' (until the seal)' if name == TEXTS else ''} | {size:.0f} | {size * BILLION / 1e12:.2f} TB |")
    marks = sum(sizes[name] for name in MARKS)
    print(
        f"\nMarks: {marks:.0f} bytes. Pairs: 17 bytes each. Clusters: memory of about 150 bytes per document concerned."
    )


if __name__ == "__main__":
    main()
