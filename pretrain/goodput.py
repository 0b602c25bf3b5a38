"""Where the time of a run went, over all of its attempts: pure arithmetic over its journal and its launcher's records.

Inside an attempt, seconds are those that the ranks measured with a monotonic clock (`spent` and `seconds` in the
journal). The clock on the wall is asked only where nothing else knows: between attempts, after an attempt's last
record, and where records were lost; a difference that is negative counts as 0. Order is that of branches and steps,
never that of times. So the parts are never negative, and their sum is the whole.

Goodput is the share of `train` in the whole: steps that count, over all time since the run was first queued. Only the
time is left out in which nobody wanted it to run: from an end on purpose until it was submitted again.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pretrain.guard import DONE, INTERRUPTED, STOPPED
from pretrain.track.journal import Lineage, Record, last_steps

PARTS = {
    "train": "steps that count",
    "redone": "steps that a restart or a rollback threw away",
    "skipped": "steps whose update was not applied",
    "data": "waiting for batches",
    "evaluate": "evaluations",
    "save": "checkpoints, as far as training waited for them",
    "start": "from the launcher's start of an attempt to its first step; its parts are START",
    "detect": "from an attempt's last sign of life until its successor was queued",
    "queue": "queued",
    "unknown": "everything else, lost records among it",
}
START = ("launch", "imports", "rendezvous", "build", "load", "first_step", "other")
SLACK_S = 5.0  # what may go by between two records, beyond twice what was measured, before the clock is not believed


@dataclass(frozen=True)
class Launched:
    """What the launcher knows of an attempt; times are seconds since the epoch."""

    number: int
    began: float
    queued: float | None = None
    ended: float | None = None
    why: str = ""
    final: bool = False  # done, or stopped on purpose: until the next start nobody wants the run to go on


def launched(number: int, begun: Mapping[str, object], ended: Mapping[str, object]) -> Launched | None:
    """An attempt from what its launcher wrote, attempt.json and end.json; None where nobody wrote when it began."""
    code = ended.get("exit_code")
    final = code in (DONE, INTERRUPTED) or (code == STOPPED and ended.get("action") == "stop")
    why = str(ended.get("why") or (f"exit {code}" if code is not None else "lost"))
    if (began := _number(begun.get("began"))) is None:
        return None
    return Launched(number, began, _number(begun.get("queued")), _number(ended.get("ended")), why, final)


@dataclass(frozen=True)
class Restart:
    """How the run came back once. Seconds; None where no record says."""

    attempt: int | None  # the one that began
    why: str  # the one before ended
    step: int | None  # from which it went on
    redone_steps: int  # at least: as many as were recorded
    detect: float
    queue: float
    start: dict[str, float]  # by START; `first_step` whole
    complete: bool  # it has made a step

    @property
    def total(self) -> float:
        return self.detect + self.queue + sum(self.start.values())


@dataclass(frozen=True)
class Account:
    """Seconds by PARTS, those of `start` by START, and how the run came back each time."""

    seconds: dict[str, float]
    start: dict[str, float]
    restarts: list[Restart]

    @property
    def whole(self) -> float:
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float | None:
        """0 to 1; None before any time has gone by."""
        return self.seconds["train"] / self.whole if self.whole else None


@dataclass
class _Attempt:
    """One attempt with the records of all its branches, in their order."""

    launched: Launched | None
    records: list[Record] = field(default_factory=list)
    number: int | None = None

    @property
    def began(self) -> float:
        if self.launched is not None:
            return self.launched.began
        return _number(self.records[0].fields.get("began")) or self.records[0].time

    @property
    def queued(self) -> float:
        queued = self.launched.queued if self.launched is not None else None
        return self.began if queued is None else min(queued, self.began)

    @property
    def end(self) -> Record | None:
        return next((record for record in reversed(self.records) if record.type == "end"), None)

    @property
    def ended(self) -> float | None:
        """When it ended, where a record says so."""
        if self.launched is not None and self.launched.ended is not None:
            return self.launched.ended
        return self.end.time if self.end is not None else None

    @property
    def final(self) -> bool:
        if self.launched is not None:
            return self.launched.final
        return self.end is not None and self.end.fields.get("exit_code") in (DONE, STOPPED, INTERRUPTED)

    @property
    def last_seen(self) -> float:
        return self.records[-1].time if self.records else self.ended or self.began

    @property
    def why(self) -> str:
        if self.launched is not None and self.launched.why:
            return self.launched.why
        return str(self.end.fields.get("why", "")) if self.end is not None else "lost"


class _Sums:
    """Seconds by part; none is ever negative."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.start = dict.fromkeys(START, 0.0)

    def add(self, part: str, seconds: float) -> float:
        seconds = seconds if math.isfinite(seconds) and seconds > 0 else 0.0
        if part in START:
            self.start[part] += seconds
            self.seconds["start"] += seconds
        else:
            self.seconds[part if part in PARTS else "unknown"] += seconds
        return seconds


