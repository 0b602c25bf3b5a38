"""The course of a run: its configuration, and what was amended from which sample on; the order that follows from it.

`segments/0.json` is written at the start and holds what was chosen then (lanes) and found then (the generations of each
source and their hashes). `pretrain amend` adds `segments/<n>.json`: {from_sample, what changes}. The past is never
re-ordered: every segment's cursors follow from where it begins.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs import ConfigError, build
from data_pipeline.order import Exhausted, Order, Segment, Skips, Steps, choose_lanes
from data_pipeline.stream import Corpora
from pretrain.fields import field_class
from pretrain.lineage import create_exclusively

if TYPE_CHECKING:
    from pretrain.run import TrainRun

FORMAT_VERSION = 1


@dataclass(frozen=True)
class SegmentRecord:
    """A segment as it is kept. `changes` are the `key=value` of amend; generations and identities are by source."""

    segment: int
    from_sample: int
    changes: list[str]
    generations: dict[str, int]
    identities: dict[str, list[str]]
    lanes: int
    tokenizer_sha256: str
    format: int = FORMAT_VERSION
    skips: list[tuple[int, int]] = field(default_factory=list)


class Segments:
    """The segment records of a run folder."""

    def __init__(self, run_folder: Path) -> None:
        self.folder = run_folder / "segments"

    def read(self) -> list[SegmentRecord]:
        """Every record, in order."""
        paths = sorted(self.folder.glob("[0-9]*.json"), key=lambda path: int(path.stem))
        return [SegmentRecord(**json.loads(path.read_text())) for path in paths]

    def write(self, record: SegmentRecord) -> None:
        """Commit a record. Raises ConfigError where another start has just written it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{record.segment}.json"
        if not create_exclusively(path, asdict(record)):
            raise ConfigError(f"{path}: has just been written by another command; try again")

    def clear(self) -> None:
        """Forget what a start that never took a branch left."""
        for path in self.folder.glob("[0-9]*.json"):
            path.unlink()


def first_segment(run: TrainRun, corpora: Corpora) -> SegmentRecord:
    """What is chosen and found when a run begins."""
    generations = {name: _generations(run, corpora, name) for name in run.data.sources}
    pools = corpora.pools(generations)
    lanes = run.data.lanes or choose_lanes([pool.blocks for pool in pools], run.batch_seqs)
    return SegmentRecord(0, 0, [], generations, corpora.identities(generations), lanes, corpora.tokenizer_sha256)


def amended_segment(
    run: TrainRun, records: Sequence[SegmentRecord], changes: Sequence[str], from_sample: int
) -> tuple[SegmentRecord, TrainRun]:
    """The record that makes `changes` from a sample on, checked, and the configuration that follows."""
    for change in changes:
        path = change.partition("=")[0]
        its_class = _change_class(path)
        if its_class != "segment":
            how = "is part of what this run is" if its_class == "identity" else "may be given at any start instead"
            raise ConfigError(f"{path}: cannot be amended: it {how}")
    amended = _configured(run, [*records, replace(records[-1], changes=list(changes))])
    corpora = Corpora(amended.data)
    generations = {name: amended.data.sources[name].generations or records[-1].generations.get(name)
                   or len(corpora.manifests[name].generations) for name in amended.data.sources}  # fmt: skip
    for name, count in records[-1].generations.items():
        if name in generations and generations[name] < count:
            raise ConfigError(
                f"data.sources.{name}.generations: {generations[name]}, but {count} are in use; set its weight"
            )
    record = SegmentRecord(
        len(records), from_sample, list(changes), generations, corpora.identities(generations), records[-1].lanes,
        corpora.tokenizer_sha256,
    )  # fmt: skip
    return record, amended


@dataclass(frozen=True)
class Course:
    """All that is arithmetic about a run: which samples each step takes, where they lie, and where it ends."""

    runs: list[tuple[int, TrainRun]]  # (from_sample, the configuration in force from there)
    order: Order
    steps: Steps
    skips: Skips
    corpora: Corpora
    record: SegmentRecord  # the last one
    end_step: int
    end_reason: str

    def at(self, step: int) -> TrainRun:
        """The configuration in force in a step."""
        sample = self.steps.start(step)
        return next(run for from_sample, run in reversed(self.runs) if from_sample <= sample)

    def tokens(self, step: int) -> int:
        """Tokens consumed before a step: its start, less what was skipped."""
        sample = self.steps.start(step)
        return (sample - self.skips.before(sample)) * self.runs[0][1].data.seq_tokens


