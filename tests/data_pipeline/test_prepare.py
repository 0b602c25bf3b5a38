import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
import yaml

import configs
from configs import ConfigError
from data_pipeline import prepare
from data_pipeline.failures import failures
from data_pipeline.jobs import make_job, make_jobs
from data_pipeline.lease import Lease
from data_pipeline.made_once import make_tokenizer
from data_pipeline.preparation import Preparation
from data_pipeline.shards import Manifest
from data_pipeline.slices import Validation, make_slice
from data_pipeline.summary import Summary, folders, verified
from data_pipeline.tokenizer import Ids, Tokenizer
from data_pipeline.work import Done, Unfinished, WorkError
from tests.data_pipeline.inputs import REAL, real, sentences, write_corpora

CONFIG = {
    "name": "small",
    "out": "out",
    "tokenizer": {"kind": "train", "vocab_size": 500},
    "corpora": {
        "crawl": {"kind": "common_crawl", "paths": ["crawl/*.warc.gz"]},
        "wiki": {"kind": "wikipedia", "paths": ["wiki/*.xml.bz2"]},
        "books": {"kind": "bookcorpus", "paths": ["books"]},
    },
    "validation": {"fraction": 0.2},
    "slice_bytes": 20_000,
    "shard_bytes": 20_000,
    "block_tokens": 1024,
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with three small corpora and small.yaml."""
    monkeypatch.chdir(tmp_path)
    write_corpora(tmp_path)
    write_config(CONFIG)
    return tmp_path


def write_config(config: dict[str, Any]) -> None:
    Path("small.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def load(*overrides: str) -> Preparation:
    return configs.load(Preparation, Path("small.yaml"), overrides)


def run(*overrides: str) -> list[Summary]:
    return prepare.run(load(*overrides))


def contents(folder: Path) -> dict[str, str]:
    """Every file with its sha256, and every other thing by its name; but for the data card, which tells the time."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "-"
        for path in sorted(folder.rglob("*"))
        if path.stem != "card"
    }


def tokens(folder: Path) -> list[list[int]]:
    """The documents of a corpus' training blocks and tails, in order, without the blocks' extra ids."""
    manifest = Manifest.open(folder)
    shards = manifest.shards("train", 0)
    stream: list[int] = []
    for shard in range(len(shards)):
        blocks = shards.table["blocks"][shard].as_py()
        for row in range(blocks):
            stream += shards.member(shard, row)[:-1].tolist()
        if shards.table["tail_tokens"][shard].as_py():
            stream += shards.member(shard, blocks).tolist()
    ends = [i for i, id in enumerate(stream) if id == manifest.format.end_of_text]
    return [stream[a + 1 : b] for a, b in zip([-1, *ends], ends, strict=False)]


def test_three_corpora_become_shards_that_say_what_they_are(here: Path) -> None:
    crawl, wiki, books = run()
    assert (crawl.documents_read, wiki.documents_read, books.documents_read) == (90, 40, 5)
    assert wiki.set_aside == {"other namespace": 40, "redirect": 40}
    assert crawl.documents == 90 and crawl.tokens == crawl.train_tokens + crawl.validation_tokens
    assert 0 < crawl.validation_tokens < crawl.train_tokens
    assert wiki.characters_per_token == round(wiki.characters / wiki.tokens, 3)
    assert crawl.blocks * 1024 + crawl.tail_tokens == crawl.train_tokens
    manifest = Manifest.open(here / "out/crawl")
    assert manifest.head["config"]["corpus"] == "crawl" and manifest.head["inputs"] == 3
    assert manifest.head["tokenizer_sha256"] == Tokenizer.load(here / "out/tokenizer.json").sha256
    assert not [line for folder in folders(here / "out") for line in verified(folder)]


def test_the_shards_hold_the_texts(here: Path) -> None:
    run("validation.fraction=0", "filters.min_chars=1")
    tokenizer = Tokenizer.load(here / "out/tokenizer.json")
    texts = [tokenizer.decode(ids) for ids in tokens(here / "out/crawl")]
    assert texts == [sentences(1000 * f + i, 20) for f in range(3) for i in range(30)]


