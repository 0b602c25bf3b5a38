"""How fast are JSON lines read into documents, of one process' CPU time? Ours against json.loads and orjson alone.

python -m benchmarks.json_lines        # makes 200 MB of documents of 4 kB each; a minute
"""

from __future__ import annotations

import hashlib
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import orjson

from data_pipeline.sources.inputs import Part, Reading, describe
from data_pipeline.sources.text_files import TextFiles

BYTES = 200 * 10**6
DOCUMENT_BYTES = 4000
ROUNDS = 5


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "documents.jsonl"
        write(path)
        ways: dict[str, Callable[[Path], None]] = {
            "longhaul: documents": documents,
            "of which sha256": sha256,
            "orjson, objects only": orjson_alone,
            "json, objects only": json_alone,
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                begun = time.process_time()
                way(path)
                rates[name].append(path.stat().st_size / 1e6 / (time.process_time() - begun))
        base = statistics.median(rates["json, objects only"])
        print(f"| way | MB/s of one core, median of {ROUNDS} | over json |\n|---|---|---|")
        for name in ways:
            rate = statistics.median(rates[name])
            print(f"| {name} | {rate:,.0f} | {rate / base:.1f} |")
        ours, hashed = (statistics.median(rates[name]) for name in ("longhaul: documents", "of which sha256"))
        print(f"\nwithout its sha256, longhaul reads {1 / (1 / ours - 1 / hashed):,.0f} MB/s")


def write(path: Path) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(5000)]
    with path.open("wb") as file:
        while file.tell() < BYTES:
            text = " ".join(rng.choices(words, k=DOCUMENT_BYTES // 6)).replace("aa", 'a"\n')
            file.write(orjson.dumps({"id": f"{file.tell()}", "text": text}) + b"\n")


def documents(path: Path) -> None:
    with Reading(Part(describe(str(path))), "c") as reading:
        for _ in TextFiles(paths=[str(path)]).read(reading):
            pass


def sha256(path: Path) -> None:
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")


def orjson_alone(path: Path) -> None:
    with path.open("rb") as file:
        for line in file:
            orjson.loads(line)


def json_alone(path: Path) -> None:
    with path.open("rb") as file:
        for line in file:
            json.loads(line)


if __name__ == "__main__":
    main()
