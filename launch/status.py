"""`launch status`: how runs are, from their files and one question to SLURM. It answers in about a second.

Whatever cannot be reached is said in a note, and the rest is shown all the same.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.history import History, launched, read_history
from launch.queue import Answer, ask
from launch.state import State, find_state
from pretrain.goodput import PARTS, Account, account
from pretrain.lineage import Lineage
from pretrain.meter import duration
from pretrain.track import journal
from pretrain.track.journal import Record

if TYPE_CHECKING:
    from rich.console import Console

RECENT_STEPS = 50  # records from which the time left is estimated
STALL_FACTOR = 20.0  # a run is stalled that has recorded nothing for so many times its usual interval,
STALL_S = 60.0  # and for so many seconds


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint of the live lineage."""

    step: int
    path: Path
    age_s: float


@dataclass(frozen=True)
class Status:
    """How a run is. None where nothing says."""

    run: str
    folder: Path
    state: State
    launcher: str | None  # slurm or local
    job: str | None
    nodes: list[str]
    attempt: int | None
    step: int | None
    end_step: int | None
    tokens: int | None
    loss: float | None
    tokens_per_s: float | None
    mfu: float | None
    eta_s: float | None
    record_age_s: float | None  # of the newest record in its journal
    checkpoint: Checkpoint | None
    time: Account
    notes: list[str]

    def tree(self) -> dict[str, Any]:
        """What `--json` gives: the same keys in every state, null where nothing is known; see README."""
        checkpoint = self.checkpoint
        return {
            "run": self.run,
            "folder": str(self.folder),
            "state": self.state.name,
            "detail": self.state.detail,
            "launcher": self.launcher,
            "job": self.job,
            "nodes": self.nodes,
            "attempt": self.attempt,
            "step": self.step,
            "end_step": self.end_step,
            "tokens": self.tokens,
            "loss": self.loss,
            "tokens_per_s": _rounded(self.tokens_per_s),
            "mfu": _rounded(self.mfu),
            "eta_s": _rounded(self.eta_s),
            "record_age_s": _rounded(self.record_age_s),
            "restarts": len(self.time.restarts),
            "checkpoint": checkpoint
            and {"step": checkpoint.step, "path": str(checkpoint.path), "age_s": _rounded(checkpoint.age_s)},
            "goodput": _rounded(self.time.goodput),
            "seconds": {part: _rounded(value) for part, value in self.time.seconds.items()},
            "start_seconds": {part: _rounded(value) for part, value in self.time.start.items()},
            "recoveries": [
                {
                    "attempt": restart.attempt,
                    "why": restart.why,
                    "step": restart.step,
                    "redone_steps": restart.redone_steps,
                    "complete": restart.complete,
                    "total": _rounded(restart.total),
                    "detect": _rounded(restart.detect),
                    "queue": _rounded(restart.queue),
                    "start": {part: _rounded(value) for part, value in restart.start.items()},
                }
                for restart in self.time.restarts
            ],
            "notes": self.notes,
        }


def look(folders: Sequence[Path], now: float | None = None) -> list[Status]:
    """How runs are; SLURM is asked once for all of them."""
    histories = [read_history(folder) for folder in folders]
    answer = ask([job for history in histories for job in history.jobs])
    return [_look(history, answer, time.time() if now is None else now) for history in histories]


def _look(history: History, answer: Answer, now: float) -> Status:
    folder = history.folder
    records, branches = list(journal.read_journal(folder)), journal.lineage(folder)
    live = list(journal.live_records(records, branches))
    newest = [record for record in records if record.branch == max(branches, default=None)]
    steps = [record for record in live if record.type == "step"]
    ages = [now - record.time for record in newest[-1:]]
    fresh = not ages or ages[0] < _stall_s(newest)
    state = find_state(history, answer, newest, _owner(folder), fresh)
    last, facts = steps[-1] if steps else None, _facts(records)
    metrics = last.metrics if last is not None else {}
    end_step = facts.get("end_step")
    attempt = history.attempts[-1] if history.attempts else None
    running = state.name in ("running", "starting", "stopping")
    return Status(
        run=history.name,
        folder=folder,
        state=state,
        launcher=history.submissions[-1].launcher.get("kind") if history.submissions else None,
        job=_job(history, state),
        nodes=attempt.nodes if attempt is not None else [],
        attempt=attempt.number if attempt is not None else None,
        step=last.step if last is not None else (newest[0].step if newest else None),
        end_step=end_step,
        tokens=last.fields.get("tokens") if last is not None else None,
        loss=metrics.get("loss"),
        tokens_per_s=metrics.get("tokens_per_s") if running else None,
        mfu=metrics.get("mfu") if running else None,
        eta_s=_eta_s(steps, end_step) if running else None,
        record_age_s=max(0.0, ages[0]) if ages else None,
        checkpoint=_checkpoint(folder, now),
        time=_account(history, state, records, branches, now),
        notes=[answer.silent] if answer.silent is not None and history.jobs and not state.over else [],
    )


def _account(history: History, state: State, records: list[Record], branches: journal.Lineage, now: float) -> Account:
    attempts = [found for attempt in history.attempts if (found := launched(attempt)) is not None]
    if state.name != "pending":
        return account(records, branches, attempts, now if state.alive else None)
    since = [job.submitted for job in state.jobs if job.submitted is not None]
    since += [submission.time or now for submission in history.submissions[-1:] if not since]
    return account(records, branches, attempts, now, waiting_since=max(since, default=now))


