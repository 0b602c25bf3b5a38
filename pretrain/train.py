"""THE loop: one for every model and engine."""

from __future__ import annotations

import time

from data_pipeline.stream import timed
from pretrain import guard
from pretrain.attempt import Attempt
from pretrain.engine import Outcome
from pretrain.guard import SkippedSteps, StopSignals
from pretrain.ranks import Ranks
from pretrain.run import TrainRun
from pretrain.start import begin


def train(run: TrainRun, stop: StopSignals) -> int:
    """Train until the run's tokens are consumed or something ends the attempt; the exit code (see `guard`)."""
    with Ranks.join() as ranks, begin(run, ranks) as attempt:
        return _loop(attempt, stop)


def _loop(a: Attempt, stop: StopSignals) -> int:
    settings, skipped = a.run, SkippedSteps(a.run.guard)
    if a.position.step == 0:
        a.evaluate()
    for batch, waited in timed(a.stream.batches(a.position.step, a.course.end_step)):
        begun = time.perf_counter()
        now = a.course.at(batch.step)
        count = int(a.course.tokens(batch.step + 1) - a.course.tokens(batch.step))
        rates = now.optim.rates(now.schedule.factor(a.course.tokens(batch.step + 1), now.train_tokens))
        outcome = a.engine.step(a.feed(batch), count, rates) if count else Outcome(0.0, 0.0, applied=True)
        a.advance(batch)
        verdict = a.board.post(a, outcome, rates.lr, stop, time.perf_counter() - begun, waited)
        last = a.position.step == a.course.end_step
        if skipped.gives_up(outcome.applied):
            return a.end(guard.GAVE_UP, f"{skipped.in_a_row} steps in a row had a gradient that is not finite")
        if verdict.exit_code is not None and not (last and verdict.saves):
            if verdict.saves:
                a.save()
            return a.end(verdict.exit_code, verdict.why)
        if a.position.step % settings.evaluation.every_steps == 0 or last:
            a.evaluate()
        if a.position.step % settings.checkpoint.save_every_steps == 0 or last:
            a.save()
    return a.end(guard.DONE, a.course.end_reason)
