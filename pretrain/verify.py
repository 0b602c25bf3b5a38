"""Is what a run has kept what it has seen? Every byte of every checkpoint, and the chain of digests.

A checkpoint's digest (of every sample fed before it) must be the one that the journal has at its step; step, samples
and tokens must grow along the lineage; a branch must begin at the very checkpoint that its record names. `deep` reads
the data between each two live checkpoints again and adds their digests up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_pipeline.shards import ShardError
from data_pipeline.stream import Stream
from pretrain import checkpoint
from pretrain.archive import open_archive
from pretrain.checkpoint import Committed, Damaged, Position
from pretrain.lineage import Lineage
from pretrain.run import TrainRun
from pretrain.segments import Segments, plan_course
from pretrain.track.journal import read_journal


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


def verify_run(run: TrainRun, deep: bool = False, look: Look = lambda *_: None) -> list[Verified]:
    """Every checkpoint of a run, newest first; not those that the run removes meanwhile."""
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
    if deep:
        _add_up(run, chain, look)
    return rows


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
        print(f"archive {run.checkpoint.archive.to}: {error}", file=sys.stderr)
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


def _add_up(run: TrainRun, chain: list[tuple[Verified, Committed]], look: Look) -> None:
    """Compare the digest of each checkpoint with the one before it plus the data between, read again."""
    course = plan_course(run, Segments(run.run_folder).read())
    stream = Stream(
        course.order, course.steps, course.skips, course.corpora.shards(course.order.pools), run.data,
        run.micro_batch_seqs,
    )  # fmt: skip
    origin, last = (chain[i][1].position.step if chain else 0 for i in (0, -1))
    for (_, before), (row, after) in pairwise(chain):
        first, end, fed = before.position.step, after.position.step, 0
        try:
            for batch in stream.batches(first, end):
                fed += batch.digest
                look(batch.step - origin, last - origin, "read the data again", "steps")
        except (OSError, ShardError) as error:
            row.problems.append(f"the data from step {first} on: {error}")
            continue
        expected = f"{(int(before.position.digest, 16) + fed) % 2**128:032x}"
        row.digest = f"that of the data from step {first} on"
        if after.position.digest != expected:
            row.problems.append(f"digest {after.position.digest} is not {expected}, that of the data from step {first}")
