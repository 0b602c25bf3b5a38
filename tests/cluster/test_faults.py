"""What SLURM does to jobs, and what the batch script makes of it: small stand-in ranks on a real SLURM.

The time limit takes SLURM a minute and a half at least, so those jobs run on n4 beside all other tests.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs import ConfigError
from launch.job import CODE, JOBS, Job, snapshot
from launch.slurm import Slurm
from tests.cluster.slurm import Cluster

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}

# counts to the number given, a tenth of a second each; saves the count when it is stopped by a signal that it heeds
RANK = """
import json, os, pathlib, shutil, signal, sys, time
rank, attempt = int(os.environ["SLURM_PROCID"]), int(os.environ["LONGHAUL_ATTEMPT"])
node = os.environ["SLURMD_NODENAME"]
folder, last, heeded, extra = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(), sys.argv[4]
output = folder / "run" / "logs" / f"attempt-{attempt}"
stopped = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda n, _: stopped.append(n) if signal.Signals(n).name in heeded else None)
saved = folder / f"count-{rank}"
count = int(saved.read_text()) if saved.exists() else 0
facts = {"node": node, "from": count, "end": os.environ.get("LONGHAUL_END_TIME"), "now": time.time(),
         "kill_wait": os.environ["LONGHAUL_KILL_WAIT_S"], "scontrol": shutil.which("scontrol")}
exec(extra)
print(json.dumps(facts), flush=True)
while count < last and not stopped:
    time.sleep(0.1)
    count += 1
saved.write_text(str(count))
print("signals", stopped, flush=True)
os._exit(3 if stopped else 0)
"""
HEEDED = "SIGTERM SIGUSR2"


class Launched:
    """A job of stand-in ranks."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder, self.number = cluster, folder, ""
        self.run = folder / "run"

    def job(self, last: int = 1000, heeded: str = HEEDED, extra: str = "") -> Job:
        submissions = self.run / "submissions"
        submission = submissions / str(len(list(submissions.glob("*"))) + 1)
        arguments = ("-u", "-c", RANK, str(self.folder), str(last), heeded, extra)
        return Job("counter", self.run, submission, "name: counter\n", arguments)

    def submit(self, slurm: Slurm, job: Job, without: str = "") -> None:
        """As `launch submit` does; a line of the script that begins with `without` is left out."""
        job.write(slurm)
        snapshot(job.folder / CODE)
        kept = [line for line in slurm.show(job).splitlines(True) if not without or not line.startswith(without)]
        (self.folder / "script").write_text("".join(kept))
        command = ["sbatch", "--parsable", str(self.folder / "script")]
        self.number = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        (job.folder / JOBS).write_text(f"{self.number}\n")

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.run.glob("submissions/*/*.log")))

    def records(self, name: str) -> list[dict[str, Any]]:
        """attempt.json or end.json of every attempt that has one, in their order."""
        paths = sorted(self.run.glob(f"logs/*/{name}.json"), key=lambda path: int(path.parent.name.split("-")[1]))
        return [json.loads(path.read_text()) for path in paths]

    def rank(self, attempt: int, rank: int = 0) -> dict[str, Any]:
        """What a rank said of itself as it began."""
        path = self.run / "logs" / f"attempt-{attempt}" / f"rank-{rank}.log"
        self.cluster.until(f"attempt {attempt}", lambda: path.exists() and "{" in path.read_text())
        facts: dict[str, Any] = json.loads(path.read_text().splitlines()[0])
        return facts

    def signals(self, attempt: int) -> str:
        path = self.run / "logs" / f"attempt-{attempt}" / "rank-0.log"
        return next((line for line in path.read_text().splitlines() if line.startswith("signals")), "none")

    def cancel(self) -> None:
        """Cancel what is left of every job."""
        jobs = [job for path in self.run.glob(f"submissions/*/{JOBS}") for job in path.read_text().split()]
        alive = [job for job in jobs if self.cluster.state(job) not in ENDED]
        if alive:
            self.cluster.run(f"scancel --quiet {' '.join(alive)}")

    def end(self) -> str:
        return self.cluster.wait(self.number, ENDED)


@pytest.fixture
def launched(cluster: Cluster, tmp_path: Path) -> Iterator[Launched]:
    launched = Launched(cluster, tmp_path)
    yield launched
    launched.cancel()
    for node in ("n1", "n2", "n3"):
        if cluster.node_state(node).startswith("down"):
            cluster.repair_node(node)
    cluster.until("free nodes", lambda: [cluster.node_state(n) for n in ("n1", "n2", "n3")] == ["idle"] * 3)


