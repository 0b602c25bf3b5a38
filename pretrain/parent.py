"""Where a new run's weights come from when they are not random: `fork_from` and `init_from`.

    fork_from: RUN@step           weights and optimizer; position 0 of its own order, or on with the parent's
    init_from: RUN@step           weights alone, position 0
               models:/NAME@alias the same of a checkpoint in MLflow's registry
               FOLDER             the same of a GPT-2 or GPT-1 as Hugging Face keeps it: config.json, model.safetensors

RUN@step may also be the path of a checkpoint, as `.../checkpoints/step-1000.b1`. The parent is read once, at the start;
it is recorded in the branch's record, and the run goes on with its own checkpoints from then on.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import configs
from configs import ConfigError
from data_pipeline.progress import Count
from data_pipeline.stream import Corpora
from pretrain import checkpoint
from pretrain.checkpoint import Committed, Damaged, Position
from pretrain.engine import Engine, State
from pretrain.engine.state import put
from pretrain.fields import field_class
from pretrain.models.hugging_face import OURSELVES, read_config, read_folder, weight_files
from pretrain.models.weights import initial_value, matched
from pretrain.ranks import Ranks
from pretrain.run import TrainRun, load_run
from pretrain.segments import FORMAT_VERSION, SegmentRecord, Segments, configured, first_segment, settled
from pretrain.withdrawn import Found, find

log = logging.getLogger("pretrain")

ORIGIN = Position(0, 0, 0, "0" * 32)


@dataclass(frozen=True)
class Parent:
    """What a new run begins from."""

    kind: Literal["fork", "init"]
    name: str  # as the run's config says it
    folder: Path  # of a checkpoint, or of a model of Hugging Face's
    hash: str  # of the checkpoint's manifest, or sha256 over the model's files
    position: Position  # at which the new run begins
    step: int | None  # of the parent, where it has steps

    @property
    def record(self) -> dict[str, Any]:
        """What the lineage keeps of it."""
        return {"kind": self.kind, "name": self.name, "folder": str(self.folder), "hash": self.hash, "step": self.step}

    @property
    def why(self) -> str:
        """What the branch that begins with it is there for."""
        return f"{self.kind} from {self.name}"


def find_parent(run: TrainRun) -> Parent | None:
    """The parent that a run names, checked against it; None where it names none. Raises ConfigError."""
    if run.fork_from is not None:
        committed = find_checkpoint(run.fork_from, "fork_from")
        _check_model(committed, run, "fork_from", run.fork_from)
        position = committed.position if run.fork_position == "parent" else ORIGIN
        return Parent(
            "fork", run.fork_from, committed.folder, committed.manifest_hash, position, committed.position.step
        )
    if run.init_from is None:
        return None
    if (Path(run.init_from) / "config.json").is_file():
        folder = Path(run.init_from)
        _check_folder(folder, run)
        return Parent("init", run.init_from, folder, _files_hash(weight_files(folder)), ORIGIN, None)
    committed = _registered(run, run.init_from) if _is_model(run.init_from) else find_checkpoint(run.init_from)
    _check_model(committed, run, "init_from", run.init_from)
    return Parent("init", run.init_from, committed.folder, committed.manifest_hash, ORIGIN, committed.position.step)


def find_checkpoint(name: str, field: str = "init_from") -> Committed:
    """The checkpoint of RUN@step, of RUN (its newest) or of its path. Raises ConfigError, with `field` in front."""
    path = Path(name)
    if checkpoint.NAME.fullmatch(path.name) and path.is_dir():
        return _opened(path, f"{field}: {name}")
    run_name, at, step = name.rpartition("@")
    home = Path(run_name if at else name)
    if not home.exists():
        raise ConfigError(f"{field}: {name}: no such run: {home} does not exist")
    if home.is_file() and home.suffix != ".yaml":
        raise ConfigError(f"{field}: {name}: not a checkpoint of a run; expected RUN@step or its folder")
    if home.is_dir() and not (home / "run.yaml").is_file():
        raise ConfigError(f"{field}: {name}: neither a run, nor a checkpoint of one: {home} holds no run.yaml")
    folder = load_run(home).run_folder
    found = [(s, path) for s, path in _by_step(folder) if not at or str(s) == step]
    if not found:
        steps = ", ".join(str(s) for s, _ in reversed(_by_step(folder))) or "none"
        raise ConfigError(f"{field}: {name}: {folder} has no such checkpoint; there are: {steps}")
    return _opened(found[0][1], f"{field}: {name}")


def first_records(run: TrainRun, parent: Parent | None) -> list[SegmentRecord]:
    """The segment records with which a new run begins: those of its parent where it goes on at its position."""
    if parent is None or parent.kind == "init" or run.fork_position == "fresh":
        return [first_segment(run, Corpora(run.data))]
    return _parent_s_records(run, checkpoint.open_checkpoint(parent.folder, parent.hash))


def carry_takedowns(run: TrainRun, parent: Parent, records: list[SegmentRecord]) -> list[SegmentRecord]:
    """The records of a new run, which feed nothing that was taken down in its parent, at whatever step of it.

    Files of what is withdrawn are written into the run's folder. Raises ConfigError, ShardError.
    """
    if parent.step is None:
        return records
    theirs = Segments(parent.folder.parents[1]).read()
    known = {id for record in records if record.withdrawn is not None for id in record.withdrawn.ids()}
    ids = [id for record in theirs if record.withdrawn is not None for id in record.withdrawn.ids() if id not in known]
    if not ids:
        return records
    last, corpora = records[-1], Corpora(configured(run, records).data)
    found = find(corpora, last.generations, [], ids) or Found([], {}, [], [], {}, [])
    what = f"{len(found.held)} documents of {len(ids)} ids taken down in {parent.name}"
    withdrawn = replace(found, what=[what], ids=ids).write(run.run_folder / "segments")
    log.info("%s: are not fed in this run either", what)
    if last.from_sample < parent.position.samples or last.withdrawn is not None:
        last = replace(
            last, segment=len(records), from_sample=parent.position.samples, changes=[], skips=[], withdrawn=None
        )
        records = [*records, last]
    return [*records[:-1], replace(last, withdrawn=withdrawn, format=FORMAT_VERSION)]


def give_first_values(engine: Engine, run: TrainRun, parent: Parent | None, ranks: Ranks) -> None:
    """Fill an engine with what a run begins with. Every rank raises the same ConfigError.

    Random values of its own; the weights that `init_from` names; the weights and moments that `fork_from` names.
    """
    state, problem = engine.state(), None
    try:
        if parent is None:
            values = _random_values(engine.module, state, run.seed, ranks)
            put(state, matched(state.shapes, values, "initial values"))
        elif parent.kind == "init":
            put(state, matched(state.shapes, read_values(run, parent), f"load {parent.folder.name}"))
        else:
            with Count(ranks.rank == 0) as count:
                checkpoint.load(checkpoint.open_checkpoint(parent.folder, parent.hash), state, count)
    except (Damaged, ValueError) as error:
        problem = str(error)
    for found in ranks.gather(problem):
        if found is not None:
            assert parent is not None
            raise ConfigError(f"{parent.kind}_from: {parent.name}: {found}")
    engine.loaded(state)


def read_values(run: TrainRun, parent: Parent) -> Iterator[tuple[str, Tensor]]:
    """(name, fp32 tensor of its full shape) of what `init_from` names. Raises Damaged, ValueError."""
    if parent.step is None:
        return read_folder(parent.folder, run.model)
    return checkpoint.read_weights(checkpoint.open_checkpoint(parent.folder, parent.hash))


def _random_values(model: Any, state: State, seed: int, ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's initial value, on every rank; each matrix is drawn by one of them, several at a time."""
    matrices = [name for name, shape in state.shapes.items() if len(shape) > 1]
    for begin in range(0, len(matrices), ranks.size):
        together = matrices[begin : begin + ranks.size]
        mine = [initial_value(model, name, state.shapes[name], seed) for name in together[ranks.rank :][:1]]
        for source, name in enumerate(together):
            value = mine.pop() if source == ranks.rank else torch.empty(state.shapes[name])
            yield name, ranks.spread(value.to(ranks.device), source)
    for name, shape in state.shapes.items():
        if len(shape) < 2:
            yield name, initial_value(model, name, shape, seed)


