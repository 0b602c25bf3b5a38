"""Small corpora in the three real formats, made from what every machine has: the standard library's documentation.

The docstrings, comments and source of Python's own modules (parsed, never imported) become web pages in WARC files,
articles in a MediaWiki dump, and books of plain text, with `pydoc`'s language reference among them. A module is either
a page or an article; the books tell of all, but show no code. They have what real ones have: navigation and error
pages, redirects, talk pages, templates and references, title blocks and hard line ends. The same Python gives the same
bytes.
"""

from __future__ import annotations

import ast
import bz2
import gzip
import hashlib
import html
import inspect
import re
import sys
import sysconfig
import textwrap
import tokenize
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

SITE = "https://docs.example.org/library/"
DATE = "2024-01-01T00:00:00Z"
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
VOLUME_BYTES = 60_000
WIDTH = 72


@dataclass(frozen=True)
class Member:
    """A function or method."""

    signature: str
    doc: str
    code: str


@dataclass(frozen=True)
class Entry:
    """What is documented together: a module with its functions, or a class with its methods."""

    name: str  # dotted
    kind: str  # module, class, topic
    doc: str
    members: list[Member] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)

    @property
    def prose(self) -> int:
        return len(self.doc) + sum(len(m.doc) for m in self.members)

    @property
    def code(self) -> int:
        return sum(len(m.code) for m in self.members)


def make_corpora(folder: Path, bytes_per_corpus: int) -> dict[str, int]:
    """Write common_crawl/*.warc.gz, wikipedia/*.xml.bz2 and bookcorpus/*.txt; about so much text in each, if there is.

    Returns the bytes of text by corpus.
    """
    pages: list[Entry] = []
    articles: list[Entry] = []
    books = _topics()
    for module in _modules(Path(sysconfig.get_paths()["stdlib"])):
        (pages if _place(module[0].name) % 7 < 3 else articles).extend(module)
        books += module
    return {
        "common_crawl": _write_warcs(folder / "common_crawl", _fitted(pages, bytes_per_corpus)),
        "wikipedia": _write_dump(folder / "wikipedia", _fitted(articles, bytes_per_corpus)),
        "bookcorpus": _write_books(folder / "bookcorpus", books, bytes_per_corpus),
    }