@pytest.fixture(scope="module")
def timed(session_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Launched]:
    """Two jobs of one minute: one heeds the signal before the limit, one only TERM at the limit."""
    jobs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", session_cluster.environment["SLURM_CONF"])
        for name, heeded in (("early", "SIGUSR2"), ("late", "SIGTERM")):
            jobs[name] = Launched(session_cluster, tmp_path_factory.mktemp(name))
            jobs[name].submit(Slurm(minutes=1, sbatch={"nodelist": "n4"}), jobs[name].job(heeded=heeded))
    return jobs


@pytest.fixture(autouse=True)
def begun(timed: dict[str, Launched]) -> None:
    """The timed jobs begin with the first test of this file."""


def preempt(cluster: Cluster, node: str) -> None:
    """Take all of a node for two seconds."""
    cluster.run(f"sbatch --partition=high --nodelist={node} --cpus-per-task=2 --output=/dev/null --wrap 'sleep 2'")


@pytest.mark.parametrize(
    ("partition", "without", "signal", "who"),
    [
        ("low", "", "12", "to be requeued (preempted)"),  # asked for USR2 and got it, with time
        ("low", "#SBATCH --signal", "15", "to be requeued (preempted)"),  # TERM, with time
        ("abrupt", "#SBATCH --signal", "15", "requeued by SLURM (requeued)"),  # no grace time
        ("cheap", "", "12", "to be requeued (preempted)"),  # SLURM only cancels there
    ],
)
def test_preempted(launched: Launched, partition: str, without: str, signal: str, who: str) -> None:
    slurm = Slurm(partition=partition, cpus_per_rank=2, sbatch={"nodelist": "n1"})
    launched.submit(slurm, launched.job(), without)
    launched.rank(1)
    preempt(launched.cluster, "n1")
    resumed = launched.rank(2)
    assert resumed["from"] > 0
    assert signal in launched.signals(1)
    assert f"attempt 1 ended with exit 3: {who}\n" in launched.log
    assert launched.cluster.run(f"squeue --noheader --jobs={launched.number} --Format=RestartCnt") == "1"


def test_requeued_by_hand_is_not_requeued_twice(launched: Launched) -> None:
    launched.submit(Slurm(), launched.job())
    launched.rank(1)
    launched.cluster.run(f"scontrol requeue {launched.number}")
    assert launched.rank(2)["from"] > 0
    assert "attempt 1 ended with exit 3: requeued by SLURM (requeued)\n" in launched.log
    assert launched.cluster.run(f"squeue --noheader --jobs={launched.number} --Format=RestartCnt") == "1"


@pytest.mark.parametrize("restart", ["requeue", "chain"])
def test_cancelled_for_good(launched: Launched, restart: str) -> None:
    launched.submit(Slurm(restart=restart), launched.job(heeded="none"))  # deaf ranks: the shell does not wait for them
    launched.rank(1)
    jobs = launched.run / "submissions" / "1" / JOBS
    if restart == "chain":
        launched.cluster.until("successor", lambda: len(jobs.read_text().split()) == 2)
    launched.cluster.run(f"scancel {launched.number}")
    assert launched.end() == "CANCELLED"
    [end] = launched.records("end")
    assert (end["action"], end["why"]) == ("stop", "cancelled, not to be started again")
    for job in jobs.read_text().split():
        assert launched.cluster.wait(job, ENDED) == "CANCELLED"


def test_no_attempt_after_launch_stop(launched: Launched) -> None:
    launched.submit(Slurm(), launched.job())
    launched.rank(1)
    (launched.run / "submissions" / "1" / "stop").touch()
    launched.cluster.run(f"scancel --signal=USR2 {launched.number}")
    assert launched.end() == "FAILED"
    assert "attempt 1 ended with exit 3: stopped on request, not to be started again\n" in launched.log
    launched.cluster.run(f"scontrol requeue {launched.number}")
    launched.cluster.until("refusal", lambda: "no attempt begins: stopped on request before it began" in launched.log)