def check_same_parent(recorded: TrainRun, run: TrainRun) -> None:
    """Refuse another parent than the one a run has begun from. One that is no longer named is no matter."""
    for field in ("fork_from", "init_from"):
        named, begun = getattr(run, field), getattr(recorded, field)
        if named not in (None, begun):
            raise ConfigError(
                f"{field}: {named}, but {run.run_folder} has begun from {begun or 'random weights'}; give another "
                f"run_folder to start a new run"
            )


def _by_step(run_folder: Path) -> list[tuple[int, Path]]:
    """The live checkpoints of a run with their steps, newest first."""
    matches = [(checkpoint.NAME.fullmatch(path.name), path) for path in checkpoint.live_checkpoints(run_folder)]
    return [(int(match[1]), path) for match, path in matches if match]


def _opened(folder: Path, where: str) -> Committed:
    try:
        return checkpoint.open_checkpoint(folder)
    except Damaged as error:
        raise ConfigError(f"{where}: {error}") from None


def _is_model(name: str) -> bool:
    return name.startswith("models:/")


def _registered(run: TrainRun, name: str) -> Committed:
    """The checkpoint that a model in MLflow's registry stands for."""
    from pretrain.track.mlflow import find_model

    if not run.track:
        raise ConfigError(f"init_from: {name}: `track` names no MLflow in whose registry to look")
    try:
        path, manifest_hash = find_model(run.track[0], name)
        return checkpoint.open_checkpoint(path, manifest_hash)
    except (Damaged, LookupError) as error:
        raise ConfigError(f"init_from: {name}: {error.args[0]}") from None


