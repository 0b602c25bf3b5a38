"""The job on SLURM: submitit makes the batch script and submits it; the shell in it acts on how the ranks end.

submitit's own way to come back is not used: it pickles a call, requeues from the handler of rank 0 and leaves the
other ranks to be killed. Here the command of a rank stands in the script itself; SLURM's signal tells every rank, and
they decide together; only the batch shell, where SLURM's commands certainly are, starts the job again. submitit never
runs in a rank, so there is no pickle to grow stale and no signal handler of its to be replaced.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Literal

import submitit
from pydantic import Field, model_validator
from submitit.core.utils import FailedJobError, FailedSubmissionError

from configs import Bool, Float, Int, Section
from launch.alone import alone
from launch.job import CODE, JOBS, RESTARTED, Job, snapshot
from launch.notice import Notice
from pretrain.track.journal import Cursor, branch_files, records_after
from pretrain.track.mask import mask_text, names_a_secret

BATCH = Path(__file__).with_name("batch.sh")
STOP_SIGNAL = "USR2"  # NCCL may use USR1 for itself
LEAST_LEAD_S = 60  # SLURM looks at the clock twice a minute
UNKNOWN_LEAD_S = 120  # before a first save was measured
SAVES = 20  # the newest ones, of which the slowest counts


class Prep(Section):
    """Tasks of `launch prep`, each on one node. What is absent here is as for runs where runs have it too."""

    tasks: Int = Field(16, ge=1)  # of each stage, at once
    cpus: Int = Field(4, ge=1)  # of a task, a worker for each
    mem_gb: Float | None = Field(None, gt=0)  # of a task; a worker needs less than 1
    minutes: Int = Field(240, ge=1)  # the time limit of a task, which is put back into the queue when it is over
    partition: str | None = None
    constraint: str | None = None


class Slurm(Section):
    """Ranks on a SLURM cluster, one task for each. What is absent is left to the cluster's defaults."""

    kind: Literal["slurm"] = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    nodes: Int = Field(1, ge=1)
    spare_nodes: Int = Field(0, ge=0)  # asked for beside them, and used when one is found bad or fails
    ranks_per_node: Int | None = Field(None, ge=1)  # absent: one for each GPU, else one
    gpus_per_node: Int | None = Field(None, ge=1)
    cpus_per_rank: Int | None = Field(None, ge=1)
    mem_gb: Float | None = Field(None, gt=0)  # per node
    minutes: Int = Field(60, ge=1)  # the time limit of one attempt
    signal_lead_s: Int | None = Field(None, ge=1)  # how long before it the ranks are told to save; SLURM may be 60 s
    # early. Absent: from the time that the run's saves have taken
    constraint: str | None = None
    exclude: str | None = None  # nodes to avoid, as n[3-5],n9
    exclusive: Bool = False
    restart: Literal["requeue", "chain", "none"] = "requeue"  # chain: a successor is queued with each attempt
    restarts: Int = Field(20, ge=0)  # of one submission, after faults: preemption, lost nodes
    # and stops that have saved newer steps do not count. 0: none but after preemption and lost nodes
    crash_loop: Int = Field(3, ge=2)  # so many bad ends in a row without a newer checkpoint end the submission
    setup: list[str] = Field([])  # lines of shell before the ranks start: modules, environments
    python: str | None = None  # what starts Python in a rank, as `apptainer exec image.sif python`; absent: this one
    srun: list[str] = Field([])  # further arguments of srun
    sbatch: dict[str, str] = Field({})  # further parameters of sbatch by long name; the value `true` stands for none
    notice: Notice | None = None
    prep: Prep = Prep()

    @model_validator(mode="after")
    def _has_time(self) -> Slurm:
        if self.signal_lead_s is not None and self.signal_lead_s >= 60 * self.minutes:
            raise ValueError(
                f"signal_lead_s: expected less than the {60 * self.minutes} s of `minutes`, got {self.signal_lead_s}"
            )
        return self

    @model_validator(mode="after")
    def _excludes_in_one_place(self) -> Slurm:
        if "exclude" in self.sbatch:
            raise ValueError("sbatch: exclude: give launcher.exclude, to which a restart adds nodes that failed")
        return self

    @model_validator(mode="after")
    def _keeps_no_secret(self) -> Slurm:
        """The script is a file that SLURM shows to others: what it needs of secrets comes with the environment."""
        lists = {"setup": self.setup, "srun": self.srun, "sbatch": list(self.sbatch.values())}
        for name, texts in {**lists, "python": [self.python or ""]}.items():
            for text in texts:
                if found := secret_in(text):
                    raise ValueError(
                        f"{name}: holds a secret, {found}, and would be readable in the batch script; export it "
                        "before `launch submit` instead: SLURM hands the environment on"
                    )
        return self

    def show(self, job: Job) -> str:
        """The batch script, to the last byte."""
        return self._executor(job).script()

    def start(self, job: Job) -> int:
        """Queue the job and print its id. Raises SlurmError in SLURM's own words."""
        with alone(job.run_folder):
            return self._queue(job)

    def _queue(self, job: Job) -> int:
        job.write(self)
        snapshot(job.folder / CODE)
        try:
            number = self._executor(job).queue()
        except SlurmError:
            shutil.rmtree(job.folder)
            raise
        with (job.folder / JOBS).open("a") as jobs:  # the job may run by now, and have chained its successor
            jobs.write(f"{number}\n")
        print(number, flush=True)
        return 0

    def _executor(self, job: Job) -> _Executor:
        executor = _Executor(job.folder, self._body(job))
        limits = {"time": self.minutes, "nodes": self.nodes + self.spare_nodes, "ntasks_per_node": self._tasks()}
        signal = {"signal": f"{STOP_SIGNAL}@{self._lead_s(job.run_folder)}"}
        spare = {"no-kill": True} if self.spare_nodes else {}  # the others of an allocation outlive a lost node
        requeue = {"requeue" if self.restart == "requeue" else "no-requeue": True}
        output = {"output": str(job.folder / "%j.log")}
        extra = {name: True if value == "true" else value for name, value in self.sbatch.items()}
        executor.update_parameters(
            **limits,
            job_name=job.name,
            partition=self.partition,
            account=self.account,
            qos=self.qos,
            gpus_per_node=self.gpus_per_node,
            cpus_per_task=self.cpus_per_rank,
            mem=f"{round(self.mem_gb * 1024)}M" if self.mem_gb else None,
            constraint=self.constraint,
            exclude=self.exclude,
            exclusive=self.exclusive or None,
            setup=self.setup or None,
            wckey=None,
            stderr_to_stdout=True,
            use_srun=False,  # batch.sh has one of its own
            additional_parameters=signal | requeue | spare | output | extra,
        )
        return executor

    def prep_executor(self, folder: Path, name: str, stem: str, body: str, tasks: int, after: str | None) -> _Executor:
        """A job of `launch prep`, or an array of several `tasks`; `after` is what it depends on, as afterok:12:13."""
        executor = _Executor(folder, body)
        lead_s = min(self.signal_lead_s or LEAST_LEAD_S, 30 * self.prep.minutes)
        output = f"{stem}-%A_%a.log" if tasks > 1 else f"{stem}-%j.log"
        own = {"signal": f"B:{STOP_SIGNAL}@{lead_s}", "output": str(folder / output), "kill-on-invalid-dep": "yes"}
        requeue = {"requeue" if self.restart == "requeue" else "no-requeue": True}
        extra = {name: True if value == "true" else value for name, value in self.sbatch.items()}
        executor.update_parameters(
            time=self.prep.minutes,
            nodes=1,
            ntasks_per_node=1,
            array_parallelism=tasks,
            job_name=name,
            partition=self.prep.partition or self.partition,
            account=self.account,
            qos=self.qos,
            cpus_per_task=self.prep.cpus,
            mem=f"{round(self.prep.mem_gb * 1024)}M" if self.prep.mem_gb else None,
            constraint=self.prep.constraint or self.constraint,
            exclude=self.exclude,
            setup=self.setup or None,
            dependency=after,
            wckey=None,
            stderr_to_stdout=True,
            use_srun=False,
            additional_parameters=own | requeue | extra,
        )
        if tasks > 1:
            executor.parameters["map_count"] = tasks
        return executor

    def _lead_s(self, run_folder: Path) -> int:
        """Seconds from the signal to the end of the time: room for two saves, less than half of it all."""
        if self.signal_lead_s is not None:
            return self.signal_lead_s
        save_s = slowest_save_s(run_folder)
        lead_s = UNKNOWN_LEAD_S if save_s is None else max(LEAST_LEAD_S, round(2 * save_s) + 30)
        return min(lead_s, 30 * self.minutes)

    def _tasks(self) -> int:
        return self.ranks_per_node or self.gpus_per_node or 1

    def _body(self, job: Job) -> str:
        """The batch script below its #SBATCH lines: what batch.sh has to know, then batch.sh."""
        cpus = [f"--cpus-per-task={self.cpus_per_rank}"] if self.cpus_per_rank else []
        python = self.python or shlex.quote(sys.executable)
        known = [
            f"logs={shlex.quote(str(job.logs))}",
            f"submission={shlex.quote(str(job.folder))}",
            f"jobs={shlex.quote(str(job.folder / JOBS))}",
            f"code_folder={shlex.quote(str(job.folder / CODE))}",
            f"restart={self.restart}",
            f"max_restarts={self.restarts}",
            f"restarted='{' '.join(map(str, RESTARTED))}'",
            f"wanted={self.nodes}",
            f"tasks={self._tasks()}",
            f"threads={self.cpus_per_rank or 1}",
            f"python=({python})",
            f"srun_arguments=({shlex.join([*cpus, *self.srun])})",
            f"rank=({python} -P {shlex.join(job.arguments)})",
        ]
        return "\n".join([*known, "", BATCH.read_text()])


