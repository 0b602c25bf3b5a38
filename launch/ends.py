"""How attempts end, on record: end.json of those that end now, and of those whose launcher could not write it."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from launch.attempts import Attempt, newest_step, read_attempts, same_submission
from launch.notice import tell
from launch.policy import Cause, Decision, End, Rules, decide
from pretrain.guard import CRASH_LOOP


def record(attempt: Attempt, end: End, decision: Decision) -> bool:
    """Write end.json; False where another launcher has, which is then the one that acts."""
    unseen = end.exit_code is None and decision.exit_code != CRASH_LOOP
    return attempt.end(
        {
            "exit_code": None if unseen else decision.exit_code,
            "why": decision.why,
            "action": decision.action,
            "cause": end.cause,
            "step": end.step,
            "ended": time.time(),
            "failed_nodes": list(end.failed_nodes),
            "exclude": list(decision.exclude),
        }
    )


def close_lost(run_folder: Path, rules: Rules, job: str | None = None, dead: Collection[str] = ()) -> list[str]:
    """End every attempt that has no end; none of them can live when their successor begins. A line for each.

    An attempt of the same `job` was put back into the queue by SLURM; `dead` are the nodes that SLURM calls down.
    """
    lines = []
    for attempt in read_attempts(run_folder / "logs"):
        if attempt.ended:
            continue
        down = tuple(node for node in attempt.nodes if node in dead)
        same = job is not None and attempt.begun.get("job") == job
        cause: Cause = "node failure" if down else "requeued" if same else "lost"
        why = {"node failure": f"lost with {', '.join(down)}", "requeued": "put back into the queue by SLURM"}.get(
            cause, "its launcher ended without a word"
        )
        end = End(None, cause, why if cause == "lost" else "", newest_step(run_folder), failed_nodes=down)
        siblings = same_submission(read_attempts(run_folder / "logs"), attempt.submission)
        decision = decide(end, [a for a in siblings if a.number <= attempt.number], rules)
        if decision.action == "restart":  # it is being started again
            decision = replace(decision, by="slurm", why=why)
        if record(attempt, end, decision):
            lines += [f"attempt {attempt.number} was lost: {decision.why}", *tell(attempt, decision, end.exit_code)]
    return lines
