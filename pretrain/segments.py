"""The course of a run: its configuration, and what was amended from which sample on; the order that follows from it.

`segments/0.json` is written at the start and holds what was chosen then (lanes) and found then (the generations of each
source and their hashes). `pretrain amend` adds `segments/<n>.json`: {from_sample, what changes}. The past is never
re-ordered: every segment's cursors follow from where it begins.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from configs import ConfigError, absolute, build, canonical_json, differences
from data_pipeline import order
from data_pipeline.order import Exhausted, Order, Pool, Segment, Skips, Steps, Withdrawal, choose_lanes
from data_pipeline.stream import Corpora
from pretrain.fields import field_class
from pretrain.lineage import create_exclusively
from pretrain.withdrawn import Ranges, Withdrawn, merged, size

if TYPE_CHECKING:
    from pretrain.run import TrainRun

FORMAT_VERSION = 2  # 1 where nothing was withdrawn: that code reads it
GROUP_BLOCKS_PER_SEQUENCE = 8  # of a lane in a step: steps in a row are then mixed as the defaults mix them
WARN_STEPS = 100  # so long before a source has had its epochs, it is said once more


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
    format: int = 1
    order_version: int = order.VERSION
    skips: list[tuple[int, int]] = field(default_factory=list)
    withdrawn: Withdrawn | None = None


class Segments:
    """The segment records of a run folder."""

    def __init__(self, run_folder: Path) -> None:
        self.folder = run_folder / "segments"

    def read(self) -> list[SegmentRecord]:
        """Every record, in order."""
        paths = sorted(self.folder.glob("[0-9]*.json"), key=lambda path: int(path.stem))
        return [_read(path) for path in paths]

    def write(self, record: SegmentRecord) -> None:
        """Commit a record. Raises ConfigError where another start has just written it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{record.segment}.json"
        tree = asdict(record)
        if record.withdrawn is None:
            del tree["withdrawn"]
        else:
            record.withdrawn.copy_to(self.folder)  # from a parent's records
            del tree["withdrawn"]["folder"]
        tree["format"] = 1 if record.withdrawn is None else FORMAT_VERSION
        if not create_exclusively(path, tree):
            raise ConfigError(f"{path}: has just been written by another command; try again")

    def clear(self) -> None:
        """Forget what a start that never took a branch left."""
        for pattern in ("[0-9]*.json", "withdrawn-*.parquet", "takedown-*.txt"):
            for path in self.folder.glob(pattern):
                path.unlink()


def _read(path: Path) -> SegmentRecord:
    record = json.loads(path.read_text())
    if record["format"] > FORMAT_VERSION:
        raise ConfigError(
            f"{path}: format {record['format']} is newer than this code's {FORMAT_VERSION}; update longhaul"
        )
    if record["order_version"] != order.VERSION:
        raise ConfigError(
            f"{path}: this run has samples in order {record['order_version']}, this code deals them in order "
            f"{order.VERSION}; go on with the code that began it"
        )
    if "withdrawn" in record:
        record["withdrawn"] = Withdrawn(**record["withdrawn"], folder=str(path.parent))
    return SegmentRecord(**record)


def first_segment(run: TrainRun, corpora: Corpora) -> SegmentRecord:
    """What is chosen and found when a run begins."""
    _check_schedule(run)
    generations = {name: _generations(run, corpora, name) for name in run.data.sources}
    pools = corpora.pools(generations)
    lanes = run.data.lanes or choose_lanes([pool.blocks for pool in pools], run.batch_seqs)
    return SegmentRecord(0, 0, [], generations, corpora.identities(generations), lanes, corpora.tokenizer_sha256)


