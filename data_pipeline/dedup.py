"""Which documents are the same, or nearly: the settings, and the marks by which they are found.

A *mark* is a hash that two documents share when they are duplicates: the 128-bit xxh3 of the cleaned text (exact), and
one 64-bit hash for each band of a MinHash signature (near). The signature is over the set of the text's word n-grams,
lower case, without punctuation; in scripts written without spaces each character is a word. Two documents whose sets
have the Jaccard similarity s share at least one band with the probability 1 - (1 - s^rows)^bands.

Source: Broder, "On the resemblance and containment of documents" (1997); the banding is that of Leskovec, Rajaraman
and Ullman, "Mining of Massive Datasets", section 3.4. The default of 14 bands of 8 rows over 5-grams is FineWeb's
(arXiv 2406.17557, section 3.4): similarity 0.75 is found with 0.77, 0.8 with 0.92, 0.9 with 1.00, 0.5 with 0.05.
"""

from __future__ import annotations

import itertools
import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from pydantic import field_validator, model_validator

from configs import Bool, Int, Section, fingerprint
from data_pipeline.document import Document
from data_pipeline.shards import ShardError, file_hash, sync_file

U64 = npt.NDArray[np.uint64]

NEAR_CHARS = 2**21  # of a text, from its beginning, that its MinHash signature is made of
BATCH_CHARS = 2**18  # of several texts at once: what is made of them stays in the processor's cache
MASK = 2**64 - 1

TEXTS = "texts.parquet"
IDS = "ids.parquet"
ROWS = 256  # documents in a row group at most, so that they are read in little memory
RANGE_BITS = 12
RANGES = 2**RANGE_BITS  # of the first 64 bits of marks, equally wide; a file of marks says where each begins
EXACT = np.dtype([("key", "<u8"), ("rest", "<u8"), ("ordinal", "<u4")])
NEAR = np.dtype([("key", "<u8"), ("ordinal", "<u4")])


class Near(Section):
    """MinHash-LSH: `bands` times `rows` hashes. More rows find only what is nearer, more bands miss less of it."""

    bands: Int = 14
    rows: Int = 8
    ngram_words: Int = 5
    seed: Int = 1

    @field_validator("bands", "rows", "ngram_words")
    @classmethod
    def _positive(cls, value: int) -> int:
        if value < 1:
            raise ValueError(f"expected at least 1, got {value}")
        return value


class Dedup(Section):
    """What counts as a duplicate. Of several, the first stays: by the config's order of corpora, then by the plan's."""

    exact: Bool = True  # the same text after cleaning
    near: Near | None = Near()
    across: Literal["corpora", "each"] = "corpora"  # duplicates are sought in all corpora together, or in each alone
    keep_texts: Bool = False  # the cleaned texts, and what else is needed only until the seal

    version: ClassVar[int] = 1  # raised when the same documents would get other marks, or others would be dropped

    @model_validator(mode="after")
    def _something(self) -> Dedup:
        if not self.exact and self.near is None:
            raise ValueError("neither exact nor near duplicates are asked for; leave `dedup` out")
        return self

    @property
    def marks(self) -> int:
        """How many a document has."""
        return self.exact + (self.near.bands if self.near else 0)

    @property
    def document_bytes(self) -> int:
        """On disk, of a document's marks and its id."""
        return EXACT.itemsize * self.exact + NEAR.itemsize * (self.near.bands if self.near else 0) + 30

    def identity(self) -> dict[str, Any]:
        """What the marks depend on. A probe stands for the libraries' versions: the marks of a known text."""
        probe = fingerprint([exact_marks([PROBE]).tolist(), near_marks([PROBE], self.near).tolist()])
        settings = self.model_dump(mode="json", exclude={"keep_texts", "across"})
        return {**settings, "probe": probe, "version": self.version}


PROBE = "Ein Maß für Ähnlichkeit: two texts, 汉字 and ไทย; Ωmega, naïve – İstanbul. " * 3


# --- marks ----------------------------------------------------------------------------------------------------------


def exact_marks(texts: Sequence[str], first: int = 0) -> npt.NDArray[Any]:
    """One mark for each text, shape (texts,), dtype EXACT. `first` is the ordinal of the first."""
    digests = b"".join(xxhash.xxh3_128_digest(text.encode()) for text in texts)
    marks = np.empty(len(texts), EXACT)
    marks["key"], marks["rest"] = np.frombuffer(digests, ">u8").reshape(-1, 2).T
    marks["ordinal"] = np.arange(first, first + len(texts))
    return marks


def near_marks(texts: Sequence[str], near: Near | None, first: int = 0) -> npt.NDArray[Any]:
    """`near.bands` marks for each text that has words, dtype NEAR; none where `near` is None."""
    if near is None:
        return np.empty(0, NEAR)
    hashes, offsets = shingles([text[:NEAR_CHARS] for text in texts], near.ngram_words)
    with_words = np.flatnonzero(np.diff(offsets))
    keys = _bands(_min_hashes(hashes, offsets, near)[with_words], near)
    marks = np.empty(keys.size, NEAR)
    marks["key"] = keys.ravel()
    marks["ordinal"] = np.repeat(with_words + first, near.bands)
    return marks