def plan_course(run: TrainRun, records: Sequence[SegmentRecord]) -> Course:
    """The course of a run under its records. Raises ConfigError where its shards or epochs do not allow it."""
    runs = [(r.from_sample, _configured(run, records[: i + 1])) for i, r in enumerate(records)]
    last, record = runs[-1][1], records[-1]
    corpora = Corpora(last.data)
    _check_identities(records, corpora)
    if corpora.vocab_size != last.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {last.model.vocab_size}, but the shards of {', '.join(last.data.sources)} were made "
            f"with a vocabulary of {corpora.vocab_size}; set model.vocab_size={corpora.vocab_size}"
        )
    everything = {name: max(r.generations.get(name, 0) for r in records) for r in records for name in r.generations}
    pools = corpora.pools(everything)
    segments = [
        Segment(r.from_sample, {n: s.weight for n, s in run_.data.sources.items()}, r.generations)
        for (_, run_), r in zip(runs, records, strict=True)
    ]
    steps = Steps([(from_sample, run_.batch_seqs) for from_sample, run_ in runs])
    skips = Skips([(begin, end) for r in records for begin, end in r.skips])
    end_step = steps.step_of(_last_sample(last, skips)) + 1
    end_reason = f"train_tokens {last.train_tokens} reached"
    limits = {name: s.max_epochs for name, s in last.data.sources.items() if s.max_epochs is not None}
    while True:
        order = Order(run.seed, pools, record.lanes, last.data.group_blocks, segments)
        found = order.exhausted(limits)
        if found is None or found.sample >= steps.start(end_step):
            break
        if last.data.on_exhausted == "reweight" and len(limits) < len(last.data.sources):
            segments = _without(segments, found)
            limits.pop(found.source)
            continue
        if last.data.on_exhausted != "stop":
            raise _refusal(found, last, end_step, steps)
        end_step = steps.step_of(found.sample)
        end_reason = f"source {found.source} reached its {limits[found.source]:g} epochs"
        break
    return Course(runs, order, steps, skips, corpora, record, end_step, end_reason)


def _without(segments: Sequence[Segment], found: Exhausted) -> list[Segment]:
    """The segments with a source left out from the sample on with which it is exhausted."""
    before = [s for s in segments if s.from_sample < found.sample]
    after = [replace(before[-1], from_sample=found.sample), *(s for s in segments if s.from_sample >= found.sample)]
    return before + [replace(s, weights={n: w for n, w in s.weights.items() if n != found.source}) for s in after]


def _refusal(found: Exhausted, run: TrainRun, end_step: int, steps: Steps) -> ConfigError:
    at, total = found.sample * run.data.seq_tokens, steps.start(end_step) * run.data.seq_tokens
    return ConfigError(
        f"data.sources.{found.source}.max_epochs: {run.data.sources[found.source].max_epochs:g} epochs are used up at "
        f"token {at:,} of {total:,}; raise it, lower the source's weight, or set data.on_exhausted to stop or reweight"
    )


def _last_sample(run: TrainRun, skips: Skips) -> int:
    """The number of the sample with which `train_tokens` are consumed."""
    needed = -(-run.train_tokens // run.data.seq_tokens)
    samples = needed
    while (more := needed + skips.before(samples)) != samples:
        samples = more
    return samples - 1


def _configured(run: TrainRun, records: Sequence[SegmentRecord]) -> TrainRun:
    """The run's configuration with the changes of all records."""
    changes = [change for record in records for change in record.changes]
    return build(type(run), run.model_dump(mode="json"), "amended run", changes) if changes else run


def _generations(run: TrainRun, corpora: Corpora, name: str) -> int:
    return run.data.sources[name].generations or len(corpora.manifests[name].generations)


def _change_class(path: str) -> str:
    try:
        return field_class(path)
    except KeyError:
        return "segment" if path.startswith("data.sources") else "unknown"


def _check_identities(records: Sequence[SegmentRecord], corpora: Corpora) -> None:
    """Refuse shards that are not those the run began with."""
    for record in records:
        for name, identities in record.identities.items():
            if name not in corpora.manifests:
                raise ConfigError(
                    f"data.sources.{name}: drawn from before sample {record.from_sample}; keep it, weight 0"
                )
            found = [g["identity"] for g in corpora.manifests[name].generations[: len(identities)]]
            if found != identities:
                raise ConfigError(
                    f"data.sources.{name}.shards: {corpora.manifests[name].folder} does not hold what this run began "
                    f"with: manifest {_short(identities)} -> {_short(found)}"
                )


def _short(identities: Sequence[Any]) -> str:
    return ",".join(str(i)[:12] for i in identities) or "nothing"
