"""New runs from older ones: forked, with only the weights, from a registry, from Hugging Face's files; and refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pretrain import checkpoint
from pretrain.amend import amend
from pretrain.lineage import Lineage
from pretrain.models.gpt import Gpt
from pretrain.models.hugging_face import theirs_config, to_theirs
from pretrain.models.weights import initialize
from pretrain.run import load_run
from pretrain.trace import trace_document
from tests.runs import TORCH, Started, final_state, losses, run_to_end, write_run, zero

ALL = ("checkpoint.keep_last=99",)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 20 steps with checkpoints at 0, 10, 20; the folder that holds it and its corpora."""
    folder = tmp_path_factory.mktemp("parent")
    run_to_end(write_run(folder, steps=20), 1, *ALL)
    return folder


def child(parent: Path, folder: Path, steps: int = 20, engine: str = TORCH) -> Path:
    """The config of another run over the same corpora."""
    folder.mkdir(exist_ok=True)
    for name in ("alpha", "beta"):
        (folder / name).symlink_to(parent / name)
    return write_run(folder, engine, steps)


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    paths = {path.name.split(".")[0]: path for path in checkpoint.live_checkpoints(folder / "run")}
    return dict(checkpoint.read_weights(checkpoint.open_checkpoint(paths[f"step-{step}"])))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refused(config: Path, *overrides: str) -> str:
    started = Started(config, 1, *overrides)
    assert started.wait() == [2], started.text
    return started.text.splitlines()[-1].removeprefix("pretrain: ")


def test_forked_at_the_parent_s_position_is_the_same_run_to_the_last_bit(parent: Path, tmp_path: Path) -> None:
    config = child(parent, tmp_path)
    fork = (f"fork_from={parent}/run@10", "fork_position=parent", *ALL)
    text = run_to_end(config, 1, *fork)
    assert final_state(tmp_path)[0] == final_state(parent)[0]  # step, samples, tokens, digest
    assert torch.equal(*(final_state(folder)[1]["rank-0-of-1.bin"] for folder in (tmp_path, parent)))
    assert losses(tmp_path, 1) == {step: loss for step, loss in losses(parent, 1).items() if step > 10}
    assert {path.name for path in checkpoint.live_checkpoints(tmp_path / "run")} == {"step-10.b1", "step-20.b1"}
    (branch,) = Lineage(tmp_path / "run").branches().values()
    source = checkpoint.open_checkpoint(parent / "run/checkpoints/step-10.b1")
    assert (branch.parent, branch.step, branch.why) == (None, 10, f"fork from {parent}/run@10")
    assert branch.origin == {
        "kind": "fork", "name": f"{parent}/run@10", "folder": str(source.folder), "hash": source.manifest_hash,
        "step": 10,
    }  # fmt: skip
    first = json.loads((tmp_path / "run/journal/1.jsonl").read_text().splitlines()[0])
    assert (first["step"], first["why"], first["parent_hash"]) == (10, branch.why, source.manifest_hash)
    assert "fork from" not in text.replace(branch.why, "")


def test_a_fork_goes_on_with_itself_and_with_another_course_from_there(parent: Path, tmp_path: Path) -> None:
    """Killed and started again, with the parent gone; and another schedule, batch and weight of a source."""
    own = tmp_path / "own"
    shutil.copytree(parent, own, symlinks=True)
    config = child(own, tmp_path / "child", steps=40, engine=zero(1))
    changed = ("optim.lr_peak=1e-3", "batch_tokens=1280", "data.sources.beta.weight=2",
               "schedule={kind: cosine, warmup_tokens: 1e3}")  # fmt: skip
    fork = (f"fork_from={own}/run@10", "fork_position=parent", *changed, *ALL)
    started = Started(config, 2, *fork)
    started.wait_for_step(12)
    started.kill()
    shutil.rmtree(own / "run")
    text = run_to_end(config, 2, *fork)
    assert "going on from step-10.b1" in text
    position = final_state(tmp_path / "child")[0]
    assert position["samples"] == 10 * 10 + 20 * (position["step"] - 10)  # the parent's batches, then its own
    assert position["tokens"] >= 40 * 640 and position["step"] == 25
    assert refused(config, f"fork_from={parent}/run@20", *changed).startswith(
        f"fork_from: {parent}/run@20, but {tmp_path}/child/run has begun from {own}/run@10; give another run_folder"
    )


