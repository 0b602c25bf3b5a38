"""A run: its configuration tree, the loop, and how an attempt begins: fresh, or from the newest whole checkpoint."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

import configs
from configs import ConfigError, Int, Section
from data_pipeline.shards import write_durably
from data_pipeline.stream import Batch, Corpora, Data, Stream, Validation, timed
from pretrain import checkpoint, guard
from pretrain.checkpoint import Checkpoints, Committed, Damaged, Position, Saver
from pretrain.engine import Engine, EngineSettings, Outcome
from pretrain.evaluate import Evaluation, validation_losses
from pretrain.fields import check_same_run, field_class
from pretrain.guard import Guard, SkippedSteps, StopSignals
from pretrain.lineage import Lineage, TakenOver
from pretrain.meter import Meter, duration, peak_flops
from pretrain.models import Model
from pretrain.models.weights import initialize
from pretrain.objectives import NextToken, Objective
from pretrain.optim import Optim
from pretrain.ranks import Pending, Ranks
from pretrain.schedule import Schedule
from pretrain.segments import Course, SegmentRecord, Segments, first_segment, plan_course
from pretrain.track import Journal, Track, Trackers, start_trackers
from pretrain.track.journal import read_journal

log = logging.getLogger("pretrain")


class TrainRun(Section):
    """Everything that a run is. Where it runs is not part of it."""

    name: str
    run_folder: Path
    seed: Int = Field(default=1, ge=0)
    model: Model
    objective: Objective = NextToken()
    data: Data
    batch_tokens: Int = Field(gt=0)
    micro_batch_seqs: Int = Field(gt=0)
    train_tokens: Int = Field(gt=0)
    optim: Optim
    schedule: Schedule
    engine: EngineSettings
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoints = Checkpoints()
    guard: Guard = Guard()
    track: tuple[Track, ...] = ()
    resume: str = "auto"  # auto, never, must, or the path of a checkpoint
    log_every_steps: Int = Field(default=10, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> TrainRun:
        if self.batch_tokens < self.data.seq_tokens:
            raise ValueError(
                f"batch_tokens: {self.batch_tokens} is less than one sequence of data.seq_tokens {self.data.seq_tokens}"
            )
        if self.data.seq_tokens > self.model.context:
            raise ValueError(
                f"data.seq_tokens: {self.data.seq_tokens} is longer than model.context {self.model.context}"
            )
        return self

    @property
    def batch_seqs(self) -> int:
        """Sequences per step: `batch_tokens` rounded down to whole ones."""
        return self.batch_tokens // self.data.seq_tokens

    def identity(self) -> dict[str, Any]:
        """The fields that a resume may not change, by dotted path."""
        flat = configs.flatten(self.model_dump(mode="json"))
        return {path: value for path, value in flat.items() if field_class(path) == "identity"}


def load_run(path: Path, overrides: list[str] | None = None) -> TrainRun:
    """The run of a config file or of a run folder, its paths absolute. Raises ConfigError."""
    source = path / "run.yaml" if path.is_dir() else path
    if path.is_dir() and not source.is_file():
        raise ConfigError(f"{path}: no run.yaml: not a run folder")
    run = configs.load(TrainRun, source, overrides or [])
    return configs.build(TrainRun, _absolute(run.model_dump()), str(source))


def _absolute(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _absolute(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_absolute(value) for value in tree]
    return str(tree.absolute()) if isinstance(tree, Path) else tree


# --- the loop -------------------------------------------------------------------------------------------------------


def train(run: TrainRun) -> int:
    """Train until the run's tokens are consumed or something ends the attempt; the exit code (CONTRACTS, the job)."""
    stop = StopSignals()
    with Ranks.join() as ranks, _attempt(run, ranks) as attempt:
        return _loop(attempt, stop)


def _loop(a: Attempt, stop: StopSignals) -> int:
    settings, skipped = a.run, SkippedSteps(a.run.guard)
    if a.position.step == 0:
        a.evaluate()
    for batch, waited in timed(a.stream.batches(a.position.step, a.course.end_step)):
        begun = time.perf_counter()
        now = a.course.at(batch.step)
        count = int(a.course.tokens(batch.step + 1) - a.course.tokens(batch.step))
        lr = now.optim.lr_peak * now.schedule.factor(a.course.tokens(batch.step + 1), now.train_tokens)
        outcome = a.engine.step(a.feed(batch), count, lr) if count else Outcome(0.0, 0.0, applied=True)
        a.advance(batch)
        verdict = a.board.post(a, outcome, lr, stop, time.perf_counter() - begun, waited)
        last = a.position.step == a.course.end_step
        if skipped.gives_up(outcome.applied):
            return a.end(guard.GAVE_UP, f"{skipped.in_a_row} steps in a row had a gradient that is not finite")
        if verdict.exit_code is not None:
            if verdict.exit_code in (guard.STOPPED, guard.INTERRUPTED) and not last:
                a.save()
            elif verdict.exit_code == guard.TAKEN_OVER:
                return a.end(guard.TAKEN_OVER, verdict.why)
            if not last:
                return a.end(verdict.exit_code, verdict.why)
        if a.position.step % settings.evaluation.every_steps == 0 or last:
            a.evaluate()
        if a.position.step % settings.checkpoint.save_every_steps == 0 or last:
            a.save()
    a.board.flush(a)
    return a.end(guard.DONE, a.course.end_reason)


