"""The fault table: results are appended to docs/faults.jsonl, and docs/faults.md is generated from them."""

from __future__ import annotations

import datetime
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tests.chaos.cases import Result

ROOT = Path(__file__).parents[2]
RESULTS, TABLE = ROOT / "docs" / "faults.jsonl", ROOT / "docs" / "faults.md"


@dataclass(frozen=True)
class Row:
    """A row of the table: what is done; and where it is no chaos case, the tests that prove it: those in `files` whose
    names hold one of `words`, or all."""

    id: str
    fault: str
    files: tuple[str, ...] = ()
    words: tuple[str, ...] = ("",)

    def holds(self, file: str, name: str) -> bool:
        """Whether a test is one of the row's."""
        return file in self.files and any(word in name for word in self.words)


TRAIN, GUARD, DOG = (f"tests/pretrain/test_{name}.py" for name in ("train", "guard", "watchdog"))
FAULTS, BATCH, RECOVERY, WATCHING = (
    f"tests/cluster/test_{name}.py" for name in ("faults", "batch", "recovery", "watching")
)
PREPARE, DISKS, CRAWL, TEXT_FILES, SHARDS = (
    f"tests/data_pipeline/test_{name}.py" for name in ("prepare", "disks", "common_crawl", "text_files", "shards")
)
REMOTE, CACHE, STREAM = (f"tests/data_pipeline/test_{name}.py" for name in ("remote_shards", "cache", "stream"))
MLFLOW, REGISTRY = (f"tests/pretrain/track/test_{name}.py" for name in ("mlflow", "registry"))
SOURCES = tuple(
    f"tests/data_pipeline/test_{name}.py"
    for name in ("inputs", "text_files", "common_crawl", "wikipedia", "token_files")
)
LAUNCH = tuple(f"tests/launch/test_{name}.py" for name in ("cli", "local", "slurm", "policy", "status", "notice"))
ROWS = [
    Row("T1", "SIGKILL of a random rank (2 and 4 ranks), at random times, steps and failpoints"),
    Row("T2", "one rank slow in a save, then a kill"),
    Row("T3", "SIGKILL at every failpoint of a save"),
    Row("T4", "disk full, quota, I/O error during a save"),
    Row("T5", "flipped bit, cut, missing or empty file in the newest checkpoint"),
    Row("T6", "mistyped or empty resume path; killed before the first interval",
        (TRAIN,), ("start_refuses", "before_its_first_checkpoint")),
    Row("T7", "checkpoint of another architecture, tokenizer or identity",
        (TRAIN, "tests/pretrain/test_parent.py"), ("start_refuses", "what_is_refused")),
    Row("T8", "a foreign pickle as checkpoint", ("tests/pretrain/test_parent.py",), ("pickle",)),
    Row("T9", "NaN in a batch: skipped, documents logged; in a row: rolled back",
        (GUARD,), ("nan", "diverges", "never_met")),
    Row("T10", "loss spike: marked; with the policy on, rolled back", (GUARD,), ("spike",)),
    Row("T11", "a flipped bit in one rank's weights, masters or moments",
        (GUARD, "tests/pretrain/engine/test_engines.py"), ("weights", "lowest_bit")),
    Row("T12", "SIGSTOP of a rank: stacks of all, the suspect named, exit 4"),
    Row("T13", "out of memory at step 0, in evaluation, after 12 steps", (GUARD,), ("out_of_memory",)),
    Row("T14", "TERM, INT, USR1, USR2; in an evaluation; in an outage; at the last steps; at the end of the allocation",
        (TRAIN, GUARD, "tests/pretrain/test_remote.py"),
        ("hears_a_signal", "a_signal_to_any_rank", "evaluation_is_left", "allocation_ends", "no_time", "very_end")),
    Row("T15", "a rank missing at the rendezvous", (DOG,), ("absent",)),
    Row("T16", "resume on another number of ranks, stage or engine",
        (TRAIN, "tests/pretrain/engine/test_engines.py"), ("another_number_of_ranks", "any_engine", "every_engine")),
    Row("T17", "two attempts of one run alive at once", (TRAIN, RECOVERY), ("second_attempt", "two_attempts", "alive")),
    Row("T18", "rolled back, then killed", (GUARD,), ("then_killed",)),
    Row("L1", "sbatch missing, a partition or account rejected, accounting or controller down",
        (BATCH, WATCHING, *LAUNCH), ("refuse", "missing", "silent", "daemons_down", "vanished")),
    Row("L2", "preemption with and without a user signal, GraceTime 0 and 10; time limit; requeue; scancel",
        (FAULTS, BATCH), ("test_preempted", "limit", "requeue", "cancel")),
    Row("L3", "node failure in mid-run: requeued, resumed, losses as undisturbed", (RECOVERY,), ("preempted_lost",)),
    Row("L4", "the same node fails twice", (FAULTS,), ("twice",)),
    Row("L5", "the clock set back or forward", ("tests/pretrain/test_goodput.py", *LAUNCH), ("clock", "jump")),
    Row("L6", "no SLURM commands or Python where they are not promised", (FAULTS,), ("python",)),
    Row("C1", "hostile YAML", ("tests/test_configs.py",)),
    Row("C2", "a planted secret", (FAULTS, *LAUNCH), ("secret", "webhook")),
    Row("C3", "odd paths, umask 077, no inodes",
        (FAULTS, BATCH, *LAUNCH, "tests/pretrain/test_save_faults.py"), ("odd", "umask", "inode", "without_python")),
    Row("P1", "data-prep: SIGKILL at random times of all, the parent or a worker; bytes compared"),
    Row("P2", "data-prep: SIGKILL at every failpoint of every stage; bytes compared"),
    Row("P3", "a poison document", (PREPARE,), ("that_raises", "all_raise")),
    Row("P4", "a worker that is killed; an input that kills twice",
        (PREPARE,), ("worker_that_is_killed", "kills_twice")),
    Row("P5", "data-prep: disk full, quota, no inodes", (DISKS,), ("full_disk", "inodes", "write_that_fails")),
    Row("P6", "data-prep: read-only or vanished output", (DISKS,), ("read_only", "vanishes")),
    Row("P7", "truncated or damaged inputs, packed or not: named, strict or skipped, counted",
        SOURCES, ("damage", "cut", "truncated", "flipped_bit", "something_else")),
    Row("P8", "bombs, endless lines, hostile nesting; memory bounded",
        (*SOURCES, "tests/data_pipeline/test_bombs.py"),
        ("bomb", "ten_gigabytes", "hundred_megabytes", "hostile", "window")),
    Row("P9", "odd encodings, line ends and empty files", (*SOURCES, "tests/data_pipeline/test_clean.py"),
        ("bytes_become_text", "empty_file", "charset", "text_is_tidied", "written_as_utf8")),
    Row("P10", "bad JSON lines: named by number", (TEXT_FILES,), ("bad_line", "twice", "fast_parser", "without_text")),
    Row("P11", "WARC: wrong lengths, missing headers, truncated, chunked, brotli", (CRAWL,),
        ("wrong_length", "without_a_header", "strange_bodies", "chunked")),
    Row("P12", "two preparations of one folder; stale leases", (PREPARE, "tests/data_pipeline/test_lease.py"),
        ("two_at_once", "another_has", "refused_folder", "leftovers", "killed_owner", "another_host", "many_at_once")),
    Row("P13", "the same folder with another tokenizer, seed or input", (PREPARE,),
        ("another_configuration", "another_refused", "exchanged")),
    Row("P14", "an input that changes between two runs, or while it is read",
        (PREPARE, "tests/data_pipeline/test_plan.py"),
        ("input_that_changed", "that_changes", "finished_shards_that_changed", "inputs_of_now")),
    Row("P15", "a tokenizer that is missing, damaged, of another vocabulary",
        ("tests/data_pipeline/test_tokenizer.py", "tests/data_pipeline/test_shards.py"),
        ("cannot_serve", "outside_the_vocabulary", "impossible_formats")),
    Row("P16", "a literal document mark in a text", ("tests/data_pipeline/test_tokenizer.py",), ("mark",)),
    Row("P17", "object stores and web servers that misbehave", ("tests/data_pipeline/test_remote.py",),
        ("refused_is_said", "errors_that", "breaks_off", "never_comes", "without_an_end", "changes", "weak_version")),
    Row("P18", "evil inputs: pipes, paths, redirects, control characters",
        (*SOURCES, "tests/data_pipeline/test_remote.py"),
        ("other_readers_would_run", "control_characters", "does_not_lie_below", "redirects_out", "will_not_be_asked")),
    Row("S1", "one bit flipped in a shard", (SHARDS, CACHE), ("flipped_bit", "flipped_at_random", "is_damaged")),
    Row("S2", "a shard truncated", (SHARDS, REMOTE), ("truncated", "damage_at_the_source", "spoiled_on_the_way")),
    Row("S3", "a zeroed page; a shard swapped, missing, extra, renamed", (SHARDS,),
        ("zeroed", "swapped", "missing_or", "extra_files")),
    Row("S4", "interleaved, doubled and dotted keys, pickles and symlinks in a tar", (SHARDS,),
        ("others_would_misread",)),
    Row("S5", "no shards, one sample, fewer samples than a batch: said before the start",
        (STREAM, "tests/pretrain/test_segments.py"), ("without_a", "larger_than_a_source")),
    Row("S6", "a reader that dies, thread or process: an error, not a hang",
        (REMOTE, STREAM, "tests/pretrain/test_verify.py"),
        ("reader_that_dies", "waits_for_no_server", "damaged_block_ends", "killed_reader")),
    Row("S7", "another number of ranks, threads, micro-batch on resume", (STREAM, "tests/pretrain/test_trace.py"),
        ("any_shape_of_the_machine", "on_other_ranks_each_time")),
    Row("S8", "a shared mount that shows stale folders, late files", (REMOTE,),
        ("late_files", "never_shows", "stale_handle")),
    Row("M1", "the tracking server down at the start, in mid-run, for good; 500, 401, 429, slow", (MLFLOW, REGISTRY),
        ("is_down", "lost_answer", "answers_with_errors", "holds_up_nobody")),
    Row("M2", "the server dies during an upload", (REGISTRY,), ("ready_too_early",)),
    Row("M3", "a run deleted or gone for good, what MLflow refuses, a metric that is not finite", (MLFLOW,),
        ("deleted", "gone_for_good", "refuses_does_not", "not_finite")),
    Row("M4", "the sqlite store locked, or on a full disk", (MLFLOW, REGISTRY), ("locked", "full_disk")),
    Row("M5", "steps done twice are recorded once", (MLFLOW,),
        ("done_twice", "kill_between", "live_lineage")),
    Row("C4", "what an older version wrote", ("tests/pretrain/test_older.py",)),
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


def run_tests(ids: Sequence[str] = ()) -> bool:
    """Run the tests of the rows that have some, or of these alone, and record them; whether any failed."""
    rows = [row for row in ROWS if row.files and (not ids or row.id in ids)]
    named = {word or Path(file).stem for row in rows for file in row.files for word in row.words}
    words = " or ".join(sorted(named)) if ids else ""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        files = sorted({file for row in rows for file in row.files})
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", f"--junitxml={report}",
                        "-k", words, *files], cwd=ROOT)  # fmt: skip
        return read_tests(report, rows)


def read_tests(report: Path, rows: Sequence[Row] = ROWS) -> bool:
    """Record the rows whose tests a report of pytest holds; whether any of these failed, or was none."""
    bad = False
    cases = [
        (str(case.get("classname")).replace(".", "/") + ".py", str(case.get("name")), case)
        for case in ElementTree.parse(report).getroot().iter("testcase")
    ]
    for row in rows:
        mine = [case for file, name, case in cases if row.holds(file, name) and case.find("skipped") is None]
        if not row.files:
            continue
        failed = sum(case.find("failure") is not None or case.find("error") is not None for case in mine)
        print(f"{row.id}: {len(mine)} tests, {failed} failed", flush=True)
        bad = bad or bool(failed) or not mine
        if mine:
            append(row.id, None, Result(trials=sum(map(_trials, mine)), losses=failed))
    return bad


def _trials(case: ElementTree.Element) -> int:
    """How often a test has tried its fault: once, if it does not say."""
    found = case.find("properties/property[@name='trials']")
    return 1 if found is None else int(str(found.get("value")))


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
        "forks of a process that has imported everything. Rows without it are proved by tests, a trial being a test,",
        "or each of those that a test says it makes.",
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
