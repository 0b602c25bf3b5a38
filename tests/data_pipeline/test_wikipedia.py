import bz2
import gzip
import hashlib
import itertools
import random
from collections import Counter
from pathlib import Path

import pytest

from configs import ConfigError
from data_pipeline.document import Document
from data_pipeline.sources.inputs import Input, InputError, Part, Reading, describe
from data_pipeline.sources.wikipedia import CLOSING_SECTIONS, Wikipedia, plain_text
from tests.data_pipeline.inputs import read, real, write_dump
from tests.data_pipeline.servers import Server

FILES = frozenset({"file", "image", "category", "datei"})


def text(wikitext: str) -> str:
    return plain_text(wikitext, FILES, frozenset(CLOSING_SECTIONS))


@pytest.mark.parametrize(
    ("wikitext", "plain"),
    [
        ("'''Bold''' and ''italic'' and '''''both'''''.", "Bold and italic and both."),
        ("A [[dog]]s and a [[cat (animal)|cat]] and [[x (y)|]].", "A dogs and a cat and x."),
        ("[[File:a.jpg|thumb|A [[nested]] caption]]Text[[Category:X]][[de:Hund]]", "Text"),
        ("[[Datei:a.jpg]]Text [[:Category:X]]", "Text Category:X"),
        ("See [https://e.org the site] and [https://e.org].", "See the site and."),
        ("One<ref name=a>{{cite web|url=x}}</ref> two<ref name=a /> three.", "One two three."),
        ("One<!-- hidden [[ {{ --> two.", "One two."),
        ("{{Infobox x|a={{b|c}}|d=[[e|f]]}}Text.", "Text."),
        ("It is {{convert|5|km|mi}} or {{convert|5|to|8|kg|lb}} off.", "It is 5 km or 5 to 8 kg off."),
        ("He said {{lang|fr|bonjour}} in {{lang-fr|Paris}}.", "He said bonjour in Paris."),
        ("{{nowrap|No}}, {{as of|2015|6|30}}, {{frac|1|2}}, {{chem|H|2|O}}.", "No, As of 30 June 2015, 1/2, H2O."),
        ("a {{=}} b {{!}} c {{ndash}} d", "a = b | c – d"),
        ("{{quote|To be.|Hamlet}}", "To be.\n— Hamlet"),
        ("Berlin ({{IPAc-en|b|ɜr}}; {{Audio|x.ogg|listen}}) is ( {{x}} ) a city {{y}}.", "Berlin is a city."),
        ("* one\n* two\n** three\n# first\n# second", "- one\n- two\n  - three\n1. first\n2. second"),
        ("Before.\n{| class=x\n| a || b\n{|\n| inner\n|}\n|}\nAfter.", "Before.\n\nAfter."),
        ("Before.\n{| never closed\n| a\n\n== Next ==\nAfter.", "Before.\n\nNext\n\nAfter."),
        ("So <math>E  = mc^2</math> and <nowiki>[[x]] ''y''</nowiki>.", "So $E = mc^2$ and [[x]] ''y''."),
        ('<syntaxhighlight lang="c">\nif (a[[0]]) {{ x; }}\n* y\n</syntaxhighlight>', "if (a[[0]]) {{ x; }}\n* y"),
        ("x<sub>2</sub><br/>y &amp; z&nbsp;&lt;", "x2\ny & z\xa0<"),
        ("__NOTOC__Text {{DISPLAYTITLE:x}}{{#if:a|b|c}}.", "Text."),
        ("Unclosed [[link and {{template here.", "Unclosed link and template here."),
        ("Stray ]] and }} stay.", "Stray ]] and }} stay."),
        ("A\n\n== Empty ==\n\n== Full ==\nB\n\n=== Sub ===\n\n== References ==\n{{reflist}}\n* x", "A\n\nFull\n\nB"),
        ("A\n== See also ==\n* [[b]]\n=== Below ===\nc\n== Kept ==\nd", "A\n\nKept\n\nd"),
        # formulas
        ("10<sup>24</sup> km<sup>2</sup>, x<sup>''n''+1</sup>, e<sup>{{mvar|x}}</sup>", "10^24 km², x^{n+1}, e^x"),
        ("H<sub>2</sub>O(l), C<sub>''n''</sub>H<sub>2''n''+2</sub>, v<sub>max</sub>, {{chem|C|n|H|2n}}",
         "H2O(l), C_nH_{2n+2}, v_max, C_nH_{2n}"),
        ("SO<sub>4</sub><sup>2−</sup>, H<sup>+</sup>, {{chem|SO|4|2-}}, HCl<sub>(aq)</sub>, 101<sub>2</sub>",
         "SO4^2−, H+, SO4^2-, HCl(aq), 101_2"),
        ("the 1<sup>st</sup>, le 2<sup>e</sup>, 3<sup>3</sup>/<sub>4</sub>, <sup>14</sup>C, x<sup>[1]</sup>",
         "the 1st, le 2e, 3 3/4, 14C, x"),
        (":<math>\n\\frac{1}{2}\n</math>\n<math display=block>a</math> <chem>H2O</chem>", "$\\frac{1}{2}$\n$a$ H2O"),
        ("{{math|''x'' {{=}} 1}} or {{math|1=y = {{sqrt|2}}}} or {{abs|z}}", "x = 1 or y = √(2) or |z|"),
        ("{{val|1.5|0.2|e=-3|ul=m|upl=s}}, {{val|30000|u=C}}, 3{{e|8}}, 2{{thinsp}}{{eqm}} x",
         "1.5 ± 0.2 × 10^-3 m/s, 30000 C, 3×10^8, 2 ⇌ x"),
        # templates
        ("{{convert|6|ft|2|in|m}} by {{convert|10|sqmi|km2}}, {{convert|4|x|6|m|ft}}",
         "6 ft 2 in by 10 sq mi, 4 × 6 m"),
        ("{{langx|fr|chien|lit=dog}}, {{lang-zh|s=狗|p=gǒu}}, {{harvtxt|Knuth|Plass|1981}} say.",
         "chien, 狗, gǒu, Knuth & Plass (1981) say."),
        ("letters {{vr|ai}}, {{angbr|b}}: one{{mdashb}}two", "letters ⟨ai⟩, ⟨b⟩: one—two"),
        ("A {{x|{{nowrap|{{y}} z}}}} b {{nowrap|c {{lang|de|[[d]]}}}}", "A b c d"),
        # what is left out leaves no holes, and what was there stays
        ("Call f() (and then g()) now{{fact}} .", "Call f() (and then g()) now."),
        ("(or {{x}}), ({{x}} or y), (y, {{x}}), ({{x}}, {{y}}; z), a {{x}}, b", "(or), (y), (y), (z), a, b"),
        ("Il dit : « oui » ; vrai ! {{x}}", "Il dit : « oui » ; vrai !"),
        ("One{{x}}, two, {{y}}, three; four ({{x}}{{y}}).", "One, two, three; four."),
        # lists
        ("; Term : its meaning\n; Other\n: its meaning\n:: below", "Term: its meaning\nOther\nits meaning\n  below"),
        ("{{term|One}}\n{{defn|1=The first.}}", "One\n\nThe first."),
        ("<gallery>\nFile:a.jpg|Caption\n</gallery>Text", "Text"),
        # languages
        ("中-{zh-hans:国; zh-hant:國}-人 -{A|zh-hant:x;zh-cn:y}--{T|zh:z}--{原文}-", "中国人 y原文"),
        ("[[Bild:a b.JPG|mini|Text]][[Immagine:x.svg]]Da [[:Bild:a.jpg|hier]]", "Da hier"),
        ("__KEIN_INHALTSVERZEICHNIS__Text __БЕЗ_ОГЛ__ und __init__", "Text und __init__"),
        ("A\n== Einzelnachweise ==\n<references />\n* x\n== Weblinks ==\n* y", "A"),
        ("&mdash; &#8212; &amp;lt; &hellip;<includeonly>x</includeonly>", "— — &lt; …"),
    ],
)  # fmt: skip
def test_wikitext_becomes_readable(wikitext: str, plain: str) -> None:
    assert text(wikitext) == plain


