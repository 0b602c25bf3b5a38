"""Wikipedia: a pages-articles dump (MediaWiki export XML, schema 0.10 or 0.11; plain, gzip or bzip2, also multistream).

    https://www.mediawiki.org/wiki/Help:Export
    https://www.mediawiki.org/wiki/Help:Formatting

A page of the article namespace that is not a redirect becomes a document: its title, then its text with headings as
lines of their own and lists as lines. Templates that carry text give it; others, tables, references, files and
categories are left out; formulas stay as their TeX source.
"""

from __future__ import annotations

import calendar
import html
import itertools
import re
import urllib.parse
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from configs import ConfigError, Section
from data_pipeline.document import Document
from data_pipeline.sources import bzip2
from data_pipeline.sources.inputs import (
    MAX_DOCUMENT_BYTES,
    READ_BYTES,
    Content,
    Damage,
    Input,
    OnDamage,
    Part,
    Reading,
    find_inputs,
)

CLOSING_SECTIONS = ["references", "external links", "see also", "further reading", "notes", "bibliography", "sources"]


class Wikipedia(Section):
    """Pages-articles dumps: files, folders or patterns of `.xml`, `.xml.bz2`, `.xml.gz`, also `.xml-p1p999.bz2`."""

    kind: Literal["wikipedia"] = "wikipedia"
    paths: list[str]
    leave_out_sections: list[str] = CLOSING_SECTIONS  # by heading, in lower case; with all that is below them
    on_damage: OnDamage = "skip"

    version: ClassVar[int] = 2  # raised when the same dump would give other text

    def inputs(self) -> list[Input]:
        """The dump files, sorted by name. Raises ConfigError where a path leads to none.

        Indexes and tables that lie beside dumps are passed over.
        """
        found = find_inputs(self.paths, (".xml", ".bz2", ".gz", ".txt"))
        dumps = [input for input in found if _DUMP.search(input.name)]
        if not dumps:
            raise ConfigError(f"paths: {found[0].name}: not a dump; expected a name that ends with .xml or .xml.bz2")
        return dumps

    def can_split(self, input: Input) -> bool:
        """Whether ranges of its bytes can be read by themselves."""
        return not input.name.endswith(".gz")

    def text_bytes(self, input: Input) -> float:
        """About how many bytes of text an input gives: half of its XML, more than the size of packed XML."""
        return input.bytes * (0.5 if input.name.endswith(".xml") else 1.7)

    def read(self, reading: Reading) -> Iterator[Document]:
        """The articles of a dump, or those that begin in the part's range of it, in its order."""
        try:
            dump = _read_head(reading.part.input)
            for offset, xml in _pages(reading):
                document = self._document(xml, offset, dump, reading)
                if document is not None:
                    yield document
        except Damage as damage:
            reading.damaged(damage)

    def _document(self, xml: bytes, offset: int, dump: Dump, reading: Reading) -> Document | None:
        try:
            page = _page(xml)
        except ElementTree.ParseError as error:
            _lose_page(reading, offset, f"not XML ({error})")
            return None
        if page.namespace != "0" or page.redirect:
            reading.set_aside["redirect" if page.redirect else "other namespace"] += 1
            return None
        if page.model not in ("", "wikitext"):
            reading.set_aside["not wikitext"] += 1
            return None
        try:
            text = plain_text(page.wikitext, dump.file_prefixes, frozenset(self.leave_out_sections))
        except (ValueError, RecursionError) as error:
            reading.put_aside(f"unreadable wikitext ({type(error).__name__})", f"page {page.id} ({page.title})")
            return None
        meta: dict[str, str | int] = {"input": reading.part.input.name, "offset": offset}
        meta |= {"title": page.title} | ({"language": dump.language} if dump.language else {})
        return Document(f"{page.title}\n\n{text}", page.id, reading.source, dump.address(page.title), meta)


_DUMP = re.compile(r"\.xml(?:-p\d+p\d+)?(?:\.bz2|\.gz)?$")


# --- the dump -------------------------------------------------------------------------------------------------------


