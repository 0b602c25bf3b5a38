"""What was dropped from a slice: every document by its place, and of some the beginning of the text.

One row per document in the slice's `dropped.parquet`, in the order of the input. The text is kept of those whose keyed
hash is among the `EXAMPLES` smallest of their reason so far, so that the smallest of the whole slice are always among
them, in one pass and in little memory. The same slice gives the same bytes.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_pipeline.document import Document
from data_pipeline.files import Missing, Unreadable
from data_pipeline.shards import RECORD, Manifest, ShardError, file_hash, sync_file

DROPPED = "dropped.parquet"
EXAMPLES = 20  # texts that are kept at least, per reason and slice, where there are so many
EXAMPLE_CHARS = 2000  # of each
ROWS = 10_000  # written at once, so that memory stays bounded
SEED = 4  # of the choice of examples
LOOKED_INTO = 500  # slices of a corpus that examples are taken from, chosen by the hash of their name

TABLE = pa.schema(
    [
        ("reason", pa.dictionary(pa.int32(), pa.string())),
        ("id", pa.string()),
        ("uri", pa.string()),
        ("input", pa.string()),
        ("offset", pa.uint64()),
        ("language", pa.string()),  # where it was known
        ("characters", pa.uint32()),  # of the text when it was dropped
        ("text", pa.string()),  # its beginning, or null
        ("stays", pa.string()),  # of a duplicate: `corpus: id` of the document that stays
    ]
)


class Dropped:
    """Writes a slice's `dropped.parquet` into its folder; no file where nothing is dropped."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / DROPPED
        self._rows: list[dict[str, Any]] = []
        self._smallest: dict[str, list[int]] = {}  # reason -> the smallest hashes so far
        self._writer: pq.ParquetWriter | None = None

    def begin_with(self, folder: Path) -> None:
        """Take over what another folder has, as the first rows."""
        if (folder / DROPPED).is_file():
            with pq.ParquetFile(folder / DROPPED) as file:
                for batch in file.iter_batches(ROWS):
                    self._rows = batch.to_pylist()
                    for row in self._rows:
                        self._is_example(row["id"], row["reason"])
                    self._write()

    def add(self, document: Document, reason: str, stays: str | None = None) -> None:
        """Keep where a document lies that is not taken, and why."""
        text, meta = document.text, document.meta
        kept = text[:EXAMPLE_CHARS] if self._is_example(document.id, reason) else None
        self._rows.append(
            {
                "reason": reason,
                "id": _writable(document.id),
                "uri": _writable(document.uri),
                "input": meta.get("input"),
                "offset": meta.get("offset"),
                "language": meta.get("language"),
                "characters": len(text),
                "text": None if kept is None else _writable(kept),
                "stays": stays,
            }
        )
        if len(self._rows) >= ROWS:
            self._write()

    def close(self) -> dict[str, str]:
        """Finish the file, fsynced: {its name: its xxh3-128}, or nothing."""
        self._write()
        if self._writer is None:
            return {}
        self._writer.close()
        sync_file(self.path)
        return {DROPPED: file_hash(self.path)}

    def _is_example(self, id: str, reason: str) -> bool:
        smallest = self._smallest.setdefault(reason, [])
        place = example_place(id)
        if len(smallest) >= EXAMPLES and place >= smallest[-1]:
            return False
        insort(smallest, place)
        del smallest[EXAMPLES:]
        return True

    def _write(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            self._writer = pq.ParquetWriter(self.path, TABLE, compression="zstd")
        self._writer.write_table(pa.Table.from_pylist(self._rows, TABLE))
        self._rows = []


def slices(manifest: Manifest) -> list[str]:
    """A corpus' slices, those of which nothing was taken too, in their order."""
    with_shards = dict.fromkeys(manifest.table["slice"].to_pylist())
    without = {name.split("/")[1] for name in manifest.head.get("files", {}) if name.endswith(f"/{RECORD}")}
    return sorted({*with_shards, *without})


def rows(manifest: Manifest, slice: str) -> Iterator[dict[str, Any]]:
    """The rows of a slice's file; none where there is no file. Raises ShardError."""
    name = f"slices/{slice}/{DROPPED}"
    try:
        where = pa.BufferReader(manifest.files.whole(name)) if manifest.files.is_far else manifest.folder / name
        for batch in pq.ParquetFile(where).iter_batches(use_threads=False):
            yield from batch.to_pylist()
    except (Missing, FileNotFoundError):
        return
    except Unreadable as error:
        raise ShardError(str(error)) from None
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"{manifest.address}/{name}: damaged ({type(error).__name__}); see data-prep verify") from None


def by_rule(manifest: Manifest, rule: str) -> Iterator[dict[str, Any]]:
    """The rows of every document dropped for a reason; `gopher` stands for all reasons that begin with `gopher:`."""
    for slice_ in slices(manifest):
        for row in rows(manifest, slice_):
            if row["reason"] == rule or row["reason"].startswith(f"{rule}:"):
                yield {**row, "slice": slice_}


def lost_documents(counts: Mapping[str, Any]) -> dict[str, int]:
    """reason -> documents that were read and not taken, from a manifest's counts."""
    raised = counts["set_aside"].get("raises", 0)
    return {**counts["dropped"]} | ({"raises": raised} if raised else {})


def examples(manifest: Manifest, count: int) -> dict[str, list[dict[str, Any]]]:
    """For each reason up to `count` rows with their text: those with the smallest hashes of their ids."""
    found: dict[str, list[dict[str, Any]]] = {}
    for slice_ in sorted(sorted(slices(manifest), key=example_place)[:LOOKED_INTO]):
        for row in rows(manifest, slice_):
            if row["text"] is not None:
                found.setdefault(row["reason"], []).append(row)
        for reason, several in found.items():
            found[reason] = sorted(several, key=lambda row: (example_place(row["id"]), row["id"]))[:count]
    return found


def example_place(id: str) -> int:
    """Where a document stands among the examples of its reason: the smallest are shown."""
    return xxhash.xxh3_64_intdigest(id.encode("utf-8", "surrogatepass"), SEED)


def _writable(text: str) -> str:
    """Half a character, which a document that raised may have, cannot be written as UTF-8."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