def _place(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


# --- what the standard library says of itself -----------------------------------------------------------------------


def _modules(root: Path) -> Iterator[list[Entry]]:
    """The entries of each module: itself first, then its classes."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if LEFT_OUT & set(parts) or parts[0] == "pydoc_data":
            continue
        name = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
        try:
            with tokenize.open(path) as file:
                source = file.read()
            tree = ast.parse(source)
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        entries = [Entry(name, "module", _doc(tree), _members(tree, source), _comments(source))]
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        entries += [Entry(f"{name}.{c.name}", "class", _doc(c), _members(c, source)) for c in classes]
        yield entries


def _doc(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return ast.get_docstring(node) or ""


def _members(node: ast.Module | ast.ClassDef, source: str) -> list[Member]:
    lines = source.split("\n")
    return [
        Member(f"{child.name}({ast.unparse(child.args)})", _doc(child), _code(child, lines))
        for child in node.body
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def _code(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    return textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))


def _comments(source: str) -> list[str]:
    """Comments that are prose: several lines together."""
    found: list[str] = []
    run: list[str] = []
    for line in [*source.split("\n"), ""]:
        text = line.strip()
        if text.startswith("#") and not text.startswith("#!"):
            run.append(text.lstrip("#").strip())
        else:
            joined = "\n".join(run)
            if len(joined) > 60 and sum(c.isalpha() or c.isspace() for c in joined) > 0.85 * len(joined):
                found.append(joined)
            run = []
    return found


def _topics() -> list[Entry]:
    """The language reference as pydoc carries it, where this Python has it."""
    path = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"
    if not path.is_file():
        return []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            return [Entry(name, "topic", inspect.cleandoc(text)) for name, text in sorted(topics.items())]
    return []


def _fitted(entries: list[Entry], wanted: int) -> list[Entry]:
    """Entries with about `wanted` bytes: all prose, if it is not more, and the rest source code, evenly taken."""
    entries = [entry for entry in entries if entry.prose + entry.code > 200]
    prose, code = sum(entry.prose for entry in entries), sum(entry.code for entry in entries)
    share = max(0, wanted - prose) / max(code, 1)
    fitted, total = [], 0
    for entry in entries:
        left = share * entry.code
        members = []
        for member in entry.members:
            left -= len(member.code)
            members.append(Member(member.signature, member.doc, member.code if left >= 0 else ""))
        fitted.append(Entry(entry.name, entry.kind, entry.doc, members))
        total += entry.prose + sum(len(m.code) for m in members)
        if total > wanted:
            break
    return fitted


def _paragraphs(doc: str) -> Iterator[tuple[str, bool]]:
    """(paragraph, is it laid out) of a docstring: examples, tables and indented text keep their lines."""
    for block in re.split(r"\n\s*\n", doc):
        if block.strip():
            laid_out = block.startswith((" ", "\t", ">>>")) or "\n   " in block or ">>>" in block
            yield block.strip("\n"), laid_out


# --- web pages ------------------------------------------------------------------------------------------------------


def _write_warcs(folder: Path, entries: list[Entry], files: int = 3) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        with (folder / f"docs-{number:05d}.warc.gz").open("wb") as file:
            for record in _records(entries[number::files]):
                file.write(gzip.compress(record, mtime=0))  # a member per record, as Common Crawl does
    return sum(entry.prose + entry.code for entry in entries)


def _records(entries: list[Entry]) -> Iterator[bytes]:
    yield _record(
        "warcinfo", "", "application/warc-fields", b"software: longhaul demo\r\nformat: WARC File Format 1.0\r\n"
    )
    for number, entry in enumerate(entries):
        uri = f"{SITE}{entry.name}.html"
        yield _record("request", uri, "application/http; msgtype=request", f"GET {uri} HTTP/1.1\r\n\r\n".encode())
        near = entries[max(0, number - 3) : number + 4]
        yield _response(uri, "200 OK", "text/html; charset=utf-8", _page(entry, near).encode("utf-8", "replace"))
        if number % 20 == 0:
            yield _response(f"{uri}?old", "404 Not Found", "text/html", b"<html><body>Not found</body></html>")
            yield _response(f"{uri}.css", "200 OK", "text/css", b"body { margin: 2em }")


def _response(uri: str, status: str, content: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    return _record("response", uri, "application/http; msgtype=response", head + body)


def _record(kind: str, uri: str, content: str, block: bytes) -> bytes:
    target = f"WARC-Target-URI: {uri}\r\n" if uri else ""
    return (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <{uuid.uuid5(uuid.NAMESPACE_URL, kind + uri).urn}>\r\n"
        f"WARC-Date: {DATE}\r\n{target}Content-Type: {content}\r\nContent-Length: {len(block)}\r\n\r\n"
    ).encode() + block + b"\r\n\r\n"  # fmt: skip


def _page(entry: Entry, near: list[Entry]) -> str:
    links = "".join(f'<li><a href="{e.name}.html">{html.escape(e.name)}</a></li>' for e in near)
    body = [f"<h1>{html.escape(entry.name)}</h1>", *map(_html, _paragraphs(entry.doc))]
    for member in entry.members:
        if member.doc or member.code:
            body.append(f"<h2>{html.escape(member.signature)}</h2>")
            body += map(_html, _paragraphs(member.doc))
            body += [f"<pre>{html.escape(member.code)}</pre>"] if member.code else []
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(entry.name)}</title>'
        f'<script>var page = "{entry.kind}";</script></head>\n<body><nav><ul>{links}</ul></nav>\n'
        f"<main><article>\n{chr(10).join(body)}\n</article></main>\n"
        "<footer><p>Made from the docstrings of the standard library. All pages.</p></footer></body></html>"
    )


def _html(paragraph: tuple[str, bool]) -> str:
    text, laid_out = paragraph
    return f"<pre>{html.escape(text)}</pre>" if laid_out else f"<p>{html.escape(text)}</p>"


# --- a MediaWiki dump -----------------------------------------------------------------------------------------------


def _write_dump(folder: Path, entries: list[Entry], files: int = 2) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        pages = "".join(_pages(entries[number::files], 1 + number, 4 * files))
        dump = f"{_DUMP_HEAD}{pages}</mediawiki>\n"
        path = folder / f"docswiki-pages-articles{number + 1}.xml.bz2"
        path.write_bytes(bz2.compress(dump.encode("utf-8", "replace")))
    return sum(entry.prose + entry.code for entry in entries)


_NAMESPACES = "".join(
    f'      <namespace key="{key}" case="first-letter">{name}</namespace>\n'
    for key, name in [(0, ""), (1, "Talk"), (6, "File"), (10, "Template"), (14, "Category")]
)
_DUMP_HEAD = f"""<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/" version="0.10" xml:lang="en">
  <siteinfo>
    <sitename>Docs</sitename>
    <base>https://wiki.example.org/wiki/Main_Page</base>
    <namespaces>
{_NAMESPACES}    </namespaces>
  </siteinfo>
"""


def _pages(entries: list[Entry], first: int, step: int) -> Iterator[str]:
    for number, entry in enumerate(entries):
        identifier = first + number * step
        near = entries[number - 1]
        yield _wiki_page(identifier, 0, entry.name, _article(entry, near))
        if number % 3 == 0:
            short = f"{entry.name.rpartition('.')[2]} ({entry.kind})"
            yield _wiki_page(identifier + 1, 0, short, f"#REDIRECT [[{entry.name}]]", redirect=entry.name)
        if number % 5 == 0:
            talk = f"{{{{Talk header}}}}\nIs '''{entry.name}''' complete? ~~~~"
            yield _wiki_page(identifier + 2, 1, f"Talk:{entry.name}", talk)


def _wiki_page(identifier: int, namespace: int, title: str, text: str, redirect: str = "") -> str:
    target = f'    <redirect title="{html.escape(redirect)}" />\n' if redirect else ""
    return (
        f"  <page>\n    <title>{html.escape(title)}</title>\n    <ns>{namespace}</ns>\n    <id>{identifier}</id>\n"
        f"{target}    <revision>\n      <id>{identifier}</id>\n      <timestamp>{DATE}</timestamp>\n"
        "      <model>wikitext</model>\n      <format>text/x-wiki</format>\n"
        f'      <text xml:space="preserve">{_xml(text)}</text>\n    </revision>\n  </page>\n'
    )


def _xml(text: str) -> str:
    return html.escape(re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", " ", text), quote=False)


def _article(entry: Entry, near: Entry) -> str:
    module, _, last = entry.name.rpartition(".")
    source = f"<ref>{{{{cite web |url={SITE}{entry.name}.html |title={last}}}}}</ref>"
    place = f" in the module ''[[{module}]]''" if module else " of the [[standard library]]"
    parts = [
        f"{{{{Infobox software |name={last} |kind={entry.kind} |language={{{{flag|Python}}}}}}}}\n"
        f"'''{last}''' is a {entry.kind}{place}.{source}",
        *map(_wiki, _paragraphs(entry.doc)),
    ]
    for member in entry.members:
        if member.doc or member.code:
            parts.append(f"== {_wiki((member.signature.partition('(')[0], False))} ==")
            parts.append(f"<code><nowiki>{member.signature}</nowiki></code>")
            parts += map(_wiki, _paragraphs(member.doc))
            parts += [f'<syntaxhighlight lang="python">\n{member.code}\n</syntaxhighlight>'] if member.code else []
    parts += [f"== See also ==\n* [[{near.name}]]", "== References ==\n{{reflist}}"]
    parts.append(f'{{| class="wikitable"\n! name !! kind\n|-\n| {last} || {entry.kind}\n|}}')
    parts.append(f"[[Category:{entry.kind.capitalize()}]]")
    return "\n\n".join(parts)


def _wiki(paragraph: tuple[str, bool]) -> str:
    text, laid_out = paragraph
    if laid_out:
        return f"<pre>\n{text}\n</pre>"
    if not re.search(r"[\[\]{}<>|]|''|^[*#:;= ]", text, re.MULTILINE):
        return text
    return f"<nowiki>{text.replace('</nowiki', '')}</nowiki>"


# --- books ----------------------------------------------------------------------------------------------------------


def _write_books(folder: Path, entries: list[Entry], wanted: int) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    total = 0
    for number, volume in enumerate(_volumes(entries)):
        text = "".join(volume)
        title = (
            f"Title: The Standard Library, Volume {number + 1}\n\nAuthor: Its docstrings\n\nYear: 2024\n\n-------\n\n"
        )
        book = title + text
        ends = book.replace("\n", "\r\n") if number % 2 else book
        (folder / f"volume-{number + 1:03d}.txt").write_bytes(ends.encode("utf-8", "replace"))
        total += len(text)
        if total >= wanted:
            break
    return total


def _volumes(entries: Iterable[Entry]) -> Iterator[list[str]]:
    chapters: list[str] = []
    for entry in entries:
        prose = list(_prose(entry))
        if not prose:
            continue
        name = entry.name.replace("_", "").upper()
        chapters.append(
            f"\n\nCHAPTER {len(chapters) + 1}. {name}\n\n" + "\n\n".join(prose) + "\n\n     *     *     *\n"
        )
        if sum(map(len, chapters)) >= VOLUME_BYTES:
            yield chapters
            chapters = []
    if chapters:
        yield chapters


def _prose(entry: Entry) -> Iterator[str]:
    """Paragraphs of running text, broken into lines, with what is quoted in italics."""
    for doc in (entry.doc, *entry.comments, *(m.doc for m in entry.members)):
        for text, _ in _paragraphs(doc):
            words = " ".join(text.split())
            letters = sum(c.isalpha() or c in " ,." for c in words)
            if ">>>" not in words and words.count(" ") > 3 and letters > 0.85 * len(words):
                words = re.sub(r"(?<!\w)'(\w[^'\n_]*\w)'(?!\w)", r"_\1_", words)
                yield textwrap.fill(words, WIDTH, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    for corpus, count in make_corpora(Path(sys.argv[1]), int(float(sys.argv[2]))).items():
        print(f"{corpus}: {count} bytes of text")
