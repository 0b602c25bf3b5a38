"""Seconds and memory to start, and to go on anywhere, in a plan of many shards; and MosaicML streaming's on one.

    python -m benchmarks.seek [--peers PYTHON] [--scale 1] [--out benchmarks]

Plans of five sources. In that of 300 B tokens every shard is a link to one real shard of 100 MB, so the first batch is
read (from the page cache) and checked; the shards of the other are records in a real manifest without files behind
them. A process opens the plan (`open`), lays out order, steps and stream and finds what a rank reads in a step in the
middle (`start`), reads that step's batch, then finds 1,000 steps at random (`seek`). `--scale 0.01` makes all smaller.

Memory is the peak of the process above what it holds once all is imported, up to the first step found; the blocks that
are then opened are bounded by `data.open_blocks_mib` and printed as their own figure.

`--peers` is the Python of an environment with mosaicml-streaming, which gets the index of as many shards of samples of
the same length, without files behind them: it opens it, then makes the epoch's order from the middle on, as it does at
each start and in each epoch, once per node. Its memory counts what it shares between the ranks of a node, too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PLANS = {  # name: (tokens, shards, real)
    "300 B tokens, 6,000 shards": (300 * 10**9, 6_000, True),
    "100 T tokens, 1,000,000 shards": (100 * 10**12, 1_000_000, False),
}
LENGTH, BLOCK, BATCH, RANKS = 2048, 2**16, 2048, 64
SOURCES = ("common_crawl", "books", "code", "papers", "wikipedia")
ROOT = str(Path(__file__).resolve().parents[1])
BEGUN = time.perf_counter()


def write(folder: Path, tokens: int, shards: int, real: bool) -> None:
    """A sealed manifest per source; `real`: with one shard behind it, to which all slices are links."""
    from benchmarks.trace import one_slice
    from data_pipeline.shards import Format, SealedSlice, ShardRecord, seal

    format, blocks = Format(BLOCK, 50257, 50256), tokens // shards // BLOCK
    hashes = f"{0:032x}"
    record = ShardRecord("train-00000", "train", blocks, 0, blocks * BLOCK, 9000, 2**25, hashes, hashes, hashes)
    sealed = SealedSlice("real", 0, [record], hashes, hashes)
    if real:
        (folder / "real/slices").mkdir(parents=True)
        sealed = one_slice(folder / "real", "real", 1, blocks, documents=blocks * BLOCK // 1000)
    for name in SOURCES:
        slices = []
        for number in range(shards // len(SOURCES)):
            slice = f"0-{number:05d}"
            slices.append(SealedSlice(slice, 0, sealed.shards, sealed.ids_hash, sealed.record_hash))
            if real:
                (folder / name / "slices").mkdir(parents=True, exist_ok=True)
                (folder / name / "slices" / slice).symlink_to(folder / "real/slices/real")
        (folder / name).mkdir(exist_ok=True)
        seal(folder / name, format, {"tokenizer_sha256": "0" * 64}, slices)


def write_index(folder: Path, tokens: int, shards: int) -> None:
    """MosaicML streaming's index of as many samples in as many shards."""
    each, size = tokens // shards // LENGTH, 2 * (LENGTH + 1)
    shard = {
        "column_encodings": [f"ndarray:uint16:{LENGTH + 1}"], "column_names": ["tokens"], "column_sizes": [size],
        "compression": None, "format": "mds", "hashes": [], "samples": each, "size_limit": 2**26, "version": 2,
        "zip_data": None,
    }  # fmt: skip
    records = [
        {**shard, "raw_data": {"basename": f"shard.{n:05d}.mds", "bytes": each * (size + 4) + 400, "hashes": {}}}
        for n in range(shards)
    ]
    folder.mkdir()
    (folder / "index.json").write_text(json.dumps({"shards": records, "version": 2}))


# --- in a process of its own ------------------------------------------------------------------------------------------


