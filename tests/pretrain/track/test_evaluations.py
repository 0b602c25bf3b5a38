"""What `pretrain evaluate` found reaches MLflow, linked to the checkpoint, once."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from pretrain.evaluations import Corpus, Score, keep
from pretrain.examination import carry
from pretrain.restore import opened
from pretrain.track import Journal
from pretrain.track.mlflow import carry_evaluations
from tests.pretrain.finished_run import finished
from tests.pretrain.track.conftest import Place


def test_metrics_are_those_of_the_checkpoint(
    on_database: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = on_database()
    run, _ = finished(tmp_path / "run")
    run = run.model_copy(update={"track": (config,)})
    committed = opened(run.run_folder / "checkpoints/step-10.b1")
    assert carry_evaluations(config, run.run_folder) == 0  # MLflow knows no run yet
    journal = Journal(run.run_folder, 1)
    journal.attempt(None, 0, "start")
    journal.checkpoint(10, "ready", str(committed.folder), committed.manifest_hash)
    journal.close()
    scores = [Score("piqa", "0", 0, 9, "p.jsonl", "0" * 64, {"accuracy": 0.5})]
    keep(run, committed, {"alpha": Corpus(1.5, 4.5, 9)}, scores)
    carry(run)
    client = MlflowClient(config.uri)
    experiment = client.get_experiment_by_name(config.experiment)
    assert experiment is not None

    def known() -> dict[str, float]:
        (model,) = client.search_logged_models([experiment.experiment_id])
        assert model.name == "step-10-b1" or model.name == "step-10.b1"
        return {metric.key: metric.value for metric in model.metrics or []}

    assert known()["tasks/piqa/0-shot/accuracy"] == 0.5 and known()["validation/alpha/loss"] == 1.5
    assert carry_evaluations(config, run.run_folder) == 0
    keep(run, committed, {}, [Score("lambada", "few", 3, 9, "l.jsonl", "0" * 64, {"accuracy": 0.25})])
    carry(run)
    assert known()["tasks/lambada/few-shot/accuracy"] == 0.25
    (found,) = client.search_runs([experiment.experiment_id])
    assert len(client.get_metric_history(found.info.run_id, "tasks/piqa/0-shot/accuracy")) == 1
    assert capsys.readouterr().err == ""