def _job(history: History, state: State) -> str | None:
    if state.jobs:
        return state.jobs[0].id
    return history.jobs[-1] if history.jobs else None


def _owner(folder: Path) -> dict[str, Any]:
    """The record of the highest branch: who took it."""
    lineage = Lineage(folder)
    try:
        tree = json.loads((lineage.folder / f"{lineage.highest()}.json").read_text())
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _facts(records: list[Record]) -> dict[str, Any]:
    """What the newest attempt said of itself."""
    return next((record.fields for record in reversed(records) if record.type == "attempt"), {})


def _stall_s(newest: list[Record]) -> float:
    """How long a run may record nothing: from how long it did so far."""
    times = [record.time for record in newest if record.type == "step"]
    usual = statistics.median(b - a for a, b in itertools.pairwise(times)) if len(times) > 1 else 0.0
    spent = [value for record in newest for value in _aside(record)]
    return max(STALL_S, STALL_FACTOR * usual, 3 * max(spent, default=0.0))


def _aside(record: Record) -> list[float]:
    """Seconds that a record gives to what is no step."""
    spent = record.fields.get("spent")
    values = [spent.get("evaluate"), spent.get("save")] if isinstance(spent, dict) else []
    return [float(value) for value in values if isinstance(value, int | float)]


def _eta_s(steps: list[Record], end_step: object) -> float | None:
    """Seconds until the last step, everything between steps at its share so far included."""
    if not steps or not isinstance(end_step, int):
        return None
    recent = [record for record in steps[-RECENT_STEPS:] if record.branch == steps[-1].branch]
    if len(recent) < 2:
        return None
    spent = [record.fields.get("spent") for record in recent[1:]]
    seconds = sum(sum(each.values()) for each in spent if isinstance(each, dict)) or recent[-1].time - recent[0].time
    made = recent[-1].step - recent[0].step
    return max(0, end_step - recent[-1].step) * max(0.0, seconds) / made if made > 0 else None


def _checkpoint(folder: Path, now: float) -> Checkpoint | None:
    """The newest committed one of the live lineage."""
    limits = dict(Lineage(folder).live())
    found = []
    for path in (folder / "checkpoints").glob("step-*.b*/MANIFEST.json"):
        step, _, branch = path.parent.name.removeprefix("step-").partition(".b")
        if not (step.isdigit() and branch.isdigit()) or int(branch) not in limits:
            continue
        limit = limits[int(branch)]
        if limit is None or int(step) <= limit:
            found.append((int(step), int(branch), path))
    if not found:
        return None
    step_number, _, path = max(found)
    return Checkpoint(step_number, path.parent, max(0.0, now - path.stat().st_mtime))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


# --- for people -----------------------------------------------------------------------------------------------------


def show(statuses: Sequence[Status], console: Console, verbose: bool = False) -> None:
    """A table, and below it a line on where the time of each run went."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in COLUMNS.items():
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for status in statuses:
        table.add_row(*_row(status))
    console.print(table)
    for status in statuses:
        console.print(f"{status.run}: {_where(status)}", highlight=False, markup=False, soft_wrap=True)
        if status.state.detail:
            console.print(f"  {status.state.detail}", highlight=False, markup=False, soft_wrap=True)
        for note in status.notes:
            console.print(f"  note: {note}", highlight=False, markup=False, soft_wrap=True)
        if verbose:
            _show_recoveries(status, console)


COLUMNS = {
    "run": "left", "job": "right", "state": "left", "step": "right", "loss": "right", "tokens/s": "right",
    "MFU": "right", "ETA": "right", "restarts": "right", "checkpoint": "right", "goodput": "right",
}  # fmt: skip


def _row(status: Status) -> list[str]:
    checkpoint = status.checkpoint
    saved = "" if checkpoint is None else f"{checkpoint.step}, {duration(checkpoint.age_s)} ago"
    return [
        status.run,
        status.job or "",
        status.state.name.replace("_", " "),
        "" if status.step is None else f"{status.step}/{'?' if status.end_step is None else status.end_step}",
        "" if status.loss is None else f"{status.loss:.4f}",
        "" if status.tokens_per_s is None else f"{status.tokens_per_s:,.0f}",
        "" if status.mfu is None else f"{status.mfu:.1%}",
        "" if status.eta_s is None else duration(status.eta_s),
        str(len(status.time.restarts)),
        saved,
        "" if status.time.goodput is None else f"{status.time.goodput:.1%}",
    ]


def _where(status: Status) -> str:
    """The shares of the time, the largest first."""
    seconds, whole = status.time.seconds, status.time.whole
    if not whole:
        return "no time has gone by"
    shares = sorted(((seconds[part] / whole, part) for part in PARTS), reverse=True)
    return f"{duration(whole)}: " + ", ".join(f"{part} {share:.1%}" for share, part in shares if share >= 0.0005)


def _show_recoveries(status: Status, console: Console) -> None:
    from rich.table import Table

    table = Table(
        "attempt", "after", "from step", "redone", "detect", "queue", "start", "of it", box=None, pad_edge=True
    )
    for restart in status.time.restarts:
        start = sum(restart.start.values())
        parts = ", ".join(f"{part} {value:.1f}" for part, value in restart.start.items() if value >= 0.05)
        steps = [str(restart.step) if restart.step is not None else "", str(restart.redone_steps)]
        times = [f"{value:.1f} s" for value in (restart.detect, restart.queue, start)]
        table.add_row(str(restart.attempt or ""), restart.why, *steps, *times, parts)
    if status.time.restarts:
        console.print(table)
