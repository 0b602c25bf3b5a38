"""The configuration of a run: everything that it is. Where it runs is no part of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

import configs
from configs import ConfigError, Int, Section
from data_pipeline.stream import Data
from pretrain.checkpoint import Checkpoints
from pretrain.engine import EngineSettings
from pretrain.evaluate import Evaluation
from pretrain.fields import ADDED, field_class
from pretrain.guard import Guard
from pretrain.models import Model
from pretrain.objectives import NextToken, Objective
from pretrain.optim import Optim
from pretrain.preflight import Preflight
from pretrain.profile import Profile
from pretrain.schedule import BatchRamp, Schedule, step_pieces
from pretrain.track import Track


def _absolute(name: str) -> str:
    """RUN@step or a path with its folder made absolute; other addresses as they are."""
    if not name.strip():
        raise ValueError("expected RUN@step, models:/NAME@alias or a folder, got an empty name")
    return name if re.match(r"\w+:/", name) else str(Path(name).absolute())


def _micro_batch(value: object) -> object:
    """A number of sequences, or `fit`."""
    if value == "fit":
        return value
    try:
        seqs = configs.parse_int(value)
    except ValueError:
        seqs = 0
    if seqs < 1:
        raise ValueError(f"expected a whole number above 0, or fit, got {value!r}")
    return seqs


class TrainRun(Section):
    """One frozen tree; every field is of a class (`pretrain/fields.py`) that says when it may change."""

    name: str
    run_folder: Path
    seed: Int = Field(default=1, ge=0)
    model: Model
    objective: Objective = NextToken()
    data: Data
    batch_tokens: Int = Field(gt=0)
    batch_ramp: BatchRamp | None = None  # null: batch_tokens from the first step on
    micro_batch_seqs: Annotated[Int | Literal["fit"], BeforeValidator(_micro_batch)]  # fit: what memory holds
    train_tokens: Int = Field(gt=0)
    optim: Optim
    schedule: Schedule
    engine: EngineSettings
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoints = Checkpoints()
    guard: Guard = Guard()
    preflight: Preflight = Preflight()
    profile: Profile = Profile()
    track: tuple[Track, ...] = ()
    resume: str = "auto"  # auto, never, must, or the path of a checkpoint
    fork_from: Annotated[str, AfterValidator(_absolute)] | None = None  # RUN@step: a new run with its training state
    fork_position: Literal["fresh", "parent"] = "fresh"  # from 0 of its own order, or on with the parent's
    init_from: Annotated[str, AfterValidator(_absolute)] | None = None  # RUN@step, models:/NAME@alias, or a folder
    log_every_steps: Int = Field(default=10, gt=0)
    stop_at_step: Int | None = Field(default=None, gt=0)  # end early; without it the run goes on

    @model_validator(mode="after")
    def _fits(self) -> TrainRun:
        if self.batch_tokens < self.data.seq_tokens:
            raise ValueError(
                f"batch_tokens: {self.batch_tokens} is less than one sequence of data.seq_tokens {self.data.seq_tokens}"
            )
        if self.batch_ramp is not None:
            ramp, seq = self.batch_ramp, self.data.seq_tokens
            if not seq <= ramp.start_tokens <= self.batch_tokens:
                raise ValueError(
                    f"batch_ramp.start_tokens: expected from data.seq_tokens {seq} to batch_tokens "
                    f"{self.batch_tokens}, got {ramp.start_tokens}"
                )
            if ramp.increment_tokens is not None and ramp.increment_tokens < seq:
                raise ValueError(
                    f"batch_ramp.increment_tokens: {ramp.increment_tokens} is less than one sequence of "
                    f"data.seq_tokens {seq}"
                )
        if self.data.seq_tokens > self.model.context:
            raise ValueError(
                f"data.seq_tokens: {self.data.seq_tokens} is longer than model.context {self.model.context}"
            )
        if self.fork_from and self.init_from:
            raise ValueError("fork_from and init_from: give one of them")
        if self.fork_position == "parent" and not self.fork_from:
            raise ValueError("fork_position: parent needs fork_from: RUN@step")
        if self.guard.rollback is not None:
            bad = self.guard.max_skipped_steps + self.guard.rollback.skip_steps_before
            needed = -(-bad // self.checkpoint.save_every_steps) + 1
            if self.checkpoint.keep_last < needed:
                raise ValueError(
                    f"checkpoint.keep_last: {self.checkpoint.keep_last}, but a rollback goes back over up to {bad} bad "
                    f"steps: expected at least {needed}, or a larger checkpoint.save_every_steps"
                )
        return self

    @property
    def batch_seqs(self) -> int:
        """Sequences per step, once a ramp is over: `batch_tokens` rounded down to whole ones."""
        return self.batch_tokens // self.data.seq_tokens

    def step_pieces(self, from_sample: int) -> list[tuple[int, int]]:
        """(sample, sequences per step) from `from_sample` on, where a step begins."""
        if self.batch_ramp is None:
            return [(from_sample, self.batch_seqs)]
        return step_pieces(self.batch_ramp.stages(self.data.seq_tokens, self.batch_seqs), from_sample)

    @property
    def micro_batch_rows(self) -> int:
        """`micro_batch_seqs` as a number; an attempt has put one in the place of `fit` (pretrain/fit.py)."""
        assert self.micro_batch_seqs != "fit", "an attempt knows how many sequences fit"
        return self.micro_batch_seqs

    def identity(self) -> dict[str, Any]:
        """The fields that a resume may not change, by dotted path."""
        flat = configs.flatten(self.model_dump(mode="json"))
        return {
            path: value
            for path, value in flat.items()
            if field_class(path) == "identity" and not (path in ADDED and value == ADDED[path])
        }


def load_run(path: Path, overrides: list[str] | None = None) -> TrainRun:
    """The run of a config file or of a run folder, its paths absolute; a run folder may have been moved.

    Raises ConfigError.
    """
    source = path / "run.yaml" if path.is_dir() else path
    if path.is_dir() and not source.is_file():
        raise ConfigError(f"{path}: no run.yaml: not a run folder")
    run = configs.load(TrainRun, source, overrides or [])
    tree = run.model_dump() | ({"run_folder": path} if path.is_dir() else {})
    return configs.build(TrainRun, configs.absolute(tree), str(source))


def begun_run(path: Path) -> TrainRun:
    """The run of a config file or a run folder as it was begun, for a look at its data from any machine.

    Where the data lie is what a config says; what they are, and all of the course, is what RUN/run.yaml says. The
    cache is the training nodes' own, and left out. Raises ConfigError.
    """
    given = load_run(path)
    begun = (given.run_folder / "run.yaml").is_file()
    run = found_at(load_run(given.run_folder), given) if begun else given
    return run.model_copy(update={"data": run.data.model_copy(update={"cache": None})})


def found_at(recorded: TrainRun, given: TrainRun) -> TrainRun:
    """A recorded run whose data lie where another configuration of it says: the free fields of its `data`."""
    tree, theirs = recorded.model_dump(mode="json"), given.model_dump(mode="json")["data"]
    for key in theirs.keys() - {"sources"}:
        if field_class(f"data.{key}") == "free":
            tree["data"][key] = theirs[key]
    for name in tree["data"]["sources"].keys() & theirs["sources"].keys():
        for key, value in theirs["sources"][name].items():
            if field_class(f"data.sources.{name}.{key}") == "free":
                tree["data"]["sources"][name][key] = value
    return configs.build(TrainRun, tree, str(recorded.run_folder))
