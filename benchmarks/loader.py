"""Tokens per second from shards to an int64 batch ready for pinning, beside other loaders: one run, the same tokens.

    python -m benchmarks.loader [--peers PYTHON] [--tokens 67108864] [--rounds 3] [--latency-ms 50] [--out benchmarks]

`--peers` is the Python of an environment with mosaicml-streaming, litdata, megatron-core, megatron-energon, webdataset
and grain; what is missing there is left out, with the reason. Each side prepares the same stream of uint16 tokens (of
documents that end in 50,256) in its own format, then reads it in random order as its documentation says, in batches of
64 sequences of 1,024 (and their targets), in a process of its own on one core, without workers.

Page cache warm: the files were read just before. Cold: every file is synced and dropped by posix_fadvise(DONTNEED); the
bytes that then come from the disk are the kernel's count (read_bytes of /proc/self/io), so mapped files count too.
Read calls are syscr of the same file, and page faults that wait for the disk.

The wait in training: a consumer that takes a batch every 250 ms (262,144 tokens a second), 30 times or for 20 s; a
side may have one worker and reads ahead as it does by default. For storage of 50 ms each read and each open of a file
in a FUSE mount of the folder waits that long (mfusepy, libfuse2; left out where they are missing), the cache of the
kernel being empty. Those that keep a cache of their own on the node's disk (ours, streaming, litData) have an empty
one.

The sides, as their own pages advise: streaming and Energon as in their quick starts, with a buffer of 1,000 samples
where there is one; litData with TokensLoader, a shared drive as `local:`; webdataset batches inside the dataset; grain
reads ArrayRecords of one record a group, uncompressed as all others are. All turn a batch to int64 as late as they
allow. "Our tars" is webdataset over the shards that ours reads, whose blocks it cuts into sequences: the same bytes,
decoded once for 64 sequences.

What is not the same: ours checks every block against its hash and hashes every sample for the digest of the run, the
others check nothing; Megatron's batch has labels, loss mask and positions with it; webdataset and Energon shuffle in
their buffer, litData within and among few chunks, ours by lanes and windows, the others everything.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LENGTH, ROWS, VOCABULARY, END = 1024, 64, 50257, 50256
STEP_S, STEPS, WAIT_S = 0.25, 30, 20
BLOCK = 2**16
BEGUN = time.perf_counter()
ROOT = str(Path(__file__).resolve().parents[1])


def stream(folder: Path) -> Any:
    """The tokens, uint16, documents ending in END."""
    return np.load(folder / "stream.npy", mmap_mode="r")


def rows(folder: Path) -> Iterator[Any]:
    """Sequences with their targets: (LENGTH + 1,), the last the next one's first."""
    tokens = stream(folder)
    for begin in range(0, len(tokens) - LENGTH, LENGTH):
        yield np.asarray(tokens[begin : begin + LENGTH + 1])


def documents(folder: Path) -> Iterator[Any]:
    """Documents without their END."""
    tokens = np.asarray(stream(folder))
    begin = 0
    for end in np.flatnonzero(tokens == END).tolist():
        yield tokens[begin:end]
        begin = end + 1


# --- the sides: prepare(source, folder), and batches(folder, workers, cache) -> arrays or tensors of int64 -----------


def prepare_ours(source: Path, folder: Path) -> None:
    from data_pipeline.document import Document
    from data_pipeline.shards import Format, SealedSlice, SliceWriter, file_hash, seal

    place, format = folder / "slices/s0", Format(BLOCK, VOCABULARY, END, 64 * 2**20)
    place.mkdir(parents=True)
    writer = SliceWriter(place, format)
    for number, ids in enumerate(documents(source)):
        writer.add(Document("", str(number), "benchmark", "", {}), ids, "train")
    records = writer.close()
    (place / "slice.json").write_text("{}")
    hashes = file_hash(place / "ids.npy"), file_hash(place / "slice.json")
    seal(folder, format, {"tokenizer_sha256": "0" * 64}, [SealedSlice("s0", 0, records, *hashes)])


