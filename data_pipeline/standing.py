"""How far a preparation has come, from its folder alone: whoever works on it, and wherever, leaves traces there."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline import shards
from data_pipeline.failures import Failure, failures
from data_pipeline.lease import holder
from data_pipeline.plan import PLAN, Plan
from data_pipeline.preparation import Preparation

WINDOW_S = 600.0  # over which the speed is taken


@dataclass(frozen=True)
class Standing:
    """A corpus. `recent` is the input of slices made in the last `recent_s` seconds."""

    corpus: str
    state: Literal["not planned", "planned", "sealed"]
    slices: int = 0
    made: int = 0
    at_work: int = 0  # slices that a living process has
    failed: tuple[Failure, ...] = ()
    bytes: int = 0  # of input
    made_bytes: int = 0
    recent_bytes: int = 0
    recent_s: float = 0.0


def standing(preparation: Preparation, corpus: str, since: float | None = None) -> Standing:
    """How far a corpus has come; `since` (of the epoch) the work goes on, without it since it was planned."""
    folder = preparation.out / corpus
    plan = Plan.read(folder)
    if plan is None:
        return Standing(corpus, "not planned")
    now = time.time()
    begun = max(now - WINDOW_S, since if since is not None else (folder / PLAN).stat().st_mtime)
    ended = _ended(folder / "slices")
    made = [slice for slice in plan.slices if slice.name in ended]
    return Standing(
        corpus=corpus,
        state="sealed" if _is_sealed(folder) else "planned",
        slices=len(plan.slices),
        made=len(made),
        at_work=sum(holder(path) is not None for path in (folder / "slices").glob(".*.lease")),
        failed=tuple(failures(folder)),
        bytes=sum(slice.bytes for slice in plan.slices),
        made_bytes=sum(slice.bytes for slice in made),
        recent_bytes=sum(slice.bytes for slice in made if ended[slice.name] > begun),
        recent_s=max(now - begun, 0.0),
    )


def speed(standings: list[Standing]) -> tuple[float | None, float | None]:
    """(bytes of input per second, seconds left) of the whole, None where nothing can be said."""
    left = sum(s.bytes - s.made_bytes for s in standings)
    seconds = max((s.recent_s for s in standings), default=0.0)
    rate = sum(s.recent_bytes for s in standings) / seconds if seconds > 0 else 0.0
    return (rate, left / rate) if rate > 0 and left > 0 else (None, None)


def _ended(slices: Path) -> dict[str, float]:
    """When each slice that is there was made."""
    if not slices.is_dir():
        return {}
    with os.scandir(slices) as entries:
        return {entry.name: entry.stat().st_mtime for entry in entries if not entry.name.startswith(".")}


def _is_sealed(folder: Path) -> bool:
    try:
        head = shards.read_head(folder)
    except shards.ShardError:
        return False
    return bool(head["files"].get(PLAN) == shards.file_hash(folder / PLAN))
