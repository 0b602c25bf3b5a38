"""The records of a run's attempts: RUN/logs/attempt-<n>/ with attempt.json, end.json, suspects.jsonl and the logs.

Attempts are ordered by their number alone; a clock that was set back changes no order. A record that is missing or
torn reads as absent: an attempt without `attempt.json` was not begun by a launcher, one without `end.json` is running
or was lost.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pretrain.track.mask import mask_text

BEGUN, ENDED, SUSPECTS, SRUN_LOG = "attempt.json", "end.json", "suspects.jsonl", "srun.log"
STOP = "stop"  # in a submission's folder: `launch stop` was asked for
NAME = re.compile(r"attempt-(\d+)")
COMMITTED = re.compile(r"step-(\d+)\.b(\d+)")
TASKS = re.compile(
    r"error: (?P<node>\S+): tasks? (?P<ranks>(?P<rank>\d+)[\d,-]*): (?P<end>.+)$"
)  # of srun: "n2: task 1: Killed"
EXITED = re.compile(r"Exited with exit code (\d+)$")
CANCELLED = re.compile(r"slurmstepd\S* error: \*\*\* \w+ \S+ ON \S+ CANCELLED AT \S+ DUE TO ([A-Z ]+)")
TAIL_BYTES = 65536
SHOWN_CHARACTERS = 300  # of a log's last line


@dataclass(frozen=True)
class Attempt:
    """One attempt as its folder shows it."""

    folder: Path
    number: int

    @cached_property
    def begun(self) -> dict[str, Any]:
        """attempt.json, empty where there is none."""
        return _read(self.folder / BEGUN)

    @cached_property
    def ended(self) -> dict[str, Any]:
        """end.json, empty where there is none."""
        return _read(self.folder / ENDED)

    @property
    def submission(self) -> int | None:
        return self.begun.get("submission")

    @property
    def nodes(self) -> list[str]:
        """The names of the nodes that ranks ran on, in the order of ranks."""
        return list(self.begun.get("nodes", []))

    def suspects(self) -> list[tuple[str, str]]:
        """(node, cause) for each accusation that names one of the attempt's nodes, by host name or by rank."""
        found = []
        for line in _text(self.folder / SUSPECTS).splitlines():
            accusation = _parse(line)
            node = self._node(accusation)
            if node is not None:
                found.append((node, str(accusation.get("cause", ""))))
        return found

    def _node(self, accusation: Mapping[str, Any]) -> str | None:
        host, rank = str(accusation.get("host", "")), accusation.get("rank")
        for node in self.nodes:
            if host and node.split(".")[0] == host.split(".")[0]:
                return node
        ranks = self.begun.get("ranks")
        if isinstance(rank, int) and isinstance(ranks, int) and self.nodes and 0 <= rank < ranks:
            return self.nodes[rank * len(self.nodes) // ranks]  # SLURM fills a node before the next
        return None

    def failed_nodes(self) -> list[str]:
        """Nodes that SLURM saw fail, as end.json or srun's log says."""
        recorded = [str(node) for node in self.ended.get("failed_nodes", [])]
        names = re.findall(r"Node failure on (\S+)", _text(self.folder / SRUN_LOG))
        return list(dict.fromkeys([*recorded, *(node for name in names for node in expand(name))]))

    def last_words(self) -> str:
        """One line: the first rank that ended badly, and the end of its log."""
        first = next((match for line in self._srun_lines() if (match := TASKS.search(line))), None)
        if first is not None:
            return self.words_of(int(first["rank"]), f" on {first['node']}", first["end"])
        return ""

    def words_of(self, rank: int, where: str, end: str) -> str:
        """One line: a rank and the end of its log; where it said nothing, the end of rank 0's, else how it ended."""
        for speaker in dict.fromkeys((rank, 0)):
            lines = reversed(_tail(self.folder / f"rank-{speaker}.log").splitlines())
            said = next((line.strip() for line in lines if line.strip() and not line.startswith("slurmstepd")), "")
            if said:
                place = where if speaker == rank else ""
                return f"rank {speaker}{place}: {mask_text(said)[:SHOWN_CHARACTERS]}"
        return f"rank {rank}{where}: {end}"

    def exit_codes(self) -> list[int]:
        """The code of each rank that ended badly by itself, as srun's log has them."""
        codes = []
        for line in self._srun_lines():
            if (tasks := TASKS.search(line)) and (exited := EXITED.search(tasks["end"])):
                codes += [int(exited[1])] * len(expand(f"task[{tasks['ranks']}]"))
        return codes

    def _srun_lines(self) -> list[str]:
        return _text(self.folder / SRUN_LOG).splitlines()

    def cancelled_for(self, log: Path) -> str:
        """Why SLURM ended the job, in the words that it leaves in the logs of the job and its ranks; or empty."""
        for path in (log, self.folder / "rank-0.log"):
            if found := CANCELLED.findall(_tail(path).rpartition(f"attempt {self.number} on ")[2]):
                return str(found[-1])
        return ""

    def end(self, record: Mapping[str, Any]) -> bool:
        """Write end.json unless there is one; whether it was written. No second launcher changes what one has said."""
        return write_once(self.folder / ENDED, record)


def read_attempts(logs: Path) -> list[Attempt]:
    """Every attempt that a launcher has begun, by number."""
    numbers = [(int(match[1]), path) for path in logs.glob("attempt-*") if (match := NAME.fullmatch(path.name))]
    attempts = [Attempt(path, number) for number, path in sorted(numbers)]
    return [attempt for attempt in attempts if attempt.begun]


def newest_step(run_folder: Path) -> int:
    """The step of the newest committed checkpoint of the live lineage, -1 where there is none.

    `pretrain.checkpoint` says the same after importing torch, for which a batch shell has no time.
    """
    branches = {int(path.stem): _read(path) for path in (run_folder / "lineage").glob("[0-9]*.json")}
    names = (path.name for path in (run_folder / "checkpoints").glob("step-*.b*"))
    found = [(int(match[1]), int(match[2])) for name in names if (match := COMMITTED.fullmatch(name))]
    newest, branch, limit = -1, max(branches, default=None), None
    while branch in branches:
        newest = max([newest, *(s for s, b in found if b == branch and (limit is None or s <= limit))])
        step = int(branches[branch].get("step", 0))
        limit = step if limit is None else min(limit, step)
        branch = branches.pop(branch).get("parent")
    return newest


def expand(names: str) -> list[str]:
    """The nodes of a SLURM list with at most one bracket a name: n[1-2,04],m1 -> n1 n2 n04 m1."""
    nodes = []
    for name in re.findall(r"[^,\[]+(?:\[[^\]]*\])?[^,\[]*", names):
        match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", name)
        if match is None:
            nodes.append(name)
            continue
        for part in match[2].split(","):
            first, _, last = part.partition("-")
            numbers = range(int(first), int(last or first) + 1)
            nodes += [f"{match[1]}{number:0{len(first)}d}{match[3]}" for number in numbers]
    return nodes


def write_once(path: Path, record: Mapping[str, Any]) -> bool:
    """Create a JSON file whole, or leave it alone where it exists; True when it was created."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _tail(path: Path) -> str:
    """The end of a file that may be long."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _read(path: Path) -> dict[str, Any]:
    return _parse(_text(path))


def _parse(text: str) -> dict[str, Any]:
    try:
        tree = json.loads(text)
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}


def same_submission(attempts: Sequence[Attempt], submission: int | None) -> list[Attempt]:
    return [attempt for attempt in attempts if attempt.submission == submission]