def ours(folder: Path, workers: int, cache: Path | None) -> Iterator[Any]:
    from configs import build
    from data_pipeline.order import Order, Segment, Skips, Steps, choose_lanes
    from data_pipeline.stream import Corpora, Data, Stream

    source: dict[str, Any] = {"shards": str(folder), "shared_mount": cache is not None}
    settings: dict[str, Any] = {"seq_tokens": LENGTH, "sources": {"benchmark": source}}
    if cache is not None:
        settings["cache"] = {"folder": str(cache), "gib": 1}
    data = build(Data, settings, "benchmark")
    corpora = Corpora(data)
    pools = corpora.pools({"benchmark": 1})
    lanes = choose_lanes([pool.blocks for pool in pools], ROWS)
    order = Order(1, pools, lanes, data.group_blocks, [Segment(0, {"benchmark": 1.0}, {"benchmark": 1})])
    reading = Stream(order, Steps([(0, ROWS)]), Skips(), corpora.shards(pools), data, ROWS)
    for batch in reading.batches(0, pools[0].blocks * pools[0].rows // ROWS):
        yield batch.tokens.reshape(ROWS, LENGTH + 1)


def prepare_streaming(source: Path, folder: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"tokens": f"ndarray:uint16:{LENGTH + 1}"}) as writer:
        for row in rows(source):
            writer.write({"tokens": row})


def streaming(folder: Path, workers: int, cache: Path | None) -> Iterator[Any]:
    import torch
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    class Tokens(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: int) -> Any:
            return torch.from_numpy(super().__getitem__(index)["tokens"].astype(np.int64))

    clean_stale_shared_memory()
    where = {"local": str(folder)} if cache is None else {"remote": str(folder), "local": str(cache)}
    dataset = Tokens(**where, shuffle=True, batch_size=ROWS, num_canonical_nodes=1)
    yield from DataLoader(dataset, batch_size=ROWS, num_workers=workers, drop_last=True)


def prepare_litdata(source: Path, folder: Path) -> None:
    import torch
    from litdata import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_size=(LENGTH + 1) * 8192, item_loader=TokensLoader(LENGTH + 1))
    for number, ids in enumerate(documents(source)):
        writer[number] = torch.from_numpy(np.append(ids, np.uint16(END)))
    writer.done()
    writer.merge(1)


def litdata(folder: Path, workers: int, cache: Path | None) -> Iterator[Any]:
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    loader = TokensLoader(block_size=LENGTH + 1)
    where = {"input_dir": str(folder)} if cache is None else {"input_dir": f"local:{folder}", "cache_dir": str(cache)}
    dataset = StreamingDataset(**where, item_loader=loader, shuffle=True, drop_last=True)
    for batch in StreamingDataLoader(dataset, batch_size=ROWS, num_workers=workers, drop_last=True):
        yield batch.long()


def write_tars(source: Path, folder: Path) -> None:
    """A sequence a member, 8,192 a shard."""
    import webdataset

    folder.mkdir(parents=True, exist_ok=True)
    for shard, part in enumerate(_batched(source)):
        with webdataset.TarWriter(str(folder / f"shard-{shard:06d}.tar")) as tar:
            for number, row in enumerate(part):
                tar.write({"__key__": f"{shard:06d}{number:06d}", "npy": row})


def _batched(source: Path) -> Iterator[list[Any]]:
    each = rows(source)
    while batch := list(itertools.islice(each, 8192)):
        yield batch


def _tars(folder: Path, pattern: str) -> list[str]:
    return sorted(str(path) for path in folder.rglob(pattern))


def webdataset(folder: Path, workers: int, cache: Path | None) -> Iterator[Any]:
    """A sequence a member, as DCLM's shards have them."""
    import webdataset as wds

    data = wds.WebDataset(_tars(folder, "*.tar"), shardshuffle=100, seed=1).shuffle(1000).decode().to_tuple("npy")
    data = data.batched(ROWS, partial=False).map(lambda batch: torch_long(batch[0]))
    yield from wds.WebLoader(data, batch_size=None, num_workers=workers)


def torch_long(batch: Any) -> Any:
    """An int64 tensor of an array, or of rows."""
    import torch

    return torch.from_numpy(np.asarray(batch).astype(np.int64))


def blocks(folder: Path, workers: int, cache: Path | None) -> Iterator[Any]:
    """webdataset over our own tars: blocks cut into sequences, which go through the buffer."""
    import webdataset as wds

    def cut(samples: Any) -> Iterator[Any]:
        for sample in samples:
            ids = sample["tokens.npy"]
            for begin in range(0, BLOCK, LENGTH):
                yield ids[begin : begin + LENGTH + 1]

    data = wds.WebDataset(_tars(folder, "train-*.tar"), shardshuffle=100, seed=1).decode()
    data = data.compose(lambda samples: cut(s for s in samples if "tokens.npy" in s)).shuffle(1000)
    data = data.batched(ROWS, collation_fn=torch_long, partial=False)
    yield from wds.WebLoader(data, batch_size=None, num_workers=workers)


