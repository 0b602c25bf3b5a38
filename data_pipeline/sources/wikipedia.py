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

from configs import ConfigError
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
from data_pipeline.sources.notes import Noted

CLOSING_SECTIONS = [  # that hold links and sources, in the larger Wikipedias' languages
    "references", "external links", "see also", "further reading", "notes", "bibliography", "sources", "citations",
    "footnotes", "notes and references", "references and notes", "works cited",
    "einzelnachweise", "weblinks", "literatur", "siehe auch", "anmerkungen", "quellen",
    "références", "notes et références", "liens externes", "voir aussi", "bibliographie", "articles connexes",
    "referencias", "enlaces externos", "véase también", "bibliografía", "notas", "note", "collegamenti esterni",
    "voci correlate", "altri progetti", "bibliografia", "referências", "ligações externas", "ver também",
    "примечания", "ссылки", "литература", "см. также", "przypisy", "linki zewnętrzne", "zobacz też", "bronnen",
    "externe links", "zie ook", "脚注", "注釈", "出典", "外部リンク", "関連項目", "参考文献", "参考资料", "外部链接",
    "参见", "參考資料", "外部連結", "參見",
]  # fmt: skip


class Wikipedia(Noted):
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
    text = _COMMENT.sub("", wikitext.replace("\0", "").replace(GAP, ""))
    text = _fold_tags(text, verbatim)
    text = _without_tables(text)
    text = _EXTERNAL_LINK.sub(lambda m: m["label"] or GAP, text)
    text = _fold_brackets(text, file_prefixes, verbatim)
    text = _VARIANT.sub(_variant, text)
    text = _without_gaps(text)
    text = _BREAK_TAG.sub("\n", text)
    text = _ITEM_TAG.sub("\n* ", text)
    text = _TAG.sub("", text)
    text = _QUOTES.sub("", text)
    text = _MAGIC_WORD.sub("", text)
    text = _RAISED.sub(_raised, _STACKED.sub(_stacked, text))
    text = html.unescape(text)
    return verbatim.restore(_without_hollow_sections(_lines(_typeset(text)), leave_out)).strip()


