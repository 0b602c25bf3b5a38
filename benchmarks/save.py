"""How long a save holds training up: ours, DeepSpeed's own, torch's distributed async save; same state, one run.

    python -m benchmarks.save [--out benchmarks/results] [--rounds 7] [--size 49M]

Two ranks, ZeRO-1 with fp32 masters and bf16 compute, on one machine (gloo on the CPU without GPUs). Each round times a
step alone, then every way of saving in turn: the stall (until the call returns), the next step beside the writer, and
the time until the save is complete. All caches are flushed to disk between them. The slowest rank counts; medians over
rounds, the first of which is left out (buffers are made, disk blocks are new).

What each way promises is not the same: ours is whole or absent, synced, hashed, and read back; DeepSpeed's and torch's
are not synced (DeepSpeed) or synced and not hashed (torch).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import configs
from pretrain.checkpoint import Checkpoints, Position, Saver
from pretrain.engine.zero import DeepSpeed
from pretrain.lineage import Lineage
from pretrain.models.gpt import Gpt
from pretrain.models.weights import initialize
from pretrain.objectives import NextToken
from pretrain.optim import AdamW
from pretrain.ranks import Ranks

SIZES: dict[str, dict[str, Any]] = {
    "49M": {"layers": 13, "width": 512, "heads": 8, "context": 256, "vocab_size": 16384},
    "tiny": {"layers": 2, "width": 64, "heads": 2, "context": 64, "vocab_size": 509},
}
RANKS, ROWS = 2, 2
WAYS = ("ours", "deepspeed", "torch async")


class Case:
    """One rank: an engine, and the ways to save what it holds. Each way gives back how to wait for its end."""

    def __init__(self, ranks: Ranks, size: str, folder: Path) -> None:
        self.ranks, self.folder = ranks, folder
        gpt = configs.build(Gpt, SIZES[size], "benchmark")
        model = gpt.build()
        initialize(model, 1)
        self.parameters = gpt.parameter_count()
        self.optim = AdamW(lr_peak=1e-4)
        self.engine = configs.build(DeepSpeed, {"zero_stage": 1, "precision": "bf16"}, "benchmark").build(
            model, self.optim, ranks
        )
        rows = torch.randint(gpt.vocab_size, (ROWS, gpt.context + 1), device=ranks.device)
        self.batch = NextToken().batch(rows, torch.full((ROWS,), gpt.context, device=ranks.device))
        self.tokens = RANKS * ROWS * gpt.context
        if ranks.rank == 0:
            Lineage(folder).take(None, 0, None, "benchmark")
        self.saver = Saver(folder, Checkpoints(keep_last=1), 1, ranks.rank, ranks.size, {})
        self.group = dist.new_group(backend="gloo")
        self.count = 0

    def step(self) -> None:
        """One training step."""
        self.engine.step([self.batch], self.tokens, self.optim.rates(1.0))
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()

    def save(self, way: str) -> Callable[[], object]:
        """Begin a save; what waits for its end."""
        self.count += 1
        if way == "ours":
            self.saver.save(self.engine.state(), Position(self.count, 0, 0, "0" * 32), 0)
            return self.saver.wait
        if way == "deepspeed":
            self.engine.engine.save_checkpoint(str(self.folder / "deepspeed"), tag=str(self.count))
            return lambda: None
        from torch.distributed.checkpoint.state_dict_saver import async_save

        state = self.engine.state()
        tensors = {
            f"{f.name}/{kind}/{f.start}": flat[f.offset : f.offset + f.numel]
            for f in state.owned
            for kind, flat in state.flats[f.flat].items()
        }
        place = str(self.folder / f"torch-{self.count}")
        future: Any = async_save(tensors, checkpoint_id=place, process_group=self.group)
        return lambda: future.result()

    def clean(self) -> None:
        """Remove what the other ways have written; have everything on disk."""
        self.ranks.barrier()
        if self.ranks.rank == 0:
            for path in [*self.folder.glob("torch-*"), self.folder / "deepspeed"]:
                shutil.rmtree(path, ignore_errors=True)
            os.sync()
        self.ranks.barrier()

    def timed(self, function: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds that a function took on the slowest rank, and what it gave."""
        self.ranks.barrier()
        begun = time.perf_counter()
        result = function()
        return max(self.ranks.gather(time.perf_counter() - begun)), result


