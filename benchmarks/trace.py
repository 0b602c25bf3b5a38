"""Tracing and takedowns on a plan of 300 billion tokens in 6,000 shards: how long, how much memory.

    python -m benchmarks.trace [--shards 6000]

Two shards of 100 MB are real, with 50,000 documents of random tokens each; the others are links to the first, so that
what is read comes from the page cache. The run has 512 sequences of 2,048 tokens a step.
"""

from __future__ import annotations

import argparse
import resource
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=6000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        plan(folder / "web", arguments.shards)
        run = run_over(folder, arguments.shards)
        course = timed("the course of the run", lambda: course_of(run))
        print(f"{course.end_step:,} steps, {course.end_sample:,} samples")
        for step in (1, course.end_step // 2, course.end_step):
            seen = timed(f"trace --step {step}", partial(trace_step, run, step))
            print(f"    {len(seen):,} stretches of {len({s.id for s in seen}):,} documents in 512 samples")
        (found,) = timed("trace --doc", lambda: trace_document(run, "other/25000"))
        print(f"    {len(found.sightings)} sightings")
        corpora, generations = Corpora(run.data), {"web": 1}
        for count in (1, 1000, 50_000):
            ids = folder / f"{count}.txt"
            ids.write_text("".join(f"other/{n * (DOCUMENTS // count)}\n" for n in range(count)))
            taken = timed(
                f"takedown of {count:,} documents found",
                partial(withdrawn.find, corpora, generations, [f"takedown={ids}"]),
            )
            assert taken is not None and not taken.unknown
            skips = Skips((), course.order, [Withdrawal(1, {0: taken.ranges["web", 0]})])
            timed("    counted to the end of the run", partial(skips.before, course.end_sample))
        million = np.array([[n * 100, n * 100 + 1] for n in range(1_000_000)])
        skips = Skips((), course.order, [Withdrawal(1, {0: million})])
        timed("a million samples withdrawn, counted to the end", lambda: skips.before(course.end_sample))
        timed("    and counted once more", lambda: skips.before(course.end_sample // 3))
        assert next(by_ids(corpora.manifests["web"], ["nobody's"], checked=True), None) is None


def plan(folder: Path, shards: int) -> None:
    """The corpus: slices of one shard each, all but the last of which are one."""
    (folder / "slices").mkdir(parents=True)
    first, last = (one_slice(folder, name, seed) for seed, name in enumerate(("this", "other")))
    slices = []
    for n in range(shards - 1):
        (folder / "slices" / f"s{n:04d}").symlink_to("this")
        slices.append(SealedSlice(f"s{n:04d}", 0, first.shards, first.ids_hash, first.record_hash))
    seal(folder, FORMAT, {"corpus": "web", "tokenizer_sha256": "0" * 64}, [*slices, last])


def one_slice(folder: Path, name: str, seed: int) -> SealedSlice:
    rng = np.random.default_rng(seed)
    place = folder / "slices" / name
    place.mkdir()
    writer = SliceWriter(place, FORMAT)
    cuts = np.sort(rng.choice(BLOCKS * FORMAT.block_tokens, DOCUMENTS - 1, replace=False))
    lengths = np.diff([0, *cuts.tolist(), BLOCKS * FORMAT.block_tokens + 1])
    for n, length in enumerate(lengths.tolist()):
        ids = rng.integers(0, FORMAT.end_of_text, max(length - 1, 0), np.uint16)
        writer.add(Document("", f"{name}/{n}", "web", f"https://example.org/{name}/{n}"), ids, "train")
    shards = writer.close()
    assert [shard.blocks for shard in shards] == [BLOCKS]
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


def timed(what: str, do: Callable[[], Any]) -> Any:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun, cpu = time.perf_counter(), time.process_time()
    result = do()
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{what:<50} {seconds:8.2f} s  {cpu:8.2f} s of CPU  peak +{grown:.0f} MiB", flush=True)
    return result


if __name__ == "__main__":
    main()
