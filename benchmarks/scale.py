"""Seconds and peak memory of a preparation of many inputs, and of a corpus of many shards.

    python -m benchmarks.scale [--out benchmarks] [--inputs 100000] [--shards 1000000]

Inputs are small files on disk, each a slice of its own: the plan, the plan once more, the plan of the same files given
as a list, then `run` where all slices but their manifest are made (one is really made, the others are copies of its
record), and `run` where nothing is left to do. Shards are records in memory: their manifest is sealed, then opened.
Each step is a process of its own, so that its peak memory is its own; the time is that of the step without imports.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import configs

FILES_PER_FOLDER = 1000
SLICES_OF_SHARDS = 10  # shards per slice
STEPS = {
    "plan": "inputs: plan",
    "plan-again": "inputs: plan, again",
    "plan-list": "inputs: plan, given as a list",
    "run-seal": "slices made: data-prep run, which seals",
    "run-again": "slices made and sealed: data-prep run",
    "status": "slices made and sealed: how far it is",
    "seal": "shards: seal",
    "open": "shards: open the manifest",
}


def write_inputs(folder: Path, count: int) -> None:
    """The input files, a list of them, two configs, and a tokenizer trained on a few of them."""
    names = []
    for first in range(0, count, FILES_PER_FOLDER):
        below = folder / f"texts/{first // FILES_PER_FOLDER:04d}"
        below.mkdir(parents=True)
        for i in range(first, min(first + FILES_PER_FOLDER, count)):
            (below / f"{i:07d}.txt").write_text(f"This is text number {i}, as short as the others.\n")
            names.append(f"{below.name}/{i:07d}.txt\n")
    (folder / "texts/all.paths").write_text("".join(names))
    from data_pipeline.tokenizer import train

    train((f"This is text number {i}, as short as the others." for i in range(1000)), 280, folder / "tokenizer.json")
    for name, paths in (("texts", "texts"), ("list", "texts/all.paths")):
        (folder / f"{name}.yaml").write_text(
            f"name: scale\nout: out-{name}\ntokenizer: {{kind: file, path: tokenizer.json}}\n"
            f"corpora: {{texts: {{kind: text_files, paths: [{paths}]}}}}\nslice_bytes: 60\n"
        )


def copy_slices(folder: Path) -> None:
    """Make the first slice, and give every other slice its record, as if it had been made."""
    from data_pipeline.jobs import planned_jobs
    from data_pipeline.preparation import Preparation
    from data_pipeline.shards import RECORD
    from data_pipeline.slices import make_slice
    from data_pipeline.tokenizer import Tokenizer

    [job] = planned_jobs(configs.load(Preparation, folder / "texts.yaml"))
    first, *others = job.plan.slices
    make_slice(job, first, Tokenizer.load(job.tokenizer), lambda *_: None)
    made = job.record(first)
    assert made is not None
    for slice in others:
        copy = job.folder_of(slice)
        copy.mkdir()
        for path in job.folder_of(first).iterdir():
            if path.name != RECORD and path.suffix != ".tar":  # which nothing here reads
                (copy / path.name).write_bytes(path.read_bytes())
        record = made | {"slice": slice.name, "identity": slice.identity(job.plan)}
        (copy / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def sealed_slices(count: int) -> list[object]:
    """Records of `count` shards."""
    from data_pipeline.shards import SealedSlice, ShardRecord

    hashes = f"{0:032x}"
    record = ShardRecord("train-00000", "train", 250, 0, 250 * 2**16, 9000, 2**25, hashes, hashes, hashes)
    found: list[object] = []
    for number in range(count // SLICES_OF_SHARDS):
        shards = [
            replace(record, name=f"train-{i:05d}", hash=f"{number * SLICES_OF_SHARDS + i:032x}")
            for i in range(SLICES_OF_SHARDS)
        ]
        found.append(SealedSlice(f"0-{number:05d}", 0, shards, f"{number:032x}", f"{number:032x}"))
    return found


def step(name: str, shards: int) -> Callable[[], object]:
    """What is timed."""
    from data_pipeline import prepare
    from data_pipeline.jobs import make_jobs
    from data_pipeline.preparation import Preparation
    from data_pipeline.shards import Format, Manifest, seal
    from data_pipeline.standing import standing

    config = Path("list.yaml" if name == "plan-list" else "texts.yaml")
    preparation = configs.load(Preparation, config)
    if name.startswith("plan"):
        return lambda: make_jobs(preparation)
    if name.startswith("run"):
        return lambda: prepare.run(preparation)
    if name == "status":
        return lambda: standing(preparation, "texts")
    if name == "open":
        return lambda: Manifest.open(Path())
    slices = sealed_slices(shards)
    return lambda: seal(Path(), Format(2**16, 50257, 50256), {"corpus": "shards", "files": {}}, slices)  # type: ignore[arg-type]


def measure(name: str, folder: Path, shards: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.scale", "--step", name, "--shards", str(shards)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_step(name: str, shards: int) -> None:
    timed = step(name, shards)
    begun, used = time.perf_counter(), time.process_time()
    timed()
    seconds, cpu = time.perf_counter() - begun, time.process_time() - used
    status = Path("/proc/self/status").read_text()  # getrusage would give the peak of whoever started us
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_mib": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--step", choices=STEPS, help="one of them alone, in the current folder")
    arguments = parser.parse_args()
    if arguments.step:
        run_step(arguments.step, arguments.shards)
        return
    rows = []
    with tempfile.TemporaryDirectory(prefix="scale-") as name:
        folder = Path(name)
        write_inputs(folder, arguments.inputs)
        for each, title in STEPS.items():
            if each == "run-seal":
                here = Path.cwd()
                os.chdir(folder)
                copy_slices(folder)
                os.chdir(here)
            found = measure(each, folder, arguments.shards)
            rows.append(f"| {title} | {found['seconds']:.1f} | {found['cpu_seconds']:.1f} | {found['peak_mib']:,.0f} |")
            print(rows[-1], file=sys.stderr)
    cores, today = os.cpu_count(), datetime.date.today()
    text = (
        f"# {arguments.inputs:,} inputs, {arguments.shards:,} shards\n\n"
        f"`python -m benchmarks.scale`, {today}, {cores} cores, Python {platform.python_version()}.\n\n"
        "| step | seconds | of CPU | peak MiB |\n|---|---:|---:|---:|\n" + "\n".join(rows) + "\n"
    )
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"scale_CPU-{cores}-cores_{today}.md").write_text(text)


if __name__ == "__main__":
    main()
