"""How the batch script acts on the ends of small stand-in ranks, on a real SLURM."""

from collections.abc import Callable
from pathlib import Path

import pytest

from launch.job import Job
from launch.slurm import Slurm, SlurmError
from tests.cluster.slurm import Cluster

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}

# counts to the number given, a tenth of a second each; stopped by a signal it saves the count and exits with 3
COUNTER = """
import os, pathlib, signal, sys, time
stopped = []
for number in (signal.SIGTERM, signal.SIGUSR2): signal.signal(number, lambda *_: stopped.append(1))
rank, folder, last = os.environ["SLURM_PROCID"], pathlib.Path(sys.argv[1]), int(sys.argv[2])
saved = folder / f"count-{rank}"
count = int(saved.read_text()) if saved.exists() else 0
print("from", count, os.environ["MASTER_ADDR"], os.environ["SLURMD_NODENAME"], flush=True)
while count < last and not stopped:
    time.sleep(0.1)
    count += 1
saved.write_text(str(count))
os._exit(3 if stopped else 0)
"""


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Job]:
    def make(script: str = COUNTER, last: int = 20) -> Job:
        run = tmp_path / "a run's folder"
        arguments = ("-u", "-c", script, str(tmp_path), str(last))
        return Job("counter", run, run / "submissions" / "1", "name: counter\n", arguments)

    return make


@pytest.fixture
def submit(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> Callable[[Slurm, Job], str]:
    def start(slurm: Slurm, job: Job) -> str:
        """The id of the submitted job."""
        assert slurm.start(job) == 0
        return capsys.readouterr().out.strip()

    return start


Submit = Callable[[Slurm, Job], str]
MakeJob = Callable[..., Job]


def wait_for_ranks(cluster: Cluster, job: Job, ranks: int) -> None:
    logs = [job.logs / "attempt-1" / f"rank-{rank}.log" for rank in range(ranks)]
    cluster.until("ranks", lambda: all(log.exists() and "from" in log.read_text() for log in logs))


def log_of(job: Job, number: str) -> str:
    return (job.folder / f"{number}.log").read_text()


def test_two_nodes(cluster: Cluster, submit: Submit, job: MakeJob) -> None:
    made = job(last=3)
    number = submit(Slurm(nodes=2), made)
    assert cluster.wait(number, ENDED) == "COMPLETED"
    first, second = ((made.logs / "attempt-1" / f"rank-{rank}.log").read_text().split() for rank in (0, 1))
    assert first == ["from", "0", first[3], first[3]]  # rank 0 is where the others look for it
    assert second == ["from", "0", first[3], second[3]]
    assert first[3] != second[3]
    assert f"launch: job {number}: attempt 1 ended with exit 0: done" in log_of(made, number)


def test_stopped_by_signal_then_requeued_and_resumed(cluster: Cluster, submit: Submit, job: MakeJob) -> None:
    made = job(last=40)
    number = submit(Slurm(nodes=2), made)
    wait_for_ranks(cluster, made, 2)
    cluster.run(f"scancel --signal=USR2 {number}")
    cluster.wait(number, {"PENDING"})
    saved = int((made.folder.parents[2] / "count-0").read_text())
    assert saved < 40
    assert cluster.wait(number, ENDED) == "COMPLETED"
    assert f"from {saved}" in (made.logs / "attempt-2" / "rank-0.log").read_text()
    log = log_of(made, number)
    assert f"launch: job {number}: attempt 1 ended with exit 3: to be requeued (restart 1 of 20)" in log
    assert f"launch: job {number}: attempt 2 ended with exit 0: done" in log


def test_chain(cluster: Cluster, submit: Submit, job: MakeJob) -> None:
    made = job(last=30)
    number = submit(Slurm(restart="chain"), made)
    wait_for_ranks(cluster, made, 1)
    cluster.run(f"scancel --signal=USR2 {number}")
    assert cluster.wait(number, ENDED) == "FAILED"
    follower = str(int(number) + 1)
    assert f"attempt 1 ended with exit 3: goes on as job {follower} (restart 1 of 20)" in log_of(made, number)
    assert cluster.wait(follower, ENDED) == "COMPLETED"
    assert f"launch: job {follower}: attempt 2 ended with exit 0: done" in log_of(made, follower)
    assert cluster.wait(str(int(follower) + 1), ENDED) == "CANCELLED"


def test_cancelled_is_not_started_again(cluster: Cluster, submit: Submit, job: MakeJob) -> None:
    made = job(last=1000)
    number = submit(Slurm(), made)
    wait_for_ranks(cluster, made, 1)
    cluster.run(f"scancel {number}")
    assert cluster.wait(number, ENDED) == "CANCELLED"
    assert "attempt 1 ended with exit 3: cancelled, not to be started again" in log_of(made, number)


def test_exit_code_of_one_rank_is_that_of_the_job(cluster: Cluster, submit: Submit, job: MakeJob) -> None:
    made = job("import os, time\nos._exit(5) if os.environ['SLURM_PROCID'] == '1' else time.sleep(1000)")
    number = submit(Slurm(nodes=2), made)
    assert cluster.wait(number, ENDED) == "FAILED"
    why = "not to be started again: out of memory, as the next start would be (rank 1 on n2: "
    assert f"attempt 1 ended with exit 5: {why}" in log_of(made, number)


def test_restarts_come_to_an_end(cluster: Cluster, submit: Submit, job: MakeJob) -> None:
    made = job("raise SystemExit(1)")
    number = submit(Slurm(restarts=0), made)
    assert cluster.wait(number, ENDED) == "FAILED"
    assert "ended with exit 1: not started again after 0 restarts (rank 0 on n1: " in log_of(made, number)


@pytest.mark.parametrize(
    ("launcher", "words", "remedy"),
    [
        (Slurm(partition="nope"), "invalid partition specified: nope", "set launcher.partition; `sinfo` lists"),
        (Slurm(nodes=9), "More processors requested than permitted", "lower launcher.nodes, ranks_per_node"),
        (Slurm(gpus_per_node=8), "Invalid generic resource (gres) specification", "lower launcher.gpus_per_node"),
    ],
)
def test_refused(cluster: Cluster, job: MakeJob, launcher: Slurm, words: str, remedy: str) -> None:
    made = job()
    with pytest.raises(SlurmError) as caught:
        launcher.start(made)
    assert words.lower() in str(caught.value).lower()
    assert f"-> {remedy}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not made.folder.exists()