def account(
    records: Iterable[Record],
    branches: Lineage,
    launched: Iterable[Launched] = (),
    now: float | None = None,
    waiting_since: float | None = None,
) -> Account:
    """Account for a run's time.

    `records` are all of the journal, superseded ones too, in its order; `branches` its lineage. `now` is given for a
    run that goes on: its newest attempt lives, or the run has been waiting for its next one since `waiting_since`.
    """
    attempts = _attempts(records, launched)
    sums, usual = _Sums(), _usual_step(attempts)
    live = last_steps(branches)
    restarts = []
    for i, attempt in enumerate(attempts):
        before = attempts[i - 1] if i else None
        detect = sums.add("detect", _gone_by(before, attempt.queued)) if before is not None else 0.0
        queue = sums.add("queue", attempt.began - attempt.queued)
        start = _walk(attempt, live, usual, sums)
        if before is not None and not before.final:
            restarts.append(_restart(before, attempt, detect, queue, start))
    if attempts and now is not None and waiting_since is None:
        sums.add("unknown" if attempts[-1].records else "other", now - attempts[-1].last_seen)
    elif attempts and waiting_since is None:
        sums.add("detect", _gone_by(attempts[-1], attempts[-1].ended or 0.0))
    if now is not None and waiting_since is not None:
        if attempts:
            sums.add("detect", _gone_by(attempts[-1], waiting_since))
        sums.add("queue", now - waiting_since)
    return Account(sums.seconds, sums.start, restarts)


def _attempts(records: Iterable[Record], launched: Iterable[Launched]) -> list[_Attempt]:
    """Records by attempt, which may have several branches; attempts that wrote no record stand where they belong."""
    by_number = {each.number: each for each in launched}
    found: dict[object, _Attempt] = {}
    current: _Attempt | None = None
    branch = None
    for record in records:
        if current is None or record.branch != branch:
            branch = record.branch
            number = record.fields.get("attempt") if record.type == "attempt" else None
            began = record.fields.get("began") if record.type == "attempt" else None
            key = number if number is not None else ("began", began) if began is not None else ("branch", branch)
            number = number if isinstance(number, int) else None
            launch = by_number.pop(number, None) if number is not None else None
            current = found.setdefault(key, _Attempt(launch, number=number))
        current.records.append(record)
    attempts = list(found.values())
    for number, launch in sorted(by_number.items()):
        place = next((i for i, a in enumerate(attempts) if a.number is not None and a.number > number), len(attempts))
        attempts.insert(place, _Attempt(launch, number=number))
    return attempts


def _usual_step(attempts: Sequence[_Attempt]) -> float | None:
    """The median seconds of a step, those right after a start left out."""
    found = []
    for attempt in attempts:
        steps = [record for record in attempt.records if record.type == "step"]
        for before, record in itertools.pairwise(steps):
            if before.branch == record.branch and record.step > before.step:
                spent = record.fields.get("spent")
                train = _number(spent.get("train")) if isinstance(spent, dict) else None
                found.append(max(0.0, train or 0.0) / (record.step - before.step))
    return statistics.median(found) if found else None