def _check_folder(folder: Path, run: TrainRun) -> None:
    """Refuse weights of another architecture, or of an export of ours with another tokenizer. Reads no weights."""
    try:
        read_folder(folder, run.model)
    except ValueError as error:
        raise ConfigError(f"init_from: {folder}: {error}") from None
    theirs = read_config(folder).get(OURSELVES, {}).get("tokenizer_sha256")
    ours = Corpora(run.data).tokenizer_sha256
    if theirs not in (None, ours):
        raise ConfigError(f"init_from: {folder}: the models differ: tokenizer: {theirs[:12]} -> {ours[:12]}")


def _check_model(committed: Committed, run: TrainRun, field: str, name: str) -> None:
    """Refuse weights of another architecture or tokenizer, with the differences; dropout may be another."""

    def kept(identity: dict[str, Any]) -> dict[str, Any]:
        sections = ("model.", "optim.kind") if field == "fork_from" else ("model.",)
        return {k: v for k, v in identity.items() if k.startswith(sections) and k != "model.dropout"}

    lines = configs.differences(kept(committed.manifest["identity"]), kept(run.identity()))
    if field == "fork_from" and run.fork_position == "parent":
        lines = configs.differences(committed.manifest["identity"], run.identity())
    theirs, ours = _tokenizer(committed), Corpora(run.data).tokenizer_sha256
    if theirs is not None and theirs != ours:
        lines.append(f"tokenizer: {theirs[:12]} -> {ours[:12]}")
    if lines:
        raise ConfigError(f"{field}: {name}: the models differ: {'; '.join(lines)}")


def _tokenizer(committed: Committed) -> str | None:
    """The sha256 of the tokenizer that a checkpoint's run was fed with; None where nothing tells."""
    records = Segments(committed.folder.parents[1]).read()
    return committed.manifest.get("tokenizer") or (records[0].tokenizer_sha256 if records else None)


def _parent_s_records(run: TrainRun, committed: Committed) -> list[SegmentRecord]:
    """The parent's records up to its checkpoint; and, where the run's course is another from there on, one of its own.

    The run's own config is what it is configured with at last: record 0 changes it to what its parent began with.
    """
    home = committed.folder.parents[1]
    if not (home / "run.yaml").is_file():
        raise ConfigError(f"fork_from: {run.fork_from}: no run.yaml in {home}: its order is not known; fork afresh")
    theirs = load_run(home)
    records = Segments(home).read()[: committed.manifest["segments"]]
    courses = [configured(theirs, records[: i + 1]) for i in range(len(records))]
    if run.data.sources.keys() != courses[-1].data.sources.keys():
        raise ConfigError(
            f"fork_from: {run.fork_from}: fork_position=parent needs the parent's sources "
            f"{', '.join(courses[-1].data.sources)}, got {', '.join(run.data.sources)}; set weights, or fork afresh"
        )
    paths = _segment_differences(courses, run)
    if not paths:
        return records
    first = replace(records[0], changes=[settled(path, courses[0]) for path in paths])
    last = replace(
        records[-1], segment=len(records), from_sample=committed.position.samples,
        changes=[settled(path, run) for path in paths], skips=[], withdrawn=None,
    )  # fmt: skip
    return [first, *records[1:], last]


def _segment_differences(courses: Sequence[TrainRun], run: TrainRun) -> list[str]:
    """The paths of the course in which a run differs from any of those before; the schedule is one."""
    lines = {
        line.split(":")[0]
        for course in courses
        for line in configs.differences(course.model_dump(mode="json"), run.model_dump(mode="json"))
    }
    paths = {path for path in lines if field_class(path) == "segment"}
    return sorted({"schedule" if path.startswith("schedule.") else path for path in paths})


def _files_hash(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
