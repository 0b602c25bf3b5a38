"""Shards read from a server: the wait for data in training at some latencies, and what checking every block costs.

    python -m benchmarks.remote [--latency-ms 0 50] [--step-ms 100] [--steps 160] [--fetch-threads 16]

A corpus of random tokens is served over HTTP on loopback by a process of its own, which waits so long before each
answer. One rank reads batches of 64 sequences of 1,024 tokens, and a step between two of them is slept through; so the
wait is that of storage, and of nothing else. Its lanes go on to new blocks every 64 steps; the first of them cannot be
fetched ahead, so the seconds that the first 32 steps wait stand apart. Rate and requests are those of a second pass,
without steps between. `from nothing` is the first use of a cache, `again` the second.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import shutil
import statistics
import tempfile
import time
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

VOCAB = 50_257
SEQ, BATCH, LANES, START = 1024, 64, 16, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency-ms", type=float, nargs="+", default=[0.0, 50.0])
    parser.add_argument("--step-ms", type=float, default=100.0)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--fetch-threads", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        show_checks(Path(scratch))
        corpus = make(Path(scratch) / "corpus", 2**15, 40_000_000)
        print(f"\n{'':<24}{'at first':>10}{'then':>9}{'tokens/s':>14}{'requests':>10}{'MB':>8}")
        show("from disk", data_of(corpus, arguments), arguments, None)
        for latency in arguments.latency_ms:
            with Serving(corpus, latency / 1000) as server:
                cache = Path(scratch) / f"cache-{latency}"
                for name, more in (
                    ("no cache", {}),
                    ("from nothing", {"cache": {"folder": str(cache), "gib": 1}}),
                    ("again", {"cache": {"folder": str(cache), "gib": 1}}),
                ):
                    data = data_of(server.address, arguments, **more)
                    show(f"{latency:.0f} ms, {name}", data, arguments, server)


def make(folder: Path, block_tokens: int, tokens: int) -> Path:
    """A corpus of one slice."""
    format, rng = Format(block_tokens, VOCAB, VOCAB - 1), np.random.default_rng(0)
    place = folder / "slices" / "s0"
    place.mkdir(parents=True)
    writer = SliceWriter(place, format)
    for i in range(tokens // 10_000):
        writer.add(Document("", str(i), "random", "", {}), rng.integers(0, VOCAB - 1, 9_999), "train")
    shards = writer.close()
    (place / "slice.json").write_text("{}")
    sealed = SealedSlice("s0", 0, shards, file_hash(place / "ids.npy"), file_hash(place / "slice.json"))
    seal(folder, format, {"corpus": "random", "tokenizer_sha256": "0" * 64}, [sealed])
    return folder


# --- what a check costs -----------------------------------------------------------------------------------------------


def show_checks(scratch: Path) -> None:
    """Reading blocks in random order from the page cache, one core; the hashing of the same bytes alone."""
    print(f"{'block':>10}{'read, us':>12}{'of which hash':>16}{'GB/s':>8}")
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
        print(
            f"{2**power // 1024:>8}Ki{1e6 * read:>12.1f}{100 * hash / read:>14.1f} %{len(held[0]) / read / 1e9:>8.2f}"
        )


# --- the wait ---------------------------------------------------------------------------------------------------------


def data_of(place: Path | str, arguments: argparse.Namespace, **more: Any) -> Data:
    tree = {"seq_tokens": SEQ, "sources": {"random": {"shards": str(place)}}, "fetch_threads": arguments.fetch_threads}
    return configs.build(Data, {**tree, **more}, "benchmark")


def stream_of(data: Data) -> Stream:
    corpora = Corpora(data)
    pools = corpora.pools({"random": 1})
    order = Order(1, pools, LANES, data.group_blocks, [Segment(0, {"random": 1.0}, {"random": 1})])
    return Stream(order, Steps([(0, BATCH)]), Skips(), corpora.shards(pools), data, 8)


def show(name: str, data: Data, arguments: argparse.Namespace, server: Serving | None) -> None:
    """What the first steps wait, the share of time that the later ones do, and the rate without steps between."""
    waits = []
    for _, waited in timed(stream_of(data).batches(0, arguments.steps)):
        time.sleep(arguments.step_ms / 1000)
        waits.append(waited)
    first, later = sum(waits[:START]), sum(waits[START:])
    share = later / (later + len(waits[START:]) * arguments.step_ms / 1000)
    if name.endswith("from nothing"):
        shutil.rmtree(data.cache.folder if data.cache else "")
    before = server.told() if server else (0, 0)
    begun = time.perf_counter()
    fed = sum(batch.valid.sum() for batch in stream_of(data).batches(0, arguments.steps))
    rate = int(fed) / (time.perf_counter() - begun)
    asked = [a - b for a, b in zip(server.told() if server else (0, 0), before, strict=True)]
    print(
        f"{name:<24}{first:>8.2f} s{100 * share:>7.2f} %{rate:>14,.0f}{asked[0]:>10,}{asked[1] / 1e6:>8.1f}",
        flush=True,
    )


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
