"""What older code wrote is read: shards, a run folder and its journal, made on 2026-11-20 and kept here as they were.

`older/2026-11-20.tar.gz` holds two corpora and a run of 12 steps that was stopped after 6. The uninterrupted run of
that time ended with the digest and the loss below.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from data_pipeline import shards
from pretrain import checkpoint, report
from pretrain.run import TrainRun, load_run
from pretrain.segments import Segments, plan_course
from pretrain.track.journal import read_journal
from pretrain.track.mlflow import State
from pretrain.verify import verify_run
from tests.runs import Started

KEPT = Path(__file__).parent / "older" / "2026-11-20.tar.gz"
DIGEST = "ed83f3844624b03fba54f79eead3866a"
LOSS = 3.942472457885742


@pytest.fixture
def older(tmp_path: Path) -> Path:
    with tarfile.open(KEPT) as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path


def moved(older: Path) -> list[str]:
    """Where the shards lie now."""
    return [f"data.sources.{name}.shards={older / name}" for name in ("alpha", "beta")]


def opened(older: Path) -> TrainRun:
    return load_run(older / "run", moved(older))


def test_shards_are_read(older: Path) -> None:
    for name in ("alpha", "beta"):
        assert list(shards.verify(older / name)) == []
        assert shards.Manifest.open(older / name).shards("train", 0).blocks > 3


def test_a_run_and_its_checkpoints_are_read(older: Path) -> None:
    run = opened(older)
    rows = verify_run(run, deep=True)
    assert [(row.name, row.problems) for row in rows] == [("step-6.b1", [])]
    course = plan_course(run, Segments(run.run_folder).read())
    assert course.end_step == 12 and course.order.drawn(96)["alpha"] == 67


def test_a_report_is_made(older: Path) -> None:
    text = report.make([opened(older)], older / "out").read_text()
    assert "<h1>older</h1>" in text and "step-6.b1" in text


def test_what_a_follower_noted_is_read() -> None:
    note = '{"format":1,"uri":"sqlite:////x/mlflow.db","experiment":"x","experiment_id":"1","run_id":"r","cursor":[1,9],"marks":{"loss":3}}'
    assert State.model_validate_json(note).marks == {"loss": 3}


def test_a_run_goes_on_where_older_code_left_it(older: Path) -> None:
    """The data fed are those of the uninterrupted run of that time, and so is the loss."""
    run = opened(older)
    (older / "config.yaml").unlink(missing_ok=True)
    started = Started(older / "run" / "run.yaml", 1, f"run_folder={run.run_folder}", *moved(older), "stop_at_step=12")
    assert started.wait() == [0], started.text
    newest = checkpoint.open_checkpoint(checkpoint.live_checkpoints(run.run_folder)[0])
    assert (newest.position.step, newest.position.digest) == (12, DIGEST)
    last = [record for record in read_journal(run.run_folder) if record.type == "step"][-1]
    assert last.step == 12 and last.metrics["loss"] == pytest.approx(LOSS, abs=1e-4)
