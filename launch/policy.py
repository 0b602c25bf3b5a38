"""The one policy of both launchers: from what is recorded of a submission's attempts, what follows an end.

Pure: it reads nothing, asks nobody and imports nothing heavy, so that a batch shell can call it in a moment. Attempts
are taken in the order of their numbers; no clock decides anything but whether the allocation lasts long enough.

A run comes back after a failure, a hang, a stop that was asked of it from outside, preemption, the end of its time and
the loss of a node; not after what would only repeat itself (a mistake in the config, too little memory, a guard that
gave up), not when it was stopped on purpose, not over its budget, and not from a crash loop: `crash_loop` bad ends in a
row between which no newer checkpoint was committed. The budget is for faults: an orderly stop, or the end of its time,
costs a restart only where no newer checkpoint was committed since the end before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from launch.attempts import Attempt
from pretrain.guard import (
    CRASH_LOOP,
    DONE,
    FAILED,
    GAVE_UP,
    HUNG,
    INTERRUPTED,
    OUT_OF_MEMORY,
    STOPPED,
    TAKEN_OVER,
    USAGE,
)

# how SLURM had a part in an end; `itself`: none
Cause = Literal["itself", "preempted", "requeued", "time limit", "node failure", "cancelled", "lost"]
FREE: tuple[Cause, ...] = ("preempted", "requeued", "node failure")  # nobody's fault: neither budget nor crash loop
GOOD = (DONE, STOPPED, USAGE, TAKEN_OVER, GAVE_UP, INTERRUPTED)  # any other code is that of a fault
FINAL = {
    USAGE: "a mistake in the configuration",
    OUT_OF_MEMORY: "out of memory, as the next start would be",
    TAKEN_OVER: "another attempt goes on",
    GAVE_UP: "the guard gave up",
    INTERRUPTED: "interrupted",
}
TELLING = (GAVE_UP, OUT_OF_MEMORY, USAGE, TAKEN_OVER, HUNG, INTERRUPTED, FAILED, STOPPED, DONE)  # the first one counts
FAILURES_OF_A_NODE = 2  # after which it is left out


@dataclass(frozen=True)
class Rules:
    """What the launcher's settings say."""

    restart: Literal["requeue", "chain", "none", "here"]  # here: on this machine
    restarts: int
    crash_loop: int
    nodes: int = 1


@dataclass(frozen=True)
class End:
    """How an attempt ended. `exit_code` is None where nobody saw it."""

    exit_code: int | None
    cause: Cause = "itself"
    words: str = ""  # of the rank that failed first
    step: int = -1  # of the newest live checkpoint
    failed_nodes: tuple[str, ...] = ()
    requeued: bool = False  # SLURM has put the job back into its queue, whatever the cause
    stop: bool = False  # `launch stop` was asked for
    good_nodes: tuple[str, ...] = ()  # of this allocation, those not down; empty where it is over
    time_left: bool = True  # the allocation lasts long enough for another attempt
    successor: str = ""  # the job that is queued to follow, under chain


@dataclass(frozen=True)
class Decision:
    """What follows. `by`: here (in this allocation), requeue, successor, submit, slurm (knows it), or nobody."""

    action: Literal["done", "restart", "stop"]
    exit_code: int
    why: str  # one line
    by: Literal["here", "requeue", "successor", "submit", "slurm", ""] = ""
    exclude: tuple[str, ...] = ()


def verdict(codes: Sequence[int], ranks: int) -> int:
    """The exit code of an attempt from those of ranks that ended by themselves: the one that tells most.

    A mistake in the configuration is every rank's. What some ranks alone call one is a fault of where they run: a file
    that is late there, or missing (SLURM gives ENOENT, 2 as well, for a program that it does not find).
    """
    if USAGE in codes and list(codes) != [USAGE] * ranks:
        codes = [FAILED if code == USAGE else code for code in codes]
    known = [code for code in TELLING if code in codes]
    return known[0] if known and known[0] != DONE else max(codes, default=FAILED)


def excluded(attempts: Sequence[Attempt]) -> tuple[str, ...]:
    """Nodes that the next start leaves out: named by a preflight once, failed or suspected in two attempts."""
    times, unfit = Counter[str](), set[str]()
    for attempt in attempts:
        suspects = attempt.suspects()
        unfit |= {node for node, cause in suspects if cause.startswith("preflight")}
        times.update({*attempt.failed_nodes(), *(node for node, _ in suspects)})
    return tuple(sorted(unfit | {node for node, count in times.items() if count >= FAILURES_OF_A_NODE}))


