"""Settings of the engines against the torch engine: a pairwise set, recomputation, fp16, what DeepSpeed is told."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from configs import ConfigError, build
from pretrain.engine.plain import Torch
from pretrain.engine.recompute import recompute_blocks
from pretrain.engine.scale import GOOD_STEPS, LossScale
from pretrain.engine.settings import Recompute
from pretrain.engine.zero import DeepSpeed, check_versions
from pretrain.models.compiled import compiled
from pretrain.models.gpt import Gpt
from pretrain.models.loss import LossPlan, plan_losses
from pretrain.models.weights import initialize
from pretrain.objectives import Batch, NextToken
from tests.pretrain.engine import cases
from tests.pretrain.engine.combinations import (
    LEVELS,
    PAIRWISE,
    bits,
    cross,
    elements_sent,
    first_losses,
    graphs_and_reads,
    half,
)
from tests.processes import on_ranks

LOSS_TOLERANCE = {"fp32": 2e-6, "bf16": 3e-3}
SMALL = Gpt(layers=2, width=32, heads=2, context=32, vocab_size=67, dropout=0.1)


# --- the pairwise set -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of every combination, a process for each number of ranks."""
    folder = tmp_path_factory.mktemp("combinations")
    losses: dict[str, list[float]] = {}
    for ranks in (1, 2):
        losses |= on_ranks(folder, ranks, first_losses, [row for row in PAIRWISE if row.ranks == ranks])[0]
    return losses


@pytest.mark.parametrize("row", PAIRWISE, ids=lambda row: row.name)
def test_a_combination_takes_the_torch_engine_s_steps(row: Any, found: dict[str, list[float]]) -> None:
    assert found[row.name] == pytest.approx(found[row.precision], abs=LOSS_TOLERANCE[row.precision])


def test_any_two_settings_that_may_meet_do() -> None:
    met = {pair for row in PAIRWISE for pair in combinations(row._asdict().items(), 2)}
    levels = [(field, level) for field, all_of_it in LEVELS.items() for level in all_of_it]
    missing = {(a, b) for a, b in combinations(levels, 2) if a[0] != b[0]} - met
    refused = {(("engine", "zero0"), ("precision", "bf16"))}
    refused |= {(("engine", e), ("offload", "optimizer")) for e in ("torch", "zero0")}
    refused |= {(("engine", e), ("offload", "all")) for e in ("torch", "zero0", "zero1", "zero2")}
    assert missing == refused


def test_any_of_them_loads_what_another_saved(tmp_path: Path) -> None:
    found = on_ranks(tmp_path, 2, cross, tmp_path)[0]
    assert len(found) == 6
    assert len({state for state, _ in found.values()}) == 1
    (loss,) = found["torch"][1]
    assert [value for _, (value,) in found.values()] == pytest.approx([loss] * 6, abs=LOSS_TOLERANCE["bf16"])


def test_gradients_are_summed_where_they_are_used(tmp_path: Path) -> None:
    """Each rank gets the part that it updates: an all-reduce would send twice as much."""
    for sent in on_ranks(tmp_path, 2, elements_sent):
        assert sent["parameters"] <= sent["reduce_scatter_tensor"] < 1.01 * sent["parameters"]
        assert sent["all_reduce"] < 10


# --- recomputation and compiling --------------------------------------------------------------------------------------


def test_each_size_of_a_ramp_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch by itself goes on eagerly after 8 of them."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    forward, eager = compiled(lambda rows: rows + 1), []
    for count in range(2, 22):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        forward(torch.zeros(count))
        eager += [count] * (torch._dynamo.utils.counters["stats"]["unique_graphs"] == before)
    assert not eager
    torch._dynamo.reset()


def small(recompute: Recompute, dtype: torch.dtype = torch.float32, dropout: float = 0.1) -> torch.nn.Module:
    model = SMALL.model_copy(update={"dropout": dropout}).build()
    initialize(model, 1)
    recompute_blocks(model, recompute)
    return model.to(dtype)


