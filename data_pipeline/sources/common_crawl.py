"""Common Crawl: WARC (what the servers sent) and WET (text that Common Crawl took from it), packed or not.

    https://iipc.github.io/warc-specifications/specifications/warc-format/warc-1.1/
    https://commoncrawl.org/get-started

A web page that was answered with 200 becomes a document: of its HTML the main text, without navigation, as resiliparse
finds it. Each gzip member is read by itself, so a record with a wrong length spoils no other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, ClassVar, Literal, cast

from data_pipeline.document import Document
from data_pipeline.sources.inputs import (
    MAX_DOCUMENT_BYTES,
    Damage,
    Input,
    Member,
    OnDamage,
    Reading,
    decoded,
    find_inputs,
    is_content_error,
    members,
    next_member,
)
from data_pipeline.sources.notes import Noted

PAGES = ("text/html", "application/xhtml+xml")


class CommonCrawl(Noted):
    """WARC or WET files, packed or not: files, folders, patterns, addresses or lists (`warc.paths.gz`) of them."""

    kind: Literal["common_crawl"] = "common_crawl"
    paths: list[str]
    base: str = "https://data.commoncrawl.org/"  # what names in a list are relative to: an address or a folder
    on_damage: OnDamage = "skip"

    version: ClassVar[int] = 2  # raised when the same file would give other text

    def inputs(self) -> list[Input]:
        """The files, sorted by name. Raises ConfigError where a path leads to none."""
        return find_inputs(
            self.paths, tuple(f".{kind}{pack}" for kind in ("warc", "wet") for pack in (".gz", ".zst", "")), self.base
        )

    def can_split(self, input: Input) -> bool:
        """Whether ranges of its bytes can be read by themselves."""
        return False

    def text_bytes(self, input: Input) -> float:
        """About how many bytes of text an input gives (Common Crawl's own files: a tenth of packed WARC, WET 2.5)."""
        packed = input.name.endswith((".gz", ".zst"))
        if ".wet" in input.name:
            return input.bytes * (2.5 if packed else 0.95)
        return input.bytes * (0.3 if packed else 0.06)

    def read(self, reading: Reading) -> Iterator[Document]:
        """The pages of a file, in its order. A damaged member costs what is packed in it, and no other."""
        goes_on: int | None = 0
        while goes_on is not None:
            reading.go_to(goes_on)
            try:
                for member in members(reading):
                    yield from _documents(member, reading)
                return
            except Damage as damage:
                goes_on = next_member(reading, damage.offset, b"WARC/")
                if goes_on is None:
                    reading.damaged(damage)
                    continue
                lost = f"{damage.reason}; passed over {goes_on - damage.offset} bytes"
                reading.damaged(Damage(damage.offset, lost), "damaged member", "the rest")


def _documents(member: Member, reading: Reading) -> Iterator[Document]:
    from fastwarc.warc import ArchiveIterator

    place, records, stream = member.offset, 0, _Tail(member)
    is_aside = False  # the last record
    held: Document | None = None  # until what follows, or the end of the member, has been read without damage
    try:
        for record in ArchiveIterator(cast(BinaryIO, stream), parse_http=False):
            if held is not None:
                yield held
            records += 1
            place = member.offset + (0 if member.packing else record.stream_pos)
            aside = reading.set_aside.total()
            held = _document(record, place, reading)
            is_aside = reading.set_aside.total() > aside
    except OSError as error:
        if not is_content_error(error):
            raise
        if member.packing is None:
            if held is not None:
                yield held
            raise Damage(place, f"not a WARC record here, or behind it ({error})") from None
        if not is_aside:  # whose body spoilt what comes behind it
            reading.put_aside("damaged record", f"member at byte {place}")
    if held is not None:
        yield held
    if member.packing is None and not (stream.is_whole() and records):
        raise Damage(place, "the file ends inside this record, or behind it" if records else "not a WARC file")


class _Tail:
    """A stream that remembers its last bytes, to tell whether its last record is whole."""

    KEPT = 16 * 2**10

    def __init__(self, member: Member) -> None:
        self.member, self.last, self.position = member, b"", 0

    def read(self, size: int) -> bytes:
        data = self.member.read(size)
        self.last = (self.last + data)[-self.KEPT :]
        self.position += len(data)
        return data

    def tell(self) -> int:
        return self.position

    def is_whole(self) -> bool:
        """A record ends with two line ends; so does its header, after which a block must come."""
        last = self.last.replace(b"\r\n", b"\n")
        before = last.removesuffix(b"\n\n")
        return before != last and not before.rpartition(b"\n\n")[2].startswith(b"WARC/")


def _document(record: Any, offset: int, reading: Reading) -> Document | None:
    """A response's or conversion's text, or None (counted, where it is a page at all) for what gives no document."""
    from fastwarc.warc import WarcRecordType

    if not record.record_type & (WarcRecordType.response | WarcRecordType.conversion):
        return None
    uri = record.headers.get("WARC-Target-URI", "").strip("<>")
    name = (record.record_id or "").strip("<>") or f"{reading.part.input.name}:{offset}"
    meta: dict[str, str | int] = {"input": reading.part.input.name, "offset": offset}
    length = record.content_length
    if length > MAX_DOCUMENT_BYTES:
        reading.put_aside("record too large", name)
        return None
    record.freeze()  # reads it; its length is then what was there
    if record.content_length < length:
        reading.put_aside("record shorter than it says", name)
        return None
    if record.record_type == WarcRecordType.conversion:
        return Document(decoded(record.reader.read()), name, reading.source, uri, meta)
    try:
        record.parse_http(auto_decode="all")
    except OSError:
        reading.put_aside("no HTTP answer", name)
        return None
    if record.http_headers is None:
        reading.put_aside("no HTTP answer", name)
        return None
    if record.http_headers.status_code != 200:
        reading.set_aside["status not 200"] += 1
        return None
    if (record.http_content_type or "").lower() not in PAGES:
        reading.set_aside["not HTML"] += 1
        return None
    try:
        body = record.reader.read(MAX_DOCUMENT_BYTES)
        text = main_text(page_text(body, record.http_charset))
    except BaseException as error:
        if not is_content_error(error):
            raise
        reading.put_aside(f"unreadable page ({type(error).__name__})", name)
        return None
    return Document(text, name, reading.source, uri, meta)


def page_text(body: bytes, declared: str | None) -> str:
    """HTML bytes as text. The charset is the header's or the page's own where it fits its bytes, else it is guessed.

    The header comes first, then <meta>, as in https://html.spec.whatwg.org/#determining-the-character-encoding.
    """
    from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

    if body.startswith(b"\xef\xbb\xbf"):
        return body[3:].decode("utf-8", "replace")
    named = map_encoding_to_html5(declared, fallback_utf8=False) if declared else None
    best, bad = "", len(body) + 1
    for charset in _charsets(named, body, detect_encoding):
        text = body.decode(charset, "replace")
        wrong = text.count("\ufffd")
        if wrong * 1000 <= len(body):  # a cut-off page ends with a broken character
            return text
        if wrong < bad:
            best, bad = text, wrong
    return best


def _charsets(named: str | None, body: bytes, detect: Callable[..., str | None]) -> Iterator[str]:
    """Those to try, the likeliest first."""
    if named is not None:
        yield named
    yield detect(body, from_html_meta=True) or "utf-8"
    yield detect(body) or "utf-8"


def main_text(html: str) -> str:
    """The main text of a page: paragraphs, headings and list items as lines. Raises ValueError for a hostile page."""
    from resiliparse.extract import html2text

    if nested_deeper(html, MAX_DEPTH):
        raise ValueError(f"elements nested deeper than {MAX_DEPTH}")
    extract: Callable[..., str] = html2text.extract_plain_text
    return extract(html, main_content=True, preserve_formatting=True, alt_texts=False)


MAX_DEPTH = 2000  # the extractor's time grows with the square of the depth; browsers stop at 512
_STEP = 8192  # characters
_NESTING_TAG = re.compile(
    r"<(/?)(?!(?:area|base|br|col|embed|hr|img|input|link|meta|source|track|wbr|p|li|dd|dt|td|th|tr|option)\b)[a-z]",
    re.I,
)


def nested_deeper(html: str, limit: int) -> bool:
    """Whether elements are nested deeper than `limit`; looked at closely only where many more open than close."""
    depth = 0
    for i in range(0, len(html), _STEP):
        depth += html.count("<", i, i + _STEP) - 2 * html.count("</", i, i + _STEP)
        if depth > limit:
            break
    else:
        return False
    depth = 0
    for tag in _NESTING_TAG.finditer(html):
        depth = max(0, depth - 1) if tag[1] else depth + 1
        if depth > limit:
            return True
    return False
