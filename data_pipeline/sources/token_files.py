"""Files of tokens already made: Megatron's `.bin` + `.idx` and datatrove's `.ds` + `.ds.index`.

    https://github.com/NVIDIA/Megatron-LM, megatron/core/datasets/indexed_dataset.py (index version 1)
    https://github.com/huggingface/datatrove, src/datatrove/pipeline/tokens/tokenizer.py

Both are ids end to end, and an index of where documents begin or end. A mark that closes a document in the file is
taken off, since the shards have their own. The index is read piece by piece: it has 20 bytes for each document.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from configs import ConfigError
from data_pipeline.document import Document
from data_pipeline.sources.inputs import (
    MAX_DOCUMENT_BYTES,
    READ_BYTES,
    Bytes,
    Damage,
    Input,
    OnDamage,
    Reading,
    companion_of,
    describe,
    find_inputs,
    open_bytes,
)
from data_pipeline.sources.notes import Noted

MEGATRON = struct.Struct("<9sQBQQ")  # magic, version, code of the ids' type, sequences, document edges
MEGATRON_MAGIC = b"MMIDIDX\0\0"
MEGATRON_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
AT_ONCE = 2**16  # entries of an index


class TokenFiles(Noted):
    """Files, folders or patterns of `.bin` and `.ds`, each with its index beside it."""

    kind: Literal["token_files"] = "token_files"
    paths: list[str]
    on_damage: OnDamage = "skip"

    version: ClassVar[int] = 1  # raised when the same file would give other tokens

    def inputs(self) -> list[Input]:
        """The files, sorted by name. Raises ConfigError where a path leads to none, or an index is missing."""
        try:
            return find_inputs(self.paths, (".bin", ".ds"))
        except FileNotFoundError as error:
            raise ConfigError(f"paths: {error.filename}: an index is missing; put it beside its file") from None

    def can_split(self, input: Input) -> bool:
        """Whether ranges of its bytes can be read by themselves."""
        return True

    def text_bytes(self, input: Input) -> float:
        """About how many bytes of text an input stands for: ids of two bytes, four of text each."""
        return input.bytes * 2

    def read(self, reading: Reading) -> Iterator[Document]:
        """The documents that begin in the part's range of a file."""
        name = companion_of(reading.part.input.name)
        assert name is not None
        index = open_bytes(describe(name))
        try:
            edges = _megatron(name, index) if name.endswith(".idx") else _datatrove(index, reading)
            yield from _documents(reading, edges)
        except Damage as damage:
            reading.damaged(damage)
        finally:
            index.close()


@dataclass(frozen=True)
class Edges:
    """Where the documents of a file are: document i has the bytes from edge i to edge i + 1."""

    documents: int
    dtype: np.dtype[Any]  # of the ids
    read: Callable[[int, int], npt.NDArray[np.int64]]  # (first, count) -> so many edges, in bytes

    def first_from(self, start: int) -> int:
        """The number of the first document that begins at byte `start` or behind it."""
        low, high = 0, self.documents
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.read(middle, 1)[0] < start else (low, middle)
        return low

    def spans(self, first: int) -> Iterator[tuple[int, int, int]]:
        """(number, begin, end) of each document from `first` on. Raises Damage where edges go back."""
        for at in range(first, self.documents, AT_ONCE):
            edges = self.read(at, min(AT_ONCE, self.documents - at) + 1)
            if (np.diff(edges) < 0).any():
                raise Damage(int(edges[0]), f"the index is damaged: an end before its begin, from document {at} on")
            yield from zip(range(at, self.documents), edges[:-1].tolist(), edges[1:].tolist(), strict=False)


def _documents(reading: Reading, edges: Edges) -> Iterator[Document]:
    part, name, itemsize = reading.part, reading.part.input.name, edges.dtype.itemsize
    covered = int(edges.read(edges.documents, 1)[0])
    if covered < reading.size:
        raise Damage(0, f"its index covers {covered} of {reading.size} bytes: of another file, or truncated")
    stream = _Stream(reading)
    for number, begin, end in edges.spans(edges.first_from(part.start)):
        if part.stop is not None and begin >= part.stop:
            return
        stream.skip_to(begin)
        if begin == end or end - begin > MAX_DOCUMENT_BYTES:
            reading.put_aside("empty document" if begin == end else "document too large", f"document {number}")
            continue
        data = stream.take(end - begin)
        if len(data) < end - begin or len(data) % itemsize:
            raise Damage(begin, f"the file ends inside document {number}" if end > reading.size else "half an id")
        meta: dict[str, str | int] = {"input": name, "offset": begin}
        yield Document("", f"{name}:{number}", reading.source, name, meta, np.frombuffer(data, edges.dtype))


