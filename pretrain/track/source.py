"""Which code a run was trained by: its commit, and what was changed since."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from pretrain.track.mask import mask_text

FOLDER = "code"  # in the run folder: <branch>.diff
MAX_DIFF = 2**20  # bytes
PATIENCE_S = 10.0


@dataclass(frozen=True)
class Source:
    """The state of a work tree; `diff` is empty where nothing was changed."""

    commit: str
    diff: str


def read_source(folder: Path = Path(__file__).parents[2]) -> Source | None:
    """The state of the work tree that `folder` is the root of; None where it is none, or git does not answer.

    Credentials in the diff are masked. Files that git does not know are not in it.
    """
    if not (folder / ".git").exists():
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    diff = _git(folder, "diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv")
    if not commit or diff is None:
        return None
    cut = diff if len(diff) <= MAX_DIFF else f"{diff[:MAX_DIFF]}\n... cut off at {MAX_DIFF} characters\n"
    return Source(commit.strip(), mask_text(cut))


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE_S, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")
