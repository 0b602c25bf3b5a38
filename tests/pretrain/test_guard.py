"""The guard: steps that are not finite, spikes, rollbacks, weights that differ, signals and the time left."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain import checkpoint, guard
from pretrain.guard import Guard, SkippedSteps, Spikes, StopSignals
from pretrain.lineage import Lineage
from pretrain.segments import Segments
from tests.runs import TORCH, Started, events, final_state, losses, run_to_end, write_run, zero

ROLLBACK = "guard.rollback={}"


def fails(text: str) -> dict[str, str]:
    return {"LONGHAUL_FAIL_AT": text}


# --- arithmetic -----------------------------------------------------------------------------------------------------


def test_only_skipped_steps_in_a_row_count() -> None:
    skipped = SkippedSteps(Guard(max_skipped_steps=2))
    assert [skipped.gives_up(applied) for applied in (False, True, False, False)] == [False, False, False, True]


def test_a_spike_is_found_and_not_taken_for_normal_afterwards() -> None:
    spikes = Spikes(Guard(spike_sigmas=6))
    assert all(spikes.add(3 + 0.01 * (i % 3), 1.0) is None for i in range(20))
    for _ in range(3):
        spike = spikes.add(9.0, 1.0)
        assert spike is not None and (spike.quantity, spike.value) == ("loss", 9.0) and spike.sigmas > 100
    assert spikes.add(3.01, 1.0) is None
    norm = spikes.add(3.0, 50.0)
    assert norm is not None and norm.quantity == "grad_norm"


def test_spikes_go_on_from_a_checkpoint_as_if_nothing_had_been() -> None:
    whole, first = Spikes(Guard()), Spikes(Guard())
    series = [(3 + 0.1 * (i % 7), 1 + 0.05 * (i % 5)) for i in range(60)]
    for loss, norm in series[:30]:
        whole.add(loss, norm)
        first.add(loss, norm)
    second = Spikes(Guard(), first.state())
    assert [whole.add(*each) for each in series[30:]] == [second.add(*each) for each in series[30:]]
    assert whole.add(4.9, 1.0) == second.add(4.9, 1.0) != None  # noqa: E711


def test_the_end_of_the_allocation_is_a_request_to_stop() -> None:
    stop = StopSignals({"LONGHAUL_END_TIME": str(time.time() + 100)})
    assert stop.exit_code(needed_s=20) is None
    assert stop.exit_code(needed_s=90) == guard.STOPPED
    assert 90 < stop.left_s() <= 100


def test_after_term_the_time_left_is_the_launchers() -> None:
    stop = StopSignals({"LONGHAUL_KILL_WAIT_S": "30"})
    assert stop.left_s() == float("inf")
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.exit_code() == guard.STOPPED and 20 < stop.left_s() <= 30


# --- steps that are not finite --------------------------------------------------------------------------------------


def test_a_run_that_diverges_gives_up(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    overrides = ("optim.lr_peak=1e38", "schedule={kind: constant}", "guard.max_skipped_steps=4")
    started = Started(config, 1, *overrides)
    assert started.wait() == [guard.GAVE_UP], started.text
    assert started.text.count("SKIPPED: the gradient is not finite") >= 3
    assert "4 steps in a row had a gradient that is not finite at step 5 (exit 7)" in started.text
    assert [path.name for _, _, path in checkpoint.all_checkpoints(tmp_path / "run")] == ["step-0.b1"]


@pytest.mark.parametrize("engine", [TORCH, zero(1)])
def test_a_batch_with_nan_is_skipped_and_its_documents_named(engine: str, tmp_path: Path) -> None:
    config = write_run(tmp_path, engine, steps=12)
    started = Started(config, 2, variables=fails("train.batch@1#5=nan"))
    assert started.wait() == [0, 0], started.text
    (skip,) = events(tmp_path, "skip")
    assert (skip["step"], skip["ranks"], skip["first_sample"], skip["end_sample"]) == (6, [1], 50, 60)
    assert skip["documents"] and all(name.split(":")[0] in ("alpha", "beta") for name in skip["documents"])
    assert f"step 6 skipped, its gradient is not finite; documents: {skip['documents'][0]}" in started.text
    assert final_state(tmp_path)[0]["step"] == 12


def skipping(folder: Path, engine: str, ranks: int, at_step: int, samples: tuple[int, int]) -> None:
    """A run of 40 steps which leaves out samples from a step on, without ever having met them."""
    config = write_run(folder, engine)
    run_to_end(config, ranks, f"stop_at_step={at_step}")
    segments = Segments(folder / "run")
    (first,) = segments.read()
    segments.write(replace(first, segment=1, from_sample=at_step * 10, skips=[samples]))
    run_to_end(config, ranks)


@pytest.mark.parametrize(("engine", "ranks"), [(TORCH, 1), (TORCH, 2), (zero(1), 2), (zero(3), 2)])
def test_rolled_back_is_the_run_that_never_met_the_bad_samples(engine: str, ranks: int, tmp_path: Path) -> None:
    rolled, golden = tmp_path / "rolled", tmp_path / "golden"
    config = write_run(rolled, engine)
    started = Started(
        config, ranks, ROLLBACK, "guard.max_skipped_steps=2",
        variables=fails("train.batch@0#24=nan; train.batch@0#25=nan"),
    )  # fmt: skip
    assert started.wait() == [0] * ranks, started.text
    why = "2 steps in a row had a gradient that is not finite"
    assert f"{why}; back to step 20, samples 240 to 259 skipped" in started.text
    branches = Lineage(rolled / "run").branches()
    assert branches[2].why == f"rollback: {why}; samples 240 to 259 skipped"
    assert Lineage(rolled / "run").live() == [(3, None), (1, 20)]
    (event,) = events(rolled, "rollback")
    assert (event["to_step"], event["begin"], event["end"], event["new_branch"]) == (20, 240, 260, 2)
    skipping(golden, engine, ranks, 20, (240, 260))
    (position, state), (golden_position, golden_state) = final_state(rolled), final_state(golden)
    assert position == golden_position and position["tokens"] == 40 * 640 < position["samples"] * 64
    assert all(torch.equal(state[name], golden_state[name]) for name in golden_state)


def test_a_spike_is_marked_and_with_the_policy_on_rolled_back(tmp_path: Path) -> None:
    marked, rolled = tmp_path / "marked", tmp_path / "rolled"
    spoiled = fails("train.batch@1#24=scale:1000")
    started = Started(write_run(marked, zero(1)), 2, variables=spoiled)
    assert started.wait() == [0, 0], started.text
    spike = events(marked, "spike")[0]
    assert spike["step"] in (25, 26) and "sigmas above the steps before" in started.text
    assert not events(marked, "rollback")
    started = Started(write_run(rolled, zero(1)), 2, "guard.rollback={skip_steps_after: 1}", variables=spoiled)
    assert started.wait() == [0, 0], started.text
    (event,) = events(rolled, "rollback")
    assert (event["to_step"], event["begin"], event["end"]) == (20, 240, 260)


def test_rollbacks_come_to_an_end(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    bad = "; ".join(f"train.batch#{step}=nan" for step in range(24, 40))
    started = Started(
        config, 1, "guard.rollback={at_most: 2}", "guard.max_skipped_steps=1", variables=fails(bad)
    )  # fmt: skip
    assert started.wait() == [guard.GAVE_UP], started.text
    assert "2 rollbacks are all that guard.rollback.at_most allows" in started.text
    assert [e["begin"] for e in events(tmp_path, "rollback")] == [240, 250]


@pytest.mark.parametrize("moment", ["rollback.branch_taken", "rollback.committed", "rollback.begun"])
def test_rolled_back_then_killed(moment: str, tmp_path: Path) -> None:
    """The retired branch, which has gone further, is never resumed."""
    config = write_run(tmp_path)
    settings = (ROLLBACK, "guard.max_skipped_steps=1", "guard.rollback.skip_steps_before=5")
    bad = "train.batch#33=nan"
    started = Started(config, 1, *settings, variables=fails(f"{bad}; {moment}=kill"))
    assert started.wait() == [-signal.SIGKILL], started.text
    lineage = Lineage(tmp_path / "run")
    assert lineage.branches()[2].why.startswith("rollback") and lineage.live()[-1] == (1, 20)
    assert (tmp_path / "run" / "checkpoints" / "step-30.b1").exists()
    started = Started(config, 1, *settings, variables=fails(bad))
    assert started.wait() == [0], started.text
    assert "going on from step-20.b1" in started.text
    assert final_state(tmp_path)[0]["tokens"] == 40 * 640


# --- weights --------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_the_weights_of_one_rank_is_found_and_the_rank_named(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    logs = tmp_path / "run" / "logs" / "attempt-1"
    logs.mkdir(parents=True)
    started = Started(
        config, 3, "guard.check_weights_every_steps=5",
        variables=fails("train.weights@1#22=flip") | {"LONGHAUL_ATTEMPT": "1"},
    )  # fmt: skip
    assert started.wait() == [1, 1, 1], started.text
    host = os.uname().nodename
    assert (
        f"weights differ on rank 1 ({host}): memory or computation of that node is damaged at step 25" in started.text
    )
    assert '"cause": "weights differ from the other ranks"' in (logs / "suspects.jsonl").read_text()
    assert checkpoint.live_checkpoints(tmp_path / "run")[0].name == "step-20.b1"  # nothing damaged was saved
    run_to_end(config, 3)


def test_with_two_ranks_nobody_can_tell_whose_weights_are_damaged(tmp_path: Path) -> None:
    started = Started(write_run(tmp_path), 2, variables=fails("train.weights@1#12=flip"))
    assert started.wait() == [1, 1], started.text
    assert "weights differ between ranks 0 (" in started.text and "at step 20" in started.text


# --- stopping -------------------------------------------------------------------------------------------------------


def test_stopped_at_a_step_and_gone_on_later(tmp_path: Path) -> None:
    stopped, golden = tmp_path / "stopped", tmp_path / "golden"
    config = write_run(stopped)
    assert "stop_at_step 15 reached at step 15 (exit 0)" in run_to_end(config, 2, "stop_at_step=15")
    run_to_end(config, 2)
    run_to_end(write_run(golden), 2)
    assert final_state(stopped)[0] == final_state(golden)[0]
    assert losses(stopped, 2) == {step: loss for step, loss in losses(golden, 1).items() if step > 15}


@pytest.mark.parametrize("step", [37, 38, 39])
def test_asked_to_stop_at_the_very_end(step: int, tmp_path: Path) -> None:
    """Whatever step it reaches, that step has its checkpoint, and the next start finds nothing lost."""
    config = write_run(tmp_path)
    started = Started(config, 2, variables=fails(f"train.step@1#{step}=term"))
    (code,) = set(started.wait())
    reached = final_state(tmp_path)[0]["step"]
    assert (code, reached) in [(guard.STOPPED, step + 2), (guard.STOPPED, 40), (guard.DONE, 40)], started.text
    run_to_end(config, 2)
    assert final_state(tmp_path)[0]["step"] == 40


def test_an_evaluation_at_the_end_that_was_left_is_made_up_for(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=8)
    started = Started(config, 2, variables=fails("evaluate.batch@0#20=term; evaluate.batch=sleep:0.2"))
    codes = set(started.wait())
    if codes == {guard.STOPPED}:
        assert final_state(tmp_path)[0]["step"] == 8 and "evaluation left unfinished" in started.text
        assert "step 8  validation loss" in run_to_end(config, 2)
    else:
        pytest.fail(f"the signal came too early or late: {started.text}")


def test_a_rollback_needs_checkpoints_from_before_the_bad_steps(tmp_path: Path) -> None:
    started = Started(write_run(tmp_path), 1, ROLLBACK, "guard.max_skipped_steps=31")
    assert started.wait() == [guard.USAGE]
    assert (
        "checkpoint.keep_last: 3, but a rollback goes back over up to 31 bad steps: expected at least 5" in started.text
    )


def test_leaves_before_the_allocation_ends(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=100_000)
    started = Started(config, 2, variables={"LONGHAUL_END_TIME": str(time.time() + 60)})
    assert started.wait() == [3, 3], started.text
    step = final_state(tmp_path)[0]["step"]
    assert f"stopped and saved, to be started again at step {step} (exit 3)" in started.text


def test_a_save_for_which_there_is_no_time_is_not_begun(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=100_000)
    started = Started(
        config, 2, variables={"LONGHAUL_KILL_WAIT_S": "1"} | fails("checkpoint.gathered=sleep:2.5")
    )  # fmt: skip
    started.wait_for_step(15)
    started.signal(signal.SIGTERM, rank=1)
    started.signal(signal.SIGTERM, rank=0)
    assert started.wait() == [3, 3]
    assert "stopped without a save, for which the time left is too short" in started.text
    assert checkpoint.live_checkpoints(tmp_path / "run")[0].name.split(".")[0] in ("step-10", "step-20", "step-30")


def test_an_evaluation_is_left_when_the_ranks_are_asked_to_stop(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    started = Started(
        config, 2, "evaluation.every_steps=15", variables=fails("evaluate.batch=sleep:1")
    )  # fmt: skip
    started.wait_for_step(14)  # said after step 15, before its evaluation
    time.sleep(0.5)
    started.signal(signal.SIGTERM, rank=1)
    assert started.wait() == [3, 3], started.text
    assert "evaluation left unfinished: asked to stop" in started.text
    assert final_state(tmp_path)[0]["step"] <= 17


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("point", "where"),
    [
        ("train.step#0", "step at step 0"),
        ("evaluate.batch", "evaluation at step 0"),
        ("train.step#12", "step at step 12"),
    ],
)
def test_out_of_memory_shows_where_it_went_and_what_to_do(point: str, where: str, tmp_path: Path) -> None:
    started = Started(write_run(tmp_path), 1, variables=fails(f"{point}=oom"))
    assert started.wait() == [guard.OUT_OF_MEMORY], started.text
    assert f"out of memory in {where}. One rank of 1 needs about:" in started.text
    assert "masters and moments" in started.text and "together" in started.text
    assert "remedy: micro_batch_seqs=1 (now 3); the loss stays as it is" in started.text
