"""The launcher of this machine, with small scripts for ranks."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from configs import ConfigError
from launch.job import Job
from launch.local import Local

STOP = """
import os, pathlib, signal, sys, time
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
rank, attempt, folder = int(os.environ["RANK"]), int(os.environ["LONGHAUL_ATTEMPT"]), pathlib.Path(sys.argv[1])
(folder / f"pid-{rank}").write_text(str(os.getpid()))
print("rank", rank, "ready", flush=True)
"""
WAIT = STOP + "while not stopped: time.sleep(0.02)\nsys.exit(3)"


@pytest.fixture
def job(tmp_path: Path) -> Callable[[str], Job]:
    def make(script: str) -> Job:
        run = tmp_path / "run"
        return Job("small", run, run / "submissions" / "1", "name: small\n", ("-c", script, str(tmp_path)))

    return make


def until(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < end, "waited 30 s in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Not gone, and not a zombie either, which has no folder."""
    return Path(f"/proc/{pid}/cwd").exists()


def start_apart(local: Local, job: Job) -> subprocess.Popen[bytes]:
    """A launcher in a process of its own, whose ranks are ready."""
    code = f"from launch.job import Job\nfrom launch.local import Local\nfrom pathlib import *\n{job=}\n"
    code += f"raise SystemExit(Local(**{local.model_dump()}).start(job))"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    logs = [job.logs / "attempt-1" / f"rank-{rank}.log" for rank in range(local.ranks)]
    until(lambda: all(log.exists() and "ready" in log.read_text() for log in logs))
    return process


def test_environment_and_output(job: Callable[[str], Job], capfd: pytest.CaptureFixture[str]) -> None:
    names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT LONGHAUL_ATTEMPT OMP_NUM_THREADS"
    made = job(f"import os; print(*(os.environ[name] for name in {names.split()}))")
    assert Local(ranks=2).start(made) == 0
    outputs = [(made.logs / "attempt-1" / f"rank-{rank}.log").read_text().split() for rank in (0, 1)]
    assert outputs[0][:5] == ["0", "2", "0", "2", "127.0.0.1"]
    assert outputs[1][:5] == ["1", "2", "1", "2", "127.0.0.1"]
    assert outputs[0][5] == outputs[1][5]
    assert outputs[0][6] == "1"
    assert int(outputs[0][7]) >= 1
    shown = capfd.readouterr().err
    assert " ".join(outputs[0]) in shown
    assert " ".join(outputs[1]) not in shown
    assert (made.folder / "run.yaml").read_text() == "name: small\n"
    assert "ranks: 2" in (made.folder / "launcher.yaml").read_text()


def test_one_rank_down_ends_the_others(job: Callable[[str], Job], capfd: pytest.CaptureFixture[str]) -> None:
    deaf = STOP + "if rank == 1: sys.exit(5)\nwhile True: time.sleep(1)"
    assert Local(ranks=3, grace_s=0.3).start(job(deaf)) == 5
    shown = capfd.readouterr().err
    assert "launch: rank 1 ended with exit 5" in shown
    assert "launch: rank(s) 0, 2 went on without the others: SIGTERM" in shown
    assert "launch: rank(s) 0, 2 went on without the others: SIGKILL" in shown


def test_a_killed_rank_is_a_failure(job: Callable[[str], Job], capfd: pytest.CaptureFixture[str]) -> None:
    script = WAIT.replace("while not", "if rank == 0: os.kill(os.getpid(), 9)\nwhile not")
    assert Local(ranks=2, grace_s=0.1).start(job(script)) == 1
    assert "launch: rank 0 ended with SIGKILL" in capfd.readouterr().err


def test_what_a_rank_left_is_ended(job: Callable[[str], Job], tmp_path: Path) -> None:
    script = "import subprocess, sys\nprint(subprocess.Popen(['sleep', '1000']).pid)"
    made = job(script)
    assert Local().start(made) == 0
    child = int((made.logs / "attempt-1" / "rank-0.log").read_text())
    until(lambda: not alive(child))


@pytest.mark.parametrize("code", [1, 3, 4])
def test_started_again(job: Callable[[str], Job], capfd: pytest.CaptureFixture[str], code: int) -> None:
    made = job(STOP + f"sys.exit({code} if attempt < 3 else 0)")
    assert Local(restarts=5).start(made) == 0
    assert sorted(folder.name for folder in made.logs.iterdir()) == ["attempt-1", "attempt-2", "attempt-3"]
    again = f"launch: attempt 2 ended with exit {code}: starting again (restart 2 of 5)"
    assert again in capfd.readouterr().err


@pytest.mark.parametrize(("code", "restarts", "attempts"), [(3, 1, 2), (2, 9, 1), (5, 9, 1), (6, 9, 1), (7, 9, 1)])
def test_not_started_again(job: Callable[[str], Job], code: int, restarts: int, attempts: int) -> None:
    made = job(f"raise SystemExit({code})")
    assert Local(restarts=restarts).start(made) == code
    assert len(list(made.logs.iterdir())) == attempts


def test_crash_loop(job: Callable[[str], Job], capfd: pytest.CaptureFixture[str]) -> None:
    made = job("raise ValueError('the cause')")
    assert Local(ranks=2, restarts=9, grace_s=0.1).start(made) == 8
    assert sorted(folder.name for folder in made.logs.iterdir()) == ["attempt-1", "attempt-2", "attempt-3"]
    why = "crash loop: 3 bad ends in a row, not one checkpoint (rank "
    assert f"launch: attempt 3 ended with exit 8: {why}" in capfd.readouterr().err
    end = json.loads((made.logs / "attempt-3" / "end.json").read_text())
    assert end["why"].endswith(": ValueError: the cause)")
    begun = json.loads((made.logs / "attempt-3" / "attempt.json").read_text())
    assert (begun["restarts"], begun["ranks"], begun["launcher"], begun["job"]) == (2, 2, "local", None)


def test_one_launcher_at_a_time(job: Callable[[str], Job]) -> None:
    made = job(WAIT)
    launcher = start_apart(Local(), made)
    with pytest.raises(ConfigError) as caught:
        Local().start(made)
    assert f"{made.run_folder}: a launcher runs it (host " in str(caught.value)
    assert f", pid {launcher.pid}); wait for its end, or stop it: launch stop {made.run_folder}" in str(caught.value)
    launcher.kill()
    launcher.wait()
    again = Job(made.name, made.run_folder, made.folder.with_name("2"), "", ("-c", "pass"))
    assert Local().start(again) == 0
    end = json.loads((made.logs / "attempt-1" / "end.json").read_text())
    assert (end["cause"], end["exit_code"]) == ("lost", None)


def test_a_stop_goes_on_to_the_ranks_and_is_final(job: Callable[[str], Job]) -> None:
    made = job(WAIT)
    launcher = start_apart(Local(ranks=2, restarts=5), made)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(30) == 3
    assert [folder.name for folder in made.logs.iterdir()] == ["attempt-1"]


def test_ranks_do_not_outlive_the_launcher(job: Callable[[str], Job], tmp_path: Path) -> None:
    launcher = start_apart(Local(ranks=2), job(WAIT))
    pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in (0, 1)]
    assert all(map(alive, pids))
    launcher.kill()
    launcher.wait()
    until(lambda: not any(map(alive, pids)))
