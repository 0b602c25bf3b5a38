"""Run folders as launchers and ranks leave them, made by hand; the journal by its own writer."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.lineage import Lineage
from pretrain.track.journal import Journal

END_STEP = 100


class RunFolder:
    """Writes what `launch` reads. Every attempt takes a branch and begins at `step` of the one before."""

    def __init__(self, path: Path, launcher: str = "local", jobs: Sequence[str] = ()) -> None:
        self.path = path
        path.mkdir()
        (path / "run.yaml").write_text("name: small\n")
        self.submission = path / "submissions" / "1"
        self.submission.mkdir(parents=True)
        (self.submission / "run.yaml").write_text("name: small\n")
        (self.submission / "launcher.yaml").write_text(f"kind: {launcher}\n")
        (self.submission / "jobs").write_text("".join(f"{job}\n" for job in jobs))
        self.launcher, self.jobs = launcher, jobs
        self.attempts = 0

    def attempt(self, pid: int | None = None, host: str | None = None, **facts: Any) -> Path:
        """The folder of a new attempt that a launcher has begun."""
        self.attempts += 1
        folder = self.path / "logs" / f"attempt-{self.attempts}"
        folder.mkdir(parents=True)
        begun = {
            "attempt": self.attempts, "launcher": self.launcher, "job": self.jobs[-1] if self.jobs else None,
            "submission": 1, "nodes": [], "ranks": 2, "began": time.time(), "queued": None,
            "host": host or socket.gethostname(), "pid": os.getpid() if pid is None else pid,
        }  # fmt: skip
        (folder / "attempt.json").write_text(json.dumps(begun | facts))
        (folder / "rank-0.log").write_text(f"attempt {self.attempts}, rank 0\n")
        (folder / "rank-1.log").write_text(f"attempt {self.attempts}, rank 1\n")
        return folder

    def end(self, exit_code: int | None, action: str, why: str = "why") -> None:
        """The newest attempt ends, as its launcher writes it."""
        record = {"exit_code": exit_code, "why": why, "action": action, "ended": time.time()}
        (self.path / "logs" / f"attempt-{self.attempts}" / "end.json").write_text(json.dumps(record))

    def train(self, steps: Sequence[int], begin: int = 0) -> Journal:
        """The newest attempt trains, and records each of the steps."""
        branch = Lineage(self.path).take(max(0, self.attempts - 1) or None, begin, None, "start").branch
        journal = Journal(self.path, branch)
        seconds = {"imports": 0.5, "rendezvous": 0.1, "build": 0.2, "load": 0.1}
        facts = {"attempt": self.attempts, "began": time.time(), "end_step": END_STEP, "seconds": seconds}
        journal.attempt(branch - 1 or None, begin, "start", config={"log_every_steps": 1}, **facts)
        for step in steps:
            metrics = {"loss": 5.0 - step / 100, "tokens_per_s": 1234.5, "mfu": 0.42}
            journal.step(step, step * 4, step * 128, None, metrics, {"train": 2.0, "data": 0.5})
        return journal

    def save(self, step: int, branch: int) -> Path:
        """A committed checkpoint."""
        folder = self.path / "checkpoints" / f"step-{step}.b{branch}"
        folder.mkdir(parents=True)
        (folder / "MANIFEST.json").write_text("{}")
        return folder
