"""A real run on a server whose answers come late, and what MLflow's own pages then show of it, in a real browser."""

from __future__ import annotations

import re
import subprocess
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
    """A run of 20 steps, and what a slow server knew of it when its training was over."""

    folder: Path
    config: Mlflow
    asked: int  # requests that waited for their answer then
    page: str


@pytest.fixture(scope="module")
def tracked(server: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracked]:
    folder = tmp_path_factory.mktemp("page")
    line = Line(server)
    line.up()
    line.answering.clear()
    path = write_run(folder, steps=20)
    uri = f"http://127.0.0.1:{line.port}"
    track = f"[{{kind: mlflow, uri: '{uri}', experiment: page, register_as: page, close_seconds: 0.1}}]"
    evaluation = "evaluation: {every_steps: 5"
    text = (
        path.read_text().replace("evaluation: {every_steps: 1000", evaluation).replace("keep_last: 3", "keep_last: 2")
    )
    path.write_text(f"{text}track: {track}\n")
    started = Started(path)
    assert started.wait() == [0], started.text
    asked = line.requests
    line.answering.set()
    line.delay_s = 0.05  # of each answer, when they come at last
    run = load_run(path)
    (synced,) = sync(run.track, folder / "run")
    yield Tracked(folder, run.track[0], asked, synced.page.replace(uri, f"http://127.0.0.1:{server}"))
    line.down()


def look(page: str, folder: Path) -> str:
    """What a page holds once it has come to rest."""
    command = [browser(), *FLAGS, f"--user-data-dir={folder / 'browser'}", "--dump-dom", page]
    return subprocess.run(command, capture_output=True, timeout=180, check=True).stdout.decode()


def words(dom: str) -> str:
    """What is read on it."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<style.*?</style>", "", dom, flags=re.S)))


def test_training_waits_for_no_answer_and_none_is_lost_or_doubled(tracked: Tracked) -> None:
    """The run had ended before the server gave the first answer; the requests that waited were done all the same."""
    assert tracked.asked >= 1
    known = history(tracked.config, "loss")
    assert known == sorted(losses(tracked.folder, 1).items())
    assert [step for step, _ in history(tracked.config, "train_loss/alpha")] == list(range(1, 21))
    assert [step for step, _ in history(tracked.config, "validation/beta/loss")] == [0, 5, 10, 15, 20]
    states = {name: (model.status, model.tags["longhaul.state"]) for name, model in models(tracked.config).items()}
    assert states == {
        "step-0-b1": ("UNSPECIFIED", "removed"), "step-10-b1": ("READY", "ready"), "step-20-b1": ("READY", "ready"),
    }  # fmt: skip
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
    assert "Finished" in text and "pretrain train" in text and "beta" in text
    assert "optim.lr_peak" in text and "0.003" in text and "validation/alpha/loss" in text
    assert "parameters, 12,800 tokens, 20 steps" in text and "alpha 70 %, beta 30 %" in text
    assert "step-20-b1" in text


def test_a_checkpoint_that_is_there_is_ready_and_one_that_is_gone_is_not(tracked: Tracked) -> None:
    experiment = tracked.page.partition("/runs/")[0]
    text = words(look(f"{experiment}/models?workflowType=machine_learning", tracked.folder))
    assert re.search(r"step-20-b1 Ready .*step-10-b1 Ready .*step-0-b1 (?!Ready)", text), text
    text = words(look(f"{experiment}/runs?workflowType=machine_learning", tracked.folder))
    assert "small" in text and "alpha (" in text