def _walk(attempt: _Attempt, live: Mapping[int, float], usual: float | None, sums: _Sums) -> dict[str, float] | None:
    """Add up one attempt. Its start by START, or None where it made no step."""
    if not attempt.records:
        sums.add("other", (attempt.ended or attempt.began) - attempt.began)
        return None
    start: dict[str, float] = {}
    skipped = {(r.branch, r.step) for r in attempt.records if r.fields.get("kind") == "skip"}
    first_step = next((s for r in attempt.records if (s := _first_step(r)) is not None), None)
    clock, step, branch = attempt.began, attempt.records[0].step, -1
    every = _steps_per_record(attempt.records)
    made_steps = False
    for record in attempt.records:
        if record.type == "attempt":
            known = _begin(attempt, record, sums, start)
            sums.add("unknown", _rest(record.time - clock, known))
        elif record.type == "step":
            step = step if record.branch == branch else min(step, record.step - 1)
            steps = range(step + 1, max(record.step, step + 1) + 1)
            warm_up = 0.0
            if not made_steps and first_step is not None:
                warm_up = first_step - (usual if usual is not None else 0.0)
            known = _step(record, steps, live, skipped, warm_up, record.time - clock, sums)
            sums.add("unknown", _rest(record.time - clock, known, missing=len(steps) // every))
            made_steps = True
        else:
            continue
        clock, step, branch = record.time, record.step, record.branch
    _tail(attempt, clock, sums)
    if first_step is not None:
        start["first_step"] = first_step
    return start if made_steps or first_step is not None else None


def _begin(attempt: _Attempt, record: Record, sums: _Sums, start: dict[str, float]) -> float:
    """The start of an attempt, or what a rollback loaded; the seconds that are known."""
    parts = record.fields.get("seconds")
    seconds = {key: _number(value) or 0.0 for key, value in parts.items()} if isinstance(parts, dict) else {}
    began = _number(record.fields.get("began"))
    if attempt.launched is not None and began is not None and record is attempt.records[0]:
        seconds = {"launch": min(began, record.time) - attempt.launched.began, **seconds}
    known = 0.0
    for part, value in seconds.items():
        name = part if part in START else "other"
        added = sums.add(name, value)
        if record is attempt.records[0]:
            start[name] = start.get(name, 0.0) + added
        known += added
    return known


def _step(
    record: Record,
    steps: range,
    live: Mapping[int, float],
    skipped: set[tuple[int, int]],
    warm_up: float,
    wall: float,
    sums: _Sums,
) -> float:
    """One record of `steps` that end with it; the seconds that are known."""
    older = "spent" not in record.fields  # of an older version
    spent = {"train": max(0.0, wall)} if older else _spent(record)
    known = sum(sums.add(part, value) for part, value in spent.items() if part != "train")
    train = max(0.0, spent.get("train", 0.0))
    train -= sums.add("first_step", min(max(0.0, warm_up), train))
    last = live.get(record.branch, -math.inf)
    count = len(steps)
    bad = sum((record.branch, step) in skipped for step in steps) if skipped else 0
    if steps[-1] <= last:
        good = count - bad
    else:
        good = sum(step <= last and (record.branch, step) not in skipped for step in steps)
    each = train / count
    sums.add("skipped", each * bad)
    sums.add("train", each * good)
    sums.add("redone", each * (count - bad - good))
    return known + max(0.0, spent.get("train", 0.0))


def _tail(attempt: _Attempt, clock: float, sums: _Sums) -> None:
    """After the last step that was recorded. An attempt without an end was lost, and `detect` has what follows."""
    steps = [i for i, record in enumerate(attempt.records) if record.type == "step"]
    rest = attempt.records[steps[-1] + 1 :] if steps else []
    wall = max(0.0, attempt.last_seen - clock)
    evaluations = sum(_number(r.fields.get("seconds")) or 0.0 for r in rest if r.type == "evaluation")
    wall -= sums.add("evaluate", min(evaluations, wall))
    sums.add("save" if attempt.end is not None else "unknown", wall)


def _gone_by(attempt: _Attempt, until: float) -> float:
    """Seconds from an attempt's last sign of life, or from its end on purpose, until the next thing."""
    if attempt.final:
        until = min(until, attempt.ended or 0.0)
    return until - attempt.last_seen


def _restart(
    before: _Attempt, attempt: _Attempt, detect: float, queue: float, start: dict[str, float] | None
) -> Restart:
    steps = [record.step for record in before.records]
    first = attempt.records[0].step if attempt.records else None
    redone = max(0, max(steps) - first) if steps and first is not None else 0
    return Restart(
        attempt.number,
        before.why,
        first,
        redone,
        detect,
        queue,
        start or {},
        start is not None and "first_step" in start,
    )


def _first_step(record: Record) -> float | None:
    seconds = _number(record.fields.get("seconds")) if record.fields.get("kind") == "first_step" else None
    return None if seconds is None else max(0.0, seconds)


def _spent(record: Record) -> dict[str, float]:
    spent = record.fields.get("spent")
    if not isinstance(spent, dict):
        return {}
    return {part: max(0.0, number) for part, value in spent.items() if (number := _number(value)) is not None}


def _rest(wall: float, known: float, missing: int = 0) -> float:
    """Seconds between two records that nothing measured; 0 where the clock was set, which shows as a leap.

    Each of the records that are missing between them accounts for as much as the measured ones.
    """
    rest = wall - known
    return rest if 0 <= rest <= known * (1 + missing) + SLACK_S else 0.0


def _steps_per_record(records: Sequence[Record]) -> int:
    config = records[0].fields.get("config")
    every = _number(config.get("log_every_steps")) if isinstance(config, dict) else None
    return max(1, int(every or 1))


def _number(value: object) -> float | None:
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None
