"""What happened to documents, step by step: counted in each slice, added up over a corpus.

A step's input is what the step before it let through: read, cleaned, each rule that dropped some, kept.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from data_pipeline.document import Document
from data_pipeline.dropped import Dropped, example_place
from data_pipeline.language import language
from data_pipeline.shards import Split

SAMPLE = 1000  # documents per slice whose language is looked at where nothing before knew it
SAMPLE_CHARS = 2000  # of each


class LanguageSample:
    """The languages of documents that nobody knew, by those with the smallest keyed hashes of their ids.

    Looking at every one costs as much as encoding it (resiliparse: 210 MB/s of text on one core), and a thousand
    of a slice tell the shares to a few percent.
    """

    def __init__(self) -> None:
        self.seen = 0
        self._smallest: list[tuple[int, str]] = []  # (-hash, beginning of the text): the largest hash comes first

    def add(self, document: Document) -> None:
        self.seen += 1
        place = -example_place(document.id)
        if len(self._smallest) < SAMPLE:
            heapq.heappush(self._smallest, (place, document.text[:SAMPLE_CHARS]))
        elif place > self._smallest[0][0]:
            heapq.heapreplace(self._smallest, (place, document.text[:SAMPLE_CHARS]))

    @property
    def looked_at(self) -> int:
        return len(self._smallest)

    def languages(self) -> Counter[str]:
        """How many of all documents seen have which language, from the sample's shares."""
        found = Counter(language(text) for _, text in self._smallest)
        return Counter({code: round(n * self.seen / self.looked_at) for code, n in found.items()})


@dataclass
class Totals:
    """What happened to documents. Bytes are of text as UTF-8, but for `input_bytes`."""

    read: int = 0
    read_bytes: int = 0
    set_aside: Counter[str] = field(default_factory=Counter)  # reason -> records that gave no document
    cleaned_bytes: int = 0  # of the documents that did not raise
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> documents
    dropped_bytes: Counter[str] = field(default_factory=Counter)  # reason -> bytes; also of documents that raised
    masked: Counter[str] = field(default_factory=Counter)  # kind -> addresses replaced, in documents dropped too
    decontaminated: Counter[str] = field(default_factory=Counter)  # documents cut, pieces kept of them, characters gone
    documents: Counter[str] = field(default_factory=Counter)  # kept, by split
    tokens: Counter[str] = field(default_factory=Counter)  # by split, <|endoftext|> included
    characters: int = 0  # of the documents kept
    text_bytes: int = 0  # of the documents kept
    input_bytes: int = 0
    languages: Counter[str] = field(default_factory=Counter)  # language -> documents kept, about where it was looked at
    languages_looked_at: int = 0  # documents kept whose language was not known before, and was looked at
    length_characters: Counter[int] = field(default_factory=Counter)  # n -> documents kept of 2^(n-1) up to 2^n - 1
    length_tokens: Counter[int] = field(default_factory=Counter)  # likewise, without <|endoftext|>

    def add(self, record: Mapping[str, Any]) -> None:
        """Add what a record has; one of an older version may lack some counts."""
        for f in fields(Totals):
            old, new = getattr(self, f.name), record.get(f.name)
            if not isinstance(old, Counter):
                setattr(self, f.name, old + (new or 0))
            else:
                old.update({int(key) if f.name.startswith("length_") else key: n for key, n in (new or {}).items()})

    def as_json(self) -> dict[str, Any]:
        """For a record or a manifest."""
        return {
            f.name: {str(key): value[key] for key in sorted(value)} if isinstance(value, Counter) else value
            for f in fields(Totals)
            for value in [getattr(self, f.name)]
        }


@dataclass
class Counts(Totals):
    """The tally of one slice while it is made."""

    gone: Dropped = field(kw_only=True)  # where each document lies that was dropped or set aside
    sample: LanguageSample = field(default_factory=LanguageSample)
    notes: list[str] = field(default_factory=list)  # for a person: where the first things went wrong

    def keep(self, document: Document, split: Split, tokens: int) -> None:
        """Count a document that is written; `tokens` without its <|endoftext|>."""
        characters = len(document.text)
        self.documents[split] += 1
        self.tokens[split] += tokens + 1
        self.characters += characters
        self.text_bytes += text_bytes(document.text)
        self.length_characters[characters.bit_length()] += 1
        self.length_tokens[tokens.bit_length()] += 1
        if (known := document.meta.get("language")) is not None:
            self.languages[str(known)] += 1
        else:
            self.sample.add(document)

    def record(self) -> dict[str, Any]:
        """As the slice's record has it, when all documents are counted."""
        total = Totals()
        total.add(self.as_json())
        total.languages.update(self.sample.languages())
        total.languages_looked_at = self.sample.looked_at
        return total.as_json() | {"notes": self.notes}


def text_bytes(text: str) -> int:
    """Of a text as UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
