"""`amend` beside attempts that start or still run, and what is read of a run whose config is no longer that of old."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from configs import ConfigError
from pretrain.amend import amend
from pretrain.cli import app
from pretrain.run import load_run
from pretrain.segments import Segments
from tests.processes import environment
from tests.runs import Started, run_to_end, write_run

HERE = Path(__file__).resolve().parents[2]
HEAVIER = "data.sources.beta.weight=2"
TAKEN_OVER = 6


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run of which 10 of 40 steps are trained."""
    path = write_run(tmp_path)
    run_to_end(path, 1, "stop_at_step=10")
    return path


def wait_until_stopped(pid: int) -> None:
    deadline = time.monotonic() + 120
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_whole(config: Path) -> None:
    """The run goes on to its end, and the data give the digest of each step."""
    run_to_end(config)
    verified = CliRunner().invoke(app, ["verify", str(config.parent / "run"), "--deep"])
    assert verified.exit_code == 0 and "steps 0 to 40: the data give the digest" in verified.stderr


def test_an_amendment_while_an_attempt_starts_ends_that_attempt(config: Path) -> None:
    started = Started(config, 1, variables={"LONGHAUL_FAIL_AT": "start.branch=stop"})
    wait_until_stopped(started.processes[0].pid)
    amend(config, [HEAVIER])
    started.signal(signal.SIGCONT)
    assert started.wait() == [TAKEN_OVER], started.text
    assert "was amended while this attempt started; start it again" in started.text
    is_whole(config)


def test_an_attempt_that_starts_while_an_amendment_is_written_is_taken_over(config: Path) -> None:
    code = f"from pathlib import Path; from pretrain.amend import amend; amend(Path({str(config)!r}), [{HEAVIER!r}])"
    variables = environment(0, 1, 0) | {"LONGHAUL_FAIL_AT": "amend.taken=stop"}
    with subprocess.Popen([sys.executable, "-c", code], cwd=HERE, env=variables) as amending:
        wait_until_stopped(amending.pid)
        slow = {"LONGHAUL_FAIL_AT": "engine.forward=sleep:0.1"}  # so that it still runs when the record comes
        started = Started(config, 1, variables=slow)
        started.wait_for_step(12)
        amending.send_signal(signal.SIGCONT)
        assert amending.wait(60) == 0
    assert started.wait() == [TAKEN_OVER], started.text
    assert len(Segments(config.parent / "run").read()) == 2
    is_whole(config)


def test_an_attempt_that_has_not_ended_is_told_of(config: Path) -> None:
    started = Started(config, 1, variables={"LONGHAUL_FAIL_AT": "train.step#15=stop"})
    wait_until_stopped(started.processes[0].pid)
    said: list[str] = []
    amend(config, [HEAVIER], said.append)
    started.kill()
    (line,) = said
    assert (
        f"(pid {started.processes[0].pid}) has not ended: where it still runs, it stops, and its steps 11 to " in line
    )


def test_fewer_tokens_than_were_trained_are_refused(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"^train_tokens: 3200, but 6400 are trained, at step 10; expected at least"):
        amend(config, ["train_tokens=3200"])
    amend(config, ["train_tokens=6400"])
    assert "step 11" not in run_to_end(config)


def test_what_looks_at_a_run_goes_by_its_own_seed_and_where_its_shards_are_now(config: Path, tmp_path: Path) -> None:
    def ask(*arguments: str | Path) -> str:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
        return done.stdout

    run = tmp_path / "run"
    before = ask("trace", run, "--step", "3", "--json")
    assert json.loads(before)
    text = config.read_text()
    config.write_text(f"seed: 7\n{text}")
    assert ask("trace", config, "--step", "3", "--json") == before
    ask("verify", config, "--deep")
    (tmp_path / "alpha").rename(tmp_path / "moved")
    cache = f"  cache: {{folder: {tmp_path / 'none' / 'cache'}, gib: 1}}\n"
    text = text.replace(f"{tmp_path}/alpha", f"{tmp_path}/moved")
    config.write_text(text.replace("data:\n", f"data:\n{cache}"))
    assert ask("trace", config, "--step", "3", "--json") == before
    ask("verify", config, "--deep")
    ask("amend", config, HEAVIER)
    assert not (tmp_path / "none").exists()  # the cache is the training nodes' own
    config.write_text(text)
    run_to_end(config, 1, "stop_at_step=12")
    assert load_run(run).data.sources["alpha"].shards == tmp_path / "moved"
    assert ask("trace", run, "--step", "3", "--json") == before  # the attempt has written where they are
    ask("verify", run, "--deep")
