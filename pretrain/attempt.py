"""An attempt, one start of a run on one rank: what the loop works with, and what follows from what the ranks read."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch

from configs import ConfigError
from data_pipeline.failpoints import fail_at, spoil
from data_pipeline.order import cut
from data_pipeline.shards import ShardError, Shards
from data_pipeline.stream import Batch, Stream, Validation
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.trace import documents_of
from pretrain import checkpoint, guard, replicas
from pretrain.board import Board, Notice, Reading
from pretrain.checkpoint import Committed, Position, Saver
from pretrain.engine import Engine, Outcome, Tally
from pretrain.evaluate import measuring, task_scores, validation_losses
from pretrain.guard import SkippedSteps, Spikes, StopSignals
from pretrain.lineage import TakenOver
from pretrain.memory import GIB, used_bytes
from pretrain.meter import BySource, Ledger, Meter, duration
from pretrain.models.gpt import GPT
from pretrain.noise import Noise
from pretrain.optim import Rates
from pretrain.profile import Profiler
from pretrain.ranks import Ranks
from pretrain.run import TrainRun
from pretrain.samples import write_samples
from pretrain.segments import Course
from pretrain.stragglers import Stragglers
from pretrain.suspects import accuse
from pretrain.together import Abandoned, Poll, Together
from pretrain.track import Journal, SystemMetrics, Trackers
from pretrain.watchdog import Watchdog

T = TypeVar("T")

log = logging.getLogger("pretrain")

MOST_DOCUMENTS = 1000  # whose ids a record of the journal holds
NAMES_S = 60.0  # for finding them, at most
HURRIED_S = 2.0  # the same where the process is asked to stop
CLOSE_S = 10.0  # for the trackers to end, when the process was asked to stop


@dataclass(frozen=True)
class Ending:
    """Why an attempt ends. `bad_steps`: first and last step of those that a rollback is to skip."""

    exit_code: int
    why: str
    saves: bool = False  # with a checkpoint of where it is
    bad_steps: tuple[int, int] | None = None


OUT_OF_TIME = "stopped without a save, for which the time left is too short"
STOPS = {
    guard.STOPPED: Ending(guard.STOPPED, "stopped and saved, to be started again", saves=True),
    guard.INTERRUPTED: Ending(guard.INTERRUPTED, "interrupted and saved", saves=True),
}


def _besides(method: Callable[[Attempt], T]) -> Callable[[Attempt], T]:
    """What is done between steps, which a profile of the steps leaves out."""

    @functools.wraps(method)
    def left_out(self: Attempt) -> T:
        with self.profiler.besides():
            return method(self)

    return left_out


@dataclass
class Attempt:
    """One start of the run on one rank: everything that the loop works with, and where it is."""

    run: TrainRun
    ranks: Ranks
    stop: StopSignals
    watchdog: Watchdog
    course: Course
    engine: Engine
    stream: Stream
    validation: dict[str, Validation]
    saver: Saver
    journal: Journal | None  # rank 0's
    trackers: Trackers | None
    position: Position  # `digest` as it was when the attempt began
    meter: Meter
    evaluated: bool  # this position has been, by an older attempt
    guard_state: dict[str, Any]  # as the checkpoint had it
    save_s: float | None = None  # what the last save took, from begin to commit; known to rank 0
    tokenizer: Tokenizer | None = None  # of the corpora, where evaluations in training need it
    ended: Ending | None = None
    digest_share: int = 0  # of what this rank has fed in this attempt
    ledger: Ledger = field(default_factory=Ledger)
    last_read: Reading | None = None
    system: SystemMetrics | None = None  # of this node, on one of its ranks

    def __post_init__(self) -> None:
        spikes = Spikes(self.run.guard, self.guard_state.get("spikes"))
        self.skipped = SkippedSteps(self.run.guard, int(self.guard_state.get("skipped_in_a_row", 0)))
        self.board = Board(self.ranks, self.position, spikes)
        self.stragglers = Stragglers(self.ranks.size, self.run.guard.slow_rank_factor)
        self.first_step = self.position.step
        self.save_error = ""
        self._data_s = 0.0  # of the wait for the last batch, what this rank's own storage took
        self._targets: tuple[int, ...] = ()  # of this rank in the step just made, by source
        self.profiler = Profiler(self.run.profile, self.run.run_folder / "profile", self.ranks.rank, self.engine.timer)
        self._local: dict[str, float] = {}
        self._by_source = BySource(self.stream.sources)

    @property
    def last_step(self) -> int:
        """Where this attempt ends at the latest."""
        wanted = self.run.stop_at_step
        return self.course.end_step if wanted is None else min(wanted, self.course.end_step)

    # --- a step ---------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[tuple[Batch, float]]:
        """The batches up to the last step, each with the seconds that it was waited for.

        Raises Abandoned on every rank where one is asked to stop while one waits for its storage.
        """
        together = Together(self.ranks, self._is_asked_to_stop)
        with self.stream.reading(self.position.step, self.last_step) as reading:
            for _ in range(self.position.step, self.last_step):
                begun = time.perf_counter()
                batch = together.take(reading)
                self._data_s = together.own_s
                yield batch, time.perf_counter() - begun

    def step(self, batch: Batch, count: int, rates: Rates) -> Outcome:
        """One update from a batch of which `count` targets count over all ranks."""
        sources = torch.from_numpy(batch.sources).to(self.ranks.device, non_blocking=True)
        tally = Tally(self.feed(batch), sources, len(self.stream.sources))
        return self.engine.step(tally.batches, count, rates, self.noise(batch.step), tally)

    def feed(self, batch: Batch) -> list[Any]:
        """A batch's micro-batches, on the device."""
        self.watchdog.beat("step", batch.step)
        fail_at("train.step", batch.step)
        spoil("train.weights", next(self.engine.module.parameters()), batch.step)
        device, objective = self.ranks.device, self.run.objective
        tokens = torch.from_numpy(batch.tokens).to(device, non_blocking=True)
        valid = torch.from_numpy(batch.valid).to(device, non_blocking=True)
        documents = None if batch.documents is None else torch.from_numpy(batch.documents).to(device, non_blocking=True)
        batches = [
            objective.batch(tokens[i], valid[i], None if documents is None else documents[i])
            for i in range(len(tokens))
        ]
        for each in batches:
            spoil("train.batch", each.weights, batch.step)
        return batches

    def profile_until(self, step: int, ended: bool = False) -> None:
        """Where `step` was the last that is profiled, or the attempt ends, write down and print where a step goes."""
        path = self.profiler.finish(step) if ended else self.profiler.after(step)
        if path is not None:
            print(path.read_text(encoding="utf-8"), flush=True)
            log.info("profile: %s", path)

    def noise(self, step: int) -> Noise | None:
        """The random numbers of a step; None where the model draws none."""
        return Noise(self.run.seed, step, self.ranks.rank) if self.run.model.dropout else None

    def advance(self, batch: Batch) -> None:
        """The batch is consumed."""
        step = batch.step + 1
        self.digest_share = (self.digest_share + batch.digest) % 2**128
        self._targets = batch.targets(len(self.stream.sources))
        self.position = Position(step, self.course.steps.start(step), self.course.tokens(step), self.position.digest)
        self.evaluated = False
        for line in self.course.warnings(step):
            self.note("epochs", line)

    def post(self, outcome: Outcome, lr: float, seconds: float, waited: float) -> Reading | None:
        """Tell the other ranks of the step that was just made, and read what they told of the one before."""
        self.ledger.add("train", seconds)
        self.ledger.add("data", waited)
        self.watchdog.started()
        if self.position.step == self.first_step + 1 and self.journal is not None:
            self.journal.event(self.position.step, "first_step", f"first step in {seconds:.1f} s", seconds=seconds)
        error = self.saver.poll()
        if error is not None:
            self.save_error = str(error)
            log.warning("%s", error)
            self._journal_save("failed", self.saver.last_step or 0)
        taken_over = isinstance(error, TakenOver)
        needed = 2 * (self.save_s or 0.0) + 2 * (seconds + waited)
        code = self.stop.exit_code(needed)
        notice = Notice(
            outcome.loss, outcome.grad_norm, outcome.applied, self.digest_share, self._data_s + outcome.forward_s,
            outcome.by_source or (0.0,) * len(self._targets), self._targets, code,
            code is not None and self.stop.left_s() < (self.save_s or 0.0), taken_over,
            error is not None and not taken_over and self.run.checkpoint.on_error == "stop",
        )  # fmt: skip
        fed = self.position.tokens > self.course.tokens(self.position.step - 1)
        reading = self._read(self.board.post(notice, self.position, fed))
        self._local = {"lr": lr, "seconds": seconds + waited, "waited": waited}
        return reading

    def judge(self, batch: Batch, outcome: Outcome) -> Ending | None:
        """What follows from this step and from the reading of the one before it; None to go on."""
        if not outcome.applied:
            self._report_skipped(batch, outcome)
        if self.skipped.gives_up(outcome.applied):
            bad = (batch.step + 1 - self.skipped.in_a_row, batch.step)
            why = f"{self.skipped.in_a_row} steps in a row had a gradient that is not finite"
            return self._give_up("nan", bad, why)
        reading, self.last_read = self.last_read, None
        if reading is None:
            return None
        if reading.spike is not None and self._rolls_back("spike"):
            step = reading.position.step - 1
            return self._give_up("spike", (step, step), f"{reading.spike.quantity} spiked at step {step + 1}")
        return self._asked(reading)

    def asked_to_stop(self) -> Ending:
        """The end that a rank was asked for while all evaluated, or one waited for its batch."""
        is_late = self.stop.left_s() < (self.save_s or 0.0)
        codes, late = zip(*self.ranks.gather((self.stop.exit_code(), is_late)), strict=True)
        code = guard.INTERRUPTED if guard.INTERRUPTED in codes else guard.STOPPED
        needs_save = self.saver.last_step != self.position.step
        return Ending(code, OUT_OF_TIME) if needs_save and any(late) else STOPS[code]

    def _asked(self, reading: Reading) -> Ending | None:
        """The end that signals, the clock, a failed save or another attempt ask for."""
        if reading.exit_code is None:
            return None
        if reading.exit_code == guard.TAKEN_OVER:
            return Ending(guard.TAKEN_OVER, self.save_error or "another attempt has taken over this run")
        if reading.exit_code == guard.FAILED:
            return Ending(guard.FAILED, self.save_error or "a checkpoint could not be saved")
        if reading.out_of_time:
            return Ending(reading.exit_code, OUT_OF_TIME)
        return STOPS[reading.exit_code]

    def _give_up(self, kind: str, bad: tuple[int, int], why: str) -> Ending:
        return Ending(guard.GAVE_UP, why, bad_steps=bad if self._rolls_back(kind) else None)

    def _rolls_back(self, kind: str) -> bool:
        return self.run.guard.rollback is not None and kind in self.run.guard.rollback.on

    # --- between steps --------------------------------------------------------------------------------------------

    @_besides
    def evaluate(self) -> bool:
        """Measure the validation loss of every corpus, and write the samples of text; False where that was left
        unfinished, the ranks asked to stop."""
        begun = time.perf_counter()
        rows = self.run.micro_batch_rows
        try:
            metrics = validation_losses(
                self.engine,
                self.run.objective,
                self.validation,
                self.ranks,
                rows,
                self._before_batch,
                self._is_asked_to_stop,
            )
            seconds = time.perf_counter() - begun
            if self.journal is not None and metrics:
                self.journal.evaluation(self.position.step, self.position.tokens, metrics, seconds)
                losses = "  ".join(f"{k.split('/')[1]} {v:.4f}" for k, v in metrics.items() if k.endswith("/loss"))
                log.info("step %d  validation loss  %s", self.position.step, losses)
            texts = self._write_samples()
        except Abandoned:
            self._say("evaluation left unfinished: asked to stop")
            return False
        seconds = time.perf_counter() - begun
        self.meter.aside(seconds)
        self.ledger.add("evaluate", seconds)
        if self.journal is not None and texts:
            self.journal.samples(self.position.step, self.position.tokens, texts)
        return True

    def _write_samples(self) -> list[dict[str, str]]:
        """Go on with the prompts of `evaluation.samples`. Raises Abandoned."""
        wanted = self.run.evaluation.samples
        if wanted is None:
            return []
        assert self.tokenizer is not None
        poll, model = Poll(self.ranks, self._before_batch), self.engine.module
        with measuring(model):
            return write_samples(cast(GPT, model), self.tokenizer, wanted, self.ranks, poll)

    @_besides
    def evaluate_tasks(self) -> bool:
        """Measure the scores of the tasks; False where that was left unfinished, the ranks asked to stop."""
        begun, settings = time.perf_counter(), self.run.evaluation
        assert self.tokenizer is not None
        try:
            scores = task_scores(
                self.engine.module, self.tokenizer, self.run.model.context, settings.tasks, settings.shots,
                self.ranks, self.run.micro_batch_rows, self._before_batch,
            )  # fmt: skip
        except Abandoned:
            self._say("evaluation of tasks left unfinished: asked to stop")
            return False
        except ConfigError as error:  # a file that was there at the start
            self.note("tasks", f"tasks not evaluated: {error}")
            return True
        seconds = time.perf_counter() - begun
        self.meter.aside(seconds)
        self.ledger.add("evaluate", seconds)
        if self.journal is not None:
            metrics = {f"{score.key}/{name}": value for score in scores for name, value in score.metrics.items()}
            self.journal.evaluation(self.position.step, self.position.tokens, metrics, seconds)
            shown = "  ".join(f"{s.task} {s.shots}-shot {s.metrics['accuracy']:.1%}" for s in scores)
            log.info("step %d  accuracy  %s", self.position.step, shown)
        return True

    def _before_batch(self) -> bool:
        """Whether this rank is asked to stop, told before each batch of an evaluation."""
        self.watchdog.beat("evaluation", self.position.step)
        fail_at("evaluate.batch")
        return self._is_asked_to_stop()

    def _is_asked_to_stop(self) -> bool:
        return self.stop.exit_code(2 * (self.save_s or 0.0)) is not None

    @_besides
    def save(self) -> Ending | None:
        """Begin a checkpoint of this position, unless it has one; an end instead where the weights are damaged."""
        if self.saver.last_step == self.position.step:
            return None
        self.watchdog.beat("save", self.position.step)
        begun = time.perf_counter()
        self._await_saves()
        if (ending := self.check_weights()) is not None:
            return ending
        self._read(self.board.read())  # so that the guard's state is that of this position
        state = {"spikes": self.board.spikes.state(), "skipped_in_a_row": self.skipped.in_a_row}
        self._journal_save("pending", self.position.step)
        self.saver.save(self.engine.state(), self.position, self.digest_share, {"guard": state})
        held_up = time.perf_counter() - begun
        self.meter.aside(held_up)
        self.ledger.add("save", held_up)
        return None

    def _journal_save(self, status: Literal["pending", "failed"], step: int) -> None:
        if self.journal is not None:
            folder = self.run.run_folder / "checkpoints" / checkpoint.folder_name(step, self.saver.branch)
            self.journal.checkpoint(step, status, str(folder), None)

    def _await_saves(self) -> None:
        """Wait until no rank has a save in flight."""
        while self.ranks.sum(torch.tensor([float(not self.saver.done(timeout_s=1.0))])).item():
            self.watchdog.alive()

    def check_weights(self) -> Ending | None:
        """Compare the weights of all ranks; an end where they differ."""
        odd = replicas.odd_ranks(self.engine, self.ranks)
        if not odd:
            return None
        names = ", ".join(f"{rank} ({self.ranks.hosts[rank]})" for rank in odd)
        what = f"weights differ on rank {names}" if len(odd) == 1 else f"weights differ between ranks {names}"
        for rank in odd if len(odd) == 1 else ():
            if self.ranks.rank == rank:
                accuse(self.run.run_folder, rank, self.ranks.hosts[rank], "weights differ from the other ranks")
        self.note("weights_differ", what, ranks=list(odd))
        return Ending(guard.FAILED, f"{what}: memory or computation of that node is damaged")

    def committed(self, committed: Committed, seconds: float) -> None:
        """A checkpoint has been committed (rank 0, from the saver's thread)."""
        self.save_s = seconds
        if self.journal is not None:
            name, digest = committed.folder.name, committed.manifest_hash
            self.journal.checkpoint(committed.position.step, "ready", str(committed.folder), digest, seconds)
            self.journal.sync()
            log.info("checkpoint %s", name)

    def hung(self, step: int, why: str) -> None:
        """The watchdog is about to end this process (rank 0, from its thread)."""
        if self.journal is not None:
            self.journal.event(step, "hang", why)
            self.journal.end(step, guard.HUNG, why)
            self.journal.sync()

    def failed(self, code: int, error: Exception) -> None:
        """Write down an end by an exception."""
        if self.journal is not None and self.ended is None:
            text = " ".join(str(error).split())[:300]
            self.journal.end(self.position.step, code, f"{type(error).__name__} in {self.watchdog.where}: {text}")

    def finish(self, code: int, why: str) -> None:
        """Write down an orderly end."""
        if self.journal is not None:
            self.journal.end(self.position.step, code, why)

    def close(self) -> None:
        """Close the journal, and give the archive and the trackers time to finish."""
        self.profile_until(self.position.step, ended=True)
        self.close_system()
        self.saver.close(0.0 if self.stop.received is not None else None)
        if self.journal is not None:
            self.journal.close()
        if self.trackers is not None:
            hurried = self.stop.received is not None
            self.trackers.close(max(1.0, min(CLOSE_S, self.stop.left_s() - 2)) if hurried else None)

    def close_system(self) -> None:
        """Measure this node no more."""
        if self.system is not None:
            self.system.close()

    def due(self, every_steps: int | None) -> bool:
        """Whether this position is one of those at every so many steps."""
        return every_steps is not None and self.position.step % every_steps == 0

    @property
    def end_reason(self) -> str:
        """Why there is no further step."""
        if self.last_step < self.course.end_step:
            return f"stop_at_step {self.last_step} reached"
        return self.course.end_reason

    def end(self, ending: Ending) -> int:
        """Save where the ending says so, wait for the save in flight, write down how it ended; the exit code."""
        self.profile_until(self.position.step, ended=True)
        if ending.saves:
            ending = self.save() or ending
        self.watchdog.beat("end", self.position.step)
        self._read(self.board.read())
        code, why = self._finish_save(ending.exit_code, ending.why, ending.bad_steps is not None)
        self.ended = Ending(code, why, bad_steps=ending.bad_steps if code == ending.exit_code else None)
        if self.ended.bad_steps is None:
            self.finish(code, why)
        self._say(f"{why} at step {self.position.step}" + ("" if self.ended.bad_steps else f" (exit {code})"))
        return code

    def _finish_save(self, code: int, why: str, rolls_back: bool) -> tuple[int, str]:
        failed: tuple[int, str] | None = None
        self._await_saves()
        if (error := self.saver.poll()) is not None:
            failed = guard.TAKEN_OVER if isinstance(error, TakenOver) else guard.FAILED, str(error)
            self._journal_save("failed", self.saver.last_step or 0)
        failures = [f for f in self.ranks.gather(failed) if f is not None]
        if rolls_back and self.run.checkpoint.on_error == "go_on":
            failures = [f for f in failures if f[0] == guard.TAKEN_OVER]
        reasons = [error for error in self.ranks.gather(self.save_error) if error]  # of saves that failed before
        if not failures and code in (guard.FAILED, guard.TAKEN_OVER) and reasons:
            return code, reasons[0]
        return failures[0] if failures else (code, why)

    # --- words ----------------------------------------------------------------------------------------------------

    def note(self, kind: str, text: str, **facts: object) -> None:
        """Log and journal what was noticed (rank 0)."""
        if self.journal is not None:
            log.warning("%s", text)
            self.journal.event(self.position.step, kind, text, **facts)

    def _say(self, text: str) -> None:
        if self.journal is not None:
            log.info("%s", text)

    def _read(self, reading: Reading | None) -> Reading | None:
        """Write down what was read, and keep it for `judge`."""
        if reading is None:
            return None
        self.last_read = reading
        position, local = reading.position, self._local
        if reading.applied and reading.fed:
            self._by_source.add(reading.by_source, reading.targets)
        self.meter.step(position.tokens - self.course.tokens(position.step - 1), local["seconds"], local["waited"])
        if reading.spike is not None:
            s = reading.spike
            text = f"step {position.step}: {s.quantity} {s.value:.4g} is {s.sigmas:.1f} sigmas above the steps before"
            self.note("spike", text, quantity=s.quantity, value=s.value, sigmas=s.sigmas)
        for rank, share in self.stragglers.add(reading.own_s, local["seconds"]):
            host = self.ranks.hosts[rank]
            self.note("slow_rank", f"rank {rank} ({host}) takes {share:.1f} times the median rank's time", rank=rank)
        self._write(reading)
        return reading

    def _write(self, reading: Reading) -> None:
        every, position, local = self.run.log_every_steps, reading.position, self._local
        quiet = position.step % every and position.step != self.last_step and reading.applied
        if self.journal is None or quiet:
            return
        speed = self.meter.read(self.course.tokens(self.course.end_step) - position.tokens)
        metrics = {"lr": local["lr"], "tokens_per_s": speed.tokens_per_s, "data_wait": speed.data_wait}
        metrics |= {"loss": reading.loss, "grad_norm": reading.grad_norm} if reading.fed else {}
        metrics |= self._by_source.take()
        metrics |= {} if speed.mfu is None else {"mfu": speed.mfu}
        metrics["memory_gib"] = used_bytes(self.ranks.device) / GIB
        self.journal.step(
            position.step, position.samples, position.tokens, position.digest, metrics, self.ledger.take()
        )
        mfu = "" if speed.mfu is None else f"  MFU {speed.mfu:.1%}"
        skipped = "" if reading.applied else "  SKIPPED: the gradient is not finite"
        skipped = skipped if reading.fed else "  SKIPPED: all of its samples are to be"
        log.info(
            "step %d/%d  loss %.4f  lr %.2e  grad %.3f  %s tok/s%s  data wait %.1f%%  ETA %s%s",
            position.step, self.course.end_step, reading.loss, local["lr"], reading.grad_norm,
            f"{speed.tokens_per_s:,.0f}", mfu, 100 * speed.data_wait, duration(speed.eta_s), skipped,
        )  # fmt: skip

    def _report_skipped(self, batch: Batch, outcome: Outcome) -> None:
        """Name the documents of a step that was skipped: those of the ranks whose loss was not finite, if any was."""
        suspect = not torch.isfinite(torch.tensor(outcome.loss)).item()
        suspects = [rank for rank, is_one in enumerate(self.ranks.gather(suspect)) if is_one]
        if self.journal is None:
            return
        ids = self._documents(batch.step, suspects or list(range(self.ranks.size)))
        shown = ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
        self.note(
            "skip", f"step {batch.step + 1} skipped, its gradient is not finite; documents: {shown}",
            ranks=suspects, first_sample=self.course.steps.start(batch.step),
            end_sample=self.course.steps.start(batch.step + 1), documents=ids[:MOST_DOCUMENTS],
        )  # fmt: skip

    def _documents(self, step: int, ranks: list[int]) -> list[str]:
        """The documents that these ranks were fed in a step. Empty where they cannot be read."""
        order, steps = self.course.order, self.course.steps
        numbers = np.arange(steps.start(step), steps.start(step + 1))
        samples = np.concatenate([cut(numbers, order.lanes, rank, self.ranks.size) for rank in ranks])
        samples = np.sort(samples)[:MOST_DOCUMENTS]  # each has one at least
        begun, longest = time.monotonic(), min(NAMES_S, self.run.guard.hang_timeout_s / 4)  # the other ranks wait

        def look() -> None:
            if time.monotonic() - begun > (longest if self.stop.received is None else HURRIED_S):
                raise ShardError(
                    f"step {step + 1}: no time to name its documents; use pretrain trace --step {step + 1}"
                )

        shards: list[Shards] = []
        try:
            shards = self.course.corpora.shards(order.pools)  # of its own: others read in threads
            return documents_of(order, shards, samples, self.run.data.seq_tokens, look)
        except (ShardError, OSError) as error:
            log.warning("%s", error)
            return []
        finally:
            for each in shards:
                each.close()
