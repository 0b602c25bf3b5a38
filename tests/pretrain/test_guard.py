"""The guard: a run whose gradients are not finite ends, and says why."""

from __future__ import annotations

from pathlib import Path

from pretrain import checkpoint
from pretrain.guard import GAVE_UP, Guard, SkippedSteps
from tests.runs import Started, write_run


def test_only_skipped_steps_in_a_row_count() -> None:
    skipped = SkippedSteps(Guard(max_skipped_steps=2))
    assert [skipped.gives_up(applied) for applied in (False, True, False, False)] == [False, False, False, True]


def test_a_run_that_diverges_gives_up(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    overrides = ("optim.lr_peak=1e38", "schedule={kind: constant}", "guard.max_skipped_steps=4")
    started = Started(config, 1, *overrides)
    assert started.wait() == [GAVE_UP], started.text
    assert started.text.count("SKIPPED: the gradient is not finite") >= 3
    assert "4 steps in a row had a gradient that is not finite at step 5 (exit 7)" in started.text
    assert [path.name for _, _, path in checkpoint.all_checkpoints(tmp_path / "run")] == ["step-0.b1"]
