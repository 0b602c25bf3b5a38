"""The shard format: what is written, what a stock reader and ours read back, and what damage is noticed."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import ConfigError, fingerprint
from data_pipeline.document import Document
from data_pipeline.files import Folder
from data_pipeline.shards import (
    MANIFEST,
    SPLITS,
    DamagedBlock,
    Format,
    Manifest,
    SealedSlice,
    ShardError,
    ShardRecord,
    Shards,
    SliceWriter,
    Split,
    file_hash,
    id_hash,
    seal,
    verify,
)
from tests.corpora import FORMAT, make_corpus

TINY = Format(block_tokens=64, vocab_size=509, end_of_text=508, shard_bytes=2048)
GOLDEN = {
    "train-00000.tar": "25dad491fd53f3dd4889665f912d84c8",
    "train-00001.index.npy": "7acc2b6182464fdf45b7157b665ce985",
    "validation-00000.tar": "f670d57b66d77084f4a91b8032aa9c47",
    "ids.npy": "1b4ec42eea8ad2dd2f6be57fff46b8ff",
}
GOLDEN_ID = 9363323714861318736
Ids = npt.NDArray[Any]


@dataclass
class Written:
    """One slice of documents, and what it should have become."""

    folder: Path
    format: Format
    ids: list[Ids]
    splits: list[Split]
    records: list[ShardRecord]

    @property
    def slice(self) -> Path:
        return self.folder / "slices" / "s0"

    def stream(self, split: Split) -> Ids:
        end = [self.format.end_of_text]
        parts = [np.append(ids, end) for ids, its in zip(self.ids, self.splits, strict=True) if its == split]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def starts(self, split: Split) -> list[tuple[int, int, int]]:
        """(ordinal, first token, end) of each document in its split's stream."""
        found, position = [], 0
        for ordinal, (ids, its) in enumerate(zip(self.ids, self.splits, strict=True)):
            if its == split:
                found.append((ordinal, position, position + len(ids) + 1))
                position += len(ids) + 1
        return found

    def seal(self) -> Manifest:
        (self.slice / "slice.json").write_text("{}")
        hashes = {name: file_hash(self.slice / name) for name in ("ids.npy", "slice.json")}
        sealed = SealedSlice("s0", 0, self.records, *hashes.values())
        files = {} if self.records else {f"slices/s0/{name}": hash_ for name, hash_ in hashes.items()}
        return seal(self.folder, self.format, {"tokenizer_sha256": "0" * 64, "files": files}, [sealed])


def name_of(ordinal: int) -> str:
    return f"doc/{ordinal}"


def write(folder: Path, lengths: Sequence[int], splits: Sequence[Split], format: Format = TINY) -> Written:
    """One slice of documents of random ids, of these lengths."""
    rng = np.random.default_rng(0)
    written = Written(folder, format, [], list(splits), [])
    written.slice.mkdir(parents=True)
    writer = SliceWriter(written.slice, format)
    for ordinal, (length, split) in enumerate(zip(lengths, splits, strict=True)):
        ids = rng.integers(0, format.vocab_size - 1, length)
        meta: dict[str, str | int] = {"input": "in.txt", "offset": 10 * ordinal, "language": "en"}
        writer.add(Document("", name_of(ordinal), "books", f"https://example.org/{ordinal}", meta), ids, split)
        written.ids.append(ids)
    written.records = writer.close()
    return written


def mixed(documents: int, split_every: int = 10) -> tuple[list[int], list[Split]]:
    """Lengths and splits of a few documents."""
    rng = random.Random(3)
    splits: list[Split] = ["validation" if i % split_every == 9 else "train" for i in range(documents)]
    return [rng.randrange(150) for _ in range(documents)], splits


# --- what is written -------------------------------------------------------------------------------------------------


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, *mixed(25)) for name in ("a", "b"))
    files = sorted(path.name for path in first.slice.iterdir())
    assert files == sorted(path.name for path in second.slice.iterdir())
    assert len(files) > 9
    assert all((first.slice / name).read_bytes() == (second.slice / name).read_bytes() for name in files)
    assert first.records == second.records