def batch(rows: int = 2) -> Batch:
    tokens = torch.randint(SMALL.vocab_size, (rows, 33), generator=torch.Generator().manual_seed(1))
    return NextToken().batch(tokens, torch.tensor([32] * (rows - 1) + [17]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputing_changes_no_bit(kind: Recompute, dtype: torch.dtype) -> None:
    kept, again = bits(small("none", dtype), batch()), bits(small(kind, dtype), batch())
    assert len(kept) == len(again) == 1 + len(list(SMALL.build().parameters()))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


class Counted(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        self.calls[str(function.overloadpacket)] += 1
        return function(*arguments, **(named or {}))


def test_what_is_computed_again() -> None:
    again = {}
    for kind in get_args(Recompute):
        loss = small(kind)(*batch())
        with Counted() as counted:
            loss.backward()
        again[kind] = [counted.calls[name] for name in ("aten.addmm", "aten.gelu")]
    assert again["none"] == [0, 0]
    assert again["selective"] == [0, SMALL.layers]
    assert again["full"][0] >= 3 * SMALL.layers  # of four; the last of a block is needed by nobody
    assert again["full"][1] == SMALL.layers


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
@pytest.mark.parametrize("plan", [LossPlan(), LossPlan(0, 16 * 4 * SMALL.vocab_size)], ids=["plain", "chunked"])
def test_forward_and_loss_are_one_graph(kind: Recompute, plan: LossPlan) -> None:
    torch._dynamo.reset()
    model = small(kind, dropout=0.0)
    plan_losses(model, plan)
    expected = bits(model, batch())
    model.zero_grad()
    terms = torch.zeros(2, 32)
    fed = batch()._replace(losses=terms)
    got = bits(torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager"), fed)
    assert len(expected) == len(got)
    torch.testing.assert_close(terms.sum(), expected[0])
    assert not terms[1, 17:].any()
    for one, other in zip(expected, got, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_engines_that_compile_have_no_graph_break_and_wait_at_the_end_of_a_step_alone(tmp_path: Path) -> None:
    breaks, reads = on_ranks(tmp_path, 1, graphs_and_reads)[0]
    assert breaks == {"torch": [], "zero1": [], "zero2": []}
    assert reads == {"torch": 1, "zero1": 1}, "the norm; the loss comes in one transfer with the sums by corpus"


# --- fp16 -------------------------------------------------------------------------------------------------------------


def test_fp16_loses_no_step_to_an_overflow(tmp_path: Path) -> None:
    found = on_ranks(tmp_path, 2, half, tmp_path)[0]
    for name in ("torch", "zero1", "zero2", "zero3"):
        one = found[name]
        assert one["losses"] == pytest.approx(found["fp32"], abs=3e-3), name
        assert one["scale"].scale < 2.0**40
        assert one["scale"].good_steps == 3
        assert one["restored"], name
        assert not one["applied"], "a loss that is not finite is skipped"
        assert one["after"] == one["scale"].scale, "and does not lower the scale"
        assert one["finite"], name
    assert len({found[name]["scale"].scale for name in ("zero1", "zero2", "zero3")}) == 1


def test_the_loss_scale_rises_after_good_steps_and_falls_to_1() -> None:
    scale = LossScale(4.0)
    for _ in range(GOOD_STEPS):
        scale.passed()
    assert scale == LossScale(8.0, 0)
    assert [scale.lower() for _ in range(4)] == [True, True, True, False]
    assert scale == LossScale(1.0, 0)


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine.precision: fp16 needs a GPU, this rank is on cpu, .*; use bf16 or"):
        cases.settings("torch", "fp16").check_device(torch.device("cpu"))
    cases.settings("torch", "fp16").check_device(torch.device("cuda"))


# --- what DeepSpeed is told -------------------------------------------------------------------------------------------


def test_the_derived_dict() -> None:
    settings = build(DeepSpeed, {"zero_stage": 3, "offload": {"optimizer": True, "parameters": True}}, "test")
    pinned = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    assert settings.deepspeed_config(1.0, 124_000_000) == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 2**62,
        "timers": {"throughput": {"enabled": False}},
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "loss_scale_window": 2**62},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 3,
            "round_robin_gradients": False,
            "memory_efficient_linear": False,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_bucket_size": 124_000_000,
            "allgather_bucket_size": 500_000_000,
            "offload_optimizer": pinned,
            "offload_param": pinned,
        },
    }
    plain = build(DeepSpeed, {"zero_stage": 1, "precision": "fp16"}, "test").deepspeed_config(None, 10**10)
    assert plain["gradient_clipping"] == 0.0
    assert plain["fp16"]["enabled"]
    assert not plain["bf16"]["enabled"]
    assert plain["zero_optimization"]["reduce_bucket_size"] == 500_000_000
    assert not plain["zero_optimization"]["contiguous_gradients"]
    assert not {"offload_optimizer", "offload_param"} & plain["zero_optimization"].keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_stage": 0, "precision": "fp16"}, r"zero_stage 0 with fp16 trains wrong in DeepSpeed"),
        ({"zero_stage": 0, "precision": "fp32", "offload": {"optimizer": True}}, r"offload.optimizer needs zero_stage"),
        ({"zero_stage": 2, "offload": {"optimizer": True, "parameters": True}}, r"needs zero_stage 3, got 2"),
        ({"zero_stage": 3, "offload": {"parameters": True}}, r"parameters: true needs optimizer: true"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(DeepSpeed, settings, "test")


@pytest.mark.parametrize(
    ("deepspeed", "pytorch", "message"),
    [
        ("0.18.1", "2.13.0", "deepspeed 0.18.1: ZeRO 2 computes wrong gradients (#7718); expected 0.19.8 or later: "),
        ("0.18.6", "2.13.0", "deepspeed 0.18.6: ZeRO 2 in bf16 reduces wrong gradients over ranks (#8224); expected "),
        ("0.16.4", "2.13.0", "deepspeed 0.16.4: offloading drops gradients (#7967, #7981); expected 0.19.8 or later"),
        ("0.19.7", "2.13.0", "deepspeed 0.19.7: gradients go wrong silently in known ways; expected 0.19.8 or later"),
        ("0.19.8", "2.10.1+cu130", "torch 2.10.1+cu130 with deepspeed 0.19.8: never tried together; expected torch 2."),
    ],
)
def test_versions_known_to_go_wrong_are_refused(deepspeed: str, pytorch: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_versions(deepspeed, pytorch)
    assert str(error.value).startswith(message)


def test_the_versions_here_are_taken() -> None:
    check_versions("0.19.8", "2.11.0+cu130")
    check_versions("0.20.0+abc", "2.13.0")
    check_versions("0.19.8", torch.__version__)


def test_compiling_is_for_gpus_and_not_for_stage_3() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    by_stage = [build(DeepSpeed, {"zero_stage": stage}, "test").compiles(gpu) for stage in (1, 2, 3)]
    assert by_stage == [True, True, False]
    assert build(DeepSpeed, {"zero_stage": 3, "compile": True}, "test").compiles(cpu)
    assert [Torch().compiles(device) for device in (gpu, cpu)] == [True, False]