def test_a_fresh_fork_has_the_optimizer_and_begins_its_own_order(parent: Path, tmp_path: Path) -> None:
    config = child(parent, tmp_path, steps=10)
    run_to_end(config, 1, f"fork_from={parent}/run@20", "seed=7", *ALL)
    first = checkpoint.open_checkpoint(tmp_path / "run/checkpoints/step-0.b1")
    assert first.position.samples == 0 and first.position.digest == "0" * 32
    theirs, ours = (path / "run/checkpoints" for path in (parent, tmp_path))
    data = [(f / "rank-0-of-1.bin").read_bytes() for f in (theirs / "step-20.b1", ours / "step-0.b1")]
    assert data[0] == data[1]  # masters and moments
    record = json.loads((ours / "step-0.b1/rank-0-of-1.json").read_text())
    assert set(record["steps"].values()) == {20.0}  # the optimizer's own count
    assert min(losses(tmp_path, 1)) == 1


def test_init_takes_the_weights_alone(parent: Path, tmp_path: Path) -> None:
    path = f"{parent}/run/checkpoints/step-20.b1"
    run_to_end(child(parent, tmp_path, steps=2, engine=zero(3)), 2, f"init_from={path}")
    assert same(weights(tmp_path, 0), weights(parent, 20))
    for rank in range(2):
        record = json.loads((tmp_path / f"run/checkpoints/step-0.b1/rank-{rank}-of-2.json").read_text())
        assert set(record["steps"].values()) == {0.0}
    assert Lineage(tmp_path / "run").branches()[1].why == f"init from {path}"


def test_init_from_hugging_face_s_files(parent: Path, tmp_path: Path) -> None:
    gpt = Gpt(layers=2, width=32, heads=2, context=64, vocab_size=509)
    model = gpt.build()
    initialize(model, seed=99)
    folder = tmp_path / "hf"
    folder.mkdir()
    theirs = {name: value.detach().contiguous() for name, value in to_theirs(model.named_parameters())}
    save_file(theirs, folder / "model.safetensors")
    config = child(parent, tmp_path, steps=1)
    (folder / "config.json").write_text(json.dumps({**theirs_config(gpt), "n_layer": 3}))
    assert refused(config, f"init_from={folder}") == (f"{folder}/config.json: is not the run's model: n_layer: 3 -> 2")
    (folder / "config.json").write_text(json.dumps(theirs_config(gpt)))
    run_to_end(config, 1, f"init_from={folder}")
    assert same(weights(tmp_path, 0), {name: value.detach() for name, value in model.named_parameters()})
    assert len(Lineage(tmp_path / "run").branches()[1].origin["hash"]) == 64  # type: ignore[index]