def prepare_energon(source: Path, folder: Path) -> None:
    write_tars(source, folder)
    command = [
        str(Path(sys.executable).parent / "energon"),
        "prepare",
        "--non-interactive",
        "--split-ratio",
        "1,0,0",
        "--sample-type",
        "CrudeWebdataset",
    ]
    subprocess.run([*command, "--no-progress", str(folder)], check=True, stdout=sys.stderr)


def energon(folder: Path, workers: int, cache: Path | None) -> Iterator[Any]:
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        SampleDecoder,
        WorkerConfig,
        basic_sample_keys,
        get_loader,
        get_train_dataset,
        stateless,
    )

    @stateless  # type: ignore[untyped-decorator]
    def cook(sample: dict[str, Any]) -> dict[str, Any]:
        return {**basic_sample_keys(sample), "tokens": np.asarray(sample["npy"])}

    class Encoder(DefaultTaskEncoder):  # type: ignore[misc]
        decoder = SampleDecoder()
        cookers = (Cooker(cook),)

        def batch(self, samples: list[Any]) -> Any:
            return torch_long([sample["tokens"] for sample in samples])

    config = WorkerConfig(rank=0, world_size=1, num_workers=workers)
    dataset = get_train_dataset(
        folder, worker_config=config, batch_size=ROWS, shuffle_buffer_size=1000, max_samples_per_sequence=100,
        task_encoder=Encoder(), repeat=True,
    )  # fmt: skip
    yield from get_loader(dataset)


def prepare_megatron(source: Path, folder: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(str(folder / "tokens.bin"), dtype=np.uint16)
    for ids in documents(source):
        document = torch.from_numpy(np.append(ids, np.uint16(END)))
        builder.add_document(document, [len(document)])
    builder.finalize(str(folder / "tokens.idx"))
    _megatron(folder, folder)  # which builds the indices that the first start of a run builds


class _Tokenizer:
    vocab_size, eod, pad, unique_identifiers = VOCABULARY, END, VOCABULARY, {"name": "benchmark"}


def _megatron(folder: Path, cache: Path) -> Any:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    samples = len(stream(folder.parent)) // LENGTH - ROWS
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=LENGTH, blend=([str(folder / "tokens")], None), split="1,0,0",
        path_to_cache=str(cache / "indices"), tokenizer=_Tokenizer(), reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    return BlendedMegatronDatasetBuilder(GPTDataset, [samples, None, None], lambda: True, config).build()[0]


def megatron(folder: Path, workers: int, cache: Path | None) -> Iterator[Any]:
    from torch.utils.data import DataLoader, SequentialSampler

    dataset = _megatron(folder, cache or folder)
    for batch in DataLoader(
        dataset, batch_size=ROWS, sampler=SequentialSampler(dataset), num_workers=workers, drop_last=True
    ):
        yield batch["tokens"]  # labels, loss mask and positions come with it


def prepare_grain(source: Path, folder: Path) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir(parents=True, exist_ok=True)
    for shard, part in enumerate(_batched(source)):
        writer = ArrayRecordWriter(str(folder / f"shard-{shard:06d}.array_record"), "group_size:1,uncompressed")
        for row in part:
            writer.write(row.tobytes())
        writer.close()


def grain(folder: Path, workers: int, cache: Path | None) -> Iterator[Any]:
    import grain.python as pygrain

    source = pygrain.ArrayRecordDataSource(_tars(folder, "*.array_record"))
    data = pygrain.MapDataset.source(source).shuffle(seed=1)
    data = data.map(lambda record: np.frombuffer(record, np.uint16)).batch(ROWS, drop_remainder=True)
    reading = data.map(lambda batch: batch.astype(np.int64)).to_iter_dataset(pygrain.ReadOptions())
    if workers:
        reading = reading.mp_prefetch(pygrain.MultiprocessingOptions(num_workers=workers))
    yield from reading


@dataclass(frozen=True)
class Side:
    batches: Callable[[Path, int, Path | None], Iterator[Any]]
    prepare: Callable[[Path, Path], None]
    package: str  # that gives the version
    reads_tars: bool
    resumes: bool  # exactly, at least on as many ranks and workers as before
    resume: str


SIDES = {
    "ours": Side(ours, prepare_ours, "", True, True, "exact on any ranks, at once"),
    "mosaicml-streaming": Side(
        streaming, prepare_streaming, "mosaicml-streaming", False, True,
        "exact where the batch divides among the ranks, work in proportion to samples",
    ),
    "litData": Side(
        litdata, prepare_litdata, "litdata", False, True, "exact on as many ranks, work in proportion to items"
    ),
    "Megatron GPTDataset": Side(
        megatron, prepare_megatron, "megatron-core", False, True, "exact on any ranks, once its indices are built"
    ),
    "Megatron-Energon": Side(
        energon, prepare_energon, "megatron-energon", True, True, "exact on as many ranks times workers"
    ),
    "webdataset": Side(webdataset, write_tars, "webdataset", True, False, "none"),
    "webdataset, our tars": Side(blocks, prepare_ours, "webdataset", True, False, "none"),
    "grain": Side(grain, prepare_grain, "grain", False, True, "exact on any ranks without mixture, packing or filter"),
}  # fmt: skip
FOLDERS = {"webdataset, our tars": "ours"}


# --- one process: a side read once ------------------------------------------------------------------------------------


def counters() -> dict[str, float]:
    """Of this process and the workers that have ended."""
    found = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    mine, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": time.perf_counter(),
        "cpu": mine.ru_utime + mine.ru_stime + children.ru_utime + children.ru_stime,
        "bytes": float(found["read_bytes"]),
        "requests": float(found["syscr"]) + mine.ru_majflt,
    }


