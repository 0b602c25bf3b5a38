"""How an attempt begins: fresh, or from the newest checkpoint of the live lineage that verifies on every rank."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import platform
import socket
import time
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch

import configs
from configs import ConfigError
from data_pipeline.failpoints import fail_at
from data_pipeline.progress import Count
from data_pipeline.shards import write_durably
from data_pipeline.stream import Stream, Validation
from pretrain import checkpoint, fit
from pretrain.archive import bring_home
from pretrain.attempt import Attempt
from pretrain.checkpoint import Committed, Damaged, Position, SaveError, Saver
from pretrain.engine import Engine
from pretrain.evaluate import check_tasks
from pretrain.fields import check_same_run
from pretrain.guard import StopSignals
from pretrain.lineage import AMEND, Lineage, TakenOver
from pretrain.meter import Meter, Startup, peak_flops
from pretrain.parent import (
    ORIGIN,
    Parent,
    carry_takedowns,
    check_same_parent,
    find_parent,
    first_records,
    give_first_values,
)  # fmt: skip
from pretrain.ranks import Ranks
from pretrain.restore import run_tokenizer, same_tokenizer
from pretrain.run import TrainRun, found_at, load_run
from pretrain.segments import Course, SegmentRecord, Segments, advice, plan_course
from pretrain.suspects import ATTEMPT
from pretrain.track import Journal, measure_system, start_trackers
from pretrain.track.journal import lineage, live_records, read_journal
from pretrain.track.source import FOLDER as CODE
from pretrain.track.source import read_source
from pretrain.watchdog import Watchdog

log = logging.getLogger("pretrain")


@dataclass(frozen=True)
class Start:
    """What was found in the run folder: the segment records, and the checkpoints to try, newest first."""

    records: list[SegmentRecord]
    candidates: list[tuple[Path, str]]  # folder, manifest hash
    damaged: list[str]
    fresh: bool  # no attempt has ever taken a branch
    why: str = "start"
    newest_step: int = 0  # of the checkpoints to try, damaged ones too
    parent: Parent | None = None  # what a new run begins from, until it has a checkpoint of its own
    highest: int = 0  # branch before the records were read

    @property
    def origin(self) -> Position:
        """Where the run begins."""
        return self.parent.position if self.parent else ORIGIN


def examine(run: TrainRun) -> Start:
    """Is there a run, is it this one, and from where may it go on? Writes nothing. Raises ConfigError, Unreachable."""
    check_tasks(run.evaluation)
    if run.evaluation.needs_tokenizer:
        run_tokenizer(run)  # where there is none, it is said before anything begins
    folder = run.run_folder
    highest = Lineage(folder).highest()
    begun = highest > 0
    if run.resume == "never" and begun:
        raise ConfigError(f"resume: never, but {folder} holds a run; give another run_folder, or set resume=auto")
    if run.resume not in ("auto", "never") and not begun:
        raise ConfigError(f"resume: {run.resume}, but {folder} holds no run")
    if not begun:
        parent = find_parent(run)
        records = first_records(run, parent)
        plan_course(run, records)
        return Start(records, [], [], fresh=True, why=parent.why if parent else "start", parent=parent)
    recorded = load_run(folder)
    check_same_run(recorded.model_dump(mode="json"), run.model_dump(mode="json"), str(folder))
    check_same_parent(recorded, run)
    records = Segments(folder).read()
    plan_course(run, records)
    folders = _to_try(run)
    candidates, damaged = _candidates(run, folders)
    if not candidates and (damaged or checkpoint.all_checkpoints(folder) or _has_steps(folder)):
        more = f"; {damaged[0]}" if damaged else ""
        raise ConfigError(f"{folder}: no checkpoint of the live lineage verifies, and steps were trained{more}")
    if candidates:
        newest = checkpoint.NAME.fullmatch(folders[0].name)
        assert newest is not None
        return Start(records, candidates, damaged, fresh=False, why=_why(run), newest_step=int(newest[1]),
                     highest=highest)  # fmt: skip
    parent = find_parent(recorded)
    why = parent.why if parent else "start"
    return Start(records, [], [], fresh=False, why=why, parent=parent, highest=highest)


def begin(
    run: TrainRun,
    ranks: Ranks,
    stop: StopSignals,
    watchdog: Watchdog,
    startup: Startup,
    before: Attempt | None = None,
) -> Attempt:
    """Begin an attempt: its course, engine, checkpoint, branch. `before`: the one that a rollback has just ended."""
    watchdog.beat("start", 0)
    examined = run if before is None else run.model_copy(update={"resume": "must"})
    start: Start = ranks.first(lambda: _open_run(examined))
    course = ranks.each(lambda: plan_course(run, start.records))  # which reads manifests, each rank its own
    tokenizer = None if before is None else before.tokenizer
    if before is None:
        if run.evaluation.needs_tokenizer:  # now: storage that is away later would be missed by one rank alone
            tokenizer = same_tokenizer(course.corpora, ranks)
        run.preflight.check(ranks, run.run_folder)
        startup.mark("preflight")
        run, engine = _build(run, ranks)
    else:
        startup.restart()
        run, engine = run.model_copy(update={"micro_batch_seqs": before.run.micro_batch_seqs}), before.engine
    startup.mark("build")
    chosen = _load_newest(start, engine, ranks)
    if chosen is None:
        give_first_values(engine, run, start.parent, ranks)
    position = chosen.position if chosen else start.origin
    if ranks.first(lambda: position.samples != course.steps.start(position.step)):
        raise ConfigError(f"{run.run_folder}: step {position.step} is at sample {position.samples} in its checkpoint")
    branch = ranks.first(lambda: _take_branch(run, chosen, start))
    startup.mark("load")
    facts = {
        "identity": run.identity(),
        "order": course.order.identity,
        "segments": len(start.records),
        "tokenizer": course.corpora.tokenizer_sha256,
    }
    stream = Stream(
        course.order, course.steps, course.skips, course.corpora.shards(course.order.pools), run.data,
        run.micro_batch_rows, ranks.rank, ranks.size,
    )  # fmt: skip
    validation = {
        name: Validation(
            course.corpora.manifests[name],
            count,
            run.data.seq_tokens,
            run.evaluation.tokens,
            run.data.document_mask,
            run.data.fetch_threads,
        )
        for name, count in course.record.generations.items()
    }
    past = ranks.first(lambda: _past(run, position.step))
    journal = _journal(run, ranks, course, chosen, branch, start, startup) if ranks.rank == 0 else None
    trackers = before.trackers if before is not None else None
    if before is not None:
        before.saver.close(0.0)
        before.close_system()
        if before.journal is not None:
            before.journal.close()
    if trackers is None and journal is not None:
        trackers = start_trackers(run.track, run.run_folder)
    system = measure_system(run.track, run.run_folder, branch, position.step) if ranks.local_rank == 0 else None
    peak = peak_flops(torch.cuda.get_device_name()) if ranks.device.type == "cuda" else None
    attempt = Attempt(
        run, ranks, stop, watchdog, course, engine, stream, validation,
        Saver(run.run_folder, run.checkpoint, branch, ranks.rank, ranks.size, facts), journal, trackers, position,
        Meter(run.model.flops_per_token(run.data.seq_tokens), None if peak is None else peak * ranks.size),
        past.evaluated, chosen.manifest.get("state", {}).get("guard", {}) if chosen else {}, past.save_s,
        tokenizer,
    )  # fmt: skip
    for line in advice(course) if start.fresh else ():
        attempt.note("order", line)
    for line in course.warnings(position.step, first=True):
        attempt.note("epochs", line)
    if system is not None:
        attempt.system = system
        system.step = lambda: attempt.position.step
    attempt.saver.on_commit = attempt.committed
    attempt.saver.on_removed = lambda folder: _on_removed(journal, folder)
    if journal is not None:
        watchdog.on_hang = attempt.hung
    if attempt.saver.archiver is not None:
        attempt.saver.archiver.refresh()
    if chosen is None:
        if (ending := attempt.save()) is not None:
            raise SaveError(f"{run.run_folder}: {ending.why}")
        attempt.saver.wait()
    else:
        attempt.saver.last_step = position.step
        attempt.saver.archive()
    ranks.barrier()
    if before is not None:
        fail_at("rollback.begun")
    return attempt


def _build(run: TrainRun, ranks: Ranks) -> tuple[TrainRun, Engine]:
    """The engine, its values still to be loaded; and the run, with a number for `micro_batch_seqs`."""

    def build() -> Engine:
        with torch.device("meta"):
            model = run.model.build()
        engine: Engine = run.engine.build(model, run.optim, ranks)
        gc.collect()  # DeepSpeed leaves the weights that it was given in cycles: as much again as those that compute
        return engine

    if run.micro_batch_seqs != "fit":
        return run, build()
    most = fit.estimate(run, ranks)
    engine = build()
    rows = most
    if ranks.device.type == "cuda":
        rows, engine = fit.tried(run, ranks, engine, build, most)
    if ranks.rank == 0:
        log.info("micro_batch_seqs: %d fit (%d by arithmetic)", rows, most)
    return run.model_copy(update={"micro_batch_seqs": rows}), engine


@dataclass(frozen=True)
class Past:
    """What older attempts left in the journal that matters to a new one."""

    evaluated: bool  # this step has been
    save_s: float | None  # what the last save took


def _past(run: TrainRun, step: int) -> Past:
    evaluated, save_s = False, None
    for record in live_records(read_journal(run.run_folder), lineage(run.run_folder)):
        if record.type == "evaluation" and record.step == step:
            evaluated = True
        elif record.type == "checkpoint" and record.fields.get("seconds"):
            save_s = float(record.fields["seconds"])
    return Past(evaluated, save_s)


def _open_run(run: TrainRun) -> Start:
    """Rank 0: examine the run folder, and write down what the run is where it is new."""
    for tracker in run.track:
        tracker.check()
    _bring_home(run)
    start = examine(run)
    if start.fresh:
        run.run_folder.mkdir(parents=True, exist_ok=True)
        Segments(run.run_folder).clear()
        write_durably(run.run_folder / "run.yaml", configs.dump(run).encode())
        if start.parent is not None:
            start = replace(start, records=carry_takedowns(run, start.parent, start.records))
        for record in start.records:
            Segments(run.run_folder).write(record)
        return start
    recorded = load_run(run.run_folder)
    if (now := found_at(recorded, run)) != recorded:  # shards that were moved: for those who ask RUN alone
        write_durably(run.run_folder / "run.yaml", configs.dump(now).encode())
    return start


def _to_try(run: TrainRun) -> list[Path]:
    """The live checkpoints, newest first, or the one that `resume` names."""
    named = None if run.resume in ("auto", "must", "never") else _named(run)
    return checkpoint.live_checkpoints(run.run_folder) if named is None else [named]


def _candidates(run: TrainRun, folders: list[Path]) -> tuple[list[tuple[Path, str]], list[str]]:
    """Those of the checkpoints whose manifests are whole; and a line for each that is not."""
    whole, damaged = [], []
    for folder in folders:
        try:
            committed = checkpoint.open_checkpoint(folder)
        except Damaged as error:
            damaged.append(str(error))
            continue
        _check_identity(committed, run)
        whole.append((folder, committed.manifest_hash))
    return whole, damaged


def _named(run: TrainRun) -> Path | None:
    """The checkpoint that `resume` names; None where the live lineage has gone on from it already.

    A job that is started again with the same configuration must not go back to it again.
    """
    folder, home = Path(run.resume).absolute(), run.run_folder.absolute() / "checkpoints"
    if folder.parent != home and _lies_in_archive(run) and (home / folder.name).is_dir():
        folder = home / folder.name  # brought home from an archive
    if folder.parent != home:
        raise ConfigError(f"resume: {run.resume}: not a checkpoint of this run; they lie in {home}")
    if _gone_on(run):
        return None
    if not folder.is_dir():
        raise ConfigError(f"resume: {run.resume}: no such checkpoint")
    return folder


def _gone_on(run: TrainRun) -> bool:
    """Whether the live lineage has gone on from what `resume` names already."""
    lineage = Lineage(run.run_folder)
    branches = lineage.branches()
    return any(branches[number].why == _why(run) for number, _ in lineage.live())


def _lies_in_archive(run: TrainRun) -> bool:
    """Whether `resume` names something that is there; of an address that is no path, the copying finds out."""
    return "://" in run.resume or (Path(run.resume) / "MANIFEST.json").is_file()


def _bring_home(run: TrainRun) -> None:
    """Where `resume` names a checkpoint in an archive: copy it into the run, unless it lies there whole."""
    name = Path(run.resume).name
    home = run.run_folder / "checkpoints"
    match = checkpoint.NAME.fullmatch(name)
    if match is None or Path(run.resume).absolute().parent == home.absolute() or _gone_on(run):
        return
    if not _lies_in_archive(run):
        return
    if int(match[2]) not in Lineage(run.run_folder).branches():
        raise ConfigError(f"resume: {run.resume}: {run.run_folder} has no branch {match[2]}; use fork_from")
    if (home / name).is_dir() and not checkpoint.verify(home / name):
        return
    if (home / name).is_dir():
        checkpoint.remove(home / name)
    log.info("bringing %s home", run.resume)
    bring_home(run.resume, home / name)


def _why(run: TrainRun) -> str:
    """What the record of a branch says that goes on from a checkpoint."""
    return "resume" if run.resume in ("auto", "must", "never") else f"resume from {Path(run.resume).name}"


def _check_identity(committed: Committed, run: TrainRun) -> None:
    lines = configs.differences(committed.manifest["identity"], run.identity())
    if lines:
        raise ConfigError(f"{committed.folder}: is of another run: {'; '.join(lines)}")


def _has_steps(run_folder: Path) -> bool:
    return any(record.type == "step" for record in read_journal(run_folder))


def _load_newest(start: Start, engine: Engine, ranks: Ranks) -> Committed | None:
    """Load the newest checkpoint that verifies on every rank; None where there is none to load."""
    for line in start.damaged:
        _warn(ranks, line)
    for folder, manifest_hash in start.candidates:
        committed, problem = None, None
        try:
            committed = _open_patiently(folder, manifest_hash)
            state = engine.state()
            with Count(ranks.rank == 0) as count:
                checkpoint.load(committed, state, count)
        except Damaged as error:
            problem = str(error)
        problems = [p for p in ranks.gather(problem) if p is not None]
        if not problems:
            assert committed is not None
            engine.loaded(state)  # may be collective: only where every rank has loaded
            steps = start.newest_step - committed.position.step
            lost = f" ({steps} steps lost)" if steps else ""
            _warn(ranks, f"going on from {committed.folder.name}{lost}", logging.INFO)
            return committed
        _warn(ranks, f"{problems[0]}; trying the checkpoint before it")
    if start.candidates:
        raise ConfigError(f"{start.candidates[0][0].parent}: no checkpoint verifies")
    return None


def _open_patiently(folder: Path, manifest_hash: str, patience_s: float = 30.0) -> Committed:
    """Open a checkpoint that rank 0 has seen; a shared file system may show it here a little later."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return checkpoint.open_checkpoint(folder, manifest_hash)
        except Damaged:
            if time.monotonic() > deadline or (folder / "MANIFEST.json").is_file():
                raise
            time.sleep(0.5)


