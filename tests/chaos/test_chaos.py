"""The short form of `make chaos`: cases of every kind, each against its golden run; and the table is up to date."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos import table
from tests.chaos.cases import failpoints
from tests.chaos.catalogue import CASES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("row", CASES)
def test_a_case_of_every_kind(row: str) -> None:
    """In a process of its own, as ranks are forked from it."""
    for _ in range(4 if row == "T1" else 1):
        seed = random.randrange(10**9)
        command = [sys.executable, "-m", "tests.chaos", "--rows", row, "--seed", str(seed)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{' '.join(command[1:])}\n{done.stdout}{done.stderr}"
        assert f"{row} seed {seed}: " in done.stdout and " 0 losses" in done.stdout


def test_failpoints_are_found() -> None:
    assert {"checkpoint.written", "checkpoint.renamed", "train.step", "file.synced"} <= set(failpoints())


def test_the_fault_table_is_that_of_its_results() -> None:
    assert table.TABLE.read_text() == table.text()
    assert {row.id for row in table.ROWS} >= {*CASES, *(f"L{n}" for n in range(1, 7))}