def _min_hashes(hashes: U64, offsets: U64, near: Near) -> npt.NDArray[np.uint32]:
    """The signatures, shape (texts, bands * rows)."""
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # of rensa: a worker is one process on one core
    from rensa import RMinHash

    count = near.bands * near.rows
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, count, near.seed & MASK)
    flat = itertools.chain.from_iterable(matrix.to_rows())
    return np.fromiter(flat, np.uint32, count * (len(offsets) - 1)).reshape(-1, count)


def _bands(signatures: npt.NDArray[np.uint32], near: Near) -> U64:
    """A hash for each band of each signature, shape (texts, bands); equal rows in other bands give other hashes."""
    rows = signatures.reshape(-1, near.bands, near.rows).astype(np.uint64)
    keys: U64 = (rows * _random(near.rows, 1)).sum(axis=2, dtype=np.uint64) + _random(near.bands, 2)
    return _mixed(keys)


def shingles(texts: Sequence[str], words: int) -> tuple[U64, U64]:
    """The hashes of the texts' n-grams of words, and where each text's begin: shapes (n-grams,) and (texts + 1,).

    A text of fewer words has one n-gram of all of them, a text without words has none.
    """
    hashes, counts = _word_hashes(texts)
    pad = words - 1  # zeros after each text's words, so that no n-gram reaches into the next
    begins = np.concatenate([[0], np.cumsum(counts + pad)])
    padded = np.zeros(begins[-1] + pad, np.uint64)
    padded[np.arange(len(hashes)) + np.repeat(np.arange(len(texts)) * pad, counts)] = hashes
    factors = _random(words, 3)
    grams: U64 = np.zeros(begins[-1], np.uint64)
    for place, factor in enumerate(factors):
        grams += padded[place : place + len(grams)] * factor
    per_text = np.where(counts > 0, np.maximum(counts - pad, 1), 0)
    offsets = np.concatenate([[0], np.cumsum(per_text)])
    taken = np.arange(offsets[-1]) + np.repeat(begins[:-1] - offsets[:-1], per_text)
    return _mixed(grams[taken]), offsets.astype(np.uint64)


def _word_hashes(texts: Sequence[str]) -> tuple[U64, npt.NDArray[np.int64]]:
    """A hash for each word of the texts, in order, and the number of words of each text."""
    value_of, is_alone = _characters()
    codes = np.frombuffer(("\n".join(texts) + "\n").encode("utf-32-le"), "<u4")
    highest = codes.max()
    if highest > 0xFFFF:  # ideographs beyond the basic plane share hashes; emoji and the like part words
        codes = np.where(codes > 0xFFFF, np.where(codes >= 0x20000, 0x4E00 + (codes & 0xFFF), 0), codes)
    values = value_of[codes]
    in_word = values > 0
    begins = in_word.copy()
    begins[1:] &= ~in_word[:-1]
    if highest >= WITHOUT_SPACES[0][0]:
        alone = is_alone[codes]
        begins[1:] |= in_word[1:] & (alone[:-1] | alone[1:])
    starts = np.flatnonzero(begins)
    edges = np.cumsum([0, *(len(text) + 1 for text in texts)])
    counts = np.diff(np.searchsorted(starts, edges))
    if not len(starts):
        return np.empty(0, np.uint64), counts
    powers, inverses = _powers(1 << (len(codes) - 1).bit_length())
    values *= powers[: len(codes)]
    sums = np.add.reduceat(values, starts)  # what parts words has the value 0
    return sums * inverses[starts], counts


@cache
def _characters() -> tuple[U64, npt.NDArray[np.bool_]]:
    """For each code of the basic plane: a random number for its lower case, 0 where it is in no word; and whether it
    is a word by itself."""
    random, values = _random(2**16, 4), np.zeros(2**16, np.uint64)
    for code in range(2**16):
        if unicodedata.category(chr(code))[0] in "LMN":
            lower = chr(code).lower()
            values[code] = random[ord(lower) if len(lower) == 1 else code]
    alone = np.zeros(2**16, np.bool_)
    for first, last in WITHOUT_SPACES:
        alone[first : last + 1] = values[first : last + 1] > 0
    return values, alone


WITHOUT_SPACES = [  # ranges of scripts that do not part words by spaces
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0xA4CF),  # Chinese and Japanese, Yi
    (0xF900, 0xFAFF),  # ideographs for compatibility
]


@cache
def _powers(count: int) -> tuple[U64, U64]:
    """R^i and R^-i modulo 2^64 for i below `count`, R odd."""
    base = 0x9E3779B97F4A7C15
    each = [np.full(count, value, np.uint64) for value in (base, pow(base, -1, 2**64))]
    for values in each:
        values[0] = 1
        np.multiply.accumulate(values, out=values)
    return each[0], each[1]