def read_all(name: str, folder: Path, cold: bool) -> dict[str, float]:
    """One pass over the tokens, from the opening to the last batch; what is imported and compiled is so before."""
    limit = len(stream(folder.parent)) // LENGTH // ROWS - 2
    if cold:
        with copied(folder) as another:  # what a process has mapped cannot be dropped
            take_one(name, another)
        drop(folder)
    else:
        take_one(name, folder)
    begun, count, first_s = counters(), 0, 0.0
    for batch in itertools.islice(SIDES[name].batches(folder, 0, None), limit):
        assert str(batch.dtype).endswith("int64") and len(batch) == ROWS, (batch.dtype, batch.shape)
        first_s = first_s or time.perf_counter() - begun["seconds"]
        count += ROWS * LENGTH
    took = {key: value - begun[key] for key, value in counters().items()}
    return {
        "first_s": first_s,
        "wall": count / took["seconds"],
        "cpu": count / took["cpu"],
        "bytes": took["bytes"] / (2 * count),
        "requests": took["requests"] / took["seconds"],
        "tokens": count,
    }


def take_one(name: str, folder: Path) -> None:
    """A batch, which nobody needs."""
    batches = SIDES[name].batches(folder, 0, None)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    del batches
    gc.collect()


@contextlib.contextmanager
def copied(folder: Path) -> Iterator[Path]:
    """A copy of a folder, beside it."""
    place = Path(tempfile.mkdtemp(prefix="copy-", dir=folder.parent))
    try:
        yield shutil.copytree(folder, place, dirs_exist_ok=True)
    finally:
        shutil.rmtree(place)


class Late(Exception):
    """WAIT_S have passed."""


def wait(name: str, folder: Path, near: Path, cache: Path | None) -> dict[str, float]:
    """The wait of a consumer that takes a batch every STEP_S, after the first; what there is of it after WAIT_S.

    `near` has the same files; a batch of it imports and compiles what there is.
    """

    def stop(*_: object) -> None:
        raise Late

    take_one(name, near)
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(WAIT_S)
    workers = 0 if name == "ours" else 1
    first_s, waits = 0.0, []
    opened = begun = time.perf_counter()
    try:
        batches = SIDES[name].batches(folder, workers, cache)
        next(batches)
        first_s = time.perf_counter() - opened
        for _ in range(STEPS):
            time.sleep(STEP_S)
            begun = time.perf_counter()
            next(batches)
            waits.append(time.perf_counter() - begun)
    except Late:  # the batch that did not come has been waited for, too
        waits.append(time.perf_counter() - begun)
    signal.alarm(0)
    share = sum(waits) / (sum(waits) + len(waits) * STEP_S)
    return {"first_s": first_s, "share": share, "longest_s": max(waits), "steps": len(waits)}


