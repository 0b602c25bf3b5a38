import pytest

from data_pipeline.document import Document
from data_pipeline.filters import Filters, language

ENGLISH = "The quick brown fox jumps over the lazy dog, and then it runs away into the forest with all the others."
GERMAN = "Der schnelle braune Fuchs springt über den faulen Hund, und dann läuft er mit den anderen in den Wald hinein."


def document(text: str, **meta: str) -> Document:
    return Document(text, "id", "corpus", "uri", dict(meta))


@pytest.mark.parametrize(
    ("text", "reason"), [("", "empty"), ("abc", "too short"), ("abcd", None), ("x" * 10, None), ("x" * 11, "too long")]
)
def test_length(text: str, reason: str | None) -> None:
    assert Filters(min_chars=4, max_chars=10).reason(document(text)) == reason


def test_language_is_asked_for_only_where_a_rule_needs_it() -> None:
    assert Filters().marked(document(ENGLISH)).meta == {}
    rule = Filters(languages=["en"])
    assert rule.marked(document(ENGLISH)).meta == {"language": "en"}
    assert rule.reason(rule.marked(document(ENGLISH))) is None
    assert rule.reason(rule.marked(document(GERMAN))) == "other language"
    assert rule.marked(document(GERMAN, language="en")).meta == {"language": "en"}  # its source knows better


def test_guesses() -> None:
    assert language(ENGLISH) == "en" and language(GERMAN) == "de"
