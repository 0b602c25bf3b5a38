"""Where the time of a run went: timelines whose truth is known, and journals that are spoilt."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.goodput import PARTS, START, Account, Launched, account
from pretrain.track.journal import Record

EPOCH = 1.8e9
EVERY = 2  # log_every_steps


@dataclass
class Timeline:
    """A run that is played second by second: its records, and the truth about its time."""

    now: float = EPOCH
    records: list[Record] = field(default_factory=list)
    launched: list[Launched] = field(default_factory=list)
    truth: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    parents: dict[int, tuple[int | None, int]] = field(default_factory=dict)
    train: dict[tuple[int, int], float] = field(default_factory=dict)  # (branch, step) -> seconds
    began: float = 0.0
    number: int = 0

    def go(self, part: str, seconds: float) -> float:
        self.now += seconds
        self.truth[part] += seconds
        return seconds

    def begin(self, queue: float, start: dict[str, float]) -> None:
        queued = self.now
        self.go("queue", queue)
        launched, self.number = self.now, self.number + 1
        self.go("launch", start["launch"])
        self.began = self.now
        seconds = {part: self.go(part, start[part]) for part in ("imports", "rendezvous", "build", "load")}
        self.launched.append(Launched(self.number, launched, queued))
        self.branch(seconds=seconds)

    def branch(self, parent: int | None = None, step: int = 0, **facts: Any) -> None:
        branch = len(self.parents) + 1
        if branch > 1 and parent is None:
            parent, step = branch - 1, self.saved()
        self.parents[branch] = (parent, step)
        config = {"log_every_steps": EVERY}
        facts |= {"parent": parent, "began": self.began, "attempt": self.number, "config": config}
        self.records.append(Record("attempt", branch, step, self.now, facts))

    def saved(self) -> int:
        """The newest multiple of 4 that the last branch reached, as if it had saved there."""
        branch = max(self.parents)
        steps = [step for b, step in self.train if b == branch]
        return max([self.parents[branch][1], *(step - step % 4 for step in steps)])

    def steps(self, count: int, seconds: float, first: float = 0.0, skip: int | None = None, data: float = 0.0) -> None:
        branch = max(self.parents)
        step, spent = self.parents[branch][1], defaultdict[str, float](float)
        for i in range(count):
            step += 1
            warm_up = first if i == 0 else 0.0
            self.go("first_step", warm_up)
            self.now += seconds
            self.train[branch, step] = seconds
            spent["train"] += seconds + warm_up
            spent["data"] += self.go("data", data)
            if i == 0:
                self.event("first_step", step, seconds=seconds + warm_up)
            if step == skip:
                self.event("skip", step)
                self.train[branch, step] = 0.0
                self.truth["skipped"] += seconds
            if step % EVERY == 0 or i == count - 1:
                self.records.append(Record("step", branch, step, self.now, {"spent": dict(spent)}))
                spent.clear()

    def event(self, kind: str, step: int, **facts: Any) -> None:
        self.records.append(Record("event", max(self.parents), step, self.now, {"kind": kind, **facts}))

    def crash(self, detect: float) -> None:
        self.go("detect", detect)
        self.launched[-1] = replace(self.launched[-1], ended=self.now, why="exit 1")

    def end(self, save: float) -> None:
        self.go("save", save)
        self.records.append(Record("end", max(self.parents), 0, self.now, {"exit_code": 0, "why": "done"}))
        self.launched[-1] = replace(self.launched[-1], ended=self.now, final=True)

    def account(self, **now: float) -> Account:
        return account(self.records, self.parents, self.launched, **now)

    def expected(self) -> defaultdict[str, float]:
        """The truth, steps that were thrown away apart from those that count."""
        limits, branch, limit = {}, max(self.parents), math.inf
        found: int | None = branch
        while found is not None:
            limits[found] = limit
            parent, step = self.parents[found]
            found, limit = parent, min(limit, step)
        truth = defaultdict(float, self.truth)
        for (branch, step), seconds in self.train.items():
            truth["train" if step <= limits.get(branch, -1) else "redone"] += seconds
        return truth


def assert_true(timeline: Timeline, found: Account) -> None:
    expected = timeline.expected()
    for part in PARTS:
        wanted = sum(expected[p] for p in START) if part == "start" else expected[part]
        assert found.seconds[part] == pytest.approx(wanted, abs=0.02), part
    for part in START:
        assert found.start[part] == pytest.approx(expected[part], abs=0.02), part
    assert found.whole == pytest.approx(timeline.now - EPOCH, abs=0.05)


seconds = st.floats(0, 1000).map(lambda value: round(value, 3))
starts = st.fixed_dictionaries(dict.fromkeys(START, seconds))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_truth_is_found(data: st.DataObject) -> None:
    timeline = Timeline()
    step_s = data.draw(st.floats(0.01, 50))
    attempts = data.draw(st.integers(1, 5))
    for i in range(attempts):
        timeline.begin(data.draw(seconds), data.draw(starts))
        for rollback in range(data.draw(st.integers(1, 2))):
            if rollback:
                timeline.branch(parent=max(timeline.parents), step=timeline.saved())
            count = data.draw(st.integers(3, 30))
            skip = data.draw(st.one_of(st.none(), st.integers(5, 20)))
            timeline.steps(count, step_s, data.draw(seconds) if not rollback else 0.0, skip, data.draw(st.floats(0, 5)))
        if i < attempts - 1:
            timeline.crash(data.draw(seconds))
    timeline.end(data.draw(seconds))
    found = timeline.account()
    assert_true(timeline, found)
    assert [restart.attempt for restart in found.restarts] == list(range(2, attempts + 1))
    assert all(restart.complete for restart in found.restarts)


def two_attempts() -> Timeline:
    timeline = Timeline()
    start = {"launch": 1.0, "imports": 5.0, "rendezvous": 2.0, "build": 3.0, "load": 0.0}
    timeline.begin(60.0, start)
    timeline.steps(10, 1.0, first=4.0)
    timeline.crash(25.0)
    timeline.begin(10.0, start | {"load": 6.0})
    timeline.steps(12, 1.0, first=4.0)
    return timeline


def test_recovery_by_part() -> None:
    timeline = two_attempts()
    timeline.end(2.0)
    found = timeline.account()
    [restart] = found.restarts
    assert (restart.attempt, restart.why, restart.step, restart.redone_steps) == (2, "exit 1", 8, 2)
    assert (restart.detect, restart.queue) == pytest.approx((25, 10))
    parts = {"launch": 1, "imports": 5, "rendezvous": 2, "build": 3, "load": 6, "first_step": 5}
    assert restart.start == pytest.approx(parts)
    assert restart.total == pytest.approx(57)
    assert found.goodput == pytest.approx((8 + 12) / found.whole)


def test_nobody_wanted_it_to_run_meanwhile() -> None:
    timeline = two_attempts()
    timeline.end(2.0)
    whole = timeline.account().whole
    timeline.now += 86400
    timeline.begin(0.0, dict.fromkeys(START, 0.0))
    timeline.steps(4, 1.0)
    timeline.end(0.0)
    found = timeline.account()
    assert found.whole == pytest.approx(whole + 4)
    assert len(found.restarts) == 1


def test_a_run_that_goes_on() -> None:
    timeline = two_attempts()
    running = timeline.account(now=timeline.now + 7)
    assert running.seconds["unknown"] == pytest.approx(7)
    timeline.launched[-1] = replace(timeline.launched[-1], ended=timeline.now + 3)
    waiting = timeline.account(now=timeline.now + 103, waiting_since=timeline.now + 3)
    assert waiting.seconds["detect"] == pytest.approx(25 + 3)
    assert waiting.seconds["queue"] == pytest.approx(60 + 10 + 100)


def test_attempts_that_wrote_no_record() -> None:
    timeline = two_attempts()
    before = timeline.account(now=timeline.now)
    timeline.launched.append(Launched(3, timeline.now + 10, timeline.now + 4, timeline.now + 30, "exit 1"))
    found = timeline.account()
    assert found.seconds["detect"] == pytest.approx(before.seconds["detect"] + 4)
    assert found.seconds["queue"] == pytest.approx(before.seconds["queue"] + 6)
    assert found.start["other"] == pytest.approx(20)
    assert not found.restarts[-1].complete


def test_a_lost_record_costs_no_more_than_itself() -> None:
    timeline = two_attempts()
    whole = timeline.account(now=timeline.now)
    lost = next(i for i, record in enumerate(timeline.records) if (record.type, record.step) == ("step", 6))
    del timeline.records[lost]
    found = timeline.account(now=timeline.now)
    assert found.whole == pytest.approx(whole.whole)
    assert found.seconds["unknown"] == pytest.approx(2.0)
    assert found.seconds["train"] == pytest.approx(whole.seconds["train"] - 2.0)


@pytest.mark.parametrize("leap", [-86400.0, -30.0, 86400.0])
def test_a_clock_that_is_set_changes_nothing_inside_an_attempt(leap: float) -> None:
    timeline = two_attempts()
    before = timeline.account(now=timeline.now)
    middle = next(i for i, record in enumerate(timeline.records) if (record.type, record.step) == ("step", 6))
    for i in range(middle, len(timeline.records)):
        timeline.records[i] = replace(timeline.records[i], time=timeline.records[i].time + leap)
        if "began" in timeline.records[i].fields:
            timeline.records[i].fields["began"] += leap
    first, second = timeline.launched
    assert first.ended is not None and second.queued is not None
    second = replace(second, began=second.began + leap, queued=second.queued + leap)
    timeline.launched = [replace(first, ended=first.ended + leap), second]
    after = timeline.account(now=timeline.now + leap)
    assert after.seconds == pytest.approx(before.seconds)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 6))
def test_nothing_is_negative_whatever_was_lost_or_set(seed: int, spoils: int) -> None:
    dice, timeline = random.Random(seed), two_attempts()
    for _ in range(spoils):
        i = dice.randrange(len(timeline.records))
        record = timeline.records[i]
        kind = dice.choice(["lose", "time", "fields", "launch", "step", "double"])
        if kind == "lose" and len(timeline.records) > 1:
            del timeline.records[i]
        elif kind == "time":
            timeline.records[i] = replace(record, time=record.time + dice.uniform(-1e9, 1e9))
        elif kind == "fields":
            wrong = {
                "spent": {"train": dice.choice([-5, "x", None, 1e300])},
                "seconds": dice.choice([{}, -3, {"load": -1}]),
            }
            timeline.records[i] = replace(record, fields=record.fields | wrong)
        elif kind == "launch" and timeline.launched:
            j = dice.randrange(len(timeline.launched))
            each = timeline.launched[j]
            timeline.launched[j] = replace(
                each, began=each.began + dice.uniform(-1e5, 1e5), ended=dice.choice([None, 0.0])
            )
        elif kind == "step":
            timeline.records[i] = replace(record, step=dice.randrange(20))
        else:
            timeline.records.insert(i, record)
    now = timeline.now + dice.uniform(-1e5, 1e5)
    for found in (timeline.account(), timeline.account(now=now), timeline.account(now=now, waiting_since=now - 1e4)):
        assert all(value >= 0 for value in (*found.seconds.values(), *found.start.values()))
        assert all(r.detect >= 0 and r.queue >= 0 and min([0, *r.start.values()]) == 0 for r in found.restarts)
        assert found.whole == pytest.approx(sum(found.seconds.values()))
        assert found.seconds["start"] == pytest.approx(sum(found.start.values()))
        assert found.goodput is None or 0 <= found.goodput <= 1


def test_an_older_journal() -> None:
    """Without `spent`, the clock on the wall tells how long steps took."""
    records = [Record("attempt", 1, 0, EPOCH, {"parent": None})]
    records += [Record("step", 1, step, EPOCH + 10 * step, {}) for step in range(1, 6)]
    found = account(records, {1: (None, 0)})
    assert found.seconds["train"] == pytest.approx(50)
    assert found.whole == pytest.approx(50)


def test_nothing_yet() -> None:
    found = account([], {}, now=EPOCH, waiting_since=EPOCH - 5)
    assert found.seconds["queue"] == pytest.approx(5)
    assert account([], {}).goodput is None
