"""Input files: found by pattern or list, read once, hashed while they are read, unpacked member by member.

What one pass over a file has to say (damage, documents set aside) is kept in its `Reading`, so that a reader is a
plain generator of documents.
"""

from __future__ import annotations

import bz2
import codecs
import functools
import glob
import hashlib
import os
import re
import sys
import unicodedata
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from configs import ConfigError

if sys.version_info >= (3, 14):
    from compression import zstd as zstd
else:
    from backports import zstd as zstd

OnDamage = Literal["skip", "stop"]
MAX_DOCUMENT_BYTES = 64 * 2**20  # a larger text is cut into parts or set aside, so that memory stays bounded
READ_BYTES = 256 * 2**10
READ_AHEAD = 8 * 2**20  # asked of a server at once
UNKNOWN_BYTES = 2**30  # what an input of unknown size counts for until it is read
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
    """One file or object of a corpus, as a plan lists it."""

    name: str  # the path or address as the configuration spells it
    size: int | None  # bytes; None: of a listed address, not asked for until it is read
    version: int | str | None  # mtime in ns of a file, ETag of an object; None as with size

    @property
    def bytes(self) -> int:
        """Its size, or a guess."""
        return UNKNOWN_BYTES if self.size is None else self.size


@dataclass(frozen=True)
class Part:
    """What one reader call covers: the whole of an input, or a range of its bytes.

    A range has the lines that begin after its start, up to and with the one that begins at its stop; of other kinds
    of files the documents or row groups that begin in it.
    """

    input: Input
    start: int = 0
    stop: int | None = None  # None: to the end

    @property
    def bytes(self) -> int:
        return (self.input.bytes if self.stop is None else self.stop) - self.start


# --- finding --------------------------------------------------------------------------------------------------------

LISTS = (".paths", ".paths.gz", ".paths.zst")
COMPANIONS = {".bin": ".idx", ".ds": ".ds.index"}  # where the documents of a file of tokens are


def find_inputs(patterns: Sequence[str], suffixes: Sequence[str], base: str | None = None) -> list[Input]:
    """The files and objects that patterns name, each once, sorted by name.

    A folder stands for the files of ours below it, a list (`*.paths`, packed or not) for what it names, relative to
    `base` (None: the list's own folder). Raises ConfigError for a pattern without a file, for a file of a kind that
    the source does not read, and for what cannot be asked for.
    """
    if not patterns:
        raise ConfigError("paths: expected at least one file, folder or pattern")
    found: dict[str, Input] = {}
    addresses: list[str] = []
    for pattern in patterns:
        if pattern.endswith(LISTS):
            names = _checked(_listed(pattern, base), suffixes)
            inputs = [Input(name, None, None) if is_remote(name) else _describe_listed(name, pattern) for name in names]
        elif is_remote(pattern):
            inputs = []
            addresses.append(pattern)
        else:
            names = _checked(_matches(pattern, suffixes), suffixes)
            inputs = [describe(name) for name in names]
            if not inputs:
                raise ConfigError(f"paths: no file matches {pattern!r} (looked from {Path.cwd()})")
        found |= {input.name: input for input in inputs}
    if addresses:
        found |= {input.name: input for input in _find_remote(addresses, suffixes)}
    return [found[name] for name in sorted(found)]


def is_remote(name: str) -> bool:
    """Whether a name is an address: on a web server or in an object store."""
    return name.startswith(("https://", "http://", "s3://"))


def describe(name: str) -> Input:
    """An input as it is now. Raises OSError or InputError when it is not there."""
    if is_remote(name):
        from data_pipeline.sources.remote import describe as asked

        return Input(name, *asked(name))
    status = os.stat(name)  # noqa: PTH116 (a Path would take longer than the question)
    companion = companion_of(name)
    if companion is None:
        return Input(name, status.st_size, status.st_mtime_ns)
    return Input(name, status.st_size, f"{status.st_mtime_ns} {Path(companion).stat().st_mtime_ns}")


def companion_of(name: str) -> str | None:
    """The file beside a file of tokens that says where its documents are; None for other files."""
    ending = next((ending for ending in COMPANIONS if name.endswith(ending)), None)
    return None if ending is None else name.removesuffix(ending) + COMPANIONS[ending]


def _find_remote(addresses: Sequence[str], suffixes: Sequence[str]) -> list[Input]:
    from data_pipeline.sources.remote import find

    try:
        found = [Input(*entry) for entry in find(addresses, tuple(suffixes))]
    except InputError as error:
        raise ConfigError(f"paths: {error}") from None
    _checked([input.name for input in found], suffixes)
    return found


def _describe_listed(name: str, list_: str) -> Input:
    try:
        return describe(name)
    except OSError as error:
        raise ConfigError(f"paths: {list_}: names {name}: {error.strerror}") from None


_LISTED = re.compile(r"(?!/)(?!.*(?:^|/)\.\.?(?:/|$))[^\x00-\x1f\x7f:\\?#]+")  # below the base, and nowhere else


