"""THE loop: one for every model and engine."""

from __future__ import annotations

import logging
import time

from configs import ConfigError
from data_pipeline import files
from pretrain import guard
from pretrain.attempt import Attempt, Ending
from pretrain.engine import Outcome
from pretrain.guard import StopSignals
from pretrain.lineage import TakenOver
from pretrain.memory import explain_out_of_memory, is_out_of_memory
from pretrain.meter import Startup
from pretrain.preflight import PreflightError
from pretrain.ranks import AbsentRanks, Ranks
from pretrain.rollback import roll_back
from pretrain.run import TrainRun
from pretrain.staging import stage_shards
from pretrain.start import begin
from pretrain.suspects import accuse
from pretrain.together import Abandoned
from pretrain.watchdog import Watchdog

log = logging.getLogger("pretrain")

LONGEST_CLOSE_S = 300.0  # that the other ranks wait for rank 0, which closes archive and trackers
ENDS = {TakenOver: guard.TAKEN_OVER, ConfigError: guard.USAGE}  # exit codes by the error that reaches the command
SKIPPED_WHOLE = Outcome(0.0, 0.0, applied=True)  # a step of which every sample is skipped


def train(run: TrainRun, stop: StopSignals) -> int:
    """Train until the run's tokens are consumed or something ends the attempt; the exit code (see `guard`)."""
    startup = Startup()
    try:
        longest = max(run.guard.start_timeout_s, run.guard.hang_timeout_s)
        ranks = Ranks.join(run.guard.rendezvous_timeout_s, 2 * longest)  # the watchdog comes before
    except AbsentRanks as error:
        for rank, host in error.absent.items():
            accuse(run.run_folder, rank, host, str(error))
        raise
    startup.mark("rendezvous")
    _set_up_logging(ranks)
    watchdog = Watchdog(ranks, run.run_folder, run.guard.start_timeout_s, run.guard.hang_timeout_s)
    attempt: Attempt | None = None
    together = False  # every rank raises the same

    def is_asked() -> bool:
        return stop.exit_code() is not None

    try:
        with files.stopping(is_asked):
            if (stopped := stage_shards(run, ranks, stop, watchdog)) is not None:
                return stopped
            attempt = begin(run, ranks, stop, watchdog, startup)
        while (code := _trained(attempt)) and roll_back(attempt):
            with files.stopping(is_asked):
                attempt = begin(run, ranks, stop, watchdog, startup, attempt)
        return code
    except files.Stopped:
        together, code = True, stop.exit_code() or guard.STOPPED  # another's, where this one was not asked
        why = "stopped while it waited for its shards, before a step"
        log.info("%s (exit %d)", why, code)
        if attempt is not None:  # that a rollback has ended
            attempt.finish(code, why)
        return code
    except Exception as error:
        watchdog.wait_if_it_ends()
        together = "said_by_rank_0" in vars(error) or isinstance(error, PreflightError)
        code = guard.OUT_OF_MEMORY if is_out_of_memory(error) else ENDS.get(type(error), guard.FAILED)
        if attempt is not None:
            attempt.failed(code, error)
        if code != guard.OUT_OF_MEMORY:
            raise
        resolved = run if attempt is None else attempt.run
        log.error("%s", explain_out_of_memory(resolved, ranks.size, watchdog.where, ranks.device))
        return code
    finally:
        watchdog.stop()
        if attempt is not None:
            attempt.close()
        if together or (attempt is not None and attempt.ended is not None):
            ranks.leave_together(LONGEST_CLOSE_S)


def _trained(a: Attempt) -> int:
    try:
        return _loop(a)
    except Abandoned:
        return a.end(a.asked_to_stop())


def _loop(a: Attempt) -> int:
    settings = a.run
    evaluated = True
    if a.position.step in (0, a.last_step) and not a.evaluated:
        evaluated = a.evaluate()
    for batch, waited in a.batches():
        begun = time.perf_counter()
        a.profiler.before(batch.step + 1, waited)
        now = a.course.at(batch.step)
        count = int(a.course.tokens(batch.step + 1) - a.course.tokens(batch.step))
        rates = now.optim.rates(now.schedule.factor(a.course.tokens(batch.step + 1), now.train_tokens))
        outcome = a.step(batch, count, rates) if count else SKIPPED_WHOLE
        a.profile_until(batch.step + 1)
        a.advance(batch)
        a.post(outcome, rates.lr, time.perf_counter() - begun, waited)
        last = a.position.step == a.last_step
        ending = a.judge(batch, outcome)
        if ending is None and a.due(settings.guard.check_weights_every_steps):
            ending = a.check_weights()
        if last and ending is not None and ending.saves:
            ending = None  # there is nothing left to stop but the evaluation
        if ending is None and (last or a.due(settings.checkpoint.save_every_steps)):
            ending = a.save()
        if ending is not None:
            return a.end(ending)
        if last or a.due(settings.evaluation.every_steps):
            evaluated = a.evaluate()
        if evaluated and settings.evaluation.tasks_every_steps is not None:
            evaluated = not (last or a.due(settings.evaluation.tasks_every_steps)) or a.evaluate_tasks()
    return a.end(Ending(guard.DONE, a.end_reason) if evaluated else a.asked_to_stop())


def _set_up_logging(ranks: Ranks) -> None:
    name = "" if ranks.size == 1 else f" rank {ranks.rank}"
    logging.basicConfig(format=f"%(asctime)s{name} %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