def in_crash_loop(steps_of_bad_ends: Sequence[int], rules: Rules) -> bool:
    """Whether the last bad ends, each with the newest checkpoint's step, show no progress."""
    last = steps_of_bad_ends[-rules.crash_loop :]
    return len(last) == rules.crash_loop and last[-1] <= last[0]


def is_bad(code: int | None, cause: str) -> bool:
    """Whether an end counts towards a crash loop."""
    return cause == "lost" or (cause == "itself" and code is not None and code not in GOOD)


def costs_restart(code: int | None, cause: str, step: int, before: int) -> bool:
    """Whether coming back from an end is paid from the budget. `step`, `before`: of the newest checkpoint at this end
    and at the one before it, -1 where there was none."""
    return cause not in FREE and (is_bad(code, cause) or step <= before)


def decide(end: End, attempts: Sequence[Attempt], rules: Rules) -> Decision:
    """What follows the last of `attempts`, those of one submission, which has just ended."""
    earlier = [attempt for attempt in attempts if attempt.ended]
    code = end.exit_code if end.exit_code is not None else STOPPED if end.cause in FREE else FAILED
    exclude = () if rules.restart == "here" else excluded(attempts)
    words = f" ({end.words})" if end.words and end.cause in ("itself", "lost") and code not in GOOD else ""

    def stop(why: str, code: int = code) -> Decision:
        return Decision("stop", code, f"{why}{words}", exclude=exclude)

    if code == DONE and end.cause != "node failure":
        return Decision("done", DONE, "done")
    if end.stop:
        return stop("stopped on request, not to be started again")
    if end.cause == "cancelled":
        return stop("cancelled, not to be started again")
    if code in FINAL and end.cause != "node failure":
        return stop(f"not to be started again: {FINAL[code]}")
    if rules.restart == "none":
        return stop("not to be started again: restart is none")
    bad = [int(a.ended.get("step", -1)) for a in earlier if is_bad(a.ended.get("exit_code"), a.ended.get("cause", ""))]
    if is_bad(code, end.cause) and in_crash_loop([*bad, end.step], rules):
        where = f"no checkpoint since step {end.step}" if end.step >= 0 else "not one checkpoint"
        return stop(f"crash loop: {rules.crash_loop} bad ends in a row, {where}", CRASH_LOOP)
    steps = [-1, *(int(attempt.ended.get("step", -1)) for attempt in earlier)]
    spent = sum(
        a.ended.get("action") == "restart"
        and costs_restart(a.ended.get("exit_code"), a.ended.get("cause", ""), step, before)
        for a, (before, step) in zip(earlier, pairwise(steps), strict=True)
    )
    costs = costs_restart(code, end.cause, end.step, steps[-1])
    if end.cause in FREE:
        restart = end.cause + (f" of {', '.join(end.failed_nodes)}" if end.failed_nodes else "")
    elif rules.restarts == 0 or (costs and spent >= rules.restarts):
        return stop(f"not started again after {spent} restarts")
    elif not costs:
        restart = f"saved step {end.step}"
    else:
        restart = f"restart {spent + 1} of {rules.restarts}"
    return _restart(end, rules, exclude, restart, words, code)


def _restart(end: End, rules: Rules, exclude: tuple[str, ...], restart: str, words: str, code: int) -> Decision:
    """The way back: at once where the allocation has what it takes, else through the queue."""
    without = f", without {', '.join(exclude)}" if exclude else ""

    def again(why: str, by: Literal["here", "requeue", "successor", "submit", "slurm"]) -> Decision:
        return Decision("restart", code, f"{why} ({restart}){without}{words}", by, exclude)

    nodes = tuple(node for node in end.good_nodes if node not in exclude)[: rules.nodes]
    if rules.restart == "here":
        return again("starting again", "here")
    if end.requeued or end.cause == "requeued":
        return again("requeued by SLURM", "slurm")
    if end.cause in ("itself", "node failure") and code != STOPPED and len(nodes) == rules.nodes and end.time_left:
        return again(f"starting again at once on {', '.join(nodes)}", "here")
    if rules.restart == "requeue":
        return again("to be requeued", "requeue")
    if end.successor:
        return again(f"goes on as job {end.successor}", "successor")
    return again("goes on as another job", "submit")
