"""Real runs under SLURM's faults end as the undisturbed run does: same digest, same losses to the last bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import checkpoint
from pretrain.track.journal import lineage, live_records, read_journal
from tests.cluster.slurm import Cluster
from tests.cluster.test_faults import Launched, preempt
from tests.launch.small_run import write_small_run
from tests.runs import Started

STEPS = 150
OPTIONS = ["checkpoint.save_every_steps=10"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run on two ranks that nothing befalls."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert Started(write_small_run(folder, STEPS), 2, *OPTIONS).wait() == [0, 0]
    return folder / "run"


@pytest.fixture
def submitted(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launched:
    """The same run on SLURM, slow enough to be disturbed."""
    monkeypatch.setenv("LONGHAUL_FAIL_AT", "train.step=sleep:0.2")
    write_small_run(tmp_path, STEPS)
    return Launched(cluster, tmp_path)


def submit(launched: Launched, *more: str) -> None:
    command = [sys.executable, "-m", "launch.cli", "submit", str(launched.folder / "run.yaml"), *OPTIONS]
    done = subprocess.run([*command, "launcher.kind=slurm", *more], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().isdecimal(), done.stderr
    launched.number = done.stdout.strip()


def wait_for_steps(launched: Launched, attempt: int) -> None:
    """Wait until an attempt has trained beyond a checkpoint of its own."""
    log = launched.run / "logs" / f"attempt-{attempt}" / "rank-0.log"
    text = f"attempt {attempt} trains"
    launched.cluster.until(text, lambda: log.exists() and "checkpoint step-" in log.read_text())


def losses(run: Path) -> dict[int, float]:
    records = live_records(read_journal(run), lineage(run))
    return {record.step: record.metrics["loss"] for record in records if record.type == "step"}


def same_end(run: Path, undisturbed: Path) -> None:
    ends = [
        checkpoint.open_checkpoint(checkpoint.live_checkpoints(folder)[0]).position for folder in (run, undisturbed)
    ]
    assert ends[0] == ends[1]
    assert losses(run) == losses(undisturbed)
    assert len(losses(run)) == STEPS


def test_preempted_lost_and_requeued(submitted: Launched, undisturbed: Path) -> None:
    cluster = submitted.cluster
    submit(submitted, "launcher.nodes=2", "launcher.partition=low", "launcher.exclude=n4")
    wait_for_steps(submitted, 1)
    for node in ("n1", "n2", "n3"):
        preempt(cluster, node)
    wait_for_steps(submitted, 2)
    node = submitted.records("attempt")[1]["nodes"][1]
    cluster.crash_node(node)
    cluster.declare_down(node)
    wait_for_steps(submitted, 3)
    cluster.run(f"scontrol requeue {submitted.number}")
    cluster.until("end", lambda: submitted.cluster.state(submitted.number) == "COMPLETED")
    cluster.repair_node(node)
    assert [end["cause"] for end in submitted.records("end")][:3] == ["preempted", "node failure", "requeued"]
    same_end(submitted.run, undisturbed)


def test_two_attempts_alive_and_one_commits(submitted: Launched, undisturbed: Path) -> None:
    cluster = submitted.cluster
    pace = 'export LONGHAUL_FAIL_AT="train.step=sleep:0.$((5 - 5 * ${SLURM_RESTART_COUNT:-0}))"'  # the second is quick
    submit(submitted, "launcher.ranks_per_node=2", "launcher.exclude=n4", f"launcher.setup=['{pace}']")
    wait_for_steps(submitted, 1)
    [node] = submitted.records("attempt")[0]["nodes"]
    cluster.kill_slurmd(node)  # its ranks go on, and SLURM believes them gone
    cluster.declare_down(node)
    cluster.until("end", lambda: cluster.state(submitted.number) == "COMPLETED")
    first = submitted.run / "logs" / "attempt-1" / "rank-0.log"
    cluster.until("the first to stop", lambda: "(exit 6)" in first.read_text())
    assert "has taken over this run from branch 1" in first.read_text()
    cluster.repair_node(node)
    assert [end["cause"] for end in submitted.records("end")] == ["node failure", "itself"]
    assert (
        cluster.run(f"sacct --noheader --allocations --parsable2 --jobs={submitted.number} --format=State")
        == "COMPLETED"
    )
    same_end(submitted.run, undisturbed)
