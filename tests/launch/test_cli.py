"""The command `launch submit` on this machine, with real runs."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

import configs
from data_pipeline.sources import remote
from data_pipeline.sources.remote import Patience
from launch.cli import main
from launch.job import load_job
from pretrain.run import TrainRun
from tests.data_pipeline.servers import Server
from tests.launch.small_run import write_small_run


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is never started."""
    return write_small_run(tmp_path_factory.mktemp("small"), steps=10)


def submit(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.cli", "submit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_mistakes_are_one_line_and_nothing_is_started(config: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere.yaml"
    cases: list[tuple[list[object], str]] = [
        ([nowhere], f"launch: {nowhere}: no such file\n"),
        ([tmp_path], f"launch: {tmp_path}: no run.yaml: not a run folder\n"),
        (
            [config, "optim.lr_pek=1"],
            "launch: command line (optim.lr_pek=1): optim.lr_pek: unknown key; did you mean optim.lr_peak?\n",
        ),
        (
            [config, "model.vocab_size=1000", "launcher.kind=slurm"],
            "launch: model.vocab_size: 1000, but the shards of random were made with a vocabulary of 509; "
            "set model.vocab_size=509\n",
        ),
    ]
    for arguments, message in cases:
        done = submit(*arguments)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
    assert not (config.parent / "run").exists()


def test_dry_run_leaves_nothing(config: Path) -> None:
    done = submit(config, "launcher.ranks=2", "--dry-run")
    rank = f"{sys.executable} -u -m pretrain.cli train {config.parent}/run/submissions/1/run.yaml"
    assert done.returncode == 0
    assert [line.split(" ")[0] for line in done.stdout.splitlines()] == ["RANK=0", "RANK=1"]
    assert all(line.endswith(rank) for line in done.stdout.splitlines())
    done = submit(config, "launcher=cluster/slurm.yaml", "launcher.nodes=4", "--dry-run")
    assert done.returncode == 0
    assert done.stdout.startswith("#!/bin/bash\n")
    assert "#SBATCH --nodes=4\n" in done.stdout
    assert not (config.parent / "run").exists()


def test_paths_become_absolute(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(config.parent)
    job = load_job(Path("run.yaml"), ["run_folder=elsewhere", "data.sources.random.shards=shards"])
    assert job.run_folder == config.parent / "elsewhere"
    assert job.folder == config.parent / "elsewhere" / "submissions" / "1"
    written = config.parent / "resolved.yaml"
    written.write_text(job.run_yaml)
    assert configs.load(TrainRun, written).data.sources["random"].shards == config.parent / "shards"


def test_stopped_and_submitted_again(tmp_path: Path) -> None:
    config = write_small_run(tmp_path, steps=300)
    command = [sys.executable, "-m", "launch.cli", "submit", str(config), "launcher.ranks=2", "launcher.restarts=2"]
    launcher = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    log = tmp_path / "run" / "logs" / "attempt-1" / "rank-0.log"
    end = time.monotonic() + 120
    while not (log.exists() and "step 10/300" in log.read_text()):
        assert time.monotonic() < end, "the run does not begin"
        time.sleep(0.05)
    launcher.terminate()
    assert launcher.wait(60) == 3
    [stopped] = [line for line in log.read_text().splitlines() if "(exit 3)" in line]
    step = int(stopped.split("at step ")[1].split(" ")[0])
    assert 10 <= step < 300

    refused = submit(tmp_path / "run", "seed=7")
    assert refused.returncode == 2
    assert "seed: 1 -> 7: is part of what this run is; give another run_folder to start a new run" in refused.stderr

    again = submit(tmp_path / "run", "launcher.ranks=2")
    assert again.returncode == 0
    assert f"going on from step-{step}.b1" in again.stderr
    assert "at step 300 (exit 0)" in again.stderr


def test_an_outage_is_one_line(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And exit 1: nothing is wrong with the configuration, and the same command is to be given again."""
    monkeypatch.setattr(remote, "PATIENCE", Patience(attempts=2, wait_s=0.01))
    server = Server()
    try:
        server.files["/away/MANIFEST.json"], server.faults["/away/MANIFEST.json"] = b"{}", ["503*"]
        place = f"data.sources.random.shards={server.address}/away"
        monkeypatch.setattr(sys, "argv", ["launch", "submit", str(config), place])
        with pytest.raises(SystemExit) as end:
            main()
    finally:
        server.close()
    assert end.value.code == 1
    said = f"launch: data.sources.random.shards: {server.address}/away/MANIFEST.json: HTTP 503, after 2 attempts; "
    assert capsys.readouterr().err == f"{said}run the same command again to go on\n"