def slowest_save_s(run_folder: Path) -> float | None:
    """The longest of the run's newest saves, from its journal; None where it has none on record."""
    seconds: list[float] = []
    for branch in reversed(branch_files(run_folder)):
        if len(seconds) >= SAVES:
            break
        seconds = _save_seconds(run_folder, branch) + seconds
    return max(seconds[-SAVES:], default=None)


def _save_seconds(run_folder: Path, branch: int) -> list[float]:
    found = []
    for record, _ in records_after(run_folder, Cursor(branch)):
        if record.branch > branch:
            break
        if record.type == "checkpoint" and record.fields.get("status") == "ready" and "seconds" in record.fields:
            found.append(float(record.fields["seconds"]))
    return found


def secret_in(text: str) -> str | None:
    """The name of what looks like a secret spelled out in a line of shell, or None. `KEY=$OTHER` is none."""
    for name, value in re.findall(r"([\w.-]+)=(\S+)", text):
        if names_a_secret(name) and not value.strip("'\"").startswith("$"):
            return str(name)
    return "an address with credentials" if mask_text(text) != text else None


class SlurmError(Exception):
    """SLURM did not take the job. The message is one line: SLURM's own words, and what to do."""


class _Executor(submitit.SlurmExecutor):
    """submitit's executor for a shell command in the place of a pickled call."""

    def __init__(self, folder: Path, command: str) -> None:
        super().__init__(folder)
        self._command = command

    @classmethod
    def affinity(cls) -> int:
        """Usable also where SLURM is not: a script can be shown there, and sbatch says itself that it is missing."""
        return 2

    def script(self) -> str:
        return self._make_submission_file_text(self._command, uid="")

    def queue(self) -> str:
        """The id of the queued job. Raises SlurmError, which has sbatch's words."""
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                return str(self._submit_command(self._command).job_id)
        except (FileNotFoundError, FailedJobError, FailedSubmissionError) as error:
            raise SlurmError(_explain(error)) from None


