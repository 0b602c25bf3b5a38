"""The journal: strict JSON, one line per record, live records only up to where the child took over."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path

import pytest

from pretrain.track.journal import (
    Cursor,
    Journal,
    last_steps,
    lineage,
    live_records,
    read_journal,
    records_after,
)


def lines(run: Path, branch: int) -> list[str]:
    return (run / "journal" / f"{branch}.jsonl").read_text().splitlines()


def steps(run: Path, branch: int, parent: int | None, first: int, last: int) -> None:
    journal = Journal(run, branch)
    journal.attempt(parent, first - 1, "start")
    for step in range(first, last + 1):
        journal.step(step, step * 8, step * 8 * 64, None, {"loss": float(branch)})
    journal.close()


def test_every_kind_of_record_comes_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 3)
    journal.attempt(2, 40, "resumed", config={"name": "tiny", "seed": 1}, world_size=2)
    journal.step(41, 8, 512, "ab" * 16, {"loss": 2.5})
    journal.evaluation(41, 512, {"validation/wikipedia/loss": 3.5})
    journal.checkpoint(41, "ready", "checkpoints/step-41.b3", "cd" * 32)
    journal.end(41, 3, "SIGTERM")
    journal.close()
    attempt, step, evaluation, checkpoint, end = read_journal(tmp_path)
    assert {record.branch for record in read_journal(tmp_path)} == {3}
    assert (attempt.type, attempt.step) == ("attempt", 40)
    assert attempt.fields == {"parent": 2, "why": "resumed", "config": {"name": "tiny", "seed": 1}, "world_size": 2}
    assert step.fields == {"samples": 8, "tokens": 512, "digest": "ab" * 16, "metrics": {"loss": 2.5}}
    assert evaluation.metrics == {"validation/wikipedia/loss": 3.5}
    assert checkpoint.fields == {"status": "ready", "path": "checkpoints/step-41.b3", "manifest_hash": "cd" * 32}
    assert end.fields == {"exit_code": 3, "why": "SIGTERM"}
    assert attempt.time <= end.time


def test_what_is_not_finite_is_strict_json(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 1)
    journal.attempt(None, 0, "start", deep={"limit": [math.inf]})
    journal.step(1, 8, 512, None, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5})

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    records = [json.loads(line, parse_constant=refuse) for line in lines(tmp_path, 1)]
    assert records[0]["deep"] == {"limit": ["inf"]}
    assert records[1]["metrics"] == {"a": "nan", "b": "inf", "c": "-inf", "d": 1.5}
    metrics = list(read_journal(tmp_path))[1].metrics
    assert math.isnan(metrics.pop("a"))
    assert metrics == {"b": math.inf, "c": -math.inf, "d": 1.5}


def test_a_torn_line_is_no_record_and_harms_no_other(tmp_path: Path) -> None:
    steps(tmp_path, 1, None, 1, 3)
    path = tmp_path / "journal" / "1.jsonl"
    whole = path.read_bytes()
    for cut in range(len(whole) - len(whole.splitlines()[-1]), len(whole)):
        path.write_bytes(whole[:cut])
        assert [record.step for record in read_journal(tmp_path)] == [0, 1, 2]
    path.write_bytes(whole[:-2])
    journal = Journal(tmp_path, 1)
    journal.step(4, 32, 2048, None, {"loss": 1.0})
    journal.close()
    assert [record.step for record in read_journal(tmp_path)] == [0, 1, 2, 4]


def test_a_line_that_is_being_written_is_read_when_it_is_whole(tmp_path: Path) -> None:
    steps(tmp_path, 1, None, 1, 2)
    path = tmp_path / "journal" / "1.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    *_, (record, cursor) = records_after(tmp_path, Cursor())
    assert record.step == 1
    path.write_bytes(whole)
    assert [record.step for record, _ in records_after(tmp_path, cursor)] == [2]
    steps(tmp_path, 2, 1, 3, 3)
    assert [(record.branch, record.step) for record, _ in records_after(tmp_path, cursor)] == [(1, 2), (2, 2), (2, 3)]


def test_live_records_are_those_of_the_lineage(tmp_path: Path) -> None:
    steps(tmp_path, 1, None, 1, 9)  # killed at 9
    steps(tmp_path, 2, 1, 7, 12)  # went on from 6; killed at 12
    steps(tmp_path, 3, 1, 7, 7)  # went on from 6 again, since the checkpoint of branch 2 was damaged
    steps(tmp_path, 10, 3, 4, 5)  # a rollback to 3, over two branches
    branches = lineage(tmp_path)
    assert branches == {1: (None, 0), 2: (1, 6), 3: (1, 6), 10: (3, 3)}
    assert last_steps(branches) == {10: math.inf, 3: 3, 1: 3}
    live = [(r.branch, r.step) for r in live_records(read_journal(tmp_path), branches) if r.type == "step"]
    assert live == [(1, 1), (1, 2), (1, 3), (10, 4), (10, 5)]
    assert sum(r.type == "step" for r in read_journal(tmp_path)) == 9 + 6 + 1 + 2
    del branches[10]
    live = [(r.branch, r.step) for r in live_records(read_journal(tmp_path), branches) if r.type == "step"]
    assert live == [(1, step) for step in range(1, 7)] + [(3, 7)]


def test_a_branch_without_its_first_record_follows_the_one_before_it(tmp_path: Path) -> None:
    steps(tmp_path, 1, None, 1, 9)
    Journal(tmp_path, 2).step(6, 48, 3072, None, {"loss": 1.0})
    (tmp_path / "journal" / "3.jsonl").write_bytes(b'{"type": "atte')
    assert lineage(tmp_path) == {1: (None, 0), 2: (1, 5)}
    live = [(r.branch, r.step) for r in live_records(read_journal(tmp_path), lineage(tmp_path)) if r.type == "step"]
    assert live == [(1, step) for step in range(1, 6)] + [(2, 6)]


def test_a_journal_that_cannot_be_written_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "journal").write_text("a file in the way")
    journal = Journal(tmp_path, 1)
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            journal.step(step, 8, 512, None, {"loss": 1.0})
        journal.sync()
        journal.close()
    assert journal.lost == 3
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"{tmp_path}/journal/1.jsonl: cannot be written: ")
    assert caplog.messages[0].endswith("; training goes on, the journal has gaps")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "1.jsonl").symlink_to("/dev/full")
    journal = Journal(tmp_path, 1)
    journal.step(1, 8, 512, None, {"loss": 1.0})
    journal.step(2, 8, 512, None, {"loss": 1.0})
    assert journal.lost == 2
    assert len(caplog.messages) == 1
    assert "No space left on device" in caplog.messages[0]


def test_a_record_that_was_cut_short_is_followed_by_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path, 1)
    journal.step(1, 8, 512, None, {"loss": 1.0})
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:20]))  # what a full disk does
    journal.step(2, 8, 512, None, {"loss": 1.0})
    monkeypatch.undo()
    journal.step(3, 8, 512, None, {"loss": 1.0})
    assert journal.lost == 1
    assert "disk full: 20 of " in caplog.text
    assert [record.step for record in read_journal(tmp_path)] == [1, 3]


def test_secrets_are_not_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 1)
    journal.attempt(
        None,
        0,
        "resumed from s3://me:Hidden1@host/x",
        config={
            "data": {
                "uri": "https://me:Hidden2@host/shards",
                "hf_token": "Hidden3",
                "signed": "http://h/x?token=Hidden4",
            },
            "s3": {"secretKey": "Hidden5", "access_key": "Hidden6"},
            "batch_tokens": 512,
            "tokenizer": "tokenizer.json",
        },
    )
    journal.end(0, 1, "http://me:Hidden7@host refused")
    assert "Hidden" not in "".join(lines(tmp_path, 1))
    config = next(read_journal(tmp_path)).fields["config"]
    assert config["data"]["uri"] == "https://***@host/shards"
    assert config["data"]["signed"] == "http://h/x?token=***"
    assert config["batch_tokens"] == 512
    assert config["tokenizer"] == "tokenizer.json"
