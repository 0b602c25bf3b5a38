"""The GPU's benchmark: the same command everywhere. Without a GPU it shows that it runs, and says that it was there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import HEAD, Case, cases, costs, line
from tests.processes import HERE


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it takes ten minutes: python -m benchmarks.gpu")
def test_without_a_gpu_the_same_command_runs_and_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--seconds", "0.05", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, timeout=400)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("gpu_CPU_*.md")
    text = path.read_text()
    assert "NO GPU HERE: tiny models on the CPU, to show that this program runs; no figure of speed." in text
    assert "MFU = (6 N + 12 L C T) x tokens/s / peak" in text
    rows = [row for row in text.splitlines() if row.startswith("| tiny |")]
    assert [row.split(" | ")[1:3] for row in rows] == [
        ["zero1", "eager"], ["torch", "eager"],
        ["torch", "eager, recompute full, chunked loss, plain products attention"],
    ]  # fmt: skip
    assert all(len(row.split("|")) == len(HEAD[0].split("|")) for row in rows), "no row is an error"
    assert "tiny: DeepSpeed costs " in text
    assert "| plain products | (2, 2, 128, 64) |" in text
    assert "| chunks of 64 | " in text
    assert all(f"| {length} | {kind} | " in text for length in (256, 512) for kind in ("dense", "banded", "documents"))
    assert "left out" not in text
    assert str(path) in done.stdout


def test_every_size_meets_every_engine_at_the_same_batch() -> None:
    table = cases(["124M", "1.3B"], nanogpt=True, compile=True, variants="none")
    assert [(c.model, c.engine) for c in table] == [
        (size, engine) for size in ("124M", "1.3B") for engine in ("zero1", "torch", "nanogpt")
    ]
    assert {(c.model, c.rows, c.micro_batches, c.compile) for c in table} == {
        ("124M", 32, 1, True), ("1.3B", 8, 1, True),
    }  # fmt: skip


def test_costs_are_read_from_rows_of_the_same_batch() -> None:
    def row(engine: str, ms: float, **more: int) -> dict[str, object]:
        case = Case("124M", engine, 32, **more)  # type: ignore[arg-type]
        rest = {"tokens_per_s": 1e5, "mfu": 0.4, "spread_ms": 1.0, "steps": 9, "peak_gib": 9.5, "first_step_s": 31.0}
        return {**vars(case), **rest, "step_ms": ms, "rounds_ms": [0.99 * ms, ms + len(engine) - 5, 1.01 * ms]}

    rows = [row("zero1", 103.0), row("torch", 100.0), row("nanogpt", 120.0), row("zero1", 800.0, micro_batches=8)]
    ours = "124M: DeepSpeed costs +3.0% (+3.0 to +3.0) of a step"
    assert costs(rows) == [f"{ours}; over nanoGPT 1.17x (1.17 to 1.18)"]
    assert line(rows[0]) == "| 124M | zero1 | compiled | 32 x 1 | 100,000 | 40.0% | 103.0 (1.0) | 9.5 | 31 |"
    failed = {**vars(Case("124M", "torch", 32, compile=False)), "error": "out of memory"}
    assert line(failed) == "| 124M | torch | eager | 32 x 1 | out of memory |"
    assert costs([failed]) == []
