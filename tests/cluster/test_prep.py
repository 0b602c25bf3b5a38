"""`launch prep` on a real SLURM, whose arrays may have five tasks."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster.slurm import Cluster
from tests.data_pipeline.inputs import sentences
from tests.processes import HERE as ROOT

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}
SLOW = {"LONGHAUL_FAIL_AT": "file.written=sleep:0.2"}  # a slice writes some ten files
CONFIG = {
    "name": "small",
    "out": "out",
    "tokenizer": {"kind": "train", "vocab_size": 400, "sample_bytes": "40Ki"},
    "corpora": {
        "rows": {"kind": "text_files", "paths": ["rows.jsonl"], "on_damage": "stop"},
        "texts": {"kind": "text_files", "paths": ["texts"], "on_damage": "stop"},
    },
    "validation": {"fraction": 0.2},
    "slice_bytes": 10_000,
    "block_tokens": 1024,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two corpora, prepared by one worker on this machine in out/."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": sentences(i % 200, 8)}) + "\n" for i in range(260)))
    (folder / "texts").mkdir()
    for i in range(6):
        (folder / "texts" / f"{i}.txt").write_text(sentences(1000 + i, 90))
    (folder / "small.yaml").write_text(yaml.safe_dump(CONFIG))
    done = run("data_pipeline.cli", "run", "small.yaml", folder=folder)
    assert done.returncode == 0, done.stderr
    assert len(list(folder.glob("out/*/slices/[0-9]*"))) >= 12
    return folder


@pytest.fixture
def here(cluster: Cluster, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of its inputs, with nothing prepared."""
    folder = tmp_path / "a copy's folder"
    shutil.copytree(made, folder, ignore=shutil.ignore_patterns("out"))
    return folder


