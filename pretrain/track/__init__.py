"""Tracking: the loop writes the journal (`journal.py`), and trackers follow it in a process of their own.

A new tracker is one file with its config class, whose `build(run_folder)` gives a `Tracker`, and its name in `Track`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.track.follower import Busy, Tracker, carry_all, cause
from pretrain.track.journal import Journal
from pretrain.track.mlflow import Mlflow, MlflowTracker
from pretrain.track.process import Trackers
from pretrain.track.system import SystemMetrics

Track = Mlflow  # the second one makes it Annotated[Mlflow | Other, Field(discriminator="kind")]

__all__ = [
    "Journal", "Mlflow", "Synced", "SystemMetrics", "Track", "TrackError", "Tracker", "Trackers", "measure_system",
    "start_trackers", "sync",
]  # fmt: skip


class TrackError(Exception):
    """A tracker could not be reached. The message is one line; nothing was lost."""


@dataclass(frozen=True)
class Synced:
    """What a sync carried, and where to."""

    name: str
    page: str
    metrics: int
    checkpoints: int


def start_trackers(track: Sequence[Track], run_folder: Path) -> Trackers:
    """Follow the journal of a run from now on, and what older attempts left (rank 0 only). Never raises."""
    return Trackers(track, run_folder)


def measure_system(track: Sequence[Track], run_folder: Path, branch: int, step: int) -> SystemMetrics | None:
    """Measure this node as often as any of the trackers wants (on one rank of each node); None where none does."""
    wanted = [config.system_every_seconds for config in track if config.system_every_seconds is not None]
    return SystemMetrics(run_folder, branch, min(wanted), lambda: step) if wanted else None


def sync(
    track: Sequence[Track], run_folder: Path, progress: Callable[[MlflowTracker], None] = lambda _: None
) -> list[Synced]:
    """Carry all that is missing, now and in this thread: `pretrain track-sync RUN`. Raises TrackError, ConfigError."""
    done = []
    for config in track:
        config.check()
        tracker = config.build(run_folder)
        try:
            carry_all(tracker, lambda tracker=tracker: progress(tracker))  # type: ignore[misc]
        except Busy as busy:
            raise TrackError(f"{busy}; try again when it is done") from None
        except Exception as error:
            raise TrackError(f"{tracker.name}: {cause(error)}; nothing was lost, try again later") from None
        done.append(Synced(tracker.name, config.page(run_folder), tracker.metrics, tracker.checkpoints))
    return done
