"""Plain text to token shards: ours, datatrove's DocumentTokenizer, Megatron's preprocess_data; same files, one run.

    python -m benchmarks.tokenize [--text FOLDER] [--tokenizer tokenizer.json] [--megatron CHECKOUT] [--mb 100]

The text files of FOLDER (UTF-8) become JSON lines of 4,000 characters each, as often as it takes. Every side reads that
file and writes its own format, as a process of its own pinned to one core, with one thread. What counts is CPU time;
each side's start (the same command on a few documents) is taken off and shown. The ids of all sides are compared.
datatrove comes with the extra `bench`; Megatron-LM has no package for its tool: name a checkout of it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import shutil
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
import numpy.typing as npt
import yaml

from benchmarks.extraction import DATA, ONE_THREAD
from data_pipeline.shards import Manifest

DOCUMENT_CHARS = 4000
FEW = 20  # documents, to time a start


@dataclass(frozen=True)
class Side:
    """One way of tokenizing. `command` takes the JSON lines and the folder to write to."""

    name: str
    command: Callable[[Path, Path], list[str]]
    ids: Callable[[Path], npt.NDArray[Any]] | None  # all ids in order, documents closed by the mark


# --- the sides ------------------------------------------------------------------------------------------------------

CLEANED: dict[str, Any] = {"clean": {}, "filters": {"min_chars": 200}}
UNTOUCHED: dict[str, Any] = {"clean": {"tidy": False, "unicode": "as_is"}, "filters": {"min_chars": 0}}


def ours(name: str, tokenizer: Path, settings: dict[str, Any]) -> Side:
    def command(lines: Path, out: Path) -> list[str]:
        config = {
            "name": "benchmark",
            "out": str(out / "shards"),
            "tokenizer": {"kind": "file", "path": str(tokenizer)},
            "corpora": {"text": {"kind": "text_files", "paths": [str(lines)], "id_field": "id"}},
            "validation": {"fraction": 0},
            "slice_bytes": 2**40,
            **settings,
        }
        path = out / "data.yaml"
        path.write_text(yaml.safe_dump(config))
        return [sys.executable, "-m", "data_pipeline.cli", "run", str(path)]

    return Side(name, command, our_ids if settings is UNTOUCHED else None)


def our_ids(out: Path) -> npt.NDArray[Any]:
    shards = Manifest.open(out / "shards" / "text").shards("train", 0)
    blocks = [shards.read(block)[:-1] for block in range(shards.blocks)]
    return np.concatenate([*blocks, *(shards.member(shard, row) for shard, row in shards.tails())])


DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
lines, out, tokenizer = sys.argv[1:]
folder, _, name = lines.rpartition("/")
tokens = DocumentTokenizer(out + "/ds", tokenizer, eos_token="<|endoftext|>", shuffle_documents=False)
LocalPipelineExecutor([JsonlReader(folder, glob_pattern=name), tokens], logging_dir=out + "/logs").run()
"""


def datatrove(tokenizer: Path) -> Side:
    def command(lines: Path, out: Path) -> list[str]:
        return [sys.executable, "-c", DATATROVE, str(lines), str(out), str(tokenizer)]

    def ids(out: Path) -> npt.NDArray[Any]:
        (path,) = (out / "ds").glob("*.ds")
        return np.fromfile(path, "<u2")

    return Side("datatrove DocumentTokenizer", command, ids)


def megatron(checkout: Path, tokenizer: Path, folder: Path) -> Side:
    import transformers

    fast: Any = transformers.PreTrainedTokenizerFast
    fast(tokenizer_file=str(tokenizer), eos_token="<|endoftext|>").save_pretrained(folder)

    def command(lines: Path, out: Path) -> list[str]:
        tool = [sys.executable, str(checkout / "tools/preprocess_data.py")]
        tool += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder), "--append-eod"]
        return [*tool, "--input", str(lines), "--output-prefix", str(out / "megatron"), "--workers", "1"]

    def ids(out: Path) -> npt.NDArray[Any]:
        (path,) = out.glob("megatron*.bin")
        return np.fromfile(path, "<u2")

    return Side("Megatron preprocess_data", command, ids)


# --- the measurement ------------------------------------------------------------------------------------------------