def _pieces(reading: Reading) -> Iterator[tuple[int, bytes | None]]:
    """The content of a dump, from where its reading stands to the end of the file.

    Each piece with the byte of the file where it begins (of a packed file: where its block or member begins); None
    where content is missing.
    """
    name = reading.part.input.name
    if name.endswith(".bz2"):
        yield from bzip2.blocks(reading.read, reading.position)
    elif name.endswith(".gz"):
        content = Content(reading)
        while data := content.read():
            yield content.offset(content.position - len(data)), data
    else:
        while data := reading.read(READ_BYTES):
            yield reading.position - len(data), data


_PAGE, _PAGE_END, _DUMP_END = b"<page>", b"</page>", b"</mediawiki>"  # in text, `<` is written `&lt;`


def _pages(reading: Reading) -> Iterator[tuple[int, bytes]]:
    """(byte of the file, XML) of each page that begins in the part; memory is bounded by one page.

    Of the bytes behind the part as many are read as its last page needs. What is damaged is set aside and read past;
    raises Damage where the file ends too early.
    """
    stop = reading.stop
    is_plain = reading.part.input.name.endswith(".xml")
    held, held_from = bytearray(), 0  # a page not yet whole, or what may be the start of its tag
    last = b""
    for offset, data in _pieces(reading):
        if offset >= stop and not held:
            return
        if data is None:
            if offset < stop:
                reading.damaged(Damage(offset, "not a whole bzip2 block"), "damaged block", "the rest")
            if held.startswith(_PAGE):
                _lose_page(reading, held_from, "part of it is missing")
            held.clear()
            last = _DUMP_END  # may have been here
            continue
        shift = offset - len(held) if is_plain else offset  # from a place in `held` to the byte of the file
        old, begin = len(held), 0
        held += data
        last = (last + data)[-64:]
        while (begin := held.find(_PAGE, begin)) >= 0:
            place = held_from if begin < old else shift + begin * is_plain
            if place >= stop:
                return
            end = held.find(_PAGE_END, max(begin, old - len(_PAGE_END)))
            if end < 0:
                break
            end += len(_PAGE_END)
            yield place, bytes(held[begin:end])
            begin = end
        if begin < 0:
            begin = _open_tag(held)
        elif len(held) - begin > MAX_DOCUMENT_BYTES:
            reading.put_aside("page too large", f"page at byte {place}")
            begin = len(held)
        held_from = held_from if begin < old else shift + begin * is_plain
        del held[:begin]
    if held.startswith(_PAGE):
        raise Damage(held_from, "the file ends inside this page")
    if last and _DUMP_END not in last:
        raise Damage(reading.position, "the file ends without </mediawiki>")


def _open_tag(data: bytearray) -> int:
    """Where the start of a tag that may become `<page>` ends `data`; its length where there is none."""
    begin = data.rfind(b"<", max(0, len(data) - len(_PAGE) + 1))
    return begin if begin >= 0 and _PAGE.startswith(data[begin:]) else len(data)


def _lose_page(reading: Reading, offset: int, why: str) -> None:
    reading.damaged(Damage(offset, f"a page: {why}"), "damaged page", "the rest")


@dataclass
class Dump:
    """What the head of a dump says."""

    language: str = ""
    base: str = ""  # of page addresses, up to and with the last slash
    file_prefixes: frozenset[str] = frozenset({"file", "image", "media", "category"})

    def address(self, title: str) -> str:
        return self.base + urllib.parse.quote(title.replace(" ", "_"), safe="/:@!$&'()*+,;=-._~")


MAX_HEAD_BYTES = 2**20
_OUT = {"-2", "6", "14"}  # Media, File, Category: links to them are not text


def _read_head(input: Input) -> Dump:
    """What a file's head says, which every range of it needs. Raises Damage for what is not a dump."""
    head = b""
    with Reading(Part(input), "") as file:
        if input.name.endswith(".bz2") and not re.match(rb"BZh[1-9]", magic := file.read(4)):
            raise Damage(0, "not a bzip2 file" if magic else "empty file")
        for _, data in _pieces(file):
            if data is None:
                return Dump()  # damaged, which is counted when it is read for its pages
            head += data
            if b"</siteinfo>" in head or _PAGE in head or len(head) > MAX_HEAD_BYTES:
                break
    parser: Any = ElementTree.XMLPullParser(("start", "end"))
    dump, root = Dump(), ""
    try:
        parser.feed(head.partition(_PAGE)[0][:MAX_HEAD_BYTES])
        for event, element in parser.read_events():
            tag = element.tag.rpartition("}")[2]
            if not root:
                root = tag
                dump.language = element.get("{http://www.w3.org/XML/1998/namespace}lang", "")
            elif event == "end" and tag == "siteinfo":
                dump.base = (element.findtext("{*}base") or "").rpartition("/")[0] + "/"
                spaces = element.iterfind("{*}namespaces/{*}namespace")
                dump.file_prefixes |= {e.text.lower() for e in spaces if e.get("key") in _OUT and e.text}
    except ElementTree.ParseError as error:
        raise Damage(0, f"not XML ({error})") from None
    if root != "mediawiki":
        raise Damage(0, f"expected a <mediawiki> export, got {f'<{root}>' if root else 'no XML'}")
    return dump


