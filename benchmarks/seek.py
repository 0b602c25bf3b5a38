"""Seconds and memory to start, and to go on anywhere, in a plan of many shards: simulated corpora, ours alone.

    python -m benchmarks.seek [--out benchmarks]

The shards are records in a real manifest without files behind them. A process opens it (`open`), lays out order, steps
and stream, finds what a rank reads in 100 steps in the middle (`start`), then in 1,000 steps at random (`seek`), as a
resume does before it reads the first block. Memory is the peak of the process above that of the bare imports; the
blocks that are then opened are bounded by `data.open_blocks_mib` and printed as their own figure.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PLANS = {  # name: (tokens, shards, sources)
    "300 B tokens, 6,000 shards": (300 * 10**9, 6_000, 5),
    "100 T tokens, 1,000,000 shards": (100 * 10**12, 1_000_000, 5),
}
LENGTH, BLOCK, BATCH, RANKS = 2048, 2**16, 2048, 64
SOURCES = ("common_crawl", "books", "code", "papers", "wikipedia")


def write(folder: Path, tokens: int, shards: int, sources: int) -> None:
    """A sealed manifest per source."""
    from dataclasses import replace

    from data_pipeline.shards import Format, SealedSlice, ShardRecord, seal

    blocks = tokens // shards // BLOCK
    hashes = f"{0:032x}"
    record = ShardRecord("train-00000", "train", blocks, 0, blocks * BLOCK, 9000, 2**25, hashes, hashes, hashes)
    for name in SOURCES[:sources]:
        slices = []
        for number in range(shards // sources // 10):
            each = [replace(record, name=f"train-{i:05d}", hash=f"{10 * number + i:032x}") for i in range(10)]
            slices.append(SealedSlice(f"0-{number:05d}", 0, each, f"{number:032x}", f"{number:032x}"))
        (folder / name).mkdir()
        seal(folder / name, Format(BLOCK, 50257, 50256), {"tokenizer_sha256": "0" * 64}, slices)


def peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def measure(folder: Path) -> dict[str, float]:
    """In a process of its own."""
    import numpy as np

    from configs import build
    from data_pipeline.order import Order, Segment, Skips, Steps, choose_lanes
    from data_pipeline.stream import Corpora, Data, Stream

    bare, marks = peak_mb(), [time.perf_counter()]
    used = time.process_time()
    names = [path.name for path in sorted(folder.iterdir())]
    sources = {name: {"shards": str(folder / name), "weight": 1 + i} for i, name in enumerate(names)}
    data = build(Data, {"seq_tokens": LENGTH, "sources": sources}, "benchmark")
    corpora = Corpora(data)
    generations = dict.fromkeys(names, 1)
    pools = corpora.pools(generations)
    marks.append(time.perf_counter())
    lanes = choose_lanes([pool.blocks for pool in pools], BATCH)
    weights = {name: source.weight for name, source in data.sources.items()}
    order = Order(1, pools, lanes, data.group_blocks, [Segment(0, weights, generations)])
    stream = Stream(order, Steps([(0, BATCH)]), Skips(), corpora.shards(pools), data, 8, 5, RANKS)
    last = sum(pool.blocks * pool.rows for pool in pools) // BATCH
    for step in range(last // 2, last // 2 + 100):
        places = stream._share(step).where
    marks.append(time.perf_counter())
    draws = np.random.default_rng(1)
    for step in draws.integers(0, last, 1000).tolist():
        places = stream._share(step).where
        shards = stream.open_blocks.shards[int(places.pool[0])]
        shards.name(*shards.locate(int(places.block[0]))[:1], "tar")
    marks.append(time.perf_counter())
    block_bytes = 2 * (BLOCK + 1)
    return {
        "open": marks[1] - marks[0],
        "start": marks[2] - marks[1],
        "seek_ms": (marks[3] - marks[2]),
        "cpu": time.process_time() - used,
        "mb": peak_mb() - bare,
        "blocks_mb": stream.open_blocks.capacity * block_bytes / 1e6,
        "steps": math.floor(last),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    lines = []
    for name, plan in PLANS.items():
        with tempfile.TemporaryDirectory(prefix="seek-") as work:
            write(Path(work), *plan)
            found = []
            for _ in range(3):
                command = [sys.executable, "-m", "benchmarks.seek", "--measure", work]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found.append(json.loads(done.stdout.splitlines()[-1]))
        best = {key: sorted(each[key] for each in found)[1] for key in found[0]}
        lines.append(
            f"| {name} | {best['steps']:,} | {best['open']:.2f} | {best['start']:.2f} | {best['seek_ms']:.1f} "
            f"| {best['cpu']:.2f} | {best['mb']:,.0f} | {best['blocks_mb']:,.0f} |"
        )
        print(lines[-1], file=sys.stderr)
    cores, today = os.cpu_count(), datetime.date.today()
    text = (
        "# Start and seek\n\n"
        f"`python -m benchmarks.seek`, {today}, {cores} cores, Python {platform.python_version()}; {len(SOURCES)} "
        f"sources, sequences of {LENGTH:,}, batches of {BATCH:,}, rank 5 of {RANKS}, 512 lanes, medians of three "
        "processes.\n\n"
        "| plan | steps | open s | to the first step in the middle s | a step at random ms | CPU s, all of it "
        "| MB above the imports | MB that open blocks may take |\n|---|---:|---:|---:|---:|---:|---:|---:|\n"
        + "\n".join(lines)
        + "\n"
    )
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"seek_CPU-{cores}-cores_{today}.md").write_text(text)


if __name__ == "__main__":
    main()
