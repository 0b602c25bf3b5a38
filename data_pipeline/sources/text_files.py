"""Text files: `.txt` (a file is a document) and `.jsonl` (a line is a document), each also gzipped or bzip2ed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from configs import Section
from data_pipeline.document import Document
from data_pipeline.sources.inputs import (
    MAX_DOCUMENT_BYTES,
    READ_BYTES,
    Content,
    Damage,
    Input,
    OnDamage,
    Part,
    Reading,
    decoded,
    find_inputs,
    lines,
    texts,
)

SUFFIXES = tuple(f"{kind}{packing}" for kind in (".txt", ".jsonl") for packing in ("", ".gz", ".bz2"))


class TextFiles(Section):
    """Files, folders or patterns of `.txt` and `.jsonl`, plain, `.gz` or `.bz2`."""

    kind: Literal["text_files"] = "text_files"
    paths: list[str]
    text_field: str = "text"  # of a JSON line
    id_field: str | None = None  # of a JSON line; None: the file's name and the line's byte are the id
    uri_field: str | None = None
    on_damage: OnDamage = "skip"  # also for a line that is not what it should be

    version: ClassVar[int] = 1  # raised when the same file would give other text

    def inputs(self) -> list[Input]:
        """The files, sorted by name. Raises ConfigError where a path leads to none."""
        return find_inputs(self.paths, SUFFIXES)

    def can_split(self, input: Input) -> bool:
        """Whether ranges of its bytes can be read by themselves."""
        return input.name.endswith(".jsonl")

    def text_bytes(self, input: Input) -> float:
        """About how many bytes of text an input gives."""
        return input.bytes * (2.7 if input.name.endswith((".gz", ".bz2")) else 0.95)

    def read(self, reading: Reading) -> Iterator[Document]:
        """The documents of a file, or those whose lines begin in the part's range of it."""
        try:
            if ".jsonl" in Path(reading.part.input.name).suffixes:
                yield from self._read_lines(reading)
            else:
                yield from _read_text(reading)
        except Damage as damage:
            reading.damaged(damage)

    def _read_lines(self, reading: Reading) -> Iterator[Document]:
        part, content = reading.part, Content(reading)
        for number, (position, line) in enumerate(lines(content), 1):
            if part.start > 0 and number == 1:
                continue  # the range before reads the line on which this one begins
            if part.stop is not None and part.start + position > part.stop:
                return
            if line is not None and not line.strip():
                continue
            try:
                yield self._document(line, part.start + position, content.offset(position), reading)
            except ValueError as error:
                where = f"line {number + _lines_before(part)}"
                if self.on_damage == "stop":
                    raise Damage(part.start + position, f"{where}: {error}") from None
                reading.put_aside(str(error), where)

    def _document(self, line: bytes | None, place: int, offset: int, reading: Reading) -> Document:
        """Of one line. `place` is its byte in the content, `offset` in the file. Raises ValueError."""
        if line is None:
            raise ValueError(f"a line of more than {MAX_DOCUMENT_BYTES} bytes")
        row = _json_object(line)
        name = reading.part.input.name
        return Document(
            text=_string(row, self.text_field),
            id=f"{name}:{place}" if self.id_field is None else _string(row, self.id_field, or_number=True),
            source=reading.source,
            uri=name if self.uri_field is None else _string(row, self.uri_field),
            meta={"input": name, "offset": offset},
        )


def _json_object(line: bytes) -> dict[str, Any]:
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
    if field not in row:
        raise ValueError(f"no field {field!r}")
    value = row[field]
    if isinstance(value, str) or (or_number and type(value) is int):
        return str(value)
    raise ValueError(f"field {field!r}: expected text, got {type(value).__name__}")


def _lines_before(part: Part) -> int:
    """How many lines end before the part: read anew, for messages only."""
    count, left = 0, part.start
    with Path(part.input.name).open("rb") as file:
        while left > 0 and (data := file.read(min(READ_BYTES, left))):
            count += data.count(b"\n")
            left -= len(data)
    return count


def _read_text(reading: Reading) -> Iterator[Document]:
    """One document, or several where the file is larger than a document may be."""
    name, content = reading.part.input.name, Content(reading)
    for position, data in texts(content):
        meta: dict[str, str | int] = {"input": name, "offset": content.offset(position)}
        yield Document(decoded(data), name if position == 0 else f"{name}:{position}", reading.source, name, meta)