def measure(size: str, rounds: int, folder: Path) -> dict[str, Any]:
    """All rounds on this rank: milliseconds by way and part."""
    case = Case(Ranks.join(), size, folder)
    for _ in range(3):
        case.step()
    found: dict[str, list[float]] = {"step": []}
    for number in range(rounds + 1):
        times = {"step": case.timed(case.step)[0]}
        for way in WAYS:
            times[f"{way} stall"], wait = case.timed(lambda way=way: case.save(way))  # type: ignore[misc]
            times[f"{way} next step"], _ = case.timed(case.step)
            more, _ = case.timed(wait)
            times[f"{way} complete"] = times[f"{way} stall"] + times[f"{way} next step"] + more
            if way == "deepspeed":
                times["deepspeed complete"] = times["deepspeed stall"]
            case.clean()
        for key, value in times.items() if number else ():
            found.setdefault(key, []).append(1e3 * value)
    return {"parameters": case.parameters, "megabytes": 12 * case.parameters / 1e6, "times": found}


def table(row: dict[str, Any]) -> str:
    """A row per way as a Markdown table."""
    times = row["times"]
    step = statistics.median(times["step"])
    lines = [
        f"{row['parameters']:,} parameters, {row['megabytes']:.0f} MB of masters and moments, step alone {step:.0f} ms "
        f"({min(times['step']):.0f}-{max(times['step']):.0f}), {len(times['step'])} rounds.",
        "",
        "| way | stall ms (min-max) | share of a step | next step ms | complete after ms |",
        "|---|---|---|---|---|",
    ]
    for way in WAYS:
        stall = times[f"{way} stall"]
        middle = statistics.median(stall)
        lines.append(
            f"| {way} | {middle:.0f} ({min(stall):.0f}-{max(stall):.0f}) | {middle / step:.1%} "
            f"| {statistics.median(times[f'{way} next step']):.0f} "
            f"| {statistics.median(times[f'{way} complete']):.0f} |"
        )
    return "\n".join(lines)


def run(size: str, rounds: int) -> dict[str, Any]:
    """Start the ranks; what rank 0 found."""
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".benchmark-") as folder:
        command = [sys.executable, "-m", "benchmarks.save", "--size", size, "--rounds", str(rounds), "--rank", folder]
        place = {"WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29417, "OMP_NUM_THREADS": 1}
        processes = [
            subprocess.Popen(
                command,
                env={**os.environ, **{k: str(v) for k, v in {**place, "RANK": r, "LOCAL_RANK": r}.items()}},
                stdout=subprocess.PIPE,
                text=True,
            )
            for r in range(RANKS)
        ]
        outputs = [process.communicate()[0] for process in processes]
    for line in outputs[0].splitlines():
        if line.startswith("ROW "):
            return dict(json.loads(line[4:]))
    raise SystemExit(f"rank 0 ended without a result: exit codes {[p.returncode for p in processes]}")


def main() -> None:
    parser = argparse.ArgumentParser(description="How long a save holds training up.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", choices=list(SIZES), default="49M")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        row = measure(options.size, options.rounds, options.rank)
        if os.environ["RANK"] == "0":
            print("ROW " + json.dumps(row), flush=True)
        dist.barrier()
        os._exit(0)
    hardware = (
        torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else f"CPU-{os.cpu_count()}-cores"
    )
    load = os.getloadavg()[0]
    text = table(run(options.size, options.rounds))
    head = [
        f"# The stall of a save, {hardware}, {datetime.date.today()}", "",
        f"`python -m benchmarks.save --size {options.size}`, torch {torch.__version__}, {platform.machine()}, two "
        f"ranks, load average before the run {load:.1f}.", "",
    ]  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"save_{hardware}_{datetime.date.today()}.md"
    path.write_text("\n".join([*head, text]) + "\n")
    print(f"{text}\n\n{path}")


if __name__ == "__main__":
    main()
