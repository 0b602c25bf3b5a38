"""What a run folder tells of its submissions and attempts. Read only, and quick: nothing of torch is imported.

RUN/submissions/<n>/    run.yaml, launcher.yaml, jobs (ids on SLURM), stop (an empty file: it is not to go on)
RUN/logs/attempt-<n>/   attempt.json as it began, end.json as it ended, rank-<r>.log
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import configs
from configs import ConfigError
from launch.attempts import STOP, Attempt, read_attempts
from launch.job import JOBS
from pretrain import goodput
from pretrain.goodput import Launched


@dataclass(frozen=True)
class Submission:
    """One `launch submit`."""

    number: int
    folder: Path
    launcher: dict[str, Any]
    jobs: list[str]

    @property
    def stop_asked(self) -> bool:
        return (self.folder / STOP).exists()

    @property
    def time(self) -> float | None:
        """When it was submitted, seconds since the epoch."""
        written = self.folder / "launcher.yaml"
        return written.stat().st_mtime if written.is_file() else None


@dataclass(frozen=True)
class History:
    """All of it, oldest first."""

    folder: Path
    name: str
    submissions: list[Submission]
    attempts: list[Attempt]

    @property
    def jobs(self) -> list[str]:
        """The ids of all jobs on SLURM that the run has had."""
        began = [str(a.begun["job"]) for a in self.attempts if a.begun.get("job") is not None]
        return list(dict.fromkeys([*(job for s in self.submissions for job in s.jobs), *began]))

    @property
    def stop_asked(self) -> bool:
        return bool(self.submissions) and self.submissions[-1].stop_asked


def launched(attempt: Attempt) -> Launched | None:
    """An attempt for the account of the run's time; None where nobody wrote when it began."""
    return goodput.launched(attempt.number, attempt.begun, attempt.ended)


def find_run(path: Path) -> Path:
    """The run folder of a run folder, or of the config that names it. Raises ConfigError where there is no run."""
    folder = path
    if not path.is_dir():
        named = configs.read(path).get("run_folder")
        if not isinstance(named, str):
            raise ConfigError(f"{path}: run_folder: required, and not given")
        folder = Path(named)
    if any((folder / name).exists() for name in ("run.yaml", "submissions", "journal")):
        return folder.absolute()
    if path.is_dir():
        raise ConfigError(f"{path}: neither run.yaml nor submissions: not a run folder")
    raise ConfigError(f"{path}: no run in its run_folder {folder}: it was never submitted")


def runs_below(folder: Path) -> list[Path]:
    """The run folders in a folder and in its `runs/`, by name."""
    found = [path for parent in (folder, folder / "runs") if parent.is_dir() for path in parent.iterdir()]
    return sorted(p.absolute() for p in found if (p / "run.yaml").is_file() or (p / "submissions").is_dir())


def read_history(folder: Path) -> History:
    """Everything that the launcher wrote of a run. What is missing or torn is left out."""
    submissions = [_submission(n, path) for n, path in _numbered(folder / "submissions", "")]
    return History(folder, _name(folder, submissions), submissions, read_attempts(folder / "logs"))


def _submission(number: int, folder: Path) -> Submission:
    jobs = folder / JOBS
    ids = jobs.read_text().split() if jobs.is_file() else []
    return Submission(number, folder, _yaml(folder / "launcher.yaml"), [job for job in ids if job.isdigit()])


def _name(folder: Path, submissions: list[Submission]) -> str:
    for path in (folder / "run.yaml", *(s.folder / "run.yaml" for s in reversed(submissions))):
        if isinstance(name := _yaml(path).get("name"), str):
            return name
    return folder.name


def _numbered(parent: Path, stem: str) -> list[tuple[int, Path]]:
    found = [(path.name.removeprefix(stem), path) for path in parent.glob(f"{stem}*")]
    return sorted((int(number), path) for number, path in found if number.isdigit())


def _yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}
