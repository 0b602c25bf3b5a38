"""The peak memory of an engine's step as torch tracks it (MemTracker), on this machine and at any number of ranks.

The torch engine runs on fake tensors, which hold no data, at any size. DeepSpeed, which looks at addresses, runs on
real ones, and the other ranks are torch's fake process group, whose collectives do nothing.
"""

from __future__ import annotations

import gc
import os
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.engine import EngineSettings
from pretrain.engine.zero import DeepSpeed
from pretrain.models.gpt import Gpt
from pretrain.objectives import NextToken
from pretrain.optim import AdamW
from pretrain.ranks import Ranks

CPU = torch.device("cpu")


class _Ones(TorchDispatchMode):
    """Numbers read off tensors, which fake ones do not hold, are 1: the norm of the gradient."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        return func(*args, **(kwargs or {}))


def torch_engine_peak(gpt: Gpt, engine: EngineSettings, rows: int, length: int) -> int:
    """Bytes at the peak of a step of one rank, its engine's states included."""
    with FakeTensorMode(), _Ones():  # type: ignore[no-untyped-call]
        return _peak(gpt, engine, rows, length, ranks=1)[0]


def zero_peaks(
    alone: Ranks, gpt: Gpt, cases: list[tuple[DeepSpeed, int, int]], length: int, bucket: int
) -> list[tuple[int, int]]:
    """The same of rank 0 of eight, for each (engine, rows, micro-batches), with buckets of that many gradients.

    (on the device, offloaded), as if the host were not the device here. For a process of its own.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    os.environ["WORLD_SIZE"] = "8"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    alone.cpu = dist.group.WORLD
    whole = DeepSpeed._zero_config
    patched: Any = DeepSpeed
    patched._zero_config = lambda self, count: whole(self, count) | {"reduce_bucket_size": bucket}
    return [_peak(gpt, engine, rows, length, 8, micro_batches) for engine, rows, micro_batches in cases]


def _peak(
    gpt: Gpt, settings: EngineSettings, rows: int, length: int, ranks: int, micro_batches: int = 1
) -> tuple[int, int]:
    place: Any = SimpleNamespace(device=CPU, size=ranks, rank=0)
    optim = AdamW(lr_peak=1e-4)
    tracker = MemTracker()
    model = gpt.build()
    model.to = lambda device: model  # type: ignore[method-assign, assignment]  # fake parameters cannot be moved
    tracker.track_external(model)
    with tracker:
        engine = settings.build(model, optim, place)
        gc.collect()
        tokens = torch.zeros(rows, length + 1, dtype=torch.int64)
        batches = [NextToken().batch(tokens, torch.full((rows,), length))] * micro_batches
        noise: Any = SimpleNamespace(begin=lambda i: tracker.reset_mod_stats())  # one forward pass for each
        engine.step(batches, rows * length, optim.rates(1.0), noise)
        tracker._peak_mem.clear()  # that of what follows
        engine.step(batches, rows * length, optim.rates(1.0), noise)
    offloaded = _offloaded(engine) if isinstance(settings, DeepSpeed) and settings.offload.optimizer else 0
    return int(tracker.get_tracker_snapshot("peak")[CPU]["Total"]) - offloaded, offloaded


def _offloaded(engine: Any) -> int:
    """Bytes of what DeepSpeed at stages 1 and 2 would have on the host."""
    zero = engine.engine.optimizer
    flats = [t for flat in zero.single_partition_of_fp32_groups for t in (flat, flat.grad)]
    moments = [v for state in zero.optimizer.state.values() for v in state.values()]
    tensors = [*flats, *moments, *zero.param_buffer_of_bit16_for_cpu_offload_groups]
    return sum(t.untyped_storage().nbytes() for t in [*tensors, zero.temp_grad_buffer_for_cpu_offload])


def gpu_peak(ranks: Ranks, gpt: Gpt, settings: EngineSettings, rows: int, length: int) -> tuple[int, int]:
    """Bytes that a GPU had given out at the peak of a step, measured and by arithmetic."""
    from pretrain.memory import Shape, step_memory
    from pretrain.models.loss import loss_plan

    optim = AdamW(lr_peak=1e-4)
    engine = settings.build(gpt.build(), optim, ranks)
    gc.collect()
    tokens = torch.zeros(rows, length + 1, dtype=torch.int64, device=ranks.device)
    batch = NextToken().batch(tokens, torch.full((rows,), length, device=ranks.device))
    for _ in range(2):
        engine.step([batch], rows * length, optim.rates(1.0))
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    engine.release()
    plan, compiles = loss_plan(settings.loss, ranks.device), settings.compiles(ranks.device)
    return peak, int(step_memory(Shape.of(gpt), settings, 1, rows * length, plan, compiles, accumulates=False).total)
