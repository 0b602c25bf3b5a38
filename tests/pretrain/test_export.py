"""Exports: what transformers makes of them, the way back, and what is refused."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs import ConfigError
from pretrain import export as exporting
from pretrain.checkpoint import SaveError
from pretrain.evaluations import Score, keep
from pretrain.export import Exported, compare, export
from pretrain.generate import Sampling, sample
from pretrain.models.gpt import GPT
from pretrain.models.hugging_face import read_folder
from pretrain.models.weights import fill
from pretrain.parent import find_parent, read_values
from pretrain.restore import opened
from pretrain.run import TrainRun
from pretrain.track import Journal
from tests.pretrain.finished_run import SHAPES, begin, commit, finished, values, write_config

transformers = pytest.importorskip("transformers")

Made = tuple[TrainRun, GPT, Path, Exported]


@pytest.fixture(scope="module", params=SHAPES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A run of each kind, its model, the export of it, in files of 40 kB, and what was said of it."""
    folder = tmp_path_factory.mktemp(request.param)
    run, model = finished(folder, request.param)
    done = export(str(run.run_folder), folder / "out", file_bytes=40_000)
    return run, model, folder / "out", done


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainRun, GPT]:
    return finished(tmp_path_factory.mktemp("run"))


def rows(run: TrainRun, length: int) -> torch.Tensor:
    return torch.randint(run.model.vocab_size, (3, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_transformers_computes_the_same_logits(made: Made) -> None:
    run, model, out, _ = made
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    tokens = rows(run, run.model.context)
    seen = run.model.band or run.model.context
    torch.testing.assert_close(theirs(tokens).logits[:, :seen], model(tokens)[:, :seen], rtol=0, atol=2e-4)
    assert theirs.dtype == torch.float32


def test_what_is_only_an_approximation_says_so(made: Made) -> None:
    run, model, out, done = made
    card = (out / "README.md").read_text()
    config = json.loads((out / "config.json").read_text())["longhaul"]
    if run.model.band is None:
        assert done.approximation is None and "approximation" not in card
        assert config["attention"] == ["dense"]
        return
    assert (config["attention"], config["band"]) == (["dense", "banded"], 8)
    assert done.approximation is not None and done.approximation in card
    assert compare(out, model, run.model.band) < 1e-3 < compare(out, model, run.model.context)


def test_transformers_has_the_tokenizer_and_goes_on_as_we_do(made: Made) -> None:
    run, model, out, _ = made
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    text = "the river was\n  deep and 42 Ünder  shores"
    from pretrain.restore import run_tokenizer

    ids = run_tokenizer(run).encode_batch([text])[0].tolist()
    assert tokenizer(text)["input_ids"] == ids and tokenizer.decode(ids) == text
    end = tokenizer.eos_token_id
    assert (end, tokenizer.pad_token_id) == (run_tokenizer(run).end_of_text, end)
    assert tokenizer.model_max_length == run.model.context
    prompt = [end, *ids][: (run.model.band or 99) - 5]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    written = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=5)[0].tolist()
    assert written[len(prompt) :] == list(sample(model, prompt, Sampling(temperature=0, max_tokens=5)))


def test_a_run_begins_from_it_with_the_same_weights(made: Made, tmp_path: Path) -> None:
    run, model, out, _ = made
    other = run.model_copy(update={"run_folder": tmp_path / "run", "init_from": str(out)})
    parent = find_parent(other)
    assert parent is not None and parent.step is None
    begun = run.model.build()
    fill(begun.named_parameters(), read_values(other, parent))
    for (name, value), wanted in zip(begun.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(value, wanted), name
    for update, said in (
        ({"context": 32}, "n_positions: 64 -> 32"),
        ({"attention": ("banded",), "band": 4}, "attention"),
    ):
        with pytest.raises(ConfigError, match=r"is not the run's model: .*" + said):
            find_parent(other.model_copy(update={"model": run.model.model_copy(update=update)}))


def test_no_file_is_larger_than_asked_for(made: Made) -> None:
    _, model, out, done = made
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 3 and files == sorted(set(index["weight_map"].values()))
    assert re.fullmatch(r"model-00001-of-000\d\d\.safetensors", files[0])
    sizes = {name: sum(t.numel() * 4 for t in load_file(out / name).values()) for name in files}
    biggest = max(p.numel() * 4 for p in model.parameters())
    assert all(size <= max(40_000, biggest) for size in sizes.values())
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    assert done.files == len(list(out.iterdir())) and not done.was_there
    modes = {path.stat().st_mode for path in out.iterdir() if path.suffix != ".json" or path.name == "config.json"}
    assert len(modes) == 1


def test_the_same_once_more_is_nothing_to_do(made: Made) -> None:
    run, _, out, _ = made
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert export(str(run.run_folder), out).was_there
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    for other in ({"precision": "bf16"}, {}):
        where = out if other else out.parent
        with pytest.raises(ConfigError) as error:
            export(str(run.run_folder), where, **other)  # type: ignore[arg-type]
        assert str(error.value) == f"{where}: exists and holds something else; give another folder, or remove it"


def test_bf16_halves_it_and_the_comparison_is_with_weights_so_rounded(
    gpt2: tuple[TrainRun, GPT], tmp_path: Path
) -> None:
    run, _ = gpt2
    done = export(f"{run.run_folder}@10", tmp_path / "out", "bf16", check=True)
    assert done.difference is not None and done.difference < 2e-4
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert f"at most {done.difference:.1e}" in (tmp_path / "out/README.md").read_text()
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_one_that_computes_something_else_is_not_published(
    gpt2: tuple[TrainRun, GPT], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = exporting._write

    def spoiling(folder: Path, *more: Any) -> None:
        write(folder, *more)
        tensors = load_file(folder / "model.safetensors")
        tensors["transformer.ln_f.weight"] *= 1.01
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(exporting, "_write", spoiling)
    with pytest.raises(SaveError, match=r"^transformers computes other logits, by up to \S+: not written$"):
        export(str(gpt2[0].run_folder), tmp_path / "out", check=True)
    assert list(tmp_path.iterdir()) == []


def test_it_appears_whole_and_what_a_kill_left_is_made_over(gpt2: tuple[TrainRun, GPT], tmp_path: Path) -> None:
    left = tmp_path / ".out.tmp"
    left.mkdir()
    (left / "model-00001-of-00009.safetensors").write_bytes(b"half")
    export(str(gpt2[0].run_folder), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_two_at_once_do_not_mix(gpt2: tuple[TrainRun, GPT], tmp_path: Path) -> None:
    (tmp_path / ".out.tmp").mkdir()
    other = os.open(tmp_path / ".out.tmp", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match=r"out: another export is being written there; wait for it$"):
        export(str(gpt2[0].run_folder), tmp_path / "out")
    os.close(other)


def test_damaged_weights_are_not_exported(tmp_path: Path) -> None:
    run, _ = finished(tmp_path / "run")
    folder = run.run_folder / "checkpoints/step-10.b1"
    data = bytearray((folder / "rank-1-of-2.bin").read_bytes())
    data[40] ^= 1
    (folder / "rank-1-of-2.bin").write_bytes(data)
    with pytest.raises(ConfigError, match=r"rank-1-of-2\.bin.*; give RUN@step of another checkpoint$"):
        export(str(run.run_folder), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_full_disk_is_one_line(gpt2: tuple[TrainRun, GPT], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.disk.shortage", lambda folder, needs, files: f"disk full at {folder}: needs {needs}")
    with pytest.raises(SaveError, match=r"^disk full at .*out\.tmp: needs \d+: out not written$"):
        export(str(gpt2[0].run_folder), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("gpt2", {"bias": "false"}, "model.bias: Hugging Face's GPT-2 always has biases, got false"),
        ("gpt1", {"mlp_ratio": "2"}, "model.mlp_ratio: Hugging Face's GPT-1 always has 4, got 2"),
    ],
)
def test_what_has_no_counterpart_is_refused(name: str, shape: dict[str, str], said: str, tmp_path: Path) -> None:
    run, _ = finished(tmp_path / "run", name, *(f"model.{k}={v}" for k, v in shape.items()))
    with pytest.raises(ConfigError) as error:
        export(str(run.run_folder), tmp_path / "out")
    assert str(error.value) == f"{run.run_folder}: {said}"


def test_the_card_says_where_it_comes_from(tmp_path: Path) -> None:
    run, _ = finished(tmp_path / "run")
    committed = opened(run.run_folder / "checkpoints/step-10.b1")
    journal = Journal(run.run_folder, 1)
    journal.attempt(None, 0, "start")
    for step in range(0, 60, 2):
        journal.evaluation(step, 64 * step, {"validation/alpha/loss": 5 - step / 100})
    journal.close()
    keep(run, committed, {}, [Score("lambada", "few", 7, 200, "l.jsonl", "0" * 64, {"accuracy": 0.25})])
    export(str(run.run_folder), tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert committed.manifest_hash in card and "branch 1 | from step 0: start" in card
    assert "| 10 | 640 | 4.9000 |" in card and "| 12 | 768" not in card  # nothing that came after it
    assert re.search(r"lambada few-shot \(7\) accuracy +25\.0 ± 3\.1 %", card)
    assert "| alpha | 100.0% |" in card and "lr_peak: 0.001" in card
    assert dataclasses.asdict(committed.position)["digest"] in card


def test_another_tokenizer_is_refused_as_a_start(gpt2: tuple[TrainRun, GPT], tmp_path: Path) -> None:
    export(str(gpt2[0].run_folder), tmp_path / "out")
    config = tmp_path / "out/config.json"
    config.write_text(config.read_text().replace('"tokenizer_sha256": "', '"tokenizer_sha256": "feed'))
    run = write_config(tmp_path / "other", "gpt2", f"init_from={tmp_path / 'out'}")
    with pytest.raises(ConfigError, match=r"the models differ: tokenizer: feed\w{8} -> \w{12}$"):
        find_parent(run)


def test_any_checkpoint_of_the_run(tmp_path: Path) -> None:
    run, model = finished(tmp_path / "run")
    newer = values(run, seed=8)
    commit(run, newer, 20, ranks=3)
    for name, wanted in ((f"{run.run_folder}@10", model), (str(run.run_folder), newer)):
        out = tmp_path / ("old" if "@" in name else "new")
        export(name, out)
        back = run.model.build()
        fill(back.named_parameters(), read_folder(out, run.model))
        assert all(torch.equal(a, b) for a, b in zip(back.parameters(), wanted.parameters(), strict=True))
    with pytest.raises(ConfigError, match=r"run: no checkpoint of step 15; there are: 10, 20$"):
        export(f"{run.run_folder}@15", tmp_path / "none")


MEASURED = """
import re, sys
from pathlib import Path
from pretrain.export import export

small, large, out, file_bytes = *sys.argv[1:4], int(sys.argv[4])
Path(out).mkdir()
export(small, Path(out) / "small")  # all is imported now
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

def held(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = held("VmRSS")
done = export(large, Path(out) / "large", file_bytes=file_bytes)
print(done.files, done.bytes, held("VmHWM") - before)
"""


def test_memory_holds_a_file_and_not_the_model(gpt2: tuple[TrainRun, GPT], tmp_path: Path) -> None:
    """151 MB of weights, the largest matrix 4 MiB, files of 8 MiB: held are a file, once more as it is written, and a
    few copies of one matrix."""
    file_bytes, matrix, whole = 8 * 2**20, 4 * 2**20, 150_000_000
    run = write_config(tmp_path / "large", "gpt1", "model.layers=12", "model.width=512", "model.heads=8")
    begin(run)
    commit(run, values(run, seed=7), 10, 1, ("fp32",))
    arguments = [str(gpt2[0].run_folder), str(run.run_folder), str(tmp_path / "out"), str(file_bytes)]
    done = subprocess.run([sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files, size, peak = map(int, done.stdout.split())
    assert files > 15 and size > whole
    assert peak < 2 * file_bytes + 8 * matrix < whole / 2, done.stdout
