"""Preparation: raw corpora to token shards.

    out/tokenizer.json               trained once, or a copy of the given one
    out/tokenizer.made.json          how it was made
    out/classifier.npy               of quality, where one is asked for; classifier.made.json: how it was made
    out/<corpus>/plan.json           the inputs, cut into slices        (plan)
    out/<corpus>/slices/<slice>/     one folder per slice, whole or absent   (work)
    out/<corpus>/MANIFEST.json       what a reader trusts, written last  (seal)

Each step recognizes what is done and does the rest, so the same command again is always safe; a folder that was made
with another configuration is refused, with the difference.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs import ConfigError
from data_pipeline import card as data_card
from data_pipeline import duplicates
from data_pipeline.failures import failures
from data_pipeline.jobs import BEFORE_SLICES, make_jobs, planned_jobs, seal_corpus, sealed_manifest
from data_pipeline.lease import Lease
from data_pipeline.preparation import Preparation
from data_pipeline.progress import Display, Elapsed
from data_pipeline.publish import is_published, publish_rest
from data_pipeline.shards import Manifest
from data_pipeline.slices import Job, Work, sweep_leftovers
from data_pipeline.stages import remove_texts, works
from data_pipeline.summary import Summary, folder_tokenizer, folders, summarized
from data_pipeline.work import Done, Task, Unfinished, WorkError, work

log = logging.getLogger("data-prep")


def run(preparation: Preparation) -> list[Summary]:
    """Do what is missing of a preparation, and say what became of each corpus. Raises WorkError, ConfigError."""
    jobs = make_jobs(preparation)
    for stage, tasks in _stages(preparation, jobs).items():
        done = Done()
        _work_on(preparation, jobs, stage, range(tasks), done)
        done.check()
    return [summarized(Manifest.open(job.folder)) for job in jobs]


@dataclass(frozen=True)
class Stage:
    """A step of a preparation. Its tasks, numbered from 0, may run at once, anywhere, when the stage before is done."""

    name: str
    tasks: int
    missing: tuple[int, ...]  # tasks that are not done


def stages(preparation: Preparation) -> list[Stage]:
    """The stages in their order, the last one being the seal. Makes the tokenizer and the plan where they are missing.

    The number of tasks depends on the plan alone, so that all stages can be queued at once.
    """
    jobs = make_jobs(preparation)
    return [
        Stage(name, tasks, tuple(_missing(preparation, jobs, name)))
        for name, tasks in _stages(preparation, jobs).items()
    ]


def run_stage(preparation: Preparation, name: str, first: int, last: int) -> None:
    """Do what is missing of a stage's tasks `first` to `last`: a part of an array of jobs. Raises as `run`."""
    jobs = make_jobs(preparation)
    count = _count(preparation, jobs, name)
    if not 0 <= first <= last < count:
        raise ConfigError(f"--tasks {first}-{last}: the stage {name} has the tasks 0-{count - 1}")
    done = Done()
    _work_on(preparation, jobs, name, range(first, last + 1), done)
    done.check()


def run_share(preparation: Preparation, name: str, share: int, of: int, done: Done) -> None:
    """Do one of `of` nearly equal shares of a stage, as it is planned, then help with the others'. Raises as `run`.

    What others are at or have failed at is left alone, so that the tasks of an array need not wait for each other.
    """
    jobs = planned_jobs(preparation)
    count = _count(preparation, jobs, name)
    first, last = count * share // of, count * (share + 1) // of
    others = [*range(first)[::-1], *range(last, count)[::-1]]  # from their ends, which their own tasks come to last
    for numbers in (range(first, last), others):
        _work_on(preparation, jobs, name, numbers, done, wait_for_others=False)
    done.check()


def _count(preparation: Preparation, jobs: Sequence[Job], stage: str) -> int:
    """How many tasks a stage has. Raises ConfigError where there is no such stage."""
    tasks = _stages(preparation, jobs)
    if stage not in tasks:
        raise ConfigError(f"--stage {stage}: expected {' or '.join(tasks)}")
    return tasks[stage]


def stage_widths(preparation: Preparation) -> dict[str, int | None]:
    """The stages of a configuration in their order, before anything is planned, with the number of their tasks where
    the plan does not decide it."""
    before = {"texts": None, "buckets": None, "clusters": 1} if preparation.dedup is not None else {}
    return {**before, "slices": None, "seal": 1}


def _works(preparation: Preparation, jobs: Sequence[Job], stage: str) -> Sequence[Work]:
    """What a stage has to make; its tasks are the slices of these, one after the other."""
    return jobs if preparation.dedup is None else works(jobs, preparation.out, preparation.dedup, stage)


def _stages(preparation: Preparation, jobs: Sequence[Job]) -> dict[str, int]:
    """How many tasks each stage has."""
    names = [*(BEFORE_SLICES if preparation.dedup is not None else ()), "slices"]
    return {name: sum(len(each.plan.slices) for each in _works(preparation, jobs, name)) for name in names} | {
        "seal": 1
    }


