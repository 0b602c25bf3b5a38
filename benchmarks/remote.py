"""Shards read from a server: the wait for data in training at some latencies, and what checking every block costs.

    python -m benchmarks.remote [--latency-ms 0 50] [--step-ms 100] [--steps 160] [--trained 40] [--out benchmarks]

A corpus of random tokens is served over HTTP on loopback by a process of its own, which waits so long before each
answer. One rank reads batches of 64 sequences of 1,024 tokens, and a step between two of them is slept through; so the
wait is that of storage, and of nothing else. Its lanes go on to new blocks every 64 steps; the first of them cannot be
fetched ahead, so the seconds that the first 32 steps wait stand apart. Rate and requests are those of a second pass,
without steps between. `from nothing` is the first use of a cache, `again` the second.

Training on two ranks: a GPT of 2 layers and width 64 over 512 tokens of vocabulary (so small that it wants tokens as
fast as a large one on a GPU does), 32 sequences of 1,024 a step, through all that `pretrain train` does in a step. The
wait is the share of the time of all steps, the first one apart, of the rank that waits longest.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

import configs
from data_pipeline.document import Document
from data_pipeline.order import Order, Segment, Skips, Steps
from data_pipeline.shards import Format, Manifest, SealedSlice, SliceWriter, file_hash, seal
from data_pipeline.stream import Corpora, Data, Stream, timed

VOCAB, SMALL_VOCAB = 50_257, 512
SEQ, BATCH, LANES, START = 1024, 64, 16, 32
RANKS, ROWS, TRAINED = 2, 32, 40  # steps of training, with the first
GOAL, NEWLINE = 0.01, "\n"
BEGUN = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency-ms", type=float, nargs="+", default=[0.0, 50.0])
    parser.add_argument("--step-ms", type=float, default=100.0)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--trained", type=int, default=TRAINED, help="steps of training on two ranks")
    parser.add_argument("--fetch-threads", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--rank", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        folder, address, more = arguments.rank
        one_rank(folder, address, more, arguments.trained)
        return
    with tempfile.TemporaryDirectory(prefix="remote-") as name:
        scratch = Path(name)
        checks = show_checks(scratch)
        waits, training = all_waits(scratch, arguments), all_training(scratch, arguments)
    cores, today = os.cpu_count(), datetime.date.today()
    text = f"""# Shards read from a server

`python -m benchmarks.remote`, {today}, {cores} cores, Python {platform.python_version()}.

Reading blocks in random order from the page cache, on one core:

| tokens of a block | read, us | of which hash | GB/s |
|---|---:|---:|---:|
{NEWLINE.join(checks)}

One rank, {LANES} lanes, {BATCH} sequences of {SEQ:,} a step of {arguments.step_ms:.0f} ms, blocks of 32Ki tokens,
{arguments.fetch_threads} requests at once. The rate is that of a second pass without steps between.

| storage | wait of the first {START} steps, s | share of time of the {max(arguments.steps - START, 0)} after them \
| tokens/s | requests | requests/s | MB | bytes per useful byte |
|---|---:|---:|---:|---:|---:|---:|---:|
{NEWLINE.join(waits)}

Training on {RANKS} ranks, {arguments.trained} steps of {ROWS} sequences of {SEQ:,}; the goal is under {GOAL:.0%}:

| storage | ms per step | data wait, worst rank | first batch, worst rank, s | longest later one, ms | goal |
|---|---:|---:|---:|---:|---|
{NEWLINE.join(training)}
"""
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"remote_CPU-{cores}-cores_{today}.md").write_text(text)


def progress(line: str) -> str:
    """The line, which is shown on stderr, too."""
    print(f"{time.perf_counter() - BEGUN:6.0f} s {line}", file=sys.stderr, flush=True)
    return line


def storages(scratch: Path, corpus: Path, latencies_ms: list[float]) -> Iterator[tuple[str, Storage]]:
    """Each name with an address, what the run's data says beside it, and the server."""
    yield "disk", (str(corpus), {}, None)
    for latency in latencies_ms:
        with Serving(corpus, latency / 1000) as server:
            cache = {"cache": {"folder": str(scratch / f"cache-{latency}"), "gib": 1}}
            yield f"{latency:.0f} ms, no cache", (server.address, {}, server)
            yield f"{latency:.0f} ms, cache, from nothing", (server.address, cache, server)
            yield f"{latency:.0f} ms, cache, again", (server.address, cache, server)


def all_waits(scratch: Path, arguments: argparse.Namespace) -> list[str]:
    corpus = make(scratch / "corpus", 2**15, 40_000_000)
    return [
        progress(show(name, data_of(place, arguments, **more), arguments, server))
        for name, (place, more, server) in storages(scratch, corpus, arguments.latency_ms)
    ]


