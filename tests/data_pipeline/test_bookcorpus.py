import io
import tarfile
from pathlib import Path
from typing import Literal

import pytest

from data_pipeline.sources.bookcorpus import BookCorpus, paragraphs, sentences
from tests.data_pipeline.inputs import read, real

PACKED: dict[str, Literal["w:", "w:gz", "w:bz2"]] = {"b.tar": "w:", "b.tar.gz": "w:gz", "b.tar.bz2": "w:bz2"}


def source(path: Path, lines: bool = True) -> BookCorpus:
    return BookCorpus(paths=[str(path)], one_sentence_per_line=lines)


@pytest.mark.parametrize(
    ("paragraph", "found"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ('"Come here!" said he. "Now."', ['"Come here!" said he.', '"Now."']),
        ("“Stop.” She stopped.", ["“Stop.”", "She stopped."]),
        ("Mr. and Mrs. Smith met Dr. J. B. Ox in St. Ives.", ["Mr. and Mrs. Smith met Dr. J. B. Ox in St. Ives."]),
        ("He was there, e.g. Monday. Then not.", ["He was there, e.g. Monday.", "Then not."]),
        ("My sister,--Mrs. Joe Gargery, who cried. I ran.", ["My sister,--Mrs. Joe Gargery, who cried.", "I ran."]),
        ("It cost 3.50 in all. 1984 was a year.", ["It cost 3.50 in all.", "1984 was a year."]),
        ("Well... perhaps. No…", ["Well... perhaps.", "No…"]),
        ("Chapter 1. The Start", ["Chapter 1. The Start"]),
        ("", []),
    ],
)  # fmt: skip
def test_sentences(paragraph: str, found: list[str]) -> None:
    assert sentences(paragraph) == found


def test_long_runs_cost_no_more_than_others() -> None:
    for run in ("." * 300_000, "_" * 300_000, "*" * 300_000, " " * 300_000, "* " * 150_000):
        assert "".join(paragraphs(f"One{run}x")[0]).startswith("One")
        assert sentences(f"One{run}x")[0].startswith("One")


def test_a_book_with_everything_around_it() -> None:
    book = (
        "The Project Gutenberg eBook of X\r\n\r\nThis ebook is for the use of anyone anywhere.\r\n\r\n"
        "*** START OF THE PROJECT GUTENBERG EBOOK X ***\r\n\r\n"
        "# Title: The Book\r\n\r\n## Author: A. Person\r\n\r\n## Year: 1900\r\n\r\n-------\r\n\r\n"
        "## Chapter 1\r\n\r\nShe _never_ looked through **them** for so small a thing as a *boy*.\r\n\r\n* * *\r\n\r\n"
        "The snake_case and __init__ stay, as does 2 * 3 * 4.\r\n\r\n"
        "*** END OF THE PROJECT GUTENBERG EBOOK X ***\r\n\r\nSmall print.\r\n"
    )
    lines, title = paragraphs(book)
    assert title == "The Book"
    assert lines == [
        "Chapter 1",
        "She never looked through them for so small a thing as a boy.",
        "The snake_case and __init__ stay, as does 2 * 3 * 4.",
    ]


def test_broken_lines_are_joined_and_verse_is_not() -> None:
    paragraph = [
        "It was the best of times, it was the worst of times, it was the age of",
        "wisdom, it was the age of foolishness, it was the epoch of belief, it",
        "was the epoch of incredulity, it was the season of Light, it was the",
        "season of Darkness, it was the spring of hope, it was--",
        "despair.",
    ]
    verse = ["Twas brillig, and the slithy toves", "Did gyre and gimble in the wabe", "All mimsy were the borogoves"]
    book = "\n\n".join(["\n".join(paragraph)] * 4 + ["\n".join(f"    {line}" for line in verse)])
    lines, _ = paragraphs(book)
    assert lines[0] == " ".join(paragraph[:4]) + paragraph[4]
    assert lines[4:] == verse


def test_whole_paragraphs_stay_lines() -> None:
    book = "\n".join(f"A sentence of its own, number {i}, as in the first BookCorpus ." for i in range(50))
    assert paragraphs(book)[0] == book.split("\n")


@pytest.mark.parametrize("name", ["a.txt", "b.tar", "b.tar.gz", "b.tar.bz2"])
def test_books_in_files_and_in_tars(tmp_path: Path, name: str) -> None:
    book = b"Title: T\r\n\r\nOne. Two.\r\n\r\nThree."
    path = tmp_path / name
    if name == "a.txt":
        path.write_bytes(book)
    else:
        with tarfile.open(path, PACKED[name]) as tar:
            for member, data in (("x/../../1.txt", book), ("cover.jpg", b"\xff\xd8"), ("2.txt", b"Four.")):
                entry = tarfile.TarInfo(member)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
            link = tarfile.TarInfo("3.txt")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    documents, reading = read(source(path), path)
    ids = [str(path)] if name == "a.txt" else ["x/../../1.txt", "2.txt"]
    assert [(d.id, d.text) for d in documents] == list(zip(ids, ["One.\nTwo.\nThree.", "Four."], strict=False))
    assert documents[0].meta["title"] == "T" and not reading.set_aside
    assert read(source(path, lines=False), path)[0][0].text == "One. Two.\nThree."
    assert list(tmp_path.iterdir()) == [path]  # nothing was extracted


@pytest.mark.parametrize("name", ["b.tar", "b.tar.gz"])
def test_a_tar_cut_anywhere_is_told(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with tarfile.open(path, PACKED[name]) as tar:
        for i in range(5):
            data = b"A line of the book.\n" * (50 * i + 1)
            entry = tarfile.TarInfo(f"{i}.txt")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0")) if name == "b.tar" else len(whole)
    for cut in range(0, end, 97):
        path.write_bytes(whole[:cut])
        documents, reading = read(source(path), path)
        assert reading.set_aside["damaged input"] == 1, cut
        assert [d.id for d in documents] == [f"{i}.txt" for i in range(len(documents))] and len(documents) < 6


def test_real_books() -> None:
    folder = real("books")
    path = folder / "tom-sawyer.txt"
    (book,), _ = read(source(path), path)
    assert book.meta["title"] == "The Adventures of Tom Sawyer"
    assert book.text.startswith(
        'CHAPTER I\n"TOM!"\nNo answer.\n"TOM!"\nNo answer.\n"What\'s gone with that boy, I wonder?\n'
    )
    assert (
        "She seldom or never looked through them for so small a thing as a boy; they were her state pair" in book.text
    )
    for path in sorted(folder.glob("*.txt")):
        (book,), reading = read(source(path), path)
        lines = book.text.split("\n")
        assert not reading.set_aside and "\r" not in book.text and "Title:" not in book.text
        kept = len(book.text) / path.stat().st_size
        assert 0.95 < kept <= 1, path
        assert sum(len(line) for line in lines) / len(lines) < 250, path
