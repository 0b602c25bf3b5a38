"""datatrove's filters are the oracle: verdicts equal, given the same words; nearly so with its own splitter."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.clean import Clean
from data_pipeline.quality import _WORD, C4, FineWeb, GopherQuality, GopherRepetition, Text, sentences_of
from data_pipeline.sources.bookcorpus import BookCorpus
from data_pipeline.sources.common_crawl import CommonCrawl
from data_pipeline.sources.wikipedia import Wikipedia
from tests.data_pipeline.inputs import REAL, read, real, sentences

OURS: dict[str, Callable[[str], str | None]] = {
    "gopher_quality": lambda text: GopherQuality().reason(Text(text)),
    "gopher_repetition": lambda text: GopherRepetition().reason(Text(text)),
    "c4": lambda text: C4().kept(text)[1],
    "fineweb": lambda text: FineWeb().reason(Text(text)),
}
REASONS = {
    "gopher_short_doc": "few words",
    "gopher_long_doc": "many words",
    "gopher_below_avg_threshold": "short words",
    "gopher_above_avg_threshold": "long words",
    "gopher_too_many_hashes": "hash signs",
    "gopher_too_many_ellipsis": "ellipses",
    "gopher_too_many_bullets": "bullet lines",
    "gopher_too_many_end_ellipsis": "lines with ellipses",
    "gopher_below_alpha_threshold": "few words with letters",
    "gopher_enough_stop_words": "few stop words",
    "dup_para_frac": "duplicate paragraphs",
    "dup_para_char_frac": "characters in duplicate paragraphs",
    "dup_line_frac": "duplicate lines",
    "dup_line_char_frac": "characters in duplicate lines",
    **{f"top_{n}_gram": f"commonest {n}-gram" for n in (2, 3, 4)},
    **{f"duplicated_{n}_n_grams": f"duplicate {n}-grams" for n in range(5, 11)},
    "lorem_ipsum": "lorem ipsum",
    "curly_bracket": "curly bracket",
    "too_few_sentences": "few sentences",
    "empty": "few words",
    "line_punct_ratio": "few lines end a sentence",
    "short_line_ratio": "short lines",
    "char_dup_ratio": "characters in duplicate lines",
    "list_ratio": "list",
}


@cache
def theirs(rule: str, words_of: str) -> Any:
    """datatrove's filter for English, with its own splitter ("spacy") or with ours."""
    from datatrove.pipeline import filters
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Ours(WordTokenizer):  # type: ignore[misc]
        def word_tokenize(self, text: str) -> list[str]:
            return _WORD.findall(text)

        def sent_tokenize(self, text: str) -> list[str]:
            raise NotImplementedError

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [(i, i) for i in range(sentences_of(text))]

    classes = {
        "gopher_quality": filters.GopherQualityFilter,
        "gopher_repetition": filters.GopherRepetitionFilter,
        "c4": filters.C4QualityFilter,
        "fineweb": filters.FineWebQualityFilter,
    }
    return classes[rule](language="en" if words_of == "spacy" else Ours())


def verdict(rule: str, text: str, words_of: str) -> tuple[str | None, str]:
    """datatrove's reason in our words, and the text that it leaves."""
    from datatrove.data import Document

    document = Document(text=text, id="")
    result = theirs(rule, words_of).filter(document)
    return (None if result is True else REASONS[result[1]]), document.text


@cache
def texts() -> list[str]:
    """Real pages, articles and parts of books, in the state in which rules see them."""
    found = []
    for path in sorted(REAL.glob("common_crawl/*.warc.gz")):
        found += [document.text for document in read(CommonCrawl(paths=[], on_damage="skip"), path)[0]]
    for path in sorted(REAL.glob("wikipedia/*.bz2")):
        found += [document.text for document in read(Wikipedia(paths=[]), path)[0]][:60]
    for path in sorted(REAL.glob("books/*.txt")):
        text = read(BookCorpus(paths=[]), path)[0][0].text
        found += [text[at : at + 3000] for at in range(5000, 60_000, 11_000)]
    return [text for text in (Clean().text(text)[:6000] for text in found) if text]


def varied(seed: int) -> str:
    """Text with what rules look for: repeats, lists, signs, short and long lines."""
    rng = random.Random(seed)
    parts = [sentences(rng.randint(0, 5), rng.randint(1, 6)) for _ in range(rng.randint(1, 12))]
    odd = [
        "- item",
        "• the and that",
        "well...",
        "# # #",
        "lorem ipsum dolor sit",
        "x { y }",
        "This uses cookies here.",
    ]
    odd += ["Enable JavaScript to go on.", "12 34 56 78", "See it.[1]", "w" * 1200 + " a b.", 'He said "so it is."', ""]
    parts += rng.choices(odd, k=rng.randint(0, 10)) + rng.choices(parts, k=rng.randint(0, 4))
    rng.shuffle(parts)
    return rng.choice(["\n", "\n\n"]).join(parts)


@pytest.mark.parametrize("rule", OURS)
def test_verdicts_are_datatroves_given_the_same_words(rule: str) -> None:
    real("common_crawl")
    found = set()
    for text in [*texts(), *map(varied, range(300)), "", " ", "\n", "a", "a " * 400, "the of a b c d e. " * 90]:
        if not text.strip():
            continue  # an empty text never comes to the rules
        expected, left = verdict(rule, text, "ours")
        assert OURS[rule](text) == expected, text[:300]
        if rule == "c4" and expected is None:
            assert C4().kept(text)[0] == left
        found.add(expected)
    assert len(found) >= 4 or rule == "c4"


def test_signs_need_not_count_as_words() -> None:
    text = "The cat, and the dog, and (then) the bird; of these, one! " * 10
    assert GopherQuality().reason(Text(text)) == "few words with letters"
    assert GopherQuality(signs_are_words=False).reason(Text(text)) is None
    assert GopherQuality(signs_are_words=False).reason(Text("the 1 of 2 " * 50)) == "short words"


@given(st.lists(st.sampled_from(["the", "of", "cat", "dog", "runs", "x", ".", "\n"]), min_size=1, max_size=200))
@settings(max_examples=150)
def test_repetition_is_counted_as_datatrove_counts_it(words: list[str]) -> None:
    text = " ".join(words)
    if text.strip():
        assert OURS["gopher_repetition"](text) == verdict("gopher_repetition", text, "ours")[0]


def test_verdicts_mostly_agree_with_datatroves_own_splitter() -> None:
    real("common_crawl")
    some = [text for text in texts() if len(text) < 5000][::2]
    for_each = dict.fromkeys(OURS, 0)
    for text in some:
        for rule in OURS:
            for_each[rule] += (OURS[rule](text) is None) == (verdict(rule, text, "spacy")[0] is None)
    assert len(some) >= 40 and all(agree / len(some) >= 0.95 for agree in for_each.values()), (for_each, len(some))


@pytest.mark.parametrize(
    ("line", "count"),
    [("", 0), ("One", 1), ("One. Two", 2), ("One. Two!", 2), ('"One?" Two.', 2), ("At 3.14 o'clock.", 1)],
)
def test_sentences(line: str, count: int) -> None:
    assert sentences_of(line) == count
