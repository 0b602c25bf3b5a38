"""Saving under faults: kills at every failpoint, a slow rank, full disks, quotas, a disk that gives back other bytes.

Ranks are forked processes without an engine, so that hundreds of kills take seconds.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data_pipeline import failpoints
from pretrain import checkpoint
from pretrain.checkpoint import Checkpoints, Committed, Position, SaveError, Saver
from pretrain.lineage import Lineage
from tests.disks import fill, small_disk
from tests.pretrain.test_checkpoint import KINDS, make_state

ROOT = Path(__file__).parents[2]
RANKS = 2
NAMES = re.findall(r'fail_at\("(checkpoint\.\w+)"', (ROOT / "pretrain/checkpoint.py").read_text()) + re.findall(
    r'fail_at\("(file\.\w+)"', (ROOT / "data_pipeline/shards.py").read_text()
)


def save_steps(folder: Path, rank: int, branch: int, steps: list[int], settings: Checkpoints) -> None:
    """One rank's saves, one after the other; rank 0 notes each step that it was told of as committed."""

    def told(committed: Committed, seconds: float) -> None:
        with (folder / "told").open("a") as file:
            file.write(f"{committed.position.step}\n")

    saver = Saver(folder, settings, branch, rank, RANKS, {"identity": {}}, on_commit=told)
    for step in steps:
        saver.save(make_state(rank, RANKS, step), Position(step, step, step, "0" * 32), 0)
        saver.wait()


def fork(folder: Path, rank: int, branch: int, steps: list[int], settings: Checkpoints, fault: str) -> int:
    """Start a rank; its process id."""
    if (pid := os.fork()) == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            os.environ |= {"RANK": str(rank), failpoints.VARIABLE: fault}
            save_steps(folder, rank, branch, steps, settings)
            code = 0
        finally:
            os._exit(code)
    return pid


def attempt(folder: Path, branch: int, steps: list[int], fault: str, settings: Checkpoints | None = None) -> bool:
    """Run all ranks; when one is killed, so are the others, as a launcher does. Whether one was."""
    keep = settings or Checkpoints(keep_last=1)
    running = {fork(folder, rank, branch, steps, keep, fault) for rank in range(RANKS)}
    failed: int | None = None
    while running:
        pid, status = os.wait()
        if pid not in running:
            continue
        running.remove(pid)
        if status and failed is None:
            failed = status
            for other in running:
                os.kill(other, signal.SIGKILL)
    assert failed is None or os.WIFSIGNALED(failed), f"exit code {os.waitstatus_to_exitcode(failed or 0)}"
    return failed is not None


def resume(folder: Path) -> tuple[int, int]:
    """What a start does: the newest live checkpoint, whole and right to the last bit; (its step, the new branch)."""
    lineage = Lineage(folder)
    found = checkpoint.live_checkpoints(folder)
    if not found:
        branch = lineage.take(None, 0, None, "start").branch
        checkpoint.sweep(folder)
        return 0, branch
    committed = checkpoint.open_checkpoint(found[0])
    step, state = committed.position.step, make_state(0, 1, None)
    checkpoint.load(committed, state)
    for flat, wanted in zip(state.flats, make_state(0, 1, step).flats, strict=True):
        assert all(torch.equal(flat[kind], wanted[kind]) for kind in KINDS)
    branch = lineage.take(committed.branch, step, committed.manifest_hash, "resume").branch
    checkpoint.sweep(folder)
    return step, branch


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("name", NAMES)
def test_killed_at_every_failpoint(name: str, rank: int, tmp_path: Path) -> None:
    """At its first passage, its second, ... until there is none; each time killed there again before it may go on."""
    for number in range(1, 99):
        folder = tmp_path / f"{number}"
        killed = 0
        for fault in (f"{name}@{rank}#{number}=kill", f"{name}@{rank}#{number}=kill", ""):
            step, branch = resume(folder)
            told = (folder / "told").read_text().split() if (folder / "told").exists() else []
            assert step >= max(map(int, ["0", *told]))  # nothing lost that a commit had promised
            killed += attempt(folder, branch, list(range(step + 1, 3 if fault else 4)), fault)
        assert resume(folder)[0] == 3
        names = [path.name for path in (folder / "checkpoints").iterdir()]
        assert len([n for n in names if n.startswith("step-")]) == len(names) == 1, names
        if not killed:
            assert number > 1 or rank, f"{name} is never passed"
            return