def test_a_node_that_fails_twice_is_excluded(launched: Launched) -> None:
    cluster = launched.cluster
    with only_nodes(cluster, "n1", "n2"):
        launched.submit(Slurm(nodes=2), launched.job())
        launched.rank(1, 1)
        lose_and_repair(launched, "n2")
        launched.rank(2, 1)
    lose_and_repair(launched, "n2")
    assert launched.rank(3)["from"] > 0
    first, second = launched.records("end")
    assert first["cause"] == second["cause"] == "node failure"
    assert first["failed_nodes"] == second["failed_nodes"] == ["n2"]
    assert (first["exclude"], second["exclude"]) == ([], ["n2"])
    nodes = [record["nodes"] for record in launched.records("attempt")]
    assert nodes[:2] == [["n1", "n2"]] * 2
    assert len(nodes[2]) == 2 and "n2" not in nodes[2]
    assert "ExcNodeList=n2" in cluster.run(f"scontrol show job {launched.number}")


def lose_and_repair(launched: Launched, node: str) -> None:
    """Lose a node of the running attempt, and have it back when the attempt has ended."""
    launched.cluster.crash_node(node)
    launched.cluster.declare_down(node)
    ends = lambda: len(launched.records("end")) == len(launched.records("attempt"))  # noqa: E731
    launched.cluster.until("end", ends)
    launched.cluster.repair_node(node)


@contextlib.contextmanager
def only_nodes(cluster: Cluster, *names: str) -> Iterator[None]:
    """Jobs start on these nodes alone. SLURM is free to choose others where one of them is still cleaning up."""
    others = ",".join(node for node in cluster.nodes if node not in names)
    cluster.run(f"scontrol update nodename={others} state=drain reason=test")
    try:
        yield
    finally:
        cluster.run(f"scontrol update nodename={others} state=resume")


def test_the_node_of_the_batch_shell_fails(launched: Launched) -> None:
    with only_nodes(launched.cluster, "n1", "n2"):
        launched.submit(Slurm(nodes=2), launched.job())
        launched.rank(1, 1)
    launched.cluster.crash_node("n1")
    launched.cluster.declare_down("n1")
    launched.rank(2)
    nodes = launched.records("attempt")[1]["nodes"]
    assert len(nodes) == 2 and "n1" not in nodes
    [end] = launched.records("end")
    assert (end["exit_code"], end["cause"], end["failed_nodes"]) == (None, "node failure", ["n1"])
    assert "attempt 1 was lost: lost with n1\n" in launched.log


def test_a_spare_node_takes_over(launched: Launched) -> None:
    """SLURM finds out by itself here; the job never leaves its nodes."""
    launched.submit(Slurm(nodes=2, spare_nodes=1), launched.job())
    launched.rank(1, 1)
    launched.cluster.crash_node("n2")
    assert launched.rank(2, 1)["node"] == "n3"
    assert launched.rank(2, 0)["node"] == "n1"
    [end] = launched.records("end")
    assert end["why"] == "starting again at once on n1, n3 (node failure of n2)"
    assert launched.cluster.run(f"squeue --noheader --jobs={launched.number} --Format=RestartCnt") == "0"


SUSPECT = """
if node == "n1":
    accusation = {"host": node, "rank": rank, "cause": "preflight: matmul at 31 % of the median", "time": 0}
    (output / "suspects.jsonl").open("a").write(json.dumps(accusation) + chr(10))
    print("PreflightError: n1 is slow", flush=True)
    os._exit(1)
"""


@pytest.mark.parametrize("spare", [0, 1])
def test_a_node_named_by_the_preflight_is_left_out(launched: Launched, spare: int) -> None:
    launched.submit(Slurm(spare_nodes=spare, exclude="n3,n4"), launched.job(last=3, extra=SUSPECT))
    assert launched.end() == "COMPLETED"
    assert [record["nodes"] for record in launched.records("attempt")] == [["n1"], ["n2"]]
    words = "(restart 1 of 20), without n1 (rank 0 on n1: PreflightError: n1 is slow)"
    follows = f"starting again at once on n2 {words}" if spare else f"to be requeued {words}"
    assert f"attempt 1 ended with exit 1: {follows}\n" in launched.log


def test_crash_loop(launched: Launched) -> None:
    launched.submit(Slurm(), launched.job(extra="raise ValueError('the cause')"))
    assert launched.end() == "FAILED"
    ends = launched.records("end")
    assert [end["exit_code"] for end in ends] == [1, 1, 8]
    why = "crash loop: 3 bad ends in a row, not one checkpoint (rank 0 on n1: ValueError: the cause)"
    assert f"attempt 3 ended with exit 8: {why}\n" in launched.log
    assert "ExitCode=8:0" in launched.cluster.run(f"scontrol show job {launched.number}")


