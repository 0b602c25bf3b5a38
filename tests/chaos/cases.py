"""The cases of training: one fault each, chosen by a seed, and the golden run that tells whether anything was lost."""

from __future__ import annotations

import random
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pretrain import checkpoint
from pretrain.guard import HUNG
from pretrain.track.journal import read_journal
from tests.chaos.fleet import Fleet
from tests.runs import TORCH, final_state, write_run, zero

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 80, 5
SETTINGS = (f"checkpoint.save_every_steps={EVERY}", "evaluation.every_steps=20", "guard.hang_timeout_s=10")
SHAPES = [(TORCH, 2), (zero(1), 2), (zero(3), 2), (TORCH, 4), (zero(2), 4)]
LONGEST_S = 300.0
MOST_ATTEMPTS = 40


@dataclass
class Result:
    """What became of a case. A loss is a trial after which something that a commit had promised was not there."""

    trials: int = 0
    losses: int = 0
    lost_steps: int = 0  # at most, in one trial: trained, and trained again
    recover_s: list[float] = field(default_factory=list)  # from the fault to the next attempt's first step
    problems: list[str] = field(default_factory=list)


class Room:
    """A folder for the runs of a session, with one golden run for every shape."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="longhaul-chaos-"))
        self._golden: dict[tuple[str, int], Path] = {}
        self.seconds: dict[tuple[str, int], float] = {}  # that a golden run took
        self._runs = 0

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, engine: str) -> Path:
        """The config of a new run; its corpora are those of all runs."""
        self._runs += 1
        return write_run(self.folder / f"{self._runs}", engine, STEPS)

    def golden(self, engine: str, ranks: int) -> Path:
        """The folder of a run that nothing happened to."""
        if (engine, ranks) not in self._golden:
            config = self.run(engine)
            fleet = Fleet(config, ranks, *SETTINGS)
            assert fleet.wait(LONGEST_S) and set(fleet.codes.values()) == {0}, fleet.text
            self._golden[engine, ranks] = config.parent
            self.seconds[engine, ranks] = time.time() - fleet.began
        return self._golden[engine, ranks]

    def problem(self, config: Path, engine: str, ranks: int) -> str:
        """How a finished run differs from the golden one, to the last bit; nothing where it does not."""
        (position, state), (wanted, golden) = final_state(config.parent), final_state(self.golden(engine, ranks))
        if position != wanted:
            return f"position {position}, expected {wanted}"
        return ", ".join(name for name in golden if not torch.equal(state[name], golden[name]))


def failpoints() -> list[str]:
    """Every failpoint that a run passes while it trains and saves."""
    sources = ["pretrain/checkpoint.py", "pretrain/attempt.py", "data_pipeline/shards.py"]
    names = [name for path in sources for name in re.findall(r'fail_at\(\s*"([\w.]+)"', (ROOT / path).read_text())]
    return sorted(set(names))


# --- one run through faults -----------------------------------------------------------------------------------------


def through(room: Room, engine: str, ranks: int, faults: Iterator[str | float], rng: random.Random) -> Result:
    """One run to its end: each attempt with the next fault, a failpoint or the seconds until a random rank is killed.

    When the faults are used up, the attempts are left alone.
    """
    result, config, fault_at = Result(), room.run(engine), 0.0
    for _ in range(MOST_ATTEMPTS):
        fault = next(faults, "")
        promised = _newest(config)
        reached = _reached(config)
        fleet = Fleet(config, ranks, *SETTINGS, fault=fault if isinstance(fault, str) else "")
        if isinstance(fault, float) and not fleet.wait(fault):
            fleet.kill(rng.randrange(ranks))
        if not fleet.wait(LONGEST_S):
            fleet.kill()
            fleet.wait(10)
            result.problems.append(f"hung with {fault}: {fleet.text[-500:]}")
        _look_back(result, config, fault_at, promised, reached)
        if set(fleet.codes.values()) == {0}:
            if difference := room.problem(config, engine, ranks):
                result.losses += 1
                result.problems.append(f"differs from the golden run: {difference}")
            shutil.rmtree(config.parent, ignore_errors=True)
            return result
        if fault:
            result.trials += 1
        elif not result.problems:
            result.problems.append(f"ended without a fault: {fleet.codes} {fleet.text[-1500:]}")
        fault_at = time.time()
    result.losses += 1
    result.problems.append(f"crash loop: {MOST_ATTEMPTS} attempts")
    return result


def _newest(config: Path) -> int:
    """The step of the newest checkpoint that is committed."""
    found = checkpoint.live_checkpoints(config.parent / "run")
    return checkpoint.open_checkpoint(found[0]).position.step if found else 0


def _reached(config: Path) -> int:
    return max((r.step for r in read_journal(config.parent / "run") if r.type == "step"), default=0)


def _look_back(result: Result, config: Path, fault_at: float, promised: int, reached: int) -> None:
    """What the attempt that has just ended shows of how it began: from where, and how long after the fault."""
    records = list(read_journal(config.parent / "run"))
    last = max((r.branch for r in records), default=0)
    begun = next((r for r in records if r.branch == last and r.type == "attempt"), None)
    if begun is None or begun.time < fault_at or not fault_at:
        return
    if begun.step < promised:
        result.losses += 1
        result.problems.append(f"went on from step {begun.step}, but step {promised} was committed")
    result.lost_steps = max(result.lost_steps, reached - begun.step)
    first = [r.time for r in records if r.branch == last and r.fields.get("kind") == "first_step"]
    result.recover_s += [round(first[0] - fault_at, 2)] if first else []


# --- the rows -------------------------------------------------------------------------------------------------------


def kills(room: Room, rng: random.Random) -> Result:
    """T1: SIGKILL of a random rank, at random times and at random failpoints, again and again until the run is done."""
    engine, ranks = rng.choice(SHAPES)
    room.golden(engine, ranks)
    names = [name for name in failpoints() if not name.startswith("train.")]

    def faults() -> Iterator[str | float]:
        step = 0
        for _ in range(8):
            rank = f"@{rng.randrange(ranks)}" if rng.random() < 0.5 else ""  # any rank that comes by, else
            kind = rng.choice(["time", "step", "point", "point"])
            if kind == "time":
                yield rng.uniform(0.1, 0.6) * room.seconds[engine, ranks]
            elif kind == "step":
                step = min(step + rng.randrange(1, 16), STEPS - 1)
                yield f"train.step{rank}#{step}=kill"
            else:
                yield f"{rng.choice(names)}{rank}#{rng.randrange(1, 4)}=kill"

    return through(room, engine, ranks, faults(), rng)


def every_failpoint(room: Room, rng: random.Random) -> Result:
    """T3: a kill at one failpoint, at its first, second and third passage."""
    name, rank = rng.choice(failpoints()), rng.randrange(2)
    return through(room, TORCH, 2, iter([f"{name}@{rank}#{n}=kill" for n in (1, 2, 3)]), rng)


def torn(room: Room, rng: random.Random) -> Result:
    """T2: one rank is slow in a save while the other has written, then all are killed."""
    slow, place = rng.randrange(2), rng.choice(["checkpoint.begun", "checkpoint.written", "checkpoint.verified"])
    result, config = Result(trials=1), room.run(TORCH)
    fleet = Fleet(config, 2, *SETTINGS, fault=f"{place}@{slow}#2=sleep:600")  # the first save is that of step 0
    written = f".tmp-step-{EVERY}.b1/rank-{1 - slow}-of-2.json"
    deadline = time.monotonic() + LONGEST_S
    while not (config.parent / "run" / "checkpoints" / written).exists() and time.monotonic() < deadline:
        fleet.wait(0.05)
    fleet.wait(rng.uniform(0, 0.3))
    fleet.kill()
    fleet.wait(30)
    promised = _newest(config)
    after = through_again(room, config, TORCH, 2)
    if promised:
        after.problems.append(f"the torn step {promised} was committed")
    return _joined(result, after)


def damaged(room: Room, rng: random.Random) -> Result:
    """T5: a flipped bit, a cut, a missing or an empty file in the newest checkpoint of a finished run."""
    engine, ranks = rng.choice(SHAPES[:3])
    config = room.run(engine)
    shutil.rmtree(config.parent)
    shutil.copytree(room.golden(engine, ranks), config.parent)
    text = config.read_text().replace(str(room.golden(engine, ranks)), str(config.parent))
    for path in (config, config.parent / "run" / "run.yaml"):
        path.write_text(path.read_text().replace(str(room.golden(engine, ranks)), str(config.parent)))
    config.write_text(text)
    newest = checkpoint.live_checkpoints(config.parent / "run")[0]
    victim = rng.choice(sorted(path for path in newest.iterdir() if path.stat().st_size))
    how = rng.choice(["flip", "flip", "flip", "cut", "missing", "empty"])
    data = bytearray(victim.read_bytes())
    place = rng.randrange(len(data))
    if how == "flip":
        data[place] ^= 1 << rng.randrange(8)
    if how == "missing":
        victim.unlink()
    else:
        victim.write_bytes(b"" if how == "empty" else data if how == "flip" else data[:place])
    fleet = Fleet(config, ranks, *SETTINGS)
    fleet.wait(LONGEST_S)
    result = Result(trials=1)
    if victim.name not in fleet.text:
        result.problems.append(f"{how} in {victim.name} at {place}: not named")
    if "(5 steps lost)" not in fleet.text and victim.name != "MANIFEST.json":
        result.problems.append(f"{how} in {victim.name}: the steps lost were not said")
    problem = room.problem(config, engine, ranks) if set(fleet.codes.values()) == {0} else f"{fleet.codes} {fleet.text}"
    if problem:
        result.losses += 1
        result.problems.append(f"{how} in {victim.name} at {place}: {problem}")
    shutil.rmtree(config.parent, ignore_errors=True)
    return result


def full_disk(room: Room, rng: random.Random) -> Result:
    """T4: no space at a random write of a save; with the policy to stop, the run stops, and then goes on."""
    name = rng.choice(["checkpoint.writing", "checkpoint.written", "file.written", "checkpoint.manifest_written"])
    error = rng.choice(["ENOSPC", "EIO", "EDQUOT"])
    fault = f"{name}@{rng.randrange(2)}#{rng.randrange(3, 6)}={error}"
    return through(room, TORCH, 2, iter([fault]), rng)


def stopped(room: Room, rng: random.Random) -> Result:
    """T12: SIGSTOP of a rank at a random step: the watchdog of the others ends them with exit 4."""
    rank, step = rng.randrange(2), rng.randrange(2, STEPS - 2)
    config, result = room.run(TORCH), Result(trials=1)
    fleet = Fleet(config, 2, *SETTINGS, fault=f"train.step@{rank}#{step}=stop")
    fleet.wait(LONGEST_S)
    if fleet.codes != {rank: -9, 1 - rank: HUNG}:
        result.problems.append(f"exit codes {fleet.codes}, expected {HUNG} of rank {1 - rank}: {fleet.text[-1500:]}")
    if f"hang: rank {rank} (" not in fleet.text:
        result.problems.append(f"rank {rank} was not named")
    return _joined(result, through_again(room, config, TORCH, 2))


def through_again(room: Room, config: Path, engine: str, ranks: int) -> Result:
    """Go on after a fault, undisturbed, to the end."""
    result, fault_at, promised, reached = Result(), time.time(), _newest(config), _reached(config)
    fleet = Fleet(config, ranks, *SETTINGS)
    fleet.wait(LONGEST_S)
    _look_back(result, config, fault_at, promised, reached)
    problem = room.problem(config, engine, ranks) if set(fleet.codes.values()) == {0} else f"{fleet.codes} {fleet.text}"
    if problem:
        result.losses += 1
        result.problems.append(problem)
    shutil.rmtree(config.parent, ignore_errors=True)
    return result


def _joined(first: Result, second: Result) -> Result:
    return Result(
        first.trials + second.trials, first.losses + second.losses, max(first.lost_steps, second.lost_steps),
        first.recover_s + second.recover_s, first.problems + second.problems,
    )  # fmt: skip
