"""Text files: `.txt` (a file is a document), `.jsonl` (a line is a document), `.parquet` (a row is a document)."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import orjson

from data_pipeline.document import Document
from data_pipeline.sources.inputs import (
    MAX_DOCUMENT_BYTES,
    READ_AHEAD,
    READ_BYTES,
    Content,
    Damage,
    Input,
    InputError,
    OnDamage,
    Part,
    Reading,
    decoded,
    find_inputs,
    is_content_error,
    lines,
    open_bytes,
    texts,
)
from data_pipeline.sources.notes import Noted

PACKINGS = ("", ".gz", ".bz2", ".zst")
JSON_LINES = tuple(f".jsonl{packing}" for packing in PACKINGS)
PARQUET = ".parquet"
SUFFIXES = (*(f".txt{packing}" for packing in PACKINGS), *JSON_LINES, PARQUET)
BATCH_BYTES = 16 * 2**20  # of texts out of a Parquet file at once, about
BATCH_ROWS = 4096


class TextFiles(Noted):
    """Files, folders, patterns, addresses or lists of `.txt`, `.jsonl` (both also packed) and `.parquet`."""

    kind: Literal["text_files"] = "text_files"
    paths: list[str]
    base: str | None = None  # what names in a list (`*.paths`) are relative to; None: the list's own folder
    text_field: str = "text"  # of a JSON line, or a Parquet column
    id_field: str | None = None  # None: the file's name and the line's byte, or the row's number, are the id
    uri_field: str | None = None
    on_damage: OnDamage = "skip"  # also for a line that is not what it should be

    version: ClassVar[int] = 2  # raised when the same file would give other text

    def inputs(self) -> list[Input]:
        """The files, sorted by name. Raises ConfigError where a path leads to none."""
        return find_inputs(self.paths, SUFFIXES, self.base)

    def can_split(self, input: Input) -> bool:
        """Whether ranges of its bytes can be read by themselves."""
        return input.name.endswith((".jsonl", PARQUET))

    def text_bytes(self, input: Input) -> float:
        """About how many bytes of text an input gives."""
        return input.bytes * (0.95 if input.name.endswith((".txt", ".jsonl")) else 2.7)

    def read(self, reading: Reading) -> Iterator[Document]:
        """The documents of a file, or those that begin in the part's range of it."""
        name = reading.part.input.name
        try:
            if name.endswith(JSON_LINES):
                yield from self._read_lines(reading)
            elif name.endswith(PARQUET):
                yield from self._read_rows(reading)
            else:
                yield from _read_text(reading)
        except Damage as damage:
            reading.damaged(damage)

    def _read_lines(self, reading: Reading) -> Iterator[Document]:
        part, content = reading.part, Content(reading)
        fields = [_Field(field) for field in (self.text_field, self.id_field, self.uri_field) if field is not None]
        number = 0
        for position, line in lines(content):
            number += 1
            if part.start > 0 and number == 1:
                continue  # the range before reads the line on which this one begins
            place = part.start + position
            if part.stop is not None and place > part.stop:
                return
            try:
                row = _parsed(line, fields)
                if row is not None:
                    yield self._document(row, place, content.offset(position), reading)
            except ValueError as error:
                where = f"line {number + _lines_before(part)}"
                if self.on_damage == "stop":
                    raise Damage(place, f"{where}: {error}") from None
                reading.put_aside(str(error), where)

    def _document(self, row: dict[str, Any], place: int, offset: int, reading: Reading) -> Document:
        """Of a line or row: `place` is its byte in the content, or its number. Raises ValueError."""
        name = reading.part.input.name
        return Document(
            _string(row, self.text_field),
            f"{name}:{place}" if self.id_field is None else _string(row, self.id_field, or_number=True),
            reading.source,
            name if self.uri_field is None else _string(row, self.uri_field),
            {"input": name, "offset": offset},
        )

    def _read_rows(self, reading: Reading) -> Iterator[Document]:
        """The rows of the row groups that begin in the part; one that is damaged is passed over."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(pa.PythonFile(_Handle(reading), mode="r"), pre_buffer=False, buffer_size=READ_BYTES)
        except Exception as error:
            raise _not_parquet(0, error) from error
        wanted = {field for field in (self.text_field, self.id_field, self.uri_field) if field is not None}
        if missing := wanted - set(file.schema_arrow.names):
            raise InputError(
                f"{reading.part.input.name}: no column {min(missing)!r}; it has {', '.join(file.schema_arrow.names)}"
            )
        number = 0
        for group in range(file.metadata.num_row_groups):
            about = file.metadata.row_group(group)
            begin = min(_begin(about.column(i)) for i in range(about.num_columns))
            if reading.part.start <= begin < reading.stop:
                rows = max(1, min(BATCH_ROWS, BATCH_BYTES * about.num_rows // max(about.total_byte_size, 1)))
                batches = file.iter_batches(rows, [group], sorted(wanted), use_threads=False)
                try:
                    for place, row in enumerate(_rows(batches), number):
                        try:
                            yield self._document(row, place, begin, reading)
                        except ValueError as error:
                            if self.on_damage == "stop":
                                raise Damage(begin, f"row {place}: {error}") from None
                            reading.put_aside(str(error), f"row {place}")
                except (pa.ArrowException, OSError) as error:
                    reading.damaged(_not_parquet(begin, error), "damaged row group", "the rest")
            number += about.num_rows


# --- a line of JSON -------------------------------------------------------------------------------------------------


class _Field:
    """A field that is read: its name as JSON, alone and before a colon."""

    def __init__(self, name: str) -> None:
        self.name = orjson.dumps(name)
        self.key = re.compile(re.escape(self.name) + rb"\s*:")

    def is_once(self, line: bytes) -> bool:
        """Whether a JSON line cannot have the field twice (unless one is spelled with escapes)."""
        first = line.find(self.name)
        again = first >= 0 and line.find(self.name, first + 1) >= 0
        return first >= 0 and (not again or len(self.key.findall(line)) == 1)


def _parsed(line: bytes | None, fields: list[_Field]) -> dict[str, Any] | None:
    """The object of a line, None for an empty line. Raises ValueError, which says what is wrong with it."""
    if line is None:
        raise ValueError(f"a line of more than {MAX_DOCUMENT_BYTES} bytes")
    try:
        row = orjson.loads(line)
    except ValueError:
        return _explained(line) if line.strip() else None
    if type(row) is dict and all(field.is_once(line) for field in fields):
        return row
    return _explained(line)


def _explained(line: bytes) -> dict[str, Any]:
    """As `json` has it, which is slower, takes NaN and a byte order mark, and tells what it does not take."""
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_each_once)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from None
    except RecursionError:
        raise ValueError("not JSON (nested too deep)") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    return row


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError("a key given twice")
    return row


def _string(row: dict[str, Any], field: str, or_number: bool = False) -> str:
    value = row.get(field)
    if type(value) is str:
        return value
    if field not in row:
        raise ValueError(f"no field {field!r}")
    if or_number and type(value) is int:
        return str(value)
    raise ValueError(f"field {field!r}: expected text, got {type(value).__name__}")


def _lines_before(part: Part) -> int:
    """How many lines end before the part: read anew, for messages only."""
    count, position, file = 0, 0, open_bytes(part.input)
    while data := file.at(position, min(READ_BYTES, part.start - position), READ_AHEAD):
        count += data.count(b"\n")
        position += len(data)
    file.close()
    return count


# --- Parquet --------------------------------------------------------------------------------------------------------


class _Handle(io.RawIOBase):
    """A reading as a file that pyarrow can seek in."""

    def __init__(self, reading: Reading) -> None:
        self.reading, self.position = reading, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.reading.size)[whence]
        return self.position

    def read(self, size: int = -1) -> bytes:
        data = self.reading.at(self.position, self.reading.size - self.position if size < 0 else size)
        self.position += len(data)
        return data


def _begin(column: Any) -> int:
    """The first byte of a column chunk."""
    return int(min(filter(None, (column.dictionary_page_offset, column.data_page_offset))))


def _rows(batches: Iterator[Any]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        yield from batch.to_pylist()


def _not_parquet(offset: int, error: Exception) -> Damage:
    if not is_content_error(error):
        raise error
    return Damage(offset, f"not whole Parquet ({' '.join(str(error).split())[:100]})")


# --- a text ---------------------------------------------------------------------------------------------------------


def _read_text(reading: Reading) -> Iterator[Document]:
    """One document, or several where the file is larger than a document may be."""
    name, content = reading.part.input.name, Content(reading)
    for position, data in texts(content):
        meta: dict[str, str | int] = {"input": name, "offset": content.offset(position)}
        yield Document(decoded(data), name if position == 0 else f"{name}:{position}", reading.source, name, meta)
