"""Where shards are written: a full disk, one without inodes, read-only, gone; what was finished stays."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.data_pipeline.inputs import sentences, write_corpora
from tests.data_pipeline.test_prepare import CONFIG, contents
from tests.disks import fill, remount, small_disk

ROOT = Path(__file__).parents[2]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "small", "size=4m,nr_inodes=2000") as place:
        yield place


@pytest.fixture
def here(tmp_path: Path) -> Path:
    write_corpora(tmp_path)
    return tmp_path


def run(here: Path, out: Path, fault: str = "", **more: Any) -> subprocess.CompletedProcess[str]:
    (here / "small.yaml").write_text(yaml.safe_dump({**CONFIG, "out": str(out), "workers": 2, **more}))
    command = [sys.executable, "-m", "data_pipeline.cli", "run", "small.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LONGHAUL_FAIL_AT": fault}
    return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=300)


def made(out: Path) -> dict[str, str]:
    """The finished slices as they are."""
    return {name: hash for name, hash in contents(out).items() if re.search(r"slices/\d", name)}


@pytest.mark.parametrize("leave", [20_000, 120_000])
def test_a_full_disk_is_said_and_what_is_finished_stays(leave: int, here: Path, disk: Path) -> None:
    filler = fill(disk, leave)
    done = run(here, disk / "out")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(rf"data-prep: .*disk full at {disk}\S*: (needs .*, )?has .*; make room and run again", last)
    finished = made(disk / "out")
    filler.unlink()
    assert run(here, disk / "out").returncode == 0
    assert finished.items() <= made(disk / "out").items()
    whole = contents(disk / "out")
    assert run(here, here / "golden").returncode == 0
    golden = contents(here / "golden")
    assert {n: h for n, h in whole.items() if "card." not in n} == {n: h for n, h in golden.items() if "card." not in n}


def test_no_inodes_left_is_said(here: Path, disk: Path) -> None:
    out = disk / "out"
    out.mkdir()
    taken = []
    for i in range(2000):
        try:
            (disk / f"{i}").touch()
        except OSError:
            break
        taken.append(disk / f"{i}")
    for path in taken[-3:]:
        path.unlink()
    done = run(here, out)
    assert done.returncode == 1 and f"no inodes left at {disk}" in done.stderr.splitlines()[-1]
    for path in taken[:-3]:
        path.unlink()
    assert run(here, out).returncode == 0


@pytest.mark.parametrize(("error", "passage"), [("ENOSPC", 3), ("EDQUOT", 1), ("EIO", 9)])
def test_a_write_that_fails_ends_the_work_and_the_next_run_does_the_rest(error: str, passage: int, here: Path) -> None:
    done = run(here, here / "out", f"file.written#{passage}={error}")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    said = {"ENOSPC": "disk full at ", "EDQUOT": "disk quota exceeded at ", "EIO": "Input/output error"}[error]
    assert last.startswith("data-prep: ") and said in last and (error == "EIO") == ("needs" not in last)
    assert run(here, here / "out").returncode == 0


def test_a_read_only_output_is_said(here: Path, disk: Path) -> None:
    assert run(here, disk / "out").returncode == 0
    before = contents(disk / "out")
    shutil.rmtree(disk / "out" / "crawl" / "slices" / "0-00000")
    remount(disk, "ro")
    done = run(here, disk / "out")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("data-prep: ") and "Read-only file system" in last and str(disk) in last
    remount(disk, "rw")
    assert run(here, disk / "out").returncode == 0
    after = contents(disk / "out")
    assert {n: h for n, h in after.items() if "card." not in n} == {n: h for n, h in before.items() if "card." not in n}


def test_an_output_that_vanishes_is_said(here: Path) -> None:
    """The folder goes while a worker is at a slice."""
    (here / "crawl" / "more.txt").write_text(sentences(1, 5))
    (here / "sitecustomize.py").write_text(
        "import pathlib, shutil\n"
        "from data_pipeline import slices\n"
        "old = slices._publish\n"
        "def publish(*arguments):\n"
        "    shutil.rmtree('out', ignore_errors=True)\n"
        "    return old(*arguments)\n"
        "slices._publish = publish\n"
    )
    (here / "small.yaml").write_text(yaml.safe_dump({**CONFIG, "workers": 2}))
    command = [sys.executable, "-m", "data_pipeline.cli", "run", "small.yaml"]
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("data-prep: ")
    (here / "sitecustomize.py").unlink()
    assert run(here, here / "out").returncode == 0