def make(folder: Path, block_tokens: int, tokens: int, vocab: int = VOCAB) -> Path:
    """A corpus of one slice."""
    format, rng = Format(block_tokens, vocab, vocab - 1), np.random.default_rng(0)
    place = folder / "slices" / "s0"
    place.mkdir(parents=True)
    writer = SliceWriter(place, format)
    for i in range(tokens // 10_000):
        writer.add(Document("", str(i), "random", "", {}), rng.integers(0, vocab - 1, 9_999), "train")
    shards = writer.close()
    (place / "slice.json").write_text("{}")
    sealed = SealedSlice("s0", 0, shards, file_hash(place / "ids.npy"), file_hash(place / "slice.json"))
    seal(folder, format, {"corpus": "random", "tokenizer_sha256": "0" * 64}, [sealed])
    return folder


# --- what a check costs -----------------------------------------------------------------------------------------------


def show_checks(scratch: Path) -> list[str]:
    """Reading blocks in random order from the page cache, one core; the hashing of the same bytes alone."""
    lines = []
    for power in (14, 16, 18, 20):
        shards = Manifest.open(make(scratch / f"checks-{power}", 2**power, 20 * 2**20)).shards("train", 0)
        blocks = np.random.default_rng(1).permutation(shards.blocks)
        held = [shards.read(int(block)).tobytes() for block in blocks]  # more than the processor's caches hold
        reads, hashes = [], []
        for _ in range(5):
            begun = time.perf_counter()
            for block in blocks:
                shards.read(int(block))
            reads.append((time.perf_counter() - begun) / len(blocks))
            begun = time.perf_counter()
            for data in held:
                xxhash.xxh3_128_digest(data)
            hashes.append((time.perf_counter() - begun) / len(blocks))
        read, hash = statistics.median(reads), statistics.median(hashes)
        rate = len(held[0]) / read / 1e9
        lines.append(progress(f"| {2**power // 1024}Ki | {1e6 * read:.1f} | {hash / read:.1%} | {rate:.2f} |"))
    return lines


# --- the wait ---------------------------------------------------------------------------------------------------------


def data_of(place: Path | str, arguments: argparse.Namespace, **more: Any) -> Data:
    tree = {"seq_tokens": SEQ, "sources": {"random": {"shards": str(place)}}, "fetch_threads": arguments.fetch_threads}
    return configs.build(Data, {**tree, **more}, "benchmark")


def stream_of(data: Data) -> Stream:
    corpora = Corpora(data)
    pools = corpora.pools({"random": 1})
    order = Order(1, pools, LANES, data.group_blocks, [Segment(0, {"random": 1.0}, {"random": 1})])
    return Stream(order, Steps([(0, BATCH)]), Skips(), corpora.shards(pools), data, 8)


def show(name: str, data: Data, arguments: argparse.Namespace, server: Serving | None) -> str:
    """What the first steps wait, the share of time that the later ones do, and the rate without steps between."""
    waits = []
    for _, waited in timed(stream_of(data).batches(0, arguments.steps)):
        time.sleep(arguments.step_ms / 1000)
        waits.append(waited)
    first, later = sum(waits[:START]), sum(waits[START:])
    share = later / (later + len(waits[START:]) * arguments.step_ms / 1000) if later else 0.0
    if name.endswith("from nothing"):
        shutil.rmtree(data.cache.folder if data.cache else "")
    before = server.told() if server else (0, 0)
    begun = time.perf_counter()
    fed = int(sum(batch.valid.sum() for batch in stream_of(data).batches(0, arguments.steps)))
    seconds = time.perf_counter() - begun
    asked = [a - b for a, b in zip(server.told() if server else (0, 0), before, strict=True)]
    cells = [f"{asked[0]:,}", f"{asked[0] / seconds:,.0f}", f"{asked[1] / 1e6:.1f}", f"{asked[1] / (2 * fed):.2f}"]
    return (
        f"| {name} | {first:.2f} | {share:.2%} | {fed / seconds:,.0f} | "
        + " | ".join(cells if server else [""] * 4)
        + " |"
    )


# --- training ---------------------------------------------------------------------------------------------------------


def all_training(scratch: Path, arguments: argparse.Namespace) -> list[str]:
    """The wait of a real run on two ranks, from the disk and from the slowest server."""
    corpus = make(scratch / "small", 2**15, 2 * arguments.trained * ROWS * SEQ + 2**21, SMALL_VOCAB)
    place = scratch / "training"
    place.mkdir()
    lines = []
    slowest = [max(arguments.latency_ms)]
    for number, (name, (address, more, _)) in enumerate(storages(place, corpus, slowest)):
        found = train(place / f"run-{number}", address, more, arguments.trained)
        later = [each["waits"][1:] for each in found]
        worst = max(sum(waits) / each["seconds"] for waits, each in zip(later, found, strict=True))
        step_ms = 1000 * found[0]["seconds"] / len(later[0])
        first = max(each["waits"][0] for each in found)
        longest = 1000 * max(max(waits) for waits in later)
        goal = "met" if worst < GOAL else "missed"
        lines.append(progress(f"| {name} | {step_ms:.0f} | {worst:.2%} | {first:.2f} | {longest:.0f} | {goal} |"))
    return lines


def train(folder: Path, address: str, more: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """What each rank waited in each step, and the seconds of all but the first."""
    from tests.processes import environment, free_port

    port = free_port()
    command = [sys.executable, "-m", "benchmarks.remote", "--trained", str(steps)]
    command += ["--rank", str(folder), address, json.dumps(more)]
    started = [
        subprocess.Popen(command, env=environment(rank, RANKS, port), stdout=subprocess.PIPE, text=True)
        for rank in range(RANKS)
    ]
    printed = [process.communicate(timeout=300)[0] for process in started]
    assert all(process.returncode == 0 for process in started), [process.returncode for process in started]
    return [json.loads(text.splitlines()[-1]) for text in printed]


def one_rank(folder: str, address: str, more: str, steps: int) -> None:
    """A rank's steps, as `pretrain train` makes them."""
    import torch

    from benchmarks.step import loop_steps
    from pretrain.guard import StopSignals
    from pretrain.meter import Startup
    from pretrain.ranks import Ranks
    from pretrain.run import TrainRun
    from pretrain.start import begin
    from pretrain.watchdog import Watchdog

    torch.set_num_threads(1)
    model = {"kind": "gpt", "layers": 2, "width": 64, "heads": 2, "context": SEQ, "vocab_size": SMALL_VOCAB}
    tree = {
        "name": "benchmark", "run_folder": folder, "model": model, "seed": 1,
        "data": {"seq_tokens": SEQ, "sources": {"random": {"shards": address}}, **json.loads(more)},
        "batch_tokens": ROWS * SEQ, "micro_batch_seqs": 4, "train_tokens": steps * ROWS * SEQ,
        "optim": {"kind": "adamw", "lr_peak": "1e-3"}, "schedule": {"kind": "cosine"},
        "engine": {"kind": "torch", "precision": "fp32"}, "preflight": {"enabled": False},
    }  # fmt: skip
    run, ranks = configs.build(TrainRun, tree, "benchmark"), Ranks.join()
    attempt = begin(run, ranks, StopSignals(), Watchdog(ranks, run.run_folder, 1e6, 1e6), Startup())
    waits: list[float] = []
    first_done = 0.0
    for waited in loop_steps(attempt):
        waits.append(waited)
        first_done = first_done or time.perf_counter()
    print(json.dumps({"waits": waits, "seconds": time.perf_counter() - first_done}), flush=True)
    ranks.leave_together(20)
    os._exit(0)


# --- the server -------------------------------------------------------------------------------------------------------


class Serving:
    """A web server with ranges, in a process of its own, that waits before each answer."""

    def __init__(self, folder: Path, latency_s: float) -> None:
        context = multiprocessing.get_context("fork")
        self.here, there = context.Pipe()
        self.process = context.Process(target=serve, args=(folder, latency_s, there), daemon=True)
        self.process.start()
        self.address = f"http://127.0.0.1:{self.here.recv()}"

    def told(self) -> tuple[int, int]:
        """(requests, bytes) so far."""
        self.here.send("?")
        answer: tuple[int, int] = self.here.recv()
        return answer

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()


Storage = tuple[str, dict[str, Any], Serving | None]


def serve(folder: Path, latency_s: float, pipe: Connection) -> None:
    import threading

    counted, lock = [0, 0], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            time.sleep(latency_s)
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            size = path.stat().st_size
            first, last = (int(span[1]), min(int(span[2]), size - 1)) if span else (0, size - 1)
            with path.open("rb") as file:
                file.seek(first)
                data = file.read(last + 1 - first)
            self.send_response(206 if span else 200)
            self.send_header("ETag", f'"{size}"')
            self.send_header("Content-Length", str(len(data)))
            if span:
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            self.end_headers()
            self.wfile.write(data)
            with lock:
                counted[0] += 1
                counted[1] += len(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pipe.send(server.server_port)
    while True:
        pipe.recv()
        with lock:
            pipe.send(tuple(counted))


if __name__ == "__main__":
    main()