def test_golden_bytes(tmp_path: Path) -> None:
    """Whatever changes these has changed the format: a new version is due."""
    written = write(tmp_path, *mixed(12))
    names = ("train-00000.tar", "train-00001.index.npy", "validation-00000.tar", "ids.npy")
    assert {name: file_hash(written.slice / name) for name in names} == GOLDEN


def test_a_tar_has_only_plain_members(tmp_path: Path) -> None:
    written = write(tmp_path, *mixed(40))
    for path in sorted(written.slice.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        assert all(
            m.isreg() and m.mtime == 0 and m.uname == m.gname == "longhaul" and not m.pax_headers for m in members
        )
        numbers = [m.name[:4] for m in members]
        assert numbers == [f"{i // 2:04d}" for i in range(len(members))]
        assert all(m.name[5:] == "docs.npy" for m in members[::2])
        kinds = [m.name[5:] for m in members[1::2]]
        assert kinds == ["tokens.npy"] * kinds.count("tokens.npy") + ["tail.npy"] * kinds.count("tail.npy")
        assert kinds.count("tail.npy") == (path.name in (f"{r.name}.tar" for r in written.records if r.tail_tokens))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(509, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_the_vocabulary_decides_the_dtype(vocab_size: int, dtype: str, tmp_path: Path) -> None:
    format = Format(block_tokens=64, vocab_size=vocab_size, end_of_text=vocab_size - 1)
    written = write(tmp_path, *mixed(12), format=format)
    manifest = written.seal()
    block = manifest.shards("train", 0).read(0)
    assert block.dtype == manifest.head["dtype"] == dtype
    assert block.tolist() == written.stream("train")[:65].tolist()
    assert int(written.stream("train").max()) == vocab_size - 1


LENGTHS = st.integers(0, 200) | st.sampled_from([63, 64, 127, 128])
DOCUMENTS = st.lists(st.tuples(LENGTHS, st.sampled_from(SPLITS)), max_size=12)


@given(documents=DOCUMENTS, shard_bytes=st.sampled_from([1, 2048, 6000]))
@settings(max_examples=25, deadline=None)
def test_blocks_join_to_the_stream(documents: list[tuple[int, Split]], shard_bytes: int) -> None:
    with TemporaryDirectory() as folder:
        format = Format(64, 509, 508, shard_bytes)
        written = write(Path(folder), [n for n, _ in documents], [split for _, split in documents], format)
        manifest = written.seal()
        assert list(verify(Path(folder))) == []
        for split in SPLITS:
            if manifest.generations:
                check_split(written, manifest, split)


def check_split(written: Written, manifest: Manifest, split: Split) -> None:
    stream, starts, shards = written.stream(split), written.starts(split), manifest.shards(split, 0)
    # all blocks of 64 have their next token; what is left is the one tail
    blocks = max(len(stream) - 1, 0) // 64
    assert shards.blocks == blocks
    for block in range(blocks):
        shard, row = shards.locate(block)
        assert shards.read(block).tolist() == stream[block * 64 : block * 64 + 65].tolist()
        check_documents(shards, shard, row, block * 64, starts)
    assert len(shards.tails()) == (len(stream) > 0)
    for shard, row in shards.tails():
        assert shard == len(shards) - 1
        assert shards.member(shard, row).tolist() == stream[blocks * 64 :].tolist()
        check_documents(shards, shard, row, blocks * 64, starts)
    check_sidecars(written, shards, split, starts)
    total = manifest.generations[0][split]
    assert total["tokens"] == len(stream)
    assert total["blocks"] == blocks
    assert total["tail_tokens"] == len(stream) - blocks * 64
    assert total["documents"] == len(starts)
    assert total["bytes"] == sum(shards.path(i, "tar").stat().st_size for i in range(len(shards)))
    shards.close()


def check_documents(shards: Shards, shard: int, row: int, begin: int, starts: list[tuple[int, int, int]]) -> None:
    expected = [[n, start - begin] for n, start, end in starts if start < begin + 64 and end > begin]
    assert shards.documents(shard, row).tolist() == expected


def check_sidecars(written: Written, shards: Shards, split: Split, starts: list[tuple[int, int, int]]) -> None:
    begin, seen = 0, 0
    for shard, record in enumerate(r for r in written.records if r.split == split):
        rows = pq.read_table(shards.path(shard, "docs.parquet")).to_pylist()
        mine = [(n, start, end) for n, start, end in starts if begin <= start < begin + record.tokens]
        assert [(row["ordinal"], row["start"], row["tokens"]) for row in rows] == [(n, s, e - s) for n, s, e in mine]
        for row in rows:
            n = row["ordinal"]
            assert row["id"] == name_of(n)
            assert row["uri"] == f"https://example.org/{n}"
            assert (row["source"], row["input"], row["offset"], row["language"]) == ("books", "in.txt", 10 * n, "en")
        assert record.documents == len(rows)
        begin, seen = begin + record.tokens, seen + len(rows)
    assert seen == len(starts)


def test_a_stock_webdataset_reads_every_tar(tmp_path: Path) -> None:
    written = write(tmp_path, *mixed(30))
    for split in SPLITS:
        stream, starts, position = written.stream(split), written.starts(split), 0
        for path in sorted(written.slice.glob(f"{split}-*.tar")):
            samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
            assert [sample["__key__"] for sample in samples] == [f"{i:04d}" for i in range(len(samples))]
            for sample in samples:
                ids = sample.get("tokens.npy", sample.get("tail.npy"))
                assert ids.dtype == np.uint16
                assert ids.tolist() == stream[position : position + 65].tolist()
                expected = [[n, s - position] for n, s, end in starts if s < position + 64 and end > position]
                assert sample["docs.npy"].tolist() == expected
                position += 64 if "tokens.npy" in sample else len(ids)
        assert position == len(stream) > 0


def test_documents_are_found_by_their_ids(tmp_path: Path) -> None:
    written = write(tmp_path, *mixed(60), format=FORMAT)
    index = np.load(written.slice / "ids.npy", allow_pickle=False)
    assert len(index) == 60
    assert (np.diff(index["hash"].astype(object)) > 0).all()
    for ordinal in range(60):
        at = int(np.searchsorted(index["hash"], np.uint64(id_hash(name_of(ordinal)))))
        assert (int(index["hash"][at]), int(index["ordinal"][at])) == (id_hash(name_of(ordinal)), ordinal)
    absent = np.uint64(id_hash("doc/60"))
    assert absent not in index["hash"]
    assert id_hash("doc/0") == GOLDEN_ID
    assert id_hash("lone \ud800 surrogate") != id_hash("lone \ud801 surrogate")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Format(100, 509, 508), "block_tokens: expected a power of two up to 1Mi, got 100"),
        (lambda: Format(2**21, 509, 508), "block_tokens: expected a power of two up to 1Mi, got 2097152"),
        (lambda: Format(64, 509, 509), "end_of_text: expected an id below vocab_size 509, got 509"),
    ],
)
def test_impossible_formats_are_refused(make: Callable[[], Format], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value) == message


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    writer = SliceWriter(tmp_path, TINY)
    with pytest.raises(ShardError) as error:
        writer.add(Document("", "doc/9", "books", "", {}), np.array([1, 509]), "train")
    assert str(error.value) == "doc/9: token id 509 is outside vocab_size 509"


