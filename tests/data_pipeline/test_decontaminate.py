from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import ConfigError
from data_pipeline.clean import Clean
from data_pipeline.decontaminate import Decontamination, EvaluationSet, pieces_of
from data_pipeline.document import Document
from data_pipeline.sources.common_crawl import CommonCrawl
from data_pipeline.sources.wikipedia import Wikipedia
from tests.data_pipeline.inputs import read, real, sentences

QUESTION = "Which of these thirteen words, asked in a row, stands in no book but this one here?"


def against(folder: Path, text: str, **settings: int) -> Decontamination:
    path = folder / "evaluation.txt"
    path.write_text(text, encoding="utf-8")
    return Decontamination(sets={"e": EvaluationSet(paths=[str(path)])}, **settings)


def reference(text: str, evaluation: str, n: int, around: int, most: int, least: int) -> list[str] | None:
    """The rule as the paper has it, character by character; None for a document that is dropped."""

    def grams(of: str) -> list[tuple[str, int, int]]:
        words = [("".join(c for c in m[0].lower() if c.isalnum()), *m.span()) for m in re.finditer(r"\S+", of)]
        return [word for word in words if word[0]]

    known = [word for word, _, _ in grams(evaluation)]
    mine, gone = grams(text), [False] * len(text)
    for i in range(len(mine) - n + 1):
        run = [word for word, _, _ in mine[i : i + n]]
        if any(known[j : j + n] == run for j in range(len(known) - n + 1)):
            for c in range(max(0, mine[i][1] - around), min(len(text), mine[i + n - 1][2] + around)):
                gone[c] = True
    marked = "".join("\x00" if out else c for c, out in zip(text, gone, strict=True))
    pieces = [piece.strip() for piece in marked.split("\x00") if piece.strip()]
    kept = [piece for piece in pieces if len(piece) >= least] if any(gone) else [text]
    return kept if kept and (len(pieces) <= most or not any(gone)) else None


@given(st.lists(st.sampled_from(["a", "b", "b", "c,", "D", "-", "“e”", "é", "_f_"]), max_size=60), st.integers(0, 6))
@settings(max_examples=300, deadline=None)
def test_cuts_are_those_of_the_rule_read_slowly(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], around: int
) -> None:
    text, evaluation = " ".join(words), "A, b c - d?\n e B 'c' É f a"
    numbers = {"ngram_words": 3, "around_chars": around, "max_pieces": 3, "min_piece_chars": 4}
    rule = against(tmp_path_factory.getbasetemp(), evaluation, **numbers)
    expected = reference(text, evaluation, 3, around, 3, 4)
    cut = rule.cut(text)
    got = [text] if cut is None else ([piece.text for piece in cut.pieces] or None)
    assert got == expected
    for piece in cut.pieces if cut else ():
        assert text[piece.start : piece.start + len(piece.text)] == piece.text


def test_a_planted_question_goes_with_what_is_around_it(tmp_path: Path) -> None:
    before, after = sentences(1, 40), sentences(2, 40)
    planted = QUESTION.upper().replace(",", " --").replace(" ", "\n")
    cut = against(tmp_path, QUESTION).cut(f"{before} {planted} {after}")
    assert cut is not None and cut.reason is None
    assert [piece.text for piece in cut.pieces] == [before[:-199].strip(), after[199:].strip()]
    assert cut.characters == len(f"{before} {planted} {after}") - sum(len(piece.text) for piece in cut.pieces)


def test_fewer_words_in_a_row_are_no_match(tmp_path: Path) -> None:
    twelve = " ".join(QUESTION.split()[:12])
    rule = against(tmp_path, QUESTION)
    assert rule.cut(f"{twelve} unlike {sentences(1, 30)}") is None
    assert rule.cut("") is None and rule.cut("short") is None
    assert against(tmp_path, twelve).cut(QUESTION) is None


def test_documents_in_too_many_pieces_and_with_none_left_are_dropped(tmp_path: Path) -> None:
    rule = against(tmp_path, QUESTION)
    ten = f" {QUESTION} ".join(sentences(i, 20) for i in range(10))
    cut = rule.cut(ten)
    assert cut is not None and len(cut.pieces) == 10
    cut = rule.cut(f"{ten} {QUESTION} {sentences(99, 20)}")
    assert cut is not None and (cut.pieces, cut.reason) == ((), "decontamination: many pieces")
    cut = rule.cut(f"{QUESTION} {sentences(1, 5)}")
    assert cut is not None and cut.reason == "decontamination: no piece long enough"


