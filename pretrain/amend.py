"""`pretrain amend`: commit a segment that begins with the first step after the newest checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from configs import ConfigError
from data_pipeline.failpoints import fail_at
from data_pipeline.stream import Corpora
from pretrain import checkpoint, withdrawn
from pretrain.checkpoint import Committed, Damaged
from pretrain.lineage import AMEND, Lineage
from pretrain.run import TrainRun, begun_run
from pretrain.segments import FORMAT_VERSION, SegmentRecord, Segments, amended_segment, plan_course
from pretrain.trace import fed_steps
from pretrain.track.journal import branch_files, records_of

MOST_IDS = 20  # that are named


def amend(run: Path, changes: Sequence[str], tell: Callable[[str], None] = lambda _: None) -> SegmentRecord:
    """Amend a run of which no attempt is running: one that is will find itself taken over, and stop.

    `changes` are `key=value` of its course, `takedown=FILE` and `skip_blocks=SOURCE:GENERATION:BLOCK[-BLOCK]`. `tell`
    is given lines on what was withdrawn. Raises ConfigError where a change is not one of course, or the run cannot go
    on with it.
    """
    loaded = begun_run(run)
    folder = loaded.run_folder
    committed = _newest(folder, tell)
    records = Segments(folder).read()
    of_course, withdrawing = withdrawn.split(changes)
    record, amended = amended_segment(loaded, records, of_course, committed.position.samples)
    record = _withdrawing(record, records, amended, withdrawing, loaded, tell)
    try:
        course = plan_course(loaded, [*records, record])
        if course.end_step < committed.position.step:
            raise ConfigError(
                f"train_tokens: {amended.train_tokens}, but {committed.position.samples * loaded.data.seq_tokens} are "
                f"trained, at step {committed.position.step}; expected at least these, with which the run ends there"
            )
    except ConfigError:
        if record.withdrawn is not None:
            record.withdrawn.remove(unless={name for r in records if r.withdrawn for name in r.withdrawn.files})
        raise
    if (at_work := _at_work(folder, committed.position.step)) is not None:
        tell(at_work)
    lineage = Lineage(folder)
    mine = _take(lineage, committed)
    fail_at("amend.taken")
    Segments(folder).write(record)
    if lineage.highest() > mine:  # an attempt that began in between may not have read the record: it is taken over
        _take(lineage, committed)
    return record


def _take(lineage: Lineage, committed: Committed) -> int:
    return lineage.take(committed.branch, committed.position.step, committed.manifest_hash, AMEND).branch


def _at_work(run_folder: Path, step: int) -> str | None:
    """A line on the newest attempt where it has not written its end, and on its steps since the checkpoint."""
    branch = max(Lineage(run_folder).branches().values(), key=lambda each: each.branch)
    path = branch_files(run_folder).get(branch.branch)
    if branch.why == AMEND or path is None:
        return None
    last = step
    for record, _ in records_of(path, 0):
        if record.type == "end":
            return None
        last = max(last, record.step)
    lost = f", and its steps {step + 1} to {last} are trained again" if last > step else ""
    return f"the attempt on {branch.host} (pid {branch.pid}) has not ended: where it still runs, it stops{lost}"


def _newest(run_folder: Path, tell: Callable[[str], None]) -> Committed:
    """The newest live checkpoint whose manifest is whole, from which the next attempt goes on."""
    for path in checkpoint.live_checkpoints(run_folder):
        try:
            return checkpoint.open_checkpoint(path)
        except Damaged as error:
            tell(str(error))
    raise ConfigError(f"{run_folder}: no checkpoint to amend from; a run that has not begun is changed in its config")


def _withdrawing(
    record: SegmentRecord,
    records: Sequence[SegmentRecord],
    amended: TrainRun,
    changes: Sequence[str],
    run: TrainRun,
    tell: Callable[[str], None],
) -> SegmentRecord:
    """The record with what it withdraws: what is asked for, and of what is added, what was taken down before."""
    earlier = [id for r in records if r.withdrawn is not None for id in r.withdrawn.ids()]
    if not changes and (not earlier or record.generations == records[-1].generations):
        return record
    corpora = Corpora(amended.data)
    found = withdrawn.find(corpora, record.generations, changes, earlier, records[-1].generations)
    if found is None:
        return record
    if found.unknown:
        more = f" and {len(found.unknown) - MOST_IDS} more" if len(found.unknown) > MOST_IDS else ""
        named = ", ".join(found.unknown[:MOST_IDS])
        tell(f"in no source of this run: {named}{more}; sought again in what is added later")
    kept = found.write(run.run_folder / "segments")
    if found.held:
        unfed = sum(document.split != "train" for _, document in found.held)
        course = plan_course(run, records)
        steps = fed_steps(course, [found.of_documents], record.from_sample)
        samples = sum(withdrawn.size(ranges) for ranges in found.of_documents.values())
        tell(_told(len(found.held), unfed, samples, steps))
    return replace(record, withdrawn=kept, format=FORMAT_VERSION)


def _told(documents: int, unfed: int, samples: int, steps: Sequence[int]) -> str:
    """What a takedown comes to, as a line."""
    seen = f"some were fed in {len(steps)} steps, from {steps[0]} to {steps[-1]}" if steps else "none was ever fed"
    more = f", {unfed} of them in validation text, which is not trained on" if unfed else ""
    return f"{documents} documents{more}; of their {samples} samples {seen}; see pretrain trace RUN --doc ID"
