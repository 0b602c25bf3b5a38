"""`pretrain evaluate`: checkpoints of a run measured on its corpora and on tasks, on one rank or several."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs import ConfigError
from data_pipeline.progress import Count
from data_pipeline.stream import Validation
from pretrain import evaluations
from pretrain.checkpoint import Committed
from pretrain.evaluate import Alone, import_harness, read_files, task_scores, validation_losses
from pretrain.evaluations import Corpus, Evaluated
from pretrain.models.gpt import GPT
from pretrain.ranks import Ranks
from pretrain.restore import load_weights, named_checkpoints, opened, run_tokenizer
from pretrain.run import TrainRun
from pretrain.segments import Segments, plan_course
from pretrain.tasks import TASKS, Name, Shots, TaskFile

log = logging.getLogger("pretrain")

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Questions:
    """What checkpoints are asked. `rows` of a task at most, from its first on; `batch` sequences at once on a rank."""

    tasks: Mapping[Name, TaskFile]
    shots: Sequence[Shots]
    rows: int | None = None
    batch: int | None = None  # default: the run's micro_batch_seqs
    precision: Precision = "fp32"

    @property
    def files(self) -> dict[Name, TaskFile]:
        """The files of the tasks, no more than `rows` of each."""
        if self.rows is None:
            return dict(self.tasks)
        return {
            name: file.model_copy(update={"rows": min(self.rows, file.rows or self.rows)})
            for name, file in self.tasks.items()
        }


def questions(
    run: TrainRun, tasks: Sequence[str] | None, shots: str | None, rows: int | None = None, batch: int | None = None,
    precision: Precision = "fp32",
) -> Questions:  # fmt: skip
    """From what a command says: tasks as NAME or NAME=FILE, shots as `0,1,few`; else what the run says.

    Raises ConfigError.
    """
    wanted = dict(run.evaluation.tasks)
    if tasks is not None:
        wanted = dict(_task(text, run.evaluation.tasks) for text in tasks)
    numbers = run.evaluation.shots if shots is None else tuple(_shots(part) for part in shots.split(","))
    return Questions(wanted, numbers, rows, batch, precision)


def examine(name: str, ask: Callable[[TrainRun], Questions], every: bool = False) -> list[Evaluated]:
    """Measure the checkpoint of RUN or RUN@step, or `every` live one of RUN, oldest first; and write it down.

    Ranks as in training. Gives what is known of each on rank 0, nothing on the others. Raises ConfigError.
    """
    ranks = Ranks.join()
    run, folders = ranks.first(lambda: named_checkpoints(name))
    asked = ask(run)
    if asked.tasks:
        import_harness()
        ranks.first(lambda: read_files(asked.tasks))
    examiner = _Examiner(run, asked, ranks)
    found = []
    for folder in reversed(folders) if every else folders[:1]:
        committed = examiner.load(folder, patient=every)
        if committed is not None:
            found.append(examiner.measure(committed))
    ranks.barrier()
    ranks.leave_together(60.0)
    return found if ranks.rank == 0 else []


class _Examiner:
    """A model that is filled with one checkpoint after the other, and what it is measured on."""

    def __init__(self, run: TrainRun, asked: Questions, ranks: Ranks) -> None:
        self.run, self.asked, self.ranks = run, asked, ranks
        self.model: GPT = run.model.build().to(ranks.device).eval()
        if asked.precision == "bf16":
            self.model.bfloat16()
        self.tokenizer = run_tokenizer(run)
        course = plan_course(run, Segments(run.run_folder).read())
        self.corpora = {
            name: Validation(
                course.corpora.manifests[name],
                n,
                run.data.seq_tokens,
                run.evaluation.tokens,
                run.data.document_mask,
                run.data.fetch_threads,
            )
            for name, n in course.record.generations.items()
        }

    def load(self, folder: Path, patient: bool) -> Committed | None:
        """Fill the model. Where that fails on a rank, ConfigError on all; or None, where one `patient` goes on."""
        committed, problem = None, None
        try:
            committed = opened(folder)
            load_weights(self.model, committed)
        except (ConfigError, FileNotFoundError) as error:  # retention may just have removed it
            problem = str(error)
        problems = [each for each in self.ranks.gather(problem) if each is not None]
        if problems and not patient:
            raise ConfigError(problems[0])
        if problems and self.ranks.rank == 0:
            log.warning("%s: left out: %s", folder.name, problems[0])
        return None if problems else committed

    def measure(self, committed: Committed) -> Evaluated:
        """Measure what the model is filled with; rank 0 writes it down."""
        run, ranks = self.run, self.ranks
        batch = self.asked.batch or (1 if run.micro_batch_seqs == "fit" else run.micro_batch_seqs)
        title, shown = f"evaluate {committed.folder.name}", _Shown(ranks.rank == 0)
        total = -(-sum(len(v.rows) for v in self.corpora.values()) // (batch * ranks.size))
        losses = validation_losses(
            Alone(self.model), run.objective, self.corpora, ranks, batch, shown.counting(f"{title}: corpora", total)
        )
        scores = task_scores(
            self.model, self.tokenizer, run.model.context, self.asked.files, self.asked.shots, ranks, batch,
            show=lambda what, done, total: shown(f"{title}: {what}", done, total),
        ) if self.asked.tasks else []  # fmt: skip
        corpora = {
            name: Corpus(losses[f"validation/{name}/loss"], losses[f"validation/{name}/perplexity"], validation.tokens)
            for name, validation in self.corpora.items()
            if validation.tokens
        }
        return ranks.first(lambda: evaluations.keep(run, committed, corpora, scores))


class _Shown:
    """Progress on rank 0, one display after the other."""

    def __init__(self, is_shown: bool) -> None:
        self._is_shown, self._count = is_shown, Count()

    def __call__(self, title: str, done: int, total: int) -> None:
        if self._is_shown:
            self._count(done, total, title, "requests")

    def counting(self, title: str, total: int) -> Callable[[], bool]:
        """A question that is asked before each of so many batches, shows how far it is, and never stops them."""
        done = 0

        def before_batch() -> bool:
            nonlocal done
            self(title, done, total)
            done += 1
            return False

        return before_batch

    def end(self) -> None:
        """Take the bar away."""
        self._count.__exit__(None, None, None)


def carry(run: TrainRun) -> None:
    """Have the trackers know what is known of a run's checkpoints. One that is away costs a line on stderr."""
    from pretrain.track import TrackError, sync
    from pretrain.track.mlflow import carry_evaluations

    for config in run.track:
        try:
            try:
                sync([config], run.run_folder)
            finally:
                carry_evaluations(config, run.run_folder)
        except TrackError as error:
            print(f"pretrain: {error}; `pretrain track-sync RUN` carries it", file=sys.stderr)


def _task(text: str, known: Mapping[Name, TaskFile]) -> tuple[Name, TaskFile]:
    name, given, path = text.partition("=")
    if name not in TASKS:
        raise ConfigError(f"--task {text}: expected one of {', '.join(TASKS)}, with =FILE behind it")
    task = TASKS[name].name
    if given:
        return task, TaskFile(path=Path(path))
    if task not in known:
        raise ConfigError(f"--task {text}: no evaluation.tasks.{name}.path in the run; give {name}=FILE")
    return task, known[task]


def _shots(text: str) -> Shots:
    for known in ("0", "1", "few"):
        if text.strip() == known:
            return known
    raise ConfigError(f"--shots: expected some of 0,1,few, got {text!r}")