def _listed(list_: str, base: str | None) -> list[str]:
    """The names in a list, each below `base`."""
    where = list_.rpartition("/")[0] if base is None else base.rstrip("/")
    names = []
    try:
        with Reading(Part(describe(list_)), "") as reading:
            for number, (_, line) in enumerate(lines(Content(reading)), 1):
                name = b"-" if line is None else line.removesuffix(b"\r")
                text = name.decode("utf-8", "replace")
                if text and (text == "-" or not _LISTED.fullmatch(text)):
                    raise ConfigError(
                        f"paths: {list_}: line {number}: expected a name below {where}, got {text!r:.100}"
                    )
                names += [f"{where}/{text}" if where else text] if text else []
    except OSError as error:
        raise ConfigError(f"paths: {list_}: {error.strerror}") from None
    except (Damage, InputError) as error:
        raise ConfigError(f"paths: {list_}: {error}") from None
    if not names:
        raise ConfigError(f"paths: {list_}: an empty list")
    return names


def _matches(pattern: str, suffixes: Sequence[str]) -> list[str]:
    if re.match(r"[a-z][a-z0-9+.-]*://", pattern):
        raise ConfigError(f"paths: {pattern}: expected a file, https://, http:// or s3://")
    if Path(pattern).is_dir():
        below = [str(path) for path in Path(pattern).rglob("[!.]*") if path.is_file()]
        return [name for name in below if name.endswith(tuple(suffixes))]
    named = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)  # noqa: PTH207 (may be absolute)
    return [name for name in named if Path(name).is_file()]


def _checked(names: Sequence[str], suffixes: Sequence[str]) -> Sequence[str]:
    for name in names:
        if not name.isprintable() and any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
            raise ConfigError(f"paths: {name!r}: control characters in a file name; rename it")
        if not name.endswith(tuple(suffixes)):
            raise ConfigError(f"paths: {name}: not a kind of file that this source reads ({', '.join(suffixes)})")
    return names


# --- reading --------------------------------------------------------------------------------------------------------


class Bytes(Protocol):
    """A file or object that can be read anywhere."""

    size: int

    def at(self, offset: int, size: int, ahead: int = 0) -> bytes:
        """The bytes at `offset`, fewer than `size` only at the end. `ahead`: how many are likely to be wanted."""
        ...

    def close(self) -> None: ...


class LocalFile:
    """Bytes of a file, by `pread`."""

    def __init__(self, name: str) -> None:
        self.descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self.descriptor).st_size

    def at(self, offset: int, size: int, ahead: int = 0) -> bytes:
        return os.pread(self.descriptor, size, offset)

    def close(self) -> None:
        os.close(self.descriptor)


def open_bytes(input: Input) -> Bytes:
    """Open an input; what is remote is held to the version that the plan has. Raises OSError, InputError."""
    if is_remote(input.name):
        from data_pipeline.sources.remote import RemoteFile

        return RemoteFile(input.name, input.size, None if input.version is None else str(input.version))
    return LocalFile(input.name)