def drop(folder: Path) -> None:
    """Nothing of a folder is left in the page cache."""
    os.sync()
    for path in filter(Path.is_file, folder.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def mount(folder: Path, place: Path, seconds: float) -> None:
    """Serve `folder` at `place`, every open and every read of a file `seconds` late; until it is unmounted."""
    import mfusepy

    class Late(mfusepy.Operations):  # type: ignore[misc]
        use_ns = True

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            found = os.lstat(f"{folder}{path}")
            keys = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid")
            return {key: getattr(found, key) for key in keys} | {"st_mtime": found.st_mtime_ns}

        def readdir(self, path: str, fh: int) -> list[str]:
            return [".", "..", *(each.name for each in Path(f"{folder}{path}").iterdir())]

        def open(self, path: str, flags: int) -> int:
            time.sleep(seconds)
            return os.open(f"{folder}{path}", os.O_RDONLY)

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            time.sleep(seconds)
            return os.pread(fh, size, offset)

        def release(self, path: str, fh: int) -> int:
            os.close(fh)
            return 0

    mfusepy.FUSE(Late(), str(place), foreground=True, ro=True, nothreads=False)


# --- the run ----------------------------------------------------------------------------------------------------------


class Run:
    """All sides in processes of their own."""

    def __init__(self, work: Path, peers: str) -> None:
        self.work, self.peers = work, peers

    def call(self, name: str, *words: str, core: int | None = None, folder: Path | None = None) -> Any:
        """The last line that a side's process printed, as JSON; CalledProcessError with its last words in stderr."""
        python = sys.executable if name == "ours" or (words[0] == "prepare" and name in FOLDERS) else self.peers
        where = folder or self.work / FOLDERS.get(name, name)
        command = [python, "-m", "benchmarks.loader", "--side", name, "--do", *words, "--folder", str(where)]
        environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
        if core is not None:
            command = ["taskset", "-c", str(core), *command]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
        return json.loads(done.stdout.splitlines()[-1])

    @contextlib.contextmanager
    def late(self, folder: Path, seconds: float) -> Iterator[Path]:
        """A slow mount of a folder."""
        place = Path(tempfile.mkdtemp(prefix="late-", dir=self.work))
        command = [self.peers, "-m", "benchmarks.loader", "--side", "ours", "--do", "mount", str(place)]
        command += [str(seconds), "--folder", str(folder)]
        server = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": ROOT}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            deadline = time.monotonic() + 20
            while not os.path.ismount(place):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("no FUSE: mfusepy or libfuse2 is missing")
                time.sleep(0.1)
            yield place
        finally:
            subprocess.run(["umount", "-l", str(place)], check=False, stderr=subprocess.DEVNULL)
            server.terminate()
            server.wait()
            place.rmdir()


def last_words(error: Exception) -> str:
    said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    return (said or str(error)).strip().splitlines()[-1][:160]


def version(run: Run, package: str) -> str:
    if not package:
        return "this"
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([run.peers, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def write_stream(folder: Path, tokens: int) -> None:
    """Zipf-like ids in documents of 50 to 1,200."""
    rng = np.random.default_rng(1)
    ids = np.minimum(rng.zipf(1.2, tokens), END) - 1
    ends = np.cumsum(rng.integers(50, 1200, tokens // 500))
    ids[ends[ends < tokens - 1]] = END
    ids[-1] = END
    np.save(folder / "stream.npy", ids.astype(np.uint16))


def progress(*words: object) -> None:
    """A line to stderr, with the seconds since the start."""
    print(f"{time.perf_counter() - BEGUN:6.0f} s", *words, file=sys.stderr, flush=True)


def measure(run: Run, rounds: int, latency_s: float, parts: str, sides: list[str]) -> dict[str, dict[str, Any]]:
    """Everything of each side: versions, lists of figures by part, or why it is left out."""
    found: dict[str, dict[str, Any]] = {}
    for name in sides:
        try:
            found[name] = {"version": version(run, SIDES[name].package)}
            if not (run.work / FOLDERS.get(name, name)).exists():
                run.call(name, "prepare")
        except (subprocess.SubprocessError, OSError) as error:
            found[name] = {"missing": last_words(error)}
        progress(name, "prepared", found[name])
    here = [name for name in sides if "missing" not in found[name]]
    for number in range(rounds if "read" in parts else 0):
        for name in here:  # side by side in every round: what else the machine does meets all
            folder = run.work / FOLDERS.get(name, name)
            try:
                found[name].setdefault("cold", []).append(run.call(name, "read", "cold", core=1))
                found[name].setdefault("warm", []).append(run.call(name, "read", core=1))
            except subprocess.SubprocessError as error:
                found[name]["failed"] = last_words(error)
            progress(f"round {number + 1} of {rounds}:", name, found[name].get("warm", [found[name]])[-1])
    for name in here if "wait" in parts else []:
        folder = run.work / FOLDERS.get(name, name)
        for key, seconds in (("wait 0", 0.0), ("wait late", latency_s)):
            cache = tempfile.mkdtemp(prefix="cache-", dir=run.work)
            try:
                if seconds == 0:
                    found[name][key] = run.call(name, "wait", str(folder))
                else:
                    with run.late(folder, seconds) as place:
                        found[name][key] = run.call(name, "wait", str(folder), cache, folder=place)
            except (subprocess.SubprocessError, RuntimeError) as error:
                found[name][key] = {"failed": last_words(error)}
            shutil.rmtree(cache, ignore_errors=True)
            progress(name, key, found[name][key])
    return found


MEASURES: dict[str, Callable[[dict[str, Any]], float]] = {  # tokens per second of a side
    "per CPU second, warm": lambda side: statistics.median(each["cpu"] for each in side["warm"]),
    "by the clock, warm": lambda side: statistics.median(each["wall"] for each in side["warm"]),
    "by the clock, cold": lambda side: statistics.median(each["wall"] for each in side["cold"]),
}
PEERS: dict[str, Callable[[str, Side], bool]] = {
    "the best": lambda name, side: True,
    "the best of those that read tars or resume exactly": lambda name, side: side.reads_tars or side.resumes,
    "the same, each reading its own format": lambda name, side: name not in FOLDERS,
    "the best of those that read tars and resume exactly": lambda name, side: side.reads_tars and side.resumes,
}


def ratios(found: dict[str, dict[str, Any]]) -> list[str]:
    """Ours over the best of the peers, and of some of them: a table of those that were measured."""
    rates = {
        name: [rate(side) for rate in MEASURES.values()] for name, side in found.items() if {"warm", "cold"} <= {*side}
    }
    if not {"ours"} < {*rates}:
        return []
    lines = ["", "| ours over | " + " | ".join(MEASURES) + " |", "|---|" + "---:|" * len(MEASURES)]
    for which, counts in PEERS.items():
        peers = [name for name in rates if name != "ours" and counts(name, SIDES[name])]
        cells = []
        for i in range(len(MEASURES) if peers else 0):
            best = max(peers, key=lambda name: rates[name][i])
            cells.append(f"{rates['ours'][i] / rates[best][i]:.2f} ({best})")
        lines.append(f"| {which} | " + " | ".join(cells or ["none measured"] * len(MEASURES)) + " |")
    return lines


def rates_table(found: dict[str, dict[str, Any]]) -> list[str]:
    """What each side reads a second, and how."""
    lines = [
        "| side | version | reads tars | resume | M tokens per CPU second, warm | by the clock | ours is, per CPU "
        "second | cold, by the clock | bytes read per useful byte, cold | read calls per second, cold "
        "| first batch s, warm |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    per_cpu, clock, cold_clock = MEASURES.values()
    for name, side in found.items():
        if not {"warm", "cold"} <= {*side}:
            continue
        mine = f"{per_cpu(found['ours']) / per_cpu(side):.1f}x" if "warm" in found.get("ours", {}) else ""
        first_s = statistics.median(each["first_s"] for each in side["warm"])
        cold = {key: statistics.median(each[key] for each in side["cold"]) for key in ("bytes", "requests")}
        lines.append(
            f"| {name} | {side['version']} | {'yes' if SIDES[name].reads_tars else 'no'} | {SIDES[name].resume} "
            f"| {per_cpu(side) / 1e6:.1f} | {clock(side) / 1e6:.1f} | {mine} | {cold_clock(side) / 1e6:.1f} "
            f"| {cold['bytes']:.2f} | {cold['requests']:,.0f} | {first_s:.2f} |"
        )
    return lines


def waits_table(found: dict[str, dict[str, Any]], latency_s: float) -> list[str]:
    """The share of time that training waits."""
    lines = [
        "",
        "| side | storage | share of time waited | longest s | batches | first batch s | waited in all, with it, s |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, side in found.items():
        for key, storage in (("wait 0", "at once"), ("wait late", f"{1e3 * latency_s:.0f} ms")):
            if key not in side:
                continue
            it = side[key]
            cells = ["failed: " + it["failed"], "", "", "", ""] if "failed" in it else [
                f"{it['share']:.2%}", f"{it['longest_s']:.2f}", f"{it['steps']}",
                f"{it['first_s']:.1f}" if it["first_s"] else f"none in {WAIT_S}",
                f"{it['first_s'] + it['steps'] * STEP_S * it['share'] / (1 - it['share']):.1f}"]  # fmt: skip
            lines.append(f"| {name} | {storage} | " + " | ".join(cells) + " |")
    return lines


def table(found: dict[str, dict[str, Any]], latency_s: float) -> str:
    """Markdown."""
    lines = []
    if any("warm" in side for side in found.values()):
        lines += rates_table(found) + ratios(found)
    if any("wait 0" in side for side in found.values()):
        lines += waits_table(found, latency_s)
    out = [f"- {name}: {side.get('missing') or side.get('failed')}" for name, side in found.items()
           if "missing" in side or "failed" in side]  # fmt: skip
    return "\n".join([*lines, *(["", "Left out or failed:", ""] if out else []), *out]) + "\n"


def do(arguments: argparse.Namespace) -> None:
    """What a side's process is asked for."""
    (what, *rest), name, folder = arguments.do, arguments.side, arguments.folder
    with contextlib.redirect_stdout(sys.stderr):
        found: Any = None
        if what == "prepare":
            folder.mkdir(parents=True, exist_ok=True)
            SIDES[name].prepare(folder.parent, folder)
        elif what == "read":
            found = read_all(name, folder, rest == ["cold"])
        elif what == "wait":
            near, *cache = map(Path, rest)
            found = wait(name, folder, near, cache[0] if cache else None)
        elif what == "mount":
            mount(folder, Path(rest[0]), float(rest[1]))
    print(json.dumps(found), flush=True)
    os._exit(0)  # some leave threads that do not end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=sys.executable)
    parser.add_argument("--tokens", type=int, default=2**26)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency-ms", type=float, default=50.0)
    parser.add_argument("--parts", default="read,wait", help="with --work, what was found before stays")
    parser.add_argument("--sides", nargs="*", default=list(SIDES))
    parser.add_argument("--work", type=Path, help="a folder that is kept, with what was prepared")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--do", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        do(arguments)
    if "wait" in arguments.parts and arguments.tokens < (least := 2 * STEPS * ROWS * LENGTH):
        parser.error(f"--tokens: the waits need at least {least:,}")
    with contextlib.ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loader-")))
        work.mkdir(parents=True, exist_ok=True)
        if not (work / "stream.npy").exists():
            write_stream(work, arguments.tokens)
        latency_s = arguments.latency_ms / 1e3
        kept = work / "found.json"
        before = json.loads(kept.read_text()) if kept.exists() else {}
        found = measure(Run(work, arguments.peers), arguments.rounds, latency_s, arguments.parts, arguments.sides)
        found = {name: before.get(name, {}) | side for name, side in found.items()}
        kept.write_text(json.dumps(found, indent=1))
        tokens = len(stream(work))
    cores, today = os.cpu_count(), datetime.date.today()
    peers = Run(Path(), arguments.peers)
    text = (
        f"# Loaders: {tokens:,} tokens, sequences of {LENGTH:,}, batches of {ROWS}\n\n"
        f"`python -m benchmarks.loader`, {today}, {cores} cores, Python {platform.python_version()}, numpy "
        f"{importlib.metadata.version('numpy')} (ours), {version(peers, 'numpy')} (peers), torch "
        f"{version(peers, 'torch')} (peers); one process at a time, on one core in the first table; medians of "
        f"{arguments.rounds} rounds. Opening is part of a pass. Ours checks every block's hash and "
        f"hashes every sample for the digest; no other side checks anything.\n\n{table(found, latency_s)}"
    )
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"loader_CPU-{cores}-cores_{today}.md").write_text(text)


if __name__ == "__main__":
    main()
