"""Checkpoints in MLflow: their metrics, the registry's aliases, where they come from, and when each is READY."""

from __future__ import annotations

import json
import logging
import subprocess
import threading
import time
from pathlib import Path

import pytest
from mlflow.entities import LoggedModel
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pretrain.track import Journal, Mlflow, sync
from pretrain.track.follower import Followers
from pretrain.track.mlflow import find_model
from pretrain.track.source import read_source
from pretrain.track.system import SystemMetrics
from tests.disks import fill, small_disk

from .conftest import Line, Place
from .test_mlflow import HASH, expected, first_attempt, history, models, outputs, the_run, wait_for, write_steps


def save(journal: Journal, step: int, loss: float | None = None, early: bool = False) -> None:
    """A checkpoint, and the evaluation of its step after it, or before."""
    path = f"/run/checkpoints/step-{step}.b{journal.branch}"
    if early and loss is not None:
        journal.evaluation(step, step * 512, {"validation/wikipedia/loss": loss, "validation/books/loss": 9 - loss})
    journal.checkpoint(step, "pending", path, None)
    journal.checkpoint(step, "ready", path, HASH)
    if not early and loss is not None:
        journal.evaluation(step, step * 512, {"validation/wikipedia/loss": loss, "validation/books/loss": 9 - loss})


def measured(model: LoggedModel) -> dict[str, tuple[int, float]]:
    return {metric.key: (metric.step, metric.value) for metric in model.metrics or []}


def alias(config: Mlflow, name: str) -> str:
    path, digest = find_model(config, f"models:/{config.register_as}@{name}")
    assert digest == HASH
    return path.name


def test_a_checkpoint_has_the_metrics_of_its_step(place: Place, tmp_path: Path) -> None:
    config = place()
    journal = first_attempt(tmp_path, range(1, 6), config={"name": "x"})
    save(journal, 5, loss=4.0)
    write_steps(journal, range(6, 9))
    save(journal, 8, loss=3.5, early=True)
    write_steps(journal, range(9, 10))
    save(journal, 9)
    for _ in range(2):  # and carried anew it is the same
        sync([config], tmp_path)
        found = {name: measured(model) for name, model in models(config).items()}
        assert found["step-5-b1"]["validation/wikipedia/loss"] == (5, 4.0)
        assert found["step-5-b1"]["loss"] == (5, 5.1)
        assert found["step-8-b1"]["validation/books/loss"] == (8, 5.5)
        assert found["step-9-b1"]["loss"] == (9, 9.1) and "validation/books/loss" not in found["step-9-b1"]
        assert history(config, "validation/wikipedia/loss") == [(5, 4.0), (8, 3.5)]
        assert history(config, "loss") == expected(range(1, 10), 1)
        for file in (tmp_path / "track").glob("*.json"):
            file.unlink()


def test_the_aliases_follow_the_checkpoints_that_are_there(place: Place, tmp_path: Path) -> None:
    config = place(register_as=f"gpt {len(str(place().uri))}", best_by="validation/wikipedia/loss")
    journal = first_attempt(tmp_path / "a", range(1, 4), config={"name": "x"})
    for step, loss in ((1, 4.0), (2, 3.0), (3, 3.5)):
        save(journal, step, loss)
        sync([config], tmp_path / "a")
        assert alias(config, "latest") == f"step-{step}.b1"
    assert alias(config, "best") == "step-2.b1"
    journal.checkpoint(2, "removed", "/run/checkpoints/step-2.b1", None)
    sync([config], tmp_path / "a")
    assert alias(config, "best") == "step-3.b1"  # of those that are there
    client = MlflowClient(config.uri)
    marks = {
        version.tags["step"]: (version.tags.get("longhaul.state"), version.description)
        for version in client.search_model_versions(f"name = '{config.register_as}'")
    }
    assert marks["1"][0] is None and marks["3"][0] is None and marks["2"][0] == "removed"
    assert str(marks["2"][1]).startswith("Removed by retention at 20")
    assert str(marks["2"][1]).endswith(" UTC: /run/checkpoints/step-2.b1 is gone.")

    resumed = Journal(tmp_path / "a", 2)
    resumed.attempt(1, 1, "resumed")
    sync([config], tmp_path / "a")
    assert (alias(config, "latest"), alias(config, "best")) == ("step-1.b1", "step-1.b1")

    other = first_attempt(tmp_path / "b", range(1, 2), config={"name": "y"})
    save(other, 1, loss=4.5)
    sync([config], tmp_path / "b")
    assert alias(config, "best") == "step-1.b1" and alias(config, "latest") == "step-1.b1"
    best = MlflowClient(config.uri).get_model_version_by_alias(str(config.register_as), "best")
    newest = MlflowClient(config.uri).get_model_version_by_alias(str(config.register_as), "newest")
    assert best.run_id != newest.run_id  # a worse one of another run is the latest, and not the best
    (version,) = json.loads(models_of(config, newest.tags["longhaul.model_id"]).tags["mlflow.modelVersions"])
    assert version == {"name": config.register_as, "version": int(newest.version)}


