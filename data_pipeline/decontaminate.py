"""Evaluation sets are cut out of documents: Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C.

A gram is a word between white space, lower-cased, without punctuation. Where N grams in a row of an evaluation text
stand in a document, they and the characters around them are removed, and what is left are pieces. The paper also
ignores N-grams that occur in more than ten documents; here every N-gram counts.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import xxhash

from configs import ConfigError, Int, Section
from data_pipeline.document import Document

SUFFIXES = tuple(f"{kind}{packing}" for kind in (".txt", ".jsonl") for packing in ("", ".gz", ".bz2"))
_SIGNS = re.compile(r"[^\w\s]|_")
_ASCII_SIGNS = {code: None for code in range(128) if not chr(code).isalnum() and not chr(code).isspace()}
_MIX = np.uint64(0x9E3779B97F4A7C15)
_BITS = 22  # of the table that most documents are told clean by: 2^22 places, 4 MiB

Hashes = npt.NDArray[np.uint64]


class EvaluationSet(Section):
    """Files, or patterns of files: `.txt` (a file is a text) and `.jsonl`, each also `.gz` or `.bz2`."""

    paths: list[str]
    fields: list[str] | None = None  # of a JSON line: joined into one text; a list gives one text for each of its
    # elements. None: each field that holds text is a text by itself.


@dataclass(frozen=True)
class Piece:
    """What is left of a document between two cuts."""

    text: str
    start: int  # its first character in the document


@dataclass(frozen=True)
class Cut:
    """A document that held evaluation text."""

    pieces: tuple[Piece, ...]  # that are long enough
    reason: str | None  # why the whole document is dropped
    characters: int  # removed, where it is not dropped: in cuts and in pieces too short


class Decontamination(Section):
    """Which evaluation sets must not be in the text, and what is cut around them (the paper's numbers)."""

    sets: dict[str, EvaluationSet]
    ngram_words: Int = 13  # evaluation texts of fewer words are not looked for
    around_chars: Int = 200  # removed on both sides of a match
    max_pieces: Int = 10  # a document cut into more is dropped
    min_piece_chars: Int = 200  # shorter pieces are dropped

    version: ClassVar[int] = 1  # raised when the same document would be cut otherwise

    def identity(self) -> dict[str, Any]:
        """What cuts depend on; of the files their bytes, not their names. Raises ConfigError."""
        settings = self.model_dump(mode="json", exclude={"sets"})
        sets = {
            name: {"fields": s.fields, "sha256": sorted(hashlib.sha256(_read(p)).hexdigest() for p in _files(name, s))}
            for name, s in self.sets.items()
        }
        return {**settings, "sets": sets, "version": self.version}

    def cut(self, text: str) -> Cut | None:
        """What is left of a document's text; None where it holds nothing of the sets."""
        grams = _grams(text)
        if not (found := self.ngrams.found(grams)):
            return None
        pieces = self._pieces(text, found)
        if len(pieces) > self.max_pieces:
            return Cut((), "decontamination: many pieces", 0)
        kept = tuple(piece for piece in pieces if len(piece.text) >= self.min_piece_chars)
        if not kept:
            return Cut((), "decontamination: no piece long enough", 0)
        return Cut(kept, None, len(text) - sum(len(piece.text) for piece in kept))

    @cached_property
    def ngrams(self) -> Ngrams:
        """Of all sets; read at the first use. Raises ConfigError."""
        files = ((path, s) for name, s in self.sets.items() for path in _files(name, s))
        return Ngrams((text for path, s in files for text in _texts(path, s)), self.ngram_words)

    def _pieces(self, text: str, found: Sequence[int]) -> list[Piece]:
        spans = [m.span() for m in re.finditer(r"\S+", text) if _grams(m[0])]
        pieces, end = [], 0
        for at in found:
            begin = max(0, spans[at][0] - self.around_chars)
            if begin > end:
                pieces.append(_piece(text, end, begin))
            end = max(end, spans[at + self.ngram_words - 1][1] + self.around_chars)
        if end < len(text):
            pieces.append(_piece(text, end, len(text)))
        return [piece for piece in pieces if piece.text]


def pieces_of(document: Document, cut: Cut) -> Iterator[Document]:
    """The pieces of a document as documents `<id>#1`, `<id>#2`, ..., which keep its place in the input."""
    for number, piece in enumerate(cut.pieces, 1):
        yield Document(piece.text, f"{document.id}#{number}", document.source, document.uri, document.meta)


def _piece(text: str, start: int, stop: int) -> Piece:
    part = text[start:stop]
    return Piece(part.strip(), start + len(part) - len(part.lstrip()))


def _grams(text: str) -> list[str]:
    """The words of a text as they are compared."""
    text = text.lower()
    return (text.translate(_ASCII_SIGNS) if text.isascii() else _SIGNS.sub("", text)).split()


class Ngrams:
    """The N-grams of evaluation texts. Most documents pass by a table of bits, over hashes that differ by process;
    what that lets through is told by a hash of the words themselves."""

    def __init__(self, texts: Iterator[str], n: int) -> None:
        self.n = n
        self._known: set[int] = set()
        self._table = np.zeros(2**_BITS, np.bool_)
        for text in texts:
            grams = _grams(text)
            self._known |= {_exact(grams, at, n) for at in range(len(grams) - n + 1)}
            self._table[_places(grams, n)] = True

    def found(self, grams: Sequence[str]) -> list[int]:
        """At which words known N-grams begin, in order."""
        hits = np.flatnonzero(self._table[_places(grams, self.n)])
        return [at for at in hits.tolist() if _exact(grams, at, self.n) in self._known]


def _exact(grams: Sequence[str], at: int, n: int) -> int:
    return xxhash.xxh3_64_intdigest(" ".join(grams[at : at + n]).encode("utf-8", "surrogatepass"))


def _places(grams: Sequence[str], n: int) -> Hashes:
    """A place in the table for each N-gram, shape (max(0, words - n + 1),)."""
    count = len(grams) - n + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    words = np.fromiter(map(hash, grams), np.int64, len(grams)).astype(np.uint64) * _MIX
    mixed = words[:count].copy()
    for i in range(1, n):
        mixed *= _MIX
        mixed += words[i : count + i]
    return mixed >> np.uint64(64 - _BITS)


# --- evaluation files -----------------------------------------------------------------------------------------------


def _files(name: str, evaluation: EvaluationSet) -> list[Path]:
    found = []
    for pattern in evaluation.paths:
        paths = sorted(Path(path) for path in glob.glob(pattern, recursive=True))  # noqa: PTH207 (absolute patterns)
        if not paths:
            raise ConfigError(f"decontamination.sets.{name}: {pattern}: no such file")
        found += paths
    for path in found:
        if not path.name.endswith(SUFFIXES):
            raise ConfigError(f"decontamination.sets.{name}: {path}: expected one of {', '.join(SUFFIXES)}")
    return found


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        unpack = {".gz": gzip.decompress, ".bz2": bz2.decompress}.get(path.suffix)
        return unpack(data) if unpack else data
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def _texts(path: Path, evaluation: EvaluationSet) -> Iterator[str]:
    """The texts of one file. Raises ConfigError with the line that is not what it should be."""
    text = _read(path).decode("utf-8", "replace")
    if ".jsonl" not in path.suffixes:
        yield text
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("expected a JSON object")
            yield from _row_texts(row, evaluation.fields)
        except ValueError as error:
            raise ConfigError(f"{path}: line {number}: {error}") from None


def _row_texts(row: dict[str, Any], fields: Sequence[str] | None) -> Iterator[str]:
    if fields is None:
        for value in row.values():
            yield from _strings(value)
        return
    for field in fields:
        if not _strings(row.get(field)):
            raise ValueError(f"no text in field {field!r}")
    for parts in itertools.product(*(_strings(row[field]) for field in fields)):
        yield " ".join(parts)


def _strings(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, str)]
