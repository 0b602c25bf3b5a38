from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import ConfigError, Section, load
from data_pipeline.order import Steps
from pretrain.schedule import BatchRamp, Constant, Cosine, Linear, Schedule, WarmupStableDecay, step_pieces

ALL = [
    Constant(warmup_tokens=100),
    Cosine(warmup_tokens=100),
    Cosine(warmup_tokens=100, decay_tokens=600),
    Linear(warmup_tokens=100),
    WarmupStableDecay(warmup_tokens=100, cooldown_tokens=200),
]


class Run(Section):
    schedule: Schedule


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_the_warm_up_is_a_straight_line_to_the_peak(schedule: Schedule) -> None:
    assert [schedule.factor(tokens, 1000) for tokens in (1, 50, 99, 100)] == [0.01, 0.5, 0.99, 1.0]


@pytest.mark.parametrize("schedule", ALL, ids=repr)
@given(tokens=st.integers(1, 2000), train_tokens=st.integers(1, 1500))
def test_a_factor_is_above_the_floor_and_never_over_the_peak(
    schedule: Schedule, tokens: int, train_tokens: int
) -> None:
    assert 0 <= schedule.factor(tokens, train_tokens) <= 1


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_after_the_warm_up_it_never_rises_nor_jumps(schedule: Schedule) -> None:
    factors = [schedule.factor(tokens, 1000) for tokens in range(100, 1001)]
    falls = [a - b for a, b in pairwise(factors)]
    assert min(falls) >= 0
    assert max(falls) < 0.006


@pytest.mark.parametrize("schedule", [Cosine(warmup_tokens=100), Linear(warmup_tokens=100)], ids=repr)
@pytest.mark.parametrize("train_tokens", [50, 99, 100])
def test_a_training_that_ends_within_the_warm_up_does_not_jump(schedule: Schedule, train_tokens: int) -> None:
    assert [schedule.factor(tokens, train_tokens) for tokens in (98, 99, 100, 103)] == [0.98, 0.99, 1.0, 1.0]


def test_a_cosine_ends_at_its_fraction_in_the_last_step() -> None:
    cosine = Cosine(warmup_tokens=100, final_fraction=0.2)
    assert cosine.factor(550, 1000) == pytest.approx(0.6)  # half-way between 100 and 1000
    assert cosine.factor(325, 1000) == pytest.approx(0.2 + 0.8 * (1 + 0.5**0.5) / 2)
    assert cosine.factor(1000, 1000) == 0.2


def test_gpt3_cosine_goes_on_at_a_tenth() -> None:
    """Brown et al. 2020, appendix B: warm-up over 375 M tokens, to 10 % over 260 B of 300 B tokens."""
    gpt3 = Cosine(warmup_tokens=375_000_000, decay_tokens=260_000_000_000)
    assert gpt3.factor(187_500_000, 300_000_000_000) == 0.5
    assert gpt3.factor(130_187_500_000, 300_000_000_000) == pytest.approx(0.55)
    assert gpt3.factor(260_000_000_000, 300_000_000_000) == 0.1
    assert gpt3.factor(299_000_000_000, 300_000_000_000) == 0.1


def test_a_line_goes_to_0() -> None:
    factors = [Linear(warmup_tokens=100).factor(tokens, 1100) for tokens in (600, 1000, 1100)]
    assert factors == pytest.approx([0.5, 0.1, 0.0])


def test_a_cooldown_takes_the_last_tokens() -> None:
    schedule = WarmupStableDecay(warmup_tokens=100, cooldown_tokens=200, final_fraction=0.1)
    assert [schedule.factor(tokens, 1000) for tokens in (500, 800, 900, 1000)] == [1.0, 1.0, pytest.approx(0.55), 0.1]


def test_a_training_shorter_than_its_warm_up_only_warms_up() -> None:
    assert Cosine(warmup_tokens=100).factor(40, 40) == 0.4


def test_a_decay_inside_the_warm_up_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("schedule: {kind: linear, warmup_tokens: 375e6, decay_tokens: 375e6}\n")
    with pytest.raises(ConfigError) as error:
        load(Run, tmp_path / "run.yaml")
    assert str(error.value) == (
        f"{tmp_path / 'run.yaml'}:1: schedule: decay_tokens counts from the start and must be above "
        "warmup_tokens (375000000), got 375000000"
    )


def test_an_unknown_schedule_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("schedule: {kind: cosin}\n")
    with pytest.raises(ConfigError, match=r"got 'cosin'; did you mean cosine\?$"):
        load(Run, tmp_path / "run.yaml")


# --- the batch --------------------------------------------------------------------------------------------------------


def test_a_batch_grows_by_whole_increments_as_the_line_reaches_them() -> None:
    ramp = BatchRamp(start_tokens=20, over_tokens=1000)
    assert ramp.stages(seq_tokens=10, batch_seqs=9) == [(0, 2), (29, 4), (58, 6), (86, 8), (100, 9)]
    fine = BatchRamp(start_tokens=20, over_tokens=1000, increment_tokens=30)
    assert fine.stages(seq_tokens=10, batch_seqs=9) == [(0, 2), (43, 5), (86, 8), (100, 9)]
    assert ramp.stages(seq_tokens=10, batch_seqs=2) == [(0, 2)]


def test_stages_begin_with_a_step() -> None:
    stages = [(0, 2), (29, 4), (58, 6), (86, 8), (100, 9)]
    assert step_pieces(stages, 0) == [(0, 2), (30, 4), (58, 6), (88, 8), (104, 9)]
    assert step_pieces(stages, 34) == [(34, 4), (58, 6), (88, 8), (104, 9)]
    assert step_pieces(stages, 500) == [(500, 9)]
    assert step_pieces([(0, 2), (1, 3), (2, 4), (3, 5)], 0) == [(0, 2), (2, 4), (6, 5)]  # no step begins in the second


def test_gpt3_ramps_in_a_hundred_stages() -> None:
    stages = BatchRamp(start_tokens=2**15, over_tokens=12 * 10**9).stages(seq_tokens=2048, batch_seqs=1568)
    assert [size for _, size in stages] == [*range(16, 1568, 16), 1568]
    assert stages[0] == (0, 16) and stages[-1][0] == 12 * 10**9 // 2048


@given(
    start=st.integers(1, 40), more=st.integers(0, 200), over=st.integers(1, 20_000), increment=st.integers(1, 60),
    from_step=st.integers(0, 300),
)  # fmt: skip
def test_each_step_takes_what_the_line_allows(start: int, more: int, over: int, increment: int, from_step: int) -> None:
    """Step by step; and from any step on, the pieces are those of the whole."""
    ramp = BatchRamp(start_tokens=start, over_tokens=over, increment_tokens=increment)
    stages = ramp.stages(seq_tokens=1, batch_seqs=start + more)
    steps = Steps(step_pieces(stages, 0))
    for step in range(from_step, from_step + 30):
        sample = steps.start(step)
        line = start + more * min(sample, over) / over
        allowed = [size for size in [*range(start, start + more, increment), start + more] if size <= line + 1e-9]
        assert steps.batch(step) == max(allowed)
    later = steps.start(from_step)
    again = Steps([(sample - later, batch) for sample, batch in step_pieces(stages, later)])
    assert all(again.start(step) == steps.start(from_step + step) - later for step in range(60))