def models_of(config: Mlflow, model_id: str | None) -> LoggedModel:
    return MlflowClient(config.uri).get_logged_model(str(model_id))


def test_best_is_by_the_mean_where_nothing_is_named(on_database: Place, tmp_path: Path) -> None:
    config = on_database(register_as="by mean")
    journal = first_attempt(tmp_path, range(1, 3), config={"name": "x"})
    for step, loss in ((1, 2.0), (2, 1.0)):
        path = f"/run/checkpoints/step-{step}.b1"
        journal.checkpoint(step, "ready", path, HASH)
        journal.evaluation(step, step, {"validation/a/loss": loss, "validation/b/loss": 2.0 + (3 if step == 2 else 0)})
    sync([config], tmp_path)
    assert (alias(config, "latest"), alias(config, "best")) == ("step-2.b1", "step-1.b1")


def test_where_a_run_comes_from_is_there(on_database: Place, tmp_path: Path) -> None:
    shards = tmp_path / "shards" / "wikipedia"
    shards.mkdir(parents=True)
    (shards.parent / "card.html").write_text("<p>a card, from s3://me:Planted@host/x</p>")
    run = tmp_path / "run"
    (run / "code").mkdir(parents=True)
    (run / "code" / "1.diff").write_text("+ changed")
    checkpoint = run / "checkpoints" / "step-2.b1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "MANIFEST.json").write_text('{"step": 2}')
    journal = Journal(run, 1)
    data = {"name": "wikipedia", "source": str(shards), "digest": HASH, "tokens": 9}
    facts = {"commit": "c0ffee", "tokenizer": "70ken", "parent_checkpoint": "/other/checkpoints/step-9.b1"}
    journal.attempt(None, 0, "init", config={"name": "x"}, datasets=[data], **facts)
    for step in (1, 2):
        journal.step(step, step, step, None, {"loss": 1.0}, {"train": 1.0})
    journal.checkpoint(2, "ready", str(checkpoint), HASH)
    config = on_database()
    sync([config], run)
    found, client = the_run(config), MlflowClient(config.uri)
    assert found.data.tags["mlflow.source.git.commit"] == found.data.tags["longhaul.commit"] == "c0ffee"
    assert found.data.tags["longhaul.tokenizer"] == "70ken"
    assert found.data.tags["longhaul.parent_checkpoint"] == "/other/checkpoints/step-9.b1"
    for name, text in (("code/b1.diff", "+ changed"), ("corpora/wikipedia/card.html", "<p>a card, from s3://***@host")):
        assert Path(client.download_artifacts(found.info.run_id, name, str(tmp_path))).read_text().startswith(text)
    assert found.inputs is not None and found.inputs.dataset_inputs[0].dataset.digest == HASH[:36]
    ((_, goodput),) = history(config, "goodput")
    assert 0 <= goodput <= 1
    location = models(config)["step-2-b1"].artifact_location
    assert (Path(location.removeprefix("file://").replace("%20", " ").replace("%27", "'")) / "MANIFEST.json").is_file()


def test_this_code_is_named() -> None:
    found = read_source()
    assert found is None or len(found.commit) == 40
    assert read_source(Path(__file__).parent) is None