def amended_segment(
    run: TrainRun, records: Sequence[SegmentRecord], changes: Sequence[str], from_sample: int
) -> tuple[SegmentRecord, TrainRun]:
    """The record that makes `changes` from a sample on, checked, and the configuration that follows.

    The record holds what the changes mean now: files of sections read, paths absolute.
    """
    if from_sample < records[-1].from_sample:
        raise ConfigError(
            f"the run was amended from sample {records[-1].from_sample} on, and its newest checkpoint is at sample "
            f"{from_sample}; train beyond that first"
        )
    amended = configured(run, [*records, replace(records[-1], changes=list(changes))])
    amended = build(type(run), absolute(amended.model_dump()), "amended run")
    _check_amendable(run, configured(run, records), amended)
    _check_schedule(amended)
    changes = [settled(change.partition("=")[0], amended) for change in changes]
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
    withdrawn: list[tuple[int, Ranges]] = field(default_factory=list)  # (from_sample, what is not fed from there on)
    epochs: list[tuple[int, str]] = field(default_factory=list)  # step after which a source has had its own; a line

    def at(self, step: int) -> TrainRun:
        """The configuration in force in a step."""
        sample = self.steps.start(step)
        return next(run for from_sample, run in reversed(self.runs) if from_sample <= sample)

    def tokens(self, step: int) -> int:
        """Tokens consumed before a step: its start, less what was skipped."""
        sample = self.steps.start(step)
        return (sample - self.skips.before(sample)) * self.runs[0][1].data.seq_tokens

    @property
    def end_sample(self) -> int:
        """The first sample that no step takes."""
        return self.steps.start(self.end_step)

    def warnings(self, step: int, first: bool = False) -> list[str]:
        """Which sources are about to have had their epochs: of all steps to come at the first step of an attempt, and
        later `WARN_STEPS` before and when it happens."""
        return [line for at, line in self.epochs if (step < at if first else step in (at - WARN_STEPS, at))]


