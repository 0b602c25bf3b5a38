"""What tracking costs a training step: the same loop with the journal and MLflow's follower, and without.

    python -m benchmarks.track [--pairs 41] [--steps 30] [--threads 1] [--out benchmarks]

Both sides run in one process, by turns: blocks of steps of a small GPT with the journal (a record every 10 steps, as by
default, and one of every step), the follower's process (on sqlite, on the same cores) and system metrics, and blocks
without any of them. Told are, over pairs of neighbouring blocks, how much longer a step took by the clock, and how much
more of the processor the loop's process used; the seconds inside the journal's calls; and the processor time of the
follower. Steps of a real run take longer, and the cost is per record.

Then the same engine's steps with and without the losses of each corpus added up, one after the other by turns.

A machine that others use as well moves single pairs by far more than the cost. So a figure is the median over the
pairs, with the interval in which the median lies with 95 % (by rank, whatever the distribution); the goal of 0.5 % is
met where the interval ends below it. About 6 minutes.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch

import configs
from pretrain.engine import Tally
from pretrain.engine.plain import Torch
from pretrain.models.gpt import Gpt
from pretrain.models.weights import initialize
from pretrain.objectives import NextToken
from pretrain.optim import AdamW
from pretrain.track import Journal, Mlflow, measure_system, start_trackers

MODEL = {"layers": 2, "width": 256, "heads": 4, "context": 128, "vocab_size": 4096}
ROWS = 2
METRICS = ("loss", "grad_norm", "lr", "tokens_per_s", "data_wait", "mfu", "memory_gib")


class Loop:
    """A small GPT and its optimizer."""

    def __init__(self) -> None:
        self.model = configs.build(Gpt, MODEL, "benchmark").build()
        initialize(self.model, 1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.tokens = torch.randint(0, 4096, (ROWS, 129), generator=torch.Generator().manual_seed(1))

    def step(self) -> float:
        """One step; its loss."""
        batch = NextToken().batch(self.tokens, torch.full((ROWS,), 128))
        logits = self.model(batch.inputs)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


@dataclass
class Block:
    """Seconds of a block's steps by the clock and of the processor, and by the clock of the journal's calls in it."""

    seconds: float
    processor: float
    inside: float


def block(loop: Loop, steps: int, first: int, journal: Journal | None, every: int) -> Block:
    """So many steps, those that a run would record recorded."""
    inside, begun, used = 0.0, time.perf_counter(), time.process_time()
    for step in range(first, first + steps):
        loss = loop.step()
        if journal is not None and step % every == 0:
            before = time.perf_counter()
            journal.step(step, step, step, "0" * 32, dict.fromkeys(METRICS, loss), {"train": 0.1, "data": 0.001})
            inside += time.perf_counter() - before
    return Block(time.perf_counter() - begun, time.process_time() - used, inside)


def measure(loop: Loop, folder: Path, every: int, pairs: int, steps: int) -> str:
    """A row of the table."""
    config = Mlflow(uri=f"sqlite:///{folder}/mlflow.db", experiment="benchmark", every_seconds=1.0)
    run = folder / f"run-{every}"
    journal = Journal(run, 1)
    journal.attempt(None, 0, "start", config={"name": "benchmark"})
    trackers = start_trackers([config], run)
    step = 0
    system = measure_system([config], run, 1, 0)
    assert system is not None and trackers.pid is not None
    system.step = lambda: step
    while not list((run / "track").glob("mlflow-*.json")):
        time.sleep(0.1)  # the follower has begun: once per attempt, not per step
    follower, alone, inside, spent = psutil.Process(trackers.pid), [], 0.0, 0.0
    by_clock, by_processor = [], []
    for pair in range(pairs):
        times: dict[bool, Block] = {}
        for tracked in (pair % 2 == 0, pair % 2 == 1):
            before = _cpu(follower)
            found = block(loop, steps, step + 1, journal if tracked else None, every)
            if tracked:
                time.sleep(1.5)  # what the follower does after the block is counted too
                spent += _cpu(follower) - before
                inside += found.inside
            step += steps
            times[tracked] = found
        by_clock.append(times[True].seconds / times[False].seconds - 1)
        by_processor.append(times[True].processor / times[False].processor - 1)
        alone.append(times[False].seconds / steps)
    system.close()
    journal.close()
    assert trackers.close()
    usual = statistics.median(alone)
    whole = pairs * steps * usual
    return (
        f"| {every} | {1000 * usual:.1f} | {_spread(by_clock)} | {_spread(by_processor)} | "
        f"{100 * inside / whole:.4f} | {1e6 * inside / (pairs * steps / every):.0f} | {100 * spent / whole:.2f} |"
    )


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _spread(shares: list[float]) -> str:
    """The median and its interval, in percent."""
    low, middle, high = median(shares)
    return f"{100 * middle:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


def median(values: list[float]) -> tuple[float, float, float]:
    """The median between the ends of its interval of 95 %: the number of values below it is binomial."""
    ordered, n = sorted(values), len(values)
    reach = 0.98 * math.sqrt(n)
    low, high = max(0, math.floor((n - 1) / 2 - reach)), min(n - 1, math.ceil((n - 1) / 2 + reach))
    return ordered[low], statistics.median(ordered), ordered[high]


def measure_by_source(pairs: int, sources: int = 5, micro_batches: int = 4) -> str:
    """A line: what adding up the losses of each corpus costs a step of the torch engine."""
    place: Any = SimpleNamespace(rank=0, size=1, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    settings, gpt, optim = Torch(precision="fp32"), configs.build(Gpt, MODEL, "benchmark"), AdamW(lr_peak=1e-4)
    model = gpt.build()
    initialize(model, 1)
    engine = settings.build(model, optim, place)
    tokens = torch.randint(4096, (micro_batches, ROWS, 129), generator=torch.Generator().manual_seed(1))
    valid, count = torch.full((ROWS,), 128, device=place.device), micro_batches * ROWS * 128
    fed = [NextToken().batch(rows.to(place.device), valid) for rows in tokens]
    of = (torch.arange(micro_batches * ROWS) % sources).view(micro_batches, ROWS).to(place.device)

    def step(tallied: bool) -> float:
        begun = time.perf_counter()
        tally = Tally(fed, of, sources) if tallied else None
        engine.step(fed if tally is None else tally.batches, count, optim.rates(1.0), tally=tally)
        return time.perf_counter() - begun

    for tallied in (True, False) * 3:
        step(tallied)  # warm
    longer, alone = [], []
    for pair in range(pairs):
        times = {tallied: step(tallied) for tallied in (pair % 2 == 0, pair % 2 == 1)}
        longer.append(times[True] / times[False] - 1)
        alone.append(times[False])
    return (
        f"Losses by corpus ({sources} corpora, {micro_batches} micro-batches, {place.device.type}, {pairs} pairs of "
        f"steps): a step of {1000 * statistics.median(alone):.1f} ms is longer by {_spread(longer)} %."
    )


def main() -> None:
    """Measure and print the table; with --out, write it too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=41)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    load, loop = os.getloadavg()[0], Loop()
    block(loop, given.steps, 1, None, 1)  # warm
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for every in (10, 1):
            rows.append(measure(loop, Path(folder), every, given.pairs, given.steps))
            print(rows[-1], file=sys.stderr, flush=True)
    by_source = measure_by_source(20 * given.pairs)
    cores, today = os.cpu_count(), datetime.date.today().isoformat()
    text = "\n".join(
        [
            f"# What tracking costs a step, CPU-{cores}-cores, {today}\n",
            f"`python -m benchmarks.track --pairs {given.pairs} --steps {given.steps} --threads {given.threads}`, "
            f"torch {torch.__version__}, {platform.machine()}, load average before the run {load:.1f}.\n",
            "| a record every | step alone, ms | longer by, % (interval of 95 %) | "
            "more processor, % (interval) | inside the journal, % | per record, us | "
            "the follower's processor, % of one core |",
            "|---|---|---|---|---|---|---|",
            *rows,
            f"\n{by_source}",
        ]
    )
    print(text)
    if given.out is not None:
        (given.out / f"track_CPU-{cores}-cores_{today}.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