# --- the manifest -----------------------------------------------------------------------------------------------------


def test_sealing_again_changes_nothing(tmp_path: Path) -> None:
    written = write(tmp_path, *mixed(40))
    written.seal()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    written.seal()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_the_identity_of_a_generation_is_that_of_its_tokens(tmp_path: Path) -> None:
    lengths, splits = mixed(12)
    one = write(tmp_path / "one", lengths, splits).seal()
    same = write(tmp_path / "same", lengths, splits).seal()
    other = write(tmp_path / "other", [*lengths[:-1], lengths[-1] + 1], splits).seal()
    identities = [m.generations[0]["identity"] for m in (one, same, other)]
    assert identities[0] == identities[1] != identities[2]


def test_generations_are_read_apart(tmp_path: Path) -> None:
    written = write(tmp_path, *mixed(60))
    hashes = file_hash(written.slice / "ids.npy"), "0" * 32
    half = len(written.records) // 2
    parts = [
        SealedSlice("s0", g, records, *hashes)
        for g, records in enumerate((written.records[:half], written.records[half:]))
    ]
    manifest = seal(tmp_path, TINY, {}, parts)
    split = written.records[0].split
    shards = [manifest.shards(split, g) for g in range(2)]
    stream = written.stream(split)
    joined = [shards[g].read(b) for g in range(2) for b in range(shards[g].blocks)]
    assert [ids.tolist() for ids in joined] == [stream[i * 64 : i * 64 + 65].tolist() for i in range(len(joined))]
    assert all(shards[g].blocks == manifest.generations[g][split]["blocks"] > 0 for g in range(2))


