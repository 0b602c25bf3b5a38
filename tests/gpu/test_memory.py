"""The arithmetic of memory against a GPU's own count, and micro-batches found by trial. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from configs import build
from pretrain.engine.plain import Torch
from pretrain.engine.zero import DeepSpeed
from pretrain.models.gpt import Gpt
from tests.pretrain.engine import cases
from tests.pretrain.fitted import after_trials
from tests.pretrain.tracked import gpu_peak
from tests.processes import on_ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

SMALL = Gpt(layers=12, width=768, heads=12, context=1024, vocab_size=50257)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (Torch, {"compile": False, "loss": "plain"}),
        (Torch, {"compile": True, "loss": "plain"}),
        (Torch, {"compile": False, "loss": "chunked"}),
        (DeepSpeed, {"compile": False, "loss": "plain", "zero_stage": 1}),
        (DeepSpeed, {"compile": False, "loss": "plain", "zero_stage": 2}),
        (DeepSpeed, {"compile": False, "loss": "plain", "zero_stage": 3}),
    ],
)
def test_the_peak_is_what_the_gpu_counts(kind: Any, more: dict[str, Any], recompute: str, tmp_path: Path) -> None:
    engine = build(kind, {"precision": "bf16", "recompute": recompute, **more}, "test")
    ((measured, expected),) = on_ranks(tmp_path, 1, gpu_peak, SMALL, engine, 16, 1024)
    assert expected == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("kind", ["torch", "deepspeed"])
def test_trials_leave_no_trace(kind: str, tmp_path: Path) -> None:
    failing = "fit.step#12=oom"
    ((rows, engines, after, untouched),) = on_ranks(tmp_path, 1, after_trials, cases.settings(kind, "bf16"), failing)
    assert (rows, engines) == (6, 2)
    assert after == pytest.approx(untouched, abs=1e-3)
