import bz2
import gzip
from pathlib import Path

import pytest

from data_pipeline.sources.wikipedia import CLOSING_SECTIONS, Wikipedia, plain_text
from tests.data_pipeline.inputs import read, real, write_dump

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
        ("So <math>E  = mc^2</math> and <nowiki>[[x]] ''y''</nowiki>.", "So E = mc^2 and [[x]] ''y''."),
        ('<syntaxhighlight lang="c">\nif (a[[0]]) {{ x; }}\n* y\n</syntaxhighlight>', "if (a[[0]]) {{ x; }}\n* y"),
        ("x<sub>2</sub><br/>y &amp; z&nbsp;&lt;", "x2\ny & z\xa0<"),
        ("__NOTOC__Text {{DISPLAYTITLE:x}}{{#if:a|b|c}}.", "Text."),
        ("Unclosed [[link and {{template here.", "Unclosed link and template here."),
        ("Stray ]] and }} stay.", "Stray ]] and }} stay."),
        ("A\n\n== Empty ==\n\n== Full ==\nB\n\n=== Sub ===\n\n== References ==\n{{reflist}}\n* x", "A\n\nFull\n\nB"),
        ("A\n== See also ==\n* [[b]]\n=== Below ===\nc\n== Kept ==\nd", "A\n\nKept\n\nd"),
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
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    documents, reading = read(Wikipedia(paths=[str(path)]), path)
    assert reading.set_aside["damaged input"] == 1
    xml = tmp_path / "d.xml"
    xml.write_bytes(bz2.decompress(write_dump(tmp_path / "e", 300, 1).read_bytes())[:100_000])
    documents, reading = read(Wikipedia(paths=[str(xml)]), xml)
    assert 20 < len(documents) < 300 and reading.set_aside["damaged input"] == 1
    assert reading.notes[0].startswith(f"{xml}: damaged at byte 1") and "not XML" in reading.notes[0]


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
    assert not documents and reading.set_aside == {"damaged input": 1}


def test_the_real_excerpt() -> None:
    path = real("wikipedia/enwiki-pages-articles-excerpt.xml.bz2")
    documents, reading = read(Wikipedia(paths=[str(path)]), path)
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
