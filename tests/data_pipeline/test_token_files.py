import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import configs
from configs import ConfigError
from data_pipeline import prepare
from data_pipeline.document import Document
from data_pipeline.made_once import make_tokenizer
from data_pipeline.plan import cut
from data_pipeline.preparation import Preparation
from data_pipeline.shards import Manifest
from data_pipeline.sources.inputs import InputError, Part, Reading, describe
from data_pipeline.sources.token_files import TokenFiles
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.work import WorkError
from tests.data_pipeline.inputs import read, sentences, write_corpora
from tests.data_pipeline.test_prepare import tokens

DOCUMENTS = [[5, 6, 7], [8], list(range(300)), [9] * 40]


def source(path: Path, **more: str) -> TokenFiles:
    return TokenFiles.model_validate({"paths": [str(path)], **more})


def write_megatron(path: Path, documents: list[list[list[int]]], code: int = 8, dtype: str = "<u2") -> Path:
    """Documents of sequences of ids, as Megatron's index version 1 has them."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = [len(sequence) for sequence in sequences]
    itemsize = np.dtype(dtype).itemsize
    places = [itemsize * sum(lengths[:i]) for i in range(len(lengths))]
    edges = [sum(map(len, documents[:i])) for i in range(len(documents) + 1)]
    path.write_bytes(b"".join(np.array(sequence, dtype).tobytes() for sequence in sequences))
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(sequences), len(edges))
        + np.array(lengths, "<i4").tobytes()
        + np.array(places, "<i8").tobytes()
        + np.array(edges, "<i8").tobytes()
    )
    return path


def write_datatrove(path: Path, documents: list[list[int]], dtype: str = "<u2") -> Path:
    ends = np.cumsum([len(document) for document in documents])
    path.write_bytes(b"".join(np.array(document, dtype).tobytes() for document in documents))
    Path(f"{path}.index").write_bytes(ends.astype("<u8").tobytes())
    return path


def ids(documents: list[Document]) -> list[list[int]]:
    return [document.ids.tolist() for document in documents if document.ids is not None]


def write(folder: Path, kind: str, documents: list[list[int]] = DOCUMENTS) -> Path:
    if kind == "ds u16":
        return write_datatrove(folder / "a.ds", documents)
    if kind == "ds u32":
        return write_datatrove(folder / "a.ds", documents, "<u4")
    if kind == "bin u16":
        return write_megatron(folder / "a.bin", [[document] for document in documents])
    return write_megatron(folder / "a.bin", [[d[:1], d[1:]] for d in documents], 4, "<i4")  # two sequences each


KINDS = ["ds u16", "ds u32", "bin u16", "bin i32"]


@pytest.mark.parametrize("kind", KINDS)
def test_documents_have_their_ids_and_places(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    documents, reading = read(source(path), path)
    assert ids(documents) == DOCUMENTS and not reading.set_aside
    size = 4 if "32" in kind else 2
    assert [d.id for d in documents] == [f"{path}:{i}" for i in range(4)]
    assert [d.meta["offset"] for d in documents] == [0, 3 * size, 4 * size, 304 * size]


@pytest.mark.parametrize("kind", KINDS)
def test_every_split_of_a_file_gives_each_document_once(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    input = describe(str(path))
    for slice_bytes in (*range(1, 40, 7), 100, 601):
        found = []
        for slice in cut([input], source(path).can_split, slice_bytes, 0, 0):
            for part in slice.parts:
                with Reading(part, "c") as reading:
                    found += list(source(path).read(reading))
                    assert not reading.set_aside
        assert ids(found) == DOCUMENTS and [d.id for d in found] == [f"{path}:{i}" for i in range(4)], slice_bytes


def test_files_that_datatrove_writes_are_read(tmp_path: Path) -> None:
    writer: Any = pytest.importorskip("datatrove.pipeline.tokens.tokenizer")
    for size in (2, 4):
        file = writer.TokenizedFile(str(tmp_path), f"{size}.ds", token_size=size)
        for document in DOCUMENTS:
            file.write([*document, 499], None)
        file.close()
        documents, _ = read(source(tmp_path / f"{size}.ds"), tmp_path / f"{size}.ds")
        assert ids(documents) == [[*document, 499] for document in DOCUMENTS]


def test_an_empty_document_and_an_empty_file_give_none(tmp_path: Path) -> None:
    path = write_megatron(tmp_path / "a.bin", [[[1, 2]], [], [[3]], []])
    documents, reading = read(source(path), path)
    assert ids(documents) == [[1, 2], [3]] and reading.set_aside == {"empty document": 2}
    for path in (write_megatron(tmp_path / "b.bin", []), write_datatrove(tmp_path / "b.ds", [])):
        documents, reading = read(source(path), path)
        assert not documents and not reading.set_aside


def spoil(path: Path, how: str) -> None:
    index = path.with_suffix(".idx") if path.suffix == ".bin" else Path(f"{path}.index")
    data = bytearray(index.read_bytes())
    if how == "magic":
        data[:2] = b"XX"
    elif how == "version":
        data[9] = 2
    elif how == "floats":
        data[17] = 6
    elif how == "cut":
        data = data[:-5]
    elif how == "head":
        data = data[:20]
    elif how == "gap":
        data[34 + 16 : 34 + 24] = struct.pack("<q", 2)  # the place of the first of four sequences
    elif how == "order":
        at = len(data) - 24 if path.suffix == ".bin" else 8
        data[at - 8 : at], data[at : at + 8] = data[at : at + 8], data[at - 8 : at]
    elif how == "short":
        path.write_bytes(path.read_bytes()[:-11])
    elif how == "long":
        path.write_bytes(path.read_bytes() + b"x" * 8)
    index.write_bytes(data)


@pytest.mark.parametrize(
    ("kind", "how", "said", "kept"),
    [
        ("bin u16", "magic", "byte 0: {index} does not begin with b'MMIDIDX\\x00\\x00': not an index of Megatron's", 0),
        (
            "bin u16",
            "version",
            "byte 0: {index} is of version 2 with ids of type 8; expected version 1 and whole numbers",
            0,
        ),
        (
            "bin u16",
            "floats",
            "byte 0: {index} is of version 1 with ids of type 6; expected version 1 and whole numbers",
            0,
        ),
        ("bin u16", "head", "byte 0: {index} ends inside its head: 20 of 34 bytes", 0),
        ("bin u16", "cut", "byte 0: {index} is truncated: 117 bytes, expected 122", 0),
        ("bin u16", "gap", "byte 2: {index}: sequences from 0 on are not one behind the other", 0),
        ("bin u16", "order", "byte 0: {index} is damaged: documents 0 to 3 name sequences out of order", 0),
        ("bin u16", "short", "byte 608: the file ends inside document 3", 3),
        ("bin u16", "long", "byte 0: its index covers 688 of 696 bytes: of another file, or truncated", 0),
        ("ds u16", "cut", "byte 0: its index is truncated: 27 bytes are no multiple of 8", 0),
        ("ds u16", "order", "byte 0: the index is damaged: an end before its begin, from document 0 on", 0),
        ("ds u16", "short", "byte 0: the file is truncated: 677 bytes, at least 688 in its index", 0),
        ("ds u32", "short", "byte 1216: the file ends inside document 3", 3),
        ("ds u32", "long", "byte 0: its index covers 1376 of 1384 bytes: of another file, or truncated", 0),
    ],
)
def test_damage_is_one_line_and_what_comes_before_is_kept(
    tmp_path: Path, kind: str, how: str, said: str, kept: int
) -> None:
    path = write(tmp_path, kind)
    spoil(path, how)
    documents, reading = read(source(path), path)
    assert ids(documents) == DOCUMENTS[:kept]
    assert reading.set_aside == {"damaged input": 1}
    line = f"{path}: damaged at {said.replace('{index}', str(path.with_suffix('.idx')))}"
    assert reading.notes == [f"{line}; what comes before is kept"]
    with pytest.raises(InputError) as error:
        read(source(path, on_damage="stop"), path)
    assert str(error.value) == f"{line}; get the file again, or set on_damage: skip to keep what comes before"


def test_a_missing_index_is_said_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "bin u16")
    path.with_suffix(".idx").unlink()
    with pytest.raises(ConfigError) as error:
        source(path).inputs()
    assert str(error.value) == f"paths: {path.with_suffix('.idx')}: an index is missing; put it beside its file"


# --- to shards ------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a tokenizer, the tokens of the books in both formats, and tokens.yaml."""
    monkeypatch.chdir(tmp_path)
    write_corpora(tmp_path)
    books = {"books": {"kind": "bookcorpus", "paths": ["books"]}}
    made = {"name": "text", "out": "text", "tokenizer": {"kind": "train", "vocab_size": 500}, "corpora": books}
    tokenizer = make_tokenizer(configs.build(Preparation, made, "test"))
    documents = [[*tokenizer.encode_batch([sentences(i, 30)])[0].tolist(), tokenizer.end_of_text] for i in range(60)]
    write_megatron(tmp_path / "a.bin", [[document] for document in documents])
    write_datatrove(tmp_path / "b.ds", [document[:-1] for document in documents])
    config = {
        "name": "tokens",
        "out": "out",
        "tokenizer": {"kind": "file", "path": "text/tokenizer.json"},
        "corpora": {name: {"kind": "token_files", "paths": [file]} for name, file in (("m", "a.bin"), ("d", "b.ds"))},
        "slice_bytes": 4000,
        "block_tokens": 1024,
        "filters": {"min_chars": 10},
    }
    (tmp_path / "tokens.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return tmp_path


def load(*overrides: str) -> Preparation:
    return configs.load(Preparation, Path("tokens.yaml"), overrides)


def test_tokens_become_shards_as_they_are_each_document_closed_once(here: Path) -> None:
    tokenizer = Tokenizer.load(here / "text/tokenizer.json")
    texts = [sentences(i, 30) for i in range(60)]
    megatron, datatrove = prepare.run(load("validation.fraction=0"))
    assert megatron.documents == datatrove.documents == 60
    for corpus in ("m", "d"):
        assert [tokenizer.decode(ids) for ids in tokens(here / "out" / corpus)] == texts
        assert len(Manifest.open(here / "out" / corpus).table) > 3  # slices of one file
    assert megatron.tokens == sum(len(tokenizer.encode_batch([text])[0]) + 1 for text in texts)


def test_equal_tokens_fall_to_validation_alike(here: Path) -> None:
    megatron, datatrove = prepare.run(load("validation.fraction=0.3"))
    assert megatron.validation_tokens == datatrove.validation_tokens > 0


def test_a_tokenizer_must_be_given(here: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load("tokenizer={kind: train, vocab_size: 500}")
    assert "corpora.m holds tokens already: expected tokenizer.kind file, with the path of the tokenizer.json" in str(
        error.value
    )


def test_an_id_that_the_tokenizer_does_not_have_stops_the_work(here: Path) -> None:
    write_datatrove(here / "b.ds", [[1, 2], [3, 500]])
    with pytest.raises(WorkError) as error:
        prepare.run(load("corpora.m.paths=[b.ds]", "corpora.d.paths=[a.bin]"))
    assert str(error.value) == (
        "m: b.ds:1: token id 500 is not among the 500 of the tokenizer; "
        "set tokenizer.path to the one that made this file"
    )


def test_an_index_that_changes_is_an_input_that_changes(here: Path) -> None:
    prepare.run(load())
    assert prepare.run(load())
    write_megatron(here / "a.bin", [[[1, 2, 3]] * 3])
    data = (here / "a.bin").read_bytes()
    prepare.run(load("out=other", "corpora.d.paths=[a.bin]", "corpora.d.kind=token_files"))
    write_megatron(here / "a.bin", [[[1, 2, 3]], [[1, 2, 3], [1, 2, 3]]])
    assert (here / "a.bin").read_bytes() == data  # only the index is another
    with pytest.raises(ConfigError, match=r"inputs of finished shards have changed: a\.bin: written anew since it was"):
        prepare.run(load("out=other", "corpora.d.paths=[a.bin]", "corpora.d.kind=token_files"))


def test_parts_are_known_by_their_hash_with_the_index(tmp_path: Path) -> None:
    def hashed(path: Path) -> str:
        with Reading(Part(describe(str(path))), "c") as reading:
            return reading.finish()

    path = write_megatron(tmp_path / "a.bin", [[[1, 2, 3]]])
    first = hashed(path)
    assert hashed(path) == first
    write_megatron(path, [[[1, 2]], [[3]]])
    assert hashed(path) != first