def test_hostile_pages_cost_no_more_than_others() -> None:
    assert len(text("{{" * 100_000 + "x")) == 1
    assert text("[[a|" * 50_000 + "x" + "]]" * 50_000) == "x"
    assert text("<ref>" * 100_000 + "x") == text("<math>x" + "<ref>" * 100_000) == "x"
    assert text("x" + " " * 500_000 + "y" + " ;" * 200_000 + "z") == "x y" + " ;" * 200_000 + "z"
    assert text("{|\n" * 50_000 + "x") == ""


@pytest.mark.parametrize("packing", ["", ".bz2", ".gz", "multistream"])
def test_articles_and_nothing_else(tmp_path: Path, packing: str) -> None:
    dump = bz2.decompress(write_dump(tmp_path / "d", 5, 1).read_bytes())
    third = len(dump) // 3
    data = {
        "": dump,
        ".bz2": bz2.compress(dump),
        ".gz": gzip.compress(dump),
        "multistream": bz2.compress(dump[:third])
        + bz2.compress(dump[third : 2 * third])
        + bz2.compress(dump[2 * third :]),
    }[packing]
    path = tmp_path / f"pages-articles.xml{'.bz2' if packing == 'multistream' else packing}"
    path.write_bytes(data)
    documents, reading = read(Wikipedia(paths=[str(path)]), path)
    assert [d.id for d in documents] == ["1", "4", "7", "10", "13"]
    assert documents[0].uri == "https://en.wikipedia.org/wiki/Page_0"
    assert documents[0].text.startswith("Page 0\n\nPage 0 is about things.\n\nPart\n\n")
    assert documents[0].meta["language"] == "en" and documents[0].meta["title"] == "Page 0"
    assert reading.set_aside == {"other namespace": 5, "redirect": 5}


