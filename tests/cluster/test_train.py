"""`launch submit` of a real run on a real SLURM."""

import subprocess
import sys
from pathlib import Path

from tests.cluster.slurm import Cluster
from tests.launch.small_run import write_small_run


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
