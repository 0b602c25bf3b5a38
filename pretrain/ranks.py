"""Who am I among the ranks of this attempt, and the few things that ranks say to each other besides gradients."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from configs import ConfigError
from data_pipeline.files import Stopped

T = TypeVar("T")
RENDEZVOUS_TIMEOUT_S = 600.0
LAST_WAIT_S = 5.0
COLLECTIVE_TIMEOUT_S = 3600.0


class AbsentRanks(Exception):
    """Not every rank came to the rendezvous, or one came without its GPU. The message is one line; `absent` are their
    numbers and hosts."""

    def __init__(self, message: str, absent: Mapping[int, str]) -> None:
        super().__init__(message)
        self.absent = absent


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


def slurm_hosts(environment: Mapping[str, str]) -> list[str]:
    """The host of every rank of a SLURM step: n[1-2] with 2(x2) tasks per node -> n1 n1 n2 n2. Empty elsewhere."""
    nodes = expand(environment.get("SLURM_STEP_NODELIST", ""))
    counts = []
    for part in filter(None, environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(",")):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            return []
        counts += [int(match[1])] * int(match[2] or 1)
    return [node for node, count in zip(nodes, counts, strict=False) for _ in range(count)]


def expand(nodelist: str) -> list[str]:
    """The hosts of a SLURM node list: n[03-05,9],m1 -> n03 n04 n05 n9 m1."""
    hosts = []
    for prefix, ranges in re.findall(r"([^,\[]+)(?:\[([\d,-]+)\])?", nodelist):
        if not ranges:
            hosts.append(prefix)
        for part in filter(None, ranges.split(",")):
            low, _, high = part.partition("-")
            hosts += [f"{prefix}{n:0{len(low)}d}" for n in range(int(low), int(high or low) + 1)]
    return hosts


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: n[03-07,9],m1 -> n03. Raises ConfigError on an empty one."""
    match = re.match(r"([^,\[]+)(?:\[(\w+))?", nodelist)
    if not match:
        raise ConfigError(f"SLURM_JOB_NODELIST: expected host names, got {nodelist!r}")
    return match[1] + (match[2] or "")


class Ranks:
    """The ranks of this attempt, connected. Collectives here run on the CPU, beside the engine's own."""

    def __init__(
        self,
        place: Place,
        rendezvous_timeout_s: float = RENDEZVOUS_TIMEOUT_S,
        collective_timeout_s: float = COLLECTIVE_TIMEOUT_S,
    ) -> None:
        """Wait for every rank. Raises AbsentRanks."""
        self.rank, self.size, self.local_rank, self.place = place.rank, place.size, place.local_rank, place
        self.device = _device(place.local_rank)
        for key, value in (("RANK", place.rank), ("WORLD_SIZE", place.size), ("LOCAL_RANK", place.local_rank)):
            os.environ[key] = str(value)  # DeepSpeed reads them, and looks for MPI where they are missing
        address = place.address or "127.0.0.1:29500"
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address.rsplit(":", 1)
        self.hosts = [socket.gethostname()]  # by rank
        self._store: Store = HashStore()
        if place.address is not None:
            self._store, self.hosts = _meet(place, self.device.type, rendezvous_timeout_s)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=collective_timeout_s)
        dist.init_process_group(
            backend, store=PrefixStore("group", self._store), rank=place.rank, world_size=place.size, timeout=timeout
        )
        self.cpu = dist.new_group(backend="gloo", timeout=timeout) if backend == "nccl" else dist.group.WORLD

    @staticmethod
    def join(
        rendezvous_timeout_s: float = RENDEZVOUS_TIMEOUT_S, collective_timeout_s: float = COLLECTIVE_TIMEOUT_S
    ) -> Ranks:
        """Join the other ranks of this process's environment. Raises AbsentRanks."""
        return Ranks(Place.read(os.environ), rendezvous_timeout_s, collective_timeout_s)

    def another_store(self, timeout: timedelta) -> Store | None:
        """A connection of its own to the store of the rendezvous, for a thread; None for a single rank."""
        return None if self.place.address is None else _connect(self.place, timeout, serves=False)

    def leave_together(self, seconds: float) -> None:
        """Called by every rank when its work is done: the others wait until rank 0 is, as a launcher may end all with
        the first; and rank 0, which serves the store, goes last."""
        with contextlib.suppress(Exception):  # rank 0 has gone
            if self.rank != 0:
                self._store.wait(["done"], timedelta(seconds=seconds))
                self._store.add("gone", 1)
                return
            self._store.set("done", "1")
            deadline = time.monotonic() + LAST_WAIT_S
            while self._store.add("gone", 0) < self.size - 1 and time.monotonic() < deadline:
                time.sleep(0.01)

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
            vars(error)["said_by_rank_0"] = self.rank != 0  # once is enough
            raise error
        return result

    def each(self, function: Callable[[], T]) -> T:
        """What `function` gives on this rank; where it raises on any, every rank raises the same, Stopped before all
        else."""
        result: T | None = None
        error: Exception | None = None
        try:
            result = function()
        except Exception as caught:
            error = caught
        errors = [found for found in self.gather(error) if found is not None]
        if errors:
            failure = next((found for found in errors if isinstance(found, Stopped)), errors[0])
            vars(failure)["said_by_rank_0"] = self.rank != 0
            raise failure
        return cast(T, result)

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

    def spread(self, tensor: Tensor, source: int) -> Tensor:
        """What one rank's tensor holds, in that of every rank, on their devices."""
        if self.size > 1:
            dist.broadcast(tensor, source)
        return tensor

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