def test_a_dump_that_is_cut_off_gives_its_first_pages(tmp_path: Path) -> None:
    path = write_dump(tmp_path / "d.xml.bz2", 300, 1)
    xml = bz2.decompress(path.read_bytes())
    path.write_bytes(bz2.compress(xml[:100_000]) + bz2.compress(xml[100_000:])[:-20])
    documents, reading = read(Wikipedia(paths=[str(path)]), path)
    assert 20 < len(documents) < 300
    assert {k: n for k, n in reading.set_aside.items() if "damaged" in k} == {"damaged block": 1, "damaged page": 1}
    plain = tmp_path / "d.xml"
    plain.write_bytes(xml[:100_000])
    begun = xml.rindex(b"<page>", 0, 100_000)
    same, reading = read(Wikipedia(paths=[str(plain)]), plain)
    assert [d.text for d in same] == [d.text for d in documents] and reading.set_aside["damaged input"] == 1
    assert reading.notes == [
        f"{plain}: damaged at byte {begun}: the file ends inside this page; what comes before is kept"
    ]
    plain.write_bytes(xml[: xml.index(b"</page>") + 7])
    documents, reading = read(Wikipedia(paths=[str(plain)]), plain)
    assert len(documents) == 1 and "the file ends without </mediawiki>" in reading.notes[0]


def packed(xml: bytes, form: str, rng: random.Random) -> bytes:
    """A dump as plain XML, as bzip2 of one stream, or of several, cut anywhere as well as between pages."""
    if form == "xml":
        return xml
    cuts = sorted(rng.sample(range(len(xml)), rng.randint(1, 20))) if form == "multistream" else []
    return b"".join(bz2.compress(xml[i:j], rng.randint(1, 9)) for i, j in itertools.pairwise([0, *cuts, len(xml)]))


def read_in_ranges(path: Path, edges: list[int]) -> tuple[list[Document], Counter[str]]:
    """The documents of a dump's ranges end to end, and what all of them set aside."""
    source, documents, set_aside = Wikipedia(paths=[str(path)]), [], Counter[str]()
    assert source.can_split(describe(str(path)))
    for start, stop in itertools.pairwise(edges):
        more, reading = read(source, path, start, stop)
        assert reading.finish() == hashlib.sha256(path.read_bytes()[start:stop]).hexdigest()
        documents += more
        set_aside += reading.set_aside
    return documents, set_aside


def edges_of(size: int, rng: random.Random) -> list[int]:
    return [0, *sorted(rng.choices(range(size + 1), k=rng.randint(1, 7))), size]


@pytest.mark.parametrize("form", ["xml", "single stream", "multistream"])
@pytest.mark.parametrize("seed", range(6))
def test_ranges_of_a_dump_have_its_documents(tmp_path: Path, form: str, seed: int) -> None:
    rng = random.Random(seed)
    xml = bz2.decompress(write_dump(tmp_path / "d", 120, seed).read_bytes())
    path = tmp_path / ("d.xml" if form == "xml" else "d.xml.bz2")
    path.write_bytes(packed(xml, form, rng))
    whole, reading = read(Wikipedia(paths=[str(path)]), path)
    assert len(whole) == 120
    assert read_in_ranges(path, edges_of(path.stat().st_size, rng)) == (whole, reading.set_aside)