@dataclass
class Page:
    title: str = ""
    namespace: str = ""
    id: str = ""
    redirect: bool = False
    model: str = ""
    wikitext: str = ""


_REDIRECT = re.compile(r"\s*#[^\s\[\]:]+\s*:?\s*\[\[[^\[\]\n]+\]\]")  # `#REDIRECT [[x]]`, in any language


def _page(xml: bytes) -> Page:
    """Raises ParseError."""
    page = Page()
    for child in ElementTree.fromstring(xml):
        match child.tag:
            case "title":
                page.title = child.text or ""
            case "ns":
                page.namespace = child.text or ""
            case "id":
                page.id = child.text or ""
            case "redirect":
                page.redirect = True
            case "revision":
                page.model = child.findtext("model") or ""
                page.wikitext = child.findtext("text") or ""
    page.redirect |= _REDIRECT.match(page.wikitext) is not None
    return page


# --- wikitext to text -----------------------------------------------------------------------------------------------


def plain_text(wikitext: str, file_prefixes: frozenset[str], leave_out: frozenset[str]) -> str:
    """The text that a reader of the page sees, without what only its layout makes readable.

    One pass over the brackets, innermost first, so that cost is linear and nothing is recursive; unbalanced brackets
    stay as text. (mwparserfromhell builds a tree of Python objects at 1 MB/s; this takes a fraction of that.)
    """
    verbatim = Verbatim()
    text = _COMMENT.sub("", wikitext.replace("\0", ""))
    text = _fold_tags(text, verbatim)
    text = _without_tables(text)
    text = _EXTERNAL_LINK.sub(lambda m: m["label"] or "", text)
    text = _fold_brackets(text, file_prefixes, verbatim)
    text = _BREAK_TAG.sub("\n", text)
    text = _ITEM_TAG.sub("\n* ", text)
    text = _TAG.sub("", text)
    text = _QUOTES.sub("", text)
    text = _MAGIC_WORD.sub("", text)
    text = html.unescape(text)
    for hollow, instead in _HOLLOWS:
        text = hollow.sub(instead, text)
    return verbatim.restore(_without_hollow_sections(_lines(text), leave_out)).strip()


_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_VERBATIM = ["nowiki", "math", "chem", "pre", "syntaxhighlight", "source"]
_LEFT_OUT = (
    "ref|references|gallery|timeline|imagemap|score|graph|mapframe|maplink|hiero|inputbox|categorytree|templatestyles"
    "|section"
)
_BLOCK_TAG = re.compile(
    rf"<(?P<close>/?)(?P<name>{'|'.join(_VERBATIM)}|{_LEFT_OUT})\b[^<>]*?(?P<alone>/?)>", re.IGNORECASE
)
_EXTERNAL_LINK = re.compile(
    r"\[(?:https?:|ftps?:|mailto:|news:|irc:)?(?://)[^\s\[\]<>]*(?:[ \t]+(?P<label>[^\[\]\n]*))?\]"
)
_BREAK_TAG = re.compile(
    r"<(?:br|hr|/?p|/?div|/?blockquote|/?center|/?poem|/?[ou]l|/?dl|/dd|/dt)\b[^<>]*>", re.IGNORECASE
)
_ITEM_TAG = re.compile(r"<(?:li|dd|dt)\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][a-zA-Z0-9]*(?:\s[^<>]*)?/?>")
_QUOTES = re.compile(r"'{2,}")
_MAGIC_WORD = re.compile(r"__[A-Z]{3,}__")
_HOLLOWS = [  # what templates without text leave in their sentence
    (re.compile(r"\([ \xa0]*(?:(?:[;,:/]|or|and)[ \xa0]+)*"), "("),
    (re.compile(r"(?<![ \xa0;,])[ \xa0;,]++\)"), ")"),
    (re.compile(r"[ \xa0]?\(\)"), ""),
    (re.compile(r"(?<![ \xa0])[ \xa0]++(?=[,.](?:\s|$))"), ""),
    (re.compile(r"(?<=\S)[ \t]{2,}"), " "),
]