def documents(folder: Path, total: int) -> Iterator[str]:
    """Pieces of the folder's texts, over and over, up to about `total` bytes."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.rglob("*.txt"))]
    if not texts:
        raise SystemExit(f"{folder}: no .txt file below it")
    done = 0
    while True:
        for text in texts:
            for begin in range(0, len(text), DOCUMENT_CHARS):
                piece = text[begin : begin + DOCUMENT_CHARS]
                yield piece
                done += len(piece.encode())
                if done >= total:
                    return


def timed(command: list[str]) -> tuple[float, float]:
    """(CPU seconds, seconds) of a command and its children on one core."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    core = max(os.sched_getaffinity(0))
    done = subprocess.run(
        ["taskset", "-c", str(core), *command], env={**os.environ, **ONE_THREAD}, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command[:4])}: exit code {done.returncode}: {done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return cpu, time.perf_counter() - begun


def measure(side: Side, lines: Path, few: Path, work: Path) -> tuple[float, float, float]:
    """(CPU seconds of the start, of the whole, seconds of the whole); what the whole wrote stays in `work`."""
    for path in (work / "few", work / "all"):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    start, _ = timed(side.command(few, work / "few"))
    whole, seconds = timed(side.command(lines, work / "all"))
    return start, whole, seconds


def encoders(tokenizer: Path, texts: list[str]) -> dict[str, float]:
    """MB of text per second of the bare encoders in this process, documents in batches as we have them."""
    from data_pipeline.tokenizer import Encoder, Tokenizer

    found: dict[str, float] = {}
    loaded = Tokenizer.load(tokenizer)
    names: tuple[Encoder, ...] = ("gigatoken", "tokenizers")
    for name in names:
        loaded.use(name)
        mine = texts if name == "gigatoken" else texts[: max(1, len(texts) // 20)]
        loaded.encode_batch(mine[:100])
        begun = time.process_time()
        for i in range(0, len(mine), 1000):
            loaded.encode_batch(mine[i : i + 1000])
        found[name] = sum(len(text.encode()) for text in mine) / 1e6 / (time.process_time() - begun)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Plain text to token shards, per core.")
    parser.add_argument("--text", type=Path, default=DATA / "books", help="a folder of .txt files")
    parser.add_argument("--tokenizer", type=Path, default=DATA / "tokenizer/gpt2-tokenizer.json")
    parser.add_argument("--megatron", type=Path, help="a checkout of Megatron-LM")
    parser.add_argument("--mb", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".benchmark-") as name:
        text = table(options, Path(name))
    hardware = f"CPU-{os.cpu_count()}-cores"
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("tokenizers", "gigatoken", "datatrove"))
    head = [
        f"# Text to token shards per core, {hardware}, {datetime.date.today()}", "",
        f"`python -m benchmarks.tokenize --mb {options.mb} --rounds {options.rounds}`, {versions}, "
        f"{platform.machine()}, load average before the run {load:.1f}.", "",
    ]  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"tokenize_{hardware}_{datetime.date.today()}.md"
    path.write_text("\n".join([*head, text]) + "\n")
    print(f"{text}\n\n{path}")


def table(options: argparse.Namespace, work: Path) -> str:
    """Run every side `rounds` times in turn; a row for each."""
    tokenizer = options.tokenizer.resolve()
    texts = list(documents(options.text, options.mb * 10**6))
    lines, few = work / "lines.jsonl", work / "few.jsonl"
    for path, mine in ((lines, texts), (few, texts[:FEW])):
        with path.open("w", encoding="utf-8") as file:
            file.writelines(
                json.dumps({"id": str(i), "text": text}, ensure_ascii=False) + "\n" for i, text in enumerate(mine)
            )
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    sides = [
        ours("ours", tokenizer, UNTOUCHED),
        ours("ours, cleaned and filtered", tokenizer, CLEANED),
        datatrove(tokenizer),
    ]
    if options.megatron is not None:
        sides.append(megatron(options.megatron.resolve(), tokenizer, work / "hf"))
    times: dict[str, list[tuple[float, float, float]]] = {side.name: [] for side in sides}
    for _ in range(options.rounds):
        for side in sides:
            times[side.name].append(measure(side, lines, few, work / side.name.replace(" ", "-")))
    right = {side.name: side.ids(work / side.name.replace(" ", "-") / "all") for side in sides if side.ids}
    rates = {name: [megabytes / (whole - start) for start, whole, _ in mine] for name, mine in times.items()}
    best = statistics.median(rates["ours"])
    out = [
        f"{megabytes:.0f} MB of text in {len(texts):,} documents, {len(right['ours']):,} tokens; medians of "
        f"{options.rounds} rounds. Bare encoders, one thread: "
        + ", ".join(f"{name} {speed:.1f} MB/s" for name, speed in encoders(tokenizer, texts).items()) + ".",
        "",
        "| way | MB of text per CPU second (min-max) | ours is faster by | start, CPU s | whole, s | ids |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, rate in rates.items():
        middle, start = statistics.median(rate), statistics.median(s for s, _, _ in times[name])
        same = "" if name not in right else "equal" if np.array_equal(right[name], right["ours"]) else "DIFFERENT"
        out.append(
            f"| {name} | {middle:.1f} ({min(rate):.1f}-{max(rate):.1f}) | {best / middle:.1f}x | {start:.1f} "
            f"| {statistics.median(s for _, _, s in times[name]):.1f} | {same} |"
        )
    return "\n".join(out)


if __name__ == "__main__":
    main()
