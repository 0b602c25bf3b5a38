"""Normalization of text: str -> str, pure. Each step can be turned off; with all of them off a text stays as it is."""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import ClassVar, Literal

from configs import Bool, Section

_SPACES = "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_LINE_ENDS = "\x0b\x0c\x85\u2028\u2029"
_PLAIN = dict.fromkeys(_SPACES, " ") | dict.fromkeys(_LINE_ENDS, "\n")
_UNSEEN = "\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff"  # control characters, byte order marks
_ODD = re.compile(f"[{_SPACES}{_LINE_ENDS}{_UNSEEN}]")
_ODD_ASCII = bytes((*range(9), *range(11, 32), 127))
_SURROGATE = re.compile("[\ud800-\udfff]")

MASKS = {"email": "email@example.com", "ip": "192.0.2.1"}  # what stands in the place; RFC 2606, RFC 5737
MASK_REACH = 256  # characters before and after an @ in which an address is looked for

_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|[01]?[0-9][0-9]?)"
_EMAIL = re.compile(
    rf"\b{_ATOM}(?:\.{_ATOM})*@(?:(?:{_LABEL}\.)+{_LABEL}|\[(?:{_OCTET}\.){{3}}(?:{_OCTET}|[A-Za-z0-9-]*[A-Za-z0-9]:)\])"
)
_IP = re.compile(rf"(?:{_OCTET}\.){{3}}{_OCTET}")


class Clean(Section):
    """What happens to every document's text, in this order: mended, composed, tidied, masked.

    `{tidy: false, unicode: as_is}` leaves every text as it is, but for halves of characters, which UTF-8 cannot hold.
    """

    fix_encoding: Bool = False  # ftfy: text that was decoded wrongly, such as "donâ€™t"
    unicode: Literal["nfc", "nfkc", "as_is"] = "nfc"
    tidy: Bool = True  # one kind of line end and of space, no control characters, trailing space or runs of blank lines
    mask: tuple[Literal["email", "ip"], ...] = ()  # addresses become MASKS; ip: public ones of version 4

    version: ClassVar[int] = 1  # raised when the same text would come out otherwise

    def text(self, text: str, masked: Counter[str] | None = None) -> str:
        """The cleaned text; counts what is masked, by kind. Cleaning twice changes nothing more."""
        if not text.isascii():
            text = self._composed(_mended(text))
        if self.tidy:
            text = _tidied(text)
        if "email" in self.mask:
            text, count = _without_emails(text)
            if count and masked is not None:
                masked["email"] += count
        if "ip" in self.mask:
            text, count = _without_ips(text)
            if count and masked is not None:
                masked["ip"] += count
        return text

    def _composed(self, text: str) -> str:
        if self.fix_encoding:
            import ftfy

            text = ftfy.fix_encoding(text)
        if self.unicode == "as_is":
            return text
        return unicodedata.normalize("NFC" if self.unicode == "nfc" else "NFKC", text)


def _mended(text: str) -> str:
    """Without halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return _SURROGATE.sub("\ufffd", text)
    return text


def _tidied(text: str) -> str:
    """Each pass runs only where a quicker look finds work for it; the commonest need no pattern."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.isascii():
        text = text.replace("\u00a0", " ")
    if not text.isascii() or len(text.encode().translate(None, _ODD_ASCII)) != len(text):
        text = _ODD.sub(lambda odd: _PLAIN.get(odd[0], ""), text)
    if " \n" in text or ("\t" in text and "\t\n" in text):  # one character is looked for ten times as fast as two
        text = "\n".join([line.rstrip(" \t") for line in text.split("\n")])
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.strip()


# --- masks: the addresses that datatrove's PIIFormatter finds -------------------------------------------------------


def _without_emails(text: str) -> tuple[str, int]:
    """Looks only around each @: over a whole text the pattern would try every word, and cost squares of long ones."""
    at, done, count = text.find("@"), 0, 0
    kept: list[str] = []
    while at >= 0:
        begin, end = _unspaced(text, at, done)
        masked, found = _EMAIL.subn(MASKS["email"], text[begin:end])
        kept += (text[done:begin], masked)
        count += found
        done = end
        at = text.find("@", done)
    return ("".join((*kept, text[done:])), count) if count else (text, 0)


def _unspaced(text: str, at: int, after: int) -> tuple[int, int]:
    """The bounds of the unspaced text around a place, MASK_REACH to either side, not before `after`."""
    before = text[max(after, at - MASK_REACH) : at]
    begin = at if not before or before[-1].isspace() else at - len(before.rsplit(None, 1)[-1])
    return begin, at + len(text[at : at + MASK_REACH].split(None, 1)[0])


def _without_ips(text: str) -> tuple[str, int]:
    if not any(len(part) < 4 and part.isdigit() for part in text.split(".")):
        return text, 0
    return _replaced(_IP, text, MASKS["ip"], _is_public)


def _replaced(pattern: re.Pattern[str], text: str, by: str, holds: Callable[[str], bool]) -> tuple[str, int]:
    count = 0

    def instead(match: re.Match[str]) -> str:
        nonlocal count
        if not holds(match[0]):
            return match[0]
        count += 1
        return by

    return pattern.sub(instead, text), count


def _is_public(address: str) -> bool:
    try:
        return ipaddress.IPv4Address(address).is_global
    except ValueError:  # such as 01.2.3.4
        return False