def test_a_stock_reader_reads_the_tars(here: Path) -> None:
    run()
    tars = sorted(map(str, (here / "out/wiki").rglob("train-*.tar")))
    rows = [
        row
        for row in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).decode()
        if "tokens.npy" in row
    ]
    assert rows and all(row["tokens.npy"].shape == (1025,) and row["tokens.npy"].dtype == np.uint16 for row in rows)


def test_validation_is_chosen_by_text_alone(here: Path) -> None:
    validation = Validation(fraction=0.2, seed=3)
    texts = [sentences(i, 3) for i in range(2000)]
    chosen = {text for text in texts if validation.split(text) == "validation"}
    assert 330 < len(chosen) < 470
    assert {t for t in texts if Validation(fraction=0.1, seed=3).split(t) == "validation"} < chosen
    assert {t for t in texts if Validation(fraction=0.2, seed=4).split(t) == "validation"} != chosen
    assert not [t for t in texts if Validation(fraction=0.0).split(t) == "validation"]


def test_the_bytes_do_not_depend_on_the_number_of_workers(here: Path) -> None:
    run("workers=1")
    one = contents(here / "out")
    shutil.rmtree(here / "out")
    run("workers=3")
    assert contents(here / "out") == one
    assert len([name for name in one if name.endswith("slice.json")]) >= 7


def test_running_again_does_nothing(here: Path) -> None:
    first = run()
    before = {path: path.stat().st_mtime_ns for path in (here / "out").rglob("*") if path.is_file()}
    assert run() == first
    assert {path: path.stat().st_mtime_ns for path in (here / "out").rglob("*") if path.is_file()} == before


def test_what_is_missing_is_made_and_nothing_else(here: Path) -> None:
    run()
    whole = contents(here / "out")
    shutil.rmtree(here / "out/crawl/slices/0-00001")
    (here / "out/wiki/MANIFEST.json").unlink()
    (here / "out/books/slices/0-00000/slice.json").write_text("{")
    kept = here / "out/crawl/slices/0-00000/slice.json"
    written = kept.stat().st_mtime_ns
    run()
    assert contents(here / "out") == whole
    assert kept.stat().st_mtime_ns == written


