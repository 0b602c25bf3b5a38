"""The process that follows ends when it is told to, when the loop dies, and when its server hangs; not on signals."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from pretrain.track import Journal, Mlflow, start_trackers
from pretrain.track.journal import read_journal

from .conftest import Place

LOOP = """
import sys, time
from pathlib import Path
from pretrain.track import Journal, Mlflow, start_trackers
uri, experiment, run, deadline = sys.argv[1:]
trackers = start_trackers([Mlflow(uri=uri, experiment=experiment, every_seconds=0.05)], Path(run))
print(trackers.pid, flush=True)
journal = Journal(Path(run), 1)
journal.attempt(None, 0, "fresh")
sys.stdin.readline()
journal.step(1, 8, 512, None, {"loss": 1.0})
print(trackers.close(float(deadline)) if deadline else time.sleep(600), flush=True)
"""


@contextlib.contextmanager
def loop(uri: str, experiment: str, run: Path, deadline: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", LOOP, uri, experiment, str(run), deadline]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def wait_for(condition: Callable[[], object]) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def losses(config: Mlflow) -> list[float]:
    client = MlflowClient(config.uri)
    experiment = client.get_experiment_by_name(config.experiment)
    runs = client.search_runs([experiment.experiment_id]) if experiment else []
    return [point.value for run in runs for point in client.get_metric_history(run.info.run_id, "loss")]


def is_gone(pid: int) -> bool:
    """Ended, if perhaps not yet buried by its parent."""
    line = Path(f"/proc/{pid}/cmdline")
    return not line.exists() or not line.read_bytes()


def test_the_end_is_carried_although_the_loop_is_killed(on_database: Place, tmp_path: Path) -> None:
    config = on_database()
    with loop(config.uri, config.experiment, tmp_path, "") as process:
        pid = int(said(process))
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(pid, number)
        go_on(process)
        wait_for(lambda: any(record.type == "step" for record in read_journal(tmp_path)))
    wait_for(lambda: is_gone(pid))
    assert losses(config) == [1.0]


def test_a_server_that_never_answers_keeps_no_process_alive(tmp_path: Path) -> None:
    """A request to it takes 45 s; both processes end when they have waited as long as they were told to."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with loop(f"http://127.0.0.1:{silent.getsockname()[1]}", "x", tmp_path, "0.2") as process:
            pid = int(said(process))
            silent.accept()  # the request has begun
            go_on(process)
            assert said(process) == "False"
            assert process.wait(timeout=30) == 0
        wait_for(lambda: is_gone(pid))


def test_a_process_that_ends_early_is_told_of(
    on_database: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trackers = start_trackers([on_database()], tmp_path)
    assert trackers.pid is not None
    os.kill(trackers.pid, signal.SIGKILL)
    wait_for(lambda: caplog.messages)
    assert caplog.messages == [
        "trackers: their process has ended (exit -9); training goes on and the journal keeps everything; "
        "`pretrain track-sync RUN` carries it"
    ]
    assert not trackers.close()


def test_its_warnings_are_in_our_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Journal(tmp_path, 1).attempt(None, 0, "fresh")
    trackers = start_trackers([Mlflow(uri="http://127.0.0.1:9", every_seconds=0.01)], tmp_path)
    wait_for(lambda: caplog.messages)
    assert not trackers.close(0)
    first, last = caplog.messages
    assert first.startswith("MLflow at http://127.0.0.1:9: MlflowException: API request to ")
    assert last.startswith("MLflow at http://127.0.0.1:9: the end of the run has not been carried; ")


def test_it_starts_where_another_package_of_a_name_lies(
    on_database: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "__init__.py").write_text("raise RuntimeError('a folder of the user')")
    monkeypatch.chdir(tmp_path)
    config = on_database()
    journal = Journal(tmp_path / "run", 1)
    journal.attempt(None, 0, "fresh")
    journal.step(1, 8, 512, None, {"loss": 1.0})
    assert start_trackers([config], tmp_path / "run").close()
    assert losses(config) == [1.0]
