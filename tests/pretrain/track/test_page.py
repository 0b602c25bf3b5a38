"""A real run on a server whose answers come late, and what MLflow's own pages then show of it, in a real browser."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from pretrain.run import load_run
from pretrain.track import Mlflow, sync
from tests.data_pipeline.test_card import browser
from tests.runs import Started, losses, write_run

from .conftest import Line
from .test_mlflow import history, models

# Charts are drawn when they come into view, which takes frames; and the pages ask for what they show once they are up.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1600,3000", "--virtual-time-budget=30000",
    "--run-all-compositor-stages-before-draw", "--enable-begin-frame-control",
)  # fmt: skip
CHARTS = ["train_loss", "validation/alpha", "validation/beta", "Model metrics"]


@dataclass(frozen=True)
class Tracked:
    """A run that was stopped, and carried to a slow server."""

    folder: Path
    config: Mlflow
    steps: int
    page: str


@pytest.fixture(scope="module")
def tracked(server: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracked]:
    """It trains on while a request waits for its answer, and ends; only then does the server answer, and slowly."""
    folder = tmp_path_factory.mktemp("page")
    line = Line(server)
    line.up()
    line.answering.clear()
    path = write_run(folder, steps=20_000)
    uri = f"http://127.0.0.1:{line.port}"
    changed = {
        "evaluation: {every_steps: 1000": "evaluation: {every_steps: 100",
        "save_every_steps: 10, keep_last: 3": "save_every_steps: 100, keep_last: 1",
    }
    text = path.read_text()
    for before, after in changed.items():
        assert before in text
        text = text.replace(before, after)
    track = f"[{{kind: mlflow, uri: '{uri}', experiment: page, register_as: page, close_seconds: 0.1}}]"
    path.write_text(f"{text}track: {track}\n")
    started = Started(path)
    while not line.requests:
        assert started.processes[0].poll() is None, started.text
        time.sleep(0.05)
    begun = max(losses(folder, 1), default=0)
    started.wait_for_step(begun + 150)
    started.signal(signal.SIGTERM)
    assert started.wait() == [3], started.text
    line.answering.set()
    line.delay_s = 0.05  # of each answer
    run = load_run(path)
    (synced,) = sync(run.track, folder / "run")
    steps = max(losses(folder, 1))
    yield Tracked(folder, run.track[0], steps, synced.page.replace(uri, f"http://127.0.0.1:{server}"))
    line.down()


def look(page: str, folder: Path) -> str:
    """What a page holds once it has come to rest."""
    command = [browser(), *FLAGS, f"--user-data-dir={folder / 'browser'}", "--dump-dom", page]
    return subprocess.run(command, capture_output=True, timeout=180, check=True).stdout.decode()


def words(dom: str) -> str:
    """What is read on it."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<style.*?</style>", "", dom, flags=re.S)))


def test_training_waits_for_no_answer_and_none_is_lost_or_doubled(tracked: Tracked) -> None:
    """The request that waited was done all the same, and made again."""
    assert history(tracked.config, "loss") == sorted(losses(tracked.folder, 1).items())
    assert [step for step, _ in history(tracked.config, "train_loss/alpha")] == list(range(1, tracked.steps + 1))
    measured = [step for step, _ in history(tracked.config, "validation/beta/loss")]
    assert measured == list(range(0, tracked.steps + 1, 100))
    found = models(tracked.config)
    states = {name: (model.status, model.tags["longhaul.state"]) for name, model in found.items()}
    (kept,) = (folder.name.replace(".", "-") for folder in (tracked.folder / "run/checkpoints").iterdir())
    assert states.pop(kept) == ("READY", "ready")
    assert len(states) >= 2 and set(states.values()) == {("UNSPECIFIED", "removed")}
    experiment = MlflowClient(tracked.config.uri).get_experiment_by_name("page")
    assert experiment is not None and experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_the_curves_are_drawn(tracked: Tracked) -> None:
    page, _, mode = tracked.page.partition("?")
    dom = look(f"{page}/model-metrics?{mode}", tracked.folder)
    places = [words(dom).find(f"{group} (") for group in CHARTS]
    assert -1 not in places and places == sorted(places)
    assert dom.count("js-plotly-plot") >= 10 and dom.count('class="js-line') >= 10


def test_the_run_names_its_corpora_its_settings_and_its_checkpoints(tracked: Tracked) -> None:
    text = words(look(tracked.page, tracked.folder))
    assert "Scheduled" in text and "pretrain train" in text and "beta" in text
    assert "optim.lr_peak" in text and "0.003" in text and "validation/alpha/loss" in text
    assert "parameters, 12,800,000 tokens, 20,000 steps" in text and "alpha 70 %, beta 30 %" in text
    assert f"step-{tracked.steps}-b1" in text


def test_a_checkpoint_that_is_there_is_ready_and_one_that_is_gone_is_not(tracked: Tracked) -> None:
    experiment = tracked.page.partition("/runs/")[0]
    text = words(look(f"{experiment}/models?workflowType=machine_learning", tracked.folder))
    assert re.search(rf"step-{tracked.steps}-b1 Ready .*step-100-b1 (?!Ready).*step-0-b1 (?!Ready)", text), text
    text = words(look(f"{experiment}/runs?workflowType=machine_learning", tracked.folder))
    assert "small" in text and "alpha (" in text
