"""Tracing and takedowns on a plan of 300 billion tokens in 6,000 shards: how long, how much memory.

    python -m benchmarks.trace [--shards 6000] [--out benchmarks]

Two shards of 100 MB are real, with 50,000 documents of random tokens each; the others are links to the first, so that
what is read comes from the page cache. The run has 512 sequences of 2,048 tokens a step. Memory is the peak of each
line above what the process held before it, imports being done.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from configs import build
from data_pipeline.document import Document
from data_pipeline.find import by_ids
from data_pipeline.order import Skips, Withdrawal
from data_pipeline.shards import Format, SealedSlice, SliceWriter, file_hash, seal
from data_pipeline.stream import Corpora
from pretrain import withdrawn
from pretrain.run import TrainRun
from pretrain.trace import course_of, trace_document, trace_step

FORMAT = Format(block_tokens=2**16, vocab_size=50257, end_of_text=50256)
BLOCKS, DOCUMENTS = 763, 50_000  # of a shard: 50 M tokens, 100 MB
MANY = 1_000_000  # samples


BEGUN = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=6000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trace-") as scratch:
        folder = Path(scratch)
        plan(folder / "web", arguments.shards)
        print(f"{time.perf_counter() - BEGUN:.0f} s, the plan is written", file=sys.stderr, flush=True)
        lines, head = measure(folder, run_over(folder, arguments.shards))
    tokens = arguments.shards * BLOCKS * FORMAT.block_tokens
    cores, today = os.cpu_count(), datetime.date.today()
    text = (
        "# Tracing and takedowns\n\n"
        f"`python -m benchmarks.trace --shards {arguments.shards}`, {today}, {cores} cores, Python "
        f"{platform.python_version()}; {tokens / 1e9:,.1f} B tokens, {head}. Once each, files in the page cache.\n\n"
        "| what | found | s | CPU s | peak MB more |\n|---|---|---:|---:|---:|\n" + "\n".join(lines) + "\n"
    )
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"trace_CPU-{cores}-cores_{today}.md").write_text(text)


def measure(folder: Path, run: TrainRun) -> tuple[list[str], str]:
    """Rows of the table, and the size of the plan in words."""
    lines: list[str] = []

    def timed(what: str, do: Callable[[], Any], says: Callable[[Any], str] = lambda result: "") -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
        before = memory_mb("VmRSS")
        begun, cpu = time.perf_counter(), time.process_time()
        result = do()
        seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
        grown = memory_mb("VmHWM") - before
        lines.append(f"| {what} | {says(result)} | {seconds:.2f} | {cpu:.2f} | {grown:,.0f} |")
        print(f"{time.perf_counter() - BEGUN:.0f} s, {lines[-1]}", file=sys.stderr, flush=True)
        return result

    course = timed("the course of the run", lambda: course_of(run))
    for step in (1, course.end_step // 2, course.end_step):
        timed(
            f"`trace --step {step}`", partial(trace_step, run, step),
            lambda seen: f"{len(seen):,} stretches of {len({s.id for s in seen}):,} documents",
        )  # fmt: skip
    timed(
        "`trace --doc ID`", lambda: trace_document(run, "other/25000"),
        lambda found: f"{len(found[0].sightings)} samples",
    )  # fmt: skip
    corpora, generations = Corpora(run.data), {"web": 1}
    for count in (1, 1000, 50_000):
        ids = folder / f"{count}.txt"
        ids.write_text("".join(f"other/{n * (DOCUMENTS // count)}\n" for n in range(count)))
        taken = timed(
            f"takedown of {count:,} documents, found",
            partial(withdrawn.find, corpora, generations, [f"takedown={ids}"]),
            lambda found: f"{withdrawn.size(found.ranges['web', 0]):,} samples",
        )
        assert taken is not None and not taken.unknown
        skips = Skips((), course.order, [Withdrawal(1, {0: taken.ranges["web", 0]})])
        timed("counted to the end of the run", partial(skips.before, course.end_sample), "{:,}".format)
    samples = int(run.train_tokens) // run.data.seq_tokens
    count = min(MANY, samples // 2)
    many = np.arange(count)[:, None] * (samples // count) + np.array([0, 1])
    skips = Skips((), course.order, [Withdrawal(1, {0: many})])
    timed(f"{count:,} samples withdrawn, counted to the end", lambda: skips.before(course.end_sample), "{:,}".format)
    timed("counted to a third, once more", lambda: skips.before(course.end_sample // 3), "{:,}".format)
    assert next(by_ids(corpora.manifests["web"], ["nobody's"], checked=True), None) is None
    return lines, f"{course.end_step:,} steps of {course.end_sample:,} samples in all"


def memory_mb(key: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{key}:")[2].split()[0]) * 1024 / 1e6


def plan(folder: Path, shards: int) -> None:
    """The corpus: slices of one shard each, all but the last of which are one."""
    (folder / "slices").mkdir(parents=True)
    first, last = (one_slice(folder, name, seed) for seed, name in enumerate(("this", "other")))
    slices = []
    for n in range(shards - 1):
        (folder / "slices" / f"s{n:04d}").symlink_to("this")
        slices.append(SealedSlice(f"s{n:04d}", 0, first.shards, first.ids_hash, first.record_hash))
    seal(folder, FORMAT, {"corpus": "web", "tokenizer_sha256": "0" * 64}, [*slices, last])


def one_slice(folder: Path, name: str, seed: int, blocks: int = BLOCKS, documents: int = DOCUMENTS) -> SealedSlice:
    """A slice of one shard of random tokens."""
    rng, total = np.random.default_rng(seed), blocks * FORMAT.block_tokens
    place = folder / "slices" / name
    place.mkdir()
    writer = SliceWriter(place, FORMAT)
    cuts = np.sort(16 * rng.choice(np.arange(1, total // 16), documents - 1, replace=False))
    lengths = np.diff([0, *cuts.tolist(), total + 1])
    for n, length in enumerate(lengths.tolist()):
        ids = rng.integers(0, FORMAT.end_of_text, length - 1, np.uint16)
        writer.add(Document("", f"{name}/{n}", "web", f"https://example.org/{name}/{n}"), ids, "train")
    shards = writer.close()
    assert [shard.blocks for shard in shards] == [blocks]
    (place / "slice.json").write_text("{}")
    return SealedSlice(name, 0, shards, file_hash(place / "ids.npy"), file_hash(place / "slice.json"))


def run_over(folder: Path, shards: int) -> TrainRun:
    tree = {
        "name": "traced",
        "run_folder": str(folder / "run"),
        "model": {"kind": "gpt", "layers": 2, "width": 32, "heads": 2, "context": 2048, "vocab_size": 50257},
        "data": {"seq_tokens": 2048, "sources": {"web": {"shards": str(folder / "web")}}},
        "batch_tokens": 512 * 2048,
        "micro_batch_seqs": 8,
        "train_tokens": shards * BLOCKS * FORMAT.block_tokens,
        "optim": {"kind": "adamw", "lr_peak": "3e-4"},
        "schedule": {"kind": "cosine"},
        "engine": {"kind": "torch", "precision": "fp32"},
    }
    return build(TrainRun, tree, "benchmark")


if __name__ == "__main__":
    main()
