"""Before the first step: does every rank's device compute right and fast, is there room, do all run the same code?

What is wrong with one rank is said with the name of its node, which the launcher then leaves out.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import platform
import shutil
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import Field

from configs import Bool, Float, Section
from pretrain.meter import peak_flops
from pretrain.ranks import Ranks
from pretrain.suspects import accuse

log = logging.getLogger("pretrain")

GIB = 2**30
PACKAGES = ("torch", "deepspeed", "numpy")


class PreflightError(Exception):
    """A rank is not fit to train. One line: rank, node, what is wrong."""


class Preflight(Section):
    """What every rank has to show before the first step. Speed is judged on GPUs alone."""

    enabled: Bool = True
    least_matmul_share: Float = Field(default=0.7, ge=0, le=1)  # of the median rank's rate
    least_peak_share: Float = Field(default=0.3, ge=0, le=1)  # of the data sheet's dense bf16 rate
    least_all_reduce_gb_s: Float | None = Field(default=None, gt=0)  # of bytes reduced, by 64 MiB a rank
    least_free_gib: Float = Field(default=0.1, ge=0)  # where the run folder lies
    shared_gpus: Bool = False  # ranks may share a GPU

    def check(self, ranks: Ranks, run_folder: Path) -> None:
        """Raise PreflightError on every rank where one is not fit, and name its node to the launcher."""
        if not self.enabled:
            return
        fitness = [Fitness(**each) for each in ranks.gather(vars(_examine(ranks, run_folder, self)))]
        rate = _all_reduce_gb_s(ranks)
        faults = _faults(self, fitness) or _slow_network(self, rate, ranks)
        if ranks.rank == 0:
            log.info(
                "preflight: %d ranks, matmul %.3g TFLOP/s (slowest %.3g), all-reduce %.2g GB/s", ranks.size,
                statistics.median(f.tflops for f in fitness), min(f.tflops for f in fitness), rate,
            )  # fmt: skip
            for rank in _culprits(faults, ranks.size):
                fault = next(fault for each, fault in faults if each == rank)
                accuse(run_folder, rank, ranks.hosts[rank], f"preflight: {fault}")
        if faults:
            where = (f"rank {rank} ({ranks.hosts[rank]}): " if rank is not None else "" for rank, _ in faults)
            lines = [f"{place}{fault}" for place, (_, fault) in zip(where, faults, strict=True)]
            raise PreflightError(f"preflight: {'; '.join(lines[:5])}")


@dataclass(frozen=True)
class Fitness:
    """What a rank found out about its node."""

    tflops: float
    peak_tflops: float | None
    versions: dict[str, str]
    problem: str  # of the device or disk, or empty


def _examine(ranks: Ranks, run_folder: Path, settings: Preflight) -> Fitness:
    problem = _disk_problem(run_folder, settings) or _gpu_problem(ranks, settings)
    peak, tflops = None, 0.0
    try:
        if ranks.device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name())
        if not _computes_right(ranks.device):
            problem = "its device computes wrong results"
        tflops = matmul_tflops(ranks.device)
    except RuntimeError as error:
        problem = f"its device does not answer: {' '.join(str(error).split())[:200]}"
    return Fitness(tflops, None if peak is None else peak / 1e12, _versions(), problem)


def _faults(settings: Preflight, fitness: list[Fitness]) -> list[tuple[int | None, str]]:
    """(rank, what is wrong), worst first."""
    faults: list[tuple[int | None, str]] = [(r, f.problem) for r, f in enumerate(fitness) if f.problem]
    for name in fitness[0].versions:
        versions = [f.versions.get(name, "") for f in fitness]
        most = Counter(versions).most_common(1)[0][0]
        faults += [(r, f"{name} {v}, the other ranks have {most}") for r, v in enumerate(versions) if v != most]
    median = statistics.median(f.tflops for f in fitness)
    for rank, f in enumerate(fitness):
        if f.peak_tflops is None or f.problem:
            continue
        if f.tflops < settings.least_matmul_share * median:
            faults.append((rank, f"matmul at {f.tflops / median:.0%} of the median rank's rate"))
        elif f.tflops < settings.least_peak_share * f.peak_tflops:
            faults.append((rank, f"matmul at {f.tflops / f.peak_tflops:.0%} of {f.peak_tflops:.0f} TFLOP/s"))
    return faults


def _culprits(faults: list[tuple[int | None, str]], ranks: int) -> list[int]:
    """The ranks whose nodes are to be left out: none where most have a fault, which is then the run's or the site's."""
    named = sorted({rank for rank, _ in faults if rank is not None})
    return named if 2 * len(named) < ranks else []


def _slow_network(settings: Preflight, rate: float, ranks: Ranks) -> list[tuple[int | None, str]]:
    least = settings.least_all_reduce_gb_s
    if least is None or ranks.size == 1 or rate >= least:
        return []
    return [(None, f"all-reduce at {rate:.2g} GB/s over {ranks.size} ranks, expected at least {least:g}")]


def _disk_problem(run_folder: Path, settings: Preflight) -> str:
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(run_folder).free
    except OSError as error:
        return f"{run_folder}: {error.strerror}"
    if free < settings.least_free_gib * GIB:
        return f"{run_folder}: {free / GIB:.2f} GiB free, expected at least {settings.least_free_gib:g}"
    return ""


def _gpu_problem(ranks: Ranks, settings: Preflight) -> str:
    given = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    if ranks.device.type != "cuda":
        return f"was given {given} GPU(s) by SLURM, and torch sees none" if given.isdigit() and int(given) else ""
    seen = torch.cuda.device_count()
    if settings.shared_gpus or ranks.local_rank < seen:
        return ""
    return f"is rank {ranks.local_rank} of its node, which shows {seen} GPU(s); set preflight.shared_gpus to share one"


def _computes_right(device: torch.device) -> bool:
    """A product of small integers, which fp32 holds exactly, against the host's."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (128, 128), generator=generator).float() for _ in range(2))
    expected = a.double() @ b.double()
    return bool(torch.equal((a.to(device) @ b.to(device)).cpu().double(), expected))


