"""What a count says of how far long work is."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest

from data_pipeline import progress
from data_pipeline.progress import Beside, Count, Elapsed


def test_a_line_says_how_many_how_fast_and_how_long() -> None:
    count = Count()
    count(0, 12, "verify", "checkpoints")
    assert count.line(3, 12, 7.5) == "verify: 3 of 12 checkpoints, 0.4/s, 0:22 left"
    assert count.line(0, 12, 7.5) == "verify: 0 of 12 checkpoints, 0.0/min, ? left"
    assert count.line(1, 3, 60) == "verify: 1 of 3 checkpoints, 1.0/min, 2:00 left"
    assert count.line(4000, 12_000, 2) == "verify: 4,000 of 12,000 checkpoints, 2,000/s, 0:04 left"
    count(2_000_000, 10_000_000, "read", "bytes")  # another count begins where it is
    assert count.line(4_000_000, 10_000_000, 2) == "read: 40 % of 10.0 MB, 1.0 MB/s, 0:06 left"


def test_a_log_has_a_line_a_minute(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr("data_pipeline.progress.time.monotonic", lambda: float(next(clock)))
    with Count() as count:
        for done in range(10):
            count(done, 10, "verify", "checkpoints")
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 6 and all(line.startswith("verify: ") and " left" in line for line in lines)


def test_a_call_that_tells_nothing_is_timed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "LINE_S", 0.01)
    with caplog.at_level("INFO"), Elapsed("tokenizer: merging") as merging:
        assert list(merging.after([1, 2])) == [1, 2]
        while len(caplog.messages) < 2:
            time.sleep(0.01)
    assert caplog.messages[0] == "tokenizer: merging: 0:00 so far"
    told = len(caplog.messages)
    time.sleep(0.05)
    assert len(caplog.messages) == told


def test_what_tells_nothing_at_all_is_timed_from_its_begin(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LINE_S", 0.01)
    with caplog.at_level("INFO"), Elapsed("trace of step 5", at_once=True):
        while not caplog.messages:
            time.sleep(0.01)
    assert caplog.messages[0] == "trace of step 5: 0:00 so far"


def test_copying_beside_other_work_has_a_line_a_minute_and_no_bar(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr("data_pipeline.progress.time.monotonic", lambda: float(next(clock)))
    with caplog.at_level("INFO"):
        beside = Beside("archiving step-5.b1", 10_000_000, progress.log)
        for _ in range(8):
            beside.add(1_000_000)
    assert 1 <= len(caplog.messages) <= 4
    assert re.fullmatch(r"archiving step-5.b1: \S+ MB of 10.0 MB, \S+ kB/s, \S+ left", caplog.messages[0])


def test_a_rank_that_is_not_the_first_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Count(is_shown=False) as count:
        count(1, 4, "load step-5.b1", "parameters")
    assert terminal.getvalue() == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Count() as count:
        count(1, 4, "verify", "checkpoints")
        count(2, 4, "verify", "checkpoints")
        count(1, 4, "draw", "plots")
    assert "2 of 4 checkpoints" in terminal.getvalue() and "1 of 4 plots" in terminal.getvalue()
