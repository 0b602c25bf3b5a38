"""Who am I among the ranks of this attempt, and the few things that ranks say to each other besides gradients."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from configs import ConfigError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Place:
    """A rank's place as the environment gives it."""

    rank: int
    size: int
    local_rank: int
    address: str | None  # of rank 0, HOST:PORT; None for a single rank
    source: str  # torchrun, SLURM or alone

    @staticmethod
    def read(environment: Mapping[str, str]) -> Place:
        """From torchrun's variables, else from those of a SLURM step, else one rank alone."""
        get = environment.get
        if "RANK" in environment and "WORLD_SIZE" in environment:
            address = f"{get('MASTER_ADDR', '127.0.0.1')}:{get('MASTER_PORT', '29500')}"
            return Place(
                int(get("RANK", "")), int(get("WORLD_SIZE", "")), int(get("LOCAL_RANK", "0")), address, "torchrun"
            )
        if "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
            host = get("MASTER_ADDR") or first_host(
                get("SLURM_STEP_NODELIST") or get("SLURM_JOB_NODELIST", "127.0.0.1")
            )
            port = get("MASTER_PORT") or str(20000 + int(get("SLURM_JOB_ID", "0")) % 20000)
            size = int(get("SLURM_STEP_NUM_TASKS", "1"))
            return Place(int(get("SLURM_PROCID", "0")), size, int(get("SLURM_LOCALID", "0")), f"{host}:{port}", "SLURM")
        return Place(0, 1, 0, None, "alone")


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: n[03-07,9],m1 -> n03. Raises ConfigError on an empty one."""
    match = re.match(r"([^,\[]+)(?:\[(\w+))?", nodelist)
    if not match:
        raise ConfigError(f"SLURM_JOB_NODELIST: expected host names, got {nodelist!r}")
    return match[1] + (match[2] or "")


class Ranks:
    """The ranks of this attempt, connected. Collectives here run on the CPU, beside the engine's own."""

    def __init__(self, place: Place) -> None:
        self.rank, self.size, self.local_rank = place.rank, place.size, place.local_rank
        self.device = _device(place.local_rank)
        for key, value in (("RANK", place.rank), ("WORLD_SIZE", place.size), ("LOCAL_RANK", place.local_rank)):
            os.environ[key] = str(value)  # DeepSpeed reads them, and looks for MPI where they are missing
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        if place.address is None:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=TIMEOUT)
        else:
            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = place.address.rsplit(":", 1)
            dist.init_process_group(backend, rank=place.rank, world_size=place.size, timeout=TIMEOUT)
        self.cpu = dist.new_group(backend="gloo", timeout=TIMEOUT) if backend == "nccl" else dist.group.WORLD

    @staticmethod
    def join() -> Ranks:
        """Join the other ranks of this process's environment."""
        return Ranks(Place.read(os.environ))

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave without waiting for the others: one of them may be gone."""

    def first(self, function: Callable[[], T]) -> T:
        """What `function` gives on rank 0, on every rank; where it raises, every rank raises the same."""
        result: T | None = None
        error: Exception | None = None
        if self.rank == 0:
            try:
                result = function()
            except Exception as caught:
                error = caught
        result, error = self.tell((result, error))
        if error is not None:
            raise error
        return result

    def tell(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.cpu, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank, in their order."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.cpu)
        return values

    def sum_later(self, values: Tensor) -> Pending:
        """Begin to sum a CPU tensor over the ranks."""
        return Pending(values, dist.all_reduce(values, group=self.cpu, async_op=True))

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a CPU tensor over the ranks."""
        return self.sum_later(values).result()

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum(torch.zeros(1))


@dataclass
class Pending:
    """A sum under way."""

    values: Tensor
    work: Any

    def result(self) -> Tensor:
        """The sum; waits for the slowest rank."""
        self.work.wait()
        return self.values


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