@functools.lru_cache(maxsize=4)  # all slices of a large file have one index
def _hash_of(input: Input) -> bytes:
    """The sha256 of an input's bytes; of a remote one, of its version."""
    digest = hashlib.sha256()
    if is_remote(input.name):
        digest.update(str(input.version).encode())
        return digest.digest()
    with Path(input.name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


@dataclass
class Reading:
    """One pass over one part: its open file, the hash of its bytes, and what was set aside on the way."""

    part: Part
    source: str  # the corpus, for the documents
    on_damage: OnDamage = "skip"
    set_aside: Counter[str] = field(default_factory=Counter)  # reason -> records
    notes: list[str] = field(default_factory=list)
    position: int = 0  # of the next byte in the file
    stop: int = field(init=False)  # of the part, known when it is opened

    def __enter__(self) -> Self:
        self.position = self._hashed = self.part.start
        self._file = open_bytes(self.part.input)
        self.stop = self._file.size if self.part.stop is None else self.part.stop
        self._hash = hashlib.sha256()
        companion = companion_of(self.part.input.name)
        if companion is not None:
            self._hash.update(_hash_of(describe(companion)))
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def bytes_read(self) -> int:
        """Of the part."""
        return min(self.position, self.stop) - self.part.start

    @property
    def size(self) -> int:
        """Of the whole input."""
        return self._file.size

    def read(self, size: int) -> bytes:
        """The next bytes of the file. What lies beyond the part is neither hashed nor counted."""
        data = self._file.at(self.position, size, READ_AHEAD)
        mine = slice(max(0, self._hashed - self.position), max(0, self.stop - self.position))
        self._hash.update(memoryview(data)[mine])
        self.position += len(data)
        self._hashed = max(self._hashed, self.position)
        return data

    def go_to(self, offset: int) -> None:
        """Read on from there: further on, or once more."""
        while self.position < offset and self.read(min(READ_BYTES, offset - self.position)):
            pass
        self.position = min(self.position, offset)

    def at(self, offset: int, size: int) -> bytes:
        """Bytes anywhere in the file, by the way: neither hashed nor counted."""
        return self._file.at(offset, size)

    def finish(self) -> str:
        """Read what the reader left, and give the sha256 (hex) of the part's bytes."""
        while self.position < self.stop and self.read(READ_BYTES):
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
    """The content of one gzip or bzip2 member or zstd frame of a file, or of a whole unpacked file.

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
        except (zlib.error, OSError, ValueError, zstd.ZstdError) as error:
            raise Damage(self.offset, f"not valid {self.packing} ({error})") from None
        self.input = self.codec.unconsumed_tail if self.packing == "gzip" else b""  # the others keep their own
        return data


Packing = Literal["gzip", "bzip2", "zstd"]
_CODECS: dict[Packing, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(wbits=31),
    "bzip2": bz2.BZ2Decompressor,
    "zstd": zstd.ZstdDecompressor,
}
MAGIC: dict[Packing, re.Pattern[bytes]] = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),  # a first block, or the end of an empty stream
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # a frame, or one to be skipped
}
_ENDINGS: dict[str, Packing] = {".gz": "gzip", ".tgz": "gzip", ".bz2": "bzip2", ".zst": "zstd"}


def members(reading: Reading) -> Iterator[Member]:
    """The packed members of a file, one after the other; a file that is not packed is one member."""
    name = reading.part.input.name
    head = reading.read(READ_BYTES)
    if reading.part.start > 0:  # a range of a file that is not packed
        yield Member(reading, None, head)
        return
    packing = next((kind for kind, magic in MAGIC.items() if magic.match(head)), None)
    expected = next((kind for ending, kind in _ENDINGS.items() if name.endswith(ending)), None)
    if expected is not None and packing != expected:
        raise Damage(0, f"not a {expected} file" if head else "empty file")
    while head:
        member = Member(reading, packing, head)
        yield member
        head = member.rest() or (reading.read(READ_BYTES) if packing is not None else b"")


def next_member(reading: Reading, after: int, opening: bytes) -> int | None:
    """Where the next packed member begins whose content begins with `opening`, behind the byte `after`."""
    packing = next((kind for kind, magic in MAGIC.items() if magic.match(reading.at(0, 16))), None)
    needed = 2048 if packing == "gzip" else READ_BYTES  # to unpack its first bytes; the others unpack block by block
    at = after + 1
    while packing is not None and len(data := reading.at(at, READ_BYTES)) >= 4:
        for mark in MAGIC[packing].finditer(data):
            begin = data[mark.start() : mark.start() + needed]
            if len(begin) < needed:
                begin = reading.at(at + mark.start(), needed)
            if _opens(packing, begin, opening):
                return at + mark.start()
        at += len(data) - 3
    return None


def _opens(packing: Packing, data: bytes, opening: bytes) -> bool:
    try:
        return bool(_CODECS[packing]().decompress(data, len(opening)) == opening)
    except (zlib.error, OSError, ValueError, zstd.ZstdError):
        return False


class Content:
    """The content of a file, all its members end to end. `read` as in Member."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.position = 0  # in the content
        self._members = members(reading)
        self._member: Member | None = None
        self._begun: deque[tuple[int, int]] = deque(maxlen=4096)  # (position, file offset) of recent members
        self._plain_from: int | None = None  # the file offset of what is not packed

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
            self._plain_from = self._member.offset if self._member.packing is None else None

    def offset(self, position: int) -> int:
        """The byte of the file where the content at `position` lies; in a packed file, where its member begins."""
        if self._plain_from is not None:
            return self._plain_from + position
        return next((offset for begin, offset in reversed(self._begun) if begin <= position), 0)


class Readable(Protocol):
    def read(self, size: int = ..., /) -> bytes: ...


def lines(stream: Readable, limit: int = MAX_DOCUMENT_BYTES) -> Iterator[tuple[int, bytes | None]]:
    """(position, line without its newline) for each line; None for one of more than `limit` bytes."""
    position, begun, pending, lost = 0, list[bytes](), 0, 0  # begun: pieces of the open line, `pending` bytes together
    while data := stream.read(READ_BYTES):
        at = 0
        while (end := data.find(b"\n", at)) >= 0:  # split() would look at byte after byte
            if begun or lost:
                begun.append(data[:end])
                pending += end
                yield position, None if lost or pending > limit else b"".join(begun)
                position += lost + pending + 1
                begun, pending, lost = [], 0, 0
            else:
                yield position, data[at:end] if end - at <= limit else None
                position += end - at + 1
            at = end + 1
        if at < len(data):
            begun.append(data[at:])
            pending += len(data) - at
        if lost or pending > limit:  # lost: bytes of the open line that were let go
            lost += pending
            begun, pending = [], 0
    if pending or lost:
        yield position, None if lost else b"".join(begun)


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
