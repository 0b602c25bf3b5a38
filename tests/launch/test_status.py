"""`launch status` on run folders made by hand; real ones are in tests/cluster/test_watching.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.state import STATES
from launch.status import COLUMNS, Status, look
from pretrain.goodput import PARTS
from tests.launch.run_folder import END_STEP, RunFolder

DEAD = 2**22 + 1  # above the highest number that a process may have
KEYS = [
    "run", "folder", "state", "detail", "launcher", "job", "nodes", "attempt", "step", "end_step", "tokens", "loss",
    "tokens_per_s", "mfu", "eta_s", "record_age_s", "restarts", "checkpoint", "goodput", "seconds", "start_seconds",
    "recoveries", "notes",
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture
def queued(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run", "slurm", jobs=["17"])


def status(run: RunFolder, now: float | None = None) -> Status:
    [found] = look([run.path], now)
    assert found.state.name in STATES
    return found


def slurm(folder: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    """Stand-ins for SLURM's commands where what counts is how they fail; the real ones are in tests/cluster."""
    folder.mkdir(exist_ok=True)
    for name in ("squeue", "sacct", "scancel"):
        (folder / name).write_text(f"#!/bin/sh\n{programs.get(name, 'exit 1')}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


# --- what is shown --------------------------------------------------------------------------------------------------


def test_a_run_that_makes_steps(run: RunFolder) -> None:
    run.attempt()
    run.train(range(1, 11))
    checkpoint = run.save(8, branch=1)
    found = status(run)
    assert (found.state.name, found.state.alive, found.state.pid) == ("running", True, os.getpid())
    assert (found.run, found.step, found.end_step, found.tokens) == ("small", 10, END_STEP, 1280)
    assert (found.loss, found.tokens_per_s, found.mfu) == (4.9, 1234.5, 0.42)
    assert found.eta_s == pytest.approx(90 * 2.5)
    assert found.checkpoint is not None
    assert (found.checkpoint.step, found.checkpoint.path) == (8, checkpoint)
    assert found.time.seconds["train"] == pytest.approx(20)


def test_the_live_lineage_alone_counts(run: RunFolder) -> None:
    run.attempt(pid=DEAD)
    run.train(range(1, 31))
    run.save(10, branch=1)
    run.save(20, branch=1)  # by a branch that had been overtaken
    run.end(None, "restart", "lost with n2")
    run.attempt()
    run.train([11, 12], begin=10)
    found = status(run)
    assert (found.step, found.attempt) == (12, 2)
    assert found.checkpoint is not None
    assert found.checkpoint.step == 10
    assert found.time.seconds["redone"] == pytest.approx(40)
    [restart] = found.time.restarts
    assert (restart.why, restart.step, restart.redone_steps) == ("lost with n2", 10, 20)


def test_keys_are_the_same_in_every_state(run: RunFolder) -> None:
    trees = [status(run).tree()]
    run.attempt()
    trees.append(status(run).tree())
    run.train(range(1, 11))
    run.save(8, branch=1)
    trees.append(status(run).tree())
    for tree in trees:
        assert list(tree) == KEYS
        assert json.loads(json.dumps(tree)) == tree


def test_the_page_names_every_key_state_and_part() -> None:
    page = (Path(__file__).parents[2] / "docs/running.md").read_text()
    section = page.partition("## Watching and stopping")[2].partition("\n## ")[0]
    words = set(re.findall(r"\w+", section))
    assert {*KEYS, *STATES, *PARTS} - words == set()


# --- states ---------------------------------------------------------------------------------------------------------


def test_a_run_without_steps_is_starting(run: RunFolder) -> None:
    run.attempt()
    assert status(run).state.name == "starting"
    run.train([])
    assert status(run).state.name == "starting"


def test_a_restart_is_starting(run: RunFolder) -> None:
    run.attempt(pid=DEAD)
    run.train(range(1, 11))
    run.end(1, "restart")
    run.attempt()
    assert status(run).state.name == "starting"
    assert status(run).step == 10


def test_a_run_that_records_nothing_any_more_has_stalled(run: RunFolder) -> None:
    run.attempt()
    run.train(range(1, 11))
    assert status(run, time.time() + 50).state.name == "running"
    assert status(run, time.time() + 70).state.name == "stalled"


def test_a_long_evaluation_is_no_stall(run: RunFolder) -> None:
    run.attempt()
    journal = run.train(range(1, 11))
    journal.step(11, 44, 1408, None, {"loss": 1.0}, {"train": 2.0, "evaluate": 100.0})
    assert status(run, time.time() + 290).state.name == "running"
    assert status(run, time.time() + 310).state.name == "stalled"


@pytest.mark.parametrize(
    ("exit_code", "action", "state"),
    [
        (0, "done", "done"),
        (3, "stop", "stopped"),
        (130, "stop", "stopped"),
        (7, "stop", "gave_up"),
        (8, "stop", "crash_loop"),
        (5, "stop", "failed"),
    ],
)
def test_how_it_ended(run: RunFolder, exit_code: int, action: str, state: str) -> None:
    run.attempt(pid=DEAD)
    run.train(range(1, 11))
    run.end(exit_code, action)
    found = status(run)
    assert (found.state.name, found.state.over) == (state, True)
    assert found.state.detail == ("why" if exit_code == 0 else f"why (exit {exit_code})")
    assert found.eta_s is None


def test_ended_but_its_launcher_is_still_there(run: RunFolder) -> None:
    run.attempt()
    run.end(1, "stop")
    assert status(run).state.name == "failed"


@pytest.mark.parametrize("end", [None, "restart"])
def test_lost(run: RunFolder, end: str | None) -> None:
    run.attempt(pid=DEAD)
    run.train(range(1, 11))
    if end:
        run.end(1, end)
    assert status(run).state.name == "lost"


def test_a_younger_process_of_the_same_number_is_not_it(run: RunFolder) -> None:
    run.attempt(began=time.time() - 1e6)
    run.train(range(1, 11))
    assert status(run).state.name == "lost"


def test_asked_to_stop(run: RunFolder) -> None:
    run.attempt()
    run.train(range(1, 11))
    (run.submission / "stop").touch()
    assert status(run).state.name == "stopping"


def test_on_another_machine(run: RunFolder) -> None:
    run.attempt(pid=7, host="elsewhere")
    run.train(range(1, 11))
    found = status(run)
    assert (found.state.name, found.state.alive) == ("running", True)
    assert found.state.detail == "process 7 on elsewhere runs it, or was lost"
    silent = status(run, time.time() + 1000)
    assert (silent.state.name, silent.state.alive, silent.state.over) == ("unknown", False, False)


def test_bare_pretrain_train(run: RunFolder) -> None:
    journal = run.train(range(1, 11))
    assert status(run).state.name == "running"  # the lineage names this process
    journal.end(10, 3, "stopped and saved, to be started again")
    assert status(run).state.name == "stopped"


@pytest.mark.parametrize("leap", [-1e5, 1e5])
def test_a_clock_that_was_set(run: RunFolder, leap: float) -> None:
    """The launcher's clock is another one than that of who asks, and of the ranks."""
    run.attempt(began=time.time() + leap, queued=time.time())
    run.train(range(1, 11))
    run.save(8, branch=1)
    tree = status(run, time.time() - leap).tree()
    assert tree["eta_s"] is None or tree["eta_s"] >= 0
    assert tree["checkpoint"]["age_s"] >= 0
    assert tree["record_age_s"] >= 0
    assert all(value >= 0 for value in (*tree["seconds"].values(), *tree["start_seconds"].values()))
    assert tree["step"] == 10


def test_between_two_attempts_it_is_starting(run: RunFolder) -> None:
    run.attempt()
    run.train(range(1, 11))
    run.end(1, "restart")
    assert status(run).state.name == "starting"


# --- SLURM that fails -----------------------------------------------------------------------------------------------


def test_slurm_is_silent(queued: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.queue.TIMEOUT_S", 0.3)
    slurm(tmp_path / "bin", monkeypatch, squeue="exec sleep 100", sacct="echo 'sacct: error: no' >&2; exit 1")
    found = status(queued)
    assert (found.state.name, found.state.over) == ("unknown", False)
    assert found.notes == ["SLURM does not answer: squeue took more than 0.3 s"]
    queued.attempt()
    queued.train(range(1, 11))
    found = status(queued)
    assert (found.state.name, found.step) == ("running", 10)
    assert found.notes == ["SLURM does not answer: squeue took more than 0.3 s"]
    assert status(queued, time.time() + 1000).state.name == "unknown"
    queued.end(0, "done")
    found = status(queued)
    assert (found.state.name, found.notes) == ("done", [])


def test_accounting_is_silent(queued: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(tmp_path / "bin", monkeypatch, squeue="echo '17|PENDING|2026-11-20T10:00:00|Resources'")
    found = status(queued)
    assert (found.state.name, found.state.detail, found.job, found.notes) == ("pending", "Resources", "17", [])


def test_the_controller_is_silent(queued: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(tmp_path / "bin", monkeypatch, squeue="exit 1", sacct="echo '17|CANCELLED by 0'")
    found = status(queued)
    assert (found.state.name, found.state.detail) == ("cancelled", "job 17 cancelled")


def test_a_job_that_vanished(queued: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    invalid = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    slurm(tmp_path / "bin", monkeypatch, squeue=invalid, sacct="exit 0")
    queued.attempt()
    queued.train(range(1, 11))
    found = status(queued)
    assert (found.state.name, found.notes) == ("lost", [])


def test_no_slurm_on_this_machine(queued: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = status(queued)
    assert found.state.name == "unknown"
    assert found.notes == ["squeue is not on this machine"]


# --- the command ----------------------------------------------------------------------------------------------------


def launch(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "launch.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd, env=environment)


def test_table(run: RunFolder, tmp_path: Path) -> None:
    run.attempt(pid=DEAD)
    run.train(range(1, 11))
    run.end(0, "done", "train_tokens 12800 reached")
    config = tmp_path / "small.yaml"
    config.write_text("name: small\nrun_folder: run\n")
    done = launch("status", config, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == list(COLUMNS)
    assert lines[1].split()[:4] == ["small", "done", "10/100", "4.9000"]
    assert lines[2].startswith("small: 26s: train 77.")
    assert lines[3] == "  train_tokens 12800 reached"
    assert launch("status", cwd=tmp_path).stdout == done.stdout


def test_json_and_unknown_runs(run: RunFolder, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    config = tmp_path / "other.yaml"
    config.write_text("run_folder: nowhere\n")
    done = launch("status", run.path, empty, config, "--json", cwd=tmp_path)
    assert done.returncode == 2
    assert [tree["run"] for tree in json.loads(done.stdout)] == ["small"]
    assert done.stderr.splitlines() == [
        f"launch: {empty}: neither run.yaml nor submissions: not a run folder",
        f"launch: {config}: no run in its run_folder nowhere: it was never submitted",
    ]
    assert launch("status", cwd=empty).stderr == "launch: no run in this folder or in its runs/; name one\n"


def test_nothing_heavy_is_imported() -> None:
    program = "import sys, launch.status, launch.stop, launch.logs; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"