def matmul_tflops(device: torch.device, dtype: torch.dtype | None = None) -> float:
    """The rate of a matrix product: bf16 of 8192 on a GPU, fp32 of 256 elsewhere; the best of five."""
    on_gpu = device.type == "cuda"
    n = 8192 if on_gpu else 256
    a = torch.ones(n, n, dtype=dtype or (torch.bfloat16 if on_gpu else torch.float32), device=device)
    best = float("inf")
    for _ in range(6):
        if on_gpu:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - begun)
    return 2.0 * n**3 / best / 1e12


def _all_reduce_gb_s(ranks: Ranks) -> float:
    """Bytes per second and rank of a sum over all ranks, the better of two; 0 for a single rank."""
    if ranks.size == 1:
        return 0.0
    size = 64 * 2**20 if ranks.device.type == "cuda" else 2**20
    values = torch.ones(size // 4, device=ranks.device)
    best = float("inf")
    for _ in range(3):
        values.fill_(1.0)
        begun = time.perf_counter()
        dist.all_reduce(values)
        total = float(values[-1])
        best = min(best, time.perf_counter() - begun)
        assert total == ranks.size, f"an all-reduce of ones over {ranks.size} ranks gave {total}"
    return size / best / 1e9


@cache
def _versions() -> dict[str, str]:
    """What must be equal on all ranks: the interpreter, the libraries, and this code."""
    versions = {"Python": platform.python_version(), "longhaul code": _code_hash()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    if torch.cuda.is_available():
        versions["CUDA"] = str(torch.version.cuda)
    return versions


def _code_hash() -> str:
    """Over the sources of the packages that a rank runs."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for package in ("configs", "data_pipeline", "pretrain"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
