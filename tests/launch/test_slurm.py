"""The batch script, on a machine without SLURM; what a real SLURM makes of it is in tests/cluster."""

import os
import subprocess
from pathlib import Path

import pytest

import configs
from launch.cli import Where
from launch.job import Job
from launch.slurm import Slurm, SlurmError
from pretrain.track.journal import Journal

FULL = """
kind: slurm
partition: big
account: lab
qos: long
nodes: 4
gpus_per_node: 8
cpus_per_rank: 6
mem_gb: 1.5
minutes: 90
signal_lead_s: 240
constraint: a100
exclude: n[3-5]
exclusive: true
setup: [module load cuda]
python: apptainer exec image.sif python
srun: [--mpi=none]
sbatch: {reservation: maintenance, contiguous: 'true'}
"""


@pytest.fixture
def job(tmp_path: Path) -> Job:
    run = tmp_path / "a run's folder"
    return Job("small", run, run / "submissions" / "1", "name: small\n", ("-u", "-m", "pretrain.cli", "train", "x y"))


@pytest.fixture
def full(tmp_path: Path) -> Slurm:
    (tmp_path / "launcher.yaml").write_text(FULL)
    return configs.load(Slurm, tmp_path / "launcher.yaml")


def test_script_asks_for_everything(full: Slurm, job: Job) -> None:
    lines = full.show(job).splitlines()
    assert sorted(line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")) == sorted(
        [
            "--account=lab",
            "--constraint=a100",
            "--contiguous",
            "--cpus-per-task=6",
            "--exclude='n[3-5]'",
            "--exclusive",
            "--gpus-per-node=8",
            "--job-name=small",
            "--mem=1536M",
            "--nodes=4",
            "--ntasks-per-node=8",
            "--open-mode=append",
            "--output='" + f"{job.folder}/%j.log".replace("'", "'\"'\"'") + "'",
            "--partition=big",
            "--qos=long",
            "--requeue",
            "--reservation=maintenance",
            "--signal=USR2@240",
            "--time=90",
        ]
    )
    assert "module load cuda" in lines
    assert "srun_arguments=(--cpus-per-task=6 --mpi=none)" in lines
    assert "rank=(apptainer exec image.sif python -P -u -m pretrain.cli train 'x y')" in lines
    assert lines.index("module load cuda") < lines.index("threads=6")


def test_script_is_shell(full: Slurm, job: Job) -> None:
    for launcher in (Slurm(), full):
        subprocess.run(["bash", "-n"], input=launcher.show(job), text=True, check=True)


def test_showing_needs_no_slurm_and_leaves_nothing(job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Slurm().show(job).startswith("#!/bin/bash\n")
    assert not job.run_folder.exists()


@pytest.mark.parametrize(
    ("restart", "flag"), [("requeue", "--requeue"), ("chain", "--no-requeue"), ("none", "--no-requeue")]
)
def test_requeue_follows_the_policy(job: Job, restart: str, flag: str) -> None:
    script = Slurm(restart=restart).show(job)
    assert f"#SBATCH {flag}\n" in script
    assert f"restart={restart}\n" in script


def test_no_secret_in_the_script(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "planted-secret")
    assert "planted-secret" not in Slurm().show(job)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"setup": ["module load x", "export WANDB_API_KEY=planted"]}, "setup: holds a secret, WANDB_API_KEY"),
        (
            {"setup": ["git clone https://me:planted@lab.example/x"]},
            "setup: holds a secret, an address with credentials",
        ),
        ({"python": "env HF_TOKEN=planted python"}, "python: holds a secret, HF_TOKEN"),
        ({"sbatch": {"export": "MY_SECRET=planted"}}, "sbatch: holds a secret, MY_SECRET"),
    ],
)
def test_a_secret_in_the_settings_is_refused(settings: dict[str, object], found: str) -> None:
    with pytest.raises(configs.ConfigError) as caught:
        configs.build(Slurm, settings, "test")
    assert f"{found}, and would be readable in the batch script; export it before `launch submit`" in str(caught.value)
    assert "planted" not in str(caught.value)


def test_what_only_names_a_secret_is_none() -> None:
    Slurm(setup=["export WANDB_API_KEY=$(cat ~/.key)", 'export HF_TOKEN="$TOKEN"', "export MAX_TOKENS=5"])


