"""`launch logs`: what a rank has said, over all attempts, in their order."""

from __future__ import annotations

import json
import sys
import time
from datetime import datetime
from pathlib import Path

from configs import ConfigError
from launch.attempts import Attempt, read_attempts
from launch.status import look

POLL_S = 0.2
QUIET_S = 2.0  # without a new line before the run's state is asked for, and between two such questions
CHUNK_BYTES = 1 << 16


def print_logs(folder: Path, rank: int, only: int | None, follow: bool, as_json: bool) -> None:
    """Write the log of a rank to stdout; with `follow`, until the run, or the `only` attempt, is over.

    Before each attempt stands a line; as JSON, each line is {"attempt", "rank", "line"}. Raises ConfigError.
    """
    _check(folder, rank, only, follow)
    reader = _Reader(folder, rank, only, as_json)
    over, quiet_since = not follow, time.monotonic()
    while True:
        if reader.read_on():
            quiet_since = time.monotonic()
        if over:
            reader.close()
            return
        time.sleep(POLL_S)
        if time.monotonic() - quiet_since > QUIET_S:
            over = _over(folder, only)  # and once more is read, so that nothing is missed
            quiet_since = time.monotonic()


class _Reader:
    """Passes on what is new since the last time, going on into newer attempts."""

    def __init__(self, folder: Path, rank: int, only: int | None, as_json: bool) -> None:
        self.folder, self.rank, self.only, self.as_json = folder, rank, only, as_json
        self.number, self.offset = 0, 0  # the attempt that is read, and how far
        self.line = b""  # JSON: begun, and not ended yet
        self.ended_line = True  # plain: what was written last ended its line

    def read_on(self) -> bool:
        """Whether there was anything."""
        any_text = False
        for attempt in _attempts(self.folder, self.only):
            if attempt.number < self.number:
                continue
            if attempt.number > self.number:
                self.close()
                self.number, self.offset = attempt.number, 0
                self._head(attempt)
            any_text |= self._copy(attempt.folder / f"rank-{self.rank}.log")
        return any_text

    def close(self) -> None:
        """End the line of an attempt that did not end it."""
        if self.line:
            self._write_json(self.line)
            self.line = b""
        if not self.ended_line:
            self._write(b"\n")

    def _copy(self, path: Path) -> bool:
        begin = self.offset
        try:
            with path.open("rb") as file:
                file.seek(self.offset)
                while text := file.read(CHUNK_BYTES):
                    self.offset += len(text)
                    self._text(text)
        except FileNotFoundError:
            return False
        return self.offset > begin

    def _text(self, text: bytes) -> None:
        if not self.as_json:
            self._write(text)
            return
        *lines, self.line = (self.line + text).split(b"\n")
        for line in lines:
            self._write_json(line)

    def _head(self, attempt: Attempt) -> None:
        if self.only is None and not self.as_json:
            self._write(f"{_heading(attempt)}\n".encode())

    def _write_json(self, line: bytes) -> None:
        tree = {"attempt": self.number, "rank": self.rank, "line": line.decode(errors="replace")}
        self._write(json.dumps(tree).encode() + b"\n")

    def _write(self, text: bytes) -> None:
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()
        self.ended_line = text.endswith(b"\n")


def _heading(attempt: Attempt) -> str:
    begun = attempt.begun
    began = begun.get("began")
    facts = [
        f"job {begun['job']}" if begun.get("job") else "",
        f"on {','.join(attempt.nodes)}" if attempt.nodes else "",
        datetime.fromtimestamp(began).strftime("%F %T") if isinstance(began, int | float) else "",
    ]
    return f"== attempt {attempt.number}: {', '.join(filter(None, facts))}"


def _attempts(folder: Path, only: int | None) -> list[Attempt]:
    return [attempt for attempt in read_attempts(folder / "logs") if only in (None, attempt.number)]


def _over(folder: Path, only: int | None) -> bool:
    """Whether nothing more can come."""
    if only is not None:
        attempts = read_attempts(folder / "logs")
        if any(a.number > only or (a.number == only and Attempt(a.folder, only).ended) for a in attempts):
            return True
    [status] = look([folder])
    return status.state.over


def _check(folder: Path, rank: int, only: int | None, follow: bool) -> None:
    """Refuse what does not exist; an attempt or a rank that may still come is waited for."""
    every, chosen = _attempts(folder, None), _attempts(folder, only)
    if only is not None and not chosen and not (follow and only > max((a.number for a in every), default=0)):
        known = f"1 to {every[-1].number}" if every else "none yet"
        raise ConfigError(f"{folder}: no attempt {only}; attempts are {known}")
    ranks = {
        int(number)
        for attempt in chosen
        for path in attempt.folder.glob("rank-*.log")
        if (number := path.stem.removeprefix("rank-")).isdigit()
    }
    if ranks and rank not in ranks:
        raise ConfigError(f"{folder}: no log of rank {rank}; ranks are 0 to {max(ranks)}")
    if not follow and not ranks:
        raise ConfigError(f"{folder}: no logs yet; --follow waits for them")
