"""The journal: what happened in a run, one JSON line per event, in `RUN/journal/<branch>.jsonl`.

It is the only thing that the training loop writes to; trackers follow it. One file per branch, written by rank 0, so
that no two attempts ever append to one file. A line is one `write()`; a line that a kill has torn is no record and does
no harm to the next. What a kill left beyond the resumed step stays: `read_journal` gives it, `live_records` does not.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pretrain.track.mask import mask, mask_text

logger = logging.getLogger(__name__)

FOLDER = "journal"
CheckpointStatus = Literal["pending", "ready", "failed", "removed"]
Lineage = Mapping[int, tuple[int | None, int]]  # branch -> (parent branch, step at which it took over)


class Journal:
    """The writer of one branch. Losing a record never stops a run: it is counted in `lost` and warned of once."""

    def __init__(self, run_folder: Path, branch: int) -> None:
        self.path = run_folder / FOLDER / f"{branch}.jsonl"
        self.branch = branch
        self.lost = 0  # records that could not be written
        self._file: int | None = None
        self._torn = False  # the file ends inside a line: the next record begins with a line end
        self._warned = False
        self._lock = threading.Lock()

    def attempt(self, parent: int | None, step: int, why: str, **facts: object) -> None:
        """The branch begins at `step` of its parent. First record of a branch: the lineage is read from it.

        Facts are what trackers show of an attempt. Known to them: `config` (the resolved tree) and `datasets`
        (dicts with name, source, digest); any other scalar is shown as it is. Secrets are masked.
        """
        self._append("attempt", step, {"parent": parent, "why": mask_text(why), **mask(facts)})

    def step(
        self,
        step: int,
        samples: int,
        tokens: int,
        digest: str | None,
        metrics: Mapping[str, float],
        spent: Mapping[str, float] | None = None,
    ) -> None:
        """Totals after `step` and its metrics; `digest` (hex) only every so many steps.

        `spent`: what rank 0's seconds since the step record before went into (train, data, evaluate, save).
        """
        record: dict[str, Any] = {"samples": samples, "tokens": tokens}
        if digest is not None:
            record["digest"] = digest
        if spent is not None:
            record["spent"] = {kind: round(seconds, 4) for kind, seconds in spent.items()}
        self._append("step", step, {**record, "metrics": _plain(metrics)})

    def evaluation(self, step: int, tokens: int, metrics: Mapping[str, float], seconds: float | None = None) -> None:
        """Metrics such as `validation/wikipedia/loss`, of the weights after `step`, and how long they took."""
        fields = {"tokens": tokens, "metrics": _plain(metrics)}
        self._append("evaluation", step, fields | ({} if seconds is None else {"seconds": round(seconds, 3)}))

    def samples(self, step: int, tokens: int, texts: Sequence[Mapping[str, str]]) -> None:
        """What the weights after `step` wrote: {prompt, text} of each prompt."""
        self._append("samples", step, {"tokens": tokens, "texts": [dict(text) for text in texts]})

    def checkpoint(
        self, step: int, status: CheckpointStatus, path: str, manifest_hash: str | None, seconds: float | None = None
    ) -> None:
        """What became of the checkpoint of `step`; its folder's name is its identity.

        `seconds` of a ready one: from the begin of the save to its commit.
        """
        record = {"status": status, "path": path, "manifest_hash": manifest_hash}
        self._append("checkpoint", step, record | ({} if seconds is None else {"seconds": round(seconds, 3)}))

    def event(self, step: int, kind: str, text: str, **facts: object) -> None:
        """Something that the guard or the watchdog noticed: its kind (skip, spike, ...), one line, and its facts."""
        self._append("event", step, {"kind": kind, "text": mask_text(text), **mask(facts)})

    def end(self, step: int, exit_code: int, why: str) -> None:
        """The attempt ends in good order, with one of the contract's exit codes."""
        self._append("end", step, {"exit_code": exit_code, "why": mask_text(why)})

    def sync(self) -> None:
        """Everything written so far is on disk afterwards (called at checkpoints)."""
        with self._lock:
            try:
                if self._file is not None:
                    os.fsync(self._file)
            except OSError as error:
                self._warn(str(error))

    def close(self) -> None:
        self.sync()
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _append(self, kind: str, step: int, fields: dict[str, Any]) -> None:
        record = {"type": kind, "branch": self.branch, "step": step, "time": round(time.time(), 3), **fields}
        try:
            line = json.dumps(record, allow_nan=False, default=str)
        except ValueError:
            line = json.dumps(_strict(record), allow_nan=False, default=str)
        with self._lock:
            try:
                file = self._open()
                data = (b"\n" if self._torn else b"") + line.encode() + b"\n"
                written = os.write(file, data)
            except OSError as error:
                self.lost += 1
                self._warn(str(error))
                return
            self._torn = written < len(data)
            if self._torn:
                self.lost += 1
                self._warn(f"disk full: {written} of {len(data)} bytes written")

    def _open(self) -> int:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            size = os.fstat(self._file).st_size
            self._torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"
        return self._file

    def _warn(self, cause: str) -> None:
        if not self._warned:
            logger.warning("%s: cannot be written: %s; training goes on, the journal has gaps", self.path, cause)
        self._warned = True


