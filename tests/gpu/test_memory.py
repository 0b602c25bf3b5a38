"""The arithmetic of memory against a GPU's own count, and micro-batches found by trial. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from configs import build
from pretrain.engine import EngineSettings
from pretrain.engine.plain import Torch
from pretrain.engine.zero import DeepSpeed
from pretrain.models.gpt import Gpt
from tests.gpu import on_gpu
from tests.pretrain.engine import cases
from tests.processes import on_ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

SMALL = Gpt(layers=12, width=768, heads=12, context=1024, vocab_size=50257)
ROWS = 16
PLAIN = {"precision": "bf16", "compile": False, "loss": "plain"}
ENGINES: dict[str, EngineSettings] = {
    "torch": build(Torch, PLAIN, "test"),
    "torch, full": build(Torch, {**PLAIN, "recompute": "full"}, "test"),
    "torch, selective, chunked": build(Torch, {**PLAIN, "recompute": "selective", "loss": "chunked"}, "test"),
    "torch, compiled": build(Torch, {**PLAIN, "compile": True}, "test"),
    **{f"zero{s}": build(DeepSpeed, {**PLAIN, "zero_stage": s}, "test") for s in (1, 2, 3)},
    **{
        f"zero{s}, offload": build(DeepSpeed, {**PLAIN, "zero_stage": s, "offload": {"optimizer": True}}, "test")
        for s in (1, 2)
    },
    "zero1, full": build(DeepSpeed, {**PLAIN, "zero_stage": 1, "recompute": "full"}, "test"),
}


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int] | str]:
    return on_ranks(tmp_path_factory.mktemp("peaks"), 1, on_gpu.peaks, SMALL, ENGINES, ROWS)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", list(ENGINES))
def test_the_peak_is_what_the_gpu_counts(name: str, peaks: dict[str, tuple[int, int] | str]) -> None:
    found = peaks[name]
    assert not isinstance(found, str), found
    measured, expected = found
    assert expected == pytest.approx(measured, rel=0.1)


def test_trials_leave_no_trace(tmp_path_factory: pytest.TempPathFactory) -> None:
    engines = {"torch": cases.settings("torch", "bf16"), "zero1": cases.settings("deepspeed", "bf16")}
    (found,) = on_ranks(tmp_path_factory.mktemp("trials"), 1, on_gpu.trials, engines, "fit.step#12=oom")
    for name, result in found.items():
        assert not isinstance(result, str), f"{name}: {result}"
        rows, built, after, untouched = result
        assert (rows, built) == (6, 2), name
        assert after == pytest.approx(untouched, abs=1e-3), name
