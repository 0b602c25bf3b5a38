"""Amended and traced: runs across amendments, takedowns and damaged blocks, and what they say of their steps."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from configs import ConfigError
from data_pipeline.order import digest
from data_pipeline.shards import ShardError, seal
from data_pipeline.stream import Corpora
from pretrain import trace, withdrawn
from pretrain.cli import app
from pretrain.run import TrainRun, load_run
from pretrain.segments import Course, SegmentRecord, Segments, plan_course
from pretrain.trace import trace_document, trace_step
from tests.corpora import FORMAT, make_corpus, make_slice
from tests.data_pipeline.servers import Server
from tests.data_pipeline.test_trace import labels
from tests.pretrain.test_segments import BATCH, T, amended, begun, drawn, refused, run_of
from tests.processes import HERE, environment
from tests.runs import events

ROWS = FORMAT.block_tokens // T


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("corpora")
    for seed, name in enumerate(("alpha", "beta", "gamma")):
        make_corpus(place / name, seed, slices=1, documents=60)
    return place


def withdrawing(
    run: TrainRun, records: list[SegmentRecord], from_sample: int, *changes: str
) -> tuple[list[SegmentRecord], withdrawn.Found]:
    """Records amended as `pretrain amend` does, without a checkpoint."""
    of_course, withdrawals = withdrawn.split(changes)
    records = amended(run, records, from_sample, *of_course)
    earlier = [id for r in records if r.withdrawn is not None for id in r.withdrawn.ids()]
    corpora = Corpora(plan_course(run, records).runs[-1][1].data)
    found = withdrawn.find(corpora, records[-1].generations, withdrawals, earlier, records[-2].generations)
    assert found is not None
    kept = found.write(run.run_folder / "segments")
    return [*records[:-1], replace(records[-1], withdrawn=kept, format=2)], found


def holding(course: Course, ids: dict[str, set[str]], until: int) -> set[int]:
    """The samples that hold any token of documents of sources, found by looking at every one."""
    held = [labels(shards, T) for shards in course.corpora.shards(course.order.pools)]
    at = course.order.locate(np.arange(until))
    found = set()
    for n, pool, block, row in zip(range(until), at.pool.tolist(), at.block.tolist(), at.row.tolist(), strict=True):
        mine = ids.get(course.order.pools[pool].source, set())
        if any(id in mine for id, _ in held[pool][block * ROWS + row]):
            found.add(n)
    return found


def test_what_is_taken_down_is_never_fed_again(folder: Path, tmp_path: Path) -> None:
    run = run_of(folder, f"run_folder={tmp_path}", "train_tokens=60000")
    (tmp_path / "ids.txt").write_text("alpha:s0/3\n\ns0/12\nnobody's\nalpha:s0/9\n")
    before = plan_course(run, begun(run))
    records, found = withdrawing(run, begun(run), 200, f"takedown={tmp_path / 'ids.txt'}", "optim.lr_peak=1e-3")
    assert found.unknown == ["nobody's"]
    assert sorted((source, held.id) for source, held in found.held) == [
        ("alpha", "s0/12"), ("alpha", "s0/3"), ("alpha", "s0/9"), ("beta", "s0/12")
    ]  # fmt: skip
    course = plan_course(run, records)
    until = course.end_sample
    hit = holding(course, {"alpha": {"s0/3", "s0/12"}, "beta": {"s0/12"}}, until)
    past, gone = {n for n in hit if n < 200}, {n for n in hit if n >= 200}
    assert past and gone and course.order.locate(np.array([until - 1])).epoch[0] > 0
    assert set(np.flatnonzero(course.skips.mask(np.arange(until))).tolist()) == gone
    assert drawn(course, 0, before.end_sample) == drawn(before, 0, before.end_sample)  # nothing moves
    for step in (0, 19, 20, 21, course.end_step):
        assert course.tokens(step) == T * (step * BATCH - sum(n < step * BATCH for n in gone))
    assert course.tokens(course.end_step) >= 60000 > course.tokens(course.end_step - 1)
    steps = trace.fed_steps(course, [found.ranges], 200)
    assert steps == sorted({n // BATCH + 1 for n in past})
    # and read again from the folder, with more taken down on top of it
    for record in records:
        Segments(tmp_path).write(record)
    kept = Segments(tmp_path).read()
    assert kept == records and json.loads((tmp_path / "segments/1.json").read_text())["format"] == 2
    assert json.loads((tmp_path / "segments/0.json").read_text())["format"] == 1
    again, _ = withdrawing(run, kept, 300, "skip_blocks=beta:0:2-3")
    more = plan_course(run, again)
    at = more.order.locate(np.arange(more.end_sample))
    damaged = [more.order.pools[p].source == "beta" and b in (2, 3) for p, b in zip(at.pool, at.block, strict=True)]
    expected = gone | {n for n in np.flatnonzero(damaged).tolist() if n >= 300}
    expected |= {n for n in holding(more, {"alpha": {"s0/3", "s0/12"}, "beta": {"s0/12"}}, more.end_sample) if n >= 200}
    assert set(np.flatnonzero(more.skips.mask(np.arange(more.end_sample))).tolist()) == expected


def test_a_takedown_holds_for_what_is_added_later(tmp_path: Path) -> None:
    head = {"tokenizer_sha256": "0" * 64}
    parts = [replace(make_slice(tmp_path / "alpha", f"s{g}", g, 60), generation=g) for g in range(2)]
    seal(tmp_path / "alpha", FORMAT, head, parts)
    make_corpus(tmp_path / "beta", 7, slices=2, documents=60)
    run = run_of(tmp_path, alpha={"generations": 1})
    (tmp_path / "ids.txt").write_text("alpha:s1/3\ns1/5\n")
    records, found = withdrawing(run, begun(run), 100, f"takedown={tmp_path / 'ids.txt'}")
    assert found.unknown == ["alpha:s1/3", "s1/5"] and not found.ranges
    assert not plan_course(run, records).skips.mask(np.arange(400)).any()
    beta = f"data.sources.beta={{shards: {tmp_path / 'beta'}, weight: 1}}"
    records, found = withdrawing(run, records, 200, "data.sources.alpha.generations=2", beta)
    course = plan_course(run, records)
    assert found.what == ["3 documents of earlier takedowns in what was added"]
    gone = holding(course, {"alpha": {"s1/3", "s1/5"}, "beta": {"s1/5"}}, course.end_sample)
    assert gone and set(np.flatnonzero(course.skips.mask(np.arange(course.end_sample))).tolist()) == gone


def test_what_cannot_be_withdrawn(folder: Path, tmp_path: Path) -> None:
    run = run_of(folder, f"run_folder={tmp_path}")
    blocks = Corpora(run.data).manifests["alpha"].generations[0]["train"]["blocks"]

    def refusal(change: str) -> str:
        return refused(lambda: withdrawing(run, begun(run), 100, change))

    missing, empty = tmp_path / "missing.txt", tmp_path / "empty.txt"
    empty.write_text("\n \n")
    assert refusal(f"takedown={missing}") == (
        f"takedown={missing}: No such file or directory; expected a file with an id, or SOURCE:ID, on each line"
    )
    assert refusal(f"takedown={empty}") == f"takedown={empty}: no ids; expected an id, or SOURCE:ID, on each line"
    assert refusal("skip_blocks=alpha:0") == (
        "skip_blocks=alpha:0: expected SOURCE:GENERATION:BLOCK or SOURCE:GENERATION:BLOCK-BLOCK, as in wiki:0:17"
    )
    assert refusal("skip_blocks=wiki:0:1") == "skip_blocks=wiki:0:1: no source wiki; this run has alpha, beta"
    assert refusal("skip_blocks=alpha:1:1") == "skip_blocks=alpha:1:1: 1 generations of alpha are in use, from 0"
    assert refusal(f"skip_blocks=alpha:0:{blocks}") == (
        f"skip_blocks=alpha:0:{blocks}: expected blocks from 0 to {blocks - 1}, the first one first"
    )
    others = Corpora(run.data).manifests["beta"].generations[0]["train"]["blocks"]
    everything = [f"skip_blocks=alpha:0:0-{blocks - 1}", f"skip_blocks=beta:0:0-{others - 1}"]
    records, _ = withdrawing(run, begun(run), 100, *everything)
    assert refused(lambda: plan_course(run, records)) == (
        "takedown, skip_blocks: every sample of the sources that are drawn from would be skipped"
    )
    records, _ = withdrawing(run, begun(run), 100, everything[0])
    assert plan_course(run, records).end_step > 40


def test_files_of_what_is_withdrawn_are_held_to_their_hash(folder: Path, tmp_path: Path) -> None:
    run = run_of(folder, f"run_folder={tmp_path / 'one'}")
    records, _ = withdrawing(run, begun(run), 100, "skip_blocks=alpha:0:1")
    Segments(tmp_path / "one").write(records[1])
    Segments(tmp_path / "two").write(records[1])  # as a fork takes its parent's records
    (copied,) = Segments(tmp_path / "two").read()
    assert copied == records[1] and copied.withdrawn is not None
    (file,) = (tmp_path / "two/segments").glob("withdrawn-*.parquet")
    assert copied.withdrawn.ranges()["alpha", 0].tolist() == [[ROWS, 2 * ROWS]]
    file.write_bytes(file.read_bytes()[:-1])
    assert refused(copied.withdrawn.ranges) == (
        f"{file}: damaged (hash differs from its segment record's); bring back a whole one"
    )
    file.unlink()
    assert refused(copied.withdrawn.ranges) == (
        f"{file}: No such file or directory, but a segment record names it; bring it back"
    )
    Segments(tmp_path / "one").clear()
    assert list((tmp_path / "one/segments").iterdir()) == []


# --- sources that have had their epochs -------------------------------------------------------------------------------


def test_a_source_about_to_have_had_its_epochs_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.segments.WARN_STEPS", 5)
    for rule, then in (("stop", "the run ends there"), ("reweight", "it is left out from there on")):
        run = run_of(folder, "data.sources.alpha.max_epochs=1", f"data.on_exhausted={rule}", "train_tokens=60000")
        course = plan_course(run, begun(run))
        last = {step for step in range(course.end_step) if any(
            name == "alpha" and epoch == 0 for name, _, epoch, *_ in drawn(course, BATCH * step, BATCH * step + BATCH)
        )}  # fmt: skip
        at = course.epochs[0][0]
        assert at - 1 <= max(last) <= at and len(course.epochs) == 1
        line = f"source alpha: its 1 epochs end after step {at} of {course.end_step}; {then}"
        assert course.warnings(0, first=True) == course.warnings(at - 1, first=True) == [line]
        assert course.warnings(at, first=True) == []
        assert [step for step in range(course.end_step + 1) if course.warnings(step)] == [at - 5, at]
    free = run_of(folder, "train_tokens=60000")
    assert plan_course(free, begun(free)).epochs == []


# --- tracing ----------------------------------------------------------------------------------------------------------


def invoke(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["trace", *map(str, arguments)])
    if isinstance(result.exception, ConfigError):
        return 2, str(result.exception)
    return result.exit_code, result.stdout


def test_steps_and_documents_lead_to_each_other(folder: Path, tmp_path: Path) -> None:
    """Of a run that has not begun: all is planned."""
    run = run_of(folder, f"run_folder={tmp_path}", "train_tokens=30000")
    by_document, end = defaultdict(list), plan_course(run, begun(run)).end_step
    for step in range(1, end + 1):
        for s in trace_step(run, step, ranks=3):
            by_document[s.source, s.id].append((step, s.epoch, s.sample, s.first_token, s.end_token, "planned"))
            assert (s.state, s.uri) == ("planned", f"https://example.org/{s.id}")
    for id in ("s0/0", "s0/7", "s0/31", "s0/58"):
        found = {t.source: t for t in trace_document(run, id)}
        assert set(found) == {"alpha", "beta"}
        for source, traced in found.items():
            assert sorted(tuple(vars(s).values()) for s in traced.sightings) == sorted(by_document[source, id])
    (one,) = trace_document(run, "beta:s0/7")
    assert (one.source, one.split) == ("beta", "train") and one.sightings
    (validation,) = trace_document(run, "beta:s0/9")
    assert (validation.split, validation.sightings) == ("validation", [])
    shares = [{s.sample for s in trace_step(run, 4, rank, 3)} for rank in range(3)]
    assert sorted(n for share in shares for n in share) == list(range(30, 40))
    assert {s.rank for s in trace_step(run, 4, 1, 3)} == {1}


def test_a_run_whose_shards_are_on_a_server_is_traced_as_from_disk(folder: Path, tmp_path: Path) -> None:
    """With a cache on this machine's disk, and without."""
    here = run_of(folder, f"run_folder={tmp_path}", "train_tokens=30000")
    server = Server()
    server.files = {f"/{p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    try:
        elsewhere = [f"data.sources.{name}.shards={server.address}/{name}" for name in here.data.sources]
        cache = [f"data.cache.folder={tmp_path / 'cache'}", "data.cache.gib=0.1"]
        for more in ([], cache):
            there = run_of(folder, f"run_folder={tmp_path}", "train_tokens=30000", *elsewhere, *more)
            assert trace_step(there, 4, 1, 3) == trace_step(here, 4, 1, 3)
            for id in ("s0/7", "beta:s0/9"):
                assert trace_document(there, id) == trace_document(here, id)
            with pytest.raises(ConfigError, match="no such document in alpha, beta"):
                trace_document(there, "nobody's")
        server.faults = {path: ["404*"] for path in server.files if path.endswith("ids.npy")}
        with pytest.raises(ShardError, match=r"/alpha/slices/s0/ids.npy: missing; see data-prep verify$"):
            trace_document(run_of(folder, f"run_folder={tmp_path}", "train_tokens=30000", *elsewhere), "s0/7")
    finally:
        server.close()


def test_the_command_says_what_there_is_not(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(run_of(folder, f"run_folder={tmp_path}").model_dump(mode="json")))
    config = tmp_path / "run.yaml"
    assert invoke(config) == (2, "trace: expected --step S [--rank R] or --doc ID")
    assert invoke(config, "--step", 0) == (2, "--step 0: this run has the steps 1 to 40")
    assert invoke(config, "--step", 41) == (2, "--step 41: this run has the steps 1 to 40")
    assert invoke(config, "--step", 1, "--rank", 2) == (
        2, "--rank 2: step 1 has the ranks 0 to 0; --ranks says otherwise"
    )  # fmt: skip
    assert invoke(config, "--doc", "nobody's") == (
        2, "--doc nobody's: no such document in alpha, beta; an id may be SOURCE:ID"
    )  # fmt: skip
    code, text = invoke(config, "--step", 1, "--rank", 0, "--ranks", 2)
    run = load_run(config)
    s = trace_step(run, 1, 0, 2)[0]
    assert code == 0 and text.splitlines()[0] == (
        f"sample {s.sample}  rank 0  planned  {s.source}  epoch 0  tokens {s.first_token} to {s.end_token - 1}  "
        f"{s.id}  https://example.org/{s.id}"
    )
    rows = json.loads(invoke(config, "--step", 1, "--json")[1])
    assert {row["sample"] for row in rows} == set(range(10)) and rows[0].keys() >= {"id", "uri", "epoch", "state"}
    code, text = invoke(config, "--doc", f"{s.source}:{s.id}")
    assert code == 0 and text.splitlines()[0].startswith(f"{s.source}:{s.id}  train, ")
    assert f"step 1  planned  epoch 0  sample {s.sample}  tokens {s.first_token} to {s.end_token - 1}" in text


# --- a real run, on one, two, three and four ranks --------------------------------------------------------------------


@pytest.mark.trials(4)
def test_amended_twice_and_resumed_on_other_ranks_each_time(tmp_path: Path) -> None:
    quiet = {
        key: value for key, value in environment(0, 1, 0).items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.pretrain.chain", str(tmp_path)],
        cwd=HERE, env=quiet, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    seen, unknown, told, later = json.loads(done.stdout.splitlines()[-1])
    assert unknown == "in no source of this run: nobody's; sought again in what is added later"
    run = load_run(tmp_path / "run")
    course = trace.course_of(run)
    taken = {"alpha": {seen, "s0/11"}, "beta": {"s0/11"}, "gamma": {"s0/11"}}
    end = course.end_sample
    held = holding(course, taken, end)
    fed_before = sorted({n // 10 + 1 for n in held if n < 60})
    assert told.startswith("5 documents, 2 of them in validation text, which is not trained on; of their ")
    assert f"some were fed in {len(fed_before)} steps, from {fed_before[0]} to {fed_before[-1]};" in told

    assert (
        later.startswith("2 documents, 1 of them in validation text") and " none was ever fed;" in later
    )  # of the source that was added

    # the whole run once more, sample by sample
    at, shards = course.order.locate(np.arange(end)), course.corpora.shards(course.order.pools)
    total, tokens = 0, 0
    for n in range(end):
        pool, block, row = course.order.pools[at.pool[n]], int(at.block[n]), int(at.row[n])
        if (n >= 60 and n in held) or (n >= 120 and pool.source == "beta" and block in (1, 2)):
            continue
        ids = shards[at.pool[n]].read(block)[row * T : row * T + T + 1]
        total, tokens = total + digest(np.array([n]), ids[None]), tokens + T
    assert {pool.source for pool in course.order.pools} == {"alpha", "beta", "gamma"}
    verify = CliRunner().invoke(app, ["verify", str(tmp_path / "run"), "--workers", "2"])
    assert verify.exit_code == 0, verify.stdout
    rows = json.loads(CliRunner().invoke(app, ["verify", str(tmp_path / "run"), "--json"]).stdout)
    newest = json.loads((tmp_path / "run/checkpoints" / rows[0]["name"] / "MANIFEST.json").read_text())["position"]
    assert newest == {
        "step": course.end_step, "samples": end, "tokens": tokens, "digest": f"{total % 2**128:032x}"
    }  # fmt: skip
    assert course.steps.batch(5) == 10 and course.steps.batch(12) == 20
    places = course.end_step + 1  # each step is in the journal, and the beginning
    assert f"steps 0 to {course.end_step}: the data give the digest kept at each of {places} places" in verify.stderr

    # a source that has had its epochs is said at the start of each attempt before that, and when it happens
    ((at_step, line),) = course.epochs
    assert 12 < at_step < course.end_step and line.startswith("source gamma: its 0.01 epochs end after step ")
    said = [(event["step"], event["text"]) for event in events(tmp_path, "epochs")]
    assert said == [(step, line) for step in sorted({12, 15, at_step}) if step <= at_step]

    # what its steps saw
    assert [trace.ranks_at(tmp_path / "run", step) for step in (1, 6, 7, 12, 13, 15, 16)] == [1, 1, 2, 2, 3, 3, 4]
    assert trace.trained_steps(tmp_path / "run") == course.end_step
    (document,) = trace_document(run, f"alpha:{seen}")
    states = {s.sample: s.state for s in document.sightings}
    assert states == {n: "fed" if n < 60 else "skipped" for n in holding(course, {"alpha": {seen}}, end)}
    assert 3 in {s.step for s in document.sightings if s.state == "fed"}

    # a journal that tells of other data
    journal = next(path for path in (tmp_path / "run/journal").glob("*.jsonl") if '"step": 9,' in path.read_text())
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines:
        if line["type"] == "step" and line["step"] == 9:
            line["digest"] = "7" * 32
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    verify = CliRunner().invoke(app, ["verify", str(tmp_path / "run"), "--deep"])
    assert verify.exit_code == 1
    assert "journal: the first interval that differs: steps 8 to 9: from " in verify.stdout
    assert f"but the journal has {'7' * 32}" in verify.stdout
