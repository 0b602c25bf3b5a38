"""What a run does when its saves go wrong, are slow, or are not its own: end to end."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.failpoints import VARIABLE
from pretrain import checkpoint
from tests.disks import fill, small_disk
from tests.runs import Started, final_state, run_to_end, write_run, zero

SLOW = {VARIABLE: "train.step=sleep:0.05"}
TIGHT = "preflight.least_free_gib=0"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """With room for a few checkpoints of 0.6 MB."""
    with small_disk(tmp_path / "small", "size=3m") as place:
        yield place


def move(config: Path, place: Path) -> None:
    """Have the run folder lie on the small disk."""
    (place / "run").mkdir()
    (config.parent / "run").symlink_to(place / "run")


def all_whole(folder: Path) -> bool:
    return all(checkpoint.verify(path) == [] for path in checkpoint.live_checkpoints(folder / "run"))


def test_a_full_disk_stops_the_run_which_then_goes_on(disk: Path, tmp_path: Path) -> None:
    config = write_run(tmp_path)
    move(config, disk)
    started = Started(config, 1, TIGHT, variables=SLOW)
    started.wait_for_step(12)
    filler = fill(disk, 200_000)
    assert started.wait() == [1]
    assert f"disk full at {tmp_path}/run/checkpoints/.tmp-step-20.b1: needs " in started.text
    assert checkpoint.live_checkpoints(tmp_path / "run")[0].name == "step-10.b1" and all_whole(tmp_path)
    filler.unlink()
    run_to_end(config, 1, TIGHT)
    assert final_state(tmp_path)[0]["step"] == 40 and all_whole(tmp_path)


def test_a_full_disk_does_not_stop_a_run_that_is_to_go_on(disk: Path, tmp_path: Path) -> None:
    config = write_run(tmp_path)
    move(config, disk)
    started = Started(config, 1, TIGHT, "checkpoint.on_error=go_on", variables=SLOW)
    started.wait_for_step(12)
    filler = fill(disk, 200_000)
    started.wait_for_step(24)
    filler.unlink()
    assert started.wait() == [0], started.text
    assert "checkpoint of step 20 not saved" in started.text
    steps = [path.name for path in checkpoint.live_checkpoints(tmp_path / "run")]
    assert steps == ["step-40.b1", "step-30.b1", "step-10.b1"] and all_whole(tmp_path)


def test_a_rank_that_cannot_write_ends_the_run_at_once(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    started = Started(config, 2, variables={VARIABLE: "checkpoint.written@1#2=EDQUOT"})
    assert started.wait(200) == [1, 1]
    assert f"quota exceeded at {tmp_path}/run/checkpoints: needs " in started.text
    assert [path.name for path in checkpoint.live_checkpoints(tmp_path / "run")] == ["step-0.b1"]


def test_a_stop_signal_during_a_save_ends_with_whole_ones(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    slow = {VARIABLE: "checkpoint.written@1#3=sleep:4; train.step=sleep:0.02"}  # rank 1 in the save of step 20
    started = Started(config, 2, variables=slow)
    started.wait_for_step(21)
    assert (tmp_path / "run/checkpoints/.tmp-step-20.b1").is_dir()
    started.signal(signal.SIGTERM)
    assert started.wait() == [3, 3]
    newest, before, *_ = checkpoint.live_checkpoints(tmp_path / "run")
    assert before.name == "step-20.b1" and checkpoint.open_checkpoint(newest).position.step > 20
    assert all_whole(tmp_path) and not list((tmp_path / "run/checkpoints").glob(".tmp-*"))


def test_damage_that_one_rank_alone_sees_is_no_hang(tmp_path: Path) -> None:
    """With ZeRO each rank reads its own part; taking it over is collective, and only done when all have theirs."""
    config = write_run(tmp_path, zero(1), steps=20)
    run_to_end(config, 2)
    newest = checkpoint.live_checkpoints(tmp_path / "run")[0]
    data = bytearray((newest / "rank-1-of-2.bin").read_bytes())
    data[-5] ^= 1
    (newest / "rank-1-of-2.bin").write_bytes(data)
    golden = final_state(tmp_path)[0]
    text = run_to_end(config, 2)
    assert "rank-1-of-2.bin: damaged" in text and "going on from step-10.b1 (10 steps lost)" in text
    assert final_state(tmp_path)[0] == golden


def refused(config: Path, *overrides: str) -> str:
    started = Started(config, 1, *overrides)
    assert started.wait() == [2], started.text
    return started.text.splitlines()[-1].removeprefix("pretrain: ")


def test_never_a_silent_fresh_start_and_never_another_run_s_checkpoint(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    never = "checkpoint.save_every_steps=1000"
    started = Started(config, 1, never, variables=SLOW)
    started.wait_for_step(5)
    started.kill()  # before its first interval
    assert "going on from step-0.b1" in run_to_end(config, 1, never)
    folder = tmp_path / "run"
    assert refused(config, "resume=' '").startswith("resume:  : not a checkpoint of this run; they lie in ")
    assert refused(config, f"resume={folder}/checkpoint/step-0.b1").endswith(f"they lie in {folder}/checkpoints")
    assert refused(config, "model.layers=3", "model.width=64").startswith(f"{folder}: model.layers: 2 -> 3: is part of")
    other = tmp_path / "other"
    run_to_end(write_run(other, steps=10), 1, "seed=5")
    shutil.copytree(other / "run/checkpoints/step-10.b1", folder / "checkpoints/step-99.b2")
    assert refused(config) == f"{folder}/checkpoints/step-99.b2: is of another run: seed: 5 -> 1"
    shutil.rmtree(folder / "checkpoints/step-99.b2")
    shutil.rmtree(tmp_path / "alpha")
    shutil.copytree(other / "beta", tmp_path / "alpha")
    assert "alpha does not hold what this run began with: manifest" in refused(config)
