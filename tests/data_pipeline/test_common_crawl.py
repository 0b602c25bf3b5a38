import gzip
import hashlib
import random
import re
from pathlib import Path

import brotli  # type: ignore[import-untyped]
import pytest

from data_pipeline.sources.common_crawl import CommonCrawl, main_text, nested_deeper, page_text
from data_pipeline.sources.inputs import InputError, zstd
from tests.data_pipeline.inputs import http, page, read, real, warc_record, write_warc

ID = "00000000-0000-0000-0000-00000000000"


def source(path: Path, **more: str) -> CommonCrawl:
    return CommonCrawl.model_validate({"paths": [str(path)], **more})


@pytest.mark.parametrize("packed", [True, False])
def test_pages_become_documents_with_their_place(tmp_path: Path, packed: bool) -> None:
    records = [
        warc_record("response", f"https://e.org/{i}", http(page(f"Text number {i} is here.")), f"{ID}{i}")
        for i in range(3)
    ]
    path = write_warc(tmp_path / ("x.warc.gz" if packed else "x.warc"), records, packed)
    documents, reading = read(source(path), path)
    assert [d.text.strip() for d in documents] == [f"Text number {i} is here." for i in range(3)]  # and no menu
    assert [d.id for d in documents] == [f"urn:uuid:{ID}{i}" for i in range(3)]
    assert documents[1].uri == "https://e.org/1"
    assert documents[1].meta == {"input": str(path), "offset": len(gzip.compress(records[0]) if packed else records[0])}
    assert not reading.set_aside


def test_what_is_not_a_page_is_counted(tmp_path: Path) -> None:
    path = write_warc(
        tmp_path / "x.warc.gz",
        [
            warc_record("warcinfo", "", b"software: x\r\n", f"{ID}0", "application/warc-fields"),
            warc_record("request", "https://e.org/", b"GET / HTTP/1.1\r\n\r\n", f"{ID}1"),
            warc_record("response", "https://e.org/a", http(page("gone"), "404 Not Found"), f"{ID}2"),
            warc_record("response", "https://e.org/b", http(b"\x89PNG", content="image/png"), f"{ID}3"),
            warc_record("response", "https://e.org/c", http(page("Here.")), f"{ID}4"),
        ],
    )
    documents, reading = read(source(path), path)
    assert [d.text.strip() for d in documents] == ["Here."]
    assert reading.set_aside == {"status not 200": 1, "not HTML": 1}


def test_wet_records_are_taken_as_they_are(tmp_path: Path) -> None:
    text = "Título\nAquí está el texto."
    path = write_warc(
        tmp_path / "x.warc.wet.gz", [warc_record("conversion", "https://e.org/", text.encode(), f"{ID}1", "text/plain")]
    )
    documents, _ = read(source(path), path)
    assert [d.text for d in documents] == [text]


@pytest.mark.parametrize(
    ("charset", "declared"), [("utf-8", ""), ("windows-1251", "; charset=windows-1251"), ("gb2312", "")]
)
def test_the_charset_is_found(tmp_path: Path, charset: str, declared: str) -> None:
    text = {"utf-8": "Ελληνικά", "windows-1251": "Привет, мир", "gb2312": "中文网页的内容"}[charset]
    meta = f'<meta charset="{charset}">'.encode() if not declared else b""
    body = b"<html><head>" + meta + b"</head><body><p>" + text.encode(charset) + b"</p></body></html>"
    record = warc_record("response", "https://e.org/", http(body, content=f"text/html{declared}"), f"{ID}1")
    path = write_warc(tmp_path / "x.warc.gz", [record])
    assert read(source(path), path)[0][0].text.strip() == text


def test_a_wrong_charset_in_the_header_is_not_believed() -> None:
    text = "Ünïcödé wörds " * 20
    assert page_text(text.encode(), "utf-8") == text
    assert page_text(b"<p>" + text.encode("cp1252") + b"</p>", "utf-8") == f"<p>{text}</p>"
    assert page_text(text.encode(), "no-such-charset") == text


@pytest.mark.parametrize("encoding", ["gzip", "chunked"])
def test_packed_and_chunked_bodies_are_decoded(tmp_path: Path, encoding: str) -> None:
    body = page("Inside.")
    if encoding == "gzip":
        block = http(gzip.compress(body), more="Content-Encoding: gzip\r\n")
    else:
        block = http(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body), more="Transfer-Encoding: chunked\r\n")
    path = write_warc(tmp_path / "x.warc.gz", [warc_record("response", "https://e.org/", block, f"{ID}1")])
    assert read(source(path), path)[0][0].text.strip() == "Inside."


