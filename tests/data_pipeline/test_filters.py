import contextlib
from pathlib import Path

import pytest

from configs import ConfigError, build
from data_pipeline.document import Document
from data_pipeline.filters import Filters
from data_pipeline.language import FastText, Resiliparse
from data_pipeline.quality import C4, FineWeb, GopherQuality, GopherRepetition

ENGLISH = "The quick brown fox jumps over the lazy dog, and then it runs away into the forest with all the others."
GERMAN = "Der schnelle braune Fuchs springt über den faulen Hund, und dann läuft er mit den anderen in den Wald hinein."


def document(text: str, **meta: str) -> Document:
    return Document(text, "id", "corpus", "uri", dict(meta))


def reason(filters: Filters, text: str, **meta: str) -> str | None:
    return filters.judged(document(text, **meta))[1]


@pytest.mark.parametrize(
    ("text", "why"), [("", "empty"), ("abc", "too short"), ("abcd", None), ("x" * 10, None), ("x" * 11, "too long")]
)
def test_length(text: str, why: str | None) -> None:
    assert reason(Filters(min_chars=4, max_chars=10), text) == why


def test_language_is_asked_for_only_where_a_rule_needs_it() -> None:
    assert Filters().judged(document(ENGLISH)) == (document(ENGLISH), None)
    rule = Filters(languages=["en"])
    assert rule.judged(document(ENGLISH)) == (document(ENGLISH, language="en"), None)
    assert rule.judged(document(GERMAN)) == (document(GERMAN, language="de"), "other language")
    assert reason(rule, GERMAN, language="en") is None  # its source knows better


def test_guesses_farther_than_allowed_are_unknown() -> None:
    assert Resiliparse().of(ENGLISH) == "en" and Resiliparse().of(GERMAN) == "de"
    assert Resiliparse(max_distance=100).of(ENGLISH) == "unknown"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fastText classifier of two languages."""
    import fasttext

    folder = tmp_path_factory.mktemp("model")
    rows = [f"__label__{code} {text}" for code, text in (("en", ENGLISH), ("de", GERMAN)) for _ in range(500)]
    (folder / "rows.txt").write_text("\n".join(rows), encoding="utf-8")
    for bucket in range(1000, 1050):
        with contextlib.suppress(
            RuntimeError
        ):  # this build's trainer says "Encountered NaN" by chance; reading is sound
            options = {"wordNgrams": 2, "bucket": bucket, "thread": 1, "verbose": 0}
            fasttext.train_supervised(str(folder / "rows.txt"), **options).save_model(str(folder / "languages.bin"))
            return folder / "languages.bin"
    pytest.skip("fastText's trainer failed 50 times")


def test_a_fasttext_model_can_guess_instead(model: Path) -> None:
    rule = build(Filters, {"languages": ["de"], "language": {"kind": "fasttext", "path": str(model)}}, "test")
    assert rule.judged(document(f"{GERMAN}\n{GERMAN}")) == (document(f"{GERMAN}\n{GERMAN}", language="de"), None)
    assert reason(rule, ENGLISH) == "other language"
    assert FastText(path=model, min_score=1.1).of(GERMAN) == "unknown"


def test_a_models_bytes_are_its_identity(model: Path, tmp_path: Path) -> None:
    moved = tmp_path / "same.bin"
    moved.write_bytes(model.read_bytes())
    assert FastText(path=moved).identity() == FastText(path=model).identity()
    moved.write_bytes(b"other")
    assert FastText(path=moved).identity() != FastText(path=model).identity()
    with pytest.raises(ConfigError, match=r"same.bin: not a fastText model"):
        FastText(path=moved).of("text")
    with pytest.raises(ConfigError, match=r"absent.bin: cannot be read: No such file or directory"):
        Filters(languages=["en"], language=FastText(path=tmp_path / "absent.bin")).identity()


PROSE = "\n".join(f"{number}. {ENGLISH} {GERMAN}" for number in ["one", "two", "three", "four", "five", "six", "seven"])


@pytest.mark.parametrize(
    ("rules", "text", "why"),
    [
        (Filters(gopher_quality=GopherQuality()), "Too few words.", "gopher: few words"),
        (Filters(gopher_quality=GopherQuality(min_words=1, min_stop_words=0)), "The few of words", None),
        (Filters(gopher_repetition=GopherRepetition()), "One.\n\nTwo.\n\nOne.\n\nOne.", "gopher: duplicate paragraphs"),
        (Filters(c4=C4()), "One sentence.", "c4: few sentences"),
        (Filters(c4=C4(min_sentences=0)), "no end", "c4: no line left"),
        (Filters(fineweb=FineWeb()), "no end\n" * 5, "fineweb: few lines end a sentence"),
        (Filters(fineweb=FineWeb(min_punctuated_lines=0)), "no end\nat\nall", "fineweb: short lines"),
        (Filters(gopher_quality=GopherQuality(), c4=C4(), fineweb=FineWeb()), PROSE, None),
    ],
)  # fmt: skip
def test_each_rule_gives_its_own_reason(rules: Filters, text: str, why: str | None) -> None:
    assert reason(rules, text) == why


def test_a_rule_may_drop_lines() -> None:
    judged, why = Filters(c4=C4(min_sentences=2)).judged(document("First line here.\nmenu\nSecond line here.[1]"))
    assert (judged.text, why) == ("First line here.\nSecond line here.", None)


def test_thresholds_are_part_of_the_identity() -> None:
    usual = build(Filters, {"gopher_repetition": {}}, "test").identity()
    other = build(Filters, {"gopher_repetition": {"max_top_ngram_chars": {"2": "0.3"}}}, "test").identity()
    assert usual["gopher_repetition"]["max_top_ngram_chars"] == {"2": 0.2, "3": 0.18, "4": 0.16}
    assert other["gopher_repetition"]["max_top_ngram_chars"] == {"2": 0.3}
