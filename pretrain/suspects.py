"""Who is to blame: ranks name a node in `RUN/logs/attempt-<n>/suspects.jsonl`, and the launcher avoids it."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

ATTEMPT = "LONGHAUL_ATTEMPT"  # from the launcher; absent where nobody could avoid a node


def accuse(run_folder: Path, rank: int, host: str, cause: str) -> None:
    """Name a rank and its host as the cause of a bad end. Never raises."""
    attempt = os.environ.get(ATTEMPT)
    if attempt is None:
        return
    line = json.dumps({"host": host, "rank": rank, "cause": cause, "time": round(time.time(), 3)})
    path = run_folder / "logs" / f"attempt-{attempt}" / "suspects.jsonl"
    with contextlib.suppress(OSError), path.open("a") as file:
        file.write(f"{line}\n")
