import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.clean import Clean


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