def run(
    module: str, *arguments: str, folder: Path, variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | (variables or {})
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def submit(
    folder: Path, tasks: int, *overrides: str, variables: dict[str, str] | None = None, cpus: int = 1
) -> dict[str, list[str]]:
    """The ids of the jobs of each step."""
    launcher = ["launcher.kind=slurm", f"launcher.prep={{tasks: {tasks}, cpus: {cpus}, minutes: 10}}"]
    done = run("launch.cli", "prep", "small.yaml", *launcher, *overrides, "--json", folder=folder, variables=variables)
    assert done.returncode == 0, done.stderr
    jobs: dict[str, list[str]] = json.loads(done.stdout)
    return jobs


def contents(folder: Path) -> dict[str, str]:
    """Every file that a preparation made, with its hash; but for the jobs, and the card, which says its time."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and "submissions" not in path.parts)
    files = (path for path in files if path.stem != "card")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def slices(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.glob("out/*/slices/[0-9]*/slice.json")}


def logs(folder: Path, stem: str) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob(f"out/submissions/*/{stem}-*.log")))


def status(folder: Path) -> dict[str, object]:
    done = run("launch.cli", "prep", "small.yaml", "--status", "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    tree: dict[str, object] = json.loads(done.stdout)
    return tree


def test_arrays_over_four_nodes_make_the_same_to_the_byte(cluster: Cluster, here: Path, made: Path) -> None:
    jobs = submit(here, tasks=7, cpus=2)
    assert [len(jobs[step]) for step in ("plan", "slices", "seal")] == [1, 2, 1]  # arrays of five tasks and of two
    assert cluster.wait(jobs["seal"][0], ENDED) == "COMPLETED", logs(here, "*")
    assert contents(here / "out") == contents(made / "out")
    assert len(set(re.findall(r"slices(?:-5)? on (n\d)", logs(here, "slices")))) == 4
    tree = status(here)
    assert tree["jobs"] == {} and tree["notes"] == []


def test_stopped_half_way_then_with_another_number_of_tasks(cluster: Cluster, here: Path, made: Path) -> None:
    first = submit(here, tasks=4, variables=SLOW)
    [array] = first["slices"]
    planned = sorted(path.relative_to(made) for path in made.glob("out/*/slices/[0-9]*"))
    of_3, next_of_3 = planned[len(planned) * 3 // 4 :][:2]  # task 3 comes to them first, all others last
    next_lease = here / next_of_3.with_name(f".{next_of_3.name}.lease")
    cluster.until("task 3 has advanced", lambda: (here / of_3).is_dir() and next_lease.is_symlink())
    cluster.run(f"scancel {array}_[0-2]")
    cluster.run(f"scancel --signal=USR2 --batch {array}_3")  # as when its time is nearly over
    cluster.until("put back", lambda: "Restarts=1" in cluster.run(f"scontrol --oneliner show job {array}_3"))
    cluster.run(f"scancel {array}")
    assert cluster.wait(first["seal"][0], ENDED) == "FAILED"
    kept = slices(here)
    missing = re.search(
        r"data-prep: (\d+) slices are missing; the same command makes them\n.* exit 3", logs(here, "seal")
    )
    assert missing is not None and int(missing[1]) == len(slices(made)) - len(kept) > 0
    assert "stopped by SIGUSR2; the same command goes on" in logs(here, "slices")
    assert not list(here.glob("out/*/slices/.*"))  # who was stopped has left nothing that others would wait for
    second = submit(here, tasks=3)
    assert cluster.wait(second["seal"][0], ENDED) == "COMPLETED", logs(here, "*")
    assert contents(here / "out") == contents(made / "out")
    assert kept.items() <= slices(here).items()


def test_duplicates_are_sought_in_arrays_and_go_on_where_they_stopped(cluster: Cluster, here: Path) -> None:
    """Four stages, each an array that waits for the one before; cancelled in the first, then with other tasks."""
    done = run("data_pipeline.cli", "run", "small.yaml", "dedup={}", "out=here", folder=here)
    assert done.returncode == 0, done.stderr
    record = json.loads((here / "here/rows/MANIFEST.json").read_text())
    assert "duplicate" in json.dumps(record)
    first = submit(here, 3, "dedup={}", variables=SLOW)
    assert list(first) == ["plan", "texts", "buckets", "clusters", "slices", "seal"]
    cluster.until("texts at work", lambda: len(list(here.glob("out/*/texts/[0-9]*/slice.json"))) >= 2)
    cluster.run(f"scancel {first['texts'][0]}")
    assert cluster.wait(first["seal"][0], ENDED) == "FAILED"
    second = submit(here, 7, "dedup={}")
    assert cluster.wait(second["seal"][0], ENDED) == "COMPLETED", logs(here, "*")
    assert contents(here / "out") == contents(here / "here")


def test_a_node_lost_in_mid_work(cluster: Cluster, here: Path, made: Path) -> None:
    jobs = submit(here, tasks=4, variables=SLOW)
    leases = "out/*/slices/.*.lease"
    cluster.until("all at work", lambda: len(list(here.glob(leases))) >= 4)
    lost = str(json.loads(str(next(here.glob(leases)).readlink()))["host"])
    try:
        cluster.crash_node(lost)
        cluster.declare_down(lost)
        assert cluster.wait(jobs["seal"][0], ENDED) == "COMPLETED", logs(here, "*")
    finally:
        cluster.repair_node(lost)
    assert ", start 2" in logs(here, "slices")
    assert contents(here / "out") == contents(made / "out")


def test_what_failed_is_said_at_the_end(cluster: Cluster, here: Path) -> None:
    (here / "texts" / "7.txt.gz").write_bytes(b"not gzip")
    jobs = submit(here, 1, "corpora.texts.paths=[texts/7.txt.gz]", "corpora.rows.paths=[texts/*.txt]")
    assert cluster.wait(jobs["seal"][0], ENDED) == "FAILED"
    log = here / "out/submissions/1" / f"slices-{jobs['slices'][0]}.log"
    why = "texts: texts/7.txt.gz: damaged at byte 0: not a gzip file; get the file again, or set on_damage: skip"
    said = logs(here, "seal")
    assert f"{why} to keep what comes before (on n1, log {log})\n" in said
    assert "data-prep: 1 slices failed; 1 are missing, and the same command makes them\n" in said
    assert why in log.read_text()
    assert len(slices(here)) == len(json.loads((here / "out/rows/plan.json").read_text())["slices"])  # all others


def test_a_plan_that_cannot_be_made_is_said_at_the_end(cluster: Cluster, here: Path) -> None:
    jobs = submit(here, 3, "corpora.texts.paths=[nowhere]")
    assert cluster.wait(jobs["seal"][0], ENDED) == "FAILED"
    why = f"data-prep: corpora.texts.paths: no file matches 'nowhere' (looked from {here})"
    assert why in logs(here, "seal").splitlines()
    assert status(here)["notes"] == [why]
    assert cluster.run(f"squeue --noheader --jobs={jobs['slices'][0]}") == ""  # nothing waits for what never comes


def test_refused(cluster: Cluster, here: Path) -> None:
    done = run("launch.cli", "prep", "small.yaml", "launcher.kind=slurm", "launcher.partition=nope", folder=here)
    assert (done.returncode, done.stdout) == (1, "")
    assert "invalid partition specified: nope" in done.stderr and "-> set launcher.partition; `sinfo`" in done.stderr
    assert not list(here.glob("out/submissions/*"))
