"""Attention that skips what is not seen: banded and within documents against dense, by length.

    python -m benchmarks.attention [--out benchmarks] [--heads 4] [--band 256] [--document 512]
                                   [--lengths 2048,8192,32768]

Prints a table of one forward and backward pass of one row: the median time, the memory beyond what is there before it
(inputs and their gradients are not counted on a GPU; on the CPU it is the growth of the process), and how often dense
attention's time goes into it. Documents are of random lengths, exponential with the mean given, seeded. Each case is a
process of its own. On a GPU in bf16, with FlexAttention, by the clock; without one in fp32 on one CPU core, block by
block with torch's scaled_dot_product_attention, in CPU seconds, which other work on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from pretrain.models.attention import attend, see

HEAD_WIDTH = 64
LONGEST_S = 3.0  # of a case, the first pass and one more at least where that is short
KINDS = ("dense", "banded", "documents", "banded in documents")


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    kind: str
    length: int
    heads: int
    band: int
    document: int  # mean tokens


def documents(length: int, mean: int, device: torch.device) -> Tensor:
    """Document numbers int32 [1, length]."""
    draw = np.random.default_rng(0)
    starts = np.cumsum(1 + draw.exponential(mean, size=2 * length // mean + 8).astype(np.int64))
    begins = np.zeros(length, np.int32)
    begins[starts[starts < length]] = 1
    return torch.from_numpy(np.cumsum(begins, dtype=np.int32))[None].to(device)


def measure(case: Case, longest_s: float = LONGEST_S) -> dict[str, Any]:
    """Run one case in this process; its row."""
    cuda = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
    clock = time.perf_counter if cuda else time.process_time
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = (1, case.heads, case.length, HEAD_WIDTH)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    up = torch.randn(shape, device=device, dtype=dtype)
    band = case.band if case.kind.startswith("banded") else None
    numbers = documents(case.length, case.document, device) if case.kind.endswith("documents") else None

    def step() -> None:
        y = attend(q, k, v, see(q[:, 0], band, numbers))
        torch.autograd.grad(y, (q, k, v), up)
        if cuda:
            torch.cuda.synchronize()

    if cuda:
        step()  # compiles, and makes the mask of a band, which is kept
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else psutil.Process().memory_info().rss
    times: list[float] = []
    until = clock() + longest_s
    while clock() < until or (cuda and len(times) < 10):
        begun = clock()
        step()
        times.append(clock() - begun)
    if len(times) > 1:
        del times[0]  # warms up
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        **asdict(case),
        "ms": 1e3 * statistics.median(times),
        "spread_ms": 1e3 * statistics.pstdev(times),
        "passes": len(times),
        "mib": (peak - before) / 2**20,
        "documents": 0 if numbers is None else int(numbers[0, -1]) + 1,
    }


def run_case(case: Case, longest_s: float = LONGEST_S, timeout_s: float = 900.0) -> dict[str, Any]:
    """Run one case in a process of its own, which compiles for it alone; its row, or the last line of its error."""
    command = [sys.executable, "-m", "benchmarks.attention", "--case", json.dumps(asdict(case))]
    command += ["--seconds", str(longest_s)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return {**asdict(case), "error": f"not done in {timeout_s:.0f} s"}
    for line in done.stdout.splitlines():
        if line.startswith("ROW "):
            return dict(json.loads(line[4:]))
    error = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return {**asdict(case), "error": error[:160]}


def line(row: dict[str, Any], dense_ms: float | None) -> str:
    """A row as Markdown."""
    head = f"| {row['length']:,} | {row['kind']} |"
    if "error" in row:
        return f"{head} {row['error']} | | |"
    times = "-" if dense_ms is None else f"{dense_ms / row['ms']:.1f}"
    return f"{head} {row['ms']:,.1f} ({row['spread_ms']:.1f}, {row['passes']}) | {times} | {row['mib']:,.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--band", type=int, default=256)
    parser.add_argument("--document", type=int, default=512)
    parser.add_argument("--lengths", default="2048,8192,32768")
    parser.add_argument("--case")
    parser.add_argument("--seconds", type=float, default=LONGEST_S)
    options = parser.parse_args()
    if options.case:
        print("ROW " + json.dumps(measure(Case(**json.loads(options.case)), options.seconds)), flush=True)
        os._exit(0)
    cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else f"CPU {os.cpu_count()} cores"
    lines = [
        f"# Attention that skips what is not seen: {name}, {datetime.date.today()}",
        "",
        f"`python -m benchmarks.attention`, torch {torch.__version__}, "
        f"{'bf16, by the clock' if cuda else 'fp32, CPU time of one core'}. One row, {options.heads} heads of "
        f"{HEAD_WIDTH}, forward and backward; a band of {options.band} tokens, documents of {options.document} on "
        "average. Memory is the peak beyond what was there before the first pass.",
        "",
        "| tokens | attention | ms (spread, passes) | times as fast as dense | MiB |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for length in map(int, options.lengths.split(",")):
        dense_ms: float | None = None
        for kind in KINDS:
            row = run_case(Case(kind, length, options.heads, options.band, options.document))
            if kind == "dense":
                dense_ms = row.get("ms")
            lines.append(line(row, dense_ms))
            print(lines[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"attention_{name.replace(' ', '-')}_{datetime.date.today()}.md"
    path.write_text("\n".join(lines) + "\n")
    print(f"\n{path}")


if __name__ == "__main__":
    main()
