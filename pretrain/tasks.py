"""LAMBADA, PIQA and WinoGrande as the GPT-3 paper poses them (Brown et al. 2020), on local files of JSON lines.

    task         a row of its file                            posed as                                   K of "few"
    lambada      {context, continuation}                      0: the text itself; else a blank to fill   15
    piqa         {query, choices, gold}                       the query, "Answer:", each choice          50
    winogrande   {context_options, continuation, gold}        the rest of the sentence after each        50

LAMBADA counts a row as right where the model, taking the likeliest token each time, gives the last word, and has the
perplexity of that word; with examples it is the blank of section 3.1.2, in the form of appendix G. PIQA takes the
choice whose likelihood per token is the highest (section 2.4). WinoGrande compares the likelihood of the same ending
after either name: partial evaluation (Trinh and Le 2018; section 3.4). K is that of appendix H, or as many examples as
fit the context, as section 2.4 says; they are drawn from `examples`, or else from the file without the row in question.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from configs import ConfigError, Int, Section

Row = dict[str, Any]
Name = Literal["lambada", "piqa", "winogrande"]
Shots = Literal["0", "1", "few"]


class TaskFile(Section):
    """Where the rows of a task lie, and those that its examples are drawn from."""

    path: Path
    examples: Path | None = None  # default: the other rows of `path`
    rows: Int | None = Field(None, gt=0)  # the first so many; default: all


@dataclass(frozen=True)
class Posed:
    """A row as it is put to a model: contexts and endings, pair by pair; `gold` is the number of the right pair."""

    contexts: tuple[str, ...]
    endings: tuple[str, ...]
    gold: int

    @property
    def example(self) -> str:
        """The right pair, as an example for other rows."""
        return f"{self.contexts[self.gold]} {self.endings[self.gold]}"


@dataclass(frozen=True)
class Task:
    """How a task is posed. `keys` are those that each of its rows has."""

    name: Name
    keys: tuple[str, ...]
    pose: Callable[[Row, bool], Posed]  # the row, and whether examples stand before it
    most_shots: int


def _lambada(row: Row, shots: bool) -> Posed:
    context = f"Fill in blank:\n\n{row['context']} ____. ->" if shots else str(row["context"])
    return Posed((context,), (str(row["continuation"]),), 0)


def _piqa(row: Row, shots: bool) -> Posed:
    context = f"{str(row['query']).rstrip()}\nAnswer:"
    return Posed((context,) * len(row["choices"]), tuple(row["choices"]), int(row["gold"]))


def _winogrande(row: Row, shots: bool) -> Posed:
    contexts = tuple(row["context_options"])
    return Posed(contexts, (str(row["continuation"]),) * len(contexts), int(row["gold"]))


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("lambada", ("context", "continuation"), _lambada, 15),
        Task("piqa", ("query", "choices", "gold"), _piqa, 50),
        Task("winogrande", ("context_options", "continuation", "gold"), _winogrande, 50),
    )
}


def read_rows(path: Path, task: Task) -> tuple[list[Row], str]:
    """The rows of a file, and its sha256. Raises ConfigError with the line that is not one of the task's."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{task.name}: {path}: cannot be read: {error.strerror}") from None
    rows = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            posed = task.pose(row, False)
            fits = all(key in row for key in task.keys) and 0 <= posed.gold < len(posed.endings) and all(posed.endings)
        except (ValueError, KeyError, TypeError):
            fits = False
        if not fits:
            raise ConfigError(f"{path}:{number}: not a row of {task.name}: expected {{{', '.join(task.keys)}}}")
        rows.append(row)
    if not rows:
        raise ConfigError(f"{path}: no rows of {task.name}")
    return rows, hashlib.sha256(data).hexdigest()


def fitting(task: Task, examples: Sequence[Row], shots: Shots, context: int, count: Callable[[str], int]) -> int:
    """How many examples stand before a row: for `few`, K or as many of mean length as fit beside the row itself."""
    if shots == "0":
        return 0
    if len(examples) < 2:
        raise ConfigError(f"{task.name}: no rows to draw examples from")
    if shots == "1":
        return 1
    looked_at = examples[:: max(len(examples) // 200, 1)]
    mean = sum(count(task.pose(row, True).example + "\n\n") for row in looked_at) / len(looked_at)
    return max(1, min(task.most_shots, len(examples) - 1, int(context / mean) - 1))
