"""What evaluations found, in `RUN/evaluations/<checkpoint>.json`: one file per checkpoint, each finding once.

    {format, run, checkpoint, step, branch, tokens, manifest_sha256, time, corpora: {NAME: {loss, perplexity, tokens}},
     tasks: [{task, shots, k, rows, file, sha256, metrics: {NAME: value}}], metrics: {NAME: value}}

`metrics` has every number by its name in the journal. `shots` is what was asked for (0, 1, few), `k` the number of
examples that it came to.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs import ConfigError
from data_pipeline.shards import write_durably
from pretrain.checkpoint import Committed
from pretrain.run import TrainRun

FOLDER = "evaluations"
FORMAT_VERSION = 1
SHOWN = {"accuracy": 1, "perplexity": 2}  # the metrics of the table and their decimals; accuracy in per cent


@dataclass(frozen=True)
class Corpus:
    """A corpus' validation text: loss in nats per token, its exponential, and the tokens it was taken over."""

    loss: float
    perplexity: float
    tokens: int


@dataclass(frozen=True)
class Score:
    """A task at a number of shots."""

    task: str
    shots: str  # 0, 1, few
    k: int
    rows: int
    file: str
    sha256: str
    metrics: dict[str, float]

    @property
    def key(self) -> str:
        """`tasks/lambada/few-shot`, under which its metrics stand in the journal and in MLflow."""
        return f"tasks/{self.task}/{self.shots}-shot"


@dataclass(frozen=True)
class Evaluated:
    """All that is known of one checkpoint."""

    run: str
    checkpoint: str  # the name of its folder
    step: int
    branch: int
    tokens: int
    manifest_sha256: str
    corpora: dict[str, Corpus]
    tasks: tuple[Score, ...]
    time: float = 0.0
    format: int = FORMAT_VERSION

    @property
    def tree(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return asdict(self) | {"metrics": self.metrics}

    @property
    def metrics(self) -> dict[str, float]:
        """Every number by its name in the journal."""
        found: dict[str, float] = {}
        for name, corpus in self.corpora.items():
            found |= {f"validation/{name}/loss": corpus.loss, f"validation/{name}/perplexity": corpus.perplexity}
        for score in self.tasks:
            found |= {f"{score.key}/{name}": value for name, value in score.metrics.items()}
        return found


def keep(run: TrainRun, committed: Committed, corpora: Mapping[str, Corpus], scores: Sequence[Score]) -> Evaluated:
    """Write down what was found of a checkpoint, beside what was found of it before; the whole of it."""
    path = run.run_folder / FOLDER / f"{committed.folder.name}.json"
    old = read(path) if path.is_file() else None
    if old is not None and old.manifest_sha256 != committed.manifest_hash:
        old = None
    new = {(score.task, score.shots): score for score in scores}
    kept = [score for score in old.tasks if (score.task, score.shots) not in new] if old else []
    position = committed.position
    evaluated = Evaluated(
        run.name, committed.folder.name, position.step, committed.branch, position.tokens, committed.manifest_hash,
        {**(old.corpora if old else {}), **corpora}, tuple(sorted([*kept, *scores], key=_order)), round(time.time(), 3),
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, (json.dumps(evaluated.tree, indent=1) + "\n").encode())
    return evaluated


def read(path: Path) -> Evaluated:
    """One file. Raises ConfigError where it is damaged, or newer than this code."""
    try:
        tree: dict[str, Any] = json.loads(path.read_bytes())
        if tree["format"] > FORMAT_VERSION:
            raise ConfigError(f"{path}: format {tree['format']} is newer than this code's; update longhaul")
        del tree["metrics"]  # all of it stands elsewhere
        tree["corpora"] = {name: Corpus(**corpus) for name, corpus in tree["corpora"].items()}
        tree["tasks"] = tuple(Score(**score) for score in tree["tasks"])
        return Evaluated(**tree)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: damaged: {error}; remove it, and evaluate again") from None


def read_all(run_folder: Path) -> list[Evaluated]:
    """What is known of each checkpoint of a run, by step."""
    return sorted((read(path) for path in (run_folder / FOLDER).glob("*.json")), key=lambda e: (e.step, e.branch))


def table(evaluated: Sequence[Evaluated]) -> list[str]:
    """Lines for people: a row per number, a column per checkpoint."""
    rows: dict[str, dict[int, str]] = {}
    for column, each in enumerate(evaluated):
        for name, corpus in each.corpora.items():
            rows.setdefault(f"{name} perplexity", {})[column] = f"{corpus.perplexity:,.2f}"
        for score in each.tasks:
            shots = f"{score.shots}-shot" + (f" ({score.k})" if score.shots == "few" else "")
            for metric, decimals in SHOWN.items():
                if metric in score.metrics:
                    cell = _cell(metric, score, decimals)
                    rows.setdefault(f"{score.task} {shots} {metric}", {})[column] = cell
    heads = ["", *(f"step {each.step}" for each in evaluated)]
    tokens = ["tokens", *(f"{each.tokens:,}" for each in evaluated)]
    cells = [heads, tokens, *([name, *(row.get(i, "-") for i in range(len(evaluated)))] for name, row in rows.items())]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    return ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in cells]  # fmt: skip


def _cell(metric: str, score: Score, decimals: int) -> str:
    """An accuracy in per cent with its standard error, or a number as it is."""
    value = score.metrics[metric]
    if metric != "accuracy":
        return f"{value:,.{decimals}f}"
    error = math.sqrt(value * (1 - value) / max(score.rows - 1, 1))
    return f"{100 * value:.{decimals}f} ± {100 * error:.{decimals}f} %"


def _order(score: Score) -> tuple[str, int]:
    return score.task, {"0": 0, "1": 1}.get(score.shots, 2)