def advice(course: Course) -> list[str]:
    """What a person may want to change before a run begins: its order is fixed from then on."""
    run, order = course.runs[0][1], course.order
    batch, blocks = run.batch_seqs, sum(pool.blocks for pool in order.pools)
    lines = []
    for source, drawn in order.drawn(batch).items():
        samples = sum(pool.blocks * pool.rows for pool in order.pools if pool.source == source)
        if drawn > samples:
            lines.append(
                f"source {source}: a step takes {drawn} sequences of it, and it has {samples}: some stand in the step "
                "more than once; give it more text or less weight, or take a smaller batch_tokens"
            )
    far = [name for name, manifest in course.corpora.manifests.items() if manifest.files.is_far]
    if far and run.data.cache is None and run.data.stage is None:
        lines.append(
            f"data.cache: not set, and the shards of {', '.join(far)} are far: each of a node's ranks fetches for "
            "itself, again in each epoch, and asks twice for each block; name a folder of the node's own disk"
        )
    per_lane = math.ceil(batch / order.lanes)
    wanted = min(GROUP_BLOCKS_PER_SEQUENCE * per_lane, blocks // order.lanes)
    if per_lane > 1 and wanted >= 2 * order.group_blocks:
        lines.append(
            f"data.group_blocks: a step takes up to {per_lane} sequences of each of its {order.lanes} lanes, so steps "
            f"in a row are as mixed as they can be from {wanted} on, not {order.group_blocks}, for "
            f"{wanted / order.group_blocks:.3g} times the memory of open blocks"
        )
    return lines


def plan_course(run: TrainRun, records: Sequence[SegmentRecord]) -> Course:
    """The course of a run under its records. Raises ConfigError where its shards or epochs do not allow it."""
    runs = [(r.from_sample, configured(run, records[: i + 1])) for i, r in enumerate(records)]
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
    steps = Steps(_step_pieces(runs))
    ranges = [(begin, end) for r in records for begin, end in r.skips]
    withdrawn = [(r.from_sample, r.withdrawn.ranges()) for r in records if r.withdrawn is not None]
    skips = Skips(ranges)
    end_step = 0
    # Skips follow from the order, the end from the skips, and in the order are the sources left out before the end.
    while (until := steps.step_of(_last_sample(last, skips)) + 1) > end_step:
        end_step = until
        drawn = _Drawn(run.seed, pools, record.lanes, last.data.group_blocks)
        for i, ((_, run_), r) in enumerate(zip(runs, records, strict=True)):
            exhausted = drawn.add(run_, r, records[i + 1].from_sample if r is not record else steps.start(end_step))
        order = drawn.order()
        if not withdrawn:
            break
        skips = Skips(ranges, order, _withdrawals(order, withdrawn))
        if exhausted is not None:
            break
    end_reason = f"train_tokens {last.train_tokens} reached"
    if exhausted is not None:
        if last.data.on_exhausted != "stop":
            raise _refusal(exhausted, last, record.generations, end_step, steps)
        end_step = steps.step_of(max(exhausted.sample, record.from_sample))
        end_reason = f"source {exhausted.source} reached its {last.data.sources[exhausted.source].max_epochs:g} epochs"
    had = [found for found in [*drawn.left_out, exhausted] if found is not None]
    epochs = [_epochs_line(found, last, record.generations, steps, end_step) for found in had]
    return Course(runs, order, steps, skips, corpora, record, end_step, end_reason, withdrawn, epochs)


def _withdrawals(order: Order, withdrawn: Sequence[tuple[int, Ranges]]) -> list[Withdrawal]:
    """What is withdrawn, by the pools of an order. Raises ConfigError where nothing is left to be fed at last."""
    pools = {(pool.source, pool.generation): i for i, pool in enumerate(order.pools)}
    found = [Withdrawal(begin, {pools[key]: spans for key, spans in ranges.items()}) for begin, ranges in withdrawn]
    for index in order.drawn_at_last():
        spans = [tuple(span) for w in found for span in w.ranges.get(index, np.zeros((0, 2), np.int64)).tolist()]
        if size(merged(spans)) < order.pools[index].blocks * order.pools[index].rows:
            return found
    raise ConfigError("takedown, skip_blocks: every sample of the sources that are drawn from would be skipped")


def _epochs_line(
    found: Exhausted, run: TrainRun, generations: Mapping[str, int], steps: Steps, end_step: int
) -> tuple[int, str]:
    step, epochs = steps.step_of(found.sample), run.data.sources[found.source].max_epochs
    then = "the run ends there" if run.data.on_exhausted == "stop" else "it is left out from there on"
    of = _of_generation(found, generations)
    return step, f"source {found.source}: its {epochs:g} epochs{of} end after step {step} of {end_step}; {then}"


def _of_generation(found: Exhausted, generations: Mapping[str, int]) -> str:
    """Which one has had its epochs, where a source has several; the source is left out with all of them."""
    return f" of generation {found.generation}" if generations[found.source] > 1 else ""


@dataclass
class _Drawn:
    """The segments of the order, put together record by record, so that no later limit touches the past."""

    seed: int
    pools: list[Pool]
    lanes: int
    group_blocks: int
    segments: list[Segment] = field(default_factory=list)
    rules: Any = None  # of the last record; the same ones again open no segment, so that the data stay as they were
    limits: dict[str, float] = field(default_factory=dict)  # epochs of the sources that are still drawn from
    left_out: list[Exhausted] = field(default_factory=list)  # by the last record

    def order(self) -> Order:
        return Order(self.seed, self.pools, self.lanes, self.group_blocks, self.segments)

    def add(self, run: TrainRun, record: SegmentRecord, until: int) -> Exhausted | None:
        """Add a record. With `reweight`, a source that has had its epochs before sample `until` is left out from there
        on; what is exhausted before `until` and cannot be left out is given back."""
        self.left_out.clear()
        sources = run.data.sources
        rules = ({n: (s.weight, s.max_epochs) for n, s in sources.items()}, record.generations, run.data.on_exhausted)
        if rules != self.rules:
            weights = {name: source.weight for name, source in sources.items()}
            self.segments.append(Segment(record.from_sample, weights, record.generations))
            self.limits = {name: s.max_epochs for name, s in sources.items() if s.max_epochs is not None and s.weight}
            self.rules = rules
        while (found := self.order().exhausted(self.limits)) is not None and found.sample < until:
            last = self.segments[-1]
            weights = {name: weight for name, weight in last.weights.items() if name != found.source}
            if run.data.on_exhausted != "reweight" or not any(weights.values()):
                return found
            self.segments.append(replace(last, from_sample=max(found.sample, last.from_sample), weights=weights))
            del self.limits[found.source]
            self.left_out.append(found)
        return None


def _step_pieces(runs: Sequence[tuple[int, TrainRun]]) -> list[tuple[int, int]]:
    """Those of each configuration, up to where the next one begins."""
    ends = [*(from_sample for from_sample, _ in runs[1:]), None]
    return [
        (sample, batch)
        for (from_sample, run), end in zip(runs, ends, strict=True)
        for sample, batch in run.step_pieces(from_sample)
        if end is None or sample < end
    ]


def _refusal(
    found: Exhausted, run: TrainRun, generations: Mapping[str, int], end_step: int, steps: Steps
) -> ConfigError:
    at, total = found.sample * run.data.seq_tokens, steps.start(end_step) * run.data.seq_tokens
    if run.data.on_exhausted == "reweight":
        remedy = "and no other source is left; raise it, lower train_tokens, or set data.on_exhausted to stop"
    else:
        remedy = "raise it, lower the source's weight, or set data.on_exhausted to stop or reweight"
    return ConfigError(
        f"data.sources.{found.source}.max_epochs: {run.data.sources[found.source].max_epochs:g} epochs"
        f"{_of_generation(found, generations)} are used up at token {at:,} of {total:,}; {remedy}"
    )


def _last_sample(run: TrainRun, skips: Skips) -> int:
    """The number of the sample with which `train_tokens` are consumed."""
    needed = -(-run.train_tokens // run.data.seq_tokens)
    samples = needed
    while (more := needed + skips.before(samples)) != samples:
        samples = more
    return samples - 1


def configured(run: TrainRun, records: Sequence[SegmentRecord]) -> TrainRun:
    """The run's configuration with the changes of all records."""
    changes = [change for record in records for change in record.changes]
    return build(type(run), run.model_dump(mode="json"), "amended run", changes) if changes else run


def _generations(run: TrainRun, corpora: Corpora, name: str) -> int:
    return run.data.sources[name].generations or len(corpora.manifests[name].generations)


def _check_schedule(run: TrainRun) -> None:
    """Raise ConfigError where the learning rate would jump. What has begun so is read on."""
    schedule = run.schedule
    if schedule.kind == "warmup_stable_decay" and schedule.warmup_tokens + schedule.cooldown_tokens > run.train_tokens:
        raise ConfigError(
            f"schedule: warmup_tokens {schedule.warmup_tokens} and cooldown_tokens {schedule.cooldown_tokens} overlap: "
            f"together they are more than train_tokens {run.train_tokens}"
        )


def _check_amendable(run: TrainRun, before: TrainRun, after: TrainRun) -> None:
    """Raise ConfigError where an amendment changes more than the course of the run."""
    for name in before.data.sources.keys() - after.data.sources.keys():
        raise ConfigError(f"data.sources.{name}: is part of this run and cannot be taken out; set its weight to 0")
    for line in differences(before.model_dump(mode="json"), after.model_dump(mode="json")):
        path = line.split(":")[0]
        section, _, name = path.rpartition(".")[0].rpartition(".")
        if section == "data.sources" and name not in run.data.sources:
            continue  # all of a source that came by amending goes by amending
        if (its_class := field_class(path)) != "segment":
            how = "is part of what this run is" if its_class == "identity" else "may be given at any start instead"
            raise ConfigError(f"{line}: cannot be amended: it {how}")


def settled(path: str, run: TrainRun) -> str:
    """A `key=value` with the value that the run has at a path."""
    value = run.model_dump(mode="json")
    for key in path.split("."):
        value = value[key]
    return f"{path}={canonical_json(value)}"


def _check_identities(records: Sequence[SegmentRecord], corpora: Corpora) -> None:
    """Refuse shards that are not those the run began with."""
    for record in records:
        for name, identities in record.identities.items():
            if name not in corpora.manifests:
                raise ConfigError(
                    f"data.sources.{name}: is part of this run and cannot be taken out; set its weight to 0"
                )
            found = [g["identity"] for g in corpora.manifests[name].generations[: len(identities)]]
            if found != identities:
                raise ConfigError(
                    f"data.sources.{name}.shards: {corpora.manifests[name].address} does not hold what this run began "
                    f"with: manifest {_short(identities)} -> {_short(found)}"
                )


def _short(identities: Sequence[Any]) -> str:
    return ",".join(str(i)[:12] for i in identities) or "nothing"
