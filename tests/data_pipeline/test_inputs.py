import bz2
import gzip
import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from configs import ConfigError
from data_pipeline.plan import cut
from data_pipeline.sources.inputs import (
    Content,
    Damage,
    Input,
    Part,
    Reading,
    decoded,
    describe,
    find_inputs,
    is_content_error,
    lines,
    members,
    texts,
    zstd,
)


def content(path: Path, size: int = 1000) -> bytes:
    data = b""
    with Reading(Part(describe(str(path))), "c") as reading:
        stream = Content(reading)
        while chunk := stream.read(size):
            data += chunk
    return data


def test_inputs_are_sorted_each_once_and_folders_stand_for_what_is_below(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("z.txt", "a.txt", "b/m.txt", "b/.hidden.txt", "b/other.dat"):
        (tmp_path / name).write_text("x")
    found = find_inputs([str(tmp_path / "*.txt"), str(tmp_path / "b"), str(tmp_path / "a.txt")], (".txt",))
    assert [Path(i.name).name for i in found] == ["a.txt", "m.txt", "z.txt"]
    assert found[0].size == 1


def test_a_pattern_without_a_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        find_inputs(["corpora/*.txt"], (".txt",))
    assert str(error.value) == f"paths: no file matches 'corpora/*.txt' (looked from {tmp_path})"


@pytest.mark.parametrize("evil", ["pipe:cat /etc/passwd", "-", "|ls"])
def test_names_that_other_readers_would_run_are_only_names(evil: str) -> None:
    with pytest.raises(ConfigError, match="no file matches"):
        find_inputs([evil], (".txt",))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(ConfigError, match=r"a\.doc: not a kind of file that this source reads \(\.txt, \.tar\)"):
        find_inputs([str(tmp_path / "*")], (".txt", ".tar"))


def test_control_characters_in_a_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a\x1b[31m.txt").write_text("x")
    with pytest.raises(ConfigError, match="control characters in a file name"):
        find_inputs([str(tmp_path)], (".txt",))


@pytest.mark.parametrize("size", [1, 7, 10**6])
@pytest.mark.parametrize("kind", ["plain", "gz", "gz members", "gz padded", "bz2", "bz2 members", "zst", "zst members"])
def test_content_is_the_same_however_it_is_packed(tmp_path: Path, kind: str, size: int) -> None:
    data = b"".join(b"line %d\n" % i for i in range(3000))
    packed = {
        "plain": data,
        "gz": gzip.compress(data),
        "gz members": gzip.compress(data[:5000]) + gzip.compress(b"") + gzip.compress(data[5000:]),
        "gz padded": gzip.compress(data) + b"\0" * 300,
        "bz2": bz2.compress(data),
        "zst": zstd.compress(data),
        "zst members": zstd.compress(data[:5000]) + b"\x50\x2a\x4d\x18\x03\0\0\0abc" + zstd.compress(data[5000:]),
        "bz2 members": bz2.compress(data[:5000]) + bz2.compress(data[5000:]),
    }[kind]
    path = tmp_path / ("x" if kind == "plain" else f"x.{kind[:3].strip()}")
    path.write_bytes(packed)
    assert content(path, size) == data


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, zstd.compress])
def test_every_cut_of_a_packed_file_is_damage_after_what_comes_before(tmp_path: Path, compress: object) -> None:
    assert callable(compress)
    first, second = compress(b"first " * 50), compress(b"second " * 50)
    for end in range(len(first) + 1, len(first) + len(second)):
        path = tmp_path / "x"
        path.write_bytes((first + second)[:end])
        got = b""
        with Reading(Part(describe(str(path))), "c") as reading, pytest.raises(Damage) as damage:
            stream = Content(reading)
            while chunk := stream.read():
                got += chunk
        assert got.startswith(b"first " * 50)
        assert damage.value.offset == len(first)


def test_a_flipped_bit_is_damage(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(bytes(range(256)) * 40))
    packed[60] ^= 4
    path = tmp_path / "x.gz"
    path.write_bytes(packed)
    with pytest.raises(Damage, match="not valid gzip"):
        content(path)


def test_a_packed_name_without_packed_content_is_damage(tmp_path: Path) -> None:
    for data, said in ((b"plain", "not a gzip file"), (b"", "empty file")):
        path = tmp_path / "x.gz"
        path.write_bytes(data)
        with pytest.raises(Damage, match=said):
            content(path)


def test_members_know_where_they_begin(tmp_path: Path) -> None:
    parts = [gzip.compress(b"%d" % i * 100) for i in range(5)]
    path = tmp_path / "x.gz"
    path.write_bytes(b"".join(parts))
    with Reading(Part(describe(str(path))), "c") as reading:
        offsets = [member.offset for member in members(reading)]
    assert offsets == [sum(map(len, parts[:i])) for i in range(5)]


def test_the_hash_covers_the_part_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(bytes(range(256)) * 10)
    part = Part(describe(str(path)), 100, 1000)
    with Reading(part, "c") as reading:
        reading.read(2000)  # beyond its end, as a line that reaches over it
        assert reading.finish() == hashlib.sha256((bytes(range(256)) * 10)[100:1000]).hexdigest()
        assert reading.bytes_read == part.bytes == 900


def test_lines_have_their_places_and_too_long_ones_are_let_go() -> None:
    data = b"a\n\nccc\n" + b"x" * 5000 + b"\nlast"
    assert list(lines(io.BytesIO(data), limit=100)) == [(0, b"a"), (2, b""), (3, b"ccc"), (7, None), (5008, b"last")]
    assert list(lines(io.BytesIO(b"x" * 300_000), limit=100)) == [(0, None)]


