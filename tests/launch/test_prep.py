"""The jobs of a preparation, on a machine without SLURM; what a real SLURM makes of them is in tests/cluster."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import configs
from data_pipeline.preparation import Preparation
from launch import prep, queue
from launch.slurm import Slurm
from tests.processes import HERE as ROOT

CONFIG = {
    "name": "small",
    "out": "out",
    "tokenizer": {"kind": "train", "vocab_size": 300},
    "corpora": {"mine": {"kind": "text_files", "paths": ["*.jsonl"]}},
    "validation": {"fraction": 0.5},
    "slice_bytes": 500,
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a small corpus and small.yaml, and no SLURM."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    rows = (json.dumps({"text": f"sentence {i} of a small corpus"}) + "\n" for i in range(40))
    (tmp_path / "a.jsonl").write_text("".join(rows))
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.cli", "prep", "small.yaml", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def preparation() -> Preparation:
    return configs.load(Preparation, Path("small.yaml"))


def test_arrays_are_cut_to_what_the_cluster_takes(here: Path) -> None:
    plan, *slices, seal = prep.steps(preparation(), tasks=12, array_size=5)
    assert (plan.command, plan.tasks, plan.after) == (("plan", "prep.yaml"), 1, ())
    assert [(step.first, step.tasks, step.after) for step in slices] == [(0, 5, (0,)), (5, 5, (0,)), (10, 2, (0,))]
    assert {step.command[-1] for step in slices} == {"SHARE/12"} and {s.condition for s in slices} == {"afterok"}
    assert (seal.name, seal.tasks, seal.after, seal.condition) == ("seal", 1, (1, 2, 3), "afterany")
    assert [s.tasks for s in prep.steps(preparation(), tasks=3, array_size=1)] == [1, 1, 1, 1, 1]  # no arrays there


def test_scripts_ask_for_what_the_launcher_says(here: Path) -> None:
    settings = {"tasks": 3, "cpus": 2, "mem_gb": 1.5, "minutes": 30, "partition": "cpu"}
    launcher = Slurm(
        partition="gpu", account="lab", gpus_per_node=8, exclusive=True, setup=["module load x"], prep=settings
    )
    plan, slices, seal = (step["script"] for step in prep.show(launcher, Path("small.yaml"), []))
    asked = sorted(line.removeprefix("#SBATCH --") for line in slices.splitlines() if line.startswith("#SBATCH"))
    folder = here / "out/submissions/1"
    assert asked == [
        "account=lab",
        "array=0-2%3",
        "cpus-per-task=2",
        "dependency='afterok:<0>'",
        "job-name=small-slices",
        "kill-on-invalid-dep=yes",
        "mem=1536M",
        "nodes=1",
        "ntasks-per-node=1",
        "open-mode=append",
        f"output={folder}/slices-%A_%a.log",
        "partition=cpu",
        "requeue",
        "signal=B:USR2@60",
        "time=30",
    ]
    assert "module load x" in slices.splitlines()
    assert f"command=(work {folder}/prep.yaml --stage slices --tasks SHARE/3)" in slices
    assert f"here={here}\n" in slices
    assert "--array" not in plan + seal and f"output={folder}/seal-%j.log" in seal
    for script in (plan, slices, seal):
        subprocess.run(["/bin/bash", "-n"], input=script, text=True, check=True)
    assert not (here / "out").exists()


def test_without_slurm_it_says_so_and_leaves_nothing(here: Path) -> None:
    done = launch("launcher.kind=slurm")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "launch: [Errno 2] No such file or directory: 'sbatch' -> run it where SLURM's commands are, "
        "or use launcher.kind=local\n"
    )
    assert not list(here.glob("out/submissions/*"))


def test_on_this_machine_it_is_data_prep_run(here: Path) -> None:
    before = launch("--status").stdout
    assert before == "mine: not planned\nsmall: jobs: none\n"
    done = launch("workers=2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["corpora"]["mine"]["documents_read"] == 40
    tree = json.loads(launch("--status", "--json").stdout)
    [mine] = tree["corpora"]
    assert mine["made"] == mine["slices"] > 1 and mine["made_bytes"] == mine["bytes"]
    assert (mine["state"], mine["failed"], mine["at_work"], tree["eta_s"]) == ("sealed", [], 0, None)
    assert launch("--status").stdout.startswith(f"mine: {mine['slices']} of {mine['slices']} slices, ")


def test_a_slice_that_fails_is_in_the_status(here: Path) -> None:
    (here / "c.jsonl.gz").write_bytes(b"no gzip")
    done = launch("corpora.mine.on_damage=stop", "corpora.mine.paths=[a.jsonl,c.jsonl.gz]")
    assert done.returncode == 1
    why = "mine: c.jsonl.gz: damaged at byte 0: not a gzip file; "
    assert done.stderr.splitlines()[-1].startswith(f"data-prep: {why}")
    tree = json.loads(launch("--status", "--json").stdout)
    [failure] = tree["corpora"][0]["failed"]
    assert failure["why"].startswith(why) and failure["log"] is None
    assert ", 1 failed\n" in launch("--status").stdout


def test_stopping_what_was_never_queued_is_told(here: Path) -> None:
    done = launch("--stop")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "launch: out: no jobs of launch prep\n")


def test_the_array_size_of_slurm_itself_where_the_controller_is_silent(here: Path) -> None:
    assert queue.max_array_size() == 1001
