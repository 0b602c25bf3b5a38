"""Going back: to the last good checkpoint, with the exact samples of the bad steps skipped from then on.

A rollback takes a branch that goes on from that checkpoint, then commits a segment record with the skipped samples:
a kill between the two leaves a run that comes to the bad steps again, and rolls back again. What the retired branch
has saved is dead, as any checkpoint of an attempt that was overtaken.
"""

from __future__ import annotations

from dataclasses import replace

from data_pipeline.failpoints import fail_at
from pretrain import checkpoint
from pretrain.attempt import Attempt
from pretrain.checkpoint import Committed, Damaged
from pretrain.guard import Rollback
from pretrain.lineage import Lineage
from pretrain.segments import Segments

WHY = "rollback"  # how the record of such a branch begins


def roll_back(a: Attempt) -> bool:
    """Commit the rollback that the end of an attempt asks for; False where it asks for none or none is left."""
    settings, ending = a.run.guard.rollback, a.ended
    if settings is None or ending is None or ending.bad_steps is None:
        return False
    bad, why = ending.bad_steps, ending.why
    a.watchdog.starting()
    refusal, facts = a.ranks.first(lambda: _commit(a, settings, bad, why))
    if refusal:
        a.note("gave_up", f"{why}; {refusal}")
        a.finish(ending.exit_code, f"{why}; {refusal}")
        return False
    a.note(
        WHY, f"{why}; back to step {facts['to_step']}, samples {facts['begin']} to {facts['end'] - 1} skipped", **facts
    )
    return True


def _commit(a: Attempt, settings: Rollback, bad: tuple[int, int], why: str) -> tuple[str, dict[str, int]]:
    """Rank 0: why there is no rollback, or what it skips and where to it goes."""
    run_folder = a.run.run_folder
    lineage = Lineage(run_folder)
    before = sum(branch.why.startswith(WHY) for branch in lineage.branches().values())
    if before >= settings.at_most:
        return f"{before} rollbacks are all that guard.rollback.at_most allows", {}
    first = max(bad[0] - settings.skip_steps_before, 0)
    last = min(bad[1] + settings.skip_steps_after, a.course.end_step - 1)
    good = _newest_before(a, first)
    if good is None:
        return f"no whole checkpoint of step {first} or before is left", {}
    begin, end = a.course.steps.start(first), a.course.steps.start(last + 1)
    lineage.check(a.saver.branch)
    text = f"{WHY}: {why}; samples {begin} to {end - 1} skipped"
    branch = lineage.take(good.branch, good.position.step, good.manifest_hash, text)
    fail_at("rollback.branch_taken")
    segments = Segments(run_folder)
    newest = segments.read()[-1]
    from_sample = max(newest.from_sample, good.position.samples)
    record = replace(
        newest, segment=newest.segment + 1, from_sample=from_sample, changes=[], skips=[(begin, end)], withdrawn=None
    )
    lineage.check(branch.branch)
    segments.write(record)
    fail_at("rollback.committed")
    return "", {"to_step": good.position.step, "begin": begin, "end": end, "new_branch": branch.branch}


def _newest_before(a: Attempt, step: int) -> Committed | None:
    """The newest live checkpoint of a step or before whose bytes are whole."""
    for folder in checkpoint.live_checkpoints(a.run.run_folder):
        try:
            committed = checkpoint.open_checkpoint(folder)
        except Damaged:
            continue
        if committed.position.step <= step and not checkpoint.verify(folder):
            return committed
    return None
