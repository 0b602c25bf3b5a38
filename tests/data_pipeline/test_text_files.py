import gzip
import json
from pathlib import Path

import pytest

from data_pipeline.document import Document
from data_pipeline.sources.inputs import InputError, Part, Reading, describe
from data_pipeline.sources.text_files import TextFiles
from tests.data_pipeline.inputs import read


def source(path: Path, **more: str) -> TextFiles:
    return TextFiles.model_validate({"paths": [str(path)], **more})


def read_range(path: Path, start: int, stop: int) -> list[Document]:
    with Reading(Part(describe(str(path)), start, stop), "c") as reading:
        return list(source(path).read(reading))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_text_file_is_a_document(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    data = "Zeile eins – ü\nZeile zwei".encode()
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    documents, _ = read(source(path), path)
    assert documents == [
        Document("Zeile eins – ü\nZeile zwei", str(path), "corpus", str(path), {"input": str(path), "offset": 0})
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_json_line_is_a_document(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    rows = [{"body": f"text {i}", "n": i, "url": f"https://e.org/{i}"} for i in range(3)]
    data = "\ufeff".encode() + "\n\n".join(map(json.dumps, rows)).encode()
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    documents, reading = read(source(path, text_field="body", id_field="n", uri_field="url"), path)
    assert [(d.text, d.id, d.uri) for d in documents] == [(f"text {i}", str(i), f"https://e.org/{i}") for i in range(3)]
    assert not reading.set_aside
    documents, _ = read(source(path, text_field="body"), path)
    assert documents[0].id == f"{path}:0" and len({d.id for d in documents}) == 3


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "x"', "not JSON (Expecting ',' delimiter)"),
        (b'{"body": "x"}', "no field 'text'"),
        (b'{"text": 5}', "field 'text': expected text, got int"),
        (b'{"text": NaN}', "field 'text': expected text, got float"),
        (b'{"text": null}', "field 'text': expected text, got NoneType"),
        (b'{"text": "a", "text": "b"}', "a key given twice"),
        (b'["text"]', "expected a JSON object, got list"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "not JSON (nested too deep)"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n')
    documents, reading = read(source(path), path)
    assert [d.text for d in documents] == ["one", "two"]
    assert reading.set_aside == {reason: 1}
    assert reading.notes == [f"{path}: line 3: {reason}"]
    with pytest.raises(InputError) as error:
        read(source(path, on_damage="stop"), path)
    assert str(error.value) == (
        f"{path}: damaged at byte 17: line 3: {reason}; "
        "get the file again, or set on_damage: skip to keep what comes before"
    )


def test_every_split_of_a_file_gives_each_line_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(json.dumps({"text": "x" * (i % 7)}).encode() + b"\n" for i in range(12)))
    whole = read(source(path), path)[0]
    size = path.stat().st_size
    for a in range(1, size + 1, 5):
        for b in range(a, size + 1, 11):
            parts = [d for start, stop in ((0, a), (a, b), (b, size)) for d in read_range(path, start, stop)]
            assert [(d.id, d.text, d.meta["offset"]) for d in parts] == [
                (d.id, d.text, d.meta["offset"]) for d in whole
            ], (a, b)


def test_a_bad_line_in_a_range_has_its_number_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' * 10 + b"bad\n")
    with Reading(Part(describe(str(path)), 100, path.stat().st_size), "c") as reading:
        list(source(path).read(reading))
    assert reading.notes == [f"{path}: line 11: not JSON (Expecting value)"]


def test_only_plain_json_lines_can_be_split(tmp_path: Path) -> None:
    for name, can in (("a.jsonl", True), ("a.jsonl.gz", False), ("a.txt", False)):
        (tmp_path / name).write_bytes(b"")
        assert source(tmp_path / name).can_split(describe(str(tmp_path / name))) is can


def test_an_empty_file_has_no_documents(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes(b"")
        documents, reading = read(source(tmp_path / name), tmp_path / name)
        assert not documents and not reading.set_aside