def _take_branch(run: TrainRun, chosen: Committed | None, start: Start) -> int:
    """The branch of this attempt. Raises TakenOver where the run was amended after its records were read."""
    fail_at("start.branch")
    lineage = Lineage(run.run_folder)
    if chosen is None:
        origin = start.parent.record if start.parent else None
        branch = lineage.take(None, start.origin.step, None, start.why, origin).branch
    else:
        branch = lineage.take(chosen.branch, chosen.position.step, chosen.manifest_hash, start.why).branch
    between = [record for number, record in lineage.branches().items() if start.highest < number < branch]
    if any(record.why == AMEND for record in between) or len(Segments(run.run_folder).read()) > len(start.records):
        raise TakenOver(f"{run.run_folder} was amended while this attempt started; start it again")
    checkpoint.sweep(run.run_folder)
    return branch


def _journal(
    run: TrainRun,
    ranks: Ranks,
    course: Course,
    chosen: Committed | None,
    branch: int,
    start: Start,
    startup: Startup,
) -> Journal:
    journal = Journal(run.run_folder, branch)
    datasets = [
        {"name": name, "source": m.address, "digest": course.record.identities[name][-1],
         "tokens": sum(int(g["train"]["tokens"]) for g in m.generations[: course.record.generations[name]])}
        for name, m in course.corpora.manifests.items()
    ]  # fmt: skip
    code = read_source()
    if code is not None and code.diff:
        (run.run_folder / CODE).mkdir(exist_ok=True)
        write_durably(run.run_folder / CODE / f"{branch}.diff", code.diff.encode())
    journal.attempt(
        chosen.branch if chosen else None, chosen.position.step if chosen else start.origin.step, start.why,
        config=run.model_dump(mode="json"), datasets=datasets, host=socket.gethostname(), world_size=ranks.size,
        device=str(ranks.device), torch=torch.__version__, parameters=run.model.parameter_count(),
        tokenizer=course.corpora.tokenizer_sha256, **_environment(ranks),
        **({} if code is None else {"commit": code.commit, "modified": bool(code.diff)}),
        began=startup.began, attempt=int(os.environ[ATTEMPT]) if ATTEMPT in os.environ else None,
        seconds=dict(startup.seconds), end_step=course.end_step,
        **({"parent_checkpoint": str(start.parent.folder), "parent_hash": start.parent.hash} if start.parent else {}),
    )  # fmt: skip
    log.info(
        "%s: %s parameters, %d ranks on %s, steps %d to %d, open blocks up to %d MiB per rank",
        run.name, f"{run.model.parameter_count():,}", ranks.size, ranks.device.type,
        chosen.position.step if chosen else start.origin.step, course.end_step, run.data.open_blocks_mib,
    )  # fmt: skip
    return journal


def _environment(ranks: Ranks) -> dict[str, str]:
    """What this attempt runs on, as the report and the trackers show it."""
    names = ("longhaul", "deepspeed", "numpy", "tokenizers", "mlflow")
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if ranks.device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return found | {"hosts": ", ".join(dict.fromkeys(ranks.hosts))}


def _on_removed(journal: Journal | None, folder: Path) -> None:
    match = checkpoint.NAME.fullmatch(folder.name)
    if journal is not None and match is not None:
        journal.checkpoint(int(match[1]), "removed", str(folder), None)


def _warn(ranks: Ranks, line: str, level: int = logging.WARNING) -> None:
    if ranks.rank == 0:
        log.log(level, "%s", line)