def test_a_change_is_in_the_diff_and_a_credential_is_not(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x", *arguments]
        subprocess.run(command, check=True, capture_output=True)

    git("init")
    (tmp_path / "a.py").write_text("one\n")
    git("add", "a.py")
    git("commit", "-m", "one")
    clean = read_source(tmp_path)
    assert clean is not None and clean.diff == ""
    (tmp_path / "a.py").write_text("uri = 'https://me:Planted@host/x'\n")
    changed = read_source(tmp_path)
    assert changed is not None and changed.commit == clean.commit
    assert "+uri = 'https://***@host/x'" in changed.diff and "Planted" not in changed.diff


def test_nodes_are_measured_and_carried_once(on_database: Place, tmp_path: Path) -> None:
    config = on_database()
    journal = first_attempt(tmp_path, range(1, 3), config={"name": "x"})
    at = iter(range(1, 10**6))
    measured = SystemMetrics(tmp_path, 1, 0.01, lambda: next(at))
    wait_for(lambda: measured.path.is_file() and len(measured.path.read_text().splitlines()) >= 5)
    measured.close()
    lines = measured.path.read_text().splitlines()
    other = tmp_path / "system" / "1.other-node.jsonl"
    other.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    sync([config], tmp_path)
    host = measured.path.name.removeprefix("1.").removesuffix(".jsonl")
    assert [step for step, _ in history(config, f"system/{host}/memory_gib")] == list(range(1, len(lines) + 1))
    points = history(config, "system/other-node/cpu_percent")
    assert [step for step, _ in points] == [1, 2, 3] and all(0 <= value <= 100 for _, value in points)
    other.write_text("\n".join(lines[:4]) + "\n")
    resumed = Journal(tmp_path, 2)
    resumed.attempt(1, 2, "resumed")
    (tmp_path / "system" / "2.other-node.jsonl").write_text(lines[2].replace('"branch": 1', '"branch": 2') + "\n")
    sync([config], tmp_path)  # step 4 of a branch that step 2 was left at is superseded, and step 3 was carried
    assert [step for step, _ in history(config, "system/other-node/cpu_percent")] == [1, 2, 3]
    write_steps(journal, range(3, 4))


@pytest.mark.parametrize("answers", [[500] * 3, [401] * 3, [429] * 3, [503, 401, 500, 429]], ids=str)
def test_a_server_that_answers_with_errors_loses_nothing(
    line: Line, tmp_path: Path, answers: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    config = Mlflow(uri=f"http://127.0.0.1:{line.port}", experiment=f"errors {answers}", every_seconds=0.05)
    line.up()
    trackers = Followers([config.build(tmp_path)])
    journal = first_attempt(tmp_path, range(1, 6), config={"name": "x"})
    wait_for(lambda: len(history(config, "loss")) == 5)
    line.answers = list(answers)
    write_steps(journal, range(6, 11))
    save(journal, 10)
    wait_for(lambda: not line.answers)
    assert trackers.close()
    assert history(config, "loss") == expected(range(1, 11), 1)
    assert models(config)["step-10-b1"].status == "READY"
    assert len([text for text in caplog.messages if "trying again" in text]) == 1


def test_a_server_that_is_slow_holds_up_nobody(line: Line, tmp_path: Path) -> None:
    """Answers come late: the writer of the journal waits for none, and each point is there once."""
    config = Mlflow(uri=f"http://127.0.0.1:{line.port}", experiment="slow", every_seconds=0.05)
    line.up()
    line.delay_s = 1.0
    trackers = Followers([config.build(tmp_path)])
    begun = time.monotonic()
    journal = first_attempt(tmp_path, range(1, 200), config={"name": "x"})
    assert line.requests <= 3 and time.monotonic() - begun < 60
    save(journal, 199)
    wait_for(lambda: line.requests > 3)
    line.delay_s = 0.0
    assert trackers.close(60)
    assert history(config, "loss") == expected(range(1, 200), 1)


def test_whichever_request_breaks_no_checkpoint_is_ready_too_early(line: Line, tmp_path: Path) -> None:
    """The n-th request of carrying a checkpoint and all after it are cut off, for every n; then the rest is carried."""
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-2.b1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "MANIFEST.json").write_text("{}")
    for n in range(1, 60, 4):
        line.down()
        line.up()
        config = Mlflow(uri=f"http://127.0.0.1:{line.port}", experiment=f"breaks at {n}", register_as=f"broken {n}")
        journal = first_attempt(tmp_path / f"run {n}", range(1, 3))
        line.break_at = None
        sync([config], journal.path.parents[1])
        journal.checkpoint(2, "pending", str(checkpoint), None)
        journal.checkpoint(2, "ready", str(checkpoint), HASH)
        line.requests, line.break_at = 0, n
        tracker, broken = config.build(journal.path.parents[1]), False
        try:
            while tracker.carry():
                pass
        except MlflowException:
            broken = True
        line.break_at = None
        for model in models(config).values():
            assert model.status == "PENDING" or "manifest_hash" in model.params, n
        sync([config], journal.path.parents[1])
        (model,) = models(config).values()
        assert (model.status, model.tags["longhaul.state"]) == ("READY", "ready"), n
        assert len(outputs(the_run(config))) == 1, n
        assert find_model(config, f"models:/broken {n}@latest") == (checkpoint, HASH)
        if not broken:
            assert n > 10
            return
    raise AssertionError("a request was cut off every time")


def test_a_full_disk_under_the_database_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(tmp_path / "disk", "size=6m") as disk:
        config = Mlflow(uri=f"sqlite:///{disk}/mlflow.db", experiment="full", every_seconds=0.05)
        journal = first_attempt(tmp_path / "run", range(1, 4), config={"name": "x"})
        sync([config], tmp_path / "run")
        filler = fill(disk, leave=8192)
        trackers = Followers([config.build(tmp_path / "run")])
        write_steps(journal, range(4, 3000))
        with caplog.at_level(logging.WARNING):
            wait_for(lambda: any("trying again" in text for text in caplog.messages))
        filler.unlink()
        assert trackers.close(60)
        assert history(config, "loss") == expected(range(1, 3000), 1)
        MlflowClient(config.uri)._tracking_client.store._dispose_engine()


def test_threads_are_gone(tmp_path: Path) -> None:
    measured = SystemMetrics(tmp_path, 1, 60.0, lambda: 0)
    measured.close()
    assert not any(thread.name == "system metrics" for thread in threading.enumerate())