# --- an attempt -----------------------------------------------------------------------------------------------------


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


# --- beginning ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """What rank 0 found in the run folder: the segment records, and the checkpoints to try, newest first."""

    records: list[SegmentRecord]
    candidates: list[tuple[Path, str]]  # folder, manifest hash
    damaged: list[str]
    why: str


@contextmanager
def _attempt(run: TrainRun, ranks: Ranks) -> Iterator[Attempt]:
    """Begin an attempt: its course, its engine, its checkpoint, its branch; and end it."""
    _set_up_logging(ranks)
    start: Start = ranks.first(lambda: _open_run(run))
    course = plan_course(run, start.records)
    model = run.model.build()
    initialize(model, run.seed)
    engine = run.engine.build(model, run.optim, ranks)
    chosen = _load_newest(start, engine, ranks)
    position = chosen.position if chosen else Position(0, 0, 0, "0" * 32)
    if ranks.first(lambda: position.samples != course.steps.start(position.step)):
        raise ConfigError(f"{run.run_folder}: step {position.step} is at sample {position.samples} in its checkpoint")
    branch = ranks.first(lambda: _take_branch(run, chosen, start))
    facts = {"identity": run.identity(), "order": course.order.identity, "segments": len(start.records)}
    stream = Stream(
        course.order, course.steps, course.skips, course.corpora.shards(course.order.pools), run.data,
        run.micro_batch_seqs, ranks.rank, ranks.size,
    )  # fmt: skip
    validation = {
        name: Validation(course.corpora.manifests[name], count, run.data.seq_tokens, run.evaluation.tokens)
        for name, count in course.record.generations.items()
    }
    journal, trackers = _journal(run, ranks, course, chosen, branch, start) if ranks.rank == 0 else (None, None)
    saver = Saver(
        run.run_folder, run.checkpoint, branch, ranks.rank, ranks.size, facts,
        on_commit=lambda committed: _on_commit(journal, committed),
        on_removed=lambda folder: _on_removed(journal, folder),
    )  # fmt: skip
    peak = peak_flops(torch.cuda.get_device_name()) if ranks.device.type == "cuda" else None
    meter = Meter(run.model.flops_per_token(run.data.seq_tokens), None if peak is None else peak * ranks.size)
    attempt = Attempt(run, ranks, course, engine, stream, validation, saver, journal, trackers, position, meter)
    if chosen is None:
        attempt.save()
        attempt.saver.wait()
    else:
        saver.last_step = position.step
    ranks.barrier()
    try:
        yield attempt
    finally:
        if journal is not None:
            journal.close()
        if trackers is not None:
            trackers.close()


def _open_run(run: TrainRun) -> Start:
    """Rank 0: is there a run, is it this one, and from where may it go on? Raises ConfigError."""
    folder, segments = run.run_folder, Segments(run.run_folder)
    begun = Lineage(folder).highest() > 0
    if run.resume == "never" and begun:
        raise ConfigError(f"resume: never, but {folder} holds a run; give another run_folder, or set resume=auto")
    if run.resume not in ("auto", "never") and not begun:
        raise ConfigError(f"resume: {run.resume}, but {folder} holds no run")
    if not begun:
        folder.mkdir(parents=True, exist_ok=True)
        segments.clear()
        record = first_segment(run, Corpora(run.data))
        plan_course(run, [record])  # refused before anything is written
        write_durably(folder / "run.yaml", configs.dump(run).encode())
        segments.write(record)
        return Start([record], [], [], "start")
    recorded = load_run(folder)
    check_same_run(recorded.model_dump(mode="json"), run.model_dump(mode="json"), str(folder))
    candidates, damaged = _candidates(run)
    if not candidates and (damaged or checkpoint.all_checkpoints(folder) or _has_steps(folder)):
        more = f"; {damaged[0]}" if damaged else ""
        raise ConfigError(f"{folder}: no checkpoint of the live lineage verifies, and steps were trained{more}")
    return Start(segments.read(), candidates, damaged, "resume" if candidates else "start")


