"""The course of a run: where it ends, what is drawn when, and what an amendment may change."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import ConfigError, build
from data_pipeline.shards import seal
from data_pipeline.stream import Corpora
from pretrain.run import TrainRun
from pretrain.segments import Course, SegmentRecord, Segments, advice, amended_segment, first_segment, plan_course
from tests.corpora import FORMAT, make_corpus, make_slice

T = 64
BATCH = 10
Where = tuple[str, int, int, int, int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three corpora."""
    place = tmp_path_factory.mktemp("corpora")
    for seed, name in enumerate(("alpha", "beta", "gamma")):
        make_corpus(place / name, seed, slices=1, documents=60)
    return place


def run_of(folder: Path, *overrides: str, **sources: dict[str, Any]) -> TrainRun:
    """A run over alpha and beta of 40 steps."""
    chosen = sources or {"alpha": {"weight": 0.7}, "beta": {"weight": 0.3}}
    tree = {
        "name": "small",
        "run_folder": str(folder / "run"),
        "model": {"kind": "gpt", "layers": 2, "width": 32, "heads": 2, "context": 64, "vocab_size": 509},
        "data": {"seq_tokens": T, "sources": {n: {"shards": str(folder / n)} | s for n, s in chosen.items()}},
        "batch_tokens": BATCH * T + 5,  # rounded down
        "micro_batch_seqs": 3,
        "train_tokens": 40 * BATCH * T,
        "optim": {"kind": "adamw", "lr_peak": "3e-3"},
        "schedule": {"kind": "cosine"},
        "engine": {"kind": "torch", "precision": "fp32"},
    }
    return build(TrainRun, tree, "test", overrides)


def begun(run: TrainRun) -> list[SegmentRecord]:
    return [first_segment(run, Corpora(run.data))]


def amended(run: TrainRun, records: list[SegmentRecord], from_sample: int, *changes: str) -> list[SegmentRecord]:
    return [*records, amended_segment(run, records, changes, from_sample)[0]]


def drawn(course: Course, begin: int, end: int) -> list[Where]:
    """(source, generation, epoch, block, row) of samples."""
    at = course.order.locate(np.arange(begin, end))
    places = zip(*(x.tolist() for x in (at.pool, at.epoch, at.block, at.row)), strict=True)
    return [(course.order.pools[p].source, course.order.pools[p].generation, *rest) for p, *rest in places]


def first_beyond(course: Course, source: str, epochs: float) -> int:
    """The first sample with which a lane draws more of a source than its epochs, counted up."""
    lanes = course.order.lanes
    pool = next(p for p in course.order.pools if p.source == source)
    counts: Counter[int] = Counter()
    for sample, (name, *_) in enumerate(drawn(course, 0, 2000)):
        lane = sample % lanes
        counts[lane] += name == source
        if counts[lane] > epochs * len(range(lane, pool.blocks, lanes)) * pool.rows:
            return sample
    raise AssertionError("never")


