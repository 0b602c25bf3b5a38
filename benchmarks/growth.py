"""Seconds and memory of `data-prep run` as its input grows: text, WARC and a Wikipedia dump, one worker.

    python -m benchmarks.growth [--full] [--tokenizer FILE --text FOLDER --warc FILES --wikipedia DUMP]

Real files are repeated (records and pages under new ids) to 10, 30 and 100 MB of content, with `--full` also to 300 MB
and 1 GB. Memory is the peak of the largest process (`ru_maxrss`), which is the worker; seconds are CPU time of all
processes, less those of a run on one line. The exponent is fitted by least squares on logarithms: 1 is linear. Writes a
table and a plot (matplotlib, in the extra `bench`).
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.extraction import DATA, DUMP, ONE_THREAD, TOKENIZER, WARCS, prepare, records, write_dump, write_warc

SIZES = (10, 30, 100)  # MB of content: text, HTML, XML
MORE_SIZES = (300, 1000)
KINDS = ("text", "WARC", "Wikipedia")
LINE_CHARS = 4000
LIMIT_MB = 1024  # of memory, per worker


@dataclass(frozen=True)
class Run:
    kind: str
    megabytes: float  # of content
    seconds: float  # of CPU
    memory: float  # MB, of the largest process


def measure(command: list[str]) -> tuple[float, float]:
    """(CPU seconds of a command and its children, peak MB of the largest)."""
    with tempfile.TemporaryFile() as words:
        process = subprocess.Popen(command, env={**os.environ, **ONE_THREAD}, stdout=words, stderr=words)
        _, status, usage = os.wait4(process.pid, 0)
        if status != 0:
            words.seek(0)
            raise SystemExit(f"{' '.join(command)}: status {status}: {words.read()[-2000:].decode(errors='replace')}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def write_lines(path: Path, folder: Path, size: int) -> int:
    """JSON lines of the folder's texts, over and over, up to `size` bytes of text."""
    done = 0
    with path.open("w", encoding="utf-8") as file:
        for number, book in enumerate(itertools.cycle(sorted(folder.rglob("*.txt")))):
            text = book.read_text(encoding="utf-8", errors="replace")
            for begin in range(0, len(text), LINE_CHARS):
                piece = text[begin : begin + LINE_CHARS]
                file.write(json.dumps({"id": f"{number}-{begin}", "text": piece}, ensure_ascii=False) + "\n")
                done += len(piece.encode())
                if done >= size:
                    return done
    raise SystemExit(f"{folder}: no .txt file below it")


def kinds(options: argparse.Namespace, work: Path) -> dict[str, Callable[[int], tuple[dict[str, Any], int]]]:
    """For each kind of input that is asked for: from a size to a source and the bytes of its content."""

    def text(size: int) -> tuple[dict[str, Any], int]:
        path = work / "text.jsonl"
        return {"kind": "text_files", "paths": [str(path)], "id_field": "id"}, write_lines(path, options.text, size)

    def warc(size: int) -> tuple[dict[str, Any], int]:
        path, pages = work / "pages.warc.gz", records(options.warc)
        count = max(1, round(size / (sum(map(len, pages)) / len(pages))))
        write_warc(path, pages, count)
        done = sum(len(page) for page, _ in zip(itertools.cycle(pages), range(count), strict=False))
        return {"kind": "common_crawl", "paths": [str(path)]}, done

    def wikipedia(size: int) -> tuple[dict[str, Any], int]:
        path = work / "dump.xml.bz2"
        return {"kind": "wikipedia", "paths": [str(path)]}, write_dump(path, options.wikipedia, size)

    writers = {"text": text, "WARC": warc, "Wikipedia": wikipedia}
    return {kind: writers[kind] for kind in options.kinds}


