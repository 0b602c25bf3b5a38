"""Validation loss per corpus, and scores of tasks: the same rows whatever the number of ranks."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Protocol

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from configs import ConfigError, Int, Section
from data_pipeline.stream import Validation
from data_pipeline.tokenizer import Tokenizer
from pretrain.objectives import Batch, Objective
from pretrain.ranks import Ranks
from pretrain.samples import Samples
from pretrain.tasks import TASKS, Name, Shots, TaskFile, read_rows
from pretrain.together import Poll, Together

if TYPE_CHECKING:
    from pretrain.evaluations import Score


class Evaluation(Section):
    """When and on how much validation text a run is measured, and on which tasks (`pretrain/tasks.py`)."""

    every_steps: Int = Field(default=500, gt=0)  # and at the end
    tokens: Int = Field(default=1_000_000, gt=0)  # per corpus, at most
    tasks: dict[Name, TaskFile] = Field(default_factory=dict)
    shots: tuple[Annotated[Shots, BeforeValidator(str)], ...] = ("0", "1", "few")
    tasks_every_steps: Int | None = Field(default=None, gt=0)  # in training; default: only by `pretrain evaluate`
    samples: Samples | None = None  # texts that are written every `every_steps`; null: none

    @property
    def needs_tokenizer(self) -> bool:
        """Whether a run tokenizes while it trains."""
        return self.samples is not None or self.tasks_every_steps is not None


class Measured(Protocol):
    """What is asked of a model to be measured: an engine, or a model alone."""

    module: nn.Module

    def loss(self, batch: Batch) -> Tensor:
        """The weighted sum of a batch's losses in fp32, without gradients."""


@dataclass
class Alone:
    """A model without an engine."""

    module: nn.Module

    @torch.no_grad()
    def loss(self, batch: Batch) -> Tensor:
        """See `Measured.loss`."""
        loss: Tensor = self.module(*batch)
        return loss.float()


def validation_losses(
    engine: Measured,
    objective: Objective,
    corpora: Mapping[str, Validation],
    ranks: Ranks,
    rows: int,
    asked_to_stop: Callable[[], bool] = lambda: False,
    asked_while_waiting: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Mean loss (nats per token) of each corpus that has validation text, and its exponential, the perplexity.

    `asked_to_stop` is called before each batch; when it is true on any rank, Abandoned is raised on all of them a
    batch later. So it is where `asked_while_waiting` is true while a rank waits for its storage.
    """
    poll = Poll(ranks, asked_to_stop)
    with measuring(engine.module):
        return _losses(engine, objective, corpora, ranks, rows, poll, asked_while_waiting)


@contextlib.contextmanager
def measuring(module: nn.Module) -> Iterator[None]:
    """In evaluation mode, and back to what it was."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def _losses(
    engine: Measured,
    objective: Objective,
    corpora: Mapping[str, Validation],
    ranks: Ranks,
    rows: int,
    poll: Poll,
    asked_while_waiting: Callable[[], bool],
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, validation in corpora.items():
        total = torch.zeros((), dtype=torch.float64)
        together = Together(ranks, asked_while_waiting)  # one of the corpus before would know nothing of this reading
        with validation.reading(rows, ranks.rank, ranks.size) as reading:
            for _ in range(validation.batch_count(rows, ranks.size)):
                poll()
                tokens, valid, documents = (
                    None if part is None else torch.from_numpy(part).to(ranks.device) for part in together.take(reading)
                )
                assert tokens is not None and valid is not None
                total += engine.loss(objective.batch(tokens, valid, documents)).double().cpu()
        if validation.tokens:
            loss = float(ranks.sum(total)) / validation.tokens
            metrics[f"validation/{name}/loss"] = loss
            metrics[f"validation/{name}/perplexity"] = math.exp(min(loss, 700.0))
    return metrics


def check_tasks(evaluation: Evaluation) -> None:
    """Raise ConfigError where a task that is evaluated in training cannot be: the harness or a file is missing."""
    if evaluation.tasks_every_steps is None:
        return
    if not evaluation.tasks:
        raise ConfigError("evaluation.tasks_every_steps: no evaluation.tasks are given")
    import_harness()
    read_files(evaluation.tasks)


def read_files(files: Mapping[Name, TaskFile]) -> None:
    """Raise ConfigError where the file of a task cannot be read."""
    for name, file in files.items():
        for path in (file.path, *([file.examples] if file.examples else [])):
            read_rows(path, TASKS[name])


def import_harness() -> ModuleType:
    """`pretrain.harness`. Raises ConfigError where lm-evaluation-harness is not installed."""
    try:
        return importlib.import_module("pretrain.harness")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"tasks need lm-evaluation-harness ({error.name} is missing): pip install 'longhaul[evaluate]'"
        ) from None


def task_scores(
    module: nn.Module,
    tokenizer: Tokenizer,
    context: int,
    files: Mapping[Name, TaskFile],
    shots: Sequence[Shots],
    ranks: Ranks,
    rows: int,
    asked_to_stop: Callable[[], bool] = lambda: False,
    show: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Score]:
    """Every task at every number of shots, on every rank alike; `rows` sequences at once on each.

    Abandoned is raised as by `validation_losses`; `show(what, done, all)` is told how far it is. Raises ConfigError
    on all ranks where one of them cannot read a file.
    """
    harness = import_harness()
    _agree(ranks, files)
    poll = Poll(ranks, asked_to_stop)

    def count(text: str) -> int:
        return len(tokenizer.encode_batch([text])[0])

    def score(name: Name, each: Shots) -> Score:
        def before_batch(done: int, total: int) -> None:
            poll()
            show(f"{name} {each}-shot", done, total)

        model = harness.Model(module, tokenizer, context, ranks, rows, ranks.device, before_batch)
        found: Score = harness.evaluate_task(model, name, files[name], each, context, count)
        return found

    with measuring(module), torch.compiler.set_stance("force_eager"):  # every length would be compiled anew
        return [score(name, each) for name, each in itertools.product(files, shots)]


def _agree(ranks: Ranks, files: Mapping[Name, TaskFile]) -> None:
    problem = None
    try:
        read_files(files)
    except ConfigError as error:
        problem = str(error)
    for found in ranks.gather(problem):
        if found is not None:
            raise ConfigError(found)