def test_a_range_may_begin_and_end_at_any_byte_of_a_page(tmp_path: Path) -> None:
    path = tmp_path / "d.xml"
    path.write_bytes(bz2.decompress(write_dump(tmp_path / "d", 2, 1).read_bytes()))
    whole, _ = read(Wikipedia(paths=[str(path)]), path)
    assert (
        len(
            {
                read_in_ranges(path, [0, cut, path.stat().st_size])[0] == whole
                for cut in range(0, path.stat().st_size, 3)
            }
        )
        == 1
    )


@pytest.fixture(scope="module")
def excerpt() -> tuple[list[Document], Reading]:
    path = real("wikipedia/enwiki-pages-articles-excerpt.xml.bz2")
    return read(Wikipedia(paths=[str(path)]), path)


@pytest.mark.parametrize("form", ["xml", "single stream", "multistream"])
def test_ranges_of_the_real_excerpt_have_its_documents(
    tmp_path: Path, form: str, excerpt: tuple[list[Document], Reading]
) -> None:
    rng = random.Random(form)
    path = tmp_path / ("d.xml" if form == "xml" else "d.xml.bz2")
    path.write_bytes(packed(bz2.decompress(Path(excerpt[1].part.input.name).read_bytes()), form, rng))
    documents, set_aside = read_in_ranges(path, edges_of(path.stat().st_size, rng))
    assert set_aside == excerpt[1].set_aside
    assert [(d.id, d.text, d.uri) for d in documents] == [(d.id, d.text, d.uri) for d in excerpt[0]]


