"""Which documents are dropped, and why."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from configs import Int, Section
from data_pipeline.document import Document


class Filters(Section):
    """Rules over cleaned documents. The first that holds gives the reason."""

    min_chars: Int = 1
    max_chars: Int | None = None
    languages: list[str] | None = None  # codes such as en, de; None: any. Short texts are often guessed wrong.

    version: ClassVar[int] = 1  # raised when the same document would be judged otherwise

    def reason(self, document: Document) -> str | None:
        """Why a document is dropped, or None for one that is kept."""
        if not document.text:
            return "empty"
        if len(document.text) < self.min_chars:
            return "too short"
        if self.max_chars is not None and len(document.text) > self.max_chars:
            return "too long"
        if self.languages is not None and document.meta.get("language") not in self.languages:
            return "other language"
        return None

    def marked(self, document: Document) -> Document:
        """With the language that a rule asks for, where its source does not know it."""
        if self.languages is None or "language" in document.meta or not document.text:
            return document
        return replace(document, meta={**document.meta, "language": language(document.text)})


def language(text: str) -> str:
    """The likeliest of resiliparse's 101 languages, "unknown" where none is near. By its beginning."""
    from resiliparse.parse.lang import detect_fast

    code: str = detect_fast(text[:20_000])[0]
    return code