def test_init_from_the_registry(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # where MLflow looks up the source of a version
    client = MlflowClient(uri)
    source = checkpoint.open_checkpoint(parent / "run/checkpoints/step-10.b1")
    model = client.create_logged_model(
        client.create_experiment("x", artifact_location=f"file://{tmp_path}/art"), name="step-10-b1",
        params={"path": str(source.folder), "manifest_hash": source.manifest_hash}, model_type="checkpoint",
    )  # fmt: skip
    client.create_registered_model("small")
    version = client.create_model_version("small", f"models:/{model.model_id}", model_id=model.model_id)
    client.set_registered_model_alias("small", "champion", version.version)
    config = child(parent, tmp_path, steps=1)
    track = f"track=[{{kind: mlflow, uri: '{uri}'}}]"
    assert refused(config, "init_from=models:/small@champion") == (
        "init_from: models:/small@champion: `track` names no MLflow in whose registry to look"
    )
    assert "Registered model alias loser not found" in refused(config, "init_from=models:/small@loser", track)
    run_to_end(config, 1, "init_from=models:/small@champion", track)
    assert same(weights(tmp_path, 0), weights(parent, 10))


class Canary:
    """What a pickle can do."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, (str(self.place), 0o755)


def test_foreign_pickles_are_refused_and_not_run(parent: Path, tmp_path: Path) -> None:
    config = child(parent, tmp_path, steps=10)
    canary, folder = tmp_path / "canary", tmp_path / "step-10.b1"
    folder.mkdir()
    for name in ("mp_rank_00_model_states.pt", "model.safetensors", "pytorch_model.bin", "MANIFEST.json"):
        (folder / name).write_bytes(pickle.dumps(Canary(canary)))
    assert refused(config, f"init_from={folder}") == f"init_from: {folder}: {folder}/MANIFEST.json: not a manifest"
    file = folder / "pytorch_model.bin"
    assert refused(config, f"init_from={file}") == (
        f"init_from: {file}: not a checkpoint of a run; expected RUN@step or its folder"
    )
    (folder / "config.json").write_text(
        json.dumps(theirs_config(Gpt(layers=2, width=32, heads=2, context=64, vocab_size=509)))
    )
    started = Started(config, 1, f"init_from={folder}")
    assert started.wait() == [2] and "damaged, or no safetensors file" in started.text
    (folder / "model.safetensors").unlink()
    assert refused(config, f"init_from={folder}") == (
        f"{folder}/model.safetensors: missing; weights are read from safetensors only, never from pickles (.bin, .pt)"
    )
    run_to_end(config, 1)  # and inside the run folder itself
    shutil.copytree(folder, tmp_path / "run/checkpoints/step-99.b1")
    text = run_to_end(config, 1)
    assert "step-99.b1/MANIFEST.json: not a manifest" in text and "going on from step-10.b1" in text
    assert not canary.exists()
    pickle.loads(file.read_bytes())
    assert canary.exists()  # it would have been seen


def test_what_is_refused(parent: Path, tmp_path: Path) -> None:
    config = child(parent, tmp_path)
    run = f"{parent}/run"
    assert refused(config, f"fork_from={run}@7") == (
        f"fork_from: {run}@7: {run} has no such checkpoint; there are: 0, 10, 20"
    )
    assert refused(config, "init_from=/no/where@7") == ("init_from: /no/where@7: no such run: /no/where does not exist")
    (tmp_path / "empty").mkdir()
    assert refused(config, f"init_from={tmp_path}/empty") == (
        f"init_from: {tmp_path}/empty: neither a run, nor a checkpoint of one: {tmp_path}/empty holds no run.yaml"
    )
    assert refused(config, f"fork_from={run}@10", "model.width=64", "model.layers=3") == (
        f"fork_from: {run}@10: the models differ: model.layers: 2 -> 3; model.width: 32 -> 64"
    )
    assert refused(config, f"fork_from={run}@10", "fork_position=parent", "seed=2") == (
        f"fork_from: {run}@10: the models differ: seed: 1 -> 2"
    )
    assert "fork_position: parent needs fork_from: RUN@step" in refused(config, "fork_position=parent")
    assert "fork_from and init_from: give one of them" in refused(config, "fork_from=a@1", "init_from=b")
    assert "expected RUN@step, models:/NAME@alias or a folder, got an empty name" in refused(config, "init_from=' '")
    assert not (tmp_path / "run/run.yaml").exists()


# --- what was taken down ----------------------------------------------------------------------------------------------


def test_what_a_parent_has_taken_down_is_fed_to_no_child(tmp_path: Path) -> None:
    """Nor to a child's child, also where it was taken down after the checkpoint that it begins from."""
    config = write_run(tmp_path)
    run_to_end(config, 1, "stop_at_step=10")
    (tmp_path / "ids.txt").write_text("\n".join(ids := ["alpha:s0/2", "alpha:s0/3", "beta:s0/11"]))
    amend(config, [f"takedown={tmp_path / 'ids.txt'}"])
    run = f"{tmp_path}/run@10"
    children = {
        "fresh": (run, [f"fork_from={run}"], 0),
        "weights": (run, [f"init_from={run}"], 0),
        "along": (run, [f"fork_from={run}", "fork_position=parent"], 100),
        "grandchild": (f"{tmp_path}/fresh@2", [f"fork_from={tmp_path}/fresh@2", "seed=5"], 0),
    }
    for name, (parent, named, begins) in children.items():
        text = run_to_end(config, 1, *named, f"run_folder={tmp_path / name}", f"stop_at_step={begins // 10 + 2}", *ALL)
        assert f"3 documents of 3 ids taken down in {parent}: are not fed in this run either" in text
        child = load_run(tmp_path / name)
        seen = [s for id in ids for document in trace_document(child, id) for s in document.sightings]
        assert {s.state for s in seen if s.sample >= begins} == {"skipped"}
        run_to_end(config, 1, *named, f"run_folder={tmp_path / name}", f"stop_at_step={begins // 10 + 4}", *ALL)
