"""`launch logs`, on logs that grow while they are read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
DEAD = 2**22 + 1


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch.cli", "logs", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def logs(*arguments: object) -> tuple[int, str, str]:
    process = start(*arguments)
    output, error = process.communicate(timeout=60)
    return process.returncode, output, error


def two_attempts(run: RunFolder) -> None:
    run.attempt(began=1.8e9, pid=DEAD)
    run.end(1, "restart")
    run.attempt(began=1.8e9, pid=DEAD, nodes=["n1", "n2"], job="17")
    run.end(0, "done")


def test_all_attempts_in_order(run: RunFolder) -> None:
    two_attempts(run)
    (run.path / "logs" / "attempt-1" / "rank-1.log").write_bytes(b"torn \xff")
    when = time.strftime("%F %T", time.localtime(1.8e9))
    code, output, error = logs(run.path)
    assert (code, error) == (0, "")
    assert output.splitlines() == [
        f"== attempt 1: {when}",
        "attempt 1, rank 0",
        f"== attempt 2: job 17, on n1,n2, {when}",
        "attempt 2, rank 0",
    ]
    assert logs(run.path, "--rank=1", "--attempt=2") == (0, "attempt 2, rank 1\n", "")
    lines = [json.loads(line) for line in logs(run.path, "--rank=1", "--json")[1].splitlines()]
    assert lines == [
        {"attempt": 1, "rank": 1, "line": "torn \ufffd"},
        {"attempt": 2, "rank": 1, "line": "attempt 2, rank 1"},
    ]


def test_what_is_not_there(run: RunFolder, tmp_path: Path) -> None:
    assert logs(run.path) == (2, "", f"launch: {run.path}: no logs yet; --follow waits for them\n")
    two_attempts(run)
    assert logs(run.path, "--rank=5") == (2, "", f"launch: {run.path}: no log of rank 5; ranks are 0 to 1\n")
    assert logs(run.path, "--attempt=7") == (2, "", f"launch: {run.path}: no attempt 7; attempts are 1 to 2\n")
    nowhere = tmp_path / "nowhere.yaml"
    assert logs(nowhere) == (2, "", f"launch: {nowhere}: no such file\n")


def test_follow_goes_on_into_the_next_attempt_and_ends_with_the_run(run: RunFolder) -> None:
    first = run.attempt()
    process = start(run.path, "--follow", "--json")
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["line"] == "attempt 1, rank 0"
    with (first / "rank-0.log").open("a") as log:
        log.write("begun, ")
        log.flush()
        time.sleep(0.5)
        log.write("and ended\n")
    assert json.loads(process.stdout.readline()) == {"attempt": 1, "rank": 0, "line": "begun, and ended"}
    run.end(3, "restart")
    time.sleep(3)
    assert process.poll() is None  # its launcher lives, and will start it again
    run.attempt()
    assert json.loads(process.stdout.readline()) == {"attempt": 2, "rank": 0, "line": "attempt 2, rank 0"}
    run.end(0, "done")
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


def test_a_reader_that_has_had_enough(run: RunFolder) -> None:
    folder = run.attempt(pid=DEAD)
    (folder / "rank-0.log").write_text("a line\n" * 100_000)
    process = start(run.path)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 0


def test_interrupted(run: RunFolder) -> None:
    run.attempt()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a child of whoever ignores it would ignore it too
    process = start(run.path, "--follow")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert process.stderr.read() == ""