@pytest.mark.parametrize("packed", [True, False])
def test_wherever_a_file_is_cut_whole_records_are_kept_and_the_cut_is_told(tmp_path: Path, packed: bool) -> None:
    records = [warc_record("response", f"https://e.org/{i}", http(page(f"Text {i}.")), f"{ID}{i}") for i in range(4)]
    whole = write_warc(tmp_path / "whole.warc", records, packed).read_bytes()
    sizes = [len(gzip.compress(r, mtime=0) if packed else r) for r in records]
    edges = [sum(sizes[:i]) for i in range(5)]
    path = tmp_path / ("cut.warc.gz" if packed else "cut.warc")
    for cut in random.Random(1).sample(range(1, len(whole)), 60):
        path.write_bytes(whole[:cut])
        documents, reading = read(source(path), path)
        least = 0 if packed else 4  # of a plain file the two line ends behind a record may be missing
        assert len(documents) == sum(edge <= cut + least for edge in edges[1:]), cut
        assert (reading.set_aside["damaged input"] == 0) == (cut in edges), cut


def test_damage_is_one_line_with_file_and_byte(tmp_path: Path) -> None:
    records = [warc_record("response", "https://e.org/", http(page("Text.")), f"{ID}{i}") for i in range(2)]
    path = write_warc(tmp_path / "x.warc.gz", records)
    edge = len(gzip.compress(records[0], mtime=0))
    path.write_bytes(path.read_bytes()[:-10])
    documents, reading = read(source(path), path)
    assert len(documents) == 1
    line = f"{path}: damaged at byte {edge}: the file ends inside this gzip member"
    assert reading.notes == [f"{line}; what comes before is kept"]
    with pytest.raises(InputError) as error:
        read(source(path, on_damage="stop"), path)
    assert str(error.value) == f"{line}; get the file again, or set on_damage: skip to keep what comes before"


def test_a_record_with_a_wrong_length_spoils_no_other(tmp_path: Path) -> None:
    good = [warc_record("response", f"https://e.org/{i}", http(page(f"Text {i}.")), f"{ID}{i}") for i in range(3)]
    for wrong in (b"Content-Length: 10", b"Content-Length: 99999", b"Content-Length: -1", b"Content-Length: x"):
        length = good[1].split(b"\r\n")[6]
        assert length.startswith(b"Content-Length")
        path = write_warc(tmp_path / "x.warc.gz", [good[0], good[1].replace(length, wrong), good[2]])
        documents, _ = read(source(path), path)
        assert [d.id for d in documents if d.id[-1] in "02"] == [f"urn:uuid:{ID}0", f"urn:uuid:{ID}2"], wrong