def test_the_lead_follows_from_the_saves(job: Job) -> None:
    def lead(**settings: int) -> str:
        [line] = [line for line in Slurm(**settings).show(job).splitlines() if "--signal" in line]
        return line.removeprefix("#SBATCH --signal=USR2@")

    assert lead() == "120"
    assert lead(minutes=2) == "60"
    journal = Journal(job.run_folder, 1)
    for seconds in (100.0, 12.0, 200.0):
        journal.checkpoint(1, "ready", "x", "0", seconds=seconds)
    assert lead() == "430"
    for _ in range(20):
        journal.checkpoint(2, "ready", "x", "0", seconds=2.0)
    Journal(job.run_folder, 2).checkpoint(3, "ready", "x", "0", seconds=20.0)
    assert lead() == "70"
    assert lead(minutes=2) == "60"
    assert lead(signal_lead_s=33) == "33"


def test_spare_nodes_are_asked_for(job: Job) -> None:
    script = Slurm(nodes=4, spare_nodes=1).show(job)
    assert "#SBATCH --nodes=5\n" in script
    assert "#SBATCH --no-kill\n" in script
    assert "wanted=4\n" in script
    assert "--no-kill" not in Slurm(nodes=4).show(job)


def test_odd_names_of_folders(tmp_path: Path) -> None:
    run = tmp_path / 'Ünïcødé\'s "run" $HOME'
    script = Slurm().show(Job("r", run, run / "submissions" / "1", "", ("-c", "pass")))
    [line] = [line for line in script.splitlines() if line.startswith("logs=")]
    shown = subprocess.run(["bash", "-c", f'{line}; printf %s "$logs"'], capture_output=True, text=True, check=True)
    assert shown.stdout == f"{run}/logs"


def test_sbatch_missing(job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError) as caught:
        Slurm().start(job)
    assert str(caught.value) == (
        "[Errno 2] No such file or directory: 'sbatch' -> run it where SLURM's commands are, or use launcher.kind=local"
    )
    assert not job.folder.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "sbatch: error: invalid partition specified: nope\nsbatch: error: Batch job submission failed: X",
            "sbatch: error: invalid partition specified: nope sbatch: error: Batch job submission failed: X "
            "-> set launcher.partition; `sinfo` lists those of this cluster",
        ),
        ("sbatch: error: something new", "sbatch refused the job: sbatch: error: something new"),
    ],
)
def test_sbatch_refuses(job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: str, message: str) -> None:
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nprintf '%s\\n' '{words}' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    with pytest.raises(SlurmError) as caught:
        Slurm().start(job)
    assert str(caught.value) == message
    assert not job.folder.exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["launcher.nodes=4"],
            "command line (launcher.nodes=4): launcher.nodes: unknown key of kind local; it is one of kind slurm",
        ),
        (
            ["launcher.kind=slurm", "launcher.nodse=4"],
            "command line (launcher.nodse=4): launcher.nodse: unknown key; did you mean launcher.nodes?",
        ),
        (
            ["launcher.kind=slurn"],
            "command line: launcher: kind: expected local | slurm, got 'slurn'; did you mean slurm?",
        ),
        (
            ["launcher.ranks=0"],
            "command line (launcher.ranks=0): launcher.ranks: input should be greater than or equal to 1, got 0",
        ),
        (
            ["launcher.kind=slurm", "launcher.minutes=1", "launcher.signal_lead_s=120"],
            "command line: launcher: signal_lead_s: expected less than the 60 s of `minutes`, got 120",
        ),
        (
            ["launcher.kind=slurm", "launcher.sbatch={exclude: n4}"],
            "command line: launcher: sbatch: exclude: give launcher.exclude, to which a restart adds nodes that failed",
        ),
    ],
)
def test_launcher_mistakes(overrides: list[str], message: str) -> None:
    with pytest.raises(configs.ConfigError) as caught:
        configs.build(Where, {"launcher": {"kind": "local"}}, "command line", overrides)
    assert str(caught.value) == message


def test_shipped_clusters_load() -> None:
    files = sorted((configs.CONFIGS / "cluster").glob("*.yaml"))
    assert files
    for file in files:
        configs.build(Where, {"launcher": {"kind": "local"}}, "command line", [f"launcher=cluster/{file.name}"])
