"""The shard format: token blocks in WebDataset tars, their sidecars, and the manifest that makes them a corpus.

A corpus folder holds
    MANIFEST.json            versions, configuration, totals, generations; written last; only what it names is read
    shards.<hash>.parquet    one row per shard
    slices/<slice>/          one folder per slice of the input, whole or absent:
        train-00000.tar          block pairs NNNN.docs.npy + NNNN.tokens.npy, then at most one with NNNN.tail.npy
        train-00000.index.npy    one row per pair: offsets and hashes; each row checks itself
        train-00000.docs.parquet one row per document that begins in the shard
        ids.npy                  64-bit hashes of document ids, sorted, with their ordinals
        slice.json               the slice's record; under "files" the xxh3-128 of the slice's other files
        dropped.parquet          one row per document that was dropped, where there are any (dropped.py)

A block is 2^k + 1 token ids of the slice's stream (documents end to end, each closed by <|endoftext|>); the last id is
the next block's first, so every sample of a power-of-two length finds its targets inside its block.
"""

from __future__ import annotations

import builtins
import hashlib
import io
import itertools
import json
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache, reduce
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from configs import ConfigError, canonical_json
from data_pipeline.disk import writing
from data_pipeline.document import Document
from data_pipeline.failpoints import fail_at
from data_pipeline.files import Bytes, Damaged, Files, Folder, Missing, Outage, Unreadable, files_of, is_remote

FORMAT_VERSION = 1
CHUNK_BYTES = 64 * 1024  # what one chunk hash covers
TAR_BLOCK = 512
MANIFEST = "MANIFEST.json"
RECORD = "slice.json"
Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
Tokens = npt.NDArray[Any]  # of Format.dtype


class ShardError(Exception):
    """A shard, sidecar or manifest that is damaged, missing or of another version. One line: file, place, remedy."""


class Unreachable(ShardError):
    """Bytes that could not be had, however long they were waited for: an outage, and nobody's mistake."""


def unread(error: Unreadable) -> ShardError:
    """What stopped a read, said of shards: Unreachable in an outage alone, which a start after it may find over."""
    return (Unreachable if isinstance(error, Outage) else ShardError)(str(error))


class DamagedBlock(ShardError):
    """A block whose bytes are not those that were written."""

    def __init__(self, line: str, slice: str, shard: str, row: int) -> None:
        super().__init__(line)
        self.slice, self.shard, self.row = slice, shard, row


