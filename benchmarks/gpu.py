"""Training speed on one GPU: our engines with and without DeepSpeed, eager and compiled, by model size.

    python -m benchmarks.gpu [--out benchmarks/results] [--seconds 8] [--models 124M,1.3B]

Prints a table of tokens/s, MFU (6N + 12 L C T operations per token, dense attention, unpadded vocabulary, over the
card's dense bf16 peak), peak memory and the time to the first step; medians over steps after the warm-up, on random
tokens, without the data reading, checkpoints and tracking of a real run. Also the card's own bf16 matmul rate, in the
same run. Writes the table to a file named after hardware and date. Without a GPU: tiny models on the CPU, and says so.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import configs
from pretrain.engine.plain import Torch
from pretrain.engine.zero import DeepSpeed
from pretrain.meter import peak_flops
from pretrain.models.gpt import Gpt
from pretrain.models.weights import initialize
from pretrain.objectives import NextToken
from pretrain.optim import AdamW
from pretrain.ranks import Ranks

VOCABULARY = 50257


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    model: str
    engine: str  # torch | zero0 ... zero3
    compile: bool
    rows: int  # sequences per micro-batch
    micro_batches: int = 1


SIZES: dict[str, dict[str, Any]] = {
    "124M": {"layers": 12, "width": 768, "heads": 12, "context": 1024},
    "350M": {"layers": 24, "width": 1024, "heads": 16, "context": 1024},
    "1.3B": {"layers": 24, "width": 2048, "heads": 16, "context": 2048},
    "tiny": {"layers": 2, "width": 64, "heads": 2, "context": 128},
}
CASES = [
    Case("124M", "torch", compile=False, rows=32),
    Case("124M", "torch", compile=True, rows=32),
    Case("124M", "torch", compile=True, rows=64),
    Case("124M", "zero1", compile=True, rows=64),
    Case("124M", "zero1", compile=True, rows=64, micro_batches=8),
    Case("350M", "torch", compile=True, rows=32),
    Case("350M", "zero1", compile=True, rows=32),
    Case("1.3B", "torch", compile=True, rows=8),
    Case("1.3B", "zero1", compile=True, rows=8),
    Case("1.3B", "zero1", compile=True, rows=16),
]
TINY = [Case("tiny", "torch", compile=False, rows=4), Case("tiny", "zero1", compile=False, rows=4)]


def measure(case: Case, seconds: float) -> dict[str, Any]:
    """Run one case in this process; its row."""
    begun = time.perf_counter()
    ranks = Ranks.join()
    cuda = ranks.device.type == "cuda"
    gpt = configs.build(
        Gpt, {"vocab_size": 509 if case.model == "tiny" else VOCABULARY, **SIZES[case.model]}, "benchmark"
    )
    model = gpt.build()
    initialize(model, 1)
    precision = "bf16" if cuda else "fp32"
    if case.engine == "torch":
        engine: Any = Torch(precision=precision, compile=case.compile).build(model, AdamW(lr_peak=1e-4), ranks)
    else:
        settings = {"precision": precision, "zero_stage": int(case.engine[-1]), "compile": case.compile}
        engine = configs.build(DeepSpeed, settings, "benchmark").build(model, AdamW(lr_peak=1e-4), ranks)
    rows = torch.randint(gpt.vocab_size, (case.rows, gpt.context + 1), device=ranks.device)
    batch = NextToken().batch(rows, torch.full((case.rows,), gpt.context, device=ranks.device))
    tokens = case.rows * gpt.context * case.micro_batches
    rates = AdamW(lr_peak=1e-4).rates(1.0)

    def step() -> None:
        engine.step([batch] * case.micro_batches, tokens, rates)

    step()
    first = time.perf_counter() - begun
    for _ in range(5):
        step()
    times: list[float] = []
    until = time.perf_counter() + seconds
    gc.collect()
    while time.perf_counter() < until or len(times) < 10:
        start = time.perf_counter()
        step()  # ends with the gradient norm on the host, so it is synchronous
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    rate = tokens / statistics.median(times)
    peak = peak_flops(torch.cuda.get_device_name()) if cuda else None
    return {
        **asdict(case),
        "tokens_per_s": rate,
        "mfu": None if peak is None else rate * gpt.flops_per_token(gpt.context) / peak,
        "step_ms": 1e3 * statistics.median(times),
        "spread_ms": 1e3 * statistics.pstdev(times),
        "steps": len(times),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "first_step_s": first,
    }


def matmul_rate() -> float:
    """TFLOP/s of an 8192-cubed bf16 matrix product of random values: median of 50."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for i in range(60):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        if i >= 10:
            times.append(start.elapsed_time(end) / 1e3)
    return float(2 * 8192**3 / statistics.median(times) / 1e12)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| model | engine | compiled | rows x micro | tokens/s | MFU | step ms (spread) | peak GiB | first step s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        shape = (
            f"| {r['model']} | {r['engine']} | {'yes' if r['compile'] else 'no'} | {r['rows']} x {r['micro_batches']} |"
        )
        if "error" in r:
            lines.append(f"{shape} {r['error']} |")
            continue
        mfu = "-" if r["mfu"] is None else f"{r['mfu']:.1%}"
        memory = "-" if r["peak_gib"] is None else f"{r['peak_gib']:.1f}"
        speed = f"{r['tokens_per_s']:,.0f} | {mfu} | {r['step_ms']:.1f} ({r['spread_ms']:.1f})"
        lines.append(f"{shape} {speed} | {memory} | {r['first_step_s']:.0f} |")
    return "\n".join(lines)


def run_case(case: Case, seconds: float) -> dict[str, Any]:
    """Run one case in a process of its own; its row, or the last line of its error."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--case", json.dumps(asdict(case)), "--seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("ROW "):
            return dict(json.loads(line[4:]))
    error = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return {**asdict(case), "error": error[:160]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--models", default="124M,350M,1.3B")
    parser.add_argument("--case")
    options = parser.parse_args()
    if options.case:
        print("ROW " + json.dumps(measure(Case(**json.loads(options.case)), options.seconds)), flush=True)
        os._exit(0)
    cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else "CPU"
    head = [f"# One {name}, {datetime.date.today()}", "", f"`python -m benchmarks.gpu`, torch {torch.__version__}."]
    if cuda:
        head.append(f"bf16 matmul 8192 cubed: {matmul_rate():.0f} TFLOP/s; MFU against {peak_flops(name):.3g} FLOP/s.")
    else:
        head.append("No GPU here: tiny models on the CPU, to show that the suite runs.")
    print("\n".join(head), flush=True)
    rows = []
    for case in [c for c in CASES if c.model in options.models.split(",")] if cuda else TINY:
        rows.append(run_case(case, options.seconds))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    hardware = name.replace(" ", "-")
    path = options.out / f"gpu_{hardware}_{datetime.date.today()}.md"
    path.write_text("\n".join([*head, "", table(rows)]) + "\n")
    print(f"\n{table(rows)}\n\n{path}")


if __name__ == "__main__":
    main()
