"""MLflow's own page, in a browser, shows a run: its curves, its checkpoints with their metrics, its corpora."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from pretrain.track import Journal, Mlflow, sync

from .test_mlflow import HASH, the_run


def browse(address: str, folder: Path) -> str:
    """The page as it is when its program has come to rest."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium: make debian-packages")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", "--window-size=1600,2000"]
    command = [browser, *flags, "--virtual-time-budget=60000", "--dump-dom", address]
    return subprocess.run(command, capture_output=True, timeout=240, check=True).stdout.decode()


@pytest.fixture(scope="module")
def config(server: int, tmp_path_factory: pytest.TempPathFactory) -> Mlflow:
    """A run that has been carried: 40 steps, two checkpoints, two corpora."""
    run = tmp_path_factory.mktemp("page") / "run"
    config = Mlflow(uri=f"http://127.0.0.1:{server}", experiment="looked at", register_as="looked-at")
    journal = Journal(run, 1)
    data = [
        {"name": name, "source": f"/shards/{name}", "digest": HASH[:30] + name, "tokens": 9}
        for name in ("books", "web")
    ]
    journal.attempt(None, 0, "start", config={"name": "small", "seed": 1}, datasets=data, commit="c0ffee")
    for step in range(1, 41):
        journal.step(step, step, step * 512, None, {"loss": 5 - step / 20, "lr": 1e-3, "tokens_per_s": 1e4})
        if step % 20 == 0:
            path = f"/run/checkpoints/step-{step}.b1"
            journal.checkpoint(step, "pending", path, None)
            journal.checkpoint(step, "ready", path, HASH)
            journal.evaluation(step, step * 512, {"validation/books/loss": 5.5 - step / 20, "validation/web/loss": 4.0})
    journal.end(40, 0, "done")
    sync([config], run)
    return config


def test_the_page_of_a_run_shows_its_metrics_corpora_and_checkpoints(config: Mlflow, tmp_path: Path) -> None:
    info = the_run(config).info
    dom = browse(f"{config.uri}/#/experiments/{info.experiment_id}/runs/{info.run_id}", tmp_path / "browser")
    for shown in ("validation/books/loss", "tokens_per_s", "books", "web", "step-20-b1", "step-40-b1"):
        assert shown in dom, shown
    assert "Finished" in dom


def test_the_page_of_its_curves_draws_them(config: Mlflow, tmp_path: Path) -> None:
    info = the_run(config).info
    address = f"{config.uri}/#/experiments/{info.experiment_id}/runs/{info.run_id}/model-metrics"
    dom = browse(address, tmp_path / "browser")
    assert "validation/books" in dom and ("<canvas" in dom or "scatterlayer" in dom)


def test_the_page_of_checkpoints_compares_them(config: Mlflow, tmp_path: Path) -> None:
    info = the_run(config).info
    dom = browse(f"{config.uri}/#/experiments/{info.experiment_id}/models", tmp_path / "browser")
    assert "step-20-b1" in dom and "step-40-b1" in dom and "validation/books/loss" in dom
