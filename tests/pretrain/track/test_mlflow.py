"""The journal arrives in MLflow once and whole, on a database and on a server, whatever happens on the way."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import LoggedModel, LoggedModelOutput, Run
from mlflow.tracking import MlflowClient

from configs import ConfigError, Section, build, dump
from pretrain.track import Journal, Mlflow, TrackError, start_trackers, sync
from pretrain.track.follower import Followers
from pretrain.track.mlflow import _client

from .conftest import Line, Place

HASH = "0123456789abcdef" * 4


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(1200):
        with contextlib.suppress(ValueError, AssertionError):  # what is looked at may not be there yet
            if condition():
                return
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def the_run(config: Mlflow) -> Run:
    """The one run of an experiment."""
    client = MlflowClient(config.uri)
    experiment = client.get_experiment_by_name(config.experiment)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return client.get_run(run.info.run_id)


def history(config: Mlflow, key: str) -> list[tuple[int, float]]:
    points = MlflowClient(config.uri).get_metric_history(the_run(config).info.run_id, key)
    return [(point.step, point.value) for point in sorted(points, key=lambda point: point.step)]


def models(config: Mlflow) -> dict[str, LoggedModel]:
    found = MlflowClient(config.uri).search_logged_models([the_run(config).info.experiment_id])
    assert len({model.name for model in found}) == len(found)
    return {model.name: model for model in found}


def outputs(run: Run) -> list[LoggedModelOutput]:
    return [] if run.outputs is None else run.outputs.model_outputs


def write_steps(journal: Journal, steps: range) -> None:
    for step in steps:
        journal.step(step, step * 8, step * 512, None, {"loss": step + journal.branch / 10})


def expected(steps: range, branch: int) -> list[tuple[int, float]]:
    return [(step, step + branch / 10) for step in steps]


def first_attempt(run: Path, steps: range, **facts: object) -> Journal:
    journal = Journal(run, 1)
    journal.attempt(None, 0, "fresh", **facts)
    write_steps(journal, steps)
    return journal


def test_a_run_arrives_whole(place: Place, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = place()
    trackers = start_trackers([config], tmp_path)
    tree = {"name": "tiny", "optim": {"lr_peak": 6e-4, "betas": [0.9, 0.95]}, "fork_from": None}
    data = {"name": "wikipedia", "source": "/shards/wikipedia", "digest": HASH, "tokens": 1000}
    journal = Journal(tmp_path, 1)
    journal.attempt(None, 0, "fresh", config=tree, datasets=[data], world_size=2)
    journal.evaluation(0, 0, {"validation/wikipedia/loss": 9.5})
    write_steps(journal, range(1, 31))
    journal.checkpoint(30, "pending", "checkpoints/step-30.b1", None)
    wait_for(lambda: len(models(config)) == 1)
    assert models(config)["step-30-b1"].status == "PENDING"
    assert the_run(config).info.status == "RUNNING"
    journal.checkpoint(30, "ready", "checkpoints/step-30.b1", HASH)
    journal.evaluation(30, 30 * 512, {"validation/wikipedia/loss": 2.5})
    journal.end(30, 0, "done")
    journal.close()
    assert trackers.close()

    run = the_run(config)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "tiny")
    assert run.data.params == {
        "name": "tiny",
        "optim.lr_peak": "0.0006",
        "optim.betas": "[0.9, 0.95]",
        "fork_from": "null",
    }
    assert history(config, "loss") == expected(range(1, 31), 1)
    assert history(config, "tokens")[-1] == (30, 30 * 512)
    assert history(config, "validation/wikipedia/loss") == [(0, 9.5), (30, 2.5)]
    assert run.data.tags["longhaul.world_size"] == "2"
    assert run.data.tags["longhaul.end"] == "0: done"
    assert run.inputs is not None
    (corpus,) = run.inputs.dataset_inputs
    assert (corpus.dataset.name, corpus.dataset.digest) == ("wikipedia", HASH[:36])
    assert json.loads(corpus.dataset.source) == {"uri": "/shards/wikipedia"}
    assert json.loads(corpus.dataset.profile or "") == {"digest": HASH, "tokens": 1000}
    assert [(tag.key, tag.value) for tag in corpus.tags] == [("mlflow.data.context", "train")]
    model = models(config)["step-30-b1"]
    assert (model.status, model.tags["longhaul.state"]) == ("READY", "ready")
    assert model.params == {"step": "30", "branch": "1", "path": "checkpoints/step-30.b1", "manifest_hash": HASH}
    assert model.source_run_id == run.info.run_id
    assert [(output.model_id, output.step) for output in outputs(run)] == [(model.model_id, 30)]
    client = MlflowClient(config.uri)
    text = Path(client.download_artifacts(run.info.run_id, "run.yaml", str(tmp_path))).read_text()
    assert text.startswith("name: tiny\noptim:\n  lr_peak: 0.0006\n")
    assert capfd.readouterr().out == ""


def test_steps_done_twice_are_recorded_once(place: Place, tmp_path: Path) -> None:
    config = place()
    trackers = Followers([config.build(tmp_path)])
    journal = first_attempt(tmp_path, range(1, 11), config={"lr": 1e-3, "name": "x"})
    journal.checkpoint(5, "ready", "checkpoints/step-5.b1", HASH)
    journal.checkpoint(9, "ready", "checkpoints/step-9.b1", HASH)  # will turn out to be damaged
    journal.checkpoint(10, "pending", "checkpoints/step-10.b1", None)
    assert trackers.close()  # killed here, after everything had been carried
    assert the_run(config).info.status == "RUNNING"

    trackers = Followers([config.build(tmp_path)])
    journal = Journal(tmp_path, 2)
    journal.attempt(1, 5, "resumed", config={"lr": 2e-3, "name": "x", "new": 1})
    write_steps(journal, range(6, 13))
    journal.checkpoint(5, "removed", "checkpoints/step-5.b1", None)
    journal.end(12, 3, "SIGTERM")
    assert trackers.close()

    run = the_run(config)
    assert history(config, "loss") == expected(range(1, 11), 1) + expected(range(11, 13), 2)
    assert run.info.status == "SCHEDULED"  # stopped, and to go on
    assert run.data.params == {"lr": "0.001", "name": "x", "new": "1"}
    assert run.data.tags["changed.lr"] == "0.001 -> 0.002 (b2, from step 5)"
    states = {name: (model.status, model.tags["longhaul.state"]) for name, model in models(config).items()}
    assert states == {
        "step-5-b1": ("UNSPECIFIED", "removed"),
        "step-9-b1": ("READY", "superseded"),
        "step-10-b1": ("FAILED", "failed"),
    }
    assert len(outputs(run)) == 2
    assert run.data.tags["longhaul.end"] == "3: SIGTERM"
    Journal(tmp_path, 3).attempt(2, 12, "resumed")
    sync([config], tmp_path)
    run = the_run(config)
    assert run.info.status == "RUNNING" and "longhaul.end" not in run.data.tags


def test_what_is_carried_late_is_the_live_lineage_only(on_database: Place, tmp_path: Path) -> None:
    first_attempt(tmp_path, range(1, 11)).checkpoint(8, "ready", "checkpoints/step-8.b1", HASH)
    journal = Journal(tmp_path, 2)
    journal.attempt(1, 5, "resumed")
    write_steps(journal, range(6, 9))
    config = on_database()
    (synced,) = sync([config], tmp_path)
    assert (synced.metrics, synced.checkpoints) == (2 * 8, 0)  # loss and tokens
    assert history(config, "loss") == expected(range(1, 6), 1) + expected(range(6, 9), 2)
    assert models(config) == {}
    (synced,) = sync([config], tmp_path)
    assert (synced.metrics, synced.checkpoints) == (0, 0)


def test_a_rollback_is_shown_though_its_branch_is_retired(on_database: Place, tmp_path: Path) -> None:
    text = "2 steps in a row had a gradient that is not finite; back to step 20, samples 240 to 259 skipped"
    first, second = Journal(tmp_path, 1), Journal(tmp_path, 3)
    first.attempt(None, 0, "start")
    first.step(26, 260, 260, None, {"loss": 3.0})
    first.event(26, "rollback", text, to_step=20, begin=240, end=260)
    second.attempt(1, 20, "resume")
    second.step(21, 210, 210, None, {"loss": 2.0})
    config = on_database()
    sync([config], tmp_path)
    assert the_run(config).data.tags["longhaul.rollback.b1.step26"] == text
    assert history(config, "loss") == [(21, 2.0)]


def test_a_server_that_is_down_loses_nothing(line: Line, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = Mlflow(uri=f"http://127.0.0.1:{line.port}", experiment="down", every_seconds=0.05)
    trackers = Followers([config.build(tmp_path)])
    journal = first_attempt(tmp_path, range(1, 6), config={"name": "x"})
    wait_for(lambda: bool(caplog.messages))
    assert caplog.messages[0].startswith(f"MLflow at {config.uri}: MlflowException: API request to ")
    assert caplog.messages[0].endswith("; training goes on and the journal keeps everything; trying again")
    write_steps(journal, range(6, 11))
    line.up()
    wait_for(lambda: len(caplog.messages) > 1)
    assert caplog.messages[1:] == [f"MLflow at {config.uri}: reached again, nothing was lost"]
    line.down()
    write_steps(journal, range(11, 16))
    journal.checkpoint(15, "ready", "checkpoints/step-15.b1", HASH)
    assert not trackers.close(0.3)
    assert caplog.messages[-1] == (
        f"MLflow at {config.uri}: the end of the run has not been carried; "
        "`pretrain track-sync RUN` does it from the journal"
    )
    with pytest.raises(TrackError, match=f"^MLflow at {config.uri}: .*; nothing was lost, try again later$"):
        sync([config], tmp_path)
    line.up()
    sync([config], tmp_path)
    assert history(config, "loss") == expected(range(1, 16), 1)
    assert models(config)["step-15-b1"].status == "READY"


def test_a_lost_answer_doubles_nothing(line: Line, tmp_path: Path) -> None:
    config = Mlflow(uri=f"http://127.0.0.1:{line.port}", experiment="lost answers", every_seconds=0.05)
    line.up()
    trackers = Followers([config.build(tmp_path)])
    line.lose_answers = 2
    journal = first_attempt(tmp_path, range(1, 6), config={"name": "x"})
    journal.checkpoint(5, "ready", "checkpoints/step-5.b1", HASH)
    write_steps(journal, range(6, 11))
    wait_for(lambda: line.lose_answers == 0)
    line.lose_answers = 1
    write_steps(journal, range(11, 16))
    wait_for(lambda: line.lose_answers == 0)
    assert trackers.close()
    assert history(config, "loss") == expected(range(1, 16), 1)
    assert [model.status for model in models(config).values()] == ["READY"]


def test_a_kill_between_sending_and_noting_doubles_nothing(place: Place, tmp_path: Path) -> None:
    """Every note that a kill may leave behind is tried, and none at all: all find what MLflow already has."""
    config = place()
    journal = first_attempt(tmp_path, range(1, 4), config={"name": "x"})
    journal.checkpoint(3, "pending", "checkpoints/step-3.b1", None)
    journal.checkpoint(3, "ready", "checkpoints/step-3.b1", HASH)
    write_steps(journal, range(4, 7))
    tracker = config.build(tmp_path)
    notes: list[bytes | None] = [None]
    while tracker.carry():
        (file,) = (tmp_path / "track").glob("mlflow-*.json")
        notes.append(file.read_bytes())
    assert len(notes) == 6
    for note in notes:
        file.unlink()
        if note is not None:
            file.write_bytes(note)
        (synced,) = sync([config], tmp_path)
        assert synced.metrics == 0
    write_steps(journal, range(7, 9))
    sync([config], tmp_path)
    assert history(config, "loss") == expected(range(1, 9), 1)
    assert [model.status for model in models(config).values()] == ["READY"]
    assert len(outputs(the_run(config))) == 1


def test_a_follower_that_is_killed_loses_and_doubles_nothing(on_database: Place, tmp_path: Path) -> None:
    config = on_database()
    first_attempt(tmp_path, range(1, 3001)).close()
    code = "import sys; from pathlib import Path; from pretrain.track import Mlflow, sync; "
    code += "sync([Mlflow(uri=sys.argv[1], experiment=sys.argv[2])], Path(sys.argv[3]))"
    child = subprocess.Popen([sys.executable, "-c", code, config.uri, config.experiment, str(tmp_path)])
    wait_for(lambda: any(b"loss" in file.read_bytes() for file in (tmp_path / "track").glob("mlflow-*.json")))
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    before = len(history(config, "loss"))
    assert 0 < before < 3000
    (synced,) = sync([config], tmp_path)
    assert history(config, "loss") == expected(range(1, 3001), 1)
    assert synced.metrics == 2 * (3000 - before)


def test_a_metric_that_is_not_finite_is_a_gap_and_a_tag(place: Place, tmp_path: Path) -> None:
    config = place()
    journal = first_attempt(tmp_path, range(1, 3))
    for step, loss in ((3, math.inf), (4, math.nan), (5, -math.inf)):
        journal.step(step, 0, 0, None, {"loss": loss})
    write_steps(journal, range(6, 7))
    sync([config], tmp_path)
    points = history(config, "loss")
    assert [step for step, _ in points] == [1, 2, 3, 4, 5, 6]
    assert [math.isnan(value) for _, value in points] == [False, False, True, True, True, False]
    assert the_run(config).data.tags["nonfinite.loss"] == "inf at step 3, the first"


def test_a_deleted_run_is_restored(place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = place()
    journal = first_attempt(tmp_path, range(1, 3), config={"name": "x"})
    trackers = Followers([config.build(tmp_path)])
    wait_for(lambda: len(history(config, "loss")) == 2)
    run = the_run(config)
    MlflowClient(config.uri).delete_run(run.info.run_id)
    write_steps(journal, range(3, 5))
    assert trackers.close()
    assert the_run(config).info.run_id == run.info.run_id
    assert history(config, "loss") == expected(range(1, 5), 1)
    restored = (
        f"MLflow's run {run.info.run_id} ({config.experiment}) had been deleted; restored, for this run writes to it"
    )
    assert caplog.messages.count(restored) == 1

    MlflowClient(config.uri).delete_experiment(run.info.experiment_id)
    write_steps(journal, range(5, 7))
    sync([config], tmp_path)
    assert history(config, "loss") == expected(range(1, 7), 1)
    restored = f"MLflow's experiment {config.experiment} had been deleted; restored, for this run writes to it"
    assert caplog.messages.count(restored) == 1


def test_a_run_that_is_gone_for_good_is_carried_anew(
    on_database: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = on_database()
    journal = first_attempt(tmp_path, range(1, 5), config={"name": "x"})
    sync([config], tmp_path)
    old = the_run(config).info.run_id
    client = MlflowClient(config.uri)
    client.delete_run(old)
    client._tracking_client.store._hard_delete_run(old)  # as `mlflow gc` does
    write_steps(journal, range(5, 7))
    sync([config], tmp_path)
    assert the_run(config).info.run_id != old
    assert history(config, "loss") == expected(range(1, 7), 1)
    assert the_run(config).data.params == {"name": "x"}
    assert f"MLflow at {config.uri} has no run {old} any more: all of it is carried to a new one" in caplog.messages


def test_what_mlflow_refuses_does_not_hold_up_the_rest(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = place()
    journal = Journal(tmp_path, 1)
    long = "x" * 7000
    tree = {"data": {"a//b": 1, "..": 2, "c$": 3}, "long": long, "name": "x"}
    data = {"name": "wikipedia", "source": "/x" * 40_000, "digest": HASH}  # longer than MLflow's column for it
    journal.attempt(None, 0, "fresh", config=tree, datasets=[data])
    journal.step(1, 8, 512, None, {"loss": 1.0, "a//b": 2.0, "validation/wiki (en)/loss": 3.0})
    journal.step(2, 16, 1024, None, {"loss": 2.0})
    sync([config], tmp_path)
    assert history(config, "loss") == [(1, 1.0), (2, 2.0)]
    assert history(config, "a__b") == [(1, 2.0)]
    assert history(config, "validation/wiki _en_/loss") == [(1, 3.0)]
    params = the_run(config).data.params
    assert params.pop("long") == "x" * 5999 + "…"
    assert params == {"data.a__b": "1", "data...": "2", "data.c_": "3", "name": "x"}
    (warning,) = caplog.messages
    assert warning.startswith("MLflow refuses what the journal says of the attempt at step 0 (branch 1): ")


def test_no_secret_reaches_the_store(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "Planted1")
    shutil.copy(database, tmp_path / "mlflow.db")
    config = Mlflow(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="secrets")
    tree = {"data": {"shards": "s3://me:Planted2@host/x", "hf_token": "Planted3"}, "name": "x"}
    data = {"name": "wikipedia", "source": "https://me:Planted4@host/x", "digest": HASH}
    journal = Journal(tmp_path / "run", 1)
    journal.attempt(None, 0, "fresh", config=tree, datasets=[data])
    journal.end(0, 1, "could not open https://me:Planted5@host/x")
    sync([config], tmp_path / "run")
    assert the_run(config).info.status == "FAILED"
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or b"Planted" not in file.read_bytes(), file


def test_two_processes_take_turns(on_database: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = on_database()
    journal = first_attempt(tmp_path, range(1, 5))
    sync([config], tmp_path)
    write_steps(journal, range(5, 9))
    (lock,) = (tmp_path / "track").glob("*.lock")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        trackers = Followers([config.build(tmp_path)])
        assert not trackers.close(0.3)
        assert [message for message in caplog.messages if "trying again" in message] == []
        assert len(history(config, "loss")) == 4
    sync([config], tmp_path)
    assert history(config, "loss") == expected(range(1, 9), 1)


def test_a_locked_database_is_waited_for(database: Path, tmp_path: Path) -> None:
    shutil.copy(database, tmp_path / "mlflow.db")
    config = Mlflow(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="locked", every_seconds=0.05)
    journal = first_attempt(tmp_path, range(1, 3))
    sync([config], tmp_path)
    other = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    trackers = Followers([config.build(tmp_path)])
    write_steps(journal, range(3, 5))
    assert not trackers.close(0.5)
    other.execute("ROLLBACK")
    other.close()
    wait_for(lambda: not trackers.alive())
    sync([config], tmp_path)
    assert history(config, "loss") == expected(range(1, 5), 1)


def test_nothing_to_follow_is_nothing(tmp_path: Path) -> None:
    assert start_trackers([], tmp_path).close()
    assert Followers([Mlflow(uri=f"sqlite:///{tmp_path}/mlflow.db").build(tmp_path)]).close()
    assert not (tmp_path / "mlflow.db").exists()


class Holder(Section):
    track: list[Mlflow]


def message(**settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build(Holder, {"track": [{"kind": "mlflow", **settings}]}, "run.yaml")
    return str(caught.value)


def test_settings_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = "expected sqlite:///FILE.db, http://HOST:PORT, or the URI of a PostgreSQL or MySQL database"
    assert message(uri="localhost:5000") == f"run.yaml: track.0.uri: {kinds}"
    assert message(uri="file:///tmp/mlruns") == f"run.yaml: track.0.uri: {kinds}"
    secret = message(uri="http://me:Hidden@host:5000")
    assert secret.startswith("run.yaml: track.0.uri: holds a user name or password")
    assert "Hidden" not in secret
    assert message(url="http://host") == "run.yaml: track.0.url: unknown key; did you mean track.0.uri?"


def test_a_relative_database_stays_where_it_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = Mlflow()
    assert config.uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert config.database == tmp_path / "mlflow.db"
    assert config.page() == f"mlflow server --backend-store-uri sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir("/")
    assert Mlflow(uri=config.uri) == config
    assert "uri: sqlite:///" + str(tmp_path) in dump(config)
    assert Mlflow(uri="http://host:5000/").page() == "http://host:5000"


def test_importing_the_package_imports_no_mlflow() -> None:
    code = "import sys, pretrain.track; print('mlflow' in sys.modules, 'pandas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_each_outage_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = Mlflow(uri="http://127.0.0.1:9", every_seconds=0.01)
    trackers = Followers([config.build(tmp_path)])
    first_attempt(tmp_path, range(1, 3))
    with caplog.at_level(logging.INFO):
        wait_for(lambda: bool(caplog.messages))
        time.sleep(0.5)
        assert len([message for message in caplog.messages if "trying again" in message]) == 1
        trackers.close(0)
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"


def test_a_new_database_is_whole_or_absent(tmp_path: Path) -> None:
    """MLflow never recovers from a kill amid the tables that it makes: 'duplicate column name' at every start."""
    config = Mlflow(uri=f"sqlite:///{tmp_path}/mlflow.db")
    code = "import sys; from pretrain.track.mlflow import Mlflow, _client; _client(Mlflow(uri=sys.argv[1]))"
    child = subprocess.Popen([sys.executable, "-c", code, config.uri])
    while not list(tmp_path.iterdir()):
        assert child.poll() is None
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert not (tmp_path / "mlflow.db").exists()
    assert _client(config).create_experiment("x")