COMMAND = [sys.executable, "-m", "data_pipeline.cli", "run", "small.yaml", "workers=2"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_any_time_and_run_again_the_bytes_are_the_same(here: Path, seed: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    begun = time.monotonic()
    subprocess.run(COMMAND, check=True, env=environment, capture_output=True)
    seconds = time.monotonic() - begun
    whole = contents(here / "out")
    shutil.rmtree(here / "out")
    process = subprocess.Popen(COMMAND, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    time.sleep(random.Random(seed).uniform(0.3, 1) * seconds)
    if seed == 1:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()  # its workers live on for a moment, with their leases
    process.wait()
    done = subprocess.run(COMMAND, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(here / "out") == whole


def test_another_configuration_is_refused_with_the_difference(here: Path) -> None:
    run()
    before = contents(here / "out")
    with pytest.raises(ConfigError) as error:
        run("clean.unicode=nfkc", "filters.min_chars=5")
    assert str(error.value) == (
        "out/crawl: was prepared with another configuration: clean.unicode: nfc -> nfkc; filters.min_chars: 1 -> 5; "
        "use another `out`, or put it back"
    )
    with pytest.raises(ConfigError) as error:
        run("tokenizer.vocab_size=400")
    assert str(error.value) == (
        "out: its tokenizer was made with another configuration: tokenizer.vocab_size: 500 -> 400; "
        "use another `out`, or put it back"
    )
    assert contents(here / "out") == before
    run("workers=2", "corpora.crawl.on_damage=stop", "name=other")  # these change no byte
    assert contents(here / "out") == before


def test_who_is_at_work_on_a_refused_folder_is_said(here: Path) -> None:
    run()
    lease = Lease.take(here / "out/crawl/slices/.0-00000.lease")
    assert lease is not None
    with pytest.raises(ConfigError, match=rf"another configuration \({lease.owner} is at work on it\): clean"):
        run("clean.unicode=nfkc")
    lease.release()


def test_a_slice_that_another_has_is_waited_for(here: Path) -> None:
    tokenizer = make_tokenizer(load())
    job = make_job(load(), "crawl", tokenizer)
    lease = Lease.take(job.lease_of(job.plan.slices[0]))
    assert lease is not None
    assert not make_slice(job, job.plan.slices[0], tokenizer, lambda *_: None)
    lease.release()
    assert make_slice(job, job.plan.slices[0], tokenizer, lambda *_: None)
    assert not make_slice(job, job.plan.slices[0], tokenizer, lambda *_: None)


def test_two_at_once_share_the_work(here: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    both = [subprocess.Popen(COMMAND[:-1], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    tables = [process.communicate()[0].splitlines()[:-1] for process in both]  # the last line is the time
    assert [process.returncode for process in both] == [0, 0] and tables[0] == tables[1]
    together = contents(here / "out")
    shutil.rmtree(here / "out")
    run()
    assert contents(here / "out") == together


def test_inputs_that_come_later_are_a_generation_of_their_own(here: Path) -> None:
    run()
    before = contents(here / "out/books/slices")
    identity = Manifest.open(here / "out/books").generations[0]["identity"]
    (here / "books/0-first-in-the-alphabet.txt").write_text(sentences(77, 300))
    *_, books = run()
    manifest = Manifest.open(here / "out/books")
    assert books.documents_read == 6 and len(manifest.generations) == 2
    assert manifest.generations[0]["identity"] == identity
    after = contents(here / "out/books/slices")
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"1-00000"}
    assert not list(verified(here / "out/books"))


def test_an_input_that_changed_is_made_again_as_long_as_nothing_is_sealed(here: Path) -> None:
    tokenizer = make_tokenizer(load())
    job = make_job(load(), "crawl", tokenizer)
    assert make_slice(job, job.plan.slices[0], tokenizer, lambda *_: None)
    changed = here / job.plan.slices[0].parts[0].input.name
    changed.write_bytes((here / "crawl/2.warc.gz").read_bytes())
    again = make_job(load(), "crawl", tokenizer)
    assert [s.name for s in again.plan.slices] == ["0-00001", "0-00002", "0-00003"]
    assert not (here / "out/crawl/slices/0-00000").exists()
    crawl, *_ = run()
    assert crawl.documents_read == 90 and not list(verified(here / "out/crawl"))
    assert {p["input"] for p in json.loads((here / "out/crawl/slices/0-00003/slice.json").read_text())["parts"]} == {
        "crawl/0.warc.gz"
    }


def test_an_input_of_finished_shards_that_changed_is_refused(here: Path) -> None:
    run()
    before = contents(here / "out")
    path = here / "crawl/1.warc.gz"
    data = path.read_bytes()
    path.write_bytes(data + b"x")
    with pytest.raises(ConfigError) as error:
        run()
    assert str(error.value) == (
        f"out/crawl: inputs of finished shards have changed: crawl/1.warc.gz: {len(data)} bytes when it was planned, "
        f"{len(data) + 1} now; put them back, or prepare into another `out`"
    )
    assert contents(here / "out") == before
    path.write_bytes(data)  # back, with another time: the bytes are compared
    run()
    path.unlink()  # finished shards do not need it
    run()


def test_an_input_that_changes_while_it_is_read_is_refused(here: Path) -> None:
    tokenizer = make_tokenizer(load())
    job = make_job(load(), "books", tokenizer)
    touched = here / job.plan.slices[0].parts[0].input.name
    with pytest.raises(Exception, match="changed since it was planned; run data-prep run again"):
        make_slice(job, job.plan.slices[0], tokenizer, lambda *_: os.utime(touched, (1, 1)))
    assert [path.name for path in (here / "out/books/slices").iterdir()] == []


def test_damage_is_counted_or_stops(here: Path) -> None:
    path = here / "crawl/1.warc.gz"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(WorkError, match=r"crawl: crawl/1\.warc\.gz: damaged at byte \d+: the file ends inside"):
        run("corpora.crawl.on_damage=stop")
    crawl, *_ = run()
    assert crawl.set_aside == {"damaged input": 1} and 80 < crawl.documents_read < 90


def test_leftovers_of_the_dead_are_swept(here: Path) -> None:
    run()
    whole = contents(here / "out")
    folder = here / "out/crawl/slices"
    (folder / ".tmp-0-00000-abc").mkdir()
    (folder / ".tmp-0-00000-abc/train-00000.tar").write_text("half")
    (folder / ".0-00000.lease").symlink_to('{"host": "gone"}')
    (folder / "0-99999").mkdir()
    (here / "out/crawl/.MANIFEST.json.tmp-1").write_text("half")
    (here / "out/.tokenizer.json.tmp-1").write_text("half")
    run()
    assert contents(here / "out") == whole


@pytest.mark.parametrize("where", ["clean", "filter", "encode"])
def test_a_document_that_raises_is_set_aside_and_the_rest_is_done(
    here: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer(load())
    job = make_job(load(), "crawl", tokenizer)
    bad = sentences(3, 20)
    _poison(where, bad, monkeypatch)
    for slice in job.plan.slices:
        make_slice(job, slice, tokenizer, lambda *_: None)
    record = job.record(job.plan.slices[0])
    assert record is not None
    assert record["counts"]["set_aside"] == {"raises": 1} and record["counts"]["read"] == 30
    assert sum(record["counts"]["documents"].values()) == 29
    assert record["counts"]["notes"] == [
        "crawl/0.warc.gz: document urn:uuid:00000000-0000-0000-0000-000000000003: raises ValueError: poison"
    ]


def _poison(where: str, bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make one step raise on one text."""
    from data_pipeline.clean import Clean
    from data_pipeline.filters import Filters

    def raising(old: Callable[..., Any], text_of: Callable[[Any], Any]) -> Callable[..., Any]:
        def new(self: Any, argument: Any, *more: Any) -> Any:
            if bad in text_of(argument):
                raise ValueError("poison")
            return old(self, argument, *more)

        return new

    if where == "clean":
        monkeypatch.setattr(Clean, "text", raising(Clean.text, lambda text: text))
    elif where == "filter":
        monkeypatch.setattr(Filters, "judged", raising(Filters.judged, lambda document: document.text))
    else:
        monkeypatch.setattr(Tokenizer, "encode_batch", raising(Tokenizer.encode_batch, lambda texts: " ".join(texts)))


def test_documents_that_all_raise_stop_the_work(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer(load())
    rows = "".join(json.dumps({"text": f"poison {i}"}) + "\n" for i in range(2000))
    (here / "mine.jsonl").write_text(rows)
    write_config({**CONFIG, "corpora": {"mine": {"kind": "text_files", "paths": ["mine.jsonl"]}}, "slice_bytes": 10**6})
    job = make_job(load(), "mine", tokenizer)
    _poison("clean", "poison", monkeypatch)
    with pytest.raises(Exception, match=r"101 of 101 documents raise an error, the last: mine\.jsonl: document mine"):
        make_slice(job, job.plan.slices[0], tokenizer, lambda *_: None)


def test_a_worker_that_is_killed_is_replaced(here: Path) -> None:
    """The first worker dies of a signal in its first slice; another makes it."""
    killer = here / "sitecustomize.py"
    killer.write_text(
        "import os, pathlib\n"
        "from data_pipeline import slices\n"
        "mark, old = pathlib.Path('killed'), slices._publish\n"
        "def publish(*arguments):\n"
        "    if not mark.exists():\n"
        "        mark.touch()\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return old(*arguments)\n"
        "slices._publish = publish\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{Path(__file__).parents[2]}"}
    done = subprocess.run(COMMAND, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and (here / "killed").exists()
    assert "its worker died (signal 9); once more in a fresh process" in done.stderr
    killed = contents(here / "out")
    shutil.rmtree(here / "out")
    run()
    assert contents(here / "out") == killed


def test_a_slice_that_kills_twice_does_not_keep_the_others_from_being_made(here: Path) -> None:
    killer = here / "sitecustomize.py"
    killer.write_text(
        "import os\n"
        "from data_pipeline import slices\n"
        "old = slices._publish\n"
        "def publish(job, slice, temporary):\n"
        "    if (job.corpus, slice.name) == ('crawl', '0-00001'):\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return old(job, slice, temporary)\n"
        "slices._publish = publish\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{Path(__file__).parents[2]}"}
    done = subprocess.run(COMMAND[:-1], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    why = "crawl: slice 0-00001 (crawl/1.warc.gz): its worker died twice (signal 9); out of memory? try fewer workers"
    assert done.stderr.splitlines()[-1] == f"data-prep: {why}"
    [failure] = failures(here / "out/crawl")
    assert (failure.slice, failure.why, failure.host) == ("0-00001", why, socket.gethostname())
    missing = [p for p in ("crawl", "wiki", "books") if not (here / "out" / p / "MANIFEST.json").exists()]
    assert missing == ["crawl", "wiki", "books"]  # nothing is sealed while a slice is missing
    killer.unlink()
    made = {path: path.stat().st_mtime_ns for path in here.glob("out/*/slices/[0-9]*/slice.json")}
    run()
    assert failures(here / "out/crawl") == []
    assert all(path.stat().st_mtime_ns == then for path, then in made.items())  # all but one were there already
    assert len(list(here.glob("out/*/slices/[0-9]*/slice.json"))) == len(made) + 1


@pytest.mark.parametrize(("stage", "more"), [("slices", []), ("texts", ["dedup={near: null}"])])
def test_an_input_that_kills_twice_is_set_aside_and_the_rest_is_done(stage: str, more: list[str], here: Path) -> None:
    killer = here / "sitecustomize.py"
    killer.write_text(
        "import os\n"
        "from data_pipeline import slices\n"
        "old = slices._read\n"
        "def read(source, reading):\n"
        "    for i, document in enumerate(old(source, reading)):\n"
        "        if reading.part.input.name == 'crawl/1.warc.gz' and i == 7:\n"
        "            os.kill(os.getpid(), 9)\n"
        "        yield document\n"
        "slices._read = read\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{Path(__file__).parents[2]}"}
    done = subprocess.run([*COMMAND, "slice_bytes=1Mi", *more], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("its worker died (signal 9)") == 1
    said = (
        "crawl: slice 0-00000: crawl/1.warc.gz: its worker died twice (signal 9): set aside; "
        f"with fewer workers or more memory, remove out/crawl/{stage}/.0-00000.aside and its slice, and run again"
    )
    assert said in done.stderr
    manifest = Manifest.open(here / "out/crawl")
    assert manifest.head["counts"]["set_aside"] == {"kills its worker": 1}
    assert sum(manifest.head["counts"]["documents"].values()) == 60  # of the other two
    killer.unlink()
    once = contents(here / "out/crawl")
    run("slice_bytes=1Mi", *more)
    assert contents(here / "out/crawl") == once


def test_json_lines_in_ranges_give_what_the_whole_file_gives(here: Path) -> None:
    rows = [json.dumps({"text": sentences(i, 5)}) for i in range(400)]
    (here / "mine.jsonl").write_text("\n".join(rows))
    mine = {"mine": {"kind": "text_files", "paths": ["mine.jsonl"]}}
    write_config({**CONFIG, "corpora": mine, "validation": {"fraction": 0}})
    run()
    assert len(list((here / "out/mine/slices").iterdir())) > 3
    tokenizer = Tokenizer.load(here / "out/tokenizer.json")
    manifest = Manifest.open(here / "out/mine")
    assert manifest.head["counts"]["documents"] == {"train": 400}
    texts = [tokenizer.decode(ids) for ids in tokens(here / "out/mine")]
    assert sorted(texts) == sorted(sentences(i, 5) for i in range(400))


def test_a_given_tokenizer_is_copied_and_another_refused(here: Path) -> None:
    given = here / "given.json"
    make_tokenizer(load())
    shutil.move(here / "out/tokenizer.json", given)
    shutil.rmtree(here / "out")
    write_config({**CONFIG, "tokenizer": {"kind": "file", "path": "given.json"}})
    run()
    assert (here / "out/tokenizer.json").read_bytes() == given.read_bytes()
    with given.open("a") as file:
        file.write("\n")
    with pytest.raises(
        ConfigError, match=r"out: its tokenizer was made with another configuration: tokenizer\.sha256: "
    ):
        run()
    given.unlink()
    with pytest.raises(ConfigError, match=r"given\.json: no such tokenizer file"):
        run()


def test_an_exchanged_tokenizer_is_told(here: Path) -> None:
    run()
    path = here / "out/tokenizer.json"
    path.write_text(path.read_text().replace("\n", "\n "))
    with pytest.raises(ConfigError) as error:
        run()
    assert str(error.value) == (
        "out/tokenizer.json: damaged or exchanged (sha256 differs from tokenizer.made.json); restore it"
    )
    assert list(verified(here / "out/wiki")) == [
        f"{here}/out/tokenizer.json: not the tokenizer of {here}/out/wiki (sha256 differs); restore it"
    ]


def test_the_sample_for_the_tokenizer_does_not_depend_on_the_order_of_inputs(here: Path) -> None:
    make_tokenizer(load("tokenizer.sample_bytes=30000"))
    first = json.loads((here / "out/tokenizer.made.json").read_text())
    assert sum(each["bytes"] for each in first["sample"].values()) < 40_000
    assert all(each["documents"] > 0 for each in first["sample"].values())
    shutil.rmtree(here / "out")
    write_config({**CONFIG, "corpora": dict(reversed(CONFIG["corpora"].items()))})  # type: ignore[attr-defined]
    make_tokenizer(load("tokenizer.sample_bytes=30000"))
    assert json.loads((here / "out/tokenizer.made.json").read_text()) == first


def test_an_array_of_jobs_makes_the_same(here: Path) -> None:
    run()
    whole = contents(here / "out")
    shutil.rmtree(here / "out")
    slices, seal = prepare.stages(load())
    last = slices.tasks - 1
    assert slices.missing == tuple(range(last + 1)) and (seal.name, seal.tasks, seal.missing) == ("seal", 1, (0,))
    prepare.run_stage(load(), "slices", last, last)
    prepare.run_stage(load(), "slices", 1, last - 1)
    with pytest.raises(ConfigError, match=rf"--tasks 0-{last + 1}: the stage slices has the tasks 0-{last}"):
        prepare.run_stage(load(), "slices", 0, last + 1)
    with pytest.raises(Unfinished, match=r"1 slices are missing; the same command makes them"):
        prepare.run_stage(load(), "seal", 0, 0)
    assert prepare.stages(load())[0].missing == (0,)
    assert not (here / "out/crawl/MANIFEST.json").exists()
    prepare.run_stage(load(), "slices", 0, 0)
    prepare.run_stage(load(), "seal", 0, 0)
    assert contents(here / "out") == whole
    assert [stage.missing for stage in prepare.stages(load())] == [(), ()]
    assert [stage.name for stage in prepare.stages(load())] == list(prepare.stage_widths(load()))


def test_shares_help_each_other_and_leave_alone_what_others_have(here: Path) -> None:
    run()
    whole = contents(here / "out")
    shutil.rmtree(here / "out")
    with pytest.raises(ConfigError, match=r"out: not planned; run data-prep plan"):
        prepare.run_share(load(), "slices", 0, 2, Done())
    crawl, *others = make_jobs(load())
    for path in (here / "crawl").iterdir():
        path.rename(path.with_suffix(".later"))  # a share goes by the plan, and does not look for inputs
    done = Done()
    held = Lease.take(crawl.lease_of(crawl.plan.slices[2])) or Lease.wait(here / "x", print)
    with held, pytest.raises(WorkError, match=r"slices could not be made, all others are; .*: crawl/.*gone"):
        prepare.run_share(load(), "slices", 1, 2, done)
    assert len(done.failed) == len(crawl.plan.slices) - 1
    assert done.made == sum(len(job.plan.slices) for job in others)
    for path in (here / "crawl").iterdir():
        path.rename(path.with_suffix(".gz"))
    prepare.run_share(load(), "slices", 0, 3, done := Done())
    assert (done.made, done.failed) == (1, [])  # what failed waits until it is planned anew
    with pytest.raises(WorkError, match=rf"{len(crawl.plan.slices) - 1} slices failed; "):
        prepare.run_share(load(), "seal", 0, 1, Done())
    run()
    assert contents(here / "out") == whole


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("corpora.crawl.paths=[nowhere/*.warc.gz]", "corpora.crawl.paths: no file matches 'nowhere/*.warc.gz'"),
        ("workers=0", "workers: expected at least 1, got 0"),
        ("block_tokens=1000", "block_tokens: expected a power of two up to 1Mi, got 1000"),
        ("corpora.crawl.kind=common_craw", "expected common_crawl | wikipedia | bookcorpus | text_files"),
        ("tokenizer.vocab_size=1e9", "tokenizer.vocab_size: expected more than 257"),
    ],
)
def test_mistakes_are_said_before_anything_is_made(here: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        run(override)
    assert said in str(error.value)
    assert not list(here.rglob("*.tar"))


def test_the_real_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real("wikipedia")
    monkeypatch.chdir(tmp_path)
    crawl = {"kind": "common_crawl", "paths": [f"{REAL}/common_crawl/*.warc.gz", f"{REAL}/common_crawl/*.wet.gz"]}
    corpora = {
        "crawl": crawl,
        "wiki": {"kind": "wikipedia", "paths": [f"{REAL}/wikipedia"]},
        "books": {"kind": "bookcorpus", "paths": [f"{REAL}/books/alice-in-wonderland.txt"]},
    }
    tokenizer = {"kind": "train", "vocab_size": 1000, "sample_bytes": 400_000}
    write_config({"name": "real", "out": "out", "tokenizer": tokenizer, "corpora": corpora, "workers": 2})
    crawl_, wiki, books = run()
    assert crawl_.documents_read == 40 and crawl_.set_aside == {"damaged input": 1}
    assert wiki.documents_read == 106 and wiki.set_aside == {"redirect": 100}
    assert books.documents_read == 1 and books.characters > 140_000
    assert all(2 < summary.characters_per_token < 4 for summary in (wiki, books))
    assert not [line for folder in folders(Path("out")) for line in verified(folder)]


def test_a_slice_whose_text_the_fast_encoder_gets_wrong_is_made_with_the_other(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A gigatoken that swaps two ids is found on the slice's own text, though it passed the proof."""
    pytest.importorskip("gigatoken", reason="gigatoken is not installed")
    tokenizer = make_tokenizer(load())
    job = make_job(load(), "crawl", tokenizer)
    assert job.encoder == tokenizer.encoder == "gigatoken"
    make_slice(job, job.plan.slices[0], tokenizer, lambda *_: None)
    right = contents(job.folder_of(job.plan.slices[0]))
    shutil.rmtree(job.folder_of(job.plan.slices[0]))

    encode = Tokenizer.encode_batch

    def wrong(self: Tokenizer, texts: Sequence[str]) -> list[Ids]:
        return encode(self, texts) if self.encoder == "tokenizers" else [ids[::-1] for ids in encode(self, texts)]

    monkeypatch.setattr(Tokenizer, "encode_batch", wrong)
    make_slice(job, job.plan.slices[0], tokenizer, lambda *_: None)
    made = contents(job.folder_of(job.plan.slices[0]))
    assert {name for name in right if made[name] != right[name]} == {"slice.json"}
    record = json.loads((job.folder_of(job.plan.slices[0]) / "slice.json").read_text())
    assert record["encoder"] == "tokenizers" and tokenizer.encoder == "gigatoken"
    assert "gigatoken gives other ids than tokenizers for" in caplog.text