def _meet(place: Place, device: str, timeout_s: float) -> tuple[Store, list[str]]:
    """Wait for every rank; the store through which they found each other, and the host of each."""
    try:
        store = _connect(place, timedelta(seconds=timeout_s), serves=place.rank == 0)
    except (dist.DistStoreError, dist.DistNetworkError, RuntimeError) as error:
        if place.rank == 0:
            raise
        where = f"rank 0 did not answer at {place.address} within {timeout_s:.0f} s"
        raise AbsentRanks(f"rendezvous: {where}: is it running there?", _expected([0])) from error
    store.set(f"here/{place.rank}", f"{device} {socket.gethostname()}")
    if place.rank == 0:
        absent = _await_ranks(store, place.size, timeout_s)
        here = [] if absent else [store.get(f"here/{rank}").decode().split(" ", 1) for rank in range(place.size)]
        devices, hosts = [each[0] for each in here], [each[1] for each in here]
        blind = [rank for rank, each in enumerate(devices) if each == "cpu" and "cuda" in devices]
        store.set("met", json.dumps({"absent": absent, "hosts": hosts, "blind": blind}))
    store.wait(["met"], timedelta(seconds=timeout_s + 60))
    met = json.loads(store.get("met"))
    if met["absent"]:
        names = _expected(met["absent"])
        shown = ", ".join(f"{rank} ({host})" if host else str(rank) for rank, host in names.items())
        if place.rank == 0:
            time.sleep(1.0)  # the store goes with this process: let the others read it
        raise AbsentRanks(f"rendezvous: after {timeout_s:.0f} s rank(s) {shown} of {place.size} were absent", names)
    if met["blind"]:
        names = {rank: met["hosts"][rank] for rank in met["blind"]}
        shown = ", ".join(f"{rank} ({host})" for rank, host in names.items())
        if place.rank == 0:
            time.sleep(1.0)
        raise AbsentRanks(f"rendezvous: rank(s) {shown} see no GPU, the others do", names)
    return store, met["hosts"]


def _connect(place: Place, timeout: timedelta, serves: bool) -> Store:
    """The store at the address of rank 0, which serves it unless torchrun does. Keys of older restarts are apart."""
    assert place.address is not None
    host, port = place.address.rsplit(":", 1)
    serves = serves and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = TCPStore(host, int(port), None, serves, timeout, wait_for_workers=False)
    return PrefixStore(f"longhaul/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _await_ranks(store: Store, size: int, timeout_s: float) -> list[int]:
    """The ranks that have not come in time."""
    deadline = time.monotonic() + timeout_s
    absent = list(range(size))
    while absent := [rank for rank in absent if not store.check([f"here/{rank}"])]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return absent


def _expected(ranks: list[int]) -> dict[int, str]:
    """The hosts on which SLURM has started these ranks; empty names elsewhere."""
    hosts = slurm_hosts(os.environ)
    return {rank: hosts[rank] if rank < len(hosts) else "" for rank in ranks}