def _candidates(run: TrainRun) -> tuple[list[tuple[Path, str]], list[str]]:
    """Checkpoints to resume from, newest first, whose manifests are whole; and a line for each that is not."""
    folders = checkpoint.live_checkpoints(run.run_folder)
    if run.resume not in ("auto", "must", "never"):
        folders = [Path(run.resume)]
        if not folders[0].is_dir():
            raise ConfigError(f"resume: {run.resume}: no such checkpoint")
    whole, damaged = [], []
    for folder in folders:
        try:
            committed = checkpoint.open_checkpoint(folder)
        except Damaged as error:
            damaged.append(str(error))
            continue
        _check_identity(committed, run)
        whole.append((folder, committed.manifest_hash))
    return whole, damaged


def _check_identity(committed: Committed, run: TrainRun) -> None:
    lines = configs.differences(committed.manifest["identity"], run.identity())
    if lines:
        raise ConfigError(f"{committed.folder}: is of another run: {'; '.join(lines)}")


def _has_steps(run_folder: Path) -> bool:
    return any(record.type == "step" for record in read_journal(run_folder))


def _load_newest(start: Start, engine: Engine, ranks: Ranks) -> Committed | None:
    """Load the newest checkpoint that verifies on every rank; None where there is none to load."""
    for line in start.damaged:
        _warn(ranks, line)
    newest: int | None = None
    for folder, manifest_hash in start.candidates:
        committed, problem = None, None
        try:
            committed = _open_patiently(folder, manifest_hash)
            newest = committed.position.step if newest is None else newest
            state = engine.state()
            checkpoint.load(committed, state)
            engine.loaded(state)
        except Damaged as error:
            problem = str(error)
        problems = [p for p in ranks.gather(problem) if p is not None]
        if not problems:
            assert committed is not None and newest is not None
            lost = f" ({newest - committed.position.step} steps lost)" if newest != committed.position.step else ""
            _warn(ranks, f"going on from {committed.folder.name}{lost}", logging.INFO)
            return committed
        _warn(ranks, f"{problems[0]}; trying the checkpoint before it")
    if start.candidates:
        raise ConfigError(f"{start.candidates[0][0].parent}: no checkpoint verifies")
    return None


def _open_patiently(folder: Path, manifest_hash: str, patience_s: float = 30.0) -> Committed:
    """Open a checkpoint that rank 0 has seen; a shared file system may show it here a little later."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return checkpoint.open_checkpoint(folder, manifest_hash)
        except Damaged:
            if time.monotonic() > deadline or (folder / "MANIFEST.json").is_file():
                raise
            time.sleep(0.5)


def _take_branch(run: TrainRun, chosen: Committed | None, start: Start) -> int:
    lineage = Lineage(run.run_folder)
    if chosen is None:
        branch = lineage.take(None, 0, None, start.why).branch
    else:
        branch = lineage.take(chosen.branch, chosen.position.step, chosen.manifest_hash, start.why).branch
    checkpoint.sweep(run.run_folder)
    return branch


def _journal(
    run: TrainRun, ranks: Ranks, course: Course, chosen: Committed | None, branch: int, start: Start
) -> tuple[Journal, Trackers]:
    journal = Journal(run.run_folder, branch)
    datasets = [
        {"name": name, "source": str(m.folder), "digest": course.record.identities[name][-1][:36]}
        for name, m in course.corpora.manifests.items()
    ]
    journal.attempt(
        chosen.branch if chosen else None, chosen.position.step if chosen else 0, start.why,
        config=run.model_dump(mode="json"), datasets=datasets, host=socket.gethostname(), world_size=ranks.size,
        device=str(ranks.device), torch=torch.__version__, parameters=run.model.parameter_count(),
    )  # fmt: skip
    log.info(
        "%s: %s parameters, %d ranks on %s, steps %d to %d, open blocks up to %d MiB per rank",
        run.name, f"{run.model.parameter_count():,}", ranks.size, ranks.device.type,
        chosen.position.step if chosen else 0, course.end_step, run.data.open_blocks_mib,
    )  # fmt: skip
    return journal, start_trackers(run.track, run.run_folder)


def _on_commit(journal: Journal | None, committed: Committed) -> None:
    if journal is not None:
        journal.checkpoint(committed.position.step, "ready", str(committed.folder), committed.manifest_hash)
        journal.sync()
        log.info("checkpoint %s", committed.folder.name)


def _on_removed(journal: Journal | None, folder: Path) -> None:
    match = checkpoint.NAME.fullmatch(folder.name)
    if journal is not None and match is not None:
        journal.checkpoint(int(match[1]), "removed", str(folder), None)


def _warn(ranks: Ranks, line: str, level: int = logging.WARNING) -> None:
    if ranks.rank == 0:
        log.log(level, "%s", line)


def _set_up_logging(ranks: Ranks) -> None:
    name = "" if ranks.size == 1 else f" rank {ranks.rank}"
    logging.basicConfig(format=f"%(asctime)s{name} %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
