import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import obstore
import pytest

from configs import ConfigError
from data_pipeline import prepare
from data_pipeline.sources import remote
from data_pipeline.sources.remote import Patience
from data_pipeline.summary import folders, verified
from data_pipeline.work import WorkError
from tests.data_pipeline.inputs import write_corpora
from tests.data_pipeline.servers import moto
from tests.data_pipeline.test_prepare import CONFIG, contents, load, write_config

BUCKET = "s3://shards/a/b"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a small corpus and small.yaml."""
    monkeypatch.chdir(tmp_path)
    write_corpora(tmp_path)
    corpora = {"books": {"kind": "bookcorpus", "paths": ["books"]}}
    write_config({**CONFIG, "corpora": corpora})
    monkeypatch.setattr(remote, "PATIENCE", Patience(attempts=2, wait_s=0.01, silence_s=5, range_s=20))
    return tmp_path


def prepared(*overrides: str) -> None:
    """All stages, the last one too."""
    preparation = load(*overrides)
    prepare.run(preparation)


def published(folder: Path) -> dict[str, str]:
    """What is to be elsewhere: all but marks and leases."""
    return {name: hash for name, hash in contents(folder).items() if hash != "-" and "/." not in f"/{name}"}


def download(bucket: Any, to: Path) -> Path:
    for page in obstore.list(bucket):
        for about in page:
            path = to / about["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(obstore.get(bucket, about["path"]).bytes())
    return to


def damages(out: Path) -> list[str]:
    return [line for folder in folders(out) for line in verified(folder)]


def times(bucket: Any) -> dict[str, Any]:
    return {about["path"]: about["last_modified"] for page in obstore.list(bucket) for about in page}


def test_finished_shards_are_sent_and_read_back_whole(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with moto(monkeypatch, "shards") as bucket:
        prepared(f"publish={BUCKET}")
        copy = download(bucket, here / "copy") / "a/b"
        assert published(copy) == published(here / "out") and len(published(copy)) > 15
        assert not damages(copy)
        before = times(bucket)
        prepared(f"publish={BUCKET}")
        assert times(bucket) == before  # nothing is sent again
        for mark in (here / "out").rglob(".*published"):
            mark.unlink()
        obstore.delete(bucket, "a/b/books/MANIFEST.json")
        prepared(f"publish={BUCKET}")
        after = times(bucket)
        assert {name for name in after if after[name] != before[name]} <= {"a/b/books/MANIFEST.json"}
        assert download(bucket, here / "again") and not damages(here / "again/a/b")


def test_a_folder_may_be_the_target_and_tars_may_go(here: Path) -> None:
    prepared()
    whole = published(here / "out")
    shutil.rmtree(here / "out")
    prepared("publish=elsewhere", "keep_local=false")
    tars = {name for name in whole if name.endswith(".tar")}
    kept = published(here / "out")
    assert {name for name in whole if name not in kept} == tars and tars
    cards = {name for name in whole if name.startswith("card")}  # says no samples where there are no tars
    assert {n: h for n, h in published(here / "elsewhere").items() if n not in cards} == {
        n: h for n, h in whole.items() if n not in cards
    }
    assert not damages(here / "elsewhere")
    prepared("publish=elsewhere", "keep_local=false")
    assert published(here / "out") == kept


PROGRAM = (
    "import sys, configs\n"
    "from pathlib import Path\n"
    "from data_pipeline import prepare\n"
    "from data_pipeline.preparation import Preparation\n"
    "prepare.run(configs.load(Preparation, Path('small.yaml'), sys.argv[1:]))\n"
)


@pytest.mark.parametrize("failpoint", ["publish.file#3", "publish.marked#2"])
def test_killed_at_any_point_the_same_command_sends_the_rest(here: Path, failpoint: str) -> None:
    prepared()
    whole = published(here / "out")
    overrides = ("publish=elsewhere", "keep_local=false")
    environment = {**os.environ, "LONGHAUL_FAIL_AT": f"{failpoint}=kill", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *overrides], env=environment, capture_output=True, timeout=120
    )
    assert done.returncode == -9, done.stderr.decode()
    assert not (here / "elsewhere/books/MANIFEST.json").exists()
    prepared(*overrides)
    assert not damages(here / "elsewhere")
    sent = published(here / "elsewhere")
    assert {n: h for n, h in sent.items() if n.endswith((".tar", "slice.json"))} == {
        n: h for n, h in whole.items() if n.endswith((".tar", "slice.json"))
    }


def test_what_is_neither_here_nor_there_is_said(here: Path) -> None:
    prepared("publish=elsewhere", "keep_local=false")
    shutil.rmtree(here / "elsewhere")
    for mark in (here / "out").rglob(".*published"):
        mark.unlink()
    with pytest.raises(
        Exception, match=r"\.tar: missing here, and not at elsewhere; remove its folder to make it again"
    ):
        prepared("publish=elsewhere", "keep_local=false")


def test_a_target_that_refuses_is_one_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with moto(monkeypatch, "shards"), pytest.raises(WorkError) as error:
        prepared("publish=s3://no-such-bucket/x")
    assert "publish: s3://no-such-bucket/x/" in str(error.value) and "\n" not in str(error.value)


def test_settings_that_cannot_be_are_refused(here: Path) -> None:
    with pytest.raises(ConfigError, match="keep_local: expected true, since nothing is published"):
        load("keep_local=false")
    with pytest.raises(ConfigError, match="publish: expected s3://bucket/prefix or a folder, got 'gs://x/y'"):
        load("publish=gs://x/y")
