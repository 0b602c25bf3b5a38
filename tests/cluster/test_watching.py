"""`launch status`, `logs` and `stop` of real runs on a real SLURM: through a requeue, and with its daemons down."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.slurm import Cluster, missing
from tests.launch.small_run import write_small_run

LAUNCH = [sys.executable, "-m", "launch.cli"]


@pytest.fixture(scope="module")
def own_cluster() -> Iterator[Cluster]:
    """One whose daemons may be killed."""
    if reason := missing():
        pytest.skip(f"no SLURM: {reason}")
    cluster = Cluster(nodes=2)
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture
def cluster(own_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("SLURM_CONF", own_cluster.environment["SLURM_CONF"])
    return own_cluster


def launch(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*LAUNCH, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def submit(config: Path, *more: str) -> str:
    done = launch("submit", config, "launcher.kind=slurm", "launcher.nodes=2", *more)
    assert done.stdout.strip().isdecimal(), done.stderr
    return done.stdout.strip()


def status(run: Path) -> dict[str, Any]:
    done = launch("status", run, "--json")
    assert done.returncode == 0, done.stderr
    [tree] = json.loads(done.stdout)
    assert isinstance(tree, dict)
    return tree


def wait_for(run: Path, states: set[str], attempt: int, step: int = 0) -> dict[str, Any]:
    """The status as soon as the run is in one of `states`, in that attempt, beyond that step."""
    end = time.monotonic() + 120
    while True:
        tree = status(run)
        if tree["state"] in states and tree["attempt"] == attempt and (tree["step"] or 0) >= step:
            return tree
        assert time.monotonic() < end, tree
        time.sleep(0.2)


def test_through_a_requeue_with_daemons_down(cluster: Cluster, tmp_path: Path) -> None:
    config = write_small_run(tmp_path, steps=20_000)
    job = submit(config)
    run = tmp_path / "run"
    follower = subprocess.Popen([*LAUNCH, "logs", str(config), "--follow"], stdout=subprocess.PIPE, text=True)
    try:
        tree = wait_for(config, {"running"}, attempt=1, step=20)
        assert (tree["job"], tree["launcher"], tree["end_step"], tree["restarts"]) == (job, "slurm", 20_000, 0)
        assert tree["nodes"] == ["n1", "n2"]
        assert tree["tokens_per_s"] > 0
        assert tree["eta_s"] > 0

        cluster.run(f"scontrol requeue {job}")
        tree = wait_for(config, {"pending"}, attempt=1)
        assert (tree["job"], tree["detail"], tree["notes"]) == (job, "SLURM's delay before a restart", [])
        stopped_at = tree["step"]
        tree = wait_for(config, {"running"}, attempt=2, step=stopped_at + 5)
        [recovery] = tree["recoveries"]
        assert recovery["attempt"] == 2
        assert recovery["complete"]
        assert set(recovery["start"]) >= {"launch", "imports", "rendezvous", "build", "load", "first_step"}
        assert recovery["queue"] > 1  # SLURM's delay
        assert 0 < tree["goodput"] < 1

        cluster.stop_daemon("slurmdbd")
        assert (status(run)["state"], status(run)["notes"]) == ("running", [])
        cluster.stop_daemon("slurmctld")
        begun = time.monotonic()
        tree = status(run)
        assert time.monotonic() - begun < 30
        assert tree["state"] == "running"
        assert tree["notes"][0].startswith("SLURM does not answer: ")
        refused = launch("stop", run)
        assert refused.returncode == 1
        assert "SLURM does not answer" in refused.stderr

        cluster.start_daemons()
        stopped = launch("stop", run, "--json")
        assert stopped.returncode == 0, stopped.stderr
        tree = json.loads(stopped.stdout)
        assert tree["state"] == "stopped"
        assert tree["checkpoint"]["step"] == tree["step"] > stopped_at
        assert cluster.wait(job, {"COMPLETED", "FAILED", "CANCELLED"})
        output, _ = follower.communicate(timeout=60)
        assert follower.returncode == 0
        assert [line.split(":")[0] for line in output.splitlines() if line.startswith("== ")] == [
            "== attempt 1",
            "== attempt 2",
        ]
        assert f"going on from step-{recovery['step']}.b1" in output
        assert f"at step {tree['step']} (exit 3)" in output
    finally:
        follower.kill()
        cluster.start_daemons()


def test_what_waits_is_taken_out_of_the_queue(cluster: Cluster, tmp_path: Path) -> None:
    config = write_small_run(tmp_path, steps=1000)
    job = submit(config, "launcher.sbatch={hold: 'true'}")
    tree = status(config)
    assert (tree["state"], tree["detail"], tree["job"], tree["step"]) == ("pending", "JobHeldUser", job, None)
    assert tree["seconds"]["queue"] > 0
    waiting = launch("logs", config)
    assert (waiting.returncode, waiting.stdout) == (2, "")
    done = launch("stop", config)
    assert (done.returncode, done.stdout) == (0, "small: cancelled, nothing was saved\n")
    assert cluster.state(job) == "CANCELLED"


def test_a_chain_is_stopped_whole(cluster: Cluster, tmp_path: Path) -> None:
    config = write_small_run(tmp_path, steps=20_000)
    job = submit(config, "launcher.restart=chain")
    tree = wait_for(config, {"running"}, attempt=1, step=5)
    assert (tree["job"], tree["notes"]) == (job, [])
    done = launch("stop", config, "--json")
    assert done.returncode == 0, done.stderr
    tree = json.loads(done.stdout)
    assert (tree["state"], tree["attempt"]) == ("stopped", 1)
    assert tree["checkpoint"]["step"] == tree["step"]
    [first, follower] = (tmp_path / "run" / "submissions" / "1" / "jobs").read_text().split()
    assert first == job
    assert cluster.wait(follower, {"CANCELLED"})


def test_cancelled_behind_our_back(cluster: Cluster, tmp_path: Path) -> None:
    config = write_small_run(tmp_path, steps=1000)
    job = submit(config, "launcher.sbatch={hold: 'true'}")
    cluster.run(f"scancel {job}")
    tree = status(config)
    assert (tree["state"], tree["detail"]) == ("cancelled", f"job {job} cancelled")
