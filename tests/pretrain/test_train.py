"""Runs from end to end: killed, stopped, resumed, refused, damaged."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

from pretrain import checkpoint
from pretrain.lineage import Lineage
from pretrain.run import load_run
from pretrain.segments import Segments, plan_course
from pretrain.track.journal import read_journal
from tests.runs import TORCH, Started, final_state, losses, run_to_end, write_run, zero


@pytest.mark.parametrize(("engine", "ranks"), [(TORCH, 2), (zero(1), 2), (zero(3), 2)])
def test_killed_and_resumed_is_the_same_run_to_the_last_bit(engine: str, ranks: int, tmp_path: Path) -> None:
    golden, killed = tmp_path / "golden", tmp_path / "killed"
    run_to_end(write_run(golden, engine), ranks)
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    started = Started(write_run(killed, engine), ranks)
    started.wait_for_step(random.Random(seed).randrange(11, 38))
    started.kill()
    text = run_to_end(killed / "run.yaml", ranks)
    assert "going on from step-" in text
    (position, state), (golden_position, golden_state) = final_state(killed), final_state(golden)
    assert position == golden_position
    assert all(torch.equal(state[name], golden_state[name]) for name in golden_state)
    _by_corpus_adds_up(golden)
    later = losses(killed, 2)
    assert later == {step: loss for step, loss in losses(golden, 1).items() if step in later}


def _by_corpus_adds_up(folder: Path) -> None:
    """The training losses of the corpora, weighted by what the order has them feed, are the loss of each step."""
    run = load_run(folder / "run")
    course = plan_course(run, Segments(run.run_folder).read())
    records = [r for r in read_journal(run.run_folder) if r.type == "step"]
    assert len(records) == 40
    for record in records:
        start, end = (course.order.drawn(course.steps.start(step)) for step in (record.step - 1, record.step))
        counts = {name: end[name] - start[name] for name in end if end[name] > start[name]}
        assert {f"train_loss/{name}" for name in counts} == {n for n in record.metrics if n.startswith("train_loss/")}
        parts = [count * record.metrics[f"train_loss/{name}"] for name, count in counts.items()]
        assert sum(parts) / sum(counts.values()) == pytest.approx(record.metrics["loss"], rel=1e-6)


@pytest.mark.parametrize("engine", [TORCH, zero(1)])
def test_with_dropout_it_is_the_same_run_too(engine: str, tmp_path: Path) -> None:
    """And with banded layers, within documents; on two ranks and into a fresh engine, see test_dropout.py."""
    golden, killed = tmp_path / "golden", tmp_path / "killed"
    model, overrides = ", dropout: 0.1, attention: [dense, banded], band: 16", ["data.document_mask=true"]
    run_to_end(write_run(golden, engine, 16, model), 1, *overrides)
    started = Started(write_run(killed, engine, 16, model), 1, *overrides)
    started.wait_for_step(13)
    started.kill()
    assert "going on from step-10" in run_to_end(killed / "run.yaml", 1, *overrides)
    (position, state), (golden_position, golden_state) = final_state(killed), final_state(golden)
    assert position == golden_position
    assert all(torch.equal(state[name], golden_state[name]) for name in golden_state)


@pytest.mark.parametrize(
    ("stage", "before", "after"), [(1, 2, 1), (1, 1, 2), (1, 2, 3), (3, 2, 1), (3, 1, 2), (3, 2, 3)]
)
def test_resumed_on_another_number_of_ranks(stage: int, before: int, after: int, tmp_path: Path) -> None:
    """While the batch grows, so that the ranks are fed rows that fill up their micro-batches, or nothing else."""
    config = write_run(tmp_path / "elastic", zero(stage), steps=20)
    ramp = ["batch_ramp.start_tokens=64", "batch_ramp.over_tokens=8000"]
    started = Started(config, before, *ramp)
    started.wait_for_step(12)
    started.signal(signal.SIGTERM)
    assert started.wait() == [3] * before
    run_to_end(config, after, *ramp)
    golden = tmp_path / "golden"
    run_to_end(write_run(golden, TORCH, steps=20), 1, *ramp)
    assert final_state(golden)[0]["step"] > 20
    assert final_state(tmp_path / "elastic")[0] == final_state(golden)[0]  # step, samples, tokens, digest
    later, expected = losses(tmp_path / "elastic", 2), losses(golden, 1)
    assert later == pytest.approx({step: expected[step] for step in later}, abs=2e-5)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 3), (signal.SIGUSR1, 3), (signal.SIGUSR2, 3), (signal.SIGINT, 130)]
)
def test_a_signal_to_any_rank_saves_once_and_exits(number: signal.Signals, code: int, tmp_path: Path) -> None:
    started = Started(write_run(tmp_path), 2)
    started.wait_for_step(3)
    started.signal(number, rank=1)
    assert started.wait() == [code, code]
    newest = checkpoint.live_checkpoints(tmp_path / "run")[0]
    step = checkpoint.open_checkpoint(newest).position.step
    assert 3 <= step < 40 and f"at step {step} (exit {code})" in started.text
    assert started.text.count(f"checkpoint {newest.name}") == 1


def test_a_finished_run_has_nothing_to_do(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=10)
    run_to_end(config)
    assert "train_tokens 6400 reached at step 10 (exit 0)" in run_to_end(config)


def test_damage_is_reported_and_the_checkpoint_before_used(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    run_to_end(config)
    newest = checkpoint.live_checkpoints(tmp_path / "run")[0] / "rank-0-of-1.bin"
    data = bytearray(newest.read_bytes())
    data[len(data) // 3] ^= 4
    newest.write_bytes(data)
    golden = final_state(tmp_path)[0]
    text = run_to_end(config)
    assert f"{newest}: damaged between byte 0 and" in text
    assert "going on from step-30.b1 (10 steps lost)" in text
    assert final_state(tmp_path)[0] == golden
    assert checkpoint.verify(checkpoint.live_checkpoints(tmp_path / "run")[0]) == []


def test_a_missing_file_in_the_newest_checkpoint(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    run_to_end(config)
    (checkpoint.live_checkpoints(tmp_path / "run")[0] / "rank-0-of-1.json").unlink()
    text = run_to_end(config)
    assert "rank-0-of-1.json: missing" in text
    assert "going on from step-30.b1 (10 steps lost)" in text


def refused(config: Path, *overrides: str) -> str:
    """The one line with which a start is refused."""
    started = Started(config, 1, *overrides)
    assert started.wait() == [2], started.text
    (line,) = started.text.splitlines()
    return line


def test_what_a_start_refuses(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=10)
    folder = tmp_path / "run"
    assert refused(config, "resume=must") == f"pretrain: resume: must, but {folder} holds no run"
    run_to_end(config)
    assert refused(config, "resume=never") == (
        f"pretrain: resume: never, but {folder} holds a run; give another run_folder, or set resume=auto"
    )
    assert refused(config, "resume=/no/where") == (
        f"pretrain: resume: /no/where: not a checkpoint of this run; they lie in {folder}/checkpoints"
    )
    missing = f"{folder}/checkpoints/step-7.b1"
    assert refused(config, f"resume={missing}") == f"pretrain: resume: {missing}: no such checkpoint"
    assert refused(config, "seed=2") == (
        f"pretrain: {folder}: seed: 1 -> 2: is part of what this run is; give another run_folder to start a new run"
    )
    assert refused(config, "optim.lr_peak=1e-4") == (
        f"pretrain: {folder}: optim.lr_peak: 0.003 -> 0.0001: changes the course of this run; "
        "use `pretrain amend RUN key=value`"
    )
    shutil.rmtree(folder / "checkpoints")
    assert refused(config) == (
        f"pretrain: {folder}: no checkpoint of the live lineage verifies, and steps were trained"
    )


def test_every_rank_of_a_refused_start_exits_with_2_and_one_says_why(tmp_path: Path) -> None:
    started = Started(write_run(tmp_path, steps=10), 3, "resume=must")
    assert started.wait() == [2, 2, 2]
    said = [path.read_text().splitlines() for path in started.outputs]
    assert said == [[f"pretrain: resume: must, but {tmp_path / 'run'} holds no run"], [], []]


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=10)
    run_to_end(config)
    folder = tmp_path / "run"
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "journal")  # as a kill between the branch and the first commit leaves it
    run_to_end(config)
    assert Lineage(folder).highest() == 2 and final_state(tmp_path)[0]["step"] == 10


def test_a_second_attempt_takes_over(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=4000)
    first = Started(config)
    first.wait_for_step(12)
    first.signal(signal.SIGSTOP)
    second = Started(config)
    second.wait_for_step(22)
    first.signal(signal.SIGCONT)
    assert first.wait() == [6]
    assert "branch 2 (resume, host" in first.text and "has taken over this run from branch 1" in first.text
    second.signal(signal.SIGTERM)
    assert second.wait() == [3]
    assert Lineage(tmp_path / "run").live() == [(2, None), (1, 10)]


def test_amended_in_mid_run(tmp_path: Path) -> None:
    from pretrain.amend import amend

    config = write_run(tmp_path)
    started = Started(config)
    started.wait_for_step(15)
    started.signal(signal.SIGTERM)
    started.wait()
    step = checkpoint.open_checkpoint(checkpoint.live_checkpoints(tmp_path / "run")[0]).position.step
    record = amend(tmp_path / "run", ["data.sources.beta.weight=2", "optim.lr_peak=1e-3", "batch_tokens=1280"])
    assert record.from_sample == 10 * step
    run_to_end(config)
    position = final_state(tmp_path)[0]
    left = 40 * 640 - 640 * step
    assert position["step"] == step + -(-left // 1280)


def test_resumed_from_a_named_checkpoint_and_only_once(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    run_to_end(config, 1, "checkpoint.keep_last=9")
    golden = final_state(tmp_path)[0]
    named = f"resume={tmp_path}/run/checkpoints/step-20.b1"
    assert "going on from step-20.b1" in run_to_end(config, 1, "checkpoint.keep_last=9", named)
    assert "going on from step-40.b2" in run_to_end(config, 1, "checkpoint.keep_last=9", named)
    assert final_state(tmp_path)[0] == golden


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    run_to_end(config, 1, "checkpoint.keep_last=1", "checkpoint.keep_every_steps=20")
    names = {path.name for _, _, path in checkpoint.all_checkpoints(tmp_path / "run")}
    assert names == {"step-20.b1", "step-40.b1"}