@cache
def _random(count: int, key: int) -> U64:
    """Odd numbers, always the same."""
    return np.random.PCG64(key).random_raw(count) | np.uint64(1)


def _mixed(x: U64) -> U64:
    """Every bit of the result depends on every bit: the finalizer of SplitMix64 (Steele et al., OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# --- files ----------------------------------------------------------------------------------------------------------

TEXT_TABLE = pa.schema([(name, pa.large_string()) for name in ("text", "id", "uri", "meta")])
ID_TABLE = pa.schema([("id", pa.large_string())])
MARKS: dict[str, np.dtype[Any]] = {"exact.marks": EXACT, "near.marks": NEAR}


class TextWriter:
    """Writes a slice's kept documents and their marks into its folder: TEXTS, IDS, exact.marks, near.marks."""

    def __init__(self, folder: Path, dedup: Dedup) -> None:
        self.folder, self.dedup = folder, dedup
        self.documents = 0
        self._batch: list[Document] = []
        self._characters = 0
        self._marks: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in MARKS}
        self._texts = pq.ParquetWriter(folder / TEXTS, TEXT_TABLE, compression="zstd")
        self._ids = pq.ParquetWriter(folder / IDS, ID_TABLE, compression="zstd")

    def add(self, document: Document) -> None:
        self._batch.append(document)
        self._characters += len(document.text)
        if self._characters >= BATCH_CHARS or len(self._batch) >= ROWS:
            self._write()

    def close(self) -> dict[str, str]:
        """Finish the files, fsynced: {name: xxh3-128 (hex)}."""
        self._write()
        for writer in (self._texts, self._ids):
            writer.close()
        for name, parts in self._marks.items():
            write_marks(self.folder / name, np.concatenate([np.empty(0, MARKS[name]), *parts]))
        names = (TEXTS, IDS, *MARKS)
        for name in names:
            sync_file(self.folder / name)
        return {name: file_hash(self.folder / name) for name in names}

    def _write(self) -> None:
        if not self._batch:
            return
        texts = [document.text for document in self._batch]
        ids = [_writable(document.id) for document in self._batch]
        uris = [_writable(document.uri) for document in self._batch]
        metas = [json.dumps(document.meta) for document in self._batch]
        self._texts.write_table(pa.table([texts, ids, uris, metas], TEXT_TABLE))
        self._ids.write_table(pa.table([ids], ID_TABLE))
        if self.dedup.exact:
            self._marks["exact.marks"].append(exact_marks(texts, self.documents))
        self._marks["near.marks"].append(near_marks(texts, self.dedup.near, self.documents))
        self.documents += len(texts)
        self._batch, self._characters = [], 0


def _writable(text: str) -> str:
    """Half a character cannot be written as UTF-8; an id or a URI of an input may have one."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def read_texts(folder: Path, corpus: str) -> Iterator[Document]:
    """The documents of a folder that TextWriter wrote, in order."""
    with pq.ParquetFile(folder / TEXTS) as file:
        for group in range(file.num_row_groups):
            for row in file.read_row_group(group).to_pylist():
                yield Document(row["text"], row["id"], corpus, row["uri"], json.loads(row["meta"]))


def read_ids(folder: Path, ordinals: npt.NDArray[np.integer[Any]]) -> pa.Array:
    """The ids of some documents of a folder that TextWriter wrote."""
    return pq.read_table(folder / IDS)["id"].combine_chunks().take(pa.array(ordinals))


def write_marks(path: Path, marks: npt.NDArray[Any]) -> None:
    """Marks by key: RANGES + 1 counts of 8 bytes (how many lie below each edge), then the records."""
    ranges = (marks["key"] >> np.uint64(64 - RANGE_BITS)).astype(np.uint16)
    order = np.argsort(ranges, kind="stable")  # by ordinal within a range
    edges = np.searchsorted(ranges[order], np.arange(RANGES + 1)).astype("<u8")
    with path.open("wb") as file:
        file.write(edges.tobytes())
        for part in np.array_split(order, len(order) // 2**20 + 1):  # so that there is no second copy of all
            file.write(marks[part].tobytes())


def mark_edges(path: Path, first: int, last: int) -> npt.NDArray[np.int64]:
    """How many marks of a file lie below the edges `first` to `last` of ranges, shape (last - first + 1,)."""
    with path.open("rb") as file:
        file.seek(8 * first)
        return np.frombuffer(_exactly(file, 8 * (last - first + 1)), "<u8").astype(np.int64)


def read_marks(path: Path, first: int, last: int) -> npt.NDArray[Any]:
    """The marks of the ranges from `first` up to `last`, which is not among them."""
    dtype = MARKS[path.name]
    edges = mark_edges(path, first, last)
    with path.open("rb") as file:
        file.seek(8 * (RANGES + 1) + dtype.itemsize * int(edges[0]))
        return np.frombuffer(_exactly(file, dtype.itemsize * int(edges[-1] - edges[0])), dtype)


def _exactly(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise ShardError(f"{file.name}: damaged: {len(data)} bytes where {size} were expected; remove its folder")
    return data
