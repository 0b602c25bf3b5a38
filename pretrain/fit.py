"""`micro_batch_seqs: fit`: the largest micro-batch that memory holds, the same on every rank, before the first step.

The order of samples, their count and the sums over them do not depend on it. On a GPU a real step of the largest that
the arithmetic allows is tried, and smaller ones where it does not fit; elsewhere the arithmetic decides, since a
machine that runs out of memory ends the process.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import psutil
import torch

from data_pipeline.failpoints import fail_at
from pretrain.engine import Engine, Tally
from pretrain.engine.scale import LossScale
from pretrain.engine.state import MASTER
from pretrain.guard import OUT_OF_MEMORY
from pretrain.memory import Shape, evened, is_out_of_memory, largest_micro_batch
from pretrain.models.loss import loss_plan
from pretrain.optim import Rates
from pretrain.ranks import Ranks
from pretrain.run import TrainRun

log = logging.getLogger("pretrain")

GRACE_S = 60.0  # for the others to be done with a step in which one rank ran out of memory: they may still compile
POLL_S = 0.2
ROOM = {"cuda": 0.95, "cpu": 0.8}  # of what is free: gaps between blocks; read-ahead, open shards and the page cache
CGROUP = Path("/sys/fs/cgroup")


def estimate(run: TrainRun, ranks: Ranks) -> int:
    """The largest micro-batch by arithmetic, in what is free before the engine is built; 1 where not even one fits."""
    device, engine = ranks.device, run.engine
    places = ranks.gather(free_memory(device) * ROOM[device.type])
    sharing = 1 if device.type == "cuda" else max(ranks.hosts.count(host) for host in ranks.hosts)
    each = math.ceil(run.batch_seqs / ranks.size)
    fits = largest_micro_batch(
        Shape.of(run.model, device.type, run.data.seq_tokens), engine, ranks.size, run.data.seq_tokens, each,
        min(places) / sharing, loss_plan(engine.loss, device), engine.compiles(device),
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
        if ranks.rank == 0:
            log.info("micro_batch_seqs: fit: trying a step of %d, of at most %d", sizes[middle], sizes[high])
        with _Together(ranks, sizes[middle], sizes[middle - 1]) as trial:
            fits = _fits(run, ranks, engine, sizes[middle])
            if not fits:
                trial.failed()
            all_fit = all(ranks.gather(fits))
            if not all_fit and ranks.device.type == "cuda":
                torch.cuda.synchronize()  # a collective that one rank alone began waits for ever: found here, in time
                ranks.barrier()
        if all_fit:
            low = middle
        else:
            high = middle - 1
            engine.release()
            gc.collect()
            if ranks.device.type == "cuda":
                torch.cuda.empty_cache()
            engine = build()
        middle = (low + high + 1) // 2
    return sizes[low], engine


class _Together:
    """One trial on every rank. A rank that alone runs out of memory may leave the others waiting in a collective.

    It says so in the store of the rendezvous, where a thread of every rank looks; where the ranks have not come
    together a while later, each of them ends with the exit code of no memory, and the size to try instead.
    """

    _count = 0

    def __init__(self, ranks: Ranks, rows: int, fewer: int) -> None:
        _Together._count += 1
        self._key = f"fit/{_Together._count}"
        self._ranks, self._rows, self._fewer = ranks, rows, fewer
        self._over = threading.Event()
        self._says = False
        self._failed: str | None = None  # the rank that ran out of memory
        self._thread = threading.Thread(target=self._watch, name="longhaul-fit", daemon=True)

    def __enter__(self) -> _Together:
        if self._ranks.size > 1:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._failed is not None:
            self._thread.join(GRACE_S + 5)  # another rank has gone first: this one's end is as theirs
        self._over.set()

    def failed(self) -> None:
        """This rank ran out of memory."""
        self._says = True

    def _watch(self) -> None:
        store = self._ranks.another_store(timedelta(seconds=GRACE_S))
        while store is not None and self._failed is None:
            if self._says:
                store.set(self._key, str(self._ranks.rank))
            if store.check([self._key]):
                self._failed = store.get(self._key).decode()
            elif self._over.wait(POLL_S):
                return
        if store is not None and not self._over.wait(GRACE_S):
            self._end(str(self._failed))

    def _end(self, rank: str) -> None:
        log.error(
            "micro_batch_seqs: fit: rank %s alone ran out of memory in a step of %d sequences, and the others wait for "
            "it in a collective; expected a micro-batch that every rank holds: set micro_batch_seqs=%d",
            rank, self._rows, self._fewer,
        )  # fmt: skip
        time.sleep(2 * POLL_S)  # the launcher ends all ranks with the first: let them write
        sys.stderr.flush()
        os._exit(OUT_OF_MEMORY)


def _fits(run: TrainRun, ranks: Ranks, engine: Engine, rows: int) -> bool:
    """Whether a step of such micro-batches fits. It changes nothing: its rows count for nothing, its rates are 0.

    It has two of them where a step of the run has more than one: the second comes beside the gradients of the first.
    """
    length = run.data.seq_tokens
    count = min(2, math.ceil(run.batch_seqs / ranks.size / rows))
    tokens = torch.zeros(rows, length + 1, dtype=torch.int64, device=ranks.device)
    documents = torch.zeros(rows, length, dtype=torch.int32, device=ranks.device) if run.data.document_mask else None
    batch = run.objective.batch(tokens, torch.zeros(rows, dtype=torch.int64, device=ranks.device), documents)
    try:
        fail_at("fit.step", rows)
        sources = torch.zeros(count, rows, dtype=torch.int64, device=ranks.device)
        tally = Tally([batch] * count, sources, 1)  # as in a run
        engine.step(tally.batches, 1, Rates(lr=0.0, weight_decay=0.0), tally=tally)
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
