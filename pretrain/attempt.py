"""An attempt, one start of a run on one rank: what the loop works with, and what its ranks agree on."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from data_pipeline.stream import Batch, Stream, Validation
from pretrain import checkpoint, guard
from pretrain.checkpoint import Position, Saver
from pretrain.engine import Engine, Outcome
from pretrain.evaluate import validation_losses
from pretrain.guard import StopSignals
from pretrain.lineage import TakenOver
from pretrain.meter import Meter, duration
from pretrain.ranks import Pending, Ranks
from pretrain.run import TrainRun
from pretrain.segments import Course
from pretrain.track import Journal, Trackers

log = logging.getLogger("pretrain")


@dataclass
class Attempt:
    """One start of a run on one rank: everything that the loop works with, and where it is."""

    run: TrainRun
    ranks: Ranks
    course: Course
    engine: Engine
    stream: Stream
    validation: dict[str, Validation]
    saver: Saver
    journal: Journal | None  # rank 0's
    trackers: Trackers | None
    position: Position  # `digest` as it was when the attempt began
    meter: Meter
    digest_share: int = 0  # of what this rank has fed in this attempt
    board: Board = field(init=False)

    def __post_init__(self) -> None:
        self.board = Board(self)

    def feed(self, batch: Batch) -> list[Any]:
        """A batch's micro-batches, on the device."""
        device, objective = self.ranks.device, self.run.objective
        tokens = torch.from_numpy(batch.tokens).to(device, non_blocking=True)
        valid = torch.from_numpy(batch.valid).to(device, non_blocking=True)
        return [objective.batch(t, v) for t, v in zip(tokens, valid, strict=True)]

    def advance(self, batch: Batch) -> None:
        """The batch is consumed."""
        step = batch.step + 1
        self.digest_share = (self.digest_share + batch.digest) % 2**128
        self.position = Position(step, self.course.steps.start(step), self.course.tokens(step), self.position.digest)

    def evaluate(self) -> None:
        """Measure the validation loss of every corpus."""
        begun = time.perf_counter()
        rows = self.run.micro_batch_seqs
        metrics = validation_losses(self.engine, self.run.objective, self.validation, self.ranks, rows)
        self.meter.aside(time.perf_counter() - begun)
        if self.journal is not None and metrics:
            self.journal.evaluation(self.position.step, self.position.tokens, metrics)
            losses = "  ".join(f"{k.split('/')[1]} {v:.4f}" for k, v in metrics.items() if k.endswith("/loss"))
            log.info("step %d  validation loss  %s", self.position.step, losses)

    def save(self) -> None:
        """Begin a checkpoint of this position, unless it has one."""
        if self.saver.last_step == self.position.step:
            return
        self.pending()
        held_up = self.saver.save(self.engine.state(), self.position, self.digest_share)
        self.meter.aside(held_up)

    def pending(self) -> None:
        """Say that a checkpoint of this position is being written."""
        if self.journal is not None:
            folder = self.run.run_folder / "checkpoints" / checkpoint.folder_name(self.position.step, self.saver.branch)
            self.journal.checkpoint(self.position.step, "pending", str(folder), None)

    def end(self, code: int, why: str) -> int:
        """Wait for the save in flight, say how it ended, and give the exit code."""
        self.board.flush(self)
        code, why = self._finish_save(code, why)
        if self.journal is not None:
            self.journal.end(self.position.step, code, why)
            log.info("%s at step %d (exit %d)", why, self.position.step, code)
        return code

    def _finish_save(self, code: int, why: str) -> tuple[int, str]:
        failed: tuple[int, str] | None = None
        try:
            self.saver.wait()
        except TakenOver as error:
            failed = guard.TAKEN_OVER, str(error)
        except Exception as error:
            failed = guard.FAILED, str(error)
        failures = [f for f in self.ranks.gather(failed) if f is not None]
        return failures[0] if failures else (code, why)


