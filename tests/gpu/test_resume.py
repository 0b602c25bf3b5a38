"""A whole run on a GPU, killed and resumed. One rank; skipped where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.runs import Started, final_state, run_to_end, write_run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

ENGINE = "{kind: deepspeed, zero_stage: 1, precision: bf16, compile: false}"
STEPS = 400  # of some milliseconds each


def test_a_killed_run_resumes(tmp_path: Path) -> None:
    """To where the other is, within what a GPU's sums in changing order make of it."""
    golden, killed = (write_run(tmp_path / name, ENGINE, steps=STEPS) for name in ("golden", "killed"))
    others, started = Started(golden), Started(killed)
    started.wait_for_step(15)
    started.kill()
    said = run_to_end(killed)
    assert "going on from step-" in said
    assert others.wait() == [0], others.text
    (position, ours), (expected, theirs) = final_state(killed.parent), final_state(golden.parent)
    assert position == expected
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name].view(torch.float32), value.view(torch.float32), rtol=0, atol=0.05)
