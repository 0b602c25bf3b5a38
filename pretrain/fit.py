"""`micro_batch_seqs: fit`: the largest micro-batch that memory holds, the same on every rank, before the first step.

The order of samples, their count and the sums over them do not depend on it. On a GPU a real step of the largest that
the arithmetic allows is tried, and smaller ones where it does not fit; elsewhere the arithmetic decides, since a
machine that runs out of memory ends the process.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from data_pipeline.failpoints import fail_at
from pretrain.engine import Engine
from pretrain.engine.scale import LossScale
from pretrain.engine.state import MASTER
from pretrain.memory import Shape, evened, is_out_of_memory, largest_micro_batch
from pretrain.models.loss import loss_plan
from pretrain.optim import Rates
from pretrain.ranks import Ranks
from pretrain.run import TrainRun

log = logging.getLogger("pretrain")

ROOM = {"cuda": 0.95, "cpu": 0.8}  # of what is free: gaps between blocks; read-ahead, open shards and the page cache
CGROUP = Path("/sys/fs/cgroup")


def estimate(run: TrainRun, ranks: Ranks) -> int:
    """The largest micro-batch by arithmetic, in what is free before the engine is built; 1 where not even one fits."""
    device, engine = ranks.device, run.engine
    places = ranks.gather(free_memory(device) * ROOM[device.type])
    sharing = 1 if device.type == "cuda" else max(ranks.hosts.count(host) for host in ranks.hosts)
    each = math.ceil(run.batch_seqs / ranks.size)
    fits = largest_micro_batch(
        Shape.of(run.model), engine, ranks.size, run.data.seq_tokens, each, min(places) / sharing,
        loss_plan(engine.loss, device), engine.compiles(device),
    )  # fmt: skip
    if fits == 0 and ranks.rank == 0:
        log.warning("micro_batch_seqs: fit: by arithmetic not even one sequence fits; trying one")
    return evened(max(1, fits), each)


def tried(run: TrainRun, ranks: Ranks, engine: Engine, build: Callable[[], Engine], most: int) -> tuple[int, Engine]:
    """The largest micro-batch, up to `most`, whose step every rank could take, and the engine as it was built.

    A step that runs out of memory leaves an engine that nobody should trust, so another one is built.
    """
    each = math.ceil(run.batch_seqs / ranks.size)
    sizes = sorted({evened(rows, each) for rows in range(1, most + 1)})
    low, high = 0, len(sizes) - 1  # sizes[0] is left to be taken untried: there is none below it
    middle = high
    while low < high:
        if all(ranks.gather(_fits(run, ranks, engine, sizes[middle]))):
            low = middle
        else:
            high = middle - 1
            del engine
            gc.collect()
            if ranks.device.type == "cuda":
                torch.cuda.empty_cache()
            engine = build()
        middle = (low + high + 1) // 2
    return sizes[low], engine


def _fits(run: TrainRun, ranks: Ranks, engine: Engine, rows: int) -> bool:
    """Whether a step of one such micro-batch fits. It changes nothing: its rows count for nothing, its rates are 0."""
    length = run.data.seq_tokens
    tokens = torch.zeros(rows, length + 1, dtype=torch.int64, device=ranks.device)
    batch = run.objective.batch(tokens, torch.zeros(rows, dtype=torch.int64, device=ranks.device))
    try:
        fail_at("fit.step", rows)
        engine.step([batch], 1, Rates(lr=0.0, weight_decay=0.0))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    state = engine.state()
    for flat in state.flats:
        for kind, values in flat.items():
            if kind != MASTER:
                values.zero_()
    state.steps = dict.fromkeys(state.steps, 0.0)
    state.loss_scale = None if state.loss_scale is None else LossScale()
    engine.loaded(state)
    return True


def free_memory(device: torch.device) -> float:
    """Bytes that a GPU, or this machine within the limit of this process's control group, has to spare."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = psutil.virtual_memory().available
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # another version of control groups, or none
    return float(free)
