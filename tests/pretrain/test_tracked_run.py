"""A real run, tracked in MLflow: what arrives there, what begins from its best checkpoint, and what must be nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient

from pretrain import checkpoint, report
from pretrain.models.weights import fill
from pretrain.parent import find_parent, read_values
from pretrain.run import load_run
from pretrain.start import examine
from pretrain.track import sync
from pretrain.track.mlflow import find_model
from tests.runs import Started, write_run

SECRETS = {"WANDB_API_KEY": "Planted1", "AWS_SECRET_ACCESS_KEY": "Planted2", "MLFLOW_TRACKING_PASSWORD": "Planted3"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The config of a run of 20 steps, made with secrets in its environment."""
    folder = tmp_path_factory.mktemp("tracked")
    path = write_run(folder, steps=20)
    track = f"[{{kind: mlflow, uri: 'sqlite:///{folder}/mlflow.db', register_as: small, system_every_seconds: 0.05}}]"
    text = path.read_text().replace("evaluation: {every_steps: 1000", "evaluation: {every_steps: 10")
    path.write_text(f"{text}track: {track}\n")
    started = Started(path, variables=SECRETS)
    assert started.wait() == [0], started.text
    sync(load_run(path).track, folder / "run")
    yield path


def test_mlflow_has_all_of_it(config: Path) -> None:
    tracker = load_run(config).track[0]
    client = MlflowClient(tracker.uri)
    experiment = client.get_experiment_by_name("longhaul")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    metrics = run.data.metrics
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "data_wait", "memory_gib", "goodput", "validation/alpha/loss",
            "validation/beta/loss"} <= metrics.keys()  # fmt: skip
    assert 0.01 < metrics["memory_gib"] < 100
    assert any(key.startswith("system/") and key.endswith("/cpu_percent") for key in metrics)
    assert run.data.tags["longhaul.tokenizer"] == "0" * 64 and run.data.tags["longhaul.python"].startswith("3.")
    assert run.inputs is not None and len(run.inputs.dataset_inputs) == 2
    models = {model.name: model for model in client.search_logged_models([experiment.experiment_id])}
    assert {"step-0-b1", "step-10-b1", "step-20-b1"} == models.keys()
    for name, step in (("step-10-b1", 10), ("step-20-b1", 20)):
        found = {metric.key: metric for metric in models[name].metrics or []}
        assert found["validation/alpha/loss"].step == step and found["loss"].step == step


def test_a_new_run_begins_from_the_best_checkpoint(config: Path) -> None:
    new = load_run(config, ["init_from=models:/small@best", f"run_folder={config.parent}/new", "name=new"])
    parent = find_parent(new)
    assert parent is not None and parent.kind == "init" and examine(new).fresh
    losses = {}
    for folder in checkpoint.live_checkpoints(config.parent / "run"):
        told = report.read(config.parent / "run").at_step.get(int(folder.name[5:].partition(".")[0]), {})
        losses[folder] = told["validation/alpha/loss"] + told["validation/beta/loss"]
    best = min(losses, key=lambda folder: losses[folder])
    assert parent.folder == best
    assert find_model(new.track[0], "models:/small@latest")[0].name == "step-20.b1"
    model = new.model.build()
    fill(model.named_parameters(), read_values(new, parent))
    weights = dict(checkpoint.read_weights(checkpoint.open_checkpoint(best)))
    assert weights and all(torch.equal(value, weights[name]) for name, value in model.named_parameters())


def test_a_secret_of_the_environment_is_nowhere(config: Path) -> None:
    report.make([load_run(config)], config.parent / "out")
    looked_at = [path for path in config.parent.rglob("*") if path.is_file()]
    assert {"mlflow.db", "report.html", "MANIFEST.json", "1.jsonl"} <= {path.name for path in looked_at}
    assert any(path.suffix == ".log" for path in looked_at)
    for path in looked_at:
        assert b"Planted" not in path.read_bytes(), path