def test_a_dump_far_away_is_read_as_one_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.xml.bz2"
    path.write_bytes(bz2.compress(bz2.decompress(write_dump(tmp_path / "d", 400, 1).read_bytes()), 1))
    source, size = Wikipedia(paths=[]), path.stat().st_size
    whole, _ = read(source, path)
    server = Server()
    server.files["/d.xml.bz2"] = path.read_bytes()
    monkeypatch.setattr("data_pipeline.sources.inputs.UNKNOWN_BYTES", size // 2)  # a guess, until it is opened
    for edges in ([0], [0, size // 3, 2 * size // 3]):
        documents = []
        for start, stop in itertools.zip_longest(edges, edges[1:]):
            part = Part(Input(f"{server.address}/d.xml.bz2", None, None), start, stop)
            with Reading(part, "corpus") as reading:
                documents += list(source.read(reading))
        assert [(d.text, d.meta["offset"]) for d in documents] == [(d.text, d.meta["offset"]) for d in whole]
    server.close()


def test_a_damaged_block_costs_its_pages_only(tmp_path: Path) -> None:
    xml = bz2.decompress(write_dump(tmp_path / "d", 400, 1).read_bytes())
    path = tmp_path / "d.xml.bz2"
    path.write_bytes(bz2.compress(xml, 1))
    source = Wikipedia(paths=[str(path)])
    whole, _ = read(source, path)
    offsets = sorted({int(d.meta["offset"]) for d in whole})
    assert len(offsets) > 3
    data = bytearray(path.read_bytes())
    data[offsets[1] + 1000] ^= 1
    path.write_bytes(data)
    documents, reading = read(source, path)
    lost = {d.id for d in whole} - {d.id for d in documents}
    assert lost and all(d in whole for d in documents)
    in_block = [d for d in whole if d.meta["offset"] == offsets[1]]
    assert {d.id for d in in_block} <= lost and len(lost) <= len(in_block) + 1
    assert reading.set_aside["damaged block"] == 1
    assert f"{path}: damaged at byte {offsets[1]}: not a whole bzip2 block; the rest is kept" in reading.notes
    for seed in range(5):
        assert read_in_ranges(path, edges_of(len(data), random.Random(seed))) == (documents, reading.set_aside)
    with pytest.raises(InputError, match="not a whole bzip2 block; get the file again, or set on_damage: skip"):
        read(Wikipedia(paths=[str(path)], on_damage="stop"), path)


def test_a_page_that_is_not_xml_costs_itself_only(tmp_path: Path) -> None:
    xml = bz2.decompress(write_dump(tmp_path / "d", 5, 1).read_bytes())
    path = tmp_path / "d.xml"
    path.write_bytes(xml.replace(b"'''Page 2'''", b"'''Page \1'''").replace(b"<title>Page 3</title>", b"<title>Page 3"))
    documents, reading = read(Wikipedia(paths=[str(path)]), path)
    assert [d.id for d in documents] == ["1", "4", "13"] and reading.set_aside["damaged page"] == 2


def test_a_page_larger_than_a_document_may_be_costs_itself_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.sources.wikipedia.MAX_DOCUMENT_BYTES", 2**20)
    xml = bz2.decompress(write_dump(tmp_path / "d", 5, 1).read_bytes())
    path = tmp_path / "d.xml"
    path.write_bytes(xml.replace(b"'''Page 2'''", b"Page 2" * 500_000))
    documents, reading = read(Wikipedia(paths=[str(path)]), path)
    assert [d.id for d in documents] == ["1", "4", "10", "13"] and reading.set_aside["page too large"] == 1
    cuts = [0, xml.index(b"Page 2"), path.stat().st_size // 2, path.stat().st_size]
    assert read_in_ranges(path, cuts) == (documents, reading.set_aside)


def test_what_lies_beside_a_dump_is_no_input(tmp_path: Path) -> None:
    dump = write_dump(tmp_path / "xxwiki-pages-articles-multistream1.xml-p1p100.bz2", 5, 1)
    index = tmp_path / "xxwiki-pages-articles-multistream-index1.txt-p1p100.bz2"
    index.write_bytes(bz2.compress(b"0:1:Page 0\n"))
    (tmp_path / "xxwiki-page.sql.gz").write_bytes(gzip.compress(b"CREATE TABLE"))
    for paths in ([str(tmp_path)], [str(tmp_path / "*")], [str(dump), str(index)]):
        assert [input.name for input in Wikipedia(paths=paths).inputs()] == [str(dump)]
    with pytest.raises(ConfigError) as error:
        Wikipedia(paths=[str(index)]).inputs()
    assert str(error.value) == f"paths: {index}: not a dump; expected a name that ends with .xml or .xml.bz2"


def test_redirects_of_other_languages_are_known(tmp_path: Path) -> None:
    path = tmp_path / "d.xml"
    texts = ["#WEITERLEITUNG [[Berlin]]", "#перенаправление: [[Москва]]", "# item\n# item", "#1 is a number. [[x]]"]
    pages = "".join(
        f"<page><ns>0</ns><id>{i}</id><revision><text>{t}</text></revision></page>" for i, t in enumerate(texts)
    )
    path.write_text(f"<mediawiki>{pages}</mediawiki>")
    documents, _ = read(Wikipedia(paths=[str(path)]), path)
    assert [d.id for d in documents] == ["2", "3"]


def test_something_else_under_this_name_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.xml"
    path.write_text("<html><body/></html>")
    documents, reading = read(Wikipedia(paths=[str(path)]), path)
    assert not documents
    assert reading.notes == [
        f"{path}: damaged at byte 0: expected a <mediawiki> export, got <html>; what comes before is kept"
    ]


def test_an_entity_bomb_does_not_go_off(tmp_path: Path) -> None:
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 12))
    path = tmp_path / "x.xml"
    path.write_text(
        f'<!DOCTYPE x [<!ENTITY e0 "ha">{entities}]><mediawiki><page><title>&e11;</title></page></mediawiki>'
    )
    documents, reading = read(Wikipedia(paths=[str(path)]), path)
    assert not documents and reading.set_aside == {"damaged page": 1}


def test_the_real_excerpt(excerpt: tuple[list[Document], Reading]) -> None:
    documents, reading = excerpt
    assert len(documents) == 106 and reading.set_aside["redirect"] == 100
    by_title = {str(d.meta["title"]): d.text for d in documents}
    assert by_title["Anarchism"].startswith(
        "Anarchism\n\nAnarchism is a political philosophy that advocates self-governed societies based on voluntary "
        "institutions. These are often described as stateless societies, although several authors"
    )
    assert "\n\nEtymology and terminology\n\nThe term anarchism" in by_title["Anarchism"]
    for left in ("{{", "[[", "<ref", "|}", "[[File:", "'''"):
        having = [d.id for d in documents if left in d.text]
        assert len(having) <= 4, (left, having)  # in formulas, and in an article about such marks
