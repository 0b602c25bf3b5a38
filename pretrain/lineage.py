"""Branches of a run: which attempt's checkpoints are alive.

Every attempt and every rollback takes the next integer as its branch, by creating `lineage/<branch>.json` exclusively
before its first step. The record names the checkpoint it goes on from. Alive are the highest branch's checkpoints, its
parent's up to the step it left the parent at, and so on. What a paused or doubly started attempt commits after another
has taken a higher branch is dead by construction; when it notices, it stops.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs import ConfigError
from data_pipeline.shards import sync_folder

FORMAT_VERSION = 1
AMEND = "amend"  # why a branch is there that no attempt has taken


class TakenOver(Exception):
    """Another attempt has taken a higher branch of this run."""


@dataclass(frozen=True)
class Branch:
    """A branch's record: `parent`, `step`, `manifest_hash` name the checkpoint it goes on from (None at the start).

    `origin` is what the first branch of a run begins with that is not random: `pretrain.parent.Parent.record`.
    """

    branch: int
    parent: int | None
    step: int
    manifest_hash: str | None
    why: str
    format: int = FORMAT_VERSION
    time: float = 0.0
    host: str = ""
    pid: int = 0
    origin: dict[str, Any] | None = None


class Lineage:
    """The branches of a run folder."""

    def __init__(self, run_folder: Path) -> None:
        self.folder = run_folder / "lineage"

    def branches(self) -> dict[int, Branch]:
        """Every branch by its number."""
        return {int(path.stem): _read(path) for path in self.folder.glob("[0-9]*.json")}

    def highest(self) -> int:
        """The newest branch, 0 where the run has not begun."""
        numbers = [int(path.stem) for path in self.folder.glob("[0-9]*.json")]
        return max(numbers, default=0)

    def take(
        self,
        parent: int | None,
        step: int,
        manifest_hash: str | None,
        why: str,
        origin: dict[str, Any] | None = None,
    ) -> Branch:
        """Take the next branch. Where two attempts race, each gets one of its own, and the higher wins."""
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            branch = Branch(
                self.highest() + 1, parent, step, manifest_hash, why,
                time=time.time(), host=socket.gethostname(), pid=os.getpid(), origin=origin,
            )  # fmt: skip
            if create_exclusively(self.folder / f"{branch.branch}.json", asdict(branch)):
                return branch

    def check(self, mine: int) -> None:
        """Raise TakenOver where a higher branch than `mine` exists."""
        highest = self.highest()
        if highest > mine:
            record = self.branches()[highest]
            raise TakenOver(
                f"branch {highest} ({record.why}, host {record.host}, pid {record.pid}) has taken over this run from "
                f"branch {mine}"
            )

    def live(self) -> list[tuple[int, int | None]]:
        """The live lineage, newest first: (branch, last step that counts in it, or None for all of them)."""
        branches = self.branches()
        number: int | None = max(branches, default=None)
        limit: int | None = None
        alive = []
        while number is not None:
            alive.append((number, limit))
            record = branches[number]
            limit = record.step if limit is None else min(limit, record.step)
            number = record.parent
        return alive


def _read(path: Path) -> Branch:
    record = json.loads(path.read_text())
    if record["format"] > FORMAT_VERSION:
        raise ConfigError(
            f"{path}: format {record['format']} is newer than this code's {FORMAT_VERSION}; update longhaul"
        )
    return Branch(**record)


def create_exclusively(path: Path, record: dict[str, Any]) -> bool:
    """Create a JSON file whole and durable, or leave it alone where it exists; True when it was created."""
    temporary = path.with_name(f".{path.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    with temporary.open("w") as file:
        json.dump(record, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    sync_folder(path.parent)
    return True
