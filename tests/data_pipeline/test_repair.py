"""`data-prep repair`: damaged files made whole, to the byte, from a published copy or from the inputs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from configs import ConfigError
from data_pipeline import prepare
from data_pipeline.repair import repair
from data_pipeline.shards import MANIFEST, Manifest, ShardError
from data_pipeline.summary import folders, verified
from tests.data_pipeline.inputs import write_corpora
from tests.data_pipeline.test_prepare import CONFIG, contents, load, write_config

BOOKS = {**CONFIG, "corpora": {"books": {"kind": "bookcorpus", "paths": ["books"]}}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with inputs, small.yaml, and finished shards in out, published to copy."""
    place = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        write_corpora(place)
        write_config({**BOOKS, "publish": "copy"})
        prepare.run(load())
    return place


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same in a folder of the test's own, which is the current one, without the copy."""
    for name in ("out", "books"):
        shutil.copytree(made / name, tmp_path / name, symlinks=True)  # with the times of the inputs
    (tmp_path / "out/books/.published").unlink()
    monkeypatch.chdir(tmp_path)
    write_config(BOOKS)
    return tmp_path


def with_copy(made: Path, here: Path) -> None:
    shutil.copytree(made / "copy", here / "copy")
    write_config({**BOOKS, "publish": "copy"})


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damages() -> list[str]:
    return [line for folder in folders(Path("out")) for line in verified(folder)]


def slices() -> list[Path]:
    return sorted(path for path in Path("out/books/slices").glob("[!.]*") if list(path.glob("*.tar")))


def test_what_is_damaged_is_made_again_to_the_byte(here: Path) -> None:
    before = contents(here / "out")
    first, second = slices()[:2]
    spoilt = [first / "train-00000.tar", first / "train-00000.index.npy", first / "ids.npy", second / "slice.json"]
    for path in spoilt:
        flip(path)
    (second / "train-00000.docs.parquet").unlink()
    assert len(damages()) == 5
    told: list[tuple[int, int, str, str]] = []
    lines = list(repair(Path("small.yaml"), look=lambda *each: told.append(each)))
    assert {title for _, _, title, _ in told} >= {"repair books: read", f"repair books: make {first.name} again"}
    assert all(0 <= done <= of for done, of, _, _ in told)
    assert sorted(lines) == sorted(
        f"{path}: made again from its inputs" for path in [*spoilt, second / "train-00000.docs.parquet"]
    )
    assert damages() == [] and contents(here / "out") == before
    assert list(repair(Path("small.yaml"))) == []


def test_one_shard_is_named_and_copied_from_where_it_was_published(made: Path, here: Path) -> None:
    with_copy(made, here)
    first, second = slices()[:2]
    for slice_ in (first, second):
        flip(slice_ / "train-00000.tar")
    lines = list(repair(Path("small.yaml"), f"books/{first.name}/train-00000"))
    assert lines == [f"{first}/train-00000.tar: copied from copy"]
    assert [line.partition(":")[0] for line in damages()] == [f"{second}/train-00000.tar"]


def test_a_damaged_copy_is_sent_again(made: Path, here: Path) -> None:
    with_copy(made, here)
    (first, *_) = slices()
    name = f"books/slices/{first.name}/train-00000.tar"
    flip(here / "copy" / name)
    flip(here / "out" / name)
    lines = list(repair(Path("small.yaml"), f"{first.name}/train-00000"))
    assert lines == [f"out/{name}: made again from its inputs", f"copy/{name}: sent again"]
    assert (here / "copy" / name).read_bytes() == (here / "out" / name).read_bytes() and damages() == []


def test_without_config_or_copy_the_remedy_is_said(here: Path) -> None:
    (first, *_) = slices()
    flip(first / "train-00000.tar")
    with pytest.raises(ConfigError) as error:
        list(repair(here / "out/books", f"{first.name}/train-00000"))
    assert str(error.value) == (
        f"{here / first}/train-00000.tar: damaged, and no published copy is known; name the config that made it: "
        f"data-prep repair CONFIG {first.name}/train-00000"
    )
    for wrong in ("train-00000", f"{first.name}/train-09999"):
        with pytest.raises(ConfigError, match="SLICE/SHARD"):
            list(repair(here / "out/books", wrong))


def test_what_comes_out_otherwise_is_not_put_in_its_place(here: Path) -> None:
    shard = Manifest.open(here / "out/books").shards("train", 0)
    path = shard.path(0, "tar")
    flip(path)
    damaged = path.read_bytes()
    for book in (here / "books").iterdir():
        text = book.read_bytes()
        times = book.stat()
        book.write_bytes(text.replace(b"a", b"o"))
        os.utime(book, ns=(times.st_atime_ns, times.st_mtime_ns))  # so that only its content tells
    with pytest.raises(ShardError, match=r"made again it is another file, so it is left as it is; put its inputs back"):
        list(repair(Path("small.yaml"), f"{path.parent.name}/train-00000"))
    assert path.read_bytes() == damaged
    assert not list(path.parent.parent.glob(".tmp-*")) and (here / "out/books" / MANIFEST).is_file()