@dataclass
class Verbatim:
    """Text that markup rules must not touch: it stands aside under a number between NULs (XML cannot hold any)."""

    texts: list[str] = field(default_factory=list)

    def keep(self, text: str) -> str:
        self.texts.append(text)
        return f"\0{len(self.texts) - 1}\0"

    def keep_tag(self, name: str, inner: str) -> str:
        if name in ("math", "chem"):
            inner = " ".join(inner.split())
        elif name != "nowiki":
            inner = inner.strip("\n")
        return self.keep(html.unescape(inner)) if inner else ""

    def restore(self, text: str) -> str:
        while "\0" in text:  # once for each level: a kept text may hold another
            text = re.sub(r"\0(\d+)\0", lambda m: self.texts[int(m[1])], text)
        return text


def _fold_tags(text: str, verbatim: Verbatim) -> str:
    """Put verbatim elements aside and leave others out, with all that is in them; a tag never closed is only a tag."""
    tags = list(_BLOCK_TAG.finditer(text))
    closing = Counter(tag["name"].lower() for tag in tags if tag["close"])  # those still to come
    kept, end, opened = [], 0, ""
    for tag in tags:
        name = tag["name"].lower()
        closing[name] -= bool(tag["close"])
        if not opened and not tag["close"] and (tag["alone"] or closing[name] > 0):
            kept.append(text[end : tag.start()])
            end = tag.end()
            opened = "" if tag["alone"] else name
        elif tag["close"] and name == opened:
            kept.append(verbatim.keep_tag(name, text[end : tag.start()]) if name in _VERBATIM else "")
            end, opened = tag.end(), ""
    return "".join([*kept, text[end:]])


_SECTION = re.compile(r"^==", re.MULTILINE)
_TABLE_EDGE = re.compile(r"^[ \t:*#;]*(?P<open>\{\|)|^[ \t:]*\|\}(?!\})", re.MULTILINE)


def _without_tables(text: str) -> str:
    """Tables may lie in tables; one that is never closed ends with the next heading."""
    kept, depth, begun, end = [], 0, 0, 0
    for edge in _TABLE_EDGE.finditer(text):
        if edge["open"]:
            if depth == 0:
                begun = edge.start()
                kept.append(text[end:begun])
            depth += 1
        elif depth > 0:
            depth -= 1
            end = edge.end()
    if depth > 0:
        heading = _SECTION.search(text, begun)
        end = heading.start() if heading else len(text)
    return "".join([*kept, text[end:]])


_BRACKETS = re.compile(r"(\{\{|\}\}|\[\[|\]\])")
_OPENING = {"}}": "{{", "]]": "[["}


def _fold_brackets(text: str, file_prefixes: frozenset[str], verbatim: Verbatim) -> str:
    """Replace each template and each link by its text, innermost first."""
    stack: list[tuple[str, list[str]]] = [("", [])]
    opened = Counter[str]()
    for piece in _BRACKETS.split(text):
        opening = _OPENING.get(piece)
        if piece in ("{{", "[["):
            stack.append((piece, []))
            opened[piece] += 1
        elif opening is not None and opened[opening]:
            inner: list[list[str]] = []  # from the last bracket back to the one that is closed; those between are text
            bracket = ""
            while bracket != opening:
                bracket, pieces = stack.pop()
                opened[bracket] -= 1
                inner.append(pieces)
            whole = "".join(itertools.chain(*reversed(inner)))
            stack[-1][1].append(_template(whole, verbatim) if opening == "{{" else _link(whole, file_prefixes))
        else:
            stack[-1][1].append(piece)
    return "".join(piece for _, pieces in stack for piece in pieces)


_LANGUAGE_PREFIX = re.compile(r"[a-z]{2,3}(?:-[a-z]+)*:|simple:")


