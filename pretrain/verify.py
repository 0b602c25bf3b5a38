"""Is what a run has kept what it has seen? Every byte of every checkpoint, and the chain of digests.

A checkpoint's digest (of every sample fed before it) must be the one that the journal has at its step; step, samples
and tokens must grow along the lineage; a branch must begin at the very checkpoint that its record names. `deep` reads
the data again, in any number of processes, and adds their digests up between each two live checkpoints, and between any
two places at which the journal has a digest: so it names the first interval that differs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_pipeline.proof import stretch_digests
from pretrain import checkpoint
from pretrain.archive import open_archive, said
from pretrain.checkpoint import Committed, Damaged, Position
from pretrain.lineage import Lineage
from pretrain.run import TrainRun
from pretrain.segments import Segments, plan_course
from pretrain.track.journal import lineage as journal_lineage
from pretrain.track.journal import live_records, read_journal


@dataclass
class Verified:
    """What was found of one checkpoint."""

    name: str
    step: int
    branch: int
    live: bool
    archived: bool | None  # None: the run archives nothing
    problems: list[str] = field(default_factory=list)
    digest: str = "not in the journal"  # how its digest was checked

    @property
    def line(self) -> str:
        """One line for a person."""
        state = "; ".join(self.problems) or f"whole, digest {self.digest}"
        more = [] if self.live else ["not of the live lineage"]
        if self.archived is not None:
            more.append("archived" if self.archived else "not archived")
        return f"{self.name}: {state}" + (f" ({', '.join(more)})" if more else "")


Look = Callable[[int, int, str, str], None]  # done, of how many, what is done, in which unit


def verify_run(
    run: TrainRun,
    deep: bool = False,
    workers: int = 1,
    tell: Callable[[str], None] = lambda _: None,
    look: Look = lambda *_: None,
) -> list[Verified]:
    """Every checkpoint of a run, newest first; not those that the run removes meanwhile.

    `tell` is given a line on what `deep` found; `look` is told of how far it is.
    """
    folder = run.run_folder
    found = checkpoint.all_checkpoints(folder)
    live = set(checkpoint.live_checkpoints(folder))  # after `found`: a live run may commit between the two
    archived = _archived(run)
    rows, whole = [], {}
    for done, (step, branch, path) in enumerate(found):
        look(done, len(found), "verify", "checkpoints")
        committed, problems = _read(path)
        if problems and _is_gone(path):
            continue
        there = None if archived is None else path.name in archived
        row = Verified(path.name, step, branch, path in live, there, problems)
        rows.append(row)
        if committed is not None:
            whole[path] = (row, committed)
    journal = {(r.branch, r.step): r.fields for r in read_journal(folder) if r.type == "step" and "digest" in r.fields}
    for row, committed in whole.values():
        _check_journal(row, committed.position, journal.get((row.branch, row.step)))
        _check_branch(row, committed, folder)
    chain = [whole[path] for path in sorted(live & whole.keys(), key=lambda path: whole[path][1].position.step)]
    for (_, before), (row, after) in pairwise(chain):
        _check_growth(row, before, after)
    if not deep and chain:
        tell("the data were not read again: --deep adds up what was fed between the checkpoints")
    return rows + (_add_up(run, chain, workers, tell, look) if deep and chain else [])


def _read(path: Path) -> tuple[Committed | None, list[str]]:
    """A checkpoint of which every byte was read and is right, or what is wrong."""
    try:
        problems = checkpoint.verify(path)
        return (None, problems) if problems else (checkpoint.open_checkpoint(path), [])
    except Damaged as error:
        return None, [str(error)]
    except OSError as error:
        return None, [f"{error.filename or path}: {error.strerror}"]


def _is_gone(path: Path) -> bool:
    try:
        path.lstat()
    except FileNotFoundError:
        return True
    except OSError:
        pass  # it cannot be seen, which is another matter
    return False


def _archived(run: TrainRun) -> set[str] | None:
    """The names of the checkpoints that the run's archive holds whole; None where it has none, or is away."""
    if run.checkpoint.archive is None:
        return None
    try:
        return set(open_archive(run.checkpoint.archive, run.run_folder).names())
    except Exception as error:  # of whichever store it is
        print(f"archive {run.checkpoint.archive.to}: {said(error)}", file=sys.stderr)
        return None


def _check_journal(row: Verified, position: Position, record: dict[str, Any] | None) -> None:
    if record is None:
        return  # not every step is written down
    row.digest = "as in the journal"
    for name, kept in (("digest", position.digest), ("samples", position.samples), ("tokens", position.tokens)):
        if record[name] != kept:
            row.problems.append(f"{name} {kept} is not the journal's {record[name]}")


