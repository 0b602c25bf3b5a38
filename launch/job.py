"""The job: what every rank runs, where its files lie, and after which ends it is started again.

A rank is one process that runs the same command as a bare `pretrain train`, on a copy of the run's config that nothing
changes after the submission. What differs between starts lies in the run folder and not in the job, so a job that is
started again cannot bring back anything old.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import configs
from configs import Section
from pretrain.guard import FAILED, HUNG, STOPPED

RESTARTED = {FAILED: "failed", STOPPED: "stopped and saved", HUNG: "hung"}  # exit codes after which a job starts again
JOBS = "jobs"  # in a submission's folder: the ids of its jobs on SLURM, a line each, chained ones too
CODE = "code"  # in a submission's folder: the four packages as they were, which its ranks run
PACKAGES = ("configs", "data_pipeline", "pretrain", "launch")
ATTEMPT = "LONGHAUL_ATTEMPT"  # in the environment of every rank: the n of its logs/attempt-<n>


class LaunchError(Exception):
    """A run, or what it trains on, could not be reached. The message is one line."""


@dataclass(frozen=True)
class Job:
    """One submission of a run. `folder` is its own, RUN/submissions/<n>: config, launcher, script and log of SLURM."""

    name: str
    run_folder: Path
    folder: Path
    run_yaml: str  # the text of the run's config, resolved
    arguments: tuple[str, ...]  # what each rank gives to the Python interpreter

    @property
    def logs(self) -> Path:
        """Where attempts write: logs/attempt-<n>/rank-<r>.log."""
        return self.run_folder / "logs"

    @property
    def number(self) -> int:
        """The n of RUN/submissions/<n>."""
        return int(self.folder.name)

    def write(self, launcher: Section) -> None:
        """Create the submission's folder with its two configs. Raises OSError."""
        self.folder.mkdir(parents=True)
        config = self.folder / "run.yaml"
        config.touch(mode=0o600)  # addresses in it may hold passwords
        config.write_text(self.run_yaml)
        (self.folder / "launcher.yaml").write_text(configs.dump(launcher))


def load_job(path: Path, overrides: Sequence[str]) -> Job:
    """The job of a run's config, or of a run folder: checked against its shards and its past.

    Raises ConfigError, and LaunchError where the shards cannot be had now.
    """
    from data_pipeline.shards import ShardError
    from pretrain.run import load_run
    from pretrain.start import examine

    run = load_run(path, list(overrides))
    try:
        examine(run)  # what would otherwise be found when the job at last starts
    except ShardError as error:  # an outage, as Corpora tells the rest as ConfigError
        raise LaunchError(str(error)) from None
    folder = next_folder(run.run_folder / "submissions", "")
    command = ("-u", "-m", "pretrain.cli", "train", str(folder / "run.yaml"))
    return Job(run.name, run.run_folder, folder, configs.dump(run), command)


def snapshot(folder: Path) -> None:
    """Copy the code that runs now, for jobs that begin later."""
    for package in PACKAGES:
        source = Path(__file__).parents[1] / package
        shutil.copytree(source, folder / package, ignore=shutil.ignore_patterns("__pycache__"))


def next_folder(parent: Path, stem: str) -> Path:
    """The first of stem1, stem2, ... that `parent` has not."""
    number = 1
    while (parent / f"{stem}{number}").exists():
        number += 1
    return parent / f"{stem}{number}"


def new_folder(parent: Path, stem: str) -> Path:
    """Create the first of stem1, stem2, ... that `parent` has not; no other process gets the same one."""
    while True:
        folder = next_folder(parent, stem)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder


def log(message: str) -> None:
    print(f"launch: {message}", file=sys.stderr, flush=True)
