"""WARC to token shards against datatrove's WarcReader, Trafilatura and DocumentTokenizer; and Wikipedia's rate.

    python -m benchmarks.extraction --peer /tmp/peer/bin/python [--tokenizer FILE --warc FILES --wikipedia DUMP]

The peer lives in an environment of its own, since datatrove wants an old trafilatura (and libmagic must be there):

    python -m venv /tmp/peer
    /tmp/peer/bin/pip install datatrove==0.10.1 'trafilatura<1.12' lxml_html_clean warcio faust-cchardet python-magic \
        tokenizers orjson

The pages of the WARC files are repeated under new record ids, up to `--pages`; both sides read that one file and write
token shards, each as a process pinned to one core, with one thread. What counts is CPU time; each side's start (the
same command on the distinct pages alone) is taken off. Trafilatura's own removal of repeated paragraphs is off, as it
would empty the repetitions. The texts of the distinct pages are kept side by side in the results.

The dump's pages are repeated under new ids up to `--mb` of XML in one bzip2 stream, which one and two workers read.
"""

from __future__ import annotations

import argparse
import bz2
import datetime
import gzip
import importlib.metadata
import itertools
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.document import Document
from data_pipeline.shards import Manifest
from data_pipeline.sources.common_crawl import CommonCrawl
from data_pipeline.sources.inputs import Part, Reading, describe
from data_pipeline.sources.wikipedia import Wikipedia

DATA = Path(__file__).parents[1] / "../shared/data"  # the real inputs that tests use as well
TOKENIZER = DATA / "tokenizer/gpt2-tokenizer.json"
WARCS = [DATA / "common_crawl" / name for name in ("CC-MAIN-2020-34-sample.warc.gz", "site-pages-wget.warc.gz")]
DUMP = DATA / "wikipedia/enwiki-pages-articles-excerpt.xml.bz2"
ONE_THREAD = {
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}
SLICES = 4  # of the dump; each reads its head and the rest of its last page, two blocks more
SHOWN = 8  # pages whose texts are shown
SHOWN_CHARS = 700  # of the beginning, and as many of the end

PEER_TOKENS = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.extractors import Trafilatura
from datatrove.pipeline.readers import WarcReader
from datatrove.pipeline.tokens import DocumentTokenizer
warc, out, tokenizer = sys.argv[1:]
folder, _, name = warc.rpartition("/")
tokens = DocumentTokenizer(out + "/ds", tokenizer, eos_token="<|endoftext|>", shuffle_documents=False)
extract = Trafilatura(timeout=10, deduplicate=False)
LocalPipelineExecutor([WarcReader(folder, glob_pattern=name), extract, tokens], logging_dir=out + "/logs").run()
"""
PEER_TEXTS = """
import json, sys
from datatrove.pipeline.extractors import Trafilatura
from datatrove.pipeline.readers import WarcReader
folder, _, name = sys.argv[1].rpartition("/")
pages = WarcReader(folder, glob_pattern=name)()
texts = {d.id: d.text for d in Trafilatura(timeout=10, deduplicate=False)(pages)}
print("TEXTS " + json.dumps(texts))
"""


@dataclass(frozen=True)
class Cost:
    """Of a command and its children."""

    cpu: float  # seconds
    wall: float  # seconds


def cost(command: Sequence[str], pinned: bool) -> Cost:
    """Run a command, with one thread for each process; SystemExit with its words when it fails."""
    pin = ["taskset", "-c", str(max(os.sched_getaffinity(0)))] if pinned else []
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([*pin, *command], env={**os.environ, **ONE_THREAD}, capture_output=True, text=True)
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        raise SystemExit(f"{command[0]}: exit code {done.returncode}: {done.stderr[-2000:]}")
    return Cost(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, wall)


def prepare(
    source: dict[str, Any], tokenizer: Path, out: Path, workers: int = 1, slice_bytes: int = 2**40
) -> list[str]:
    """The command that makes token shards below `out`, cleaned as by default and not filtered."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    config = {
        "name": "benchmark",
        "out": str(out / "shards"),
        "tokenizer": {"kind": "file", "path": str(tokenizer)},
        "corpora": {"corpus": source},
        "filters": {"min_chars": 0},
        "validation": {"fraction": 0},
        "slice_bytes": slice_bytes,
        "workers": workers,
    }
    (out / "data.yaml").write_text(yaml.safe_dump(config))
    return [sys.executable, "-m", "data_pipeline.cli", "run", str(out / "data.yaml")]


def tokens_of(out: Path) -> int:
    tokens: dict[str, int] = Manifest.open(out / "shards" / "corpus").head["counts"]["tokens"]
    return sum(tokens.values())


def documents(source: Any, path: Path) -> Iterator[Document]:
    with Reading(Part(describe(str(path))), "corpus") as reading:
        yield from source.read(reading)


# --- Common Crawl ---------------------------------------------------------------------------------------------------