def test_pieces_are_documents_with_numbers(tmp_path: Path) -> None:
    document = Document(f"{sentences(1, 40)} {QUESTION} {sentences(2, 40)}", "id", "corpus", "uri", {"offset": 7})
    cut = against(tmp_path, QUESTION).cut(document.text)
    assert cut is not None
    pieces = list(pieces_of(document, cut))
    assert [(p.id, p.source, p.uri, p.meta) for p in pieces] == [
        (f"id#{i}", "corpus", "uri", {"offset": 7}) for i in (1, 2)
    ]


def test_fields_are_joined_and_lists_taken_one_by_one(tmp_path: Path) -> None:
    row = {"question": "one two three four five six seven", "choices": ["eight nine", "ten eleven"], "gold": 1}
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress((json.dumps(row) + "\n").encode()))
    paths = [str(tmp_path / "*.jsonl.gz")]
    joined = Decontamination(sets={"e": EvaluationSet(paths=paths, fields=["question", "choices"])}, ngram_words=9)
    alone = Decontamination(sets={"e": EvaluationSet(paths=paths)}, ngram_words=7)
    assert joined.cut("One two three four five six seven. Ten? Eleven") is not None
    assert joined.cut("one two three four five six seven eight eleven") is None
    assert alone.cut("one two three four five six seven") is not None


@pytest.mark.parametrize("name", ["lambada_openai", "piqa", "winogrande"])
def test_real_evaluation_texts_are_found_in_real_pages(name: str) -> None:
    fields = {"lambada_openai": ["context", "continuation"], "piqa": ["query", "choices"], "winogrande": None}[name]
    path = real(f"eval/{name}.jsonl")
    rule = Decontamination(sets={name: EvaluationSet(paths=[str(path)], fields=fields)})
    pages = read(CommonCrawl(paths=[]), real("common_crawl/site-pages-wget.warc.gz"))[0]
    pages = [page for page in pages if len(page.text) > 1000]
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    tested = 0
    for page, row in zip(pages, rows[100:], strict=False):
        text = Clean().text(page.text)
        planted = row.get("context") or "".join(
            [row.get("query", ""), *row.get("choices", [row.get("continuation")])[:1]]
        )
        assert rule.cut(text) is None
        if len(planted.split()) >= 14:
            middle = text.index(" ", len(text) // 2)
            cut = rule.cut(f"{text[:middle]} {planted.title()}{text[middle:]}")
            assert cut is not None and all(planted[20:60].lower() not in piece.text.lower() for piece in cut.pieces)
            tested += 1
    assert tested >= 10 or name == "winogrande"


def test_files_are_identified_by_their_bytes(tmp_path: Path) -> None:
    rule = against(tmp_path, QUESTION)
    (tmp_path / "moved.txt").write_text(QUESTION, encoding="utf-8")
    moved = Decontamination(sets={"e": EvaluationSet(paths=[str(tmp_path / "moved.txt")])})
    assert rule.identity() == moved.identity()
    (tmp_path / "moved.txt").write_text("Other.", encoding="utf-8")
    assert rule.identity() != moved.identity()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.jsonl", '{"a": "x"}\n{"a": 1}', r"e.jsonl: line 2: no text in field 'a'"),
        ("e.jsonl", "[]", r"e.jsonl: line 1: expected a JSON object"),
        ("e.jsonl", "no", r"e.jsonl: line 1: Expecting value"),
        ("e.csv", "x", r"decontamination.sets.e: .*e.csv: expected one of .txt, .txt.gz, .txt.bz2, .jsonl, "),
        ("e.txt.gz", "x", r"e.txt.gz: cannot be read: Not a gzipped file"),
        (None, "", r"decontamination.sets.e: .*absent.txt: no such file"),
    ],
)
def test_evaluation_files_that_cannot_be_read(tmp_path: Path, name: str | None, content: str, message: str) -> None:
    if name:
        (tmp_path / name).write_text(content, encoding="utf-8")
    rule = Decontamination(sets={"e": EvaluationSet(paths=[str(tmp_path / (name or "absent.txt"))], fields=["a"])})
    with pytest.raises(ConfigError, match=message):
        rule.cut("text")


def test_real_articles_hold_nothing_of_the_sets() -> None:
    paths = [str(real("eval/lambada_openai.jsonl"))]
    rule = Decontamination(sets={"lambada": EvaluationSet(paths=paths)})
    articles = read(Wikipedia(paths=[]), real("wikipedia/enwiki-pages-articles-excerpt.xml.bz2"))[0]
    assert sum(rule.cut(article.text) is not None for article in articles) == 0
