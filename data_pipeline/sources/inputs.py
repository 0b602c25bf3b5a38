"""Input files: found by pattern, read once, hashed while they are read, unpacked member by member.

What one pass over a file has to say (damage, documents set aside) is kept in its `Reading`, so that a reader is a
plain generator of documents.
"""

from __future__ import annotations

import bz2
import codecs
import glob
import hashlib
import re
import unicodedata
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

from configs import ConfigError

OnDamage = Literal["skip", "stop"]
MAX_DOCUMENT_BYTES = 64 * 2**20  # a larger text is cut into parts or set aside, so that memory stays bounded
READ_BYTES = 256 * 2**10
MAX_NOTES = 20  # lines kept per slice for a person to read; all are counted


class Damage(Exception):
    """Input that cannot be read on from `offset` (a byte of the file)."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"byte {offset}: {reason}")
        self.offset, self.reason = offset, reason


class InputError(Exception):
    """An input that stops the work: damaged under `on_damage: stop`, or changed since it was planned. One line."""


def is_content_error(error: BaseException) -> bool:
    """Whether what went wrong lies in one document (set it aside) and not in the machine (stop)."""
    if isinstance(error, OSError):
        return error.errno is None  # libraries for packed content raise it so
    if isinstance(error, MemoryError | Damage | InputError):
        return False
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"  # of a library written in Rust


@dataclass(frozen=True)
class Input:
    """One file of a corpus, as a plan lists it."""

    name: str  # the path as the configuration spells it
    size: int  # bytes
    mtime_ns: int


@dataclass(frozen=True)
class Part:
    """What one reader call covers: the whole of an input, or a range of its bytes.

    A range has the lines that begin after its start, up to and with the one that begins at its stop.
    """

    input: Input
    start: int = 0
    stop: int | None = None  # None: to the end

    @property
    def bytes(self) -> int:
        return (self.input.size if self.stop is None else self.stop) - self.start


def find_inputs(patterns: Sequence[str], suffixes: Sequence[str]) -> list[Input]:
    """The files that patterns name, each once, sorted by name. A folder stands for the files of ours below it.

    Raises ConfigError for a pattern without a file, and for a file of a kind that the source does not read.
    """
    if not patterns:
        raise ConfigError("paths: expected at least one file, folder or pattern")
    names: set[str] = set()
    for pattern in patterns:
        found = _matches(pattern, suffixes)
        if not found:
            raise ConfigError(f"paths: no file matches {pattern!r} (looked from {Path.cwd()})")
        names.update(found)
    return [describe(name) for name in sorted(names)]


def describe(name: str) -> Input:
    """An input as it is now. Raises OSError when it is not there."""
    status = Path(name).stat()
    return Input(name, status.st_size, status.st_mtime_ns)


def _matches(pattern: str, suffixes: Sequence[str]) -> list[str]:
    if Path(pattern).is_dir():
        below = [str(path) for path in Path(pattern).rglob("[!.]*") if path.is_file()]
        return [_checked(name, suffixes) for name in below if name.endswith(tuple(suffixes))]
    named = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)  # noqa: PTH207 (may be absolute)
    return [_checked(name, suffixes) for name in named if Path(name).is_file()]


def _checked(name: str, suffixes: Sequence[str]) -> str:
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
        raise ConfigError(f"paths: {name!r}: control characters in a file name; rename it")
    if not name.endswith(tuple(suffixes)):
        raise ConfigError(f"paths: {name}: not a kind of file that this source reads ({', '.join(suffixes)})")
    return name


@dataclass
class Reading:
    """One pass over one part: its open file, the hash of its bytes, and what was set aside on the way."""

    part: Part
    source: str  # the corpus, for the documents
    on_damage: OnDamage = "skip"
    set_aside: Counter[str] = field(default_factory=Counter)  # reason -> records
    notes: list[str] = field(default_factory=list)
    position: int = 0  # of the next byte in the file

    def __enter__(self) -> Reading:
        self.position = self.part.start
        self._hash = hashlib.sha256()
        self._file: BinaryIO = Path(self.part.input.name).open("rb")
        self._file.seek(self.position)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def bytes_read(self) -> int:
        """Of the part."""
        return min(self.position - self.part.start, self.part.bytes)

    def read(self, size: int) -> bytes:
        """The next bytes of the file. What lies beyond the part is neither hashed nor counted."""
        data = self._file.read(size)
        mine = max(0, self.part.start + self.part.bytes - self.position)
        self._hash.update(data if mine >= len(data) else data[:mine])
        self.position += len(data)
        return data

    def finish(self) -> str:
        """Read what the reader left, and give the sha256 (hex) of the part's bytes."""
        while self.bytes_read < self.part.bytes and self.read(READ_BYTES):
            pass
        return self._hash.hexdigest()

    def put_aside(self, reason: str, where: str) -> None:
        """Count a record that gives no document, and note where the first ones are."""
        self.set_aside[reason] += 1
        self.note(f"{self.part.input.name}: {where}: {reason}")

    def damaged(self, damage: Damage, reason: str = "damaged input", kept: str = "what comes before") -> None:
        """Count that something cannot be read (else: all that comes after); under `on_damage: stop`
        raise InputError."""
        line = f"{self.part.input.name}: damaged at byte {damage.offset}: {damage.reason}"
        if self.on_damage == "stop":
            raise InputError(f"{line}; get the file again, or set on_damage: skip to keep {kept}")
        self.set_aside[reason] += 1
        self.note(f"{line}; {kept} is kept")

    def note(self, line: str) -> None:
        if len(self.notes) < MAX_NOTES:
            self.notes.append(line)