REMEDIES = {
    "no such file or directory: 'sbatch'": "run it where SLURM's commands are, or use launcher.kind=local",
    "partition": "set launcher.partition; `sinfo` lists those of this cluster",
    "account": "set launcher.account; `sacctmgr show associations user=$USER` lists yours",
    "qos": "set launcher.qos; `sacctmgr show qos` lists those of this cluster",
    "job submit limit": "lower launcher.prep.tasks or wait for your other jobs; `sacctmgr show qos` lists the limits",
    "time limit": "lower launcher.minutes; `sinfo` shows the limit of each partition",
    "node count": "lower launcher.nodes; `sinfo` shows the size of each partition",
    "processors": "lower launcher.nodes, ranks_per_node or cpus_per_rank: see `sinfo -N -l`",
    "generic resource": "lower launcher.gpus_per_node; `sinfo -o '%N %G'` lists the GPUs of each node",
    "node configuration": "no node has the cores, GPUs or memory that launcher asks for: see `sinfo -N -l`",
    "contact": "SLURM's controller does not answer: try again later, `scontrol ping` tells",
}


def _explain(error: Exception) -> str:
    words = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    fitting = [remedy for words_of, remedy in REMEDIES.items() if words_of in words.lower()]
    return f"{words} -> {fitting[0]}" if fitting else f"sbatch refused the job: {words}"
