"""A soak: a run of half an hour on a real four-node SLURM, under preemption, lost nodes and requeues at random moments.

    python -m tests.cluster.soak                                    # 30 minutes of training, 12 faults
    python -m tests.cluster.soak --minutes 1 --faults 3 --seed 7    # the short form; a seed repeats the faults

At the end the run must be done, its digest must be that of its config (computed without training), and its goodput
within 3 points of what the faults and the measured parts of recovery predict. The figures are appended to
benchmarks/soak_<hardware>_<date>.md. Steps are paced by a failpoint that sleeps, so that the figures are those of the
launcher and not of a small machine's load; everything else is as in any run. Needs root and the packages of
tests/cluster/slurm.py.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.slurm import Cluster, missing
from tests.launch.small_run import write_small_run

ROOT = Path(__file__).parents[2]
NODES, RANKS = 4, 2
PACE_S = 0.25  # a step takes this long and what the CPU needs
SAVE_EVERY_STEPS = 40
TOLERANCE = 0.03  # of goodput
KINDS = ("preemption", "node failure", "requeue")
PATIENCE_S = 240.0  # for one recovery; SLURM looks for lost nodes every 30 s


@dataclass(frozen=True)
class Fault:
    """What was done to the run, and when in it."""

    kind: str
    attempt: int
    step: int
    detail: str


class Soak:
    """One run, and what is done to it."""

    def __init__(self, cluster: Cluster, folder: Path, steps: int, seed: int) -> None:
        self.cluster, self.dice, self.steps = cluster, random.Random(seed), steps
        self.config = write_small_run(folder, steps)
        tree = yaml.safe_load(self.config.read_text())
        tree["checkpoint"]["save_every_steps"] = SAVE_EVERY_STEPS
        self.config.write_text(yaml.safe_dump(tree))
        self.environment = cluster.environment | {
            "LONGHAUL_FAIL_AT": f"train.step=sleep:{PACE_S}",
            "OMP_NUM_THREADS": "1",
        }
        self.failures: Counter[str] = Counter()  # by node
        self.faults: list[Fault] = []

    def run(self, faults: int, train_s: float) -> dict[str, Any]:
        """Submit, disturb and wait for the end; the last status."""
        self.job = self._launch(
            "submit", str(self.config), "launcher.kind=slurm", f"launcher.nodes={RANKS}", "launcher.partition=low",
            "launcher.minutes=600", "launcher.restarts=1000",
        ).strip()  # fmt: skip
        self.submitted = time.time()
        for i in range(faults):
            self._wait_until_it_trains()
            time.sleep(self.dice.uniform(0.3, 1.7) * train_s / (faults + 1))
            before = self.status()
            if before["state"] != "running":
                break
            kind = KINDS[i % len(KINDS)] if i < len(KINDS) else self.dice.choice(KINDS)
            self.faults.append(self._disturb(kind, before))
            print(f"{_clock()} {self.faults[-1]}", file=sys.stderr)
            self._wait_for_attempt(before["attempt"] + 1)
        end = time.monotonic() + 2 * train_s + PATIENCE_S
        while (status := self.status())["state"] in ("pending", "starting", "running", "ending"):
            if time.monotonic() > end:
                raise RuntimeError(f"the run does not end: {status}")
            time.sleep(2)
        return status

    def status(self) -> dict[str, Any]:
        [tree] = json.loads(self._launch("status", str(self.config), "--json"))
        assert isinstance(tree, dict)
        return tree

    def _launch(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "launch.cli", *arguments]
        done = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(f"launch {' '.join(arguments)}: exit {done.returncode}: {done.stderr}")
        return done.stdout

    def _disturb(self, kind: str, before: dict[str, Any]) -> Fault:
        detail = ""
        victims = [node for node in before["nodes"] if self._may_fail(node)]
        if kind == "node failure" and not victims:
            kind = "requeue"
        if kind == "preemption":
            wanted = f"--partition=high --nodes={NODES - 1} --exclusive"
            detail = self.cluster.run(f"sbatch --parsable {wanted} --output=/dev/null --wrap 'sleep 3'")
        elif kind == "node failure":
            detail = self.dice.choice(victims)
            self.failures[detail] += 1
            self.cluster.crash_node(detail)
        else:
            self.cluster.run(f"scontrol requeue {self.job}")
        return Fault(kind, before["attempt"], before["step"], detail)

    def _may_fail(self, node: str) -> bool:
        """A node that fails twice is left out of the run for good: enough of them must stay."""
        out = sum(count >= 2 for count in (self.failures + Counter([node])).values())
        return out <= NODES - RANKS - 1

    def _wait_until_it_trains(self) -> None:
        end = time.monotonic() + PATIENCE_S
        while (status := self.status())["state"] != "running":
            if time.monotonic() > end or status["state"] in ("failed", "lost", "crash_loop", "stopped", "cancelled"):
                raise RuntimeError(f"the run does not train: {status}")
            time.sleep(1)

    def _wait_for_attempt(self, number: int) -> None:
        end = time.monotonic() + PATIENCE_S
        while (self.status()["attempt"] or 0) < number:
            if time.monotonic() > end:
                raise RuntimeError(f"attempt {number} does not begin: {self.status()}")
            time.sleep(1)
        for node in self.cluster.nodes:
            if self.cluster.daemons[node].poll() is not None:
                self.cluster.start_node(node)


def expected_digest(config: Path) -> str:
    """The digest of an undisturbed run: its order alone decides it."""
    from data_pipeline.stream import Corpora, Stream
    from pretrain.run import load_run
    from pretrain.segments import first_segment, plan_course

    run = load_run(config)
    course = plan_course(run, [first_segment(run, Corpora(run.data))])
    shards = course.corpora.shards(course.order.pools)
    stream = Stream(course.order, course.steps, course.skips, shards, run.data, run.micro_batch_rows, 0, 1)
    return f"{sum(batch.digest for batch in stream.batches(0, course.end_step)) % 2**128:032x}"


def predict(status: dict[str, Any], faults: list[Fault], step_s: float) -> float:
    """Goodput as it follows from the schedule of faults and from the mean of each kind's parts of recovery.

    A run that is told to stop loses no step; one that loses a node, those since its last checkpoint.
    """
    train = status["end_step"] * step_s
    seconds, totals = status["seconds"], defaultdict[str, list[float]](list)
    for fault, recovery in zip(faults, status["recoveries"], strict=True):
        totals[fault.kind].append(recovery["total"])
    recoveries = sum(statistics.mean(totals[fault.kind]) for fault in faults)
    first_start = seconds["start"] + seconds["queue"] + seconds["detect"] - sum(map(sum, totals.values()))
    redone = sum(fault.step % SAVE_EVERY_STEPS for fault in faults if fault.kind == "node failure") * step_s
    beside = seconds["data"] + seconds["evaluate"] + seconds["save"]
    return float(train / (train + recoveries + max(0.0, first_start) + redone + beside))


def report(
    status: dict[str, Any], faults: list[Fault], wall_s: float, seed: int, step_s: float
) -> tuple[str, list[str]]:
    """The result as Markdown, and what is not as it must be."""
    predicted, goodput = predict(status, faults, step_s), status["goodput"]
    by_clock = status["end_step"] * step_s / wall_s
    parts = ["detect", "queue", "launch", "imports", "rendezvous", "build", "load", "first_step"]
    rows = [f"| {' | '.join(['after', 'times', *parts, 'all, mean', 'all, worst', 'steps redone'])} |"]
    rows.append("|---" * (len(parts) + 5) + "|")
    for kind in KINDS:
        chosen = [r for fault, r in zip(faults, status["recoveries"], strict=True) if fault.kind == kind]
        if not chosen:
            continue
        means = [statistics.mean(r[part] if part in r else r["start"].get(part, 0.0) for r in chosen) for part in parts]
        all_s, redone = [r["total"] for r in chosen], sum(r["redone_steps"] for r in chosen)
        cells = [
            kind,
            str(len(chosen)),
            *(f"{m:.1f}" for m in means),
            f"{statistics.mean(all_s):.1f}",
            f"{max(all_s):.1f}",
        ]
        rows.append(f"| {' | '.join([*cells, str(redone)])} |")
    shares = ", ".join(
        f"{part} {value / sum(status['seconds'].values()):.1%}" for part, value in status["seconds"].items()
    )
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    problems = []
    if status["state"] != "done":
        problems.append(f"the run is {status['state']}: {status['detail']}")
    if abs(goodput - predicted) > TOLERANCE or abs(by_clock - predicted) > TOLERANCE:
        problems.append(f"goodput {goodput:.1%}, by the clock {by_clock:.1%}, predicted {predicted:.1%}")
    lines = [
        f"## {datetime.datetime.now():%F %T}, commit {commit.strip()}, seed {seed}",
        "",
        f"{RANKS} ranks on {NODES} nodes, {status['end_step']} steps of {step_s:.3f} s, {len(faults)} faults in "
        f"{wall_s / 60:.1f} minutes. Goodput **{goodput:.1%}**; {by_clock:.1%} by the clock of the observer; predicted "
        f"from the faults and the parts {predicted:.1%}. {'; '.join(problems) or 'Digest as without faults.'}",
        "",
        "Seconds until the first step after each fault, mean by part:",
        "",
        *rows,
        "",
        f"Where the time went: {shares}.",
        "",
    ]
    return "\n".join(lines), problems


def usual_step_s(run_folder: Path) -> float:
    """The median step as the journal has it."""
    from pretrain.track.journal import read_journal

    steps = [r for r in read_journal(run_folder) if r.type == "step" and "spent" in r.fields]
    return float(statistics.median(r.fields["spent"].get("train", 0.0) for r in steps))


def hardware() -> str:
    return f"{os.cpu_count()}-vcpu"


def _clock() -> str:
    return time.strftime("%T")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="A run under faults on a real SLURM; its figures are appended to a file."
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="of training, without what the faults cost")
    parser.add_argument("--faults", type=int, default=12)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks")
    arguments = parser.parse_args()
    if reason := missing():
        print(f"tests.cluster.soak: {reason}", file=sys.stderr)
        return 1
    print(f"seed {arguments.seed}", file=sys.stderr)
    train_s = 60 * arguments.minutes
    cluster = Cluster(NODES)
    with tempfile.TemporaryDirectory(prefix="longhaul-soak-") as folder:
        try:
            cluster.start()
            soak = Soak(cluster, Path(folder), round(train_s / PACE_S), arguments.seed)
            status = soak.run(arguments.faults, train_s)
            wall_s = time.time() - soak.submitted
        finally:
            cluster.stop()
        text, problems = report(status, soak.faults, wall_s, arguments.seed, usual_step_s(Path(folder) / "run"))
        manifest = json.loads((Path(status["checkpoint"]["path"]) / "MANIFEST.json").read_text())
        if (digest := manifest["position"]["digest"]) != expected_digest(soak.config):
            problems.append(f"digest {digest} is not that of the config")
    print(text)
    path = arguments.out / f"soak_{hardware()}_{datetime.date.today()}.md"
    head = "" if path.exists() else "# Soak on a real SLURM (`make soak`)\n\n"
    with path.open("a") as file:
        file.write(head + text + "\n")
    for problem in problems:
        print(f"tests.cluster.soak: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
