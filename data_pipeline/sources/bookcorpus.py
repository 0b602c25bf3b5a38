"""BookCorpus: books as plain text, in a folder or in a tar that is streamed and never extracted.

    Zhu et al. 2015, "Aligning Books and Movies", section 3 (arXiv:1506.06724): free books, one sentence per line;
    Radford et al. 2018 (GPT-1), section 4.1: long stretches of contiguous text.

What is around and upon the text of a book goes: licence texts before and after it, the title block, rules, marks of
emphasis, line ends inside of paragraphs. A text of one sentence per line (as in books_large_p1.txt) stays so.
"""

from __future__ import annotations

import re
import statistics
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, Any, ClassVar, Literal, cast

from configs import Bool
from data_pipeline.document import Document
from data_pipeline.sources.inputs import (
    MAX_DOCUMENT_BYTES,
    Content,
    Damage,
    Input,
    OnDamage,
    Reading,
    decoded,
    find_inputs,
    texts,
)
from data_pipeline.sources.notes import Noted

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2")


class BookCorpus(Noted):
    """Books: files, folders or patterns of `.txt` (also packed), or of tars of `.txt`."""

    kind: Literal["bookcorpus"] = "bookcorpus"
    paths: list[str]
    one_sentence_per_line: Bool = True  # else one paragraph per line
    on_damage: OnDamage = "skip"

    version: ClassVar[int] = 1  # raised when the same file would give other text

    def inputs(self) -> list[Input]:
        """The files, sorted by name. Raises ConfigError where a path leads to none."""
        return find_inputs(self.paths, (".txt", ".txt.gz", ".txt.bz2", ".txt.zst", *TARS))

    def can_split(self, input: Input) -> bool:
        """Whether ranges of its bytes can be read by themselves."""
        return False

    def text_bytes(self, input: Input) -> float:
        """About how many bytes of text an input gives."""
        return input.bytes * (1.0 if input.name.endswith((".txt", ".tar")) else 2.6)

    def read(self, reading: Reading) -> Iterator[Document]:
        """The books of a file, in its order."""
        try:
            if reading.part.input.name.endswith(TARS):
                yield from self._read_tar(reading)
            else:
                content = Content(reading)
                for position, data in texts(content):
                    yield self._book(data, reading.part.input.name, position, content.offset(position), reading)
        except Damage as damage:
            reading.damaged(damage)

    def _read_tar(self, reading: Reading) -> Iterator[Document]:
        """Each `.txt` of a tar as it streams by; its name is only a name."""
        content = Content(reading)
        stream = _Blocks(content)
        try:
            with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|", bufsize=tarfile.BLOCKSIZE) as tar:
                for member in tar:
                    if not member.isreg() or member.issparse() or PurePosixPath(member.name).suffix != ".txt":
                        continue
                    if member.size > MAX_DOCUMENT_BYTES * 64:
                        reading.put_aside("book too large", member.name)
                        continue
                    file = tar.extractfile(member)
                    assert file is not None
                    offset = content.offset(member.offset_data)
                    for position, data in texts(cast(Any, file)):
                        yield self._book(data, member.name, position, offset, reading)
        except tarfile.TarError as error:
            raise Damage(content.offset(content.position), f"not a whole tar ({error})") from None
        if not stream.ends_as_a_tar():
            raise Damage(content.offset(content.position), "the tar ends early")

    def _book(self, data: bytes, name: str, position: int, offset: int, reading: Reading) -> Document:
        book = decoded(data)
        lines, title = paragraphs(book)
        if self.one_sentence_per_line:
            lines = [sentence for line in lines for sentence in sentences(line)]
        meta: dict[str, str | int] = {"input": reading.part.input.name, "offset": offset}
        meta |= {"title": title} if title else {}
        id = name if position == 0 else f"{name}:{position}"
        return Document("\n".join(lines), id, reading.source, reading.part.input.name, meta)


class _Blocks:
    """A tar's stream as tarfile wants it, which takes a cut-off header for the end: so it must be looked at after."""

    def __init__(self, content: Content) -> None:
        self.content, self.pending, self.last = content, b"", b""

    def read(self, size: int) -> bytes:
        while len(self.pending) < size and (data := self.content.read()):
            self.pending += data
        self.last, self.pending = self.pending[:size], self.pending[size:]
        return self.last

    def ends_as_a_tar(self) -> bool:
        """After tarfile has stopped: it stopped at a block of zeros, and nothing but zeros follows."""
        zeros = len(self.last) == tarfile.BLOCKSIZE and not self.last.strip(b"\0")
        while data := self.pending or self.content.read():
            zeros, self.pending = zeros and not data.strip(b"\0"), b""
        return zeros


# --- a book's text --------------------------------------------------------------------------------------------------

