"""`verify` whose processes die."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import HERE
from tests.runs import alone, run_to_end, write_run


@pytest.mark.trials(2)
def test_a_killed_reader_of_verify_is_one_line(tmp_path: Path) -> None:
    run_to_end(write_run(tmp_path), 1, "stop_at_step=10")
    command = [sys.executable, "-m", "pretrain.cli", "verify", str(tmp_path / "run")]

    def verify(*options: str, fail: str = "") -> tuple[int, str]:
        done = subprocess.run(
            [*command, *options], cwd=HERE, env=alone() | {"LONGHAUL_FAIL_AT": fail}, capture_output=True, text=True,
            timeout=300,
        )  # fmt: skip
        return done.returncode, done.stderr

    for workers, part in ((2, 1), (3, 2)):
        code, said = verify("--workers", str(workers), fail=f"proof.part#{part}=kill")
        assert code == 1 and "Traceback" not in said
        assert said.splitlines()[-1].startswith(
            f"pretrain: one of the {workers} processes that read the data was killed (signal 9)"
        )
    code, said = verify("--workers", "2")
    assert code == 0 and "steps 0 to 10: the data give the digest kept at each of " in said
    assert verify() == (
        0,
        "pretrain: the data were not read again: --deep adds up what was fed between the checkpoints\n",
    )
