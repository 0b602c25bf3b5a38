"""Small inputs, made for tests, and the real ones that lie beside the checkout."""

from __future__ import annotations

import gzip
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.document import Document
from data_pipeline.sources.inputs import Part, Reading, describe

REAL = Path(__file__).parents[2] / "../shared/data"


def real(name: str) -> Path:
    """A real input, or a skipped test."""
    path = REAL / name
    if not path.exists():
        pytest.skip(f"the real inputs are not here ({path})")
    return path


def read(source: Any, path: Path, start: int = 0, stop: int | None = None) -> tuple[list[Document], Reading]:
    """All documents of one file or of a range of it, and what its reading had to say."""
    with Reading(Part(describe(str(path)), start, stop), "corpus", source.on_damage) as reading:
        documents = list(source.read(reading))
        reading.finish()
    return documents, reading


def warc_record(kind: str, uri: str, block: bytes, identifier: str, content: str = "application/http") -> bytes:
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:{identifier}>\r\n"
        f"WARC-Date: 2024-01-01T00:00:00Z\r\nWARC-Target-URI: {uri}\r\n"
        f"Content-Type: {content}\r\nContent-Length: {len(block)}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"


def http(body: bytes, status: str = "200 OK", content: str = "text/html; charset=utf-8", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {content}\r\n{more}\r\n".encode() + body


def page(text: str) -> bytes:
    """HTML whose main text is `text`."""
    menu = '<nav><ul><li><a href="/">Home</a></li><li><a href="/x">Menu entry</a></li></ul></nav>'
    return f"<html><head><title>t</title></head><body>{menu}<main><p>{text}</p></main></body></html>".encode()


def write_warc(path: Path, records: Iterable[bytes], packed: bool = True) -> Path:
    path.write_bytes(b"".join(gzip.compress(r, mtime=0) if packed else r for r in records))
    return path


def sentences(seed: int, count: int) -> str:
    """Text of made-up words, different for each seed."""
    rng = random.Random(seed)
    syllables = ["ka", "lo", "mi", "tu", "re", "sa", "vi", "no", "pe", "dra"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(60)]
    return " ".join(" ".join(rng.choices(words, k=rng.randint(4, 12))).capitalize() + "." for _ in range(count))


def write_dump(path: Path, articles: int, seed: int) -> Path:
    """A MediaWiki dump with redirects and talk pages among its articles."""
    import bz2

    pages = []
    for i in range(articles):
        text = f"'''Page {i}''' is about [[thing {i}|things]].<ref>x</ref>\n\n== Part ==\n{sentences(seed + i, 12)}"
        pages.append((i * 3 + 1, 0, f"Page {i}", text))
        pages.append((i * 3 + 2, 1, f"Talk:Page {i}", "talk"))
        pages.append((i * 3 + 3, 0, f"Old page {i}", f"#REDIRECT [[Page {i}]]"))
    body = "".join(
        f"<page><title>{title}</title><ns>{ns}</ns><id>{id}</id><revision><id>1</id><model>wikitext</model>"
        f"<text>{text.replace('&', '&amp;').replace('<', '&lt;')}</text></revision></page>"
        for id, ns, title, text in pages
    )
    head = (
        '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/" version="0.10" xml:lang="en"><siteinfo>'
        "<base>https://en.wikipedia.org/wiki/Main_Page</base><namespaces>"
        '<namespace key="6">File</namespace></namespaces></siteinfo>'
    )
    path.write_bytes(bz2.compress(f"{head}{body}</mediawiki>".encode()))
    return path


def write_corpora(folder: Path) -> None:
    """Three corpora with several files each: crawl/*.warc.gz, wiki/*.xml.bz2, books/*.txt."""
    for name in ("crawl", "wiki", "books"):
        (folder / name).mkdir(parents=True)
    for f in range(3):
        records = [
            warc_record(
                "response",
                f"https://e.org/{f}/{i}",
                http(page(sentences(1000 * f + i, 20))),
                f"{f:08d}-0000-0000-0000-{i:012d}",
            )
            for i in range(30)
        ]
        write_warc(folder / "crawl" / f"{f}.warc.gz", records)
    for f in range(2):
        write_dump(folder / "wiki" / f"{f}.xml.bz2", 20, 10_000 * (f + 1))
    for f in range(5):
        book = "\r\n\r\n".join(sentences(50_000 + 100 * f + i, 8) for i in range(20))
        (folder / "books" / f"{f}.txt").write_bytes(f"Title: Book {f}\r\n\r\n-------\r\n\r\n{book}".encode())