def _check_branch(row: Verified, committed: Committed, folder: Path) -> None:
    """Whoever went on from this checkpoint recorded its hash."""
    for record in Lineage(folder).branches().values():
        if (record.parent, record.step) == (row.branch, row.step) and record.manifest_hash != committed.manifest_hash:
            row.problems.append(f"branch {record.branch} went on from another checkpoint of this name")


def _check_growth(row: Verified, before: Committed, after: Committed) -> None:
    for name in ("samples", "tokens"):
        was, now = getattr(before.position, name), getattr(after.position, name)
        if now < was or (name == "samples" and now == was and before.position.step != after.position.step):
            row.problems.append(f"{name} {now} after {was} of {before.folder.name}")


@dataclass(frozen=True)
class Mark:
    """A place of the live lineage at which a digest was kept, and by what."""

    step: int
    digest: str
    kept_by: str


def _add_up(
    run: TrainRun, chain: list[tuple[Verified, Committed]], workers: int, tell: Callable[[str], None], look: Look
) -> list[Verified]:
    """Compare each digest that was kept with the one before it plus the data between, read again.

    What differs is told of each checkpoint; a row more where only the journal shows it.
    """
    course = plan_course(run, Segments(run.run_folder).read())
    marks = _marks(run.run_folder, chain)
    steps = sorted({mark.step for mark in marks})
    bounds = [course.steps.start(step) for step in steps]
    digests = stretch_digests(
        course.order,
        course.skips,
        course.runs[-1][1].data,
        bounds,
        workers,
        lambda done, of: look(done, of, "the data", "parts"),
    )
    read = dict(zip(steps, digests, strict=False))
    for (_, before), (row, after) in pairwise(chain):
        first, end = before.position.step, after.position.step
        fed, problem = _sum(read, first, end)
        if problem is not None:
            row.problems.append(f"the data from step {first} on: {problem}")
            continue
        expected = f"{(int(before.position.digest, 16) + fed) % 2**128:032x}"
        row.digest = f"that of the data from step {first} on"
        if after.position.digest != expected:
            row.problems.append(f"digest {after.position.digest} is not {expected}, that of the data from step {first}")
    differs = next(_differing(marks, read), None)
    if differs is None:
        if len(steps) > 1:
            tell(f"steps {steps[0]} to {steps[-1]}: the data give the digest kept at each of {len(steps)} places")
        return []
    tell(differs[1])
    if any(row.problems for row, _ in chain):
        return []
    return [Verified("journal", differs[0].step, Lineage(run.run_folder).highest(), True, None, [differs[1]])]


def _marks(run_folder: Path, chain: list[tuple[Verified, Committed]]) -> list[Mark]:
    """Where digests were kept, by step; at one step that of a checkpoint comes last."""
    records = live_records(read_journal(run_folder), journal_lineage(run_folder))
    marks = [
        Mark(r.step, r.fields["digest"], "the journal") for r in records if r.type == "step" and "digest" in r.fields
    ]
    marks += [Mark(committed.position.step, committed.position.digest, row.name) for row, committed in chain]
    branches = Lineage(run_folder).branches()
    if any(branch.parent is None and branch.step == 0 for branch in branches.values()):
        marks.append(Mark(0, "0" * 32, "the beginning"))
    return sorted(marks, key=lambda mark: (mark.step, mark.kept_by != "the journal"))


def _differing(marks: list[Mark], read: dict[int, int | str]) -> Iterator[tuple[Mark, str]]:
    """Each mark that is not the one before it plus the data between; a line on it."""
    for before, after in pairwise(marks):
        fed = read[before.step] if before.step < after.step else 0
        where = f"steps {before.step} to {after.step}"
        if isinstance(fed, str):
            yield after, f"the first interval that cannot be read again: {where}: {fed}"
            continue
        expected = f"{(int(before.digest, 16) + fed) % 2**128:032x}"
        if after.digest != expected:
            yield (
                after,
                f"the first interval that differs: {where}: from {before.digest} ({before.kept_by}) the data lead to "
                f"{expected}, but {after.kept_by} has {after.digest}",
            )


def _sum(read: dict[int, int | str], first: int, end: int) -> tuple[int, str | None]:
    """The digest of steps [first, end), or why it is not known."""
    total = 0
    for step in (step for step in read if first <= step < end):
        digest = read[step]
        if isinstance(digest, str):
            return 0, digest
        total += digest
    return total, None
