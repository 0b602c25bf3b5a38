"""`pretrain trace`: which documents a step sees, and which steps see a document. Steps are numbered as in the log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from configs import ConfigError
from data_pipeline.find import Held
from data_pipeline.order import Ints, Withdrawal, cut
from data_pipeline.stream import Corpora
from data_pipeline.trace import Seen, documents_in
from pretrain import checkpoint, withdrawn
from pretrain.run import TrainRun
from pretrain.segments import Course, Segments, first_segment, plan_course
from pretrain.track.journal import last_steps, lineage, live_records, read_journal

State = Literal["fed", "planned", "skipped"]


@dataclass(frozen=True)
class Stretch(Seen):
    """What a sample of a step holds of a document, and what becomes of the sample."""

    rank: int
    state: State


@dataclass(frozen=True)
class Sighting:
    """A sample of a step that holds some of a document."""

    step: int
    epoch: int
    sample: int
    first_token: int  # of the document
    end_token: int  # behind the last one
    state: State


@dataclass(frozen=True)
class Traced:
    """A document, and the steps that see it until the run ends."""

    source: str
    id: str
    uri: str
    split: str
    tokens: int  # with <|endoftext|>
    sightings: list[Sighting] = field(default_factory=list)


def course_of(run: TrainRun) -> Course:
    """The course of a run, or the one that it would begin."""
    records = Segments(run.run_folder).read()
    return plan_course(run, records or [first_segment(run, Corpora(run.data))])


def trained_steps(run_folder: Path) -> int:
    """How many steps the live lineage has trained."""
    steps = [
        record.step for record in live_records(read_journal(run_folder), lineage(run_folder)) if record.type == "step"
    ]
    names = (checkpoint.NAME.fullmatch(path.name) for path in checkpoint.live_checkpoints(run_folder))
    return max([0, *steps, *(int(match[1]) for match in names if match)])


def ranks_at(run_folder: Path, step: int) -> int:
    """On how many ranks a step was trained, or would be where nothing changes."""
    alive, ranks = last_steps(lineage(run_folder)), 1
    for record in read_journal(run_folder):
        if record.type == "attempt" and record.branch in alive and record.step < step:
            ranks = int(record.fields.get("world_size") or 1)
    return ranks


def trace_step(run: TrainRun, step: int, rank: int | None = None, ranks: int | None = None) -> list[Stretch]:
    """What a step sees, or one of its ranks. Raises ConfigError for a step or rank that there is not."""
    course = course_of(run)
    if not 1 <= step <= course.end_step:
        raise ConfigError(f"--step {step}: this run has the steps 1 to {course.end_step}")
    ranks = ranks or ranks_at(run.run_folder, step)
    if rank is not None and not 0 <= rank < ranks:
        raise ConfigError(f"--rank {rank}: step {step} has the ranks 0 to {ranks - 1}; --ranks says otherwise")
    samples = np.arange(course.steps.start(step - 1), course.steps.start(step))
    shares = [cut(samples, course.order.lanes, r, ranks) for r in range(ranks)]
    rank_of = {sample: r for r, share in enumerate(shares) for sample in share.tolist()}
    skipped = set(samples[course.skips.mask(samples)].tolist())
    state: State = "fed" if step <= trained_steps(run.run_folder) else "planned"
    chosen = samples if rank is None else np.sort(shares[rank])
    shards = course.corpora.shards(course.order.pools)
    try:
        seen = documents_in(course.order, shards, chosen, run.data.seq_tokens)
    finally:
        for each in shards:
            each.close()
    return [
        Stretch(**vars(each), rank=rank_of[each.sample], state="skipped" if each.sample in skipped else state)
        for each in seen
    ]


def trace_document(run: TrainRun, id: str) -> list[Traced]:
    """Where a run sees the documents of an id, which may have its source in front. Raises ConfigError for none."""
    course = course_of(run)
    generations: dict[str, int] = {}
    for pool in course.order.pools:
        generations[pool.source] = max(generations.get(pool.source, 0), pool.generation + 1)
    found = list(withdrawn.documents(course.corpora, generations, [id], checked=False))
    if not found:
        raise ConfigError(f"--doc {id}: no such document in {', '.join(generations)}; an id may be SOURCE:ID")
    trained = trained_steps(run.run_folder)
    return [
        Traced(source, held.id, held.uri, held.split, held.tokens, list(_sightings(course, source, held, trained)))
        for source, held in found
    ]


def _sightings(course: Course, source: str, held: Held, trained: int) -> Iterator[Sighting]:
    length = course.runs[0][1].data.seq_tokens
    pool = [(p.source, p.generation) for p in course.order.pools].index((source, held.generation))
    rows = course.order.pools[pool].rows
    places = held.samples(length, rows * length)
    if held.split != "train" or not len(places):
        return
    numbers = numbers_of(
        course, [{(source, held.generation): np.array([[places.start, places.stop]])}], course.end_sample
    )
    at, skipped = course.order.locate(numbers), course.skips.mask(numbers)
    for number, epoch, block, row, skip in zip(
        numbers.tolist(), at.epoch.tolist(), at.block.tolist(), at.row.tolist(), skipped.tolist(), strict=True
    ):
        begin = ((block - held.block) * rows + row) * length - held.start  # of the sample, in the document
        step = course.steps.step_of(number) + 1
        state: State = "skipped" if skip else "fed" if step <= trained else "planned"
        yield Sighting(step, epoch, number, max(begin, 0), min(begin + length + 1, held.tokens), state)


def numbers_of(course: Course, ranges: Sequence[withdrawn.Ranges], until: int) -> Ints:
    """The numbers below `until` under which a course deals samples of the pools, of every epoch."""
    pools = {(pool.source, pool.generation): i for i, pool in enumerate(course.order.pools)}
    found = [
        Withdrawal(0, {pools[key]: spans for key, spans in each.items() if key in pools}).numbers(course.order, until)
        for each in ranges
    ]
    return np.unique(np.concatenate([np.zeros(0, np.int64), *found]))


def fed_steps(course: Course, ranges: Sequence[withdrawn.Ranges], until: int) -> list[int]:
    """The steps before sample `until` that have fed any of these samples."""
    numbers = numbers_of(course, ranges, until)
    fed = numbers[~course.skips.mask(numbers)]
    return sorted({course.steps.step_of(number) + 1 for number in fed.tolist()})
