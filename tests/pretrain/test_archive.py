"""Archival copies: whole or absent, verified, retried, never in the way; brought home again; and `pretrain verify`."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs import ConfigError, build
from data_pipeline.failpoints import VARIABLE
from data_pipeline.sources import remote
from pretrain import checkpoint
from pretrain.archive import Archive, ArchiveError, Archiver, Store, bring_home, open_archive, part_bytes
from pretrain.checkpoint import Checkpoints, Position, Saver
from pretrain.cli import app
from pretrain.lineage import Lineage
from tests.data_pipeline.servers import KEY, moto
from tests.pretrain.test_checkpoint import commit, make_state
from tests.runs import TORCH, Started, final_state, run_to_end, write_run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    Lineage(folder).take(None, 0, None, "start")
    (folder / "run.yaml").write_text("name: x\n")
    return folder


@pytest.fixture(params=["folder", "S3", "another object store"])
def address(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "S3":
        with moto(monkeypatch, "archive"):
            yield f"s3://archive/{tmp_path.name}"  # moto forgets nothing
    else:
        yield str(tmp_path / "archive") if request.param == "folder" else f"memory://{tmp_path.name}"


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_put_and_brought_back(address: str, run_folder: Path) -> None:
    commit(run_folder, 4)
    store = open_archive(Archive(to=address, every_steps=1), run_folder)
    folder = run_folder / "checkpoints" / "step-4.b1"
    store.put(folder)
    assert store.names() == ["step-4.b1"]
    store.put(folder)  # again: nothing to do
    target = run_folder / "back" / "step-4.b1"
    Store(f"{address}/run/checkpoints").bring("step-4.b1", target)
    assert checkpoint.verify(target) == []
    assert {p.name: p.read_bytes() for p in target.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}
    shutil.rmtree(folder)
    commit(run_folder, 4, ranks=3)
    with pytest.raises(ArchiveError, match=r"/run: holds another checkpoint step-4.b1; give another checkpoint.archiv"):
        store.put(folder)


def test_the_archive_calls_retired_what_a_rollback_retires(address: str, run_folder: Path) -> None:
    archive = Archive(to=address, every_steps=4)
    store = open_archive(archive, run_folder)
    for step in (4, 8):
        commit(run_folder, step)
        store.put(run_folder / f"checkpoints/step-{step}.b1")
    Lineage(run_folder).take(1, 4, None, "rollback")
    archiver = Archiver(archive, run_folder)
    archiver.refresh()
    archiver.close(30.0)
    home = run_folder.with_name("home")
    for name in store.fs.find(store.root):
        copy = home / str(name).removeprefix(f"{store.root}/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(store.fs.cat_file(name))
    assert Lineage(home).live() == [(2, None), (1, 4)]
    assert [path.name for path in checkpoint.live_checkpoints(home)] == ["step-4.b1"]


def test_a_checkpoint_that_is_retired_while_it_is_copied_is_not_archived(address: str, run_folder: Path) -> None:
    commit(run_folder, 4)
    store = open_archive(Archive(to=address, every_steps=1), run_folder)
    answers = iter([True] * 4 + [False])  # for each of its files, and for the manifest
    store.put(run_folder / "checkpoints/step-4.b1", lambda: next(answers))
    assert next(answers, None) is None
    assert store.names() == []


def test_the_archive_of_another_run_is_left_as_it_is(
    tmp_path: Path, run_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    archive = Archive(to=str(tmp_path / "archive"), every_steps=1)
    commit(run_folder, 4)
    store = open_archive(archive, run_folder)
    store.put(run_folder / "checkpoints/step-4.b1")
    kept = (tmp_path / "archive/run/lineage/1.json").read_bytes()
    shutil.rmtree(run_folder)  # and begun anew
    Lineage(run_folder).take(None, 0, None, "start")
    commit(run_folder, 8)
    line = f"{tmp_path}/archive/run: holds another run of this name; give another checkpoint.archive.to"
    with pytest.raises(ArchiveError, match=line):
        store.put(run_folder / "checkpoints/step-8.b1")
    archiver = Archiver(archive, run_folder)
    archiver.refresh()
    archiver.close(30.0)
    assert f"{line}: not archived" in caplog.text
    assert (tmp_path / "archive/run/lineage/1.json").read_bytes() == kept
    assert [path.name for path in (tmp_path / "archive/run/checkpoints").iterdir()] == ["step-4.b1"]


def test_a_damaged_checkpoint_is_not_archived_and_a_damaged_archive_not_brought_back(
    tmp_path: Path, run_folder: Path
) -> None:
    commit(run_folder, 4)
    store = open_archive(Archive(to=str(tmp_path / "archive"), every_steps=1), run_folder)
    folder = run_folder / "checkpoints" / "step-4.b1"
    safe = shutil.copytree(folder, tmp_path / "safe")
    flip(folder / "rank-1-of-2.bin")
    with pytest.raises(ArchiveError, match=r"step-4.b1/rank-1-of-2.bin: damaged \(hash differs\)"):
        store.put(folder)
    assert store.names() == []
    shutil.rmtree(folder)
    shutil.copytree(safe, folder)
    store.put(folder)
    flip(tmp_path / "archive/run/checkpoints/step-4.b1/rank-0-of-2.bin")
    with pytest.raises(ArchiveError, match=r"rank-0-of-2.bin: damaged \(hash differs\)"):
        Store(f"{tmp_path}/archive/run/checkpoints").bring("step-4.b1", tmp_path / "back" / "step-4.b1")
    assert not (tmp_path / "back" / "step-4.b1").exists()


def test_an_archive_that_is_away_is_tried_again_and_does_not_hold_up_saves(
    tmp_path: Path, run_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    away = tmp_path / "archive"
    away.write_text("a file where the folder should be")
    settings = Checkpoints(keep_last=1, archive=Archive(to=str(away), every_steps=2))
    saver = Saver(run_folder, settings, 1, 0, 1, {"identity": {}})
    assert saver.archiver is not None
    saver.archiver.pause_s = 0.05
    for step in range(9):
        saver.save(make_state(0, 1, step), Position(step, step, step, "0" * 32), 0)
        saver.wait()
    names = sorted(path.name for path in checkpoint.live_checkpoints(run_folder))
    assert names == ["step-6.b1", "step-8.b1"]  # the newest two wait, and no more
    assert "step-2.b1: not archived: " in caplog.text and "tried again until it works" in caplog.text
    away.unlink()
    until(lambda: not saver.archiver.waiting())  # type: ignore[union-attr]
    assert open_archive(settings.archive, run_folder).names() == ["step-6.b1", "step-8.b1"]  # type: ignore[arg-type]
    saver.close(5.0)
    assert (away / "run/run.yaml").read_text() == "name: x\n" and (away / "run/lineage/1.json").is_file()


def test_what_is_left_is_said_and_taken_up_by_the_next_start(
    tmp_path: Path, run_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    away = tmp_path / "archive"
    away.write_text("")
    commit(run_folder, 2, ranks=1)
    archive = Archive(to=str(away), every_steps=2)
    archiver = Archiver(archive, run_folder)
    archiver.add(run_folder / "checkpoints/step-2.b1")
    archiver.close(0.2)
    assert f"step-2.b1: not yet archived in {away}; starting the run again does it" in caplog.text
    away.unlink()
    saver = Saver(run_folder, Checkpoints(archive=archive), 1, 0, 1, {})
    saver.archive()
    saver.close(30.0)
    assert open_archive(archive, run_folder).names() == ["step-2.b1"]


def test_a_kill_in_mid_copy_leaves_nothing_that_counts(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=20)
    archive = f"checkpoint.archive={{to: {tmp_path}/archive, every_steps: 10}}"
    started = Started(config, 1, archive, variables={VARIABLE: "archive.copied#3=kill"})
    assert started.wait() == [-9]
    there = tmp_path / "archive/run/checkpoints"
    assert {path.name for path in there.iterdir()} == {"step-10.b1", "step-20.b1"}
    assert [path.parent.name for path in there.glob("*/MANIFEST.json")] == ["step-10.b1"]
    run_to_end(config, 1, archive)
    assert sorted(p.parent.name.split(".")[0] for p in there.glob("*/MANIFEST.json")) == ["step-10", "step-20"]


@pytest.mark.parametrize(
    ("to", "line"),
    [
        ("nonsense://x", "archive.to: nonsense://x: Protocol not known: nonsense"),
        ("' '", "archive.to: expected a folder, or an address such as s3://bucket/runs, got nothing"),
    ],
)
def test_an_address_that_cannot_be_is_refused(to: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        build(Checkpoints, {}, "test", [f"archive={{to: {to}, every_steps: 1}}"])


# --- pretrain verify ------------------------------------------------------------------------------------------------


def verify(run: Path, *flags: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["verify", str(run), *flags])
    return result.exit_code, result.stdout


def test_verify_follows_the_chain_and_an_archived_checkpoint_comes_home(tmp_path: Path) -> None:
    config = write_run(tmp_path, TORCH, steps=20)
    archive = f"checkpoint.archive={{to: {tmp_path}/archive, every_steps: 10}}"
    run_to_end(config, 1, archive)
    golden, run = final_state(tmp_path)[0], tmp_path / "run"
    code, text = verify(run)
    assert code == 0 and text.splitlines() == [
        "step-20.b1: whole, digest as in the journal (archived)",
        "step-10.b1: whole, digest as in the journal (archived)",
        "step-0.b1: whole, digest not in the journal (not archived)",
    ]
    code, text = verify(run, "--deep")
    assert code == 0 and text.startswith("step-20.b1: whole, digest that of the data from step 10 on (archived)\n")
    code, text = verify(tmp_path / "archive/run", "--deep")  # the archive is a run folder, too
    assert code == 0 and [line.split(":")[0] for line in text.splitlines()] == ["step-20.b1", "step-10.b1"]

    journal = run / "journal/1.jsonl"
    kept = journal.read_text()
    journal.write_text(kept.replace(golden["digest"], "f" * 32))
    code, text = verify(run, "--json")
    row = json.loads(text)[0]
    assert code == 1 and row["problems"] == [f"digest {golden['digest']} is not the journal's {'f' * 32}"]
    assert (row["name"], row["live"], row["archived"]) == ("step-20.b1", True, True)
    journal.write_text(kept)

    shutil.rmtree(run / "checkpoints/step-20.b1")  # lost, and the one before damaged
    flip(run / "checkpoints/step-10.b1/rank-0-of-1.bin")
    code, text = verify(run)
    assert code == 1 and "rank-0-of-1.bin: damaged (hash differs)" in text
    home = f"resume={tmp_path}/archive/run/checkpoints/step-10.b1"
    text = run_to_end(config, 1, archive, home)
    assert "bringing" in text and "going on from step-10.b1" in text
    assert final_state(tmp_path)[0] == golden
    assert verify(run, "--deep")[0] == 0


def test_verify_beside_a_live_run_and_on_a_bad_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_run(tmp_path, TORCH, steps=20)
    assert verify(config) == (0, f"{tmp_path}/run: no checkpoints\n")
    assert verify(config, "--json") == (0, "[]\n")
    run_to_end(config)
    checkpoints = tmp_path / "run/checkpoints"
    manifest = checkpoints / "step-20.b1/MANIFEST.json"
    manifest.unlink()
    manifest.mkdir()  # cannot be read
    whole = checkpoint.verify

    def retire_and_verify(folder: Path) -> list[str]:
        if folder.name == "step-0.b1":
            checkpoint.remove(folder)
        return whole(folder)

    monkeypatch.setattr(checkpoint, "verify", retire_and_verify)
    code, text = verify(tmp_path / "run")
    assert code == 1 and text.splitlines() == [
        f"step-20.b1: {manifest}: Is a directory",
        "step-10.b1: whole, digest as in the journal",
    ]


def test_verify_reads_the_data_again(tmp_path: Path) -> None:
    """A checkpoint whose digest is not that of its data, though every hash is right."""
    run_to_end(write_run(tmp_path, TORCH, steps=20))
    folder = tmp_path / "run/checkpoints/step-10.b1"
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    manifest["position"]["digest"] = "e" * 32
    manifest["sha256"] = checkpoint._self_hash(manifest)
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    shutil.rmtree(tmp_path / "run/journal")
    assert verify(tmp_path / "run")[0] == 0
    code, text = verify(tmp_path / "run", "--deep")
    assert code == 1 and f"step-10.b1: digest {'e' * 32} is not " in text and "that of the data from step 0" in text
    for shard in (tmp_path / "alpha").rglob("*.tar"):
        flip(shard)
    code, text = verify(tmp_path / "run", "--deep")
    assert code == 1 and re.match(r"step-20.b1: the data from step 10 on: \S+/alpha/\S+: ", text)
    assert "\nstep-10.b1: the data from step 0 on: " in text and "\nstep-0.b1: whole" in text


def test_a_store_that_is_away_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**KEY, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}.items():  # nobody listens there
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "PATIENCE", replace(remote.PATIENCE, attempts=1, wait_s=0.01))
    with pytest.raises(ArchiveError, match=r"^resume: s3://archive/run/checkpoints/step-4.b1: .{20,500}$") as caught:
        bring_home("s3://archive/run/checkpoints/step-4.b1", tmp_path / "home")
    assert "\n" not in str(caught.value) and "Debug" not in str(caught.value)


def test_a_large_file_goes_to_s3_in_parts_that_s3_takes() -> None:
    for gib in (0, 1, 98, 4000):
        assert -(-gib * 2**30 // part_bytes(gib * 2**30)) <= 10_000