def _link(inner: str, file_prefixes: frozenset[str]) -> str:
    target, pipe, label = inner.partition("|")
    target = target.strip()
    if target.partition(":")[0].strip().lower() in file_prefixes or _LANGUAGE_PREFIX.match(target):
        return ""
    if pipe and label.strip():
        return label
    target = target.lstrip(":#")
    return re.sub(r"\s*\([^()]*\)$", "", target) if pipe else target  # [[a (b)|]] shows a


def _template(inner: str, verbatim: Verbatim) -> str:
    """The text of a template that carries some in running prose, else nothing."""
    name, _, rest = inner.partition("|")
    name = re.sub(r"[\s_]+", " ", name).strip().lower()
    if name in _SYMBOLS:
        return verbatim.keep(_SYMBOLS[name])
    if name.startswith("lang-"):
        name = "lang-xx"
    render = _TEMPLATES.get(name)
    if render is None:
        return ""
    positional: list[str] = []
    named: dict[str, str] = {}
    for argument in rest.split("|"):
        key, equals, value = argument.partition("=")
        if equals and re.fullmatch(r"\s*[\w -]{1,20}\s*", key):
            named[key.strip().lower()] = value.strip()
        else:
            positional.append(argument.strip())
    numbered = itertools.takewhile(lambda n: str(n) in named, itertools.count(len(positional) + 1))
    positional += [named[str(n)] for n in numbered]
    return render(positional, named)


Render = Callable[[list[str], dict[str, str]], str]


def _at(index: int) -> Render:
    return lambda args, named: args[index] if -len(args) <= index < len(args) else ""


def _joined(separator: str) -> Render:
    return lambda args, named: separator.join(filter(None, args))


def _convert(args: list[str], named: dict[str, str]) -> str:
    """{{convert|5|to|8|km|mi}}: the numbers and the first unit, as written."""
    ranges = {"-": "–", "–": "–", "to": " to ", "and": " and ", "or": " or ", "x": " × ", "by": " by ", "+/-": " ± "}
    text = ""
    for arg in args:
        if re.fullmatch(r"[-−+]?[\d.,/+⁄ e]+", arg):
            text += arg
        elif arg in ranges and text:
            text += ranges[arg]
        else:
            return f"{text} {arg}" if text else ""
    return text


def _nihongo(args: list[str], named: dict[str, str]) -> str:
    english, others = args[0] if args else "", ", ".join(filter(None, args[1:3]))
    return f"{english} ({others})" if english and others else english or others


def _quotation(args: list[str], named: dict[str, str]) -> str:
    text = named.get("text") or named.get("quote") or (args[0] if args else "")
    author = named.get("author") or named.get("sign") or (args[1] if len(args) > 1 else "")
    return "\n\n" + text + (f"\n— {author}" if author else "") + "\n\n"


def _fraction(args: list[str], named: dict[str, str]) -> str:
    return f"{args[0]} {args[1]}/{args[2]}" if len(args) > 2 else "/".join(args if len(args) > 1 else ["1", *args])


def _as_of(args: list[str], named: dict[str, str]) -> str:
    year, month, day = [*args[:3], "", "", ""][:3]
    named_month = calendar.month_name[int(month)] if month.isdigit() and int(month) <= 12 else month
    return named.get("alt") or " ".join(filter(None, ["as of" if "lc" in named else "As of", day, named_month, year]))


def _listed(args: list[str], named: dict[str, str]) -> str:
    return "\n" + "\n".join(f"* {arg}" for arg in args if arg) + "\n"