def _missing(preparation: Preparation, jobs: Sequence[Job], stage: str) -> Iterator[int]:
    if stage == "seal":
        yield from [0] * any(sealed_manifest(job.folder) is None or not is_published(job) for job in jobs)
        return
    made = (each.is_made(slice) for each in _works(preparation, jobs, stage) for slice in each.plan.slices)
    yield from (number for number, is_made in enumerate(made) if not is_made)


def _work_on(
    preparation: Preparation,
    jobs: Sequence[Job],
    stage: str,
    numbers: Iterable[int],
    done: Done,
    wait_for_others: bool = True,
) -> None:
    """Do what is missing of some tasks of a stage."""
    if stage == "seal":
        with Elapsed("seal: checking, counting, and the data card", at_once=True):
            _seal(preparation, [job for job in _works(preparation, jobs, "slices") if isinstance(job, Job)])
        return
    every = _works(preparation, jobs, stage)
    tasks = [Task(j, s) for j, each in enumerate(every) for s in range(len(each.plan.slices))]
    mine = [tasks[number] for number in numbers]
    with Display(stage) as display:
        work(every, _left(every, mine), preparation.workers, display, done, wait_for_others)


def _left(every: Sequence[Work], tasks: Sequence[Task]) -> list[Task]:
    """Those that are neither made nor failed, by one look at each folder: planning has removed what does not fit.

    A slice without its duplicates may have become another since, which only its record tells.
    """
    names = [{path.name for path in (each.folder / each.stage).iterdir()} for each in every]
    failed = [{failure.slice for failure in failures(each.folder)} for each in every]

    def is_left(task: Task) -> bool:
        each = every[task.job]
        slice = each.plan.slices[task.slice]
        by_record = not isinstance(each, Job) or each.from_texts
        is_made = each.is_made(slice) if by_record else slice.name in names[task.job]
        return not is_made and slice.name not in failed[task.job]

    return [task for task in tasks if is_left(task)]


def _present(job: Job) -> set[str]:
    """The names in the folder of its slices."""
    return {path.name for path in (job.folder / "slices").iterdir()}


def _check_made(jobs: Sequence[Job]) -> None:
    """Raises WorkError where slices have failed, after a line for each, and Unfinished where they are only missing."""
    failed = [failure for job in jobs for failure in failures(job.folder)]
    missing = sum(len({slice.name for slice in job.plan.slices} - _present(job)) for job in jobs)
    for failure in failed:
        log.error("%s (on %s%s)", failure.why, failure.host, f", log {failure.log}" if failure.log else "")
    if failed:
        raise WorkError(f"{len(failed)} slices failed; {missing} are missing, and the same command makes them")
    if missing:
        raise Unfinished(f"{missing} slices are missing; the same command makes them")


def _seal(preparation: Preparation, jobs: Sequence[Job]) -> None:
    _check_made(jobs)
    for stage in (*(BEFORE_SLICES if preparation.dedup is not None else ()), "slices"):
        for each in _works(preparation, jobs, stage):
            sweep_leftovers(each)
    for summary in [summarized(seal_corpus(job)) for job in jobs]:
        if preparation.validation.fraction > 0 and not summary.validation_tokens:
            log.warning(
                "%s: none of its %s documents fell to validation (fraction %s); raise the fraction to evaluate on it",
                *(summary.corpus, f"{summary.documents:,}", preparation.validation.fraction),
            )
    if preparation.dedup is not None and not preparation.dedup.keep_texts:
        for texts in works(jobs, preparation.out, preparation.dedup, "texts"):
            remove_texts(texts)
        duplicates.remove_what_is_done(preparation.out)
    write_card(preparation)
    if preparation.publish is not None:
        publish_rest(preparation.out, jobs)


def write_card(preparation: Preparation) -> Path:
    """Write the data card beside the finished corpora, and say where. Raises ShardError where one is not finished."""
    out = preparation.out
    notes = {corpus: source.model_dump(include={"about", "licence"}) for corpus, source in preparation.corpora.items()}
    return _write_card(
        out, preparation.name, [out / c for c in preparation.corpora], notes, preparation.card.compare_tokenizer
    )


def write_card_of(where: Path) -> Path:
    """The same for a folder of shards; what only its configuration knows is taken from the card that lies there."""
    old = data_card.read(where)
    return _write_card(where, old.get("name", where.resolve().name), folders(where), data_card.notes_of(old), None)


def _write_card(
    out: Path, name: str, corpora: Sequence[Path], notes: Mapping[str, data_card.Notes], compare: Path | None
) -> Path:
    manifests = [Manifest.open(folder) for folder in corpora]
    made = data_card.make(name, [(manifest, folder_tokenizer(manifest)) for manifest in manifests], notes, compare)
    with Lease.wait(out / ".tokenizer.lease", log.info):  # who holds it may remove half-written files there
        return data_card.write(out, made)
