"""`launch prep`: a preparation as jobs on SLURM, all queued at once.

    plan       the tokenizer and the plan                       one job
    slices     each stage's tasks in nearly equal shares        arrays, cut to what the cluster takes
    seal       the manifests, or which slices failed and why    one job, whatever became of the others

Every job is `data-prep` on a copy of the code and the config that nothing changes any more, in the folder of the
submission, so that inputs keep the names that the config gives them. What is made is told by the shared folder alone:
the same command again does what is missing, with any number of tasks, and beside others that are at it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import configs
from configs import ConfigError
from data_pipeline.preparation import Preparation
from data_pipeline.prepare import stage_widths
from data_pipeline.progress import duration, size
from data_pipeline.standing import Standing, speed, standing
from launch import queue
from launch.job import CODE, JOBS, LaunchError, log, new_folder, next_folder, snapshot
from launch.slurm import Slurm, SlurmError

SUBMISSIONS = "submissions"  # in the folder of the shards
CONFIG = "prep.yaml"
SHARE = "SHARE"  # in a command: the number of the share, which differs from task to task of an array
BODY = Path(__file__).with_name("prep.sh")


@dataclass(frozen=True)
class Step:
    """One job or array. `first` is the share of its first task; `after` the steps that it waits for."""

    name: str
    command: tuple[str, ...]  # for data-prep
    tasks: int
    first: int
    after: tuple[int, ...]
    condition: str  # of those: afterok or afterany


def steps(preparation: Preparation, tasks: int, array_size: int) -> list[Step]:
    """The jobs of a preparation, in an order in which they can be queued."""
    found = [Step("plan", ("plan", CONFIG), 1, 0, (), "afterok")]
    before: tuple[int, ...] = (0,)
    for stage, width in stage_widths(preparation).items():
        of = min(tasks, width or tasks)
        condition = "afterany" if stage == "seal" else "afterok"  # the seal says what failed
        command = ("work", CONFIG, "--stage", stage, "--tasks", f"{SHARE}/{of}")
        arrays = [
            Step(stage, command, min(array_size, of - first), first, before, condition)
            for first in range(0, of, array_size)
        ]
        before = tuple(range(len(found), len(found) + len(arrays)))
        found += arrays
    return found


@dataclass(frozen=True)
class Submission:
    """One `launch prep` on SLURM. `folder` is its own: config, launcher, code, scripts and logs."""

    folder: Path
    here: Path  # where it was submitted: inputs are named from here
    preparation: Preparation
    launcher: Slurm

    def scripts(self) -> Iterator[tuple[Step, str]]:
        """Every batch script, to the last byte but the numbers of the jobs waited for."""
        for step in self._steps():
            yield step, self._executor(step, [f"<{i}>" for i in step.after]).script()

    def queue(self) -> dict[str, list[str]]:
        """Queue all, and give the ids of each step's jobs. Raises SlurmError when one is refused, and queues none."""
        self._write()
        ids: list[str] = []
        found: dict[str, list[str]] = {}
        try:
            for step in self._steps():
                ids.append(self._executor(step, [ids[i] for i in step.after]).queue())
                found.setdefault(step.name, []).append(ids[-1])
        except SlurmError:
            queue.cancel(ids)
            shutil.rmtree(self.folder)
            raise
        (self.folder / JOBS).write_text("".join(f"{name} {' '.join(numbers)}\n" for name, numbers in found.items()))
        return found

    def _steps(self) -> list[Step]:
        return steps(self.preparation, self.launcher.prep.tasks, queue.max_array_size())

    def _write(self) -> None:
        config = self.folder / CONFIG
        config.touch(mode=0o600)  # addresses in it may hold passwords
        workers = self.preparation.model_copy(update={"workers": self.launcher.prep.cpus})
        config.write_text(configs.dump(workers))
        (self.folder / "launcher.yaml").write_text(configs.dump(self.launcher))
        snapshot(self.folder / CODE)

    def _executor(self, step: Step, after: Sequence[str]) -> Any:
        stem = f"{step.name}-{step.first}" if step.first else step.name
        command = [str(self.folder / CONFIG) if word == CONFIG else word for word in step.command]
        python = self.launcher.python or shlex.quote(sys.executable)
        known = [
            f"submission={shlex.quote(str(self.folder))}",
            f"here={shlex.quote(str(self.here))}",
            f"code_folder={shlex.quote(str(self.folder / CODE))}",
            f"stem={stem}",
            f"first={step.first}",
            f"restart={self.launcher.restart}",
            f"python=({python})",
            f"command=({shlex.join(command)})",
        ]
        body = "\n".join([*known, "", BODY.read_text()])
        name = f"{self.preparation.name}-{step.name}"
        waits = ":".join([step.condition, *after]) if after else None
        return self.launcher.prep_executor(self.folder, name, stem, body, step.tasks, waits)