_FIRST = [  # templates that show their first argument
    "nowrap", "nobr", "nobreak", "small", "smaller", "big", "large", "larger", "sc", "smallcaps", "angbr",
    "angle bracket", "abbr", "tooltip", "ill", "interlanguage link", "val", "nts", "dts", "formatnum:", "ipa", "sub",
    "sup", "vanchor", "visible anchor", "math", "mvar", "mono", "code", "em", "strong", "keypress", "key", "pre",
    "xt", "mxt", "tq", "var", "strike", "center", "block indent", "nobold", "noitalic", "not a typo", "sic",
    "bibleverse", "linktext", "ship", "hms", "uss", "ss", "midsize", "resize", "longitem", "flatlist", "plainlist",
    "flag", "flagcountry", "lang-xx", "poem",
]  # fmt: skip
_TEMPLATES: dict[str, Render] = {
    **dict.fromkeys(_FIRST, _at(0)),
    **dict.fromkeys(["lang", "script", "color", "font color"], _at(1)),
    **dict.fromkeys(["transl", "transliteration", "font", "colored link"], _at(-1)),
    **dict.fromkeys(["convert", "cvt"], _convert),
    **dict.fromkeys(["quote", "quotation", "blockquote", "cquote", "quote box"], _quotation),
    **dict.fromkeys(["frac", "fraction", "sfrac"], _fraction),
    **dict.fromkeys(["chem", "chem2", "gaps", "nuclide", "simplenuclide2"], _joined("")),
    **dict.fromkeys(["hlist", "comma separated entries", "cslist"], _joined(", ")),
    **dict.fromkeys(["unbulleted list", "ubl", "bulleted list", "plain list"], _listed),
    **dict.fromkeys(["nihongo", "korean", "zh"], _nihongo),
    **dict.fromkeys(["circa", "c.", "ca."], lambda args, named: " ".join(["c.", *args[:1]])),
    **dict.fromkeys(["as of", "asof"], _as_of),
    "us$": lambda args, named: "US$" + "".join(args[:1]),
    "reign": _joined("–"),
}
_SYMBOLS = {
    "!": "|", "=": "=", "'s": "'s", "'": "'", "(": "{", ")": "}", "((": "{{", "))": "}}", "times": "×", "minus": "−",
    "nbsp": " ", "spaces": " ", "snd": " – ", "spnd": " – ", "spaced ndash": " – ", "ndash": "–", "–": "–",
    "mdash": "—", "—": "—", "em dash": "—", "·": " · ", "•": " • ", "dot": " · ", "pi": "π", "degree": "°",
}  # fmt: skip


# --- lines and sections ---------------------------------------------------------------------------------------------

_HEADING = re.compile(r"(?P<level>={1,6})\s*(?P<title>[^\n]*?)\s*(?P=level)\s*$")
_LIST = re.compile(r"(?P<marks>[*#:;]+)\s*(?P<text>.*)")
_RUINS = re.compile(r"\s*(?:\|[^|].*|\|\}.*|\{\|.*|!\s.*|-{4,}|[|!}\]]+)$")  # left of broken tables and templates


@dataclass(frozen=True)
class Line:
    text: str
    level: int = 0  # of a heading, from 1; 0 is running text


def _lines(text: str) -> Iterator[Line]:
    counters: list[int] = []
    for raw in text.split("\n"):
        line = raw.rstrip()
        heading = _HEADING.fullmatch(line) if line.startswith("=") else None
        item = _LIST.fullmatch(line)
        if item is None:
            counters.clear()
        if heading is not None and heading["title"]:
            yield Line(heading["title"], len(heading["level"]))
        elif item is not None:
            if item["text"]:
                yield Line(_list_item(item["marks"], item["text"], counters))
        elif not _RUINS.fullmatch(line):
            yield Line(line.lstrip() if line[:1] == " " else line)


def _list_item(marks: str, text: str, counters: list[int]) -> str:
    """`- ` before a bullet, its number before a numbered item, two spaces for each level above it."""
    depth = len(marks)
    del counters[depth:]
    counters.extend([0] * (depth - len(counters)))
    indent = "  " * sum(mark in "*#" for mark in marks[:-1])
    if marks[-1] == "#":
        counters[-1] += 1
        return f"{indent}{counters[-1]}. {text}"
    return f"{indent}- {text}" if marks[-1] == "*" else indent + text


def _without_hollow_sections(lines: Iterator[Line], leave_out: frozenset[str]) -> str:
    """Join lines; drop the sections to leave out, and headings that nothing follows but another of their level."""
    kept: list[Line] = []
    skipping = 0  # level of the section being left out
    for line in lines:
        if line.level:
            if skipping and line.level > skipping:
                continue
            skipping = line.level if line.text.lower() in leave_out else 0
            while kept and (not kept[-1].text or kept[-1].level >= line.level):
                kept.pop()
        if not skipping:
            kept.append(line)
    while kept and (not kept[-1].text or kept[-1].level):
        kept.pop()
    text = "\n".join(f"\n{line.text}\n" if line.level else line.text for line in kept)
    return re.sub(r"\n{3,}", "\n\n", text)
