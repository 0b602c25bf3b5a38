"""Before the start: the shards of a run copied to the disk of every node, once per node, while all ranks wait."""

from __future__ import annotations

from functools import partial

import torch

from configs import ConfigError
from data_pipeline.disk import refusal
from data_pipeline.files import Stopped, watched
from data_pipeline.shards import ShardError, Unreachable
from data_pipeline.stage import Staging
from data_pipeline.stream import open_source
from pretrain.guard import INTERRUPTED, STOPPED, StopSignals
from pretrain.ranks import Ranks
from pretrain.run import TrainRun
from pretrain.segments import Segments, configured
from pretrain.watchdog import Watchdog


def stage_shards(run: TrainRun, ranks: Ranks, stop: StopSignals, watchdog: Watchdog) -> int | None:
    """Stage what `data.stage` asks for; the exit code where the ranks are asked to stop meanwhile.

    Raises ConfigError, or Unreachable, on every rank as soon as one node's copy fails.
    """
    if run.data.stage is None:
        return None
    staging, error = None, None
    try:
        staging = _begin(run)
    except (ConfigError, ShardError) as refused:
        error = _told(refused, run)
    except Stopped:
        pass  # asked to stop, as the others are now told
    while True:
        waiting = staging is not None and not staging.done(timeout_s=1.0)
        failed = error is not None or (staging is not None and not waiting and staging.error is not None)
        told = ranks.sum(torch.tensor([waiting, stop.exit_code() is not None, failed], dtype=torch.float32)).tolist()
        watchdog.alive()
        if staging is not None and (told[1] or told[2]):
            staging.stop()
        if not told[0] or told[1] or told[2]:
            break
    codes = ranks.gather(stop.exit_code())
    if staging is not None and staging.error is not None:
        error = _told(staging.error, run)
    if errors := [each for each in ranks.gather(error) if each is not None]:
        failure: ConfigError | Unreachable = errors[0]
        vars(failure)["said_by_rank_0"] = ranks.rank != 0
        raise failure
    if not told[1]:
        return None
    return INTERRUPTED if INTERRUPTED in codes else STOPPED


def _told(error: Exception, run: TrainRun) -> ConfigError | Unreachable:
    """An error as all ranks raise it: an outage is nobody's mistake, and a launcher starts again after it."""
    if isinstance(error, OSError):
        return ConfigError(f"data.stage: {refusal(error, run.data.stage)}")
    return Unreachable(str(error)) if isinstance(error, Unreachable) else ConfigError(str(error))


def _begin(run: TrainRun) -> Staging:
    """The copying of all remote sources, as the run has them after its amendments."""
    assert run.data.stage is not None
    records = Segments(run.run_folder).read()
    data = (configured(run, records) if records else run).data
    elsewhere = data.model_copy(update={"stage": None})
    corpora = []
    for name, source in data.sources.items():
        manifest = watched(partial(open_source, source, elsewhere))
        if manifest.files.is_far:
            known = records[-1].generations.get(name) if records else None
            corpora.append((manifest, known or source.generations or len(manifest.generations)))
    return Staging(run.data.stage, corpora)