class Clock:
    """Seconds by name, since the last one; and memory above what there was at first."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
        self.bare = memory_mb("VmRSS")
        self.last = time.perf_counter(), time.process_time()

    def mark(self, name: str) -> None:
        now = time.perf_counter(), time.process_time()
        self.found[name], self.found[f"{name} cpu"] = now[0] - self.last[0], now[1] - self.last[1]
        self.found[f"{name} mb"] = memory_mb("VmHWM") - self.bare
        self.last = time.perf_counter(), time.process_time()


def memory_mb(key: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{key}:")[2].split()[0]) * 1024 / 1e6


def ours(folder: Path) -> dict[str, float]:
    """Rank 5 of RANKS."""
    import numpy as np

    from configs import build
    from data_pipeline.order import Order, Segment, Skips, Steps, choose_lanes
    from data_pipeline.stream import Corpora, Data, Stream

    clock = Clock()
    sources = {name: {"shards": str(folder / name), "weight": 1 + i} for i, name in enumerate(sorted(SOURCES))}
    data = build(Data, {"seq_tokens": LENGTH, "sources": sources}, "benchmark")
    corpora = Corpora(data)
    generations = dict.fromkeys(sorted(SOURCES), 1)
    pools = corpora.pools(generations)
    clock.mark("open")
    lanes = choose_lanes([pool.blocks for pool in pools], BATCH)
    weights = {name: source.weight for name, source in data.sources.items()}
    order = Order(1, pools, lanes, data.group_blocks, [Segment(0, weights, generations)])
    stream = Stream(order, Steps([(0, BATCH)]), Skips(), corpora.shards(pools), data, 8, 5, RANKS)
    last = sum(pool.blocks * pool.rows for pool in pools) // BATCH
    stream._share(last // 2)
    clock.mark("start")
    if (folder / "real").exists():
        stream.batch(last // 2)
        clock.mark("batch")
    for step in np.random.default_rng(1).integers(0, last, 1000).tolist():
        pool, block = stream.open_blocks.place(int(stream._share(step).blocks[0]))
        shards = stream.open_blocks.shards[pool]
        shards.name(*shards.locate(block)[:1], "tar")
    clock.mark("seek")  # of 1,000, so of one in ms
    blocks_mb = stream.open_blocks.capacity * 2 * (BLOCK + 1) / 1e6
    return {**clock.found, "blocks_mb": blocks_mb, "steps": last, "lanes": lanes}


def streaming(folder: Path) -> dict[str, float]:
    """The only rank of its node."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    clock = Clock()
    where = {"local": str(folder / "streaming"), "remote": str(folder / "nowhere")}
    dataset = StreamingDataset(**where, shuffle=True, batch_size=BATCH // RANKS)
    clock.mark("open")
    samples = dataset.num_samples
    dataset.load_state_dict({**dataset.state_dict(0, True), "epoch": 0, "sample_in_epoch": samples // 2})
    dataset._unique_worker_world = dataset._unique_rank_world.detect_workers()  # as its __iter__ begins
    dataset._parallel_worker_world = dataset._parallel_rank_world.detect_workers()
    epoch, begun = dataset._resume_incr_epoch()
    work = dataset._get_work(epoch, begun)
    assert begun == samples // 2 and len(work) >= samples // 2
    clock.mark("start")
    return {**clock.found, "steps": samples // BATCH}


# --- the run ----------------------------------------------------------------------------------------------------------


def run(python: str, side: str, folder: Path) -> dict[str, float]:
    """The figures of a side, in a process of its own."""
    command = [python, "-m", "benchmarks.seek", "--side", side, "--folder", str(folder)]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=400)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def medians(rounds: int, one: Callable[[], dict[str, float]]) -> dict[str, float]:
    found = [one() for _ in range(rounds)]
    return {key: statistics.median(each[key] for each in found) for key in found[0]}


def row(plan: str, side: str, found: dict[str, float]) -> str:
    """Of the table."""

    def cell(key: str, digits: int) -> str:
        return f"{found[key]:,.{digits}f}" if key in found else ""

    both = found["open"] + found["start"], found["open cpu"] + found["start cpu"]
    return (
        f"| {plan} | {side} | {found['steps']:,.0f} | {found['open']:.2f} | {found['start']:.2f} | {both[0]:.2f} "
        f"| {both[1]:.2f} | {cell('batch', 2)} | {cell('seek', 1)} | {cell('seek cpu', 1)} | {found['start mb']:,.0f} "
        f"| {cell('blocks_mb', 0)} |"
    )


def against(mine: dict[str, float], theirs: dict[str, float]) -> str:
    """A sentence."""
    seconds = (theirs["open"] + theirs["start"]) / (mine["open"] + mine["start"])
    return (
        f"\nOn the plan that both opened, streaming takes {seconds:,.0f} times as long to the first step and "
        f"{theirs['start mb'] / max(mine['start mb'], 1):,.0f} times the memory above the imports.\n"
    )


def progress(*words: object) -> None:
    print(f"{time.perf_counter() - BEGUN:6.0f} s", *words, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="a Python with mosaicml-streaming")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--side", choices=("ours", "streaming"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps({"ours": ours, "streaming": streaming}[arguments.side](arguments.folder)), flush=True)
        os._exit(0)
    lines, words = [], ""
    for name, (tokens, shards, real) in PLANS.items():
        shards = max(int(shards * arguments.scale), 50)
        plan = name if arguments.scale == 1 else f"{arguments.scale:g} of {name}"
        tokens = int(tokens * arguments.scale)
        with tempfile.TemporaryDirectory(prefix="seek-") as work:
            folder = Path(work)
            write(folder, tokens, shards, real)
            progress(plan, "written")
            mine = medians(arguments.rounds, lambda folder=folder: run(sys.executable, "ours", folder))  # type: ignore[misc]
            lines.append(row(plan, "ours", mine))
            progress(lines[-1])
            if arguments.peers and real:
                write_index(folder / "streaming", tokens, shards)
                theirs = run(arguments.peers, "streaming", folder)
                lines.append(row(plan, f"streaming {version(arguments.peers)}, once", theirs))
                words = against(mine, theirs)
                progress(lines[-1])
    write_page(arguments.out, lines, words, arguments.rounds)


def version(python: str) -> Any:
    code = "import importlib.metadata as m; print(m.version('mosaicml-streaming'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def write_page(out: Path, lines: list[str], words: str, rounds: int) -> None:
    cores, today = os.cpu_count(), datetime.date.today()
    text = (
        "# Start and seek\n\n"
        f"`python -m benchmarks.seek`, {today}, {cores} cores, Python {platform.python_version()}; {len(SOURCES)} "
        f"sources, sequences of {LENGTH:,}, batches of {BATCH:,}, rank 5 of {RANKS}; ours in medians of {rounds} "
        "processes. Imports are not in it, neither in seconds nor in MB; files in the page cache.\n\n"
        "| plan | side | steps | open s | then to a step in the middle s | both s | both, CPU s | its batch read and "
        "checked s | a step at random ms | of CPU | MB above the imports | MB that open blocks may take |\n"
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n" + "\n".join(lines) + "\n" + words
    )
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"seek_CPU-{cores}-cores_{today}.md").write_text(text)


if __name__ == "__main__":
    main()