def grow(options: argparse.Namespace, sizes: list[int]) -> list[Run]:
    runs = []
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".benchmark-") as folder:
        work = Path(folder)
        line = work / "line.jsonl"
        line.write_text('{"text": "One line."}\n')
        source = {"kind": "text_files", "paths": [str(line)]}
        start, _ = measure(prepare(source, options.tokenizer, work / "start"))
        for kind, write in kinds(options, work).items():
            for size in sizes:
                source, content = write(size * 10**6)
                seconds, memory = measure(prepare(source, options.tokenizer, work / "out", slice_bytes=256 * 2**20))
                runs.append(Run(kind, content / 1e6, seconds - start, memory))
                print(f"{kind} {content / 1e6:.0f} MB: {seconds - start:.1f} s of CPU, {memory:.0f} MB", flush=True)
    return runs


def exponent(runs: list[Run]) -> float:
    """Of seconds over bytes: the slope of the line through their logarithms."""
    slope, _ = np.polyfit(np.log([run.megabytes for run in runs]), np.log([run.seconds for run in runs]), 1)
    return float(slope)


def by_kind(runs: list[Run]) -> dict[str, list[Run]]:
    return {kind: list(mine) for kind, mine in itertools.groupby(runs, key=lambda run: run.kind)}


def table(runs: list[Run]) -> str:
    lines = [
        "| input | MB of content | CPU s | MB per CPU second | peak MB of the largest process |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        rate = run.megabytes / run.seconds
        lines.append(f"| {run.kind} | {run.megabytes:.0f} | {run.seconds:.1f} | {rate:.1f} | {run.memory:.0f} |")
    lines.append("")
    for kind, mine in by_kind(runs).items():
        peak = max(run.memory for run in mine)
        under = "under" if peak < LIMIT_MB else "ABOVE"
        lines.append(f"- {kind}: seconds grow as bytes^{exponent(mine):.2f}; peak {peak:.0f} MB, {under} 1 GiB")
    return "\n".join(lines)


def plot(runs: list[Run], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for kind, mine in by_kind(runs).items():
        sizes = [run.megabytes for run in mine]
        left.loglog(sizes, [run.seconds for run in mine], "o-", label=f"{kind}: exponent {exponent(mine):.2f}")
        right.semilogx(sizes, [run.memory for run in mine], "o-", label=kind)
    right.axhline(LIMIT_MB, color="black", linestyle="--", linewidth=1, label="1 GiB")
    right.set_ylim(0, None)
    left.set(title="CPU time", xlabel="MB of content", ylabel="seconds")
    right.set(title="Peak memory of the largest process", xlabel="MB of content", ylabel="MB")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds and memory of data-prep as its input grows.")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="a tokenizer.json, such as GPT-2's")
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=KINDS)
    parser.add_argument("--text", type=Path, default=DATA / "books", help="a folder of .txt files")
    parser.add_argument("--warc", type=Path, nargs="+", default=WARCS, help="packed WARC files with real pages")
    parser.add_argument("--wikipedia", type=Path, default=DUMP, help="a real dump, .xml.bz2")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="MB of content, two or more")
    parser.add_argument("--full", action="store_true", help="also 300 MB and 1 GB")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    options.tokenizer = options.tokenizer.resolve()
    load = os.getloadavg()[0]
    runs = grow(options, [*options.sizes, *(MORE_SIZES if options.full else ())])
    hardware, today = f"CPU-{os.cpu_count()}-cores", datetime.date.today()
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"growth_{hardware}_{today}"
    plot(runs, options.out / f"{name}.png")
    head = [
        f"# Cost over input, {hardware}, {today}",
        f"`python -m benchmarks.growth{' --full' if options.full else ''}`, {platform.machine()}, load average before "
        f"the run {load:.1f}.",
    ]
    path = options.out / f"{name}.md"
    path.write_text("\n\n".join([*head, table(runs), f"![growth]({name}.png)"]) + "\n")
    print(path.read_text(), path, sep="\n")


if __name__ == "__main__":
    main()
