import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.document import Document
from data_pipeline.sources.inputs import InputError, Part, Reading, describe, zstd
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


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "a", "meta": {"text": "b"}}',  # of another object
        b'{"kind": "text", "text" : "a"}',
        b'{"te\\u0078t": "a"}',
        b'{"text": "a", "score": NaN}',
        b'{"text": "a", "n": 123456789012345678901234567890}',
    ],
)
def test_what_the_fast_parser_does_not_take_is_read_all_the_same(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(line)
    documents, reading = read(source(path), path)
    assert [d.text for d in documents] == ["a"] and not reading.set_aside


@pytest.mark.parametrize("field", ["text", "id", "url"])
def test_a_field_of_ours_given_twice_is_seen_however_it_is_spaced(tmp_path: Path, field: str) -> None:
    path = tmp_path / "a.jsonl"
    row = {"text": "a", "id": "b", "url": "c"}
    for space in ("", " ", "\t"):
        path.write_text(json.dumps(row)[:-1] + f', "{field}"{space}: "x"}}')
        documents, reading = read(source(path, id_field="id", uri_field="url"), path)
        assert not documents and reading.set_aside == {"a key given twice": 1}


# --- Parquet --------------------------------------------------------------------------------------------------------


def write_parquet(path: Path, texts: list[object], rows: int = 3) -> Path:
    table = pa.table({"n": list(range(len(texts))), "text": texts, "url": [f"https://e.org/{t}" for t in texts]})
    pq.write_table(table, path, row_group_size=rows, compression="zstd")
    return path


TEXTS: list[object] = [f"text {i} " * 40 for i in range(11)]


def test_a_parquet_row_is_a_document(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    documents, reading = read(source(path), path)
    assert [d.text for d in documents] == TEXTS and not reading.set_aside
    assert [d.id for d in documents] == [f"{path}:{i}" for i in range(11)]
    assert documents[0].meta == {"input": str(path), "offset": 4} and len({d.meta["offset"] for d in documents}) == 4
    documents, _ = read(source(path, id_field="n", uri_field="url"), path)
    assert [(d.id, d.uri) for d in documents] == [(str(i), f"https://e.org/{TEXTS[i]}") for i in range(11)]


def test_every_split_of_a_parquet_file_gives_each_row_once(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    size = path.stat().st_size
    assert source(path).can_split(describe(str(path)))
    for a in range(1, size, 97):
        parts = [d for start, stop in ((0, a), (a, size)) for d in read_range(path, start, stop)]
        assert [(d.id, d.text) for d in parts] == [(f"{path}:{i}", text) for i, text in enumerate(TEXTS)], a


def test_a_parquet_row_without_text_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["one", None, "two"])
    documents, reading = read(source(path), path)
    assert [d.text for d in documents] == ["one", "two"]
    assert reading.notes == [f"{path}: row 1: field 'text': expected text, got NoneType"]
    with pytest.raises(
        InputError, match="damaged at byte 4: row 1: field 'text': expected text, got NoneType; get the"
    ):
        read(source(path, on_damage="stop"), path)


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["one"])
    with pytest.raises(InputError) as error:
        read(source(path, text_field="body"), path)
    assert str(error.value) == f"{path}: no column 'body'; it has n, text, url"


def test_a_damaged_row_group_spoils_no_other(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    column = pq.ParquetFile(path).metadata.row_group(1).column(1)
    data = bytearray(path.read_bytes())
    at = column.data_page_offset + 8
    data[at : at + 40] = bytes(40)
    path.write_bytes(data)
    documents, reading = read(source(path), path)
    assert [d.id for d in documents] == [f"{path}:{i}" for i in range(11) if i not in (3, 4, 5)]
    assert reading.set_aside == {"damaged row group": 1}
    assert re.fullmatch(rf"{path}: damaged at byte \d+: not whole Parquet \(.*\); the rest is kept", reading.notes[0])
    with pytest.raises(InputError):
        read(source(path, on_damage="stop"), path)


@pytest.mark.parametrize("cut", [0, 3, 500, -3])
def test_a_truncated_parquet_file_is_told(tmp_path: Path, cut: int) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    path.write_bytes(path.read_bytes()[:cut])
    documents, reading = read(source(path), path)
    assert not documents and reading.set_aside == {"damaged input": 1}
    assert reading.notes[0].startswith(f"{path}: damaged at byte 0: not whole Parquet (")
    with pytest.raises(InputError):
        read(source(path, on_damage="stop"), path)


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.txt.zst"])
def test_zstd_is_unpacked(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    data = b'{"text": "one"}\n{"text": "two"}\n'
    path.write_bytes(zstd.compress(data[:20]) + zstd.compress(data[20:]))
    documents, _ = read(source(path), path)
    assert [d.text for d in documents] == (["one", "two"] if "jsonl" in name else [data.decode()])