@dataclass(frozen=True)
class Format:
    """What every shard of a corpus shares. `block_tokens` is 2^k; `shard_bytes` is where a shard is closed."""

    block_tokens: int
    vocab_size: int
    end_of_text: int
    shard_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        if self.block_tokens & (self.block_tokens - 1) or not 2**6 <= self.block_tokens <= 2**20:
            raise ConfigError(f"block_tokens: expected a power of two up to 1Mi, got {self.block_tokens}")
        if not 0 <= self.end_of_text < self.vocab_size:
            raise ConfigError(f"end_of_text: expected an id below vocab_size {self.vocab_size}, got {self.end_of_text}")

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of token ids on disk: uint16 when the vocabulary fits, else uint32, little-endian."""
        return np.dtype("<u2") if self.vocab_size <= 2**16 else np.dtype("<u4")

    @cached_property
    def block_bytes(self) -> int:
        """Of a full block's .npy member."""
        return len(_npy(np.zeros(self.block_tokens + 1, self.dtype)))

    @cached_property
    def index_dtype(self) -> np.dtype[Any]:
        """One row of a shard's index. `check` is the xxh3-64 of the row's bytes before it, seeded by the row number."""
        chunks = -(-self.block_bytes // CHUNK_BYTES)
        return np.dtype(
            [
                ("offset", "<u8"),  # of the tokens member's payload in the tar
                ("docs_offset", "<u8"),
                ("bytes", "<u4"),
                ("docs_bytes", "<u4"),
                ("tokens", "<u4"),  # block_tokens + 1, fewer in a tail
                ("docs", "<u4"),
                ("hash", "V16"),
                ("docs_hash", "V16"),
                ("chunks", "V16", (chunks,)),
                ("check", "<u8"),
            ]
        )


@dataclass(frozen=True)
class ShardRecord:
    """One finished shard as its slice's record and the manifest know it. Hashes are xxh3-128, hex."""

    name: str  # file stem in the slice's folder
    split: Split
    blocks: int
    tail_tokens: int
    tokens: int  # of the documents' stream that this shard carries, tail included, the blocks' extra id not
    documents: int  # that begin here
    bytes: int
    hash: str
    index_hash: str
    docs_hash: str


@dataclass(frozen=True)
class SealedSlice:
    """A committed slice as `seal` takes it. `record_hash` is the xxh3-128 of slice.json, `ids_hash` that of ids.npy."""

    slice: str
    generation: int
    shards: Sequence[ShardRecord]
    ids_hash: str
    record_hash: str


class SliceWriter:
    """Writes the shards, sidecars and id index of one slice into an existing folder.

    The folder is a temporary one: the caller renames it when everything in it is whole.
    """

    def __init__(self, folder: Path, format: Format) -> None:
        self.folder, self.format = folder, format
        self._streams = {split: _StreamWriter(folder, format, split) for split in SPLITS}
        self._ids: list[tuple[int, int]] = []

    def add(self, document: Document, ids: npt.NDArray[Any], split: Split) -> None:
        """Append a document's token ids, shape (n,), without <|endoftext|>, which is added here."""
        if len(ids) and int(ids.max()) >= self.format.vocab_size:
            raise ShardError(f"{document.id}: token id {int(ids.max())} is outside vocab_size {self.format.vocab_size}")
        ordinal = len(self._ids)
        self._ids.append((id_hash(document.id), ordinal))
        self._streams[split].add(ordinal, document, ids)

    def close(self) -> list[ShardRecord]:
        """Finish every shard and the id index, fsynced."""
        records = [record for split in SPLITS for record in self._streams[split].close()]
        ids = np.array(sorted(self._ids), dtype=[("hash", "<u8"), ("ordinal", "<u4")])
        write_durably(self.folder / "ids.npy", _npy(ids))
        return records


class _StreamWriter:
    """One split's stream of a slice: cuts it into blocks, and the blocks into shards."""

    def __init__(self, folder: Path, format: Format, split: Split) -> None:
        self.folder, self.format, self.split = folder, format, split
        self.pending = np.zeros(0, format.dtype)  # ids not yet in a block; its first id is the block's first
        self.begun = 0  # position of pending[0] in the stream
        self.starts: deque[tuple[int, int]] = deque()  # (ordinal, position), from the document open at pending[0] on
        self.rows: deque[SidecarRow] = deque()  # of documents that begin at or after `shard_begun`
        self.shard_begun = 0
        self.shard: _ShardWriter | None = None
        self.records: list[ShardRecord] = []
        self.queue: list[npt.NDArray[Any]] = []
        self.queued = 0
        self.mark = np.array([format.end_of_text], np.uint32)

    def add(self, ordinal: int, document: Document, ids: npt.NDArray[Any]) -> None:
        position = self.begun + len(self.pending) + self.queued
        self.starts.append((ordinal, position))
        self.rows.append(_sidecar_row(ordinal, position, len(ids) + 1, document))
        self.queue += [ids, self.mark]
        self.queued += len(ids) + 1
        if len(self.pending) + self.queued > self.format.block_tokens:
            self._cut()

    def close(self) -> list[ShardRecord]:
        self._cut()
        if len(self.pending):
            self._write("tail", self.pending)
            self.begun += len(self.pending)
        if self.shard is not None:
            self._close_shard()
        return self.records

    def _cut(self) -> None:
        """Write the full blocks that lie in pending + queue."""
        size = self.format.block_tokens
        stream = np.concatenate([self.pending, *self.queue]).astype(self.format.dtype)
        self.queue, self.queued, taken = [], 0, 0
        while len(stream) - taken > size:
            self._write("tokens", stream[taken : taken + size + 1])
            taken += size
            self.begun += size
            while len(self.starts) > 1 and self.starts[1][1] <= self.begun:
                self.starts.popleft()
            assert self.shard is not None
            if self.shard.bytes + self.format.block_bytes > self.format.shard_bytes:
                self._close_shard()
        self.pending = stream[taken:].copy()

    def _write(self, member: str, ids: npt.NDArray[Any]) -> None:
        if self.shard is None:
            self.shard = _ShardWriter(self.folder, f"{self.split}-{len(self.records):05d}", self.format)
            self.shard_begun = self.begun
        end = self.begun + self.format.block_tokens
        inside = itertools.takewhile(lambda start: start[1] < end, self.starts)
        docs = [(ordinal, position - self.begun) for ordinal, position in inside]
        self.shard.write(member, ids, np.array(docs, "<i8").reshape(-1, 2))

    def _close_shard(self) -> None:
        """Close the open shard; its sidecar takes the documents that begin before the position reached."""
        assert self.shard is not None
        mine = []
        while self.rows and self.rows[0].start < self.begun:
            mine.append(self.rows.popleft())
        self.records.append(self.shard.close(self.split, self.begun - self.shard_begun, mine))
        self.shard = None


class _ShardWriter:
    """One tar with its index and sidecar."""

    def __init__(self, folder: Path, name: str, format: Format) -> None:
        import webdataset

        self.folder, self.name, self.format = folder, name, format
        self.file = HashedFile((folder / f"{name}.tar").open("xb"))
        self.tar = webdataset.TarWriter(
            self.file, user="longhaul", group="longhaul", encoder=False, mtime=0, compress=False
        )
        self.bytes = 0
        self.index: list[npt.NDArray[Any]] = []
        self.tail_tokens = 0

    def write(self, member: str, ids: npt.NDArray[Any], docs: npt.NDArray[np.int64]) -> None:
        tokens_bytes, docs_bytes = _npy(ids), _npy(docs)
        self.tar.write({"__key__": f"{len(self.index):04d}", "docs.npy": docs_bytes, f"{member}.npy": tokens_bytes})
        docs_offset = self.bytes + TAR_BLOCK
        offset = docs_offset + _padded(len(docs_bytes)) + TAR_BLOCK
        self.bytes = offset + _padded(len(tokens_bytes))
        row = np.zeros((), self.format.index_dtype)
        row["offset"], row["docs_offset"] = offset, docs_offset
        row["bytes"], row["docs_bytes"] = len(tokens_bytes), len(docs_bytes)
        row["tokens"], row["docs"] = len(ids), len(docs)
        row["hash"], row["docs_hash"] = np.void(_xxh(tokens_bytes)), np.void(_xxh(docs_bytes))
        for i in range(-(-len(tokens_bytes) // CHUNK_BYTES)):
            row["chunks"][i] = np.void(_xxh(tokens_bytes[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES]))
        row["check"] = _row_check(row.tobytes(), len(self.index))
        self.index.append(row)
        self.tail_tokens = len(ids) if member == "tail" else 0

    def close(self, split: Split, tokens: int, documents: list[SidecarRow]) -> ShardRecord:
        self.tar.close()
        self.file.close_durably()
        index_bytes = _npy(np.array(self.index, self.format.index_dtype))
        write_durably(self.folder / f"{self.name}.index.npy", index_bytes)
        sidecar = io.BytesIO()
        columns = [pa.array(column, field.type) for column, field in zip(_columns(documents), SIDECAR, strict=True)]
        pq.write_table(pa.Table.from_arrays(columns, schema=SIDECAR), sidecar, compression="zstd")
        write_durably(self.folder / f"{self.name}.docs.parquet", sidecar.getvalue())
        return ShardRecord(
            name=self.name,
            split=split,
            blocks=len(self.index) - (self.tail_tokens > 0),
            tail_tokens=self.tail_tokens,
            tokens=tokens,
            documents=len(documents),
            bytes=self.file.size,
            hash=self.file.hash.hexdigest(),
            index_hash=_xxh(index_bytes).hex(),
            docs_hash=_xxh(sidecar.getvalue()).hex(),
        )


SIDECAR = pa.schema(
    [
        ("ordinal", pa.uint32()),  # of the document in its slice, both splits counted together
        ("start", pa.uint64()),  # position of its first token in the split's stream of the slice
        ("tokens", pa.uint32()),  # with its <|endoftext|>
        ("id", pa.string()),
        ("uri", pa.string()),
        ("source", pa.string()),
        ("input", pa.string()),
        ("offset", pa.uint64()),
        ("language", pa.string()),
    ]
)


class SidecarRow(NamedTuple):
    """A document as the sidecar keeps it: SIDECAR's columns."""

    ordinal: int
    start: int
    tokens: int
    id: str
    uri: str
    source: str
    input: Any
    offset: Any
    language: Any


def _sidecar_row(ordinal: int, start: int, tokens: int, document: Document) -> SidecarRow:
    meta = document.meta.get
    return SidecarRow(
        ordinal,
        start,
        tokens,
        document.id,
        document.uri,
        document.source,
        meta("input"),
        meta("offset"),
        meta("language"),
    )


def _columns(rows: Sequence[SidecarRow]) -> Sequence[Sequence[Any]]:
    return list(zip(*rows, strict=True)) if rows else [()] * len(SIDECAR)


@dataclass
class HashedFile:
    """A file object for writing that keeps the xxh3-128 and the size of what went through it."""

    file: BinaryIO
    hash: Any = field(default_factory=xxhash.xxh3_128)
    size: int = 0

    def write(self, data: bytes | memoryview) -> int:
        self.hash.update(data)
        self.size += len(data)
        with writing(Path(self.file.name), len(data)):
            return self.file.write(data)

    def tell(self) -> int:
        return self.size

    def close_durably(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def id_hash(document_id: str) -> int:
    """The 64-bit hash under which a slice's id index knows a document."""
    return xxhash.xxh3_64_intdigest(document_id.encode("utf-8", "surrogatepass"))


def file_hash(path: Path) -> str:
    """xxh3-128 (hex) of a whole file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(4 * 2**20):
            digest.update(chunk)
    return digest.hexdigest()


def read_parquet(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """A small Parquet file. In this thread: after `pyarrow.parquet.read_table`, whose thread pool is torn down at exit,
    8 of 300 processes on a busy machine ended with SIGABRT instead of their exit code (pyarrow 25.0.1)."""
    return pq.ParquetFile(pa.BufferReader(data)).read(columns, use_threads=False)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file that is whole and on disk when this returns; it appears under its name only then.

    Once it has appeared, its folder may be renamed: whoever waited for it may act before this returns.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with writing(path, len(data)), temporary.open("wb") as file:
            file.write(data)
            fail_at("file.written")
            file.flush()
            os.fsync(file.fileno())
        fail_at("file.synced")
        temporary.replace(path)
        fail_at("file.renamed")
        os.fsync(folder)
    finally:
        os.close(folder)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    _sync(folder)


def sync_file(path: Path) -> None:
    """Make the content of a file durable that a library wrote."""
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- the manifest ---------------------------------------------------------------------------------------------------

TABLE = pa.schema(
    [
        ("slice", pa.string()),
        ("generation", pa.int32()),
        ("name", pa.string()),
        ("split", pa.string()),
        ("blocks", pa.int64()),
        ("tail_tokens", pa.int64()),
        ("tokens", pa.int64()),
        ("documents", pa.int64()),
        ("bytes", pa.int64()),
        ("hash", pa.string()),
        ("index_hash", pa.string()),
        ("docs_hash", pa.string()),
        ("ids_hash", pa.string()),
        ("record_hash", pa.string()),
    ]
)


def seal(folder: Path, format: Format, head: dict[str, Any], slices: Sequence[SealedSlice]) -> Manifest:
    """Write the manifest over committed slices, in their given order, and return it opened.

    `head` is what the preparation wants recorded (corpus, configuration, tokenizer hash, encoder, counts, and under
    "files" the xxh3-128 of other files of the folder that `verify` shall hold to). Sealing the same again changes
    nothing.
    """
    table = _table(slices)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    table_hash = _xxh(buffer.getvalue()).hex()
    count = max((s.generation for s in slices), default=-1) + 1
    manifest = {
        "format": FORMAT_VERSION,
        "block_tokens": format.block_tokens,
        "vocab_size": format.vocab_size,
        "end_of_text": format.end_of_text,
        "dtype": format.dtype.name,
        "shard_bytes": format.shard_bytes,
        "table": f"shards.{table_hash[:12]}.parquet",
        "table_hash": table_hash,
        "generations": [
            _generation(format, head, table.filter(pc.equal(table["generation"], g))) for g in range(count)
        ],
        **head,
    }
    manifest["sha256"] = _self_hash(manifest)
    old = sorted(folder.glob("shards.*.parquet"))
    write_durably(folder / manifest["table"], buffer.getvalue())
    write_durably(folder / MANIFEST, _head_bytes(manifest))
    for table in old:
        if table.name != manifest["table"]:
            table.unlink()
    return Manifest.open(folder)


def _table(slices: Sequence[SealedSlice]) -> pa.Table:
    """A row per shard, column by column: dicts of a million shards would take a minute and gigabytes."""
    pairs = [(slice, shard) for slice in slices for shard in slice.shards]
    of_slice = {f.name for f in fields(SealedSlice)}
    columns = [[getattr(pair[name not in of_slice], name) for pair in pairs] for name in TABLE.names]
    return pa.table([pa.array(column, type) for column, type in zip(columns, TABLE.types, strict=True)], schema=TABLE)


def _generation(format: Format, head: dict[str, Any], table: pa.Table) -> dict[str, Any]:
    """Totals and identity of one generation's shards. The identity changes when any token or its place does."""
    identity = [FORMAT_VERSION, format.block_tokens, format.vocab_size, format.dtype.name, head.get("tokenizer_sha256")]
    identity += map(list, zip(*(table[c].to_pylist() for c in ("slice", "name", "blocks", "hash")), strict=True))
    totals: dict[str, Any] = {}
    for split in SPLITS:
        mine = table.filter(pc.equal(table["split"], split))
        counted = ("blocks", "tail_tokens", "tokens", "documents", "bytes")
        totals[split] = {column: pc.sum(mine[column], min_count=0).as_py() for column in counted}
    return {"identity": hashlib.sha256(canonical_json(identity).encode()).hexdigest(), "shards": len(table), **totals}


class _MissingTable(ShardError):
    """What the head names is not there."""


@dataclass(frozen=True)
class Manifest:
    """An opened corpus: its files, its head, its format, and its table of shards (Arrow, not Python objects)."""

    files: Files
    head: dict[str, Any]
    format: Format
    table: pa.Table

    @staticmethod
    def open(folder: Path) -> Manifest:
        """Open a corpus folder. Raises ShardError where it is missing, unfinished, damaged or newer than this code."""
        return Manifest.read(Folder(folder))

    @staticmethod
    def read(files: Files) -> Manifest:
        """Open a corpus wherever it lies. Raises as `open`, and where it cannot be read."""
        head = _head(files)
        try:
            data = _table_of(files, head)
        except _MissingTable:  # sealed again between the two
            head = _head(files)
            data = _table_of(files, head)
        format = Format(head["block_tokens"], head["vocab_size"], head["end_of_text"], head["shard_bytes"])
        return Manifest(files, head, format, read_parquet(data))

    @property
    def folder(self) -> Path:
        """Of a corpus on this machine."""
        assert isinstance(self.files, Folder)
        return self.files.folder

    @property
    def address(self) -> str:
        """Where the corpus lies: a folder or an address."""
        return self.files.address

    def name_beside(self, name: str) -> str:
        """Of a file of the folder in which the corpus lies with others."""
        if is_remote(self.address):
            return f"{self.address.rpartition('/')[0]}/{name}"
        return str(Path(self.address).parent / name)

    def beside(self, name: str) -> bytes:
        """What that file holds. Raises Unreadable."""
        folder = self.name_beside("")
        return (files_of(folder) if is_remote(folder) else Folder(Path(folder))).whole(name)

    @property
    def generations(self) -> list[dict[str, Any]]:
        """Identity (sha256) and totals of each generation."""
        return list(self.head["generations"])

    def shards(self, split: Split, generation: int) -> Shards:
        """The shards of a split and generation, their blocks numbered through in the manifest's order."""
        return Shards(self, chosen(self.table, {"generation": generation, "split": split}))


def read_head(folder: Path) -> dict[str, Any]:
    """MANIFEST.json, checked against its own hash and our format version."""
    return _head(Folder(folder))


def _head(files: Files) -> dict[str, Any]:
    path = f"{files.address}/{MANIFEST}"
    try:
        data = files.whole(MANIFEST)
    except Missing:
        raise ShardError(f"{files.address}: no {MANIFEST}: not a corpus, or not finished; run data-prep run") from None
    except Unreadable as error:
        raise unread(error) from None
    try:
        head = json.loads(data.decode("utf-8"))
        version, claimed = head["format"], head["sha256"]
    except (ValueError, KeyError, TypeError):
        raise ShardError(f"{path}: damaged (not a manifest); run data-prep run again") from None
    if version > FORMAT_VERSION:
        raise ShardError(f"{path}: format {version} is newer than this code's {FORMAT_VERSION}; update longhaul")
    if _self_hash(head) != claimed:
        raise ShardError(f"{path}: damaged (its own hash differs); run data-prep run again")
    return dict(head)


def _table_of(files: Files, head: dict[str, Any]) -> bytes:
    path = f"{files.address}/{head['table']}"
    try:
        return files.whole(head["table"], head["table_hash"])
    except Damaged:
        raise ShardError(f"{path}: damaged (hash differs from {MANIFEST}); run data-prep run again") from None
    except Missing:
        raise _MissingTable(f"{path}: missing, but {MANIFEST} names it; run data-prep run again") from None
    except Unreadable as error:
        raise unread(error) from None


def _head_bytes(head: dict[str, Any]) -> bytes:
    return (json.dumps(head, indent=2, ensure_ascii=False) + "\n").encode()


def _self_hash(head: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json({k: v for k, v in head.items() if k != "sha256"}).encode()).hexdigest()


def chosen(table: pa.Table, wanted: Mapping[str, int | str]) -> pa.Table:
    """The rows of a table whose columns have these values.

    Without a Python object in what pyarrow is given or asked for: that makes it import pandas (25.0.1), which takes
    longer and more memory than all else of a start.
    """
    mask = reduce(pc.and_, (pc.is_in(table[name], value_set=_alone(value)) for name, value in wanted.items()))
    return table if pc.all(mask).as_py() else table.filter(mask)


def _alone(value: int | str) -> pa.Array:
    """An array of one value, of a column of strings or of int32. See `chosen`."""
    if isinstance(value, int):
        return pa.Array.from_buffers(pa.int32(), 1, [None, pa.py_buffer(struct.pack("<i", value))])
    data = value.encode()
    return pa.StringArray.from_buffers(1, pa.py_buffer(struct.pack("<ii", 0, len(data))), pa.py_buffer(data))


def _numbers(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """A column of whole numbers. See `chosen`."""
    return np.concatenate([np.zeros(0, np.int64), *(np.from_dlpack(chunk) for chunk in column.chunks)])


FAILED_READS = (Unreadable, Damaged)
ENTRY = struct.Struct("<QQIIII16s16s")  # how a row of an index begins, see `Format.index_dtype`


class Entry(NamedTuple):
    """A row of a shard's index. `row` is all of it."""

    offset: int
    docs_offset: int
    bytes: int
    docs_bytes: int
    tokens: int
    docs: int
    hash: builtins.bytes
    docs_hash: builtins.bytes
    row: builtins.bytes


class Shards:
    """The shards of one split and generation: blocks by number, each checked against its hash when read.

    All reads may be made by several threads, and raise ShardError: DamagedBlock naming shard and block, or another
    where bytes cannot be had.
    """

    MAX_NAMES = 2**14  # some MB

    def __init__(self, manifest: Manifest, table: pa.Table) -> None:
        self.manifest, self.format, self.table, self.files = manifest, manifest.format, table, manifest.files
        self.ends = np.cumsum(_numbers(table["blocks"]))
        self._names: dict[int, tuple[str, str]] = {}  # a value of the table takes as long as a block to read
        self._expected: dict[tuple[int, int], Entry] = {}  # rows of blocks that are about to be read
        self._expects = True  # until one could not be had: what waits for storage is the reading

    @property
    def blocks(self) -> int:
        """How many full blocks there are."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def __len__(self) -> int:
        return len(self.table)

    def name(self, shard: int, suffix: str) -> str:
        """A file of a shard, in the corpus; `suffix` is one of tar, index.npy, docs.parquet."""
        return f"{self._known(shard)[0]}.{suffix}"

    def _known(self, shard: int) -> tuple[str, str]:
        """(path without suffix, hash of the index) of a shard."""
        known = self._names.get(shard)
        if known is None:
            if len(self._names) >= self.MAX_NAMES:
                self._names.clear()
            stem = f"slices/{self.table['slice'][shard]}/{self.table['name'][shard]}"
            known = self._names[shard] = stem, self._hash(shard, "index_hash")
        return known

    def path(self, shard: int, suffix: str) -> Path:
        """The same on this machine."""
        return self.manifest.folder / self.name(shard, suffix)

    def locate(self, block: int) -> tuple[int, int]:
        """(shard, row) of a block."""
        assert 0 <= block < self.blocks
        shard = int(self.ends.searchsorted(block, side="right"))
        return shard, block - (int(self.ends[shard - 1]) if shard else 0)

    def read(self, block: int, buffer: bytearray | None = None) -> Tokens:
        """The token ids of a block, shape (block_tokens + 1,). With a buffer they may lie in it, until it is reused."""
        return self.member(*self.locate(block), buffer)

    def read_with_documents(self, block: int, buffer: bytearray | None = None) -> tuple[Tokens, npt.NDArray[np.int64]]:
        """The token ids of a block, as above, and its documents, as `documents` gives them."""
        return self.member_with_documents(*self.locate(block), buffer)

    def expect(self, block: int) -> None:
        """A block that will be read soon. What is wrong with it its reading says, having waited for it in vain once."""
        if not self._expects:
            return
        shard, row = self.locate(block)
        try:
            entry = self._entry(shard, row)
        except ShardError:
            self._expects = False
            return
        self.files.expect(self.name(shard, "tar"), entry.offset, entry.bytes)
        if len(self._expected) < self.MAX_NAMES:
            self._expected[shard, row] = entry

    def member(self, shard: int, row: int, buffer: bytearray | None = None) -> Tokens:
        """The token ids of a shard's row (the row after its last block is its tail), shape (n,)."""
        return self._member(shard, row, self._entry(shard, row), buffer)

    def documents(self, shard: int, row: int) -> npt.NDArray[np.int64]:
        """(ordinal, start) of the document open at the row's first token and each that begins later, shape (d, 2)."""
        return self._documents(shard, row, self._entry(shard, row))

    def member_with_documents(
        self, shard: int, row: int, buffer: bytearray | None = None
    ) -> tuple[Tokens, npt.NDArray[np.int64]]:
        """Both, with one look into the index."""
        entry = self._entry(shard, row)
        return self._member(shard, row, entry, buffer), self._documents(shard, row, entry)

    def _member(self, shard: int, row: int, entry: Entry, buffer: bytearray | None) -> Tokens:
        try:
            return _from_npy(self.files.part(self.name(shard, "tar"), entry.offset, entry.bytes, entry.hash, buffer))
        except FAILED_READS as error:
            raise self._said(error, shard, row, "tar", f"block {row} is", entry) from None

    def _documents(self, shard: int, row: int, entry: Entry) -> npt.NDArray[np.int64]:
        name = self.name(shard, "tar")
        try:
            return _from_npy(self.files.part(name, entry.docs_offset, entry.docs_bytes, entry.docs_hash))
        except FAILED_READS as error:
            raise self._said(error, shard, row, "tar", f"documents of block {row} are") from None

    def sidecar(self, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
        """A row for each document that begins in a shard: SIDECAR's columns, or some of them."""
        return read_parquet(self.sidecar_bytes(shard), columns)

    def sidecar_bytes(self, shard: int) -> bytes:
        """The same as the file, checked."""
        try:
            return self.files.whole(self.name(shard, "docs.parquet"), self._hash(shard, "docs_hash"))
        except FAILED_READS as error:
            raise self._said(error, shard, 0, "docs.parquet", "the file is") from None

    def tails(self) -> list[tuple[int, int]]:
        """(shard, row) of every tail."""
        return [(i, self.block_counts[i]) for i, tail in enumerate(self.tail_tokens) if tail]

    @cached_property
    def block_counts(self) -> list[int]:
        """How many full blocks each shard has."""
        return [*map(int, _numbers(self.table["blocks"]))]

    @cached_property
    def tail_tokens(self) -> list[int]:
        """How many tokens each shard's tail has, 0 where it has none. A tail is the row behind the last block."""
        return [*map(int, _numbers(self.table["tail_tokens"]))]

    def _entry(self, shard: int, row: int) -> Entry:
        """What the index says of a row."""
        if (known := self._expected.pop((shard, row), None)) is not None:
            return known
        size = self.format.index_dtype.itemsize
        offset = self._index_header + row * size

        def is_right(data: Bytes) -> bool:
            return len(data) == size and int.from_bytes(data[-8:], "little") == _row_check(data, row)

        stem, index_hash = self._known(shard)
        try:
            data = self.files.row(f"{stem}.index.npy", offset, size, is_right, index_hash)
        except FAILED_READS as error:
            raise self._said(error, shard, row, "index.npy", f"row {row} is") from None
        return Entry._make((*ENTRY.unpack_from(data), data))

    def _hash(self, shard: int, column: str) -> str:
        return str(self.table[column][shard])

    @cached_property
    def _index_header(self) -> int:
        """Bytes before the first row: numpy pads its header to 64, and ours has one length for all shapes in use."""
        return len(_npy(np.zeros(0, self.format.index_dtype)))

    def _said(
        self, error: Exception, shard: int, row: int, suffix: str, what: str, entry: Entry | None = None
    ) -> ShardError:
        """A read that failed, in one line: damage with shard and place, and the command that repairs it."""
        slice_, name = str(self.table["slice"][shard]), str(self.table["name"][shard])
        if isinstance(error, Missing):
            return ShardError(f"{error}, though {MANIFEST} names it, with block {row}; {self._remedy(slice_, name)}")
        if isinstance(error, Unreadable):
            return unread(error)
        assert isinstance(error, Damaged)
        how = "damaged" if entry is None else self._damage(error.data, entry)
        line = f"{self.files.address}/{self.name(shard, suffix)}: {what} {how}; {self._remedy(slice_, name)}"
        return DamagedBlock(line, slice_, name, row)

    def _damage(self, data: Bytes, entry: Entry) -> str:
        """What is wrong with a block's bytes, by its chunk hashes."""
        size, offset = entry.bytes, entry.offset
        if len(data) < size:
            return f"truncated ({size} bytes expected at {offset}, got {len(data)})"
        hashes = np.frombuffer(entry.row, self.format.index_dtype)[0]["chunks"]
        chunks = range(-(-size // CHUNK_BYTES))
        wrong = [i for i in chunks if _xxh(data[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES]) != hashes[i].tobytes()]
        first, last = (wrong[0], wrong[-1] + 1) if wrong else (0, len(chunks))
        return f"damaged (between byte {offset + first * CHUNK_BYTES} and {offset + min(last * CHUNK_BYTES, size)})"

    def _remedy(self, slice: str, name: str) -> str:
        if not is_remote(self.files.address):
            return f"run data-prep repair {self.files.address} {slice}/{name}"
        corpus = self.manifest.head.get("corpus", "CORPUS")
        return f"run data-prep repair CONFIG {corpus}/{slice}/{name} where it was made, which sends it anew"

    def close(self) -> None:
        """Close the open files."""
        self.files.close()


def verify(folder: Path, look: Callable[[int, int], None] = lambda *_: None) -> Iterator[str]:
    """Read every byte of a corpus and yield one line per damage; nothing when it is whole.

    `look` is told of the shards that were read, and of how many there are.
    """
    try:
        manifest = Manifest.open(folder)
    except ShardError as error:
        yield str(error)
        return
    if (folder / MANIFEST).read_bytes() != _head_bytes(manifest.head):
        yield f"{folder / MANIFEST}: changed since it was written, though not in meaning"
    expected = {folder / MANIFEST, folder / manifest.head["table"]}
    for name, hash_ in manifest.head.get("files", {}).items():
        expected.add(folder / name)
        yield from _check_file(folder / name, hash_)
    read = 0
    for generation in range(len(manifest.generations)):
        for split in SPLITS:
            shards = manifest.shards(split, generation)
            for i in range(len(shards)):
                read += 1
                look(read - 1, manifest.table.num_rows)
                expected |= {shards.path(i, suffix) for suffix in ("tar", "index.npy", "docs.parquet")}
                yield from _check_shard(shards, i)
            shards.close()
    table = manifest.table
    per_slice = (table[column].to_pylist() for column in ("slice", "ids_hash", "record_hash"))
    for slice_, ids_hash, record_hash in sorted(set(zip(*per_slice, strict=True))):
        for name, hash_ in (("ids.npy", ids_hash), (RECORD, record_hash)):
            expected.add(folder / "slices" / slice_ / name)
            yield from _check_file(folder / "slices" / slice_ / name, hash_)
    for path, hash_ in list(_named_by_records(expected)):
        expected.add(path)
        yield from _check_file(path, hash_)
    yield from _unexpected(folder, expected)


def _named_by_records(files: set[Path]) -> Iterator[tuple[Path, str]]:
    """(path, hash) of what the slices' records name beside shards; a damaged record has been told of already."""
    for path in sorted(path for path in files if path.name == RECORD):
        try:
            named = json.loads(path.read_text(encoding="utf-8")).get("files", {})
        except (OSError, ValueError, AttributeError):
            continue
        yield from ((path.parent / name, hash_) for name, hash_ in named.items())


def _unexpected(folder: Path, expected: set[Path]) -> Iterator[str]:
    """What lies among the slices and is not named by the manifest."""
    slices = folder / "slices"
    found = {path for path in slices.glob("[!.]*") if not path.is_dir()} | set(slices.glob("[!.]*/*"))
    for path in sorted(found - expected):
        yield f"{path}: not named by {MANIFEST}"


def _check_file(path: Path, expected: str) -> Iterator[str]:
    if not path.is_file():
        yield f"{path}: missing"
    elif file_hash(path) != expected:
        yield f"{path}: damaged (hash differs)"


def _check_shard(shards: Shards, shard: int) -> Iterator[str]:
    for suffix, column in (("index.npy", "index_hash"), ("docs.parquet", "docs_hash")):
        yield from _check_file(shards.path(shard, suffix), shards.table[column][shard].as_py())
    tar = shards.path(shard, "tar")
    if not tar.is_file():
        yield f"{tar}: missing"
        return
    size, expected = tar.stat().st_size, shards.table["bytes"][shard].as_py()
    if size != expected:
        yield f"{tar}: {size} bytes, expected {expected}"
    if file_hash(tar) != shards.table["hash"][shard].as_py():
        bad = _bad_rows(shards, shard)
        yield f"{tar}: damaged in {', '.join(f'block {row}' for row in bad[:10]) or 'its tar headers or padding'}"


def _bad_rows(shards: Shards, shard: int) -> list[int]:
    bad = []
    rows = shards.table["blocks"][shard].as_py() + (shards.table["tail_tokens"][shard].as_py() > 0)
    for row in range(rows):
        try:
            shards.member(shard, row)
            shards.documents(shard, row)
        except ShardError:
            bad.append(row)
    return bad


def _npy(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _from_npy(data: Bytes) -> npt.NDArray[Any]:
    """The array of a .npy file. It lies in the bytes: read only, and gone with a buffer that is used again."""
    header = 10 + int.from_bytes(data[8:10], "little")
    shape, dtype = _npy_header(bytes(data[:header]))
    return np.frombuffer(data, dtype, offset=header).reshape(shape)


@lru_cache(maxsize=256)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """(shape, dtype) of a header as `_npy` writes it: numpy takes longer to read it than to read a block."""
    file = io.BytesIO(header)
    assert np.lib.format.read_magic(file) == (1, 0)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    assert not fortran
    return shape, dtype


def _padded(size: int) -> int:
    return -(-size // TAR_BLOCK) * TAR_BLOCK


def _xxh(data: Bytes) -> bytes:
    return xxhash.xxh3_128_digest(data)


def _row_check(row: Bytes, number: int) -> int:
    return xxhash.xxh3_64_intdigest(row[:-8], number)
