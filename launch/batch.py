"""What the batch shell asks before and after each attempt: `python -m launch.batch begin|end SUBMISSION`.

The shell asks SLURM and hands the answers in by the environment, so that this runs also where SLURM's commands are
not, in a container as the ranks do. The answer is shell on stdout: assignments that batch.sh evaluates. What people
read goes to stderr, the job's log.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from launch.attempts import BEGUN, STOP, Attempt, newest_step, read_attempts, same_submission, write_once
from launch.ends import close_lost, record
from launch.job import new_folder
from launch.notice import tell
from launch.policy import Cause, End, Rules, decide, excluded, verdict
from pretrain.guard import FAILED, STOPPED

LEAST_LEFT_S = 600  # of an allocation, for another attempt in it


class Batch:
    """The job of a batch shell, as its environment and its submission's folder describe it."""

    def __init__(self, submission: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.environment = submission, environment
        self.run_folder = submission.parents[1]
        self.settings: dict[str, Any] = yaml.safe_load((submission / "launcher.yaml").read_text())
        names = ("restart", "restarts", "crash_loop", "nodes")
        self.rules = Rules(**{name: self.settings[name] for name in names})
        self.job = environment["SLURM_JOB_ID"]
        self.dead = set(environment.get("dead", "").split())  # nodes that SLURM calls down or not responding

    def attempts(self) -> list[Attempt]:
        """Those of this submission."""
        return same_submission(read_attempts(self.run_folder / "logs"), int(self.folder.name))

    def good_nodes(self) -> tuple[str, ...]:
        """The nodes of this allocation that are not down."""
        return tuple(node for node in self.environment.get("nodes", "").split() if node not in self.dead)

    def begin(self) -> dict[str, Any]:
        """Take an attempt, or say why there is to be none."""
        for line in close_lost(self.run_folder, self.rules, self.job, self.dead):
            _say(line)
        attempts = self.attempts()
        exclude = excluded(attempts)
        last = next((attempt.ended for attempt in reversed(attempts)), {})
        if (self.folder / STOP).exists():
            return self._none(STOPPED, "stopped on request before it began")
        if last.get("action") == "stop":
            why = f"attempt {attempts[-1].number} ended for good: {last.get('why')}; submit the run once more"
            return self._none(int(last.get("exit_code") or FAILED), why)
        nodes = [node for node in self.good_nodes() if node not in exclude][: self.rules.nodes]
        if len(nodes) < self.rules.nodes:
            _say(f"{len(nodes)} nodes of this allocation can be used, {self.rules.nodes} are needed: back to the queue")
            by = {"requeue": "requeue", "chain": "submit"}.get(self.rules.restart, "")
            return {"action": "restart", "by": by, "exclude": self._exclude(exclude), "code": STOPPED}
        folder = new_folder(self.run_folder / "logs", "attempt-")
        number = int(folder.name.removeprefix("attempt-"))
        tasks = int(self.environment["tasks"])
        write_once(folder / BEGUN, {
            "attempt": number, "launcher": "slurm", "job": self.job, "submission": int(self.folder.name),
            "restarts": len(attempts), "nodes": nodes, "ranks": tasks * len(nodes), "began": time.time(),
            "queued": float(queued) if (queued := self.environment.get("queued")) else None,
            "host": socket.gethostname(), "pid": int(self.environment["shell"]),
        })  # fmt: skip
        return {"action": "run", "attempt": number, "ranks_on": ",".join(nodes)}

    def end(self, number: int) -> dict[str, Any]:
        """Record how an attempt ended, and say what follows."""
        attempts = [attempt for attempt in self.attempts() if attempt.number <= number]
        attempt = attempts[-1]
        code = int(self.environment["code"])
        cause = find_cause(attempt, self.environment, self.folder / f"{self.job}.log")
        if code > 128 or attempt.exit_codes():  # srun's own code is that of a signal, or the highest
            code = verdict(attempt.exit_codes(), attempt.begun["ranks"])
        left = float(self.environment.get("LONGHAUL_END_TIME") or "inf") - time.time()
        self.dead |= set(attempt.failed_nodes())
        end = End(
            code, cause, attempt.last_words(), newest_step(self.run_folder),
            failed_nodes=tuple(dict.fromkeys([*attempt.failed_nodes(), *(n for n in attempt.nodes if n in self.dead)])),
            requeued=requeued(self.environment), stop=(self.folder / STOP).exists(),
            good_nodes=self.good_nodes(), time_left=left > LEAST_LEFT_S,
            successor=self.environment.get("next", ""),
        )  # fmt: skip
        decision = decide(end, attempts, self.rules)
        if not record(attempt, end, decision):
            _say(f"attempt {number} was taken for lost, and another goes on: leaving everything to it")
            return {"action": "stop", "by": "slurm", "code": code}
        _say(f"attempt {number} ended with exit {decision.exit_code}: {decision.why}")
        for line in tell(attempt, decision, end.exit_code):
            _say(line)
        return {
            "action": decision.action,
            "by": decision.by,
            "code": decision.exit_code,
            "exclude": self._exclude(decision.exclude),
        }

    def _none(self, code: int, why: str) -> dict[str, Any]:
        _say(f"no attempt begins: {why}")
        return {"action": "stop", "by": "", "code": code, "exclude": ""}

    def _exclude(self, nodes: Sequence[str]) -> str:
        """For SLURM: nodes found bad, and those that the user avoids."""
        return ",".join([*([self.settings["exclude"]] if self.settings.get("exclude") and nodes else []), *nodes])


def requeued(environment: Mapping[str, str]) -> bool:
    """Whether SLURM has put the job back: it counts a restart as soon as it decides on it."""
    return int(environment.get("job_restarts") or 0) > int(environment.get("SLURM_RESTART_COUNT") or 0)


def find_cause(attempt: Attempt, environment: Mapping[str, str], log: Path) -> Cause:
    """Which part SLURM had in an end, from what it says of the job, and from what it left in the logs.

    A job that SLURM ends is COMPLETING by now; in the grace time of a preemption it still is RUNNING.
    """
    get = environment.get
    if requeued(environment):
        return "node failure" if attempt.failed_nodes() else "requeued"
    if attempt.failed_nodes():
        return "node failure"
    if get("job_state", "") in ("", "RUNNING"):
        preempted = get("job_preempted", "None") not in ("", "None")
        return "preempted" if preempted else "requeued" if get("told") and not get("job_state") else "itself"
    why = attempt.cancelled_for(log)
    if get("job_reason") == "TimeLimit" or why.startswith("TIME LIMIT"):
        return "time limit"
    if why.startswith("NODE FAILURE"):
        return "node failure"
    return "preempted" if why.startswith("PREEMPTION") else "cancelled"


def _say(message: str) -> None:
    print(f"{time.strftime('%F %T')} launch: job {os.environ.get('SLURM_JOB_ID')}: {message}", file=sys.stderr)


def main(arguments: Sequence[str]) -> int:
    verb, submission, *rest = arguments
    batch = Batch(Path(submission), os.environ)
    answer = batch.begin() if verb == "begin" else batch.end(int(rest[0]))
    print("\n".join(f"{name}={shlex.quote(str(value))}" for name, value in answer.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