def records(paths: Sequence[Path]) -> list[bytes]:
    """The answers of WARC files that hold HTML, unpacked."""
    found = []
    for path in paths:
        names = {document.id for document in documents(CommonCrawl(paths=[str(path)]), path)}
        data = gzip.decompress(path.read_bytes())
        for record in re.split(rb"(?<=\r\n\r\n)(?=WARC/1\.\d\r\n)", data):
            identifier = re.search(rb"WARC-Record-ID: *<([^>]+)>", record[:4096])
            if identifier is not None and identifier[1].decode() in names:
                found.append(record)
    return found


def write_warc(path: Path, pages: Sequence[bytes], count: int) -> None:
    """`count` records, each a gzip member with an id of its own but for the first round's."""
    with path.open("wb") as file:
        for number, page in zip(range(count), itertools.cycle(pages), strict=False):
            name = f"urn:uuid:{uuid.UUID(int=number)}".encode()
            new = re.sub(rb"(WARC-Record-ID: *<)[^>]+", rb"\g<1>" + name, page, count=1)
            file.write(gzip.compress(page if number < len(pages) else new, mtime=0))


def common_crawl(options: argparse.Namespace, work: Path) -> str:
    pages = records(options.warc)
    few, many = work / "few.warc.gz", work / "many.warc.gz"
    write_warc(few, pages, len(pages))
    write_warc(many, pages, options.pages)
    count = options.pages - len(pages)
    rates: dict[str, list[float]] = {"longhaul": [], "datatrove": []}
    for _ in range(options.rounds):
        seconds: dict[str, dict[Path, float]] = {name: {} for name in rates}
        for path in (few, many):
            out = work / "ours"
            source = {"kind": "common_crawl", "paths": [str(path)]}
            seconds["longhaul"][path] = cost(prepare(source, options.tokenizer, out), True).cpu
            theirs = work / "theirs"
            shutil.rmtree(theirs, ignore_errors=True)
            command = [str(options.peer), "-c", PEER_TOKENS, str(path), str(theirs), str(options.tokenizer)]
            seconds["datatrove"][path] = cost(command, True).cpu
        for name, by_file in seconds.items():
            rates[name].append(count / (by_file[many] - by_file[few]))
    lines = [
        "## WARC to token shards",
        "",
        f"{len(pages)} real pages repeated to {options.pages} ({many.stat().st_size / 1e6:.0f} MB packed, "
        f"{sum(map(len, pages)) / len(pages) / 1e3:.0f} kB of HTML each), {options.rounds} rounds, one core.",
        "",
        "| way | pages per CPU second (min-max) | over datatrove |",
        "|---|---|---|",
    ]
    for name, mine in rates.items():
        middle = statistics.median(mine)
        over = f"{middle / statistics.median(rates['datatrove']):.1f}x"
        lines.append(f"| {name} | {middle:.0f} ({min(mine):.0f}-{max(mine):.0f}) | {over} |")
    return "\n".join([*lines, "", *side_by_side(options, few)])


