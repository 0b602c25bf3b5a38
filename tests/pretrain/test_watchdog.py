"""A rank that hangs ends in the stacks of all, with its name; a rank that is absent or slow is named as well."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from pretrain.guard import HUNG
from pretrain.ranks import expand, slurm_hosts
from pretrain.stragglers import STEPS, Stragglers
from pretrain.track.journal import read_journal
from tests.runs import TORCH, Started, events, run_to_end, write_run, zero

HOST = os.uname().nodename


def suspects(folder: Path) -> list[dict[str, object]]:
    lines = (folder / "run" / "logs" / "attempt-1" / "suspects.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(("engine", "ranks", "stopped"), [(TORCH, 2, 1), (zero(1), 2, 0), (zero(3), 3, 1)])
def test_a_stopped_rank_ends_in_every_other_ranks_stack(engine: str, ranks: int, stopped: int, tmp_path: Path) -> None:
    config = write_run(tmp_path, engine)
    (tmp_path / "run" / "logs" / "attempt-1").mkdir(parents=True)
    fails = f"train.step@{stopped}#12=stop; watchdog.stacks@2=sleep:10"  # rank 2, where there is one, is late to read
    variables = {"LONGHAUL_FAIL_AT": fails, "LONGHAUL_ATTEMPT": "1"}
    started = Started(config, ranks, "guard.hang_timeout_s=15", variables=variables)
    alive = [rank for rank in range(ranks) if rank != stopped]
    try:
        codes = [started.processes[rank].wait(200) for rank in alive]
    finally:
        started.signal(signal.SIGCONT, rank=stopped)
        started.kill()
    assert codes == [HUNG] * len(alive), started.text
    for rank in alive:
        text = started.outputs[rank].read_text()
        assert f"rank {rank} ({HOST}) made no progress for" in text and "in step at step 1" in text
        assert "Current thread" in text and "train.py" in text  # the stack of the loop
        assert f"rank {stopped} ({HOST})" in text.split("made no progress")[1]
    assert {suspect["rank"] for suspect in suspects(tmp_path)} == {stopped}
    if stopped != 0:
        assert events(tmp_path, "hang")
        assert [r.fields["exit_code"] for r in read_journal(tmp_path / "run") if r.type == "end"] == [HUNG]
    run_to_end(config, ranks)


def test_a_rank_that_is_absent_is_named(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    (tmp_path / "run" / "logs" / "attempt-1").mkdir(parents=True)
    nodes = {"SLURM_STEP_NODELIST": "n[1-3]", "SLURM_STEP_TASKS_PER_NODE": "1(x3)", "LONGHAUL_ATTEMPT": "1"}
    started = Started(config, 3, "guard.rendezvous_timeout_s=15", variables=nodes)
    started.kill(rank=2)
    assert started.wait()[:2] == [1, 1]
    for rank in (0, 1):
        (line,) = [x for x in started.outputs[rank].read_text().splitlines() if x.startswith("pretrain:")]
        assert line == "pretrain: rendezvous: after 15 s rank(s) 2 (n3) of 3 were absent"
    assert {(s["host"], s["cause"]) for s in suspects(tmp_path)} == {("n3", line.removeprefix("pretrain: "))}


def test_an_absent_rank_0_is_named(tmp_path: Path) -> None:
    started = Started(write_run(tmp_path), 2, "guard.rendezvous_timeout_s=8")
    started.kill(rank=0)
    assert started.wait()[1] == 1
    text = started.outputs[1].read_text()
    assert "pretrain: rendezvous: rank 0 did not answer at 127.0.0.1:" in text and "within 8 s: is it running" in text


def test_hosts_of_slurm() -> None:
    assert expand("n[03-05,9],m1") == ["n03", "n04", "n05", "n9", "m1"]
    assert slurm_hosts({"SLURM_STEP_NODELIST": "n[1-3]", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}) == [
        "n1", "n1", "n2", "n2", "n3",
    ]  # fmt: skip
    assert slurm_hosts({}) == []


def test_a_slow_rank_is_named_by_its_own_time() -> None:
    stragglers = Stragglers(4, factor=1.5)
    found = [stragglers.add([1.0, 1.1, 1.9, 1.0], 2.0) for _ in range(STEPS)]
    assert found[:-1] == [[]] * (STEPS - 1)
    ((rank, share),) = found[-1]
    assert rank == 2 and share == pytest.approx(1.9)
    quick = Stragglers(2, factor=1.5)
    assert all(quick.add([0.010, 0.016], 2.0) == [] for _ in range(STEPS))  # nothing beside the step


def test_a_slow_rank_of_a_run_is_named(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=55)
    slow = {"LONGHAUL_FAIL_AT": "engine.forward@1=sleep:0.05"}
    started = Started(config, 2, variables=slow)
    assert started.wait() == [0, 0], started.text
    (event,) = events(tmp_path, "slow_rank")
    assert event["rank"] == 1 and f"rank 1 ({HOST}) takes" in started.text