def refused(make: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as error:
        make()
    return str(error.value)


# --- the start --------------------------------------------------------------------------------------------------------


def test_the_first_record_holds_what_was_found(folder: Path) -> None:
    run = run_of(folder)
    corpora = Corpora(run.data)
    (record,) = begun(run)
    assert (record.segment, record.from_sample, record.changes) == (0, 0, [])
    assert record.generations == {"alpha": 1, "beta": 1}
    assert record.identities == {n: [m.generations[0]["identity"]] for n, m in corpora.manifests.items()}
    assert record.lanes == 8  # a batch is 10, the corpora have more blocks
    assert begun(run_of(folder, "data.lanes=2"))[0].lanes == 2
    course = plan_course(run, [record])
    assert (course.end_step, course.end_reason) == (40, "train_tokens 25600 reached")
    assert (course.order.lanes, course.steps.batch(7), course.tokens(7)) == (8, BATCH, 7 * BATCH * T)


def test_a_batch_larger_than_a_source_is_said(folder: Path, tmp_path: Path) -> None:
    """One block of one sample; and fewer samples than a step takes."""
    format = replace(FORMAT, block_tokens=T)
    make_corpus(tmp_path / "one", 1, slices=1, documents=1, format=format)
    blocks = Corpora(run_of(tmp_path, one={}).data).pools({"one": 1})[0].blocks
    assert 1 <= blocks < BATCH
    few = run_of(tmp_path, "data.group_blocks=1", one={})
    assert advice(plan_course(few, begun(few))) == [
        f"source one: a step takes {BATCH} sequences of it, and it has {blocks}: some stand in the step more than "
        "once; give it more text or less weight, or take a smaller batch_tokens"
    ]
    enough = run_of(folder)
    assert advice(plan_course(enough, begun(enough))) == []
    far = run_of(folder, alpha={}, beta={"shared_mount": True})
    (line,) = advice(plan_course(far, begun(far)))
    assert line.startswith(
        "data.cache: not set, and the shards of beta are far: each of a node's ranks fetches for itself, "
    )


def test_groups_that_are_small_for_a_step_are_said(folder: Path) -> None:
    def said(*overrides: str) -> list[str]:
        run = run_of(folder, "data.lanes=2", *overrides)
        return advice(plan_course(run, begun(run)))

    blocks = sum(pool.blocks for pool in Corpora(run_of(folder).data).pools({"alpha": 1, "beta": 1}))
    wanted = min(8 * BATCH // 2, blocks // 2)
    assert said("data.group_blocks=1") == [
        f"data.group_blocks: a step takes up to {BATCH // 2} sequences of each of its 2 lanes, so steps in a row are "
        f"as mixed as they can be from {wanted} on, not 1, for {wanted} times the memory of open blocks"
    ]
    assert said(f"data.group_blocks={wanted}") == [] == said("data.group_blocks=1", "batch_tokens=128")


@pytest.mark.parametrize(("train_tokens", "end_step"), [(1, 1), (640, 1), (641, 2), (6400, 10), (6401, 11), (7040, 11)])
def test_the_last_step_is_the_one_that_reaches_the_tokens(train_tokens: int, end_step: int, folder: Path) -> None:
    run = run_of(folder, f"train_tokens={train_tokens}")
    assert plan_course(run, begun(run)).end_step == end_step


def test_another_vocabulary_is_refused(folder: Path) -> None:
    run = run_of(folder, "model.vocab_size=512")
    assert refused(lambda: plan_course(run, begun(run))) == (
        "model.vocab_size: 512, but the shards of alpha, beta were made with a vocabulary of 509; "
        "set model.vocab_size=509"
    )


def test_more_lanes_than_blocks_are_refused(folder: Path) -> None:
    run = run_of(folder, "data.lanes=64")
    blocks = Corpora(run.data).manifests["alpha"].generations[0]["train"]["blocks"]
    assert refused(lambda: plan_course(run, begun(run))) == (
        f"source alpha, generation 0: {blocks} blocks are fewer than the 64 lanes of this run; give it more text"
    )


def test_other_shards_under_the_same_run_are_refused(folder: Path) -> None:
    run = run_of(folder)
    records, moved = begun(run), run_of(folder, f"data.sources.alpha.shards={folder / 'gamma'}")
    old, new = (Corpora(r.data).manifests["alpha"].generations[0]["identity"][:12] for r in (run, moved))
    assert old != new
    assert refused(lambda: plan_course(moved, records)) == (
        f"data.sources.alpha.shards: {folder / 'gamma'} does not hold what this run began with: manifest {old} -> {new}"
    )


def test_shards_may_lie_elsewhere(folder: Path, tmp_path: Path) -> None:
    run = run_of(folder)
    shutil.copytree(folder / "alpha", tmp_path / "moved")
    moved = run_of(folder, f"data.sources.alpha.shards={tmp_path / 'moved'}")
    assert plan_course(moved, begun(run)).order.identity == plan_course(run, begun(run)).order.identity


def test_a_later_field_at_its_default_is_no_part_of_the_identity(folder: Path) -> None:
    """Checkpoints written before it was there are of the same run."""
    assert "data.document_mask" not in run_of(folder).identity()
    assert run_of(folder, "data.document_mask=true").identity()["data.document_mask"] is True


# --- epochs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [1, 1.5])
def test_too_many_epochs_are_refused_with_the_token(epochs: float, folder: Path) -> None:
    free = run_of(folder, "train_tokens=60000")
    sample = first_beyond(plan_course(free, begun(free)), "alpha", epochs)
    run = run_of(folder, "train_tokens=60000", f"data.sources.alpha.max_epochs={epochs}")
    assert refused(lambda: plan_course(run, begun(run))) == (
        f"data.sources.alpha.max_epochs: {epochs:g} epochs are used up at token {sample * T:,} of 60,160; raise it, "
        "lower the source's weight, or set data.on_exhausted to stop or reweight"
    )
    enough = run_of(folder, f"train_tokens={sample // BATCH * BATCH * T}", f"data.sources.alpha.max_epochs={epochs}")
    assert plan_course(enough, begun(enough)).end_reason == f"train_tokens {enough.train_tokens} reached"


def test_an_exhausted_source_stops_the_run(folder: Path) -> None:
    free = run_of(folder)
    sample = first_beyond(plan_course(free, begun(free)), "alpha", 1)
    run = run_of(folder, "data.on_exhausted=stop", "data.sources.alpha.max_epochs=1")
    course = plan_course(run, begun(run))
    assert course.end_step == sample // BATCH
    assert course.end_reason == "source alpha reached its 1 epochs"
    assert {epoch for name, _, epoch, *_ in drawn(course, 0, course.end_step * BATCH) if name == "alpha"} == {0}


def test_an_exhausted_source_leaves_the_others(folder: Path) -> None:
    free = run_of(folder)
    whole = plan_course(free, begun(free))
    sample = first_beyond(whole, "alpha", 1)
    run = run_of(folder, "data.on_exhausted=reweight", "data.sources.alpha.max_epochs=1")
    course = plan_course(run, begun(run))
    assert (course.end_step, course.end_reason) == (40, "train_tokens 25600 reached")
    assert [s.from_sample for s in course.order.segments] == [0, sample]
    assert drawn(course, 0, sample) == drawn(whole, 0, sample)
    assert {name for name, *_ in drawn(course, sample, 400)} == {"beta"}
    assert len(set(drawn(course, 0, 400))) == 400


def test_two_exhausted_sources_leave_the_third(folder: Path) -> None:
    sources: dict[str, dict[str, Any]] = {"alpha": {"max_epochs": 1}, "beta": {"max_epochs": 0.5}, "gamma": {}}
    run = run_of(folder, "data.on_exhausted=reweight", "train_tokens=60000", **sources)
    course = plan_course(run, begun(run))
    cuts = [(s.from_sample, set(s.weights)) for s in course.order.segments]
    assert [left for _, left in cuts] == [{"alpha", "beta", "gamma"}, {"alpha", "gamma"}, {"gamma"}]
    assert {name for name, *_ in drawn(course, cuts[1][0], cuts[2][0])} == {"alpha", "gamma"}
    assert {name for name, *_ in drawn(course, cuts[2][0], 940)} == {"gamma"}
    assert course.order.exhausted({"alpha": 1, "beta": 0.5}) is None


def test_when_no_source_is_left_the_run_is_refused(folder: Path) -> None:
    limited: dict[str, dict[str, Any]] = {"alpha": {"max_epochs": 1}, "beta": {"max_epochs": 1}}
    for sources in (limited, {**limited, "gamma": {"weight": 0}}):
        run = run_of(folder, "data.on_exhausted=reweight", "train_tokens=1e6", **sources)
        message = refused(lambda run=run: plan_course(run, begun(run)))  # type: ignore[misc]
        assert message.startswith(("data.sources.alpha.max_epochs: 1 epochs", "data.sources.beta.max_epochs: 1 epochs"))
        assert message.endswith(
            " of 1,000,320; and no other source is left; raise it, lower train_tokens, or set data.on_exhausted to stop"
        )


def test_later_limits_do_not_touch_the_past(folder: Path) -> None:
    """A source that was left out comes back when its limit is raised, and what was fed meanwhile stays."""
    run = run_of(folder, "data.on_exhausted=reweight", "data.sources.alpha.max_epochs=1")
    records = begun(run)
    before = plan_course(run, records)
    (_, out) = (s.from_sample for s in before.order.segments)
    begin = (out // BATCH + 3) * BATCH
    for change in ("data.sources.alpha.max_epochs=3", "data.sources.alpha.max_epochs=null"):
        after = plan_course(run, amended(run, records, begin, change))
        assert drawn(after, 0, begin) == drawn(before, 0, begin)
        assert {name for name, *_ in drawn(after, begin, begin + 50)} == {"alpha", "beta"}
    also = plan_course(run, amended(run, records, begin, "data.on_exhausted=refuse", "data.sources.alpha.weight=0"))
    assert drawn(also, 0, begin) == drawn(before, 0, begin)
    assert before.order.identity == plan_course(run, amended(run, records, begin, "optim.lr_peak=1")).order.identity
    # drawn from anew under the old limit, it is out again before a lane draws too much of it
    again = plan_course(run, amended(run, records, begin, "data.sources.beta.weight=0.4"))
    assert drawn(again, 0, begin) == drawn(before, 0, begin)
    assert again.order.exhausted({"alpha": 1}) is None


def test_a_limit_lowered_below_what_was_drawn(folder: Path) -> None:
    run = run_of(folder, "train_tokens=60000")
    records, begin = begun(run), 500
    whole = plan_course(run, records)
    assert first_beyond(whole, "alpha", 1) < begin
    stop = plan_course(run, amended(run, records, begin, "data.sources.alpha.max_epochs=1", "data.on_exhausted=stop"))
    assert (stop.end_step, stop.end_reason) == (50, "source alpha reached its 1 epochs")
    out = plan_course(
        run, amended(run, records, begin, "data.sources.alpha.max_epochs=1", "data.on_exhausted=reweight")
    )
    assert drawn(out, 0, begin) == drawn(whole, 0, begin)
    assert {name for name, *_ in drawn(out, begin, 930)} == {"beta"}


# --- amendments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed=2", "seed: 1 -> 2: cannot be amended: it is part of what this run is"),
        ("model.layers=3", "model.layers: 2 -> 3: cannot be amended: it is part of what this run is"),
        ("data.seq_tokens=32", "data.seq_tokens: 64 -> 32: cannot be amended: it is part of what this run is"),
        ("data.lanes=4", "data.lanes: None -> 4: cannot be amended: it is part of what this run is"),
        (
            "data.document_mask=true",
            "data.document_mask: False -> True: cannot be amended: it is part of what this run is",
        ),
        ("engine.precision=bf16", "engine.precision: fp32 -> bf16: cannot be amended: it is part of what this run is"),
        ("micro_batch_seqs=5", "micro_batch_seqs: 3 -> 5: cannot be amended: it may be given at any start instead"),
        (
            "engine={kind: deepspeed, precision: fp32}",
            "engine.kind: torch -> deepspeed: cannot be amended: it may be given at any start instead",
        ),
        (
            "data.sources.alpha.shards=/elsewhere",
            "data.sources.alpha.shards: {folder}/alpha -> /elsewhere: cannot be amended: "
            "it may be given at any start instead",
        ),
        ("seed", "seed: expected section.key=value"),
        ("optm.lr_peak=1", "command line (optm.lr_peak=1): optm: unknown key; did you mean optim?"),
        ("optim.lr_peek=1", "command line (optim.lr_peek=1): optim.lr_peek: unknown key; did you mean optim.lr_peak?"),
        (
            "optim.lr_peak=fast",
            "command line (optim.lr_peak=fast): optim.lr_peak: expected a finite number (such as 0.1 or 6e-4), "
            "got 'fast'",
        ),
        (
            "batch_tokens=10",
            "amended run: batch_tokens: 10 is less than one sequence of data.seq_tokens 64",
        ),
        (
            "data.sources={alpha: {shards: {folder}/alpha}}",
            "data.sources.beta: is part of this run and cannot be taken out; set its weight to 0",
        ),
        (
            "data.sources.alpha.generations=2",
            "data.sources.alpha.generations: 2 asked for, {folder}/alpha has 1",
        ),
        (
            "data.sources.gamma.shards=/nowhere",
            "data.sources.gamma.shards: /nowhere: no MANIFEST.json: not a corpus, or not finished; run data-prep run",
        ),
    ],
)
def test_what_cannot_be_amended(change: str, message: str, folder: Path) -> None:
    run = run_of(folder)
    change, message = (text.replace("{folder}", str(folder)) for text in (change, message))
    assert refused(lambda: amended(run, begun(run), 100, change)) == message


def test_whole_sections_may_be_given_where_their_identity_stays(folder: Path) -> None:
    run = run_of(folder)
    records = amended(
        run, begun(run), 100, "optim={kind: adamw, lr_peak: 1e-3, weight_decay: 0}", "schedule={kind: linear}"
    )
    course = plan_course(run, records)
    assert (course.at(9).optim.lr_peak, course.at(9).schedule.kind) == (3e-3, "cosine")
    assert (course.at(10).optim.lr_peak, course.at(10).schedule.kind) == (1e-3, "linear")
    assert course.at(10).optim.weight_decay == 0


def test_a_record_holds_what_a_change_meant_then(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read again at every start, wherever that is and whatever has become of the files."""
    run = run_of(folder)
    shutil.copytree(folder / "gamma", tmp_path / "gamma")
    (tmp_path / "other.yaml").write_text("kind: linear\nwarmup_tokens: 1Ki\n")
    monkeypatch.chdir(tmp_path)
    records = amended(run, begun(run), 100, "data.sources.gamma={shards: gamma, weight: 0.5}", "schedule=other.yaml")
    source = f'{{"generations":null,"max_epochs":null,"shards":"{tmp_path}/gamma","shared_mount":false,"weight":0.5}}'
    schedule = '{"decay_tokens":null,"final_fraction":0.0,"kind":"linear","warmup_tokens":1024}'
    assert records[1].changes == [f"data.sources.gamma={source}", f"schedule={schedule}"]
    monkeypatch.chdir("/")
    (tmp_path / "other.yaml").write_text("kind: constant\n")
    course = plan_course(run, records)
    assert course.at(10).schedule.kind == "linear"
    assert course.at(10).data.sources["gamma"].shards == tmp_path / "gamma"


def test_an_added_source_is_drawn_from_there_on(folder: Path, tmp_path: Path) -> None:
    run = run_of(folder)
    before = plan_course(run, begun(run))
    records = amended(run, begun(run), 100, f"data.sources.gamma={{shards: {folder / 'gamma'}, weight: 1}}")
    assert records[1].generations == {"alpha": 1, "beta": 1, "gamma": 1}
    course = plan_course(run, records)
    assert drawn(course, 0, 100) == drawn(before, 0, 100)
    names = Counter(name for name, *_ in drawn(course, 100, 400))
    assert names["gamma"] == pytest.approx(150, abs=16)  # less than two for each of 8 lanes
    assert refused(lambda: plan_course(run, [replace(records[1], segment=0, from_sample=0, changes=[])])) == (
        "data.sources.gamma: is part of this run and cannot be taken out; set its weight to 0"
    )
    # its shards may move, by amending again: the run's own config does not know it
    shutil.copytree(folder / "gamma", tmp_path / "moved")
    moved = amended(run, records, 200, f"data.sources.gamma.shards={tmp_path / 'moved'}")
    assert drawn(plan_course(run, moved), 0, 400) != []
    assert drawn(plan_course(run, moved), 0, 200) == drawn(course, 0, 200)


def test_an_added_generation_is_drawn_when_asked_for(tmp_path: Path) -> None:
    head = {"tokenizer_sha256": "0" * 64}
    parts = [replace(make_slice(tmp_path / "alpha", f"s{g}", g, 60), generation=g) for g in range(2)]
    seal(tmp_path / "alpha", FORMAT, head, parts[:1])
    run = run_of(tmp_path, alpha={})
    records = begun(run)
    before = plan_course(run, records)
    seal(tmp_path / "alpha", FORMAT, head, parts)
    # those sealed when the run began, until it is amended
    assert drawn(plan_course(run, records), 0, 400) == drawn(before, 0, 400)
    assert amended(run, records, 100, "optim.lr_peak=1e-3")[1].generations == {"alpha": 1}
    records = amended(run, records, 100, "data.sources.alpha.generations=2")
    course = plan_course(run, records)
    assert records[1].generations == {"alpha": 2}
    assert len(records[1].identities["alpha"]) == 2
    assert drawn(course, 0, 100) == drawn(before, 0, 100)
    assert {generation for _, generation, *_ in drawn(course, 100, 200)} == {0, 1}
    assert refused(lambda: amended(run, records, 200, "data.sources.alpha.generations=1")) == (
        "data.sources.alpha.generations: 1, but 2 are in use; set its weight"
    )
    limited = "data.sources.alpha.max_epochs=0.1"  # of each generation: the first one has been drawn from for longer
    line = refused(lambda: plan_course(run, [*records, amended(run, records, 100, limited)[-1]]))
    assert line.startswith("data.sources.alpha.max_epochs: 0.1 epochs of generation 0 are used up at token ")


def test_a_batch_size_amended_in_mid_run(folder: Path) -> None:
    run = run_of(folder)
    records = amended(run, begun(run), 200, f"batch_tokens={20 * T}")
    records = amended(run, records, 260, f"batch_tokens={5 * T}", f"train_tokens={300 * T}")
    course = plan_course(run, records)
    assert [course.steps.batch(step) for step in (0, 19, 20, 22, 23, 30)] == [10, 10, 20, 20, 5, 5]
    assert [course.steps.start(step) for step in (20, 23)] == [200, 260]
    assert [course.at(step).batch_seqs for step in (19, 20, 22, 23)] == [10, 20, 20, 5]
    assert course.end_step == 20 + 3 + 8
    assert course.tokens(course.end_step) == 300 * T
    # what is no matter of the data leaves them as they were, before and after
    assert drawn(course, 0, 300) == drawn(plan_course(run, begun(run)), 0, 300)


def test_a_batch_that_grows(folder: Path) -> None:
    run = run_of(folder, f"batch_ramp.start_tokens={2 * T}", f"batch_ramp.over_tokens={80 * T}")
    course = plan_course(run, begun(run))
    assert course.steps.pieces == [(0, 2), (20, 4), (40, 6), (64, 8), (80, 10)]
    assert course.end_step == 10 + 5 + 4 + 2 + 32
    assert course.tokens(course.end_step) == 400 * T
    assert course.order.lanes == 8  # of the batch that most steps have
    plain = run_of(folder)
    assert drawn(course, 0, 300) == drawn(plan_course(plain, begun(plain)), 0, 300)


def test_a_ramp_goes_on_across_amendments(folder: Path) -> None:
    run = run_of(folder, f"batch_ramp.start_tokens={2 * T}", f"batch_ramp.over_tokens={80 * T}")
    records = amended(run, begun(run), 32, "optim.lr_peak=1e-4")  # in the second stage
    pieces = [(0, 2), (20, 4), (32, 4), (40, 6), (64, 8), (80, 10)]
    assert plan_course(run, records).steps.pieces == pieces
    records = amended(run, records, 64, f"batch_ramp.over_tokens={160 * T}")
    assert plan_course(run, records).steps.pieces == [*pieces[:4], (64, 4), (80, 6), (122, 8), (162, 10)]
    records = amended(run, records, 80, "batch_ramp=null")
    assert plan_course(run, records).steps.pieces == [*pieces[:4], (64, 4), (80, 10)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["start_tokens=63"], "batch_ramp.start_tokens: expected from data.seq_tokens 64 to batch_tokens 645, got 63"),
        (
            ["start_tokens=646"],
            "batch_ramp.start_tokens: expected from data.seq_tokens 64 to batch_tokens 645, got 646",
        ),
        (
            ["start_tokens=128", "increment_tokens=10"],
            "batch_ramp.increment_tokens: 10 is less than one sequence of data.seq_tokens 64",
        ),
    ],
)
def test_what_is_wrong_with_a_ramp_is_said(overrides: list[str], message: str, folder: Path) -> None:
    given = ["batch_ramp.over_tokens=1e4", *(f"batch_ramp.{override}" for override in overrides)]
    assert refused(lambda: run_of(folder, *given)).endswith(message)


def test_a_cooldown_that_overlaps_the_warm_up_is_refused(folder: Path) -> None:
    schedule = "schedule={kind: warmup_stable_decay, warmup_tokens: 4e4, cooldown_tokens: 3e4}"
    assert refused(lambda: begun(run_of(folder, schedule))).endswith(
        "warmup_tokens 40000 and cooldown_tokens 30000 overlap: together they are more than train_tokens 25600"
    )


def test_two_amendments_of_one_sample_are_one(folder: Path) -> None:
    run = run_of(folder)
    records = amended(run, begun(run), 100, "data.sources.alpha.weight=0", f"batch_tokens={20 * T}")
    records = amended(run, records, 100, "data.sources.alpha.weight=0.7", f"batch_tokens={10 * T}", "optim.lr_peak=1")
    course = plan_course(run, records)
    assert drawn(course, 0, 100) == drawn(plan_course(run, begun(run)), 0, 100)
    assert (course.at(10).optim.lr_peak, course.steps.start(11), course.end_step) == (1.0, 110, 40)


def test_an_amendment_before_the_last_one_is_refused(folder: Path) -> None:
    """After the newest checkpoint was lost."""
    run = run_of(folder)
    records = amended(run, begun(run), 200, "optim.lr_peak=1e-3")
    assert refused(lambda: amended(run, records, 100, "optim.lr_peak=2e-3")) == (
        "the run was amended from sample 200 on, and its newest checkpoint is at sample 100; train beyond that first"
    )


@pytest.mark.parametrize("skips", [[(0, 10)], [(5, 25), (390, 402)], [(395, 400), (403, 404), (400, 403)], [(0, 1000)]])
def test_skipped_samples_are_made_up_for(skips: list[tuple[int, int]], folder: Path) -> None:
    run = run_of(folder)
    course = plan_course(run, [replace(begun(run)[0], skips=skips)])
    skipped = {n for begin, end in skips for n in range(begin, end)}
    fed = [n for n in range(2000) if n not in skipped]
    assert course.end_step == fed[399] // BATCH + 1
    for step in (0, 1, 39, 40, course.end_step):
        assert course.tokens(step) == T * sum(n < step * BATCH for n in fed)


# --- the records on disk ----------------------------------------------------------------------------------------------


def test_records_are_kept_in_order(folder: Path, tmp_path: Path) -> None:
    segments, (first,) = Segments(tmp_path), begun(run_of(folder))
    records = [replace(first, segment=n, from_sample=10 * n, skips=[]) for n in range(12)]
    for record in records:
        segments.write(record)
    assert Segments(tmp_path).read() == records
    assert refused(lambda: segments.write(records[3])) == (
        f"{tmp_path / 'segments' / '3.json'}: has just been written by another command; try again"
    )
    segments.clear()
    assert segments.read() == []


def test_a_newer_record_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "segments" / "0.json"
    Segments(tmp_path).write(begun(run_of(folder))[0])
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 3, "more": 1}))
    assert refused(Segments(tmp_path).read) == f"{path}: format 3 is newer than this code's 2; update longhaul"


def test_a_run_in_another_order_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "segments" / "0.json"
    Segments(tmp_path).write(begun(run_of(folder))[0])
    path.write_text(json.dumps({**json.loads(path.read_text()), "order_version": 0}))
    assert refused(Segments(tmp_path).read) == (
        f"{path}: this run has samples in order 0, this code deals them in order 1; go on with the code that began it"
    )


def test_a_record_survives_its_file(folder: Path, tmp_path: Path) -> None:
    run = run_of(folder)
    record = replace(begun(run)[0], skips=[(5, 25)])
    Segments(tmp_path).write(record)
    (found,) = Segments(tmp_path).read()
    assert json.dumps(asdict(found)) == json.dumps(asdict(record))
    assert plan_course(run, [found]).end_step == plan_course(run, [record]).end_step == 42
