"""The engines and a whole run on a GPU. One rank; skipped where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.pretrain.engine import cases
from tests.processes import on_ranks
from tests.runs import TORCH, Started, final_state, run_to_end, write_run, zero

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

TOLERANCE = {"fp32": 2e-5, "bf16": 1e-2}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("reference")
    return {p: on_ranks(folder, 1, cases.losses, cases.settings("torch", p), 5)[0] for p in ("fp32", "bf16")}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_takes_the_torch_engine_s_steps(
    stage: int, precision: str, tmp_path: Path, reference: dict[str, list[float]]
) -> None:
    losses = on_ranks(tmp_path, 1, cases.losses, cases.settings("deepspeed", precision, stage), 5)[0]
    assert losses == pytest.approx(reference[precision], abs=TOLERANCE[precision])


@pytest.mark.parametrize("kind", ["torch", "deepspeed"])
def test_compiled_takes_the_same_steps(kind: str, tmp_path: Path, reference: dict[str, list[float]]) -> None:
    settings = cases.settings(kind, "bf16", 1, compile=True) if kind == "deepspeed" else cases.settings(
        kind, "bf16", compile=True
    )  # fmt: skip
    losses = on_ranks(tmp_path, 1, cases.losses, settings, 5, timeout=400)[0]
    assert losses == pytest.approx(reference["bf16"], abs=TOLERANCE["bf16"])


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", [{"optimizer": True}, {"optimizer": True, "parameters": True}])
def test_what_is_offloaded_takes_the_same_steps(
    stage: int, offload: dict[str, bool], tmp_path: Path, reference: dict[str, list[float]]
) -> None:
    if offload.get("parameters") and stage < 3:
        pytest.skip("refused by the configuration")
    settings = cases.settings("deepspeed", "bf16", stage, offload=offload)
    losses = on_ranks(tmp_path, 1, cases.losses, settings, 5)[0]
    assert losses == pytest.approx(reference["bf16"], abs=TOLERANCE["bf16"])


@pytest.mark.parametrize(("kind", "stage"), [("torch", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)])
def test_fp16_takes_the_same_steps(kind: str, stage: int, tmp_path: Path, reference: dict[str, list[float]]) -> None:
    losses = on_ranks(tmp_path, 1, cases.losses, cases.settings(kind, "fp16", stage), 5)[0]
    assert losses == pytest.approx(reference["fp32"], abs=TOLERANCE["bf16"])


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (("torch", "bf16", 0), ("torch", "bf16", 0)),
        (("deepspeed", "bf16", 1), ("deepspeed", "bf16", 1)),
        (("deepspeed", "bf16", 3), ("deepspeed", "bf16", 3)),
        (("deepspeed", "bf16", 1), ("torch", "bf16", 0)),
        (("torch", "bf16", 0), ("deepspeed", "bf16", 3)),
    ],
)
def test_checkpoints_cross_engines(saved: tuple[str, str, int], loaded: tuple[str, str, int], tmp_path: Path) -> None:
    before = on_ranks(tmp_path, 1, cases.save_and_go_on, cases.settings(*saved), tmp_path)[0]
    after = on_ranks(tmp_path, 1, cases.load_and_go_on, cases.settings(*loaded), tmp_path)[0]
    assert all(torch.equal(value, after["at_save"][key]) for key, value in before["at_save"].items())
    assert after["losses"] == pytest.approx(before["losses"], abs=TOLERANCE["bf16"])


@pytest.mark.parametrize("engine", [TORCH, zero(1, "bf16")])
def test_a_killed_run_resumes(engine: str, tmp_path: Path) -> None:
    golden, killed = tmp_path / "golden", tmp_path / "killed"
    run_to_end(write_run(golden, engine))
    started = Started(write_run(killed, engine, steps=40))
    started.wait_for_step(15)
    started.kill()
    run_to_end(killed / "run.yaml")
    assert final_state(killed)[0] == final_state(golden)[0]
