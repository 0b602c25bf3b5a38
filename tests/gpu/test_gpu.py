"""The engines on a GPU. One rank; skipped where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.engine import EngineSettings
from tests.gpu import on_gpu
from tests.pretrain.engine import cases
from tests.processes import on_ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

TOLERANCE = {"fp32": 2e-5, "bf16": 1e-2, "fp16": 1e-2}
EAGER: dict[str, EngineSettings] = {
    **{f"torch {p}": cases.settings("torch", p) for p in ("fp32", "bf16")},
    **{f"zero{s} {p}": cases.settings("deepspeed", p, s) for s in (1, 2, 3) for p in ("fp32", "bf16")},
    **{
        f"zero{s} bf16, optimizer offloaded": cases.settings("deepspeed", "bf16", s, offload={"optimizer": True})
        for s in (1, 2, 3)
    },
    "zero3 bf16, all offloaded": cases.settings(
        "deepspeed", "bf16", 3, offload={"optimizer": True, "parameters": True}
    ),
    "torch bf16, chunked": cases.settings("torch", "bf16", loss="chunked"),
    "torch bf16, selective": cases.settings("torch", "bf16", recompute="selective"),
    **{f"{k} fp16": cases.settings(kind, "fp16", s) for k, kind, s in (
        ("torch", "torch", 0), ("zero1", "deepspeed", 1), ("zero2", "deepspeed", 2), ("zero3", "deepspeed", 3),
    )},
}  # fmt: skip
COMPILED: dict[str, EngineSettings] = {
    "torch": cases.settings("torch", "bf16", compile=True),
    "zero1": cases.settings("deepspeed", "bf16", 1, compile=True),
    "torch, selective": cases.settings("torch", "bf16", compile=True, recompute="selective"),
    "zero2": cases.settings("deepspeed", "bf16", 2, compile=True),
}
CROSSINGS: dict[str, tuple[EngineSettings, EngineSettings]] = {
    "torch to torch": (cases.settings("torch", "bf16"), cases.settings("torch", "bf16")),
    "zero1 to zero1": (cases.settings("deepspeed", "bf16", 1), cases.settings("deepspeed", "bf16", 1)),
    "zero3 to zero3": (cases.settings("deepspeed", "bf16", 3), cases.settings("deepspeed", "bf16", 3)),
    "zero1 to torch": (cases.settings("deepspeed", "bf16", 1), cases.settings("torch", "bf16")),
    "zero1 offloaded to torch": (
        cases.settings("deepspeed", "bf16", 1, offload={"optimizer": True}), cases.settings("torch", "bf16"),
    ),
    "torch to zero3": (cases.settings("torch", "bf16"), cases.settings("deepspeed", "bf16", 3)),
}  # fmt: skip


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float] | str]:
    return on_ranks(tmp_path_factory.mktemp("eager"), 1, on_gpu.first_losses, EAGER)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", list(EAGER)[1:])
def test_every_engine_takes_the_torch_engine_s_steps(name: str, eager: dict[str, list[float] | str]) -> None:
    precision = name.split()[1].rstrip(",")
    reference = eager["torch bf16" if precision == "bf16" and name != "torch bf16" else "torch fp32"]
    assert not isinstance(eager[name], str), eager[name]
    assert eager[name] == pytest.approx(reference, abs=TOLERANCE[precision])


def test_what_is_compiled_takes_the_same_steps(
    tmp_path_factory: pytest.TempPathFactory, eager: dict[str, list[float] | str]
) -> None:
    (found,) = on_ranks(tmp_path_factory.mktemp("compiled"), 1, on_gpu.compiled_losses, COMPILED, 64)
    wrong = {name: value for name, value in found.items() if isinstance(value, str)}
    assert not wrong, "\n".join(f"{name}: {value}" for name, value in wrong.items())
    for name, losses in found.items():
        assert losses == pytest.approx(eager["torch bf16"], abs=TOLERANCE["bf16"]), name


def test_what_is_computed_again_drops_the_same(tmp_path: Path) -> None:
    """Kernels that draw random numbers themselves, as attention does, are met on a GPU alone."""
    (found,) = on_ranks(tmp_path, 1, on_gpu.strays)
    assert max(found.values()) < 0.02, found  # sums in changing order; other masks are as far as 0.8


def test_checkpoints_cross_engines(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("crossings")
    (found,) = on_ranks(folder, 1, on_gpu.crossings, CROSSINGS, folder)
    wrong = {name: value for name, value in found.items() if isinstance(value, str)}
    assert not wrong, "\n".join(f"{name}: {value}" for name, value in wrong.items())
    for name, (others, before, after) in found.items():
        assert others == [], name
        assert after == pytest.approx(before, abs=TOLERANCE["bf16"]), name
