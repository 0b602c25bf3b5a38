"""Before the start: the shards of a run copied to the disk of every node, once per node, while all ranks wait."""

from __future__ import annotations

from functools import partial

import torch

from configs import ConfigError
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

    Raises ConfigError, or Unreachable, on every rank where one node's copy fails.
    """
    if run.data.stage is None:
        return None
    staging, error = None, None
    try:
        staging = _begin(run)
    except (ConfigError, ShardError) as refusal:
        error = _told(refusal)
    except Stopped:
        pass  # asked to stop, as the others are now told
    while True:
        waiting = staging is not None and not staging.done(timeout_s=1.0)
        told = ranks.sum(torch.tensor([float(waiting), float(stop.exit_code() is not None)])).tolist()
        watchdog.alive()
        if told[1] and staging is not None:
            staging.stop()
        if not told[0] or told[1]:
            break
    codes = ranks.gather(stop.exit_code())
    if staging is not None and staging.error is not None:
        error = _told(staging.error)
    if errors := [each for each in ranks.gather(error) if each is not None]:
        failure: ConfigError | Unreachable = errors[0]
        vars(failure)["said_by_rank_0"] = ranks.rank != 0
        raise failure
    if not told[1]:
        return None
    return INTERRUPTED if INTERRUPTED in codes else STOPPED


def _told(error: Exception) -> ConfigError | Unreachable:
    """An error as all ranks raise it: an outage is nobody's mistake, and a launcher starts again after it."""
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
