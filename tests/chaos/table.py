"""The fault table: results are appended to docs/faults.jsonl, and docs/faults.md is generated from them."""

from __future__ import annotations

import datetime
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.chaos.cases import Result

ROOT = Path(__file__).parents[2]
RESULTS, TABLE = ROOT / "docs" / "faults.jsonl", ROOT / "docs" / "faults.md"


@dataclass(frozen=True)
class Row:
    """A row of the table: what is done, and the tests that prove it where it is no chaos case."""

    id: str
    fault: str
    tests: tuple[str, ...] = ()  # pytest nodes
    trials: int | None = None  # in those tests; None: as many as tests passed


TRAIN, GUARD, DOG = "tests/pretrain/test_train.py", "tests/pretrain/test_guard.py", "tests/pretrain/test_watchdog.py"
CLUSTER = "tests/cluster/test_faults.py"
ROWS = [
    Row("T1", "SIGKILL of a random rank (2 and 4 ranks), at random times and failpoints"),
    Row("T2", "one rank slow in a save, then a kill"),
    Row("T3", "SIGKILL at every failpoint of a save"),
    Row("T4", "disk full, quota, I/O error during a save"),
    Row("T5", "flipped bit, cut, missing or empty file in the newest checkpoint"),
    Row("T6", "mistyped or empty resume path; killed before the first interval",
        (TRAIN, "-k", "start_refuses or before_its_first_checkpoint")),
    Row("T7", "checkpoint of another architecture, tokenizer or identity", (f"{TRAIN}::test_what_a_start_refuses",)),
    Row("T8", "a foreign pickle as checkpoint", ("tests/pretrain/test_parent.py", "-k", "pickle")),
    Row("T9", "NaN in a batch: skipped, documents logged; in a row: rolled back",
        (GUARD, "-k", "nan or diverges or never_met")),
    Row("T10", "loss spike: marked; with the policy on, rolled back", (GUARD, "-k", "spike")),
    Row("T11", "a flipped bit in one rank's weights", (GUARD, "-k", "weights")),
    Row("T12", "SIGSTOP of a rank: stacks of all, the suspect named, exit 4"),
    Row("T13", "out of memory at step 0, in evaluation, after 12 steps", (GUARD, "-k", "out_of_memory")),
    Row("T14", "TERM, INT, USR1, USR2; in an evaluation; at the end of the allocation",
        (TRAIN, GUARD, "-k", "a_signal_to_any_rank or evaluation_is_left or allocation_ends or no_time")),
    Row("T15", "a rank missing at the rendezvous", (DOG, "-k", "absent")),
    Row("T16", "resume on another number of ranks (ZeRO 1, 3)", (TRAIN, "-k", "another_number_of_ranks")),
    Row("T17", "two attempts of one run alive at once",
        (f"{TRAIN}::test_a_second_attempt_takes_over", "tests/cluster/test_recovery.py", "-k", "second or alive")),
    Row("T18", "rolled back, then killed", (GUARD, "-k", "then_killed")),
    Row("L1", "sbatch missing, a partition or account rejected, accounting down",
        ("tests/cluster/test_batch.py", "tests/launch/test_slurm.py", "tests/cluster/test_watching.py", "-k",
         "refused or missing or accounting or slurmdbd or controller or silent")),
    Row("L2", "preemption with and without a user signal, GraceTime 0 and 10; time limit; requeue; scancel",
        (CLUSTER, "-k", "preempt or limit or requeue or cancel")),
    Row("L3", "node failure in mid-run: requeued, resumed, losses as undisturbed", ("tests/cluster/test_recovery.py",)),
    Row("L4", "the same node fails twice", (CLUSTER, "-k", "twice")),
    Row("L5", "the clock set back or forward",
        ("tests/pretrain/test_goodput.py", "tests/launch/test_policy.py", "-k", "clock or jump or back")),
    Row("L6", "no SLURM commands or Python where they are not promised", (CLUSTER, "-k", "python")),
    Row("C1", "hostile YAML", ("tests/test_configs.py",)),
    Row("C2", "a planted secret", (CLUSTER, "tests/launch", "-k", "secret")),
    Row("C3", "odd paths, umask 077, no inodes",
        ("tests/launch", "tests/cluster", "tests/pretrain/test_save_faults.py", "-k", "path or umask or inode or odd")),
    Row("P1", "data-prep: SIGKILL at random times"),
    Row("S1", "one bit flipped in a shard"),
    Row("M1", "the tracking server away"),
]  # fmt: skip


def append(row: str, seed: int | None, result: Result) -> None:
    """Record what became of a case."""
    record = {
        "row": row, "seed": seed, "trials": result.trials, "losses": result.losses,
        "lost_steps": result.lost_steps, "recover_s": result.recover_s, "problems": len(result.problems),
        "date": datetime.date.today().isoformat(), "commit": _commit(),
    }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(record) + "\n")


def recorded(row: str) -> int:
    """How many trials of a row are recorded for this commit."""
    return sum(r["trials"] for r in _records() if r["row"] == row and r["commit"] == _commit())


def run_tests() -> bool:
    """Run the tests of every row that has some, and record them; whether any failed."""
    bad = False
    for row in ROWS:
        if not row.tests:
            continue
        begun = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:randomly", *row.tests],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        lines = done.stdout.splitlines()
        passed, failed = (sum(line.startswith(word) for line in lines) for word in ("PASSED", "FAILED"))
        print(f"{row.id}: {passed} passed, {failed} failed, {time.monotonic() - begun:.0f} s", flush=True)
        bad = bad or bool(failed) or not passed
        if passed or failed:
            append(row.id, None, Result(trials=passed + failed, losses=failed))
    return bad


def write() -> None:
    """Generate docs/faults.md."""
    TABLE.write_text(text())


def text() -> str:
    """The table, from the newest commit's results of every row."""
    lines = [
        "# What a run survives: the fault table",
        "",
        "Generated by `python -m tests.chaos --table` from `faults.jsonl`; a row's figures are those of the commit at",
        "which it was last run. Cases compare with a run that nothing happened to: same position, same digest, and in",
        "fp32 on the CPU the same bits. *Losses* are trials after which something that a commit had promised was gone.",
        "*Steps redone* are the most of one trial; checkpoints were saved every 5 steps, the newest perhaps in",
        "flight. *Recover* is the median from the fault to the next attempt's first step, imports left out: ranks are",
        "forks of a process that has imported everything.",
        "",
        "| row | fault | trials | losses | steps redone | recover, s | date | commit |",
        "|---|---|---|---|---|---|---|---|",
        *(_line(row) for row in ROWS),
        "",
    ]
    return "\n".join(lines)


def _line(row: Row) -> str:
    records = [r for r in _records() if r["row"] == row.id]
    if not records:
        return f"| {row.id} | {row.fault} | no result yet | | | | | |"
    newest = [r for r in records if r["commit"] == records[-1]["commit"]]
    recover = [s for r in newest for s in r["recover_s"]]
    redone = max(r["lost_steps"] for r in newest)
    cells: list[Any] = [
        row.id, row.fault, sum(r["trials"] for r in newest), sum(r["losses"] for r in newest),
        redone if recover else "", f"{statistics.median(recover):.1f}" if recover else "",
        newest[-1]["date"], newest[-1]["commit"],
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def _records() -> list[dict[str, Any]]:
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


@cache
def _commit() -> str:
    """The commit of what this process has imported."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