class _Stream:
    """The bytes of a part in their order, in pieces of any size."""

    def __init__(self, reading: Reading) -> None:
        self.reading, self.held, self.position = reading, b"", reading.position

    def take(self, size: int) -> bytes:
        """The next bytes; fewer at the end of the file."""
        pieces, wanted = [self.held[:size]], size - len(self.held)
        self.held = self.held[size:]
        while wanted > 0 and (data := self.reading.read(max(READ_BYTES, wanted))):
            pieces.append(data[:wanted])
            self.held = data[wanted:]
            wanted -= len(data)
        taken = b"".join(pieces)
        self.position += len(taken)
        return taken

    def skip_to(self, position: int) -> None:
        while self.position < position and self.take(min(READ_BYTES, position - self.position)):
            pass


# --- the two kinds of index -----------------------------------------------------------------------------------------


def _megatron(name: str, index: Bytes) -> Edges:
    """Lengths (i4) and places (i8) of sequences, then for each document the number of its first sequence (i8)."""
    head = index.at(0, MEGATRON.size)
    if not head.startswith(MEGATRON_MAGIC):
        raise Damage(0, f"{name} does not begin with {MEGATRON_MAGIC!r}: not an index of Megatron's")
    if len(head) < MEGATRON.size:
        raise Damage(0, f"{name} ends inside its head: {len(head)} of {MEGATRON.size} bytes")
    _, version, code, sequences, edges = MEGATRON.unpack(head)
    if version != 1 or code not in MEGATRON_TYPES:
        raise Damage(0, f"{name} is of version {version} with ids of type {code}; expected version 1 and whole numbers")
    dtype = np.dtype(MEGATRON_TYPES[code])
    places = MEGATRON.size + 4 * sequences
    firsts = places + 8 * sequences
    if edges < 1 or index.size < firsts + 8 * edges:
        raise Damage(0, f"{name} is truncated: {index.size} bytes, expected {firsts + 8 * edges}")

    def end_of_file() -> int:
        if sequences == 0:
            return 0
        length = _entries(index, places - 4, 1, "<i4")
        return int(_entries(index, firsts - 8, 1, "<i8")[0] + length[0] * dtype.itemsize)

    def read(first: int, count: int) -> npt.NDArray[np.int64]:
        numbers = _entries(index, firsts + 8 * first, count, "<i8")
        if numbers.min() < 0 or numbers.max() > sequences or (np.diff(numbers) < 0).any():
            raise Damage(0, f"{name} is damaged: documents {first} to {first + count - 2} name sequences out of order")
        low, high = int(numbers[0]), int(numbers[-1])
        begins = np.full(count, end_of_file(), np.int64)
        if low < sequences:
            window = _entries(index, places + 8 * low, min(high, sequences - 1) - low + 1, "<i8")
            lengths = _entries(index, MEGATRON.size + 4 * low, len(window), "<i4")
            if (window[:-1] + lengths[:-1] * dtype.itemsize != window[1:]).any():
                raise Damage(int(window[0]), f"{name}: sequences from {low} on are not one behind the other")
            begins[numbers < sequences] = window[numbers[numbers < sequences] - low]
        return begins

    return Edges(edges - 1, dtype, read)


def _datatrove(index: Bytes, reading: Reading) -> Edges:
    """The ends of documents in tokens (u8). The size of an id follows from both files' sizes."""
    documents = index.size // 8
    if index.size % 8:
        raise Damage(0, f"its index is truncated: {index.size} bytes are no multiple of 8")
    tokens = int(_entries(index, index.size - 8, 1, "<i8")[0]) if documents else 0
    if reading.size < 2 * tokens:
        raise Damage(0, f"the file is truncated: {reading.size} bytes, at least {2 * tokens} in its index")
    itemsize = 4 if reading.size > 2 * tokens else 2

    def read(first: int, count: int) -> npt.NDArray[np.int64]:
        if first > 0:
            return _entries(index, 8 * (first - 1), count, "<i8") * itemsize
        return np.concatenate([np.zeros(1, np.int64), _entries(index, 0, count - 1, "<i8") * itemsize])

    return Edges(documents, np.dtype(f"<u{itemsize}"), read)


def _entries(index: Bytes, offset: int, count: int, dtype: str) -> npt.NDArray[np.int64]:
    data = index.at(offset, count * np.dtype(dtype).itemsize)
    return np.frombuffer(data, dtype).astype(np.int64)
