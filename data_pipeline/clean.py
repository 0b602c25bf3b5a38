"""Normalization of text: str -> str, pure."""

from __future__ import annotations

import re
import unicodedata
from typing import ClassVar, Literal

from configs import Bool, Section

_LINE_END = re.compile("\r\n?|[\x85\u2028\u2029\x0b\x0c]")
_UNSEEN = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff]")  # control characters, byte order marks
_SPACE = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_LINE_TAIL = re.compile(r"(?<![ \t])[ \t]++\n")
_BLANK_LINES = re.compile(r"\n{3,}")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Clean(Section):
    """What happens to every document's text, in this order: mended (if asked for), composed, tidied."""

    fix_encoding: Bool = False  # ftfy: text that was decoded wrongly, such as "donâ€™t"
    unicode: Literal["nfc", "nfkc", "as_is"] = "nfc"

    version: ClassVar[int] = 1  # raised when the same text would come out otherwise

    def text(self, text: str) -> str:
        """One kind of line end and of space, no control characters, no trailing space, at most one blank line."""
        if not text.isascii():
            text = self._composed(_SURROGATE.sub("\ufffd", text))  # half a character cannot be written as UTF-8
            text = _SPACE.sub(" ", text)
        text = _LINE_END.sub("\n", text)
        text = _UNSEEN.sub("", text)
        if " \n" in text or "\t\n" in text:
            text = _LINE_TAIL.sub("\n", text)
        return _BLANK_LINES.sub("\n\n", text).strip()

    def _composed(self, text: str) -> str:
        if self.fix_encoding:
            import ftfy

            text = ftfy.fix_encoding(text)
        if self.unicode == "as_is":
            return text
        return unicodedata.normalize("NFC" if self.unicode == "nfc" else "NFKC", text)