class Member:
    """The content of one gzip or bzip2 member of a file, or of a whole unpacked file.

    `read` gives what there is (only b"" is the end), and raises Damage after all that comes before it was given.
    """

    def __init__(self, reading: Reading, packing: Packing | None, head: bytes) -> None:
        self.reading, self.packing, self.input = reading, packing, head
        self.offset = reading.position - len(head)  # of its first byte in the file
        self.codec: Any = None if packing is None else _CODECS[packing]()

    def read(self, size: int = READ_BYTES) -> bytes:
        if self.codec is None:
            data = self.input[:size] or self.reading.read(size)
            self.input = self.input[size:]
            return data
        while not self.codec.eof:
            hungry = not self.input and (self.packing == "gzip" or self.codec.needs_input)
            if hungry:
                self.input = self.reading.read(READ_BYTES)
            over = hungry and not self.input
            if data := self._unpack(size):
                return data
            if over and not self.codec.eof:
                raise Damage(self.offset, f"the file ends inside this {self.packing} member")
        return b""

    def rest(self) -> bytes:
        """What was read from the file beyond this member, after passing over what is left of it."""
        while self.read():
            pass
        rest: bytes = b"" if self.codec is None else self.codec.unused_data
        return rest.lstrip(b"\0") if self.packing == "gzip" else rest  # gzip files may be padded with zeros

    def _unpack(self, size: int) -> bytes:
        try:
            data: bytes = self.codec.decompress(self.input, size)
        except (zlib.error, OSError, ValueError) as error:
            raise Damage(self.offset, f"not valid {self.packing} ({error})") from None
        self.input = self.codec.unconsumed_tail if self.packing == "gzip" else b""  # bzip2 keeps its own
        return data


Packing = Literal["gzip", "bzip2"]
_CODECS: dict[Packing, Callable[[], Any]] = {"gzip": lambda: zlib.decompressobj(wbits=31), "bzip2": bz2.BZ2Decompressor}
_MAGIC: dict[Packing, re.Pattern[bytes]] = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),  # a first block, or the end of an empty stream
}
_ENDINGS: dict[str, Packing] = {".gz": "gzip", ".tgz": "gzip", ".bz2": "bzip2"}


def members(reading: Reading) -> Iterator[Member]:
    """The packed members of a file, one after the other; a file that is not packed is one member."""
    name = reading.part.input.name
    head = reading.read(READ_BYTES)
    if reading.part.start > 0:  # a range of a file that is not packed
        yield Member(reading, None, head)
        return
    packing = next((kind for kind, magic in _MAGIC.items() if magic.match(head)), None)
    expected = next((kind for ending, kind in _ENDINGS.items() if name.endswith(ending)), None)
    if expected is not None and packing != expected:
        raise Damage(0, f"not a {expected} file" if head else "empty file")
    while head:
        member = Member(reading, packing, head)
        yield member
        head = member.rest() or (reading.read(READ_BYTES) if packing is not None else b"")


class Content:
    """The content of a file, all its members end to end. `read` as in Member."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.position = 0  # in the content
        self._members = members(reading)
        self._member: Member | None = None
        self._begun: deque[tuple[int, int]] = deque(maxlen=4096)  # (position, file offset) of recent members

    def read(self, size: int = READ_BYTES) -> bytes:
        while True:
            data = b"" if self._member is None else self._member.read(size)
            if data:
                self.position += len(data)
                return data
            self._member = next(self._members, None)
            if self._member is None:
                return b""
            self._begun.append((self.position, self._member.offset))

    def offset(self, position: int) -> int:
        """The byte of the file where the content at `position` lies; in a packed file, where its member begins."""
        begin, offset = next((pair for pair in reversed(self._begun) if pair[0] <= position), (position, 0))
        packed = self._member is not None and self._member.packing is not None
        return offset if packed else offset + position - begin


class Readable(Protocol):
    def read(self, size: int = ..., /) -> bytes: ...


def lines(stream: Readable, limit: int = MAX_DOCUMENT_BYTES) -> Iterator[tuple[int, bytes | None]]:
    """(position, line without its newline) for each line; None for one of more than `limit` bytes."""
    position, pending, lost = 0, b"", 0  # lost: bytes of the current line that were let go
    while data := stream.read(READ_BYTES):
        *whole, pending = (pending + data).split(b"\n")
        for line in whole:
            yield position, None if lost or len(line) > limit else line
            position += lost + len(line) + 1
            lost = 0
        if lost or len(pending) > limit:
            lost += len(pending)
            pending = b""
    if pending or lost:
        yield position, None if lost else pending


def texts(stream: Readable, limit: int = MAX_DOCUMENT_BYTES) -> Iterator[tuple[int, bytes]]:
    """(position, bytes) of a text: the whole, or parts of at most `limit` bytes that end with a line where they can."""
    position, pending = 0, bytearray()
    while data := stream.read(READ_BYTES):
        pending += data
        while len(pending) > limit:
            end = pending.rfind(b"\n", 0, limit) + 1 or pending.rfind(b" ", 0, limit) + 1 or limit
            yield position, bytes(pending[:end])
            position += end
            del pending[:end]
    if pending:
        yield position, bytes(pending)


def decoded(data: bytes) -> str:
    """Text from bytes that should be UTF-8: with its mark removed, else read as Windows-1252, which old texts are."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return data.decode("utf-16", "replace")
        mostly_utf8 = data.decode("utf-8", "replace")
        legacy = data.decode("cp1252", "replace")
        return mostly_utf8 if mostly_utf8.count("\ufffd") * 20 < sum(byte > 127 for byte in data) else legacy
