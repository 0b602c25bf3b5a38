"""The cases of data preparation: `data-prep run` killed again and again, until it is through.

The oracle is the folder that an undisturbed run made: every byte of it, with nothing missing and nothing more.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import yaml

from data_pipeline.failpoints import VARIABLE
from tests.chaos.cases import MOST_ATTEMPTS, ROOT, Result, Room
from tests.data_pipeline.inputs import http, page, sentences, warc_record, write_corpora, write_warc

CONFIG = {
    "name": "small",
    "out": "out",
    "tokenizer": {"kind": "train", "vocab_size": 500},
    "corpora": {
        "crawl": {"kind": "common_crawl", "paths": ["crawl/*.warc.gz"]},
        "wiki": {"kind": "wikipedia", "paths": ["wiki/*.xml.bz2"]},
        "books": {"kind": "bookcorpus", "paths": ["books"]},
    },
    "dedup": {"near": {}},
    "validation": {"fraction": 0.2},
    "slice_bytes": 20_000,
    "shard_bytes": 20_000,
    "block_tokens": 1024,
    "workers": 2,
}
STAGES = ("texts", "buckets", "clusters", "slices")
POINTS = [f"file.{moment}" for moment in ("written", "synced", "renamed")]
POINTS += [f"{stage}.{moment}" for stage in STAGES for moment in ("begun", "written", "published")]
NOT_COMPARED = ("card.html", "card.json")  # they say when they were made
LONGEST_S = 120.0


def prepared(room: Room) -> tuple[Path, float]:
    """A folder with corpora, a config, and what an undisturbed run makes of them; the seconds that it took."""
    folder = room.folder / "prepared"
    if not folder.exists():
        write_corpora(folder)
        write_warc(folder / "crawl" / "again.warc.gz", [_page_again(i) for i in range(20)])
        (folder / "small.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
        begun = time.monotonic()
        process = start(folder)
        assert process.wait(LONGEST_S) == 0, log(folder)
        room.seconds["prepared", 2] = time.monotonic() - begun
        shutil.copytree(folder / "out", folder / "golden")
    return folder, room.seconds["prepared", 2]


def _page_again(i: int) -> bytes:
    """A page whose text another file has too."""
    body = http(page(sentences(1000 + i, 20)))
    return warc_record("response", f"https://e.org/again/{i}", body, f"ffffffff-0000-0000-0000-{i:012d}")


def start(folder: Path, fault: str = "") -> subprocess.Popen[bytes]:
    """`data-prep run` in a session of its own."""
    command = [sys.executable, "-m", "data_pipeline.cli", "run", "small.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), VARIABLE: fault}
    with (folder / "log").open("ab") as file:
        return subprocess.Popen(command, cwd=folder, env=environment, stderr=file, stdout=file, start_new_session=True)


def log(folder: Path) -> str:
    """The end of what all runs have written."""
    return (folder / "log").read_text(errors="replace")[-2000:]


def contents(folder: Path) -> dict[str, str]:
    """Every file with its sha256, and every other thing by its name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "-"
        for path in sorted(folder.rglob("*"))
        if path.name not in NOT_COMPARED
    }


def through(room: Room, faults: Iterator[str | float], rng: random.Random) -> Result:
    """One preparation to its end, each attempt with the next fault: a failpoint, or the seconds until a kill."""
    folder, _ = prepared(room)
    shutil.rmtree(folder / "out")
    result = Result()
    for _ in range(MOST_ATTEMPTS):
        fault = next(faults, "")
        process = start(folder, fault if isinstance(fault, str) else "")
        hit = isinstance(fault, float) and kill(process, fault, rng)
        try:
            code = process.wait(LONGEST_S)
        except subprocess.TimeoutExpired:
            result.problems.append(f"hung after {fault}: {log(folder)}")
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        result.trials += hit or (code != 0 and bool(fault))
        if code == 0:
            break
        if code not in (0, -signal.SIGKILL) and not fault:
            result.problems.append(f"exit code {code} without a fault: {log(folder)}")
    made, golden = contents(folder / "out"), contents(folder / "golden")
    if made != golden:
        result.losses += 1
        names = sorted(name for name in made.keys() | golden.keys() if made.get(name) != golden.get(name))
        result.problems.append(f"differs from the undisturbed run in {len(names)} files: {', '.join(names[:5])}")
    return result


def kill(process: subprocess.Popen[bytes], after: float, rng: random.Random) -> bool:
    """SIGKILL the whole of it, its parent alone, or one worker alone; whether there was something to kill."""
    try:
        process.wait(after)
        return False
    except subprocess.TimeoutExpired:
        pass
    who = rng.choice(["all", "parent", "worker"])
    if who == "all":
        os.killpg(process.pid, signal.SIGKILL)
    elif who == "parent":
        process.kill()
    else:
        children = psutil.Process(process.pid).children()
        if not children:
            return False
        with suppress(psutil.NoSuchProcess):
            rng.choice(children).kill()
    return True


def kills(room: Room, rng: random.Random) -> Result:
    """P1: SIGKILL at random times of all processes, of the parent, or of a worker."""
    _, seconds = prepared(room)
    return through(room, iter([rng.uniform(0.1, 0.7) * seconds for _ in range(8)]), rng)


def every_failpoint(room: Room, rng: random.Random) -> Result:
    """P2: a kill at a failpoint, at its first, second, third passage and so on, of whichever process comes by."""
    point = rng.choice(POINTS)
    return through(room, iter([f"{point}#{n}=kill" for n in (1, 2, 3, 5)]), rng)
