"""Which documents are dropped, and why."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, ClassVar

from configs import Int, Section
from data_pipeline.document import Document
from data_pipeline.language import LanguageModel, Resiliparse
from data_pipeline.quality import C4, FineWeb, GopherQuality, GopherRepetition, Text


class Filters(Section):
    """Rules over cleaned documents, in this order. The first that holds gives the reason."""

    min_chars: Int = 1
    max_chars: Int | None = None
    languages: list[str] | None = None  # codes of `language`'s model, such as en, de; None: any
    language: LanguageModel = Resiliparse()
    gopher_quality: GopherQuality | None = None  # `gopher_quality: {}` takes the paper's thresholds; so do the others
    gopher_repetition: GopherRepetition | None = None
    c4: C4 | None = None
    fineweb: FineWeb | None = None

    version: ClassVar[int] = 2  # raised when the same document would be judged otherwise

    def judged(self, document: Document) -> tuple[Document, str | None]:
        """The document, its language marked and its lines dropped as rules ask, and why it is dropped, or None."""
        if reason := self._of_length(document.text):
            return document, reason
        document = self.marked(document)
        if self.languages is not None and document.meta.get("language") not in self.languages:
            return document, "other language"
        text = Text(document.text)
        if self.gopher_quality and (reason := self.gopher_quality.reason(text)):
            return document, f"gopher: {reason}"
        if self.gopher_repetition and (reason := self.gopher_repetition.reason(text)):
            return document, f"gopher: {reason}"
        if self.c4:
            kept, reason = self.c4.kept(text.text)
            if reason or not kept:
                return document, f"c4: {reason or 'no line left'}"
            if kept != text.text:
                document, text = replace(document, text=kept), Text(kept)
        if self.fineweb and (reason := self.fineweb.reason(text)):
            return document, f"fineweb: {reason}"
        return document, None

    def marked(self, document: Document) -> Document:
        """With the language that a rule asks for, where its source does not know it."""
        if self.languages is None or "language" in document.meta:
            return document
        return replace(document, meta={**document.meta, "language": self.language.of(document.text)})

    def identity(self) -> dict[str, Any]:
        """What verdicts depend on. Raises ConfigError where a model's file cannot be read."""
        rules = json.loads(self.model_dump_json(exclude={"language"}))  # so that its keys are text, as when read again
        return {**rules, "language": self.language.identity() if self.languages else None, "version": self.version}

    def _of_length(self, text: str) -> str | None:
        if not text:
            return "empty"
        if len(text) < self.min_chars:
            return "too short"
        if self.max_chars is not None and len(text) > self.max_chars:
            return "too long"
        return None