def side_by_side(options: argparse.Namespace, warc: Path) -> list[str]:
    """The text that each side keeps of the distinct pages: sizes of all, the words of some."""
    done = subprocess.run([str(options.peer), "-c", PEER_TEXTS, str(warc)], capture_output=True, text=True, check=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("TEXTS "))
    theirs = {name.strip("<>"): text for name, text in json.loads(line.removeprefix("TEXTS ")).items()}
    ours = {document.id: document for document in documents(CommonCrawl(paths=[str(warc)]), warc)}
    lines = [
        f"Of {len(ours)} pages longhaul has text of {sum(bool(d.text.strip()) for d in ours.values())}, datatrove of "
        f"{sum(bool(text.strip()) for text in theirs.values())}; common words are counted by type.",
        "",
        "| page | longhaul, chars | datatrove, chars | words of datatrove's that longhaul has | and the other way |",
        "|---|---|---|---|---|",
    ]
    for name, document in ours.items():
        mine, other = document.text, theirs.get(name, "")
        lines.append(
            f"| {document.uri[:90].replace('|', '%7C')} | {len(mine):,} | {len(other):,} "
            f"| {shared(other, mine)} | {shared(mine, other)} |"
        )
    with_both = [document for name, document in ours.items() if theirs.get(name)]
    without = [document for name, document in ours.items() if not theirs.get(name) and document.text.strip()]
    step = max(1, len(with_both) // (SHOWN - 2))
    for document in [*with_both[::step][: SHOWN - 2], *without[:2]]:
        lines += ["", f"### {document.uri[:120]}"]
        for side, text in (("longhaul", document.text), ("datatrove", theirs.get(document.id, ""))):
            lines += ["", f"{side}, {len(text):,} characters:", "", "````", excerpt(text), "````"]
    return lines


def shared(words: str, among: str) -> str:
    mine, others = set(words.split()), set(among.split())
    return f"{len(mine & others) / len(mine):.0%}" if mine else "-"


def excerpt(text: str) -> str:
    text = text.strip()
    if len(text) <= 2 * SHOWN_CHARS:
        return text
    return f"{text[:SHOWN_CHARS]}\n[...]\n{text[-SHOWN_CHARS:]}"


# --- Wikipedia ------------------------------------------------------------------------------------------------------


def write_dump(path: Path, excerpt: Path, size: int) -> int:
    """One bzip2 stream of about `size` bytes of XML; its exact size."""
    xml = bz2.decompress(excerpt.read_bytes())
    begin, end = xml.index(b"<page>"), xml.rindex(b"</page>") + len(b"</page>")
    packer, done = bz2.BZ2Compressor(), 0
    with path.open("wb") as file:
        for number in range(max(1, size // (end - begin))):
            pages = re.sub(rb"(</ns>\s*<id>)(\d+)", rb"\g<1>%d\2" % (number + 1), xml[begin:end])
            data = pages + b"\n" if number else xml[:begin] + pages + b"\n"
            file.write(packer.compress(data))
            done += len(data)
        file.write(packer.compress(xml[end:]) + packer.flush())
    return done + len(xml) - end


def wikipedia(options: argparse.Namespace, work: Path) -> str:
    dump, few = work / "dump.xml.bz2", work / "few.xml.bz2"
    xml, little = write_dump(dump, options.wikipedia, options.mb * 10**6), write_dump(few, options.wikipedia, 1)
    megabytes = (xml - little) / 1e6
    costs: dict[int, list[tuple[float, float]]] = {1: [], 2: []}  # workers -> (CPU seconds, seconds) beyond the start
    tokens = set()
    for _ in range(options.rounds):
        for workers, mine in costs.items():
            out = work / "wiki"
            source = {"kind": "wikipedia", "paths": [str(few)]}
            start = cost(prepare(source, options.tokenizer, out, workers, few.stat().st_size // workers), False)
            source = {"kind": "wikipedia", "paths": [str(dump)]}
            whole = cost(prepare(source, options.tokenizer, out, workers, dump.stat().st_size // SLICES), False)
            mine.append((whole.cpu - start.cpu, whole.wall - start.wall))
            tokens.add(tokens_of(out))
    begun = time.process_time()
    texts = sum(len(document.text) for document in documents(Wikipedia(paths=[str(few)]), few))
    alone = little / 1e6 / (time.process_time() - begun)
    lines = [
        "## Wikipedia to token shards, one dump file",
        "",
        f"One bzip2 stream of {xml / 1e6:.0f} MB of XML ({dump.stat().st_size / 1e6:.0f} MB packed), {SLICES} slices, "
        f"{options.rounds} rounds; reading alone, from bzip2 to text: {alone:.1f} MB of XML per CPU second "
        f"({texts / 1e6:.1f} MB of text of {little / 1e6:.1f} MB).",
        "",
        "| workers | MB of XML per CPU second | MB of XML per second (best) | faster by (best) |",
        "|---|---|---|---|",
    ]
    base = min(wall for _, wall in costs[1])
    for workers, mine in costs.items():
        cpu, wall = statistics.median(cpu for cpu, _ in mine), min(wall for _, wall in mine)
        lines.append(f"| {workers} | {megabytes / cpu:.1f} | {megabytes / wall:.1f} | {base / wall:.2f}x |")
    lines += ["", f"{' and '.join(f'{count:,}' for count in tokens)} tokens with any number of workers."]
    return "\n".join(lines)


# --- both -----------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="Web pages and Wikipedia to token shards, per core.")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="a tokenizer.json, such as GPT-2's")
    parser.add_argument("--warc", type=Path, nargs="+", default=WARCS, help="packed WARC files with real pages")
    parser.add_argument("--peer", type=Path, help="python of the environment that has datatrove and trafilatura")
    parser.add_argument("--wikipedia", type=Path, default=DUMP, help="a real dump, .xml.bz2")
    parser.add_argument("--pages", type=int, default=1000)
    parser.add_argument("--mb", type=int, default=100, help="of XML")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    options.tokenizer = options.tokenizer.resolve()
    hardware = f"CPU-{os.cpu_count()}-cores"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("resiliparse", "fastwarc"))
    parts = [
        f"# Extraction, {hardware}, {datetime.date.today()}",
        f"`python -m benchmarks.extraction`, {versions}, {peer_versions(options.peer)}{platform.machine()}, load "
        f"average before the run {os.getloadavg()[0]:.1f}.",
    ]
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".benchmark-") as folder:
        if options.peer is not None:
            parts.append(common_crawl(options, Path(folder)))
        else:
            parts.append("WARC against datatrove: not run, --peer is not given (the script's first lines say how).")
        parts.append(wikipedia(options, Path(folder)))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"extraction_{hardware}_{datetime.date.today()}.md"
    path.write_text("\n\n".join(parts) + "\n")
    print(path.read_text(), path, sep="\n")


def peer_versions(peer: Path | None) -> str:
    if peer is None:
        return ""
    code = "import importlib.metadata as m; print(*(f'{n} {m.version(n)},' for n in ('datatrove', 'trafilatura')))"
    return subprocess.run([str(peer), "-c", code], capture_output=True, text=True, check=True).stdout.strip() + " "


if __name__ == "__main__":
    main()