def test_something_else_under_this_name_is_told(tmp_path: Path) -> None:
    for name, data in (
        ("x.warc", b"hello\n" * 100),
        ("y.warc.gz", gzip.compress(b"hello\n" * 100)),
        ("z.warc.gz", b"hello"),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        documents, reading = read(source(path), path)
        assert not documents and reading.set_aside.total() == 1, name


def test_a_hostile_page_is_set_aside_at_once(tmp_path: Path) -> None:
    deep = b"<div>" * 1_000_000 + b"x" + b"</div>" * 1_000_000
    assert nested_deeper(deep.decode(), 2000) and not nested_deeper("<p>a<br>b<li>c" * 5000, 2000)
    assert not nested_deeper("<b>" * 1900 + "</b>" * 1900, 2000)
    records = [
        warc_record("response", "https://e.org/0", http(deep), f"{ID}0"),
        warc_record("response", "https://e.org/1", http(page("Text.")), f"{ID}1"),
    ]
    path = write_warc(tmp_path / "x.warc.gz", records)
    documents, reading = read(source(path), path)
    assert [d.id for d in documents] == [f"urn:uuid:{ID}1"]
    assert reading.set_aside == {"unreadable page (ValueError)": 1}
    assert reading.notes == [f"{path}: urn:uuid:{ID}0: unreadable page (ValueError)"]


def test_navigation_is_left_out_and_lists_stay_lists() -> None:
    html = (
        "<html><body><nav><a href=/>Start</a> <a href=/b>Shop</a></nav><main><h1>Head</h1><p>One.</p>"
        "<ol><li>first item</li><li>second item</li></ol><p>Two.</p></main><footer>Imprint</footer></body></html>"
    )
    text = main_text(html)
    assert "Head" in text and "One." in text and "Shop" not in text and "Imprint" not in text
    assert [line.strip() for line in text.splitlines() if "item" in line] == ["1. first item", "2. second item"]


def test_real_pages() -> None:
    path = real("common_crawl/CC-MAIN-2020-34-sample.warc.gz")
    documents, reading = read(source(path), path)
    assert len(documents) == 16 and not reading.set_aside
    by_uri = {d.uri: d.text for d in documents}
    assert "Стратегия пожарной безопасности" in by_uri["http://01spb.ru/company/"]
    assert "Hovenier in Oosterbeek" in by_uri["http://0900-hovenier.nl/gelderland/oosterbeek/"]
    path = real("common_crawl/site-pages-wget.warc.gz")
    documents, _ = read(source(path), path)
    assert len(documents) == 22 and documents[0].uri == "https://www.semanticscholar.org/research/research-team"
    path = real("common_crawl/damaged-clipped.warc.gz")
    documents, reading = read(source(path), path)
    assert not documents and reading.set_aside == {"damaged input": 1}


def test_one_real_record_as_warc_and_as_wet() -> None:
    warc, wet = (real(f"common_crawl/CC-MAIN-2024-22-escopete.warc{kind}.gz") for kind in ("", ".wet"))
    (page_,), (text,) = read(source(warc), warc)[0], read(source(wet), wet)[0]
    assert page_.uri == text.uri == "https://an.wikipedia.org/wiki/Escopete"
    assert "Guadalachara" in page_.text and "Guadalachara" in text.text
    assert "Ir al contenido" in text.text and "Ir al contenido" not in page_.text  # the menu


@pytest.mark.parametrize("packing", ["gz", "zst"])
@pytest.mark.parametrize("wrong", ["bits", "cut", "hole", "zeros"])
def test_after_a_damaged_member_reading_goes_on_at_the_next(tmp_path: Path, wrong: str, packing: str) -> None:
    records = [
        warc_record("response", f"https://e.org/{i}", http(page(f"Text {i}." + "ab" * i)), f"{ID}{i}") for i in range(6)
    ]
    checked: dict[int, int] = {zstd.CompressionParameter.checksum_flag: 1}
    parts = [gzip.compress(r) if packing == "gz" else zstd.compress(r, options=checked) for r in records]
    begins = [sum(map(len, parts[:i])) for i in range(7)]
    middle = bytearray(parts[2])
    if wrong == "bits":
        middle[60] ^= 255
        middle[61] ^= 255
    elif wrong == "cut":
        del middle[80:]
    elif wrong == "hole":
        middle[40:] = b"\x1f\x8b\x08" * 20_000  # looks like members that are none
    else:
        middle[:] = bytes(300_000)
    path = tmp_path / f"x.warc.{packing}"
    whole = b"".join([*parts[:2], bytes(middle), *parts[3:]])
    path.write_bytes(whole)
    documents, reading = read(source(path), path)
    assert [d.id[-1] for d in documents if d.id[-1] != "2"] == list("01345")
    if not (wrong == "zeros" and packing == "gz"):  # which are padding
        assert reading.set_aside == {"damaged member": 1}
        assert re.fullmatch(
            rf"{path}: damaged at byte {begins[2]}: .*; passed over {len(middle)} bytes; the rest is kept",
            reading.notes[0],
        )
        with pytest.raises(
            InputError, match=rf"damaged at byte {begins[2]}: .*or set on_damage: skip to keep the rest"
        ):
            read(source(path, on_damage="stop"), path)
    shift = len(middle) - len(parts[2])
    assert [d.meta["offset"] for d in documents[-3:]] == [begin + shift for begin in begins[3:6]]
    assert reading.finish() == hashlib.sha256(whole).hexdigest()  # each byte once


@pytest.mark.parametrize("field", ["WARC-Type", "WARC-Record-ID", "WARC-Target-URI", "Content-Length", "Content-Type"])
def test_a_record_without_a_header_spoils_no_other(tmp_path: Path, field: str) -> None:
    good = [warc_record("response", f"https://e.org/{i}", http(page(f"Text {i}.")), f"{ID}{i}") for i in range(3)]
    lines = [line for line in good[1].split(b"\r\n", 8) if not line.startswith(field.encode())]
    path = write_warc(tmp_path / "x.warc.gz", [good[0], b"\r\n".join(lines), good[2]])
    documents, _ = read(source(path), path)
    assert documents[0].id == f"urn:uuid:{ID}0"
    assert documents[-1].id == f"urn:uuid:{ID}2" and len({d.id for d in documents}) == len(documents)


def test_a_truncated_record_and_strange_bodies_are_counted_not_fatal(tmp_path: Path) -> None:
    text = page("Inside and out.")
    bodies = {
        "cut": http(text[:-21]),
        "chunked wrong": http(b"zz\r\n" + text, more="Transfer-Encoding: chunked\r\n"),
        "chunked cut": http(b"ffff\r\n" + text, more="Transfer-Encoding: chunked\r\n"),
        "brotli": http(brotli.compress(text), more="Content-Encoding: br\r\n"),
        "brotli wrong": http(b"\xff\xfe" + text, more="Content-Encoding: br\r\n"),
        "gzip wrong": http(b"\x1f\x8b" + text, more="Content-Encoding: gzip\r\n"),
        "unknown": http(text, more="Content-Encoding: zstd\r\n"),
        "good": http(text),
    }
    records = []
    for i, (name, block) in enumerate(bodies.items()):
        record = warc_record("response", f"https://e.org/{name}", block, f"{ID}{i}")
        records.append(
            record.replace(b"\r\nContent-Type", b"\r\nWARC-Truncated: length\r\nContent-Type", name == "cut")
        )
    path = write_warc(tmp_path / "x.warc.gz", records)
    documents, reading = read(source(path), path)
    kept = {d.uri.rpartition("/")[2]: d.text.strip() for d in documents}
    assert kept["good"] == "Inside and out." and kept["cut"] == "Inside and out."
    assert kept.get("brotli", "Inside and out.") == "Inside and out."
    assert len(documents) + reading.set_aside.total() == len(bodies)
