"""`pretrain amend`: commit a segment that begins with the first step after the newest checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from configs import ConfigError
from pretrain import checkpoint
from pretrain.lineage import Lineage
from pretrain.run import load_run
from pretrain.segments import SegmentRecord, Segments, amended_segment, plan_course


def amend(run: Path, changes: Sequence[str]) -> SegmentRecord:
    """Amend a run of which no attempt is running: one that is will find itself taken over, and stop.

    Raises ConfigError where a change is not one of course, or the run cannot go on with it.
    """
    loaded = load_run(run)
    folder = loaded.run_folder
    if (folder / "run.yaml").is_file():
        loaded = load_run(folder)
    alive = checkpoint.live_checkpoints(folder)
    if not alive:
        raise ConfigError(f"{folder}: no checkpoint to amend from; a run that has not begun is changed in its config")
    committed = checkpoint.open_checkpoint(alive[0])
    records = Segments(folder).read()
    record, _ = amended_segment(loaded, records, changes, committed.position.samples)
    plan_course(loaded, [*records, record])
    Lineage(folder).take(committed.branch, committed.position.step, committed.manifest_hash, "amend")
    Segments(folder).write(record)
    return record
