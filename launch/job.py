"""The job: what every rank runs, where its files lie, and after which ends it is started again.

A rank is one process that runs the same command as a bare `pretrain train`, on a copy of the run's config that nothing
changes after the submission. What differs between starts lies in the run folder and not in the job, so a job that is
started again cannot bring back anything old.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import configs
from configs import Section, Tree
from pretrain.guard import FAILED, HUNG, STOPPED

RESTARTED = {FAILED: "failed", STOPPED: "stopped and saved", HUNG: "hung"}  # exit codes after which a job starts again
ATTEMPT = "LONGHAUL_ATTEMPT"  # in the environment of every rank: the n of its logs/attempt-<n>


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

    def write(self, launcher: Section) -> None:
        """Create the submission's folder with its two configs. Raises OSError."""
        self.folder.mkdir(parents=True)
        (self.folder / "run.yaml").write_text(self.run_yaml)
        (self.folder / "launcher.yaml").write_text(configs.dump(launcher))


def load_job(path: Path, overrides: Sequence[str]) -> Job:
    """The job of a run's config, or of the run folder `path`: checked, its paths absolute. Raises ConfigError."""
    from pretrain.train import TrainRun

    source = path / "run.yaml" if path.is_dir() else path
    run = configs.load(TrainRun, source, overrides)
    run = configs.build(TrainRun, _absolute(run.model_dump()), str(source))
    folder = next_folder(run.run_folder / "submissions", "")
    command = ("-u", "-m", "pretrain.cli", "train", str(folder / "run.yaml"))
    return Job(run.name, run.run_folder, folder, configs.dump(run), command)


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


def _absolute(tree: Tree) -> Tree:
    """A dumped config with each of its paths absolute."""
    if isinstance(tree, dict):
        return {key: _absolute(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_absolute(value) for value in tree]
    return str(tree.absolute()) if isinstance(tree, Path) else tree


def log(message: str) -> None:
    print(f"launch: {message}", file=sys.stderr, flush=True)