def test_the_list_of_failpoints_is_not_empty() -> None:
    assert {"checkpoint.writing", "checkpoint.renamed", "checkpoint.deleting", "file.synced"} <= set(NAMES)


def test_a_rank_may_learn_of_the_commit_before_its_own_last_sync(tmp_path: Path) -> None:
    """Rank 0 renames the folder as soon as it sees the file of rank 1, which has still to sync that folder."""
    branch = Lineage(tmp_path).take(None, 0, None, "start").branch
    assert not attempt(tmp_path, branch, [1, 2], "file.renamed@1=sleep:0.3", Checkpoints())
    assert [path.name for path in checkpoint.live_checkpoints(tmp_path)] == ["step-2.b1", "step-1.b1"]


def test_a_torn_save_is_never_chosen(tmp_path: Path) -> None:
    """One rank slow in a save, then a kill of all: 20 times, at random moments."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    Lineage(tmp_path).take(None, 0, None, "start")
    assert not attempt(tmp_path, 1, [1], "")
    for _ in range(20):
        slow = rng.randrange(RANKS)
        place = rng.choice(["checkpoint.begun", "checkpoint.written", "checkpoint.verified"])
        fault = f"{place}@{slow}=sleep:600"
        step, branch = resume(tmp_path)
        assert step == 1
        pids = [fork(tmp_path, rank, branch, [2], Checkpoints(), fault) for rank in range(RANKS)]
        done = tmp_path / "checkpoints" / f".tmp-step-2.b{branch}" / f"rank-{1 - slow}-of-2.json"
        deadline = time.monotonic() + 60
        while not done.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(rng.random() / 20)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert [path.name for path in checkpoint.live_checkpoints(tmp_path)] == ["step-1.b1"]
    step, branch = resume(tmp_path)
    assert step == 1 and not attempt(tmp_path, branch, [2], "")
    assert resume(tmp_path)[0] == 2


# --- disks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "small", "size=192k,nr_inodes=64") as place:
        yield place


def commit(folder: Path, step: int, ranks: int = 1) -> None:
    savers = [Saver(folder, Checkpoints(), 1, rank, ranks, {"identity": {}}) for rank in range(ranks)]
    for rank, saver in enumerate(savers):
        saver.save(make_state(rank, ranks, step), Position(step, step, step, "0" * 32), 0)
    assert all(saver.done(60.0) for saver in savers)  # as the next save of each rank would wait
    for saver in savers:
        saver.wait()


@pytest.mark.parametrize("leave", [0, 4096, 12288])
def test_a_full_disk_is_seen_before_the_write_and_the_checkpoint_before_stays_whole(leave: int, disk: Path) -> None:
    Lineage(disk).take(None, 0, None, "start")
    commit(disk, 1)
    filler = fill(disk, leave)
    line = rf"disk full at {disk}/checkpoints.*: needs [\d.]+ KiB, has .*: checkpoint of step 2 not saved"
    with pytest.raises(SaveError, match=line):
        commit(disk, 2, 2)
    (folder,) = checkpoint.live_checkpoints(disk)
    assert folder.name == "step-1.b1" and checkpoint.verify(folder) == []
    filler.unlink()
    commit(disk, 3, 2)
    names = {path.name for path in (disk / "checkpoints").iterdir()}
    assert names == {"step-3.b1", "step-1.b1"}  # what the other rank may have left is gone


def test_a_disk_without_inodes(disk: Path) -> None:
    Lineage(disk).take(None, 0, None, "start")
    commit(disk, 1)
    while os.statvfs(disk).f_favail > 2:
        (disk / f"filler-{os.statvfs(disk).f_favail}").touch()
    with pytest.raises(SaveError, match=r"no inodes left at .*: needs 4, has 1: checkpoint of step 2 not saved"):
        commit(disk, 2)
    assert checkpoint.verify(checkpoint.live_checkpoints(disk)[0]) == []


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("checkpoint.writing=ENOSPC", r"disk full at .*/checkpoints: needs .*, has .*: checkpoint of step 2 not saved"),
        ("checkpoint.written=EDQUOT", r"quota exceeded at .*/checkpoints: needs .*KiB; raise the quota, or remove"),
        ("checkpoint.synced=EIO", r"checkpoint.synced: Input/output error: checkpoint of step 2 not saved"),
        ("checkpoint.renamed=EIO", r"checkpoint.renamed: Input/output error: checkpoint of step 2 not saved"),
    ],
)
def test_errors_in_mid_write(fault: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Lineage(tmp_path).take(None, 0, None, "start")
    commit(tmp_path, 1)
    monkeypatch.setenv(failpoints.VARIABLE, fault)
    with pytest.raises(SaveError, match=line):
        commit(tmp_path, 2)
    monkeypatch.delenv(failpoints.VARIABLE)
    assert all(checkpoint.verify(folder) == [] for folder in checkpoint.live_checkpoints(tmp_path))
    commit(tmp_path, 3)
    assert checkpoint.live_checkpoints(tmp_path)[0].name == "step-3.b1"


def test_a_rank_that_fails_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Lineage(tmp_path).take(None, 0, None, "start")
    second = Saver(tmp_path, Checkpoints(), 1, 1, 2, {})
    monkeypatch.setenv(failpoints.VARIABLE, "checkpoint.written=EDQUOT")
    second.save(make_state(1, 2, 1), Position(1, 1, 1, "0" * 32), 0)
    with pytest.raises(SaveError):
        second.wait()
    monkeypatch.delenv(failpoints.VARIABLE)
    first = Saver(tmp_path, Checkpoints(), 1, 0, 2, {})
    first.save(make_state(0, 2, 1), Position(1, 1, 1, "0" * 32), 0)
    with pytest.raises(SaveError, match=r"quota exceeded at .*: checkpoint of step 1 not saved"):
        first.wait()


def test_a_bit_that_the_disk_flips_is_found_before_anything_older_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Lineage(tmp_path).take(None, 0, None, "start")
    commit(tmp_path, 1)

    def flip(name: str) -> None:
        path = tmp_path / "checkpoints" / ".tmp-step-2.b1" / "rank-0-of-1.bin"
        if name == "checkpoint.synced":
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 16
            path.write_bytes(data)

    monkeypatch.setattr(checkpoint, "fail_at", flip)
    saver = Saver(tmp_path, Checkpoints(keep_last=1), 1, 0, 1, {"identity": {}})
    saver.save(make_state(0, 1, 2), Position(2, 2, 2, "0" * 32), 0)
    with pytest.raises(SaveError, match=r"rank-0-of-1.bin: the disk gives back other bytes than were written"):
        saver.wait()
    (folder,) = checkpoint.live_checkpoints(tmp_path)
    assert folder.name == "step-1.b1" and checkpoint.verify(folder) == []


def test_what_cannot_be_removed_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Lineage(tmp_path).take(None, 0, None, "start")
    monkeypatch.setenv(failpoints.VARIABLE, "checkpoint.removing=EACCES")
    settings = Checkpoints(keep_last=1)
    save_steps_alone(tmp_path, [1, 2], settings)
    assert "step-1.b1: cannot be removed: Permission denied; tried again after the next save" in caplog.text
    monkeypatch.delenv(failpoints.VARIABLE)
    save_steps_alone(tmp_path, [3], settings)
    assert [path.name for path in checkpoint.live_checkpoints(tmp_path)] == ["step-3.b1"]


def save_steps_alone(folder: Path, steps: list[int], settings: Checkpoints) -> None:
    saver = Saver(folder, settings, 1, 0, 1, {"identity": {}})
    for step in steps:
        saver.save(make_state(0, 1, step), Position(step, step, step, "0" * 32), 0)
        saver.wait()