def test_a_mistake_is_final_where_every_rank_finds_it(launched: Launched) -> None:
    together = "import time; time.sleep(3 - time.time() % 3 + 0.3 * rank); os._exit(2)"  # a TERM meanwhile ends none
    launched.submit(Slurm(nodes=2), launched.job(extra=together))
    assert launched.end() == "FAILED"
    assert "attempt 1 ended with exit 2: not to be started again: a mistake in the configuration\n" in launched.log


def test_what_one_rank_alone_calls_a_mistake_is_not_final(launched: Launched) -> None:
    alone = "if (rank, attempt) == (1, 1): print('no such file', flush=True); sys.exit(2)"
    launched.submit(Slurm(nodes=2), launched.job(last=30, extra=alone))
    assert launched.end() == "COMPLETED"
    assert (
        "attempt 1 ended with exit 1: starting again at once on n1, n2 (restart 1 of 20) (rank 1 on n2: no such file)"
        in launched.log
    )
    assert [end["exit_code"] for end in launched.records("end")] == [1, 0]


def test_without_python_and_without_slurm_where_the_ranks_run(launched: Launched) -> None:
    python = launched.folder / "python"  # as a container that only has the ranks, and none of SLURM's commands
    python.write_text(f'#!/bin/bash\n[[ "$*" != *launch.batch* ]] || exit 127\nPATH= exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    launched.submit(Slurm(python=str(python)), launched.job(last=30))
    assert launched.rank(1)["scontrol"] is None
    launched.cluster.run(f"scancel --signal=USR2 {launched.number}")
    assert launched.rank(2)["from"] > 0
    assert launched.end() == "COMPLETED"
    assert "attempt 1 ended with exit 3: requeue, by its exit code alone\n" in launched.log
    assert "attempt 2 ended with exit 0: done, by its exit code alone\n" in launched.log


def test_one_launch_at_a_time(launched: Launched, capsys: pytest.CaptureFixture[str]) -> None:
    Slurm().start(launched.job(last=20))
    launched.number = capsys.readouterr().out.strip()
    with pytest.raises(ConfigError) as caught:
        Slurm().start(launched.job())
    refused = re.fullmatch(r"(.*): job (\d+) \([A-Z]+\) of this run goes on by itself; (.*)", str(caught.value))
    assert refused is not None
    assert refused[1] == str(launched.run)
    assert refused[2] == launched.number
    assert refused[3] == f"to start it another way, stop it first: launch stop {launched.run}"
    assert launched.end() == "COMPLETED"
    launched.cluster.until("end of the job", lambda: launched.cluster.run("squeue --noheader --nodelist=n1") == "")
    assert Slurm().start(launched.job(last=1)) == 0


def test_a_batch_script_that_others_may_read_holds_no_secret(
    launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "planted-secret")
    extra = "assert os.environ['WANDB_API_KEY'] == 'planted-' + 'secret'; os.umask(0o077)"
    launched.submit(Slurm(), launched.job(last=1, extra=extra))
    assert launched.end() == "COMPLETED"
    for path in launched.run.rglob("*"):
        assert path.is_dir() or b"planted-secret" not in path.read_bytes(), path
    assert (launched.run / "submissions" / "1" / "run.yaml").stat().st_mode & 0o077 == 0


def test_before_the_time_limit(timed: dict[str, Launched], cluster: Cluster) -> None:
    job = timed["early"]
    first, resumed = job.rank(1), job.rank(2)
    assert resumed["from"] > 0
    assert 0 < float(first["end"]) - first["now"] <= 61
    assert first["kill_wait"] == "5"
    assert job.signals(1) == "signals [12]"
    assert "attempt 1 ended with exit 3: to be requeued (restart 1 of 20)\n" in job.log
    job.cancel()


def test_at_the_time_limit(timed: dict[str, Launched], cluster: Cluster) -> None:
    job = timed["late"]
    cluster.until("time limit", lambda: bool(job.records("end")), seconds=120)
    assert job.rank(2)["from"] > 0
    assert job.records("end")[0]["cause"] == "time limit"
    assert "15" in job.signals(1)
    job.cancel()
