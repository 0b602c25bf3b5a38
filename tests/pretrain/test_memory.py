"""The arithmetic of memory against what torch tracks and the papers' formulas; and what is said when there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from configs import build
from pretrain.engine.plain import Torch
from pretrain.engine.zero import DeepSpeed
from pretrain.memory import GIB, Shape, largest_micro_batch, remedy, run_memory, step_memory
from pretrain.models.gpt import Gpt
from pretrain.models.loss import loss_plan
from tests.pretrain.fitted import a_run
from tests.pretrain.tracked import CPU, torch_engine_peak, zero_peaks
from tests.processes import on_ranks


def _of(gpt: Gpt, **changes: Any) -> Gpt:
    return gpt.model_copy(update=changes)


SMALL = Gpt(layers=12, width=768, heads=12, context=1024, vocab_size=50257)
MEDIUM = Gpt(layers=24, width=1024, heads=16, context=1024, vocab_size=50257)
LARGE = Gpt(layers=24, width=2048, heads=16, context=2048, vocab_size=50257)  # GPT-3's 1.3 B
TINY = Gpt(layers=5, width=320, heads=5, context=512, vocab_size=16384)
WIDE = Gpt(layers=3, width=256, heads=4, context=256, vocab_size=2048)


@pytest.mark.parametrize(
    ("gpt", "precision", "recompute", "loss", "rows", "length"),
    [
        (_of(SMALL, layers=4), "bf16", "none", "plain", 16, 1024),
        (_of(SMALL, layers=4), "bf16", "none", "plain", 1, 64),  # the sum of gradients needs the most
        (_of(SMALL, layers=4), "fp32", "full", "chunked", 8, 1024),
        (_of(MEDIUM, layers=6), "bf16", "selective", "chunked", 16, 1024),
        (TINY, "fp32", "none", "plain", 8, 512),
        (TINY, "bf16", "selective", "plain", 32, 512),
        (_of(TINY, layers=2, dropout=0.1), "fp32", "none", "plain", 8, 512),
        (_of(TINY, layers=3, dropout=0.1), "bf16", "selective", "plain", 8, 512),
        (_of(TINY, layers=3, dropout=0.1), "fp32", "full", "plain", 8, 512),
        (_of(LARGE, layers=6), "bf16", "full", "chunked", 8, 2048),
    ],
)
def test_the_torch_engine_s_peak_is_what_torch_tracks(
    gpt: Gpt, precision: str, recompute: str, loss: str, rows: int, length: int
) -> None:
    engine = build(Torch, {"precision": precision, "recompute": recompute, "loss": loss}, "test")
    expected = step_memory(Shape.of(gpt, "cpu", length), engine, 1, rows * length, loss_plan(engine.loss, CPU)).total
    assert expected == pytest.approx(torch_engine_peak(gpt, engine, rows, length), rel=0.1)


def test_deepspeed_s_peaks_are_what_torch_tracks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [  # precision, stage, optimizer offloaded, rows, micro-batches; with one row the states are most of it
        ("bf16", 1, False, 8, 1), ("fp32", 1, False, 8, 1), ("bf16", 2, False, 8, 1), ("bf16", 3, False, 8, 1),
        ("fp32", 1, False, 1, 2), ("bf16", 2, False, 1, 2), ("bf16", 3, False, 1, 2),
        ("bf16", 1, True, 1, 1), ("bf16", 1, True, 1, 2), ("bf16", 2, True, 1, 2), ("fp32", 2, True, 1, 1),
    ]  # fmt: skip
    cases = [
        (build(DeepSpeed, {"zero_stage": stage, "precision": precision, "loss": "plain",
                           "offload": {"optimizer": offloaded}}, "test"), rows, micro_batches)
        for precision, stage, offloaded, rows, micro_batches in kinds
    ]  # fmt: skip
    bucket = 500_000  # a sixth of the model's gradients are sent at once
    (tracked,) = on_ranks(tmp_path, 1, zero_peaks, WIDE, cases, 128, bucket)
    whole = DeepSpeed._zero_config
    monkeypatch.setattr(
        DeepSpeed, "_zero_config", lambda self, count: whole(self, count) | {"reduce_bucket_size": bucket}
    )
    shape, plan = Shape.of(WIDE), loss_plan("plain", CPU)
    expected = [
        step_memory(shape, engine, 8, rows * 128, plan, accumulates=micro_batches > 1)
        for engine, rows, micro_batches in cases
    ]
    ratios = [ours.total / device for ours, (device, _) in zip(expected, tracked, strict=True)]
    assert ratios == pytest.approx([1.0] * len(cases), abs=0.1)
    for ours, (_, host), (engine, *_) in zip(expected, tracked, cases, strict=True):
        assert ours.host == pytest.approx(host, rel=0.1 if engine.precision == "bf16" else 0.2)
    monkeypatch.undo()  # a bucket of the whole model, which stage 1 in fp32 does not fill
    assert step_memory(shape, cases[1][0], 8, 8 * 128, plan, accumulates=False).total == pytest.approx(
        tracked[1][0], rel=0.1
    )


@pytest.mark.parametrize(("gpt", "parameters"), [(SMALL, 124_439_808), (MEDIUM, 354_823_168), (LARGE, 1_315_723_264)])
@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_states_are_those_of_the_zero_paper_with_gradients_in_fp32(gpt: Gpt, parameters: int, ranks: int) -> None:
    """Rajbhandari et al. 2020, figure 1: 2 + 2 + 12 bytes per parameter, shared stage by stage; sums here take 4."""
    assert Shape.of(gpt).parameters == parameters
    shared = {
        1: (2, 4, 12 / ranks),
        2: (2, 4 / ranks, 12 / ranks),
        3: (2 / ranks, 4 / ranks, 12 / ranks),
    }
    for stage, (weights, gradients, optimizer) in shared.items():
        memory = step_memory(Shape.of(gpt), DeepSpeed(zero_stage=stage), ranks, 1024)
        assert memory.weights == pytest.approx(weights * parameters)
        assert memory.gradients == pytest.approx(gradients * parameters)
        assert memory.optimizer == pytest.approx(optimizer * parameters)


@pytest.mark.parametrize("gpt", [SMALL, MEDIUM, LARGE])
def test_activations_are_those_of_korthikanti_without_the_attention_matrix(gpt: Gpt) -> None:
    """Korthikanti et al. 2022, equation 1: s b h L (34 + 5 a s / h), of which fused attention leaves 34; table 2: 2."""
    tokens = 4 * gpt.context
    unit = tokens * gpt.width * gpt.layers
    with_dropout = Shape.of(gpt.model_copy(update={"dropout": 0.1}))
    assert step_memory(with_dropout, Torch(), 1, tokens).activations == pytest.approx(34 * unit, rel=0.02)
    assert step_memory(Shape.of(gpt), Torch(), 1, tokens).activations == pytest.approx(32 * unit, rel=0.02)
    full = step_memory(Shape.of(gpt), Torch(recompute="full"), 1, tokens).activations
    assert full == pytest.approx(2 * unit, rel=4.5 / gpt.layers)  # the last norm's come on top


def test_what_is_offloaded_is_the_host_s() -> None:
    shape = Shape.of(LARGE)
    kept = step_memory(shape, DeepSpeed(zero_stage=3), 8, 2048)
    engine = build(DeepSpeed, {"zero_stage": 3, "offload": {"optimizer": True, "parameters": True}}, "test")
    offloaded = step_memory(shape, engine, 8, 2048)
    assert offloaded.optimizer == offloaded.weights == 0
    assert offloaded.host >= kept.optimizer + kept.weights
    assert offloaded.total < kept.total


@pytest.mark.parametrize("capacity", [8, 20, 40])
def test_the_largest_micro_batch_fits_and_one_more_does_not(capacity: int) -> None:
    shape, engine = Shape.of(SMALL), Torch(loss="plain")
    rows = largest_micro_batch(shape, engine, 1, 1024, 512, capacity * GIB)
    assert step_memory(shape, engine, 1, rows * 1024).total <= capacity * GIB
    assert step_memory(shape, engine, 1, (rows + 1) * 1024).total > capacity * GIB


def test_none_fits_where_the_states_alone_are_too_much() -> None:
    assert largest_micro_batch(Shape.of(LARGE), Torch(), 1, 2048, 8, 16 * GIB) == 0


def test_the_remedy_keeps_the_rest_of_an_engine() -> None:
    model = {"kind": "gpt", "layers": 2, "width": 512, "heads": 2, "context": 1024, "vocab_size": 128}
    engine = {"kind": "deepspeed", "zero_stage": 2, "precision": "bf16", "offload": {"optimizer": True}}
    run = a_run(model=model, data={"seq_tokens": 32, "sources": {"a": {"shards": "a"}}}, engine=engine)
    memory = run_memory(run, 2, 1, torch.device("cpu"))
    assert remedy(run, 2, 1, memory) == "engine.zero_stage=3, or more ranks"
    alone = "more ranks; or engine.zero_stage=3 engine.offload.parameters=true"  # which has nobody to share with
    assert remedy(run, 1, 1, memory) == alone


@pytest.mark.parametrize(
    ("changes", "rows", "said"),
    [
        ({}, 8, "micro_batch_seqs=4 (now 8); the loss stays as it is"),
        ({"vocab_size": 50257}, 1, "engine.loss=chunked, which holds the logits of few tokens at a time"),
        ({"layers": 64}, 1, "engine.recompute=selective, which keeps fewer activations and computes them again"),
        (
            {"width": 512, "vocab_size": 128},
            1,
            "engine={kind: deepspeed, zero_stage: 1, precision: fp32}, or more ranks",
        ),
    ],
)
def test_the_remedy_is_for_what_takes_the_most(changes: dict[str, int], rows: int, said: str) -> None:
    model = {"kind": "gpt", "layers": 2, "width": 64, "heads": 2, "context": 1024, "vocab_size": 128, **changes}
    data = {"seq_tokens": 32 if "width" in changes else 1024, "sources": {"a": {"shards": "a"}}}
    run = a_run(model=model, data=data, batch_tokens=8192)
    assert remedy(run, 2, rows, run_memory(run, 2, rows, torch.device("cpu"))) == said
    alone = remedy(run, 1, rows, run_memory(run, 1, rows, torch.device("cpu")))
    assert alone == said.replace("precision: fp32}", "precision: fp32, offload: {optimizer: true}}")
