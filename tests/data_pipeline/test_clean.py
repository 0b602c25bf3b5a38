from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.clean import MASKS, Clean
from data_pipeline.sources.common_crawl import CommonCrawl
from tests.data_pipeline.inputs import read, real

OFF = Clean(tidy=False, unicode="as_is")
ADDRESSED = [
    "Write to jane.doe+list@mail.example.co.uk, or (a@b.de).",
    "no address: a@b, @home, a@ b.de, user@-x.de, a..b@c.de",
    "<x@[192.168.1.1]> a@b@c.de x@y.z@w.de é@ü.de eé.f@g.hi",
    "8.8.8.8 and 10.0.0.1 and 127.0.0.1 and 1.2.3.4.5 and 300.1.1.1 and 01.2.3.4, v1.2.3",
    "at 9.9.9.9:80/path, ٣.٣.٣.٣, 256.256.256.256, 93.184.216.34.",
]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("a\r\nb\rc\u2028d\x85e", "a\nb\nc\nd\ne"),
        ("a\x00b\x07c\x1b[31md\x7f", "abc[31md"),
        ("\ufeffmark", "mark"),
        ("a\u00a0b\u3000c\u2009d", "a b c d"),
        ("end  \t\nnext   \n\n\n\n\nlast  ", "end\nnext\n\nlast"),
        ("  def f():\n\treturn  1", "def f():\n\treturn  1"),
        ("e\u0301", "é"),
        ("lone \ud800 half", "lone \ufffd half"),
        ("", ""),
        (" \n\t\n ", ""),
    ],
)
def test_text_is_tidied(text: str, clean: str) -> None:
    assert Clean().text(text) == clean


def test_long_runs_cost_no_more_than_others() -> None:
    assert Clean().text("x" + " " * 500_000 + "y \n") == "x" + " " * 500_000 + "y"


def test_forms_can_be_chosen() -> None:
    assert Clean(unicode="nfkc").text("ﬁve ①") == "five 1"
    assert Clean(unicode="as_is").text("e\u0301") == "e\u0301"
    assert Clean(fix_encoding=True).text("donâ€™t") == "don’t"
    assert Clean().text("donâ€™t") == "donâ€™t"


@given(st.text(st.characters(), max_size=200))
def test_cleaning_can_be_written_as_utf8_and_done_twice(text: str) -> None:
    once = Clean().text(text)
    once.encode()
    assert Clean().text(once) == once


@given(st.text(max_size=200))
def test_off_leaves_every_text_that_utf8_can_hold(text: str) -> None:
    assert OFF.text(text) == text


@pytest.mark.parametrize("odd", ["\r\n", "\u00a0", "  \n", "\n\n\n\n", "\x00", "e\u0301", " "])
def test_off_is_off_for_each_step(odd: str) -> None:
    assert OFF.text(odd) == odd
    assert Clean().text(odd) != odd


def test_addresses_are_masked_and_counted() -> None:
    masked: Counter[str] = Counter()
    text = Clean(mask=("email", "ip")).text("me@host.org, you@host.org from 8.8.8.8 or 10.0.0.1", masked)
    assert text == "email@example.com, email@example.com from 192.0.2.1 or 10.0.0.1"
    assert masked == {"email": 2, "ip": 1}
    assert Clean(mask=("ip",)).text("me@host.org 8.8.8.8") == "me@host.org 192.0.2.1"
    assert Clean().text("me@host.org 8.8.8.8") == "me@host.org 8.8.8.8"


def masked_by_datatrove(text: str) -> str:
    from datatrove.pipeline.formatters.pii import PIIFormatter

    return str(PIIFormatter(email_replacement=MASKS["email"], ip_replacement=MASKS["ip"]).format(text))


@given(st.lists(st.sampled_from([*ADDRESSED, "a", ".", "@", "-", "1", "9.", "b.de", " ", "\n", "[", "]"]), max_size=30))
def test_masks_find_what_datatrove_finds(parts: list[str]) -> None:
    text = "".join(parts)
    assert Clean(tidy=False, unicode="as_is", mask=("email", "ip")).text(text) == masked_by_datatrove(text)


def test_masks_find_what_datatrove_finds_on_real_pages() -> None:
    masked: Counter[str] = Counter()
    for path in real("common_crawl/site-pages-wget.warc.gz").parent.glob("*[0-9a-z].warc.gz"):
        for document in read(CommonCrawl(paths=[]), Path(path))[0]:
            text = f"{document.text}\nposted by {document.id.strip('<>')}@example.net from 8.8.8.8"
            assert Clean(tidy=False, unicode="as_is", mask=("email", "ip")).text(text, masked) == masked_by_datatrove(
                text
            )
    assert masked["email"] >= 30 and masked["ip"] >= 30


def test_masking_costs_no_squares_of_long_words() -> None:
    text = "a-" * 200_000 + "@example.com " + "1." * 200_000
    assert Clean(mask=("email", "ip")).text(text).endswith("-email@example.com " + "192.0.2.1." * 50_000)