@dataclass(frozen=True)
class Verdict:
    """What the ranks agreed on: an exit code, or None to go on."""

    exit_code: int | None = None
    why: str = ""

    @property
    def saves(self) -> bool:
        """The attempt ends with a checkpoint of where it is."""
        return self.exit_code in (guard.STOPPED, guard.INTERRUPTED)


class Board:
    """What ranks tell each other every step: loss, digest, wishes to stop. Summed beside the next step, then read."""

    LIMB = 2**32  # digests travel as four limbs, which float64 adds up exactly

    def __init__(self, attempt: Attempt) -> None:
        self.last: tuple[Pending, dict[str, float], Position] | None = None
        self.digest = int(attempt.position.digest, 16)
        self.error = ""  # of this rank's last save

    def post(
        self, a: Attempt, outcome: Outcome, lr: float, stop: StopSignals, seconds: float, waited: float
    ) -> Verdict:
        """Post this step, and read the one before."""
        verdict = self.flush(a)
        error = a.saver.poll()
        if error is not None:
            self.error = str(error)
            log.warning("%s", error)
        code = stop.exit_code
        flags = [
            float(code == guard.STOPPED),
            float(code == guard.INTERRUPTED),
            float(isinstance(error, TakenOver)),
            float(error is not None and not isinstance(error, TakenOver)),
        ]
        limbs = [float(a.digest_share >> (32 * i) & (self.LIMB - 1)) for i in range(4)]
        values = torch.tensor([outcome.loss, *flags, *limbs], dtype=torch.float64)
        local = {
            "lr": lr,
            "grad_norm": outcome.grad_norm,
            "applied": float(outcome.applied),
            "seconds": seconds + waited,
            "waited": waited,
        }
        self.last = (a.ranks.sum_later(values), local, a.position)
        return verdict

    def flush(self, a: Attempt) -> Verdict:
        """Read what was posted last: write it down, and what follows from it."""
        if self.last is None:
            return Verdict()
        (pending, local, position), self.last = self.last, None
        loss, stopped, interrupted, taken_over, failed, *limbs = pending.result().tolist()
        digest = (int(a.position.digest, 16) + sum(int(v) << (32 * i) for i, v in enumerate(limbs))) % 2**128
        tokens = position.tokens - a.course.tokens(position.step - 1)
        a.meter.step(tokens, local["seconds"], local["waited"])
        self._write(a, position, loss, local, f"{digest:032x}")
        if taken_over:
            return Verdict(guard.TAKEN_OVER, self.error or "another attempt has taken over this run")
        if interrupted:
            return Verdict(guard.INTERRUPTED, "interrupted and saved")
        if stopped:
            return Verdict(guard.STOPPED, "stopped and saved, to be started again")
        if failed and a.run.checkpoint.on_error == "stop":
            return Verdict(guard.FAILED, self.error or "a checkpoint could not be saved")
        return Verdict()

    def _write(self, a: Attempt, position: Position, loss: float, local: dict[str, float], digest: str) -> None:
        every = a.run.log_every_steps
        if a.journal is None or (position.step % every and position.step != a.course.end_step and local["applied"]):
            return
        left = a.course.tokens(a.course.end_step) - position.tokens
        speed = a.meter.read(left)
        metrics = {
            "loss": loss,
            "lr": local["lr"],
            "grad_norm": local["grad_norm"],
            "tokens_per_s": speed.tokens_per_s,
            "data_wait": speed.data_wait,
        } | ({} if speed.mfu is None else {"mfu": speed.mfu})
        a.journal.step(position.step, position.samples, position.tokens, digest, metrics)
        mfu = "" if speed.mfu is None else f"  MFU {speed.mfu:.1%}"
        skipped = "" if local["applied"] else "  SKIPPED: the gradient is not finite"
        log.info(
            "step %d/%d  loss %.4f  lr %.2e  grad %.3f  %s tok/s%s  data wait %.1f%%  ETA %s%s",
            position.step, a.course.end_step, loss, local["lr"], local["grad_norm"], f"{speed.tokens_per_s:,.0f}", mfu,
            100 * speed.data_wait, duration(speed.eta_s), skipped,
        )  # fmt: skip
