"""`launch stop` of runs on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from tests.launch.run_folder import RunFolder
from tests.launch.small_run import write_small_run
from tests.launch.test_status import launch

DEAD = 2**22 + 1


def test_saves_and_is_not_started_again(tmp_path: Path) -> None:
    config = write_small_run(tmp_path, steps=3000)
    command = [sys.executable, "-m", "launch.cli", "submit", str(config), "launcher.restarts=5"]
    launcher = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    log = tmp_path / "run" / "logs" / "attempt-1" / "rank-0.log"
    end = time.monotonic() + 120
    while not (log.exists() and "step 10/3000" in log.read_text()):
        assert time.monotonic() < end, "the run does not begin"
        time.sleep(0.05)
    running = json.loads(launch("status", config, "--json").stdout)[0]
    assert (running["state"], running["attempt"], running["end_step"]) == ("running", 1, 3000)
    done = launch("stop", config)
    assert done.returncode == 0, done.stderr
    assert launcher.wait(30) == 3
    stopped = json.loads(launch("status", config, "--json").stdout)[0]
    step = stopped["step"]
    assert (stopped["state"], stopped["checkpoint"]["step"], stopped["attempt"]) == ("stopped", step, 1)
    assert done.stdout == f"small: stopped at step {step}, saved in step-{step}.b1\n"
    assert done.stderr.splitlines()[0].startswith("launch: small: saving at step ")
    again = launch("stop", config, "--json")
    assert (again.returncode, json.loads(again.stdout)["state"]) == (0, "stopped")
    assert stopped["goodput"] > 0
    assert sum(stopped["seconds"].values()) > 0


def test_nothing_to_stop(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.attempt(pid=DEAD)
    run.train(range(1, 11))
    run.save(8, branch=1)
    run.end(5, "stop", "out of memory")
    done = launch("stop", run.path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "small: failed at step 10, saved in step-8.b1; 2 steps after it were not saved\n"
    assert not (run.submission / "stop").exists()


def test_out_of_reach(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.attempt(pid=7, host="elsewhere")
    run.train(range(1, 11))
    done = launch("stop", run.path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == ("launch: small: cannot be reached from here: process 7 on elsewhere runs it, or was lost\n")
    assert (run.submission / "stop").exists()  # wherever it is, it will not be started again


def test_unknown_run(tmp_path: Path) -> None:
    done = launch("stop", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"launch: {tmp_path}: neither run.yaml nor submissions: not a run folder\n"