GAP = "\1"  # where something was left out, until it is clear what to do with the space around it; XML cannot hold any
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_VERBATIM = ["nowiki", "math", "chem", "ce", "pre", "syntaxhighlight", "source"]
_LEFT_OUT = (
    "ref|references|gallery|timeline|imagemap|score|graph|mapframe|maplink|hiero|inputbox|categorytree|templatestyles"
    "|section|includeonly|indicator|templatedata"
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
_TAG = re.compile(r"</?(?!su[bp]\b)[a-zA-Z][a-zA-Z0-9]*(?:\s[^<>]*)?/?>")
_QUOTES = re.compile("''+")
_MAGIC_WORD = re.compile(r"__[^\W\da-z]{3,40}?__")
_SPACES, _SPACE_BEFORE = re.compile("  +"), (re.compile(r" ,(?=\s|\Z)"), re.compile(r" \.(?=\s|\Z)"))


def _typeset(text: str) -> str:
    """Without the spaces that many authors leave, and gaps: two in a row, before a comma, inside of parentheses.

    (Every pattern begins with two characters of its own: one for each space would take as long as all the rest.)
    """
    text = _SPACES.sub(lambda m: m[0] if text[m.start() - 1 : m.start()] in ("", "\n") else " ", text)
    for pattern in _SPACE_BEFORE:
        text = pattern.sub(lambda m: m[0][1:], text)
    return text.replace(" )", ")").replace("( ", "(")


def _without_gaps(text: str) -> str:
    """Close the gaps that templates without text, files and references left: in "( , x)", in "word ." and the like."""
    pieces = re.sub(f"{GAP}(?:[ \xa0]*+{GAP})++", GAP, text).split(GAP)
    whole = pieces[:1]
    for right in pieces[1:]:
        left, next = whole[-1], right.lstrip(" \xa0")
        after = next.lstrip(" \xa0;,:")
        if left.rstrip(" \xa0;,:/").endswith("("):
            left = left.rstrip(" \xa0;,:/")
            right = re.sub(r"^[ \xa0;,:/]*+(?:(?:or|and)[ \xa0]+)?", "", right)
            if right.startswith(")"):
                left, right = left[:-1].rstrip(" \xa0"), right[1:]
        elif after.startswith(")"):
            left, right = left.rstrip(" \xa0;,:"), after
        elif next[:1] in {",", ".", ";", ":", "!", "?"} and left.strip():
            left, right = left.rstrip(" \xa0"), next
            if next[0] == "," and left.endswith(","):
                right = next[1:]
        elif left[-1:] in {"", " ", "\xa0", "\n"}:
            right = next
        whole[-1] = left
        if right:  # else this gap and the next are one
            whole.append(right)
    return "".join(whole)


_VARIANT = re.compile(r"-\{([^{}]*)\}-")
_VARIANT_OF = re.compile(r"\s*([a-z]{2,3}(?:-[a-z]+)*)\s*:(?!//)\s*(.*)", re.DOTALL)


def _variant(match: re.Match[str]) -> str:
    """-{zh-hans:x;zh-hant:y}-: of a text in several scripts the first, or the simplified one.

    https://www.mediawiki.org/wiki/Writing_systems/Syntax
    """
    flags, bar, text = match[1].rpartition("|")
    if bar and set(flags.upper().replace(" ", "")) & set("HT-"):
        return ""
    found = [_VARIANT_OF.fullmatch(rule) for rule in text.split(";") if rule.strip()]
    texts = {rule[1]: rule[2].strip() for rule in found if rule is not None}
    if not texts or None in found:
        return text
    return next((texts[code] for code in ("zh-hans", "zh-cn") if code in texts), next(iter(texts.values())))


_STACKED = re.compile(r"<sup>(\d+)</sup>[/⁄]<sub>(\d+)</sub>")
_RAISED = re.compile(r"<(su[bp])\b[^<>]*>([^<>]*)</\1\s*>|</?su[bp]\b[^<>]*>", re.IGNORECASE)


def _stacked(match: re.Match[str]) -> str:
    """A fraction: 1 3/4."""
    is_mixed = match.string[match.start() - 1 : match.start()].isdigit()
    return f"{' ' if is_mixed else ''}{match[1]}/{match[2]}"


def _raised(match: re.Match[str]) -> str:
    """Raised and lowered text: km², 10^24, x^{n+1}; H2O, v_max, C_{2n}; 1st."""
    text = html.unescape(match[2] or "").strip()
    before = match.string[match.start() - 1] if match.start() else " "
    if not text or text.startswith("["):  # a note's mark
        return ""
    if match[1].lower() == "sup":
        if text in ("2", "3") and before not in " \n(":
            return "²³"[text == "3"]
        is_word = text.isalpha() and (len(text) > 1 or (before.isdigit() and text in "eaoéº"))
        if is_word or not (before.isalnum() or before in ")]}'’|>") or not any(map(str.isalnum, text)):
            return text
        mark = "^"
    else:
        if re.fullmatch(r"\d*(?:\([a-z ]+\))?", text) and not before.isdigit():  # H2O(l)
            return text
        mark = "_"
    return mark + (text if re.fullmatch(r"[+−-]?(?:[\d.]+|[^\W\d]\w*)[+−-]?", text) else f"{{{text}}}")


@dataclass
class Verbatim:
    """Text that markup rules must not touch: it stands aside under a number between NULs (XML cannot hold any)."""

    texts: list[str] = field(default_factory=list)

    def keep(self, text: str) -> str:
        self.texts.append(text)
        return f"\0{len(self.texts) - 1}\0"

    def keep_tag(self, name: str, inner: str) -> str:
        if name in ("math", "chem", "ce"):
            inner = " ".join(inner.split())
            inner = f"${inner}$" if inner and name == "math" else inner
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
            if tag["alone"]:
                kept.append(GAP)
        elif tag["close"] and name == opened:
            kept.append(verbatim.keep_tag(name, text[end : tag.start()]) if name in _VERBATIM else GAP)
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
            stack[-1][1].append((_template(whole, verbatim) or GAP) if opening == "{{" else _link(whole, file_prefixes))
        else:
            stack[-1][1].append(piece)
    return "".join(piece for _, pieces in stack for piece in pieces)


_LANGUAGE_PREFIX = re.compile(r"[a-z]{2,3}(?:-[a-z]+)*:|simple:")
_FILE = re.compile(  # under any name of the File namespace, of which dumps list only one
    r"[^:|]+:[^|]+\.(?:jpe?g|png|svg|gif|tiff?|webp|og[agv]|webm|mp3|wav|flac|opus|mid|pdf|djvu|stl)", re.IGNORECASE
)


def _link(inner: str, file_prefixes: frozenset[str]) -> str:
    target, pipe, label = inner.partition("|")
    target = target.strip()
    prefix = target.partition(":")[0].strip().lower()
    if prefix in file_prefixes or _LANGUAGE_PREFIX.match(target) or _FILE.fullmatch(target):
        return GAP
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
    if name.startswith(("lang-", "script/")) and name not in _TEMPLATES:
        name = "lang-xx"
    render = _TEMPLATES.get(name)
    if render is None:
        return ""
    positional: list[str] = []
    named: dict[str, str] = {}
    for argument in rest.split("|"):
        key, equals, value = argument.partition("=")
        if equals and re.fullmatch(r"\s*[\w -]{1,20}\s*", key):
            named[key.strip().lower()] = value.strip(_BLANK)
        else:
            positional.append(argument.strip(_BLANK))
    numbered = itertools.takewhile(lambda n: str(n) in named, itertools.count(len(positional) + 1))
    positional += [named[str(n)] for n in numbered]
    return render(positional, named)


_BLANK = " \t\n\xa0" + GAP

Render = Callable[[list[str], dict[str, str]], str]


def _at(index: int) -> Render:
    return lambda args, named: args[index] if -len(args) <= index < len(args) else ""


def _joined(separator: str) -> Render:
    return lambda args, named: separator.join(filter(None, args))


_NUMBER = re.compile(r"[-−+]?[\d.,/+⁄ e]+")
_RANGES = {
    "-": "–", "–": "–", "to": " to ", "to(-)": " to ", "and": " and ", "or": " or ", "x": " × ", "by": " by ",
    "+/-": " ± ", "±": " ± ",
}  # fmt: skip
_SMALLER_UNIT = {"mi": "yd", "yd": "ft", "ft": "in", "foot": "in", "st": "lb", "lb": "oz"}
_UNITS = {
    "C": "°C", "F": "°F", "sqmi": "sq mi", "sqft": "sq ft", "cuft": "cu ft", "km2": "km²", "m2": "m²", "cm2": "cm²",
    "km3": "km³", "m3": "m³", "cm3": "cm³", "kph": "km/h", "ft2": "sq ft", "mi2": "sq mi",
}  # fmt: skip


def _convert(args: list[str], named: dict[str, str]) -> str:
    """{{convert|5|to|8|km|mi}}, {{convert|6|ft|2|in|m}}: the numbers and their units, as written."""
    text, unit = "", ""
    for i, arg in enumerate(args):
        if unit:
            if not _NUMBER.fullmatch(arg) or args[i + 1 : i + 2] != [_SMALLER_UNIT.get(unit)]:
                break
            text, unit = f"{text} {arg}", ""
        elif _NUMBER.fullmatch(arg):
            text += arg
        elif arg in _RANGES and text:
            text += _RANGES[arg]
        elif text:
            text, unit = f"{text} {_UNITS.get(arg, arg)}", arg
        else:
            break
    return text


def _val(args: list[str], named: dict[str, str]) -> str:
    """{{val|5.0|0.1|e=3|u=km|up=s}}: 5.0 ± 0.1 × 10^3 km/s."""
    text = named.get("p", "") + "".join(args[:1])
    for before, arg in itertools.pairwise(args):
        text += _RANGES.get(arg) or (arg if before in _RANGES else f" ± {arg}")
    text += f" × 10^{named['e']}" if named.get("e") else ""
    unit, per = (named.get(key) or named.get(f"{key}l") or "" for key in ("u", "up"))
    return text + (f" {unit}" if unit else "") + (f"/{per}" if per else "") + named.get("s", "")


def _chem(args: list[str], named: dict[str, str]) -> str:
    """{{chem|SO|4|2-}}: elements, how many of each, charges."""
    text = ""
    for arg in args:
        if re.match(r"[A-Z(\[]", arg):
            text += arg
        elif arg:
            text += f"<sup>{arg}</sup>" if re.fullmatch(r"\d*[-+−]", arg) else f"<sub>{arg}</sub>"
    return text


def _cited(args: list[str], named: dict[str, str]) -> str:
    """{{harvtxt|Knuth|Plass|1981}}: a source that is named in a sentence."""
    years = [arg for arg in args if re.fullmatch(r"(?:c\. )?\d{3,4}[a-z]?", arg)]
    return " & ".join(arg for arg in args if arg not in years) + (f" ({', '.join(years)})" if years else "")


def _height(args: list[str], named: dict[str, str]) -> str:
    return " ".join(f"{named[unit]} {unit}" for unit in ("m", "cm", "ft", "in") if named.get(unit))


def _names(args: list[str], named: dict[str, str]) -> str:
    """Of {{zh}} and {{korean}}: the same word in several scripts."""
    keys = ("c", "s", "t", "hangul", "hanja", "p", "rr", "mr", "w", "j", "l")
    return ", ".join(dict.fromkeys([*filter(None, args), *(named[key] for key in keys if named.get(key))]))


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


def _around(before: str, after: str) -> Render:
    return lambda args, named: f"{before}{args[0]}{after}" if args and args[0] else ""


_FIRST = [  # templates that show their first argument
    "nowrap", "nobr", "nobreak", "nowrap inline", "small", "smaller", "big", "large", "larger", "sc", "smallcaps",
    "abbr", "tooltip", "ill", "interlanguage link", "link-interwiki", "nts", "dts", "formatnum:", "ipa",
    "vanchor", "visible anchor", "math", "mvar", "mono", "code", "em", "strong", "keypress", "key", "pre", "kbd",
    "xt", "mxt", "tq", "var", "strike", "center", "block indent", "nobold", "noitalic", "not a typo", "typo", "sic",
    "bibleverse", "linktext", "ship", "hms", "uss", "ss", "midsize", "resize", "longitem", "flatlist", "plainlist",
    "flag", "flagcountry", "flagu", "lang-xx", "poem", "unicode", "iast", "polytonic", "hebrew", "nastaliq", "arabic",
    "greek", "serif", "gregorian serif", "underline", "overline", "italic", "bold", "columns-list", "cast listing",
    "col-list", "text", "chem name", "chem2", "starttab", "strong", "sronly", "title case", "lc:", "uc:", "ucfirst:",
    "lcfirst:", "proper name",
]  # fmt: skip
_TEMPLATES: dict[str, Render] = {
    **dict.fromkeys(_FIRST, _at(0)),
    **dict.fromkeys(["lang", "langx", "script", "color", "font color", "rtl-lang", "wikt-lang", "native name"], _at(1)),
    **dict.fromkeys(["transl", "transliteration", "tlit", "font", "colored link"], _at(-1)),
    **dict.fromkeys(["convert", "cvt"], _convert),
    **dict.fromkeys(["quote", "quotation", "blockquote", "bquote", "cquote", "poemquote"], _quotation),
    **dict.fromkeys(["quote box", "quotebox"], _quotation),
    **dict.fromkeys(["frac", "fraction", "sfrac"], _fraction),
    **dict.fromkeys(["nuclide", "nuclide2", "simplenuclide", "simplenuclide2"], _joined("-")),
    **dict.fromkeys(["hlist", "comma separated entries", "cslist"], _joined(", ")),
    **dict.fromkeys(["unbulleted list", "ubl", "bulleted list", "plain list", "ordered list"], _listed),
    **dict.fromkeys(["zh", "lang-zh", "korean", "lang-ko"], _names),
    **dict.fromkeys(["circa", "c.", "ca."], lambda args, named: " ".join(["c.", *args[:1]])),
    **dict.fromkeys(["floruit", "fl."], lambda args, named: "fl. " + "–".join(args[:2])),
    **dict.fromkeys(["as of", "asof"], _as_of),
    **dict.fromkeys(["harvtxt", "harvcoltxt", "sfnt", "citet"], _cited),
    **dict.fromkeys(["angbr", "angle bracket", "angbr ipa", "vr"], _around("⟨", "⟩")),
    **dict.fromkeys(["lit", "lit.", "literal translation", "literally"], _around("lit. '", "'")),
    **dict.fromkeys(["sub", "su"], _around("<sub>", "</sub>")),
    **dict.fromkeys(["us$", "usd"], _around("US$", "")),
    **dict.fromkeys(["gbp", "£"], _around("£", "")),
    **dict.fromkeys(["euro", "eur", "€"], _around("€", "")),
    **dict.fromkeys(["jpy", "yen", "¥"], _around("¥", "")),
    **dict.fromkeys(["inr", "indian rupee", "₹"], _around("₹", "")),
    **dict.fromkeys(
        ["railgauge", "track gauge"], lambda args, named: re.sub(r"(?<=\d)(?=[a-z])", " ", "".join(args[:1]))
    ),
    "a$": _around("A$", ""),
    "c$": _around("C$", ""),
    "nz$": _around("NZ$", ""),
    "sup": _around("<sup>", "</sup>"),
    "sqrt": _around("√(", ")"),
    "radic": _around("√(", ")"),
    "abs": _around("|", "|"),
    "e": _around("×10<sup>", "</sup>"),
    "gloss": _around("'", "'"),
    "term": _around("\n; ", "\n"),
    "defn": _around("\n: ", "\n"),
    "nihongo": _nihongo,
    "chem": _chem,
    "val": _val,
    "gaps": _joined(""),
    "height": _height,
    "reign": _joined("–"),
    "music": lambda args, named: {"flat": "♭", "b": "♭", "sharp": "♯", "#": "♯", "natural": "♮"}.get(
        "".join(args[:1]), ""
    ),
}
_SYMBOLS = {
    "!": "|", "=": "=", "'s": "'s", "'": "'", "(": "{", ")": "}", "((": "{{", "))": "}}", "times": "×", "minus": "−",
    "nbsp": " ", "spaces": " ", "space": " ", "thinsp": " ", "thin space": " ", "hair space": " ", "hsp": " ",
    "snd": " – ", "spnd": " – ", "spaced ndash": " – ", "spaced en dash": " – ", "ndash": "–", "en dash": "–", "–": "–",
    "mdash": "—", "—": "—", "em dash": "—", "mdashb": "—", "snds": " – ", "·": " · ", "•": " • ", "bull": " • ",
    "dot": " · ", "middot": " · ", "sdot": "⋅", "pi": "π", "mu": "μ", "degree": "°", "dagger": "†", "eqm": "⇌",
    "double dagger": "‡", "ellipsis": "…", "...": "…", "' \"": "'\"", "\" '": "\"'", "'\"": "'\"", "\"'": "\"'",
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
    if marks[-1] == "*":
        return f"{indent}- {text}"
    if marks[-1] == ";":  # ; term : its definition, on one line
        text = re.sub(r"(?<=\S)\s+:\s+", ": ", text, count=1)
    return (indent or "  " * (depth - 1)) + text


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
