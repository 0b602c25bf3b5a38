from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_pipeline import dropped
from data_pipeline.document import Document
from data_pipeline.dropped import DROPPED, EXAMPLE_CHARS, EXAMPLES, Dropped, example_place


def document(i: int, text: str = "") -> Document:
    return Document(text or f"text {i}", f"id-{i}", "c", f"https://e.org/{i}", {"input": "a.jsonl", "offset": i})


def test_every_document_has_a_row_and_the_smallest_hashes_have_their_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dropped, "ROWS", 64)
    log = Dropped(tmp_path)
    for i in range(1000):
        log.add(document(i), "odd" if i % 2 else "even")
    (name,) = log.close()
    rows = pq.read_table(tmp_path / name).to_pylist()
    assert [row["id"] for row in rows] == [f"id-{i}" for i in range(1000)]
    assert rows[7] | {"text": None} == {
        "reason": "odd", "id": "id-7", "uri": "https://e.org/7", "input": "a.jsonl", "offset": 7, "language": None,
        "characters": 6, "text": None, "stays": None,
    }  # fmt: skip
    for reason in ("odd", "even"):
        mine = [row for row in rows if row["reason"] == reason]
        kept = [row for row in mine if row["text"] is not None]
        smallest = sorted(mine, key=lambda row: example_place(row["id"]))[:EXAMPLES]
        assert all(row["text"] == f"text {row['offset']}" for row in smallest)
        assert EXAMPLES <= len(kept) < 5 * EXAMPLES


def test_the_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    hashes = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        log = Dropped(tmp_path / name)
        for i in range(100):
            log.add(document(i), "why")
        hashes.append(log.close())
    assert hashes[0] == hashes[1]
    assert (tmp_path / "a" / DROPPED).read_bytes() == (tmp_path / "b" / DROPPED).read_bytes()


def test_texts_are_cut_and_half_characters_written(tmp_path: Path) -> None:
    log = Dropped(tmp_path)
    log.add(document(1, "é\ud800" + "x" * 5000), "raises")
    log.close()
    (row,) = pq.read_table(tmp_path / DROPPED).to_pylist()
    assert row["text"].startswith("é?xx") and len(row["text"]) == EXAMPLE_CHARS and row["characters"] == 5002


def test_nothing_dropped_is_no_file(tmp_path: Path) -> None:
    assert Dropped(tmp_path).close() == {} and not list(tmp_path.iterdir())