def test_texts_are_whole_or_cut_at_line_ends() -> None:
    data = b"one line\n" * 100
    assert list(texts(io.BytesIO(data))) == [(0, data)]
    parts = list(texts(io.BytesIO(data), limit=50))
    assert b"".join(part for _, part in parts) == data
    assert all(part.endswith(b"line\n") and len(part) <= 50 for _, part in parts)
    assert [position for position, _ in parts] == list(range(0, 900, 45))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xef\xbb\xbfbom", "bom"),
        ("naïve “x”".encode(), "naïve “x”"),
        ("naïve “x”".encode("cp1252"), "naïve “x”"),
        ("\ufeffwide".encode("utf-16-le"), "\ufeffwide"),
        (("é" * 100).encode() + b"\xc3", "é" * 100 + "\ufffd"),  # UTF-8, cut off
    ],
)
def test_bytes_become_text(data: bytes, text: str) -> None:
    assert decoded(data).lstrip("\ufeff") == text.lstrip("\ufeff")


def test_what_lies_in_a_document_and_what_in_the_machine() -> None:
    assert is_content_error(ValueError()) and is_content_error(RecursionError()) and is_content_error(OSError("brotli"))
    assert not is_content_error(OSError(28, "no space")) and not is_content_error(MemoryError())
    assert not is_content_error(KeyboardInterrupt())


# --- lists ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["warc.paths", "warc.paths.gz", "warc.paths.zst"])
def test_a_list_names_inputs_below_its_base(tmp_path: Path, name: str) -> None:
    data = b"crawl/b.warc.gz\r\ncrawl/a.warc.gz\n\n"
    pack: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstd.compress}
    list_ = tmp_path / name
    list_.write_bytes(pack.get(list_.suffix, bytes)(data))
    base = "https://data.example.org/"
    assert find_inputs([str(list_)], (".warc.gz",), base) == [
        Input(f"https://data.example.org/crawl/{x}.warc.gz", None, None) for x in "ab"
    ]
    with pytest.raises(ConfigError, match=r"warc\.paths\S*: names .*/crawl/b\.warc\.gz: No such file or directory"):
        find_inputs([str(list_)], (".warc.gz",), str(tmp_path))
    (tmp_path / "crawl").mkdir()
    for x in "ab":
        (tmp_path / f"crawl/{x}.warc.gz").write_bytes(b"123")
    for base_ in (str(tmp_path), None):
        found = find_inputs([str(list_)], (".warc.gz",), base_)
        assert [(i.name, i.size) for i in found] == [(f"{tmp_path}/crawl/{x}.warc.gz", 3) for x in "ab"]


@pytest.mark.parametrize(
    "evil",
    ["pipe:touch canary", "-", "../../x", "a/../../x", "/etc/passwd", "a/..", "http://169.254.169.254/x", "a\x1b[31m",
     "a\\b", "file:///etc/passwd", "a?b", "|touch canary", "..", "x" * 9 + "\x00"],
)  # fmt: skip
def test_a_list_cannot_name_what_does_not_lie_below_its_base(tmp_path: Path, evil: str) -> None:
    list_ = tmp_path / "evil.paths"
    list_.write_text(f"good.txt\n{evil}\n")
    with pytest.raises(ConfigError) as error:
        find_inputs([str(list_)], (".txt", "x", "wd", "b", ".."), "https://data.example.org/")
    said = str(error.value)
    if "touch" in evil and "|" in evil:
        assert "not a kind of file" in said
    else:
        expected = f"paths: {list_}: line 2: expected a name below https://data.example.org, got {evil!r}"
        assert said == expected
    assert not (tmp_path / "canary").exists() and "\x1b" not in said and "\n" not in said


def test_an_empty_list_and_a_damaged_one_are_told(tmp_path: Path) -> None:
    list_ = tmp_path / "a.paths"
    list_.write_text("\n\n")
    with pytest.raises(ConfigError, match=r"a\.paths: an empty list"):
        find_inputs([str(list_)], (".txt",))
    packed = tmp_path / "a.paths.gz"
    packed.write_bytes(gzip.compress(b"a.txt\n" * 100)[:-9])
    with pytest.raises(ConfigError, match=r"a\.paths\.gz: byte 0: the file ends inside this gzip member"):
        find_inputs([str(packed)], (".txt",))


def test_a_hundred_thousand_listed_inputs_are_found_in_seconds(tmp_path: Path) -> None:
    list_ = tmp_path / "warc.paths.gz"
    list_.write_bytes(
        gzip.compress(b"".join(b"crawl-data/CC/segments/%d/warc/%d.warc.gz\n" % (i, i) for i in range(10**5)))
    )
    inputs = find_inputs([str(list_)], (".warc.gz",), "https://data.commoncrawl.org/")  # no request is made
    slices = cut(inputs, lambda input: True, 256 * 2**20, 0, 0)
    assert len(inputs) == len(slices) == 10**5 and slices[7].parts == (Part(inputs[7]),)
    assert slices[7].bytes == 2**30


def test_zstd_is_held_to_a_window(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(
        zstd.compress(
            b"x" * 100,
            options={zstd.CompressionParameter.window_log: 31, zstd.CompressionParameter.content_size_flag: 0},
        )
    )
    large = bytearray(path.read_bytes())
    large[5] = 0xA8  # the window's descriptor: 2 GiB
    path.write_bytes(large)
    with pytest.raises(Damage, match="not valid zstd"):
        content(path)