@dataclass(frozen=True, slots=True)  # there are as many as steps
class Record:
    """One line of the journal: what every record has, and its other fields by name."""

    type: Literal["attempt", "step", "evaluation", "samples", "checkpoint", "event", "end", "system"]
    branch: int
    step: int
    time: float  # seconds since the epoch
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of a step or an evaluation; `nan`, `inf` and `-inf` come back as floats."""
        return {key: float(value) for key, value in self.fields.get("metrics", {}).items()}


class Cursor(NamedTuple):
    """How far a follower has come: every branch below `branch`, and `offset` bytes of its file."""

    branch: int = -1
    offset: int = 0


def branch_files(run_folder: Path) -> dict[int, Path]:
    """The journal's files by branch, ascending."""
    paths = (run_folder / FOLDER).glob("*.jsonl")
    return dict(sorted((int(path.stem), path) for path in paths if path.stem.isdigit()))


def records_after(run_folder: Path, cursor: Cursor) -> Iterator[tuple[Record, Cursor]]:
    """Every complete record behind `cursor`, in order of branch and of writing, with the cursor behind it.

    A branch that has a later one is complete, since its writer was superseded; of the last, more may come.
    """
    for branch, path in branch_files(run_folder).items():
        if branch < cursor.branch:
            continue
        for record, offset in records_of(path, cursor.offset if branch == cursor.branch else 0):
            yield record, Cursor(branch, offset)


def records_of(path: Path, offset: int) -> Iterator[tuple[Record, int]]:
    """Every complete record of a file behind `offset`, with the offset behind it."""
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                break  # being written, or torn by a kill
            offset += len(line)
            record = _parse(line)
            if record is not None:
                yield record, offset


def read_journal(run_folder: Path) -> Iterator[Record]:
    """Every record of a run, superseded ones too, in order of branch and of writing."""
    return (record for record, _ in records_after(run_folder, Cursor()))


def lineage(run_folder: Path) -> dict[int, tuple[int | None, int]]:
    """Who took over from whom, from the first record of each branch.

    Where that record was lost, the branch is taken to follow the one before it, from its first step on.
    """
    found: dict[int, tuple[int | None, int]] = {}
    for branch, path in branch_files(run_folder).items():
        with path.open("rb") as file:
            first = next((record for line in file if (record := _parse(line)) is not None), None)
        if first is not None and first.type == "attempt":
            found[branch] = (first.fields.get("parent"), first.step)
        elif first is not None:
            found[branch] = (max(found, default=None), first.step - 1)
    return found


def last_steps(branches: Lineage) -> dict[int, float]:
    """For each branch of the live lineage, the last step of it that counts; dead branches are absent.

    The highest branch counts whole, its parent up to the step at which it took over, and so on.
    """
    last: dict[int, float] = {}
    branch, limit = max(branches, default=None), math.inf
    while branch is not None and branch not in last:
        last[branch] = limit
        parent, step = branches.get(branch, (None, 0))
        branch, limit = parent, min(limit, step)
    return last


def live_records(records: Iterable[Record], branches: Lineage) -> Iterator[Record]:
    """Only the records of the live lineage: of a superseded branch, those up to the step at which its child began."""
    last = last_steps(branches)
    return (record for record in records if record.step <= last.get(record.branch, -math.inf))


def _parse(line: bytes) -> Record | None:
    try:
        tree = json.loads(line)
        return Record(tree.pop("type"), tree.pop("branch"), tree.pop("step"), tree.pop("time"), tree)
    except (ValueError, KeyError, AttributeError):
        return None


def _plain(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """Metrics as strict JSON holds them: plain floats, and the name of one that is not finite."""
    numbers = {key: float(value) for key, value in metrics.items()}
    return {key: value if math.isfinite(value) else str(value) for key, value in numbers.items()}


def _strict(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _strict(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_strict(value) for value in tree]
    return str(tree) if isinstance(tree, float) and not math.isfinite(tree) else tree
