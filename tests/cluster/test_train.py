"""`launch submit` of a real run on a real SLURM."""

import shutil
import subprocess
import sys
from pathlib import Path

from launch.job import PACKAGES
from tests.cluster.slurm import Cluster
from tests.launch.small_run import write_small_run
from tests.processes import HERE as ROOT


def test_stopped_by_slurm_and_resumed_on_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    config = write_small_run(tmp_path, steps=600)
    command = [sys.executable, "-m", "launch.cli", "submit", str(config), "launcher.kind=slurm", "launcher.nodes=2"]
    submitted = subprocess.run(command, capture_output=True, text=True, timeout=120)
    job = submitted.stdout.strip()
    assert job.isdecimal(), submitted.stderr
    logs = tmp_path / "run" / "logs"
    first, second = logs / "attempt-1" / "rank-0.log", logs / "attempt-2" / "rank-0.log"
    cluster.until("step 20", lambda: first.exists() and "step 20/600" in first.read_text())
    cluster.run(f"scancel --signal=USR2 {job}")
    assert cluster.wait(job, {"COMPLETED", "FAILED", "CANCELLED"}) == "COMPLETED"
    [stopped] = [line for line in first.read_text().splitlines() if "(exit 3)" in line]
    step = int(stopped.split("at step ")[1].split(" ")[0])
    assert 20 <= step < 600
    assert "2 ranks" in first.read_text()
    assert f"going on from step-{step}.b1" in second.read_text()
    assert "at step 600 (exit 0)" in second.read_text()


def test_a_queued_job_runs_the_code_it_was_queued_with(cluster: Cluster, tmp_path: Path) -> None:
    config = write_small_run(tmp_path, steps=3)
    tree = tmp_path / "tree"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "launch.cli", "submit", str(config), "launcher.kind=slurm"]
    held = [*command, "launcher.sbatch={hold: 'true'}"]
    submitted = subprocess.run(held, cwd=tree, capture_output=True, text=True, timeout=120)
    job = submitted.stdout.strip()
    assert job.isdecimal(), submitted.stderr
    (tree / "pretrain" / "cli.py").write_text("raise SystemExit('the code of later')\n")
    cluster.run(f"scontrol release {job}")
    assert cluster.wait(job, {"COMPLETED", "FAILED", "CANCELLED"}) == "COMPLETED"
    assert "at step 3 (exit 0)" in (tmp_path / "run" / "logs" / "attempt-1" / "rank-0.log").read_text()