_LICENCE_START = re.compile(r"^\W*START OF (?:THE|THIS) PROJECT GUTENBERG.*$", re.MULTILINE | re.IGNORECASE)
_LICENCE_END = re.compile(r"^\W*END OF (?:THE|THIS) PROJECT GUTENBERG.*$", re.MULTILINE | re.IGNORECASE)
_TITLE_LINE = re.compile(
    r"\W*(?P<key>title|author|year|language|translator|editor|illustrator|publisher|release date|character set encoding"
    r"|posting date|produced by|credits|isbn|source)\s*:\s*(?P<value>.*?)\s*",
    re.IGNORECASE,
)
_RULE = re.compile(r"\s*(?:[-=_~#•·—–]{3,}|[*•·](?:\s*[*•·]){2,})\s*")
_HEADING = re.compile(r"#{1,6}\s+(.*?)\s*#*")
_LINE_ENDS_SENTENCE = re.compile(r"[.!?…][\"'”’)\]]*$")
_EMPHASIS = [
    re.compile(r"(?<![\w*])\*\*(?=\S)([^*\n]+?)(?<=\S)\*\*(?![\w*])"),
    re.compile(r"(?<![\w*])\*(?=\S)([^*]+?)(?<=\S)\*(?![\w*])"),
    re.compile(r"(?<!\w)_(?=\S)([^_]+?)(?<=\S)_(?!_)"),
]


def paragraphs(book: str) -> tuple[list[str], str]:
    """(paragraphs, title) of a book: each paragraph, heading and line of verse is one line."""
    text = book.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n\n")
    text = _inside_licence(text)
    text, title = _after_title_block(text)
    blocks = [[line.rstrip() for line in block.split("\n") if line.strip()] for block in re.split(r"\n\s*\n", text)]
    width = _wrapped_at(blocks)
    found: list[str] = []
    for block in blocks:
        kept = [_HEADING.sub(r"\1", line) if _HEADING.fullmatch(line) else line for line in block]
        kept = _plain("\n".join(line for line in kept if not _RULE.fullmatch(line))).split("\n")
        found += [" ".join(line.split()) for line in _joined(kept, width)]
    return [line for line in found if line], title


def _inside_licence(text: str) -> str:
    start = _LICENCE_START.search(text)
    ends = [end.start() for end in _LICENCE_END.finditer(text) if end.start() > len(text) // 2]
    return text[start.end() if start else 0 : ends[0] if ends else len(text)]


def _after_title_block(text: str) -> tuple[str, str]:
    """(the rest, title): passes over `Title: …`, `## Author: …` and the like at the top."""
    title, at = "", 0
    for line in text.split("\n")[:60]:
        found = _TITLE_LINE.fullmatch(line)
        if found is not None and found["key"].lower() == "title":
            title = title or found["value"]
        elif found is None and line.strip() and not _RULE.fullmatch(line):
            break
        at += len(line) + 1
    return text[at:], title


def _wrapped_at(blocks: list[list[str]]) -> int | None:
    """The width at which a book's lines were broken, or None for a book whose lines are whole paragraphs."""
    inner = [len(line) for block in blocks for line in block[:-1]]
    ended = sum(bool(_LINE_ENDS_SENTENCE.search(line)) for block in blocks for line in block[:-1])
    whole = sum(len(block) == 1 for block in blocks)
    if len(inner) < 8 or len(inner) < whole / 2 or ended > len(inner) / 2:
        return None
    width = statistics.quantiles(inner, n=20)[18]
    return int(width) if 30 <= width <= 120 and statistics.median(inner) > width * 0.6 else None


def _joined(block: list[str], width: int | None) -> list[str]:
    """The lines of a block: one where it is a broken paragraph, as they are where it is verse or was never broken."""
    if width is None or len(block) < 2:
        return block
    broken = sum(len(line.strip()) > width * 0.7 for line in block[:-1])
    if broken * 2 < len(block) - 1:
        return block
    text = block[0]
    for line in block[1:]:
        text += line.lstrip() if text.endswith(("—", "--")) else f" {line.lstrip()}"
    return [text]


def _plain(text: str) -> str:
    for emphasis in _EMPHASIS:
        text = emphasis.sub(r"\1", text)
    return text


# --- sentences ------------------------------------------------------------------------------------------------------

_END = re.compile(
    r"(?<![.!?…])(?P<mark>[.!?…]++)(?P<close>[\"'”’»)\]]*)\s+(?=(?P<open>[\"'“‘«(\[¿¡—–-]*)(?P<next>[^\W_]|$))"
)
_NO_END = re.compile(
    r"(?:^|[\s(\"'“‘—-])(?:[^\W\d_]|Mr|Mrs|Ms|Dr|St|Prof|Rev|Hon|Esq|Capt|Col|Gen|Lt|Sgt|Maj|Sr|Jr|Mt|Messrs|Mme|Mlle|No"
    r"|Vol|Chap|Fig|vs|viz|cf|etc|i\.e|e\.g|(?:[A-Z]\.)+[A-Z]|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept|Oct|Nov|Dec"
    r"|(?:Chapter|CHAPTER|Book|BOOK|Part|PART|Letter|LETTER) (?:\d+|[IVXLC]+))$"
)


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph, each with its closing quotes; in doubt two stay together."""
    found, begun = [], 0
    for end in _END.finditer(paragraph):
        if _is_end(paragraph[begun : end.start()], end):
            found.append(paragraph[begun : end.end()].strip())
            begun = end.end()
    return [*found, rest] if (rest := paragraph[begun:].strip()) else found


def _is_end(before: str, end: re.Match[str]) -> bool:
    if end["next"].islower():
        return False
    return not (end["mark"] == "." and not end["close"] and _NO_END.search(before[-20:]))
