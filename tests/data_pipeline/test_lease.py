import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from data_pipeline.lease import SILENT_S, Lease, Owner, holder

HOLD = """
import sys, time
from pathlib import Path
from data_pipeline.lease import Lease
lease = Lease.take(Path(sys.argv[1]))
print("taken" if lease else "refused", flush=True)
time.sleep(60)
"""


def test_one_holds_and_the_others_know_who(tmp_path: Path) -> None:
    path = tmp_path / "x.lease"
    with Lease.take(path) or Lease.wait(path, print) as lease:
        assert Lease.take(path) is None
        assert holder(path) == lease.owner and lease.owner.pid == os.getpid()
        assert str(lease.owner).endswith(f"pid {os.getpid()}")
    assert holder(path) is None and not list(tmp_path.iterdir())


def test_a_killed_owner_loses_it_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.lease"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "taken\n"
    owner = holder(path)
    assert owner is not None and owner.pid == process.pid
    assert Lease.take(path) is None
    process.kill()
    process.wait()
    assert path.is_symlink() and holder(path) is None
    with Lease.take(path) or Lease.wait(path, print) as lease:
        assert holder(path) == lease.owner
    assert not list(tmp_path.iterdir())


def test_a_pid_that_another_process_has_now_is_not_the_owner(tmp_path: Path) -> None:
    path = tmp_path / "x.lease"
    path.symlink_to(json.dumps(asdict(replace(Owner.me(), started="1"))))
    assert holder(path) is None
    assert Lease.take(path) is not None


def test_another_host_is_alive_as_long_as_it_gives_signs(tmp_path: Path) -> None:
    path = tmp_path / "x.lease"
    path.symlink_to(json.dumps(asdict(replace(Owner.me(), host="elsewhere", boot="b", space="s"))))
    assert Lease.take(path) is None
    os.utime(path, (0, path.lstat().st_mtime - SILENT_S - 1), follow_symlinks=False)
    assert holder(path) is None
    assert Lease.take(path) is not None


def test_what_a_job_held_before_it_was_started_again_is_free_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.lease"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    path.symlink_to(json.dumps(asdict(replace(Owner.me(), host="elsewhere", space="s"))))
    assert holder(path) is not None  # of this start
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert holder(path) is None
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert holder(path) is not None  # another job's, which may be at work


def test_waiting_says_for_whom(tmp_path: Path) -> None:
    path, said = tmp_path / "x.lease", list[str]()
    first = Lease.take(path)
    assert first is not None
    threading.Timer(0.3, first.release).start()
    with Lease.wait(path, said.append):
        assert said == [f"waiting for {first.owner}, which holds {path}"]


def test_a_text_that_is_no_owner_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "x.lease"
    path.symlink_to("nonsense")
    assert holder(path) is None and Lease.take(path) is not None


def test_of_many_at_once_one_gets_it(tmp_path: Path) -> None:
    path = tmp_path / "x.lease"
    path.symlink_to(json.dumps(asdict(replace(Owner.me(), started="1"))))  # a dead owner's, to be taken over
    taken: list[Lease | None] = []
    threads = [threading.Thread(target=lambda: taken.append(Lease.take(path))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(lease is not None for lease in taken) == 1