def test_a_folder_without_a_manifest_is_not_a_corpus(tmp_path: Path) -> None:
    write(tmp_path, *mixed(12))
    expected = f"{tmp_path}: no MANIFEST.json: not a corpus, or not finished; run data-prep run"
    with pytest.raises(ShardError, match=f"^{re.escape(expected)}$"):
        Manifest.open(tmp_path)
    assert list(verify(tmp_path)) == [expected]


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    head = dict(write(tmp_path, *mixed(12)).seal().head)
    head["format"] = 2
    head["sha256"] = fingerprint({k: v for k, v in head.items() if k != "sha256"})
    (tmp_path / MANIFEST).write_text(json.dumps(head))
    with pytest.raises(ShardError) as error:
        Manifest.open(tmp_path)
    assert str(error.value) == f"{tmp_path / MANIFEST}: format 2 is newer than this code's 1; update longhaul"


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"format": 1}', "\x00"])
def test_what_is_no_manifest_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ShardError) as error:
        Manifest.open(tmp_path)
    assert str(error.value) == f"{tmp_path / MANIFEST}: damaged (not a manifest); run data-prep run again"


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus of two slices; every test leaves it as it was."""
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, documents=80)
    assert list(verify(folder)) == []
    return folder


@pytest.fixture
def corpus(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "corpus"))


TRIALS = 400  # of damage at a random place


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def named(path: Path) -> list[str]:
    """What verify says of a file, and that it says nothing of others."""
    root = path.parents[2] if path.parent.parent.name == "slices" else path.parent
    lines = list(verify(root))
    assert lines, f"nothing found in {path}"
    assert all(line.startswith(f"{path}: ") for line in lines), lines
    return lines


def places(path: Path, rng: random.Random) -> Iterator[int]:
    """Bytes to damage: some anywhere, and for a tar one of a header, of its padding, and of its end."""
    size = path.stat().st_size
    yield from (rng.randrange(size) for _ in range(6))
    yield from (0, size - 1)
    if path.suffix == ".tar":
        with tarfile.open(path) as tar:
            member = rng.choice(tar.getmembers())
        yield member.offset + rng.randrange(512)
        yield member.offset_data + member.size  # padding


def test_every_flipped_bit_is_found(whole: Path) -> None:
    rng, trials = random.Random(1), 0
    kinds = set()
    for path in files_of(whole):
        data = path.read_bytes()
        for place in places(path, rng):
            damaged = bytearray(data)
            damaged[place] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            named(path)
            trials += 1
        path.write_bytes(data)
        kinds.add(path.name.partition(".")[2])
    assert kinds == {"tar", "index.npy", "docs.parquet", "npy", "json"} | {
        n for n in kinds if re.fullmatch(r"\w{12}\.parquet", n)
    }
    assert len(kinds) == 6
    assert trials > 100
    assert list(verify(whole)) == []


def damage_at_random(folder: Path, seed: int, damage: Callable[[bytes, random.Random], bytes]) -> None:
    """TRIALS times: `verify` names the shard, and its blocks are read as they were written, or not at all."""
    rng, shards = random.Random(seed), Manifest.open(folder).shards("train", 0)
    path, blocks = shards.path(0, "tar"), range(shards.block_counts[0])
    data, right = path.read_bytes(), [shards.read(block).copy() for block in blocks]
    refused = 0
    try:
        for _ in range(TRIALS):
            shards.close()
            path.write_bytes(damage(data, rng))
            assert named(path)
            for block in blocks:
                try:
                    assert np.array_equal(shards.read(block), right[block])
                except DamagedBlock:
                    refused += 1
    finally:
        path.write_bytes(data)
    assert refused > TRIALS / 4  # the others hit headers, padding, documents or the tail


def flip(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


@pytest.mark.trials(TRIALS)
def test_a_bit_flipped_at_random_in_a_shard_is_found(whole: Path) -> None:
    damage_at_random(whole, 3, flip)


@pytest.mark.trials(TRIALS)
def test_a_shard_truncated_at_random_is_found(whole: Path) -> None:
    damage_at_random(whole, 4, lambda data, rng: data[: rng.randrange(len(data))])


def test_every_changed_byte_of_the_manifest_is_found(whole: Path) -> None:
    """Also where it changes nothing in meaning."""
    path = whole / MANIFEST
    text = path.read_text()
    for changed in (text.replace(" ", "\t", 1), text[:-1], text + "\n", text.replace('"format"', '"forma\\u0074"')):
        path.write_text(changed)
        assert named(path) == [f"{path}: changed since it was written, though not in meaning"]
    path.write_text(text)


def test_every_truncated_file_is_found(whole: Path) -> None:
    rng = random.Random(2)
    for path in files_of(whole):
        data = path.read_bytes()
        for size in (0, rng.randrange(len(data)), len(data) - 1):
            path.write_bytes(data[:size])
            named(path)
        path.write_bytes(data)


def test_every_longer_file_is_found(whole: Path) -> None:
    for path in files_of(whole):
        data = path.read_bytes()
        path.write_bytes(data + b"\0")
        named(path)
        path.write_bytes(data)


def test_every_zeroed_page_is_found(whole: Path) -> None:
    for path in files_of(whole):
        data = path.read_bytes()
        for begin in range(0, len(data), 4096):
            size = len(data[begin : begin + 4096])
            if any(data[begin : begin + size]):
                path.write_bytes(data[:begin] + bytes(size) + data[begin + size :])
                named(path)
        path.write_bytes(data)


def test_every_missing_or_renamed_file_is_found(whole: Path) -> None:
    for path in files_of(whole):
        elsewhere = path.with_name(f"x{path.name}")
        path.rename(elsewhere)
        lines = list(verify(whole))
        if path.name == MANIFEST:
            assert lines == [f"{whole}: no MANIFEST.json: not a corpus, or not finished; run data-prep run"]
        elif path.parent == whole:
            assert lines == [f"{path}: missing, but MANIFEST.json names it; run data-prep run again"]
        else:
            assert lines == [f"{path}: missing", f"{elsewhere}: not named by MANIFEST.json"]
        elsewhere.rename(path)
    assert list(verify(whole)) == []


def test_swapped_shards_are_found(corpus: Path) -> None:
    first, second = sorted((corpus / "slices" / "s0").glob("train-*.tar"))[:2]
    other = corpus / "slices" / "s1" / first.name
    for a, b in ((first, second), (first, other)):
        swap(a, b)
        lines = list(verify(corpus))
        assert any(line.startswith(f"{a}: ") for line in lines)
        assert any(line.startswith(f"{b}: ") for line in lines)
        swap(a, b)
    assert list(verify(corpus)) == []


def swap(a: Path, b: Path) -> None:
    spare = a.with_name("spare")
    a.rename(spare)
    b.rename(a)
    spare.rename(b)


class Canary:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.mkdir, (str(self.path),)  # type: ignore[return-value]


@pytest.mark.parametrize("evil", ["interleaved", "duplicate", "dots", "pickle", "pickled array", "symlink"])
def test_a_tar_that_others_would_misread_is_damaged_or_read_as_written(evil: str, corpus: Path, tmp_path: Path) -> None:
    """Nothing of a tar is believed but bytes that have their hash: no name, kind or order of its members."""
    shards = Manifest.open(corpus).shards("train", 0)
    good = [shards.read(block).tolist() for block in range(4)]
    path, canary = shards.path(0, "tar"), tmp_path / "canary"
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]  # type: ignore[union-attr]
    _, tokens = members[3]
    if evil == "interleaved":
        members = members[0:8:2] + members[1:8:2] + members[8:]
    elif evil == "duplicate":
        members[4:4] = [(members[3][0], members[5][1])]
    elif evil == "dots":
        members[3][0].name = "00.01.tokens.npy"
    elif evil == "pickle":
        members[3:3] = [(tarfile.TarInfo("0001.tokens.pickle"), pickle.dumps(Canary(canary)))]
    elif evil == "pickled array":
        buffer = io.BytesIO()
        np.save(buffer, np.array([Canary(canary)], object))
        members[3] = members[3][0], buffer.getvalue().ljust(len(tokens), b"\0")
    else:
        members[3][0].type, members[3][0].linkname = tarfile.SYMTYPE, "/etc/passwd"
        members[3] = members[3][0], b""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    wrong = 0
    for block, expected in enumerate(good):
        try:
            assert shards.read(block).tolist() == expected
        except DamagedBlock as damage:
            wrong += 1
            assert str(damage).startswith(f"{path}: block {block} is ") and str(damage).endswith(" s0/train-00000")
    assert (wrong > 0) == (evil != "dots")  # a name is not looked at, and all else moves what stands behind it
    assert all(str(path) in line for line in named(path)) and not canary.exists()


@pytest.mark.parametrize(
    "place", ["slices/s0/train-00099.tar", "slices/s0/.hidden", "slices/s9/slice.json", "slices/x"]
)
def test_extra_files_are_found(place: str, corpus: Path) -> None:
    (corpus / place).parent.mkdir(exist_ok=True)
    (corpus / place).touch()
    assert list(verify(corpus)) == [f"{corpus / place}: not named by MANIFEST.json"]


def test_other_files_of_the_head_are_held_to(tmp_path: Path) -> None:
    written = write(tmp_path, *mixed(12))
    (tmp_path / "plan.json").write_text("{}")
    (written.slice / "slice.json").write_text("{}")
    hashes = file_hash(written.slice / "ids.npy"), file_hash(written.slice / "slice.json")
    files = {"plan.json": file_hash(tmp_path / "plan.json")}
    seal(tmp_path, TINY, {"files": files}, [SealedSlice("s0", 0, written.records, *hashes)])
    assert list(verify(tmp_path)) == []
    (tmp_path / "plan.json").write_text("{ }")
    assert list(verify(tmp_path)) == [f"{tmp_path / 'plan.json'}: damaged (hash differs)"]


def test_verify_names_the_blocks(corpus: Path) -> None:
    shards = Manifest.open(corpus).shards("train", 0)
    path = shards.path(0, "tar")
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        members = {m.name: m for m in tar.getmembers()}
    for name in ("0001.tokens.npy", "0003.docs.npy"):
        data[members[name].offset_data + 130] ^= 4
    path.write_bytes(data)
    assert list(verify(corpus)) == [f"{path}: damaged in block 1, block 3"]


# --- the reader -------------------------------------------------------------------------------------------------------


def message(read: Callable[[], object]) -> str:
    with pytest.raises(ShardError) as error:
        read()
    return str(error.value)


def test_a_damaged_block_is_not_read(corpus: Path) -> None:
    shards = Manifest.open(corpus).shards("train", 0)
    good = [shards.read(block).tolist() for block in range(4)]
    path = shards.path(0, "tar")
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        data[tar.getmember("0002.tokens.npy").offset_data + 1000] ^= 1
        data[tar.getmember("0003.docs.npy").offset_data + 128] ^= 1
    path.write_bytes(data)
    assert message(lambda: shards.read(2)) == (
        f"{path}: block 2 is damaged (between byte 9728 and 11906); run data-prep repair {corpus} s0/train-00000"
    )
    assert message(lambda: shards.documents(0, 3)) == (
        f"{path}: documents of block 3 are damaged; run data-prep repair {corpus} s0/train-00000"
    )
    assert [shards.read(block).tolist() for block in (0, 1, 3)] == [good[0], good[1], good[3]]


def test_a_damaged_index_row_is_not_followed(corpus: Path) -> None:
    shards = Manifest.open(corpus).shards("train", 0)
    path, dtype = shards.path(0, "index.npy"), FORMAT.index_dtype
    repair = f"run data-prep repair {corpus} s0/train-00000"
    data = bytearray(path.read_bytes())
    header = len(data) - dtype.itemsize * len(np.load(path))
    good = shards.read(1)
    for byte in range(0, dtype.itemsize, 7):
        changed = bytearray(data)
        changed[header + 2 * dtype.itemsize + byte] ^= 0x10
        path.write_bytes(changed)
        assert message(lambda: shards.read(2)) == f"{path}: row 2 is damaged; {repair}"
        assert np.array_equal(shards.read(1), good)
    rows = [data[header + i * dtype.itemsize : header + (i + 1) * dtype.itemsize] for i in range(3)]
    path.write_bytes(data[:header] + rows[0] + rows[2] + rows[1] + data[header + 3 * dtype.itemsize :])
    assert message(lambda: shards.read(1)) == f"{path}: row 1 is damaged; {repair}"


def test_a_truncated_or_missing_shard_is_named(corpus: Path) -> None:
    shards = Manifest.open(corpus).shards("train", 0)
    path = shards.path(0, "tar")
    os.truncate(path, 5000)
    row = np.load(shards.path(0, "index.npy"))[2]
    assert message(lambda: shards.read(2)) == (
        f"{path}: block 2 is truncated ({row['bytes']} bytes expected at {row['offset']}, got 0); "
        f"run data-prep repair {corpus} s0/train-00000"
    )
    shards.close()
    path.unlink()
    assert message(lambda: shards.read(0)) == (
        f"{path}: missing, though MANIFEST.json names it, with block 0; run data-prep repair {corpus} s0/train-00000"
    )
    index = shards.path(1, "index.npy")
    index.unlink()
    first_of_next = int(shards.ends[0])
    of_next = f"{index.parent.name}/{index.name.removesuffix('.index.npy')}"
    assert (
        message(lambda: shards.read(first_of_next))
        == f"{index}: missing, though MANIFEST.json names it, with block 0; run data-prep repair {corpus} {of_next}"
    )


def test_blocks_that_are_expected_are_waited_for_once(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing holds up nobody before it is read."""
    shards = Manifest.read(Folder(corpus, 2.0)).shards("train", 0)
    for shard in range(len(shards)):
        shards.path(shard, "index.npy").unlink()
    looks: list[float] = []
    monkeypatch.setattr("data_pipeline.files.wait", lambda seconds: looks.append(seconds))
    monkeypatch.setattr("data_pipeline.files.time.monotonic", iter(range(10**6)).__next__)  # a second a look
    shards.expect(0)
    once = len(looks)
    for block in range(shards.blocks):
        shards.expect(block)
    assert len(looks) == once > 0
    with pytest.raises(ShardError, match="missing, though MANIFEST"):
        shards.read(0)


def test_an_expected_block_is_the_same(corpus: Path) -> None:
    """And each time that it is read; a buffer changes nothing either."""
    plain, shards = (Manifest.open(corpus).shards("train", 0) for _ in range(2))
    buffer = bytearray(shards.format.block_bytes)
    for block in range(shards.blocks):
        shards.expect(block)
    for block in [*range(shards.blocks)] * 2:
        assert np.array_equal(shards.read(block, buffer), plain.read(block))


def test_many_shards_need_few_files(tmp_path: Path) -> None:
    """As with `ulimit -n` just above what is open already."""
    written = write(tmp_path, *mixed(50), format=Format(64, 509, 508, shard_bytes=1))
    shards, stream = written.seal().shards("train", 0), written.stream("train")
    assert len(shards) > 40
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = open_files()
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_now) + 1 + Folder.MAX_OPEN, hard))
    try:
        for block in random.Random(0).choices(range(shards.blocks), k=400):
            assert np.array_equal(shards.read(block), stream[block * 64 : block * 64 + 65])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    shards.close()
    assert len(open_files()) <= len(open_now)


def open_files() -> set[int]:
    return {int(path.name) for path in Path("/proc/self/fd").iterdir()}