def run_here(config: Path, overrides: Sequence[str], dry_run: bool, as_json: bool) -> NoReturn:
    """This process becomes `data-prep run`."""
    flags = [*(["--dry-run"] if dry_run else []), *(["--json"] if as_json else [])]
    os.execv(sys.executable, [sys.executable, "-m", "data_pipeline.cli", "run", str(config), *overrides, *flags])


def show(launcher: Slurm, config: Path, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """What `submit` would queue."""
    preparation = configs.load(Preparation, config, list(overrides))
    folder = next_folder(preparation.out.absolute() / SUBMISSIONS, "")
    submission = Submission(folder, Path.cwd(), preparation, launcher)
    return [{**asdict(step), "script": script} for step, script in submission.scripts()]


def submit(launcher: Slurm, config: Path, overrides: Sequence[str]) -> dict[str, list[str]]:
    """Queue a preparation, and give the ids of each step's jobs. Raises ConfigError, SlurmError."""
    preparation = configs.load(Preparation, config, list(overrides))
    folder = new_folder(preparation.out.absolute() / SUBMISSIONS, "")
    jobs = Submission(folder, Path.cwd(), preparation, launcher).queue()
    log(f"{preparation.name}: scripts and logs in {folder}")
    return jobs


# --- how it goes ----------------------------------------------------------------------------------------------------


def jobs_of(preparation: Preparation) -> tuple[Path | None, list[str]]:
    """The newest submission, and the ids of the jobs of all of them."""
    folders = [p for p in (preparation.out.absolute() / SUBMISSIONS).glob("*") if p.name.isdigit()]
    folders.sort(key=lambda path: int(path.name))
    lines = [line for path in folders if (path / JOBS).is_file() for line in (path / JOBS).read_text().splitlines()]
    return (folders[-1] if folders else None), [id for line in lines for id in line.split()[1:]]


def look(config: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """How a preparation is: the same keys in every state. Where SLURM does not answer, its folder tells the rest."""
    preparation = configs.load(Preparation, config, list(overrides))
    folder, jobs = jobs_of(preparation)
    since = (folder / JOBS).stat().st_mtime if folder is not None and (folder / JOBS).is_file() else None
    corpora = [standing(preparation, corpus, since) for corpus in preparation.corpora]
    rate, left_s = speed(corpora)
    states, problem = queue.count_states(jobs)
    return {
        "name": preparation.name,
        "out": str(preparation.out.absolute()),
        "logs": str(folder) if folder is not None else None,
        "jobs": dict(states),
        "corpora": [{key: value for key, value in asdict(s).items() if not key.startswith("recent")} for s in corpora],
        "bytes_per_s": rate,
        "eta_s": left_s,
        "notes": [*_words_of_plan(folder, corpora), *([problem] if problem else [])],
    }


def _words_of_plan(folder: Path | None, corpora: Sequence[Standing]) -> list[str]:
    """Why there is no plan, where its job has ended without."""
    if folder is None or all(corpus.state != "not planned" for corpus in corpora):
        return []
    said = [line for log in sorted(folder.glob("plan-*.log")) for line in log.read_text().splitlines()]
    return [line for line in said if line.startswith("data-prep: ")]


def lines(tree: Mapping[str, Any]) -> Iterator[str]:
    """For people: a line for each corpus, one for the whole, one for each slice that failed."""
    for corpus in tree["corpora"]:
        share = f"{corpus['made']:,} of {corpus['slices']:,} slices" if corpus["slices"] else corpus["state"]
        more = [f"{size(corpus['made_bytes'])} of {size(corpus['bytes'])}"] if corpus["slices"] else []
        more += [f"{corpus['at_work']} at work"] if corpus["at_work"] else []
        more += [f"{len(corpus['failed'])} failed"] if corpus["failed"] else []
        more += ["sealed"] if corpus["state"] == "sealed" else []
        yield f"{corpus['corpus']}: {', '.join([share, *more])}"
    jobs = ", ".join(f"{count} {state.lower()}" for state, count in sorted(tree["jobs"].items())) or "none"
    pace = f"; {size(tree['bytes_per_s'])}/s, {duration(tree['eta_s'])} left" if tree["bytes_per_s"] else ""
    yield f"{tree['name']}: jobs: {jobs}{pace}" + (f"; logs in {tree['logs']}" if tree["logs"] else "")
    for corpus in tree["corpora"]:
        for failure in corpus["failed"]:
            yield f"  {failure['why']} (on {failure['host']}{', log ' + failure['log'] if failure['log'] else ''})"
    for note in tree["notes"]:
        yield f"  note: {note}"


def stop(config: Path, overrides: Sequence[str]) -> list[str]:
    """End all jobs of a preparation, and give their ids. What is made stays. Raises LaunchError."""
    preparation = configs.load(Preparation, config, list(overrides))
    _, jobs = jobs_of(preparation)
    if not jobs:
        raise ConfigError(f"{preparation.out}: no jobs of launch prep")
    if problem := queue.cancel(jobs):
        raise LaunchError(f"{preparation.name}: {problem}")
    return jobs
