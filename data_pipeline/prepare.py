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

import hashlib
import importlib.metadata
import json
import logging
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import xxhash
from pydantic import field_validator, model_validator

from configs import Bool, ConfigError, Int, Section, differences, load
from data_pipeline import card as data_card
from data_pipeline import duplicates, shards
from data_pipeline.classifier import Judge, QualityClassifier
from data_pipeline.clean import Clean
from data_pipeline.counts import Totals
from data_pipeline.decontaminate import Decontamination
from data_pipeline.dedup import Dedup
from data_pipeline.estimate import memory_bytes, tried
from data_pipeline.failures import failures, forget_failures
from data_pipeline.filters import Filters
from data_pipeline.language import file_sha256
from data_pipeline.lease import Lease, holder
from data_pipeline.plan import BYTES_PER_TOKEN, PLAN, Plan, Slice, chosen_block, compare, cut
from data_pipeline.progress import Display, Progress, size
from data_pipeline.publish import check_address, is_published, publish_rest
from data_pipeline.shards import RECORD, Format, Manifest, SealedSlice, ShardRecord, seal
from data_pipeline.slices import Job, Validation, Work, slice_record, sweep, sweep_leftovers
from data_pipeline.sources import Source
from data_pipeline.sources.inputs import Input, Part, Reading
from data_pipeline.sources.token_files import TokenFiles
from data_pipeline.stages import remove_texts, works
from data_pipeline.tokenizer import GivenTokenizer, Tokenizer, TokenizerChoice, TrainTokenizer, choose_encoder, train
from data_pipeline.work import Done, Task, Unfinished, WorkError, work

log = logging.getLogger("data-prep")

TOKENIZER = "tokenizer.json"
TOKENIZER_MADE = "tokenizer.made.json"
CLASSIFIER = "classifier.npy"
CLASSIFIER_MADE = "classifier.made.json"
TOKENIZER_READ = 8  # a sample is taken from at most this many times its size of text
NOT_IDENTITY = {"paths", "base", "on_damage", "about", "licence"}  # of a source: these change no byte


class Preparation(Section):
    """Which corpora become token shards, and how."""

    name: str
    out: Path
    tokenizer: TokenizerChoice
    corpora: dict[str, Source]
    clean: Clean = Clean()
    filters: Filters = Filters()
    dedup: Dedup | None = None
    classifier: QualityClassifier | None = None
    decontamination: Decontamination | None = None
    validation: Validation = Validation()
    slice_bytes: Int = 256 * 2**20  # of input; the unit of work and of restart
    shard_bytes: Int = 256 * 2**20
    block_tokens: Int | None = None  # a power of two; None: chosen at plan time so that tails stay under 1 %
    workers: Int = 1  # processes on this machine
    card: data_card.Card = data_card.Card()
    publish: str | None = None  # s3://bucket/prefix or a folder: finished slices go there as well, the manifests last
    keep_local: Bool = True  # false: the tars of slices that were sent are removed here

    @model_validator(mode="after")
    def _sent_before_removed(self) -> Self:
        if self.publish is not None:
            check_address(self.publish)
        elif not self.keep_local:
            raise ValueError("keep_local: expected true, since nothing is published (publish is not set)")
        return self

    @field_validator("corpora")
    @classmethod
    def _names(cls, corpora: dict[str, Source]) -> dict[str, Source]:
        if not corpora:
            raise ValueError("expected at least one corpus")
        for name in corpora:
            if not name.replace("-", "_").replace("_", "a").isalnum():
                raise ValueError(f"{name!r}: expected a name of letters, digits, - and _ (it becomes a folder)")
            if name == "submissions":
                raise ValueError(f"{name!r}: the folder of that name is for the jobs of launch prep")
        return corpora

    @model_validator(mode="after")
    def _tokens_have_their_tokenizer(self) -> Self:
        made = [name for name, source in self.corpora.items() if isinstance(source, TokenFiles)]
        if made and not isinstance(self.tokenizer, GivenTokenizer):
            raise ValueError(
                f"corpora.{made[0]} holds tokens already: expected tokenizer.kind file, with the path of the "
                f"tokenizer.json that made them, got {self.tokenizer.kind}"
            )
        return self

    @model_validator(mode="after")
    def _classifier_knows_its_corpora(self) -> Self:
        for name in self.classifier.corpora if self.classifier else ():
            if name not in self.corpora:
                raise ValueError(f"classifier.corpora: no corpus {name!r}; there are {', '.join(self.corpora)}")
        return self

    @field_validator("slice_bytes", "shard_bytes", "workers")
    @classmethod
    def _positive(cls, value: int) -> int:
        if value < 1:
            raise ValueError(f"expected at least 1, got {value}")
        return value

    def source(self, corpus: str) -> Source:
        """Raises ConfigError for a corpus that the configuration does not have."""
        if corpus not in self.corpora:
            raise ConfigError(f"no corpus {corpus!r}; the configuration has {', '.join(self.corpora)}")
        return self.corpora[corpus]

    def inputs(self, corpus: str) -> list[Input]:
        """The corpus' files as they are now. Raises ConfigError naming the corpus."""
        try:
            return self.source(corpus).inputs()
        except ConfigError as error:
            raise ConfigError(f"corpora.{corpus}.{error}") from None


# --- the tokenizer --------------------------------------------------------------------------------------------------


def make_tokenizer(preparation: Preparation) -> Tokenizer:
    """The folder's tokenizer: loaded when it is there, else trained or copied. Raises ConfigError on another's."""
    out = preparation.out
    out.mkdir(parents=True, exist_ok=True)
    with Lease.wait(out / ".tokenizer.lease", log.info):
        _remove_half_written(out)
        made = _read_json(out / TOKENIZER_MADE)
        wanted = _tokenizer_identity(preparation.tokenizer)
        if made is None:
            made = _make_tokenizer(preparation, wanted)
            shards.write_durably(out / TOKENIZER_MADE, _json_bytes(made))
    if differ := differences(made["config"], wanted):
        raise ConfigError(
            f"{out}: its tokenizer was made with another configuration: {'; '.join(f'tokenizer.{d}' for d in differ)}; "
            "use another `out`, or put it back"
        )
    tokenizer = Tokenizer.load(out / TOKENIZER)
    if tokenizer.sha256 != made["sha256"]:
        raise ConfigError(f"{out / TOKENIZER}: damaged or exchanged (sha256 differs from {TOKENIZER_MADE}); restore it")
    why = choose_encoder(tokenizer)
    if tokenizer.encoder == "tokenizers":
        log.warning("encoding is slow: %s", why)
    return tokenizer


def _tokenizer_identity(choice: TokenizerChoice) -> dict[str, Any]:
    if isinstance(choice, TrainTokenizer):
        return choice.model_dump(mode="json")
    return {"kind": choice.kind, "sha256": Tokenizer.load(choice.path).sha256}


def _make_tokenizer(preparation: Preparation, identity: dict[str, Any]) -> dict[str, Any]:
    path, choice = preparation.out / TOKENIZER, preparation.tokenizer
    sample: dict[str, dict[str, int]] = {}
    if isinstance(choice, GivenTokenizer):
        shards.write_durably(path, choice.path.read_bytes())
    else:
        train(_sampled(preparation, choice, sample), choice.vocab_size, path)
    return {"config": identity, "sample": sample, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _sampled(preparation: Preparation, choice: TrainTokenizer, taken: dict[str, dict[str, int]]) -> Iterator[str]:
    """Cleaned texts for training, of each corpus as many bytes as its share of all text; fills `taken`.

    Inputs are read in the order of a keyed hash of their names, and documents taken by a keyed hash of their ids, so
    the sample depends on neither the order of inputs nor on the host. Texts kept for validation are not in it.
    """
    inputs = {corpus: preparation.inputs(corpus) for corpus in preparation.corpora}
    texts = {c: sum(map(source.text_bytes, inputs[c])) for c, source in preparation.corpora.items()}
    progress = Progress(min(choice.sample_bytes, int(sum(texts.values()))))
    with Display("tokenizer: sample") as display:
        for corpus in preparation.corpora:
            budget = int(choice.sample_bytes * min(1.0, texts[corpus] / max(sum(texts.values()), 1)))
            got = taken[corpus] = {"documents": 0, "bytes": 0}
            for text in _sampled_of(preparation, corpus, inputs[corpus], budget, choice.seed):
                got["documents"] += 1
                got["bytes"] += len(text.encode())
                progress.done_documents += 1
                progress.done_bytes += len(text.encode())
                display(progress)
                yield text
            log.info("tokenizer: %s: %s documents, %s of text", corpus, f"{got['documents']:,}", size(got["bytes"]))


def _sampled_of(
    preparation: Preparation, corpus: str, inputs: Sequence[Input], budget: int, seed: int
) -> Iterator[str]:
    source = preparation.source(corpus)
    ordered = sorted(inputs, key=lambda input: (_place(input.name, seed), input.name))
    expected = min(sum(map(source.text_bytes, inputs)), TOKENIZER_READ * budget)
    share = min(1.0, 1.25 * budget / max(expected, 1))  # of documents; the quarter more is for what filters drop
    left = budget
    for input in ordered:
        with Reading(Part(input), corpus) as reading:
            for document in source.read(reading):
                if _place(document.id, seed) >= share:
                    continue
                text = preparation.clean.text(document.text)
                if text and preparation.validation.split(text) == "train":
                    yield text
                    left -= len(text.encode())
                if left <= 0:
                    return


def _place(name: str, seed: int) -> float:
    """From 0 to 1, by a keyed hash."""
    return xxhash.xxh3_64_intdigest(name.encode("utf-8", "replace"), seed & (2**64 - 1)) / 2**64


# --- the classifier of quality -------------------------------------------------------------------------------------


def make_classifier(preparation: Preparation) -> dict[str, Any]:
    """Train the folder's classifier unless it is there; how it was made. Raises ConfigError on another's."""
    classifier, out = preparation.classifier, preparation.out
    if classifier is None:
        raise ConfigError("classifier: not in this configuration")
    out.mkdir(parents=True, exist_ok=True)
    with Lease.wait(out / ".classifier.lease", log.info):
        made = _read_json(out / CLASSIFIER_MADE)
        if made is None:
            weights, counts = classifier.train(preparation.clean.text)
            shards.write_durably(out / CLASSIFIER, weights)
            sha256 = hashlib.sha256(weights).hexdigest()
            made = {"config": classifier.learnt_from(), "documents": counts, "sha256": sha256}
            shards.write_durably(out / CLASSIFIER_MADE, _json_bytes(made))
            log.info("classifier: learnt from %s good and %s raw texts", *counts.values())
    if differ := differences(made["config"], classifier.learnt_from()):
        raise ConfigError(
            f"{out}: its classifier was made with another configuration: "
            f"{'; '.join(f'classifier.{d}' for d in differ)}; use another `out`, or put it back"
        )
    if file_sha256(out / CLASSIFIER) != made["sha256"]:
        raise ConfigError(
            f"{out / CLASSIFIER}: damaged or exchanged (sha256 differs from {CLASSIFIER_MADE}); restore it"
        )
    assert isinstance(made, dict)
    return made


def _judgment(preparation: Preparation, corpus: str) -> dict[str, Any] | None:
    """What the classifier's verdicts on a corpus depend on."""
    classifier = preparation.classifier
    if classifier is None or corpus not in classifier.corpora:
        return None
    made = make_classifier(preparation)
    settings = classifier.model_dump(mode="json", include={"pareto", "seed"})
    return {**settings, "sha256": made["sha256"], "version": classifier.version}


def _judge(preparation: Preparation, corpus: str) -> Judge | None:
    classifier = preparation.classifier
    if classifier is None or corpus not in classifier.corpora:
        return None
    return Judge(preparation.out / CLASSIFIER, classifier.pareto, classifier.seed)


# --- plan -----------------------------------------------------------------------------------------------------------


def identity(preparation: Preparation, corpus: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a corpus' shards depend on besides its inputs."""
    source = preparation.source(corpus)
    return {
        "format": shards.FORMAT_VERSION,
        "corpus": corpus,
        "source": {**source.model_dump(mode="json", exclude=NOT_IDENTITY), "version": source.version},
        "clean": {**preparation.clean.model_dump(mode="json"), "version": preparation.clean.version},
        "filters": preparation.filters.identity(),
        "classifier": _judgment(preparation, corpus),
        "decontamination": preparation.decontamination.identity() if preparation.decontamination else None,
        "dedup": _dedup_identity(preparation.dedup),
        "validation": preparation.validation.model_dump(mode="json"),
        "slice_bytes": preparation.slice_bytes,
        "shard_bytes": preparation.shard_bytes,
        "block_tokens": preparation.block_tokens,
        "tokenizer": {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
    }


def _dedup_identity(dedup: Dedup | None) -> dict[str, Any] | None:
    if dedup is None:
        return None
    return {**dedup.model_dump(mode="json", exclude={"keep_texts"}), "version": dedup.version}


def make_job(preparation: Preparation, corpus: str, tokenizer: Tokenizer) -> Job:
    """Plan a corpus, or extend its plan by inputs that are new. Raises ConfigError when it cannot be used."""
    folder = preparation.out / corpus
    folder.mkdir(parents=True, exist_ok=True)
    with Lease.wait(folder / ".plan.lease", log.info):
        _remove_half_written(folder)
        plan = _planned(preparation, corpus, folder, identity(preparation, corpus, tokenizer))
        job = _job(preparation, corpus, plan, tokenizer)
        sweep(job)
        forget_failures(folder)
    return job


def planned_job(preparation: Preparation, corpus: str, tokenizer: Tokenizer) -> Job:
    """A corpus as it is planned, without a look at its inputs. Raises ConfigError where it cannot be used."""
    folder = preparation.out / corpus
    plan = Plan.read(folder)
    if plan is None:
        raise ConfigError(f"{folder}: not planned; run data-prep plan")
    _refuse_another(folder, plan.config, identity(preparation, corpus, tokenizer))
    return _job(preparation, corpus, plan, tokenizer)


def _job(preparation: Preparation, corpus: str, plan: Plan, tokenizer: Tokenizer) -> Job:
    return Job(
        folder=preparation.out / corpus,
        corpus=corpus,
        source=preparation.source(corpus),
        clean=preparation.clean,
        filters=preparation.filters,
        judge=_judge(preparation, corpus),
        decontamination=preparation.decontamination,
        validation=preparation.validation,
        format=_format(preparation, plan, tokenizer),
        tokenizer=preparation.out / TOKENIZER,
        encoder=tokenizer.encoder,
        plan=plan,
        versions=_versions(),
        publish=preparation.publish,
        keep_local=preparation.keep_local,
        from_texts=preparation.dedup is not None and not isinstance(preparation.source(corpus), TokenFiles),
    )


def _planned(preparation: Preparation, corpus: str, folder: Path, config: dict[str, Any]) -> Plan:
    source, old = preparation.source(corpus), Plan.read(folder)
    if old is None:
        inputs = preparation.inputs(corpus)
        slices = cut(inputs, source.can_split, preparation.slice_bytes, 0, 0)
        block = preparation.block_tokens or chosen_block(sum(map(source.text_bytes, inputs)), len(slices))
        plan = Plan(config, block, tuple(slices))
    else:
        _refuse_another(folder, old.config, config)
        plan = _extended(preparation, corpus, folder, old)
    if plan != old:
        plan.write(folder)
    return plan


def _refuse_another(folder: Path, old: Any, new: dict[str, Any]) -> None:
    if differ := differences(old, new):
        leases = (folder / "slices").glob(".*.lease")
        owner = next((owner for owner in map(holder, leases) if owner is not None), None)
        at_work = f" ({owner} is at work on it)" if owner is not None else ""
        raise ConfigError(
            f"{folder}: was prepared with another configuration{at_work}: {'; '.join(differ)}; "
            "use another `out`, or put it back"
        )


def _extended(preparation: Preparation, corpus: str, folder: Path, old: Plan) -> Plan:
    """The old plan with slices for inputs that are new, and, where nothing is sealed yet, for those that changed."""
    source = preparation.source(corpus)
    try:
        inputs = preparation.inputs(corpus)
    except ConfigError:
        if any(_part_hashes(folder, old, slice) is None for slice in old.slices):
            raise
        inputs = []  # all is made, so the inputs may be gone
    found = compare(old.slices, inputs, lambda slice: _part_hashes(folder, old, slice), _hash_now)
    sealed = _sealed_generations(folder, old)
    if any(slice.generation < sealed for slice in found.changed):
        raise ConfigError(
            f"{folder}: inputs of finished shards have changed: {'; '.join(found.changed_inputs[:3])}; "
            "put them back, or prepare into another `out`"
        )
    for line in found.changed_inputs:
        log.warning("%s; its slices are made again", line)
    planned = {part.input.name for slice in found.kept for part in slice.parts}
    new = [input for input in inputs if input.name not in planned]
    first = 1 + max((s.number for s in old.slices if s.generation == sealed), default=-1)
    slices = cut(new, source.can_split, preparation.slice_bytes, sealed, first)
    return Plan(old.config, old.block_tokens, (*found.kept, *slices))


def _part_hashes(folder: Path, plan: Plan, slice: Slice) -> list[str] | None:
    record = slice_record(folder, plan, slice)
    return None if record is None else [part["sha256"] for part in record["parts"]]


def _hash_now(part: Part) -> str:
    with Reading(part, "") as reading:
        return reading.finish()


def _sealed_generations(folder: Path, plan: Plan) -> int:
    """How many generations readers may rely on already. A manifest that cannot be read counts for all of them."""
    if not (folder / shards.MANIFEST).exists():
        return 0
    try:
        return len(shards.read_head(folder)["generations"])
    except shards.ShardError:
        return max(slice.generation for slice in plan.slices) + 1


def _format(preparation: Preparation, plan: Plan, tokenizer: Tokenizer) -> Format:
    return Format(plan.block_tokens, tokenizer.vocab_size, tokenizer.end_of_text, preparation.shard_bytes)


def _versions() -> dict[str, str]:
    """Of what shapes the text and the ids."""
    libraries = ("resiliparse", "fastwarc", "ftfy", "tokenizers", "gigatoken")
    return {"unicode": unicodedata.unidata_version} | {name: _version(name) for name in libraries}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# --- seal -----------------------------------------------------------------------------------------------------------


def seal_corpus(job: Job) -> Manifest:
    """Write the manifest over all slices of the plan, which must be made. Nothing is written when it is sealed so."""
    with Lease.wait(job.folder / ".plan.lease", log.info):
        if (manifest := _sealed(job.folder)) is not None:
            return manifest
        plan_hash = shards.file_hash(job.folder / PLAN)
        slices, files, counts, encoders = [], {PLAN: plan_hash}, Totals(), set[str]()
        for slice in job.plan.slices:
            record, folder = job.record(slice), job.folder_of(slice)
            if record is None:
                raise ConfigError(f"{folder}: not made; run data-prep run")
            sealed = SealedSlice(
                slice=slice.name,
                generation=slice.generation,
                shards=[ShardRecord(**shard) for shard in record["shards"]],
                ids_hash=shards.file_hash(folder / "ids.npy"),
                record_hash=shards.file_hash(folder / RECORD),
            )
            slices.append(sealed)
            if not sealed.shards:  # the table of shards does not name it
                files |= {f"slices/{slice.name}/{RECORD}": sealed.record_hash}
                files |= {f"slices/{slice.name}/ids.npy": sealed.ids_hash}
            counts.add(record["counts"])
            encoders.add(record["encoder"])
        return seal(job.folder, job.format, _head(job, counts, files, encoders), slices)


def _sealed(folder: Path) -> Manifest | None:
    """The manifest over all slices of the plan as it is now."""
    try:
        manifest = Manifest.open(folder)
    except shards.ShardError:
        return None
    return manifest if manifest.head["files"].get(PLAN) == shards.file_hash(folder / PLAN) else None


def _head(job: Job, counts: Totals, files: dict[str, str], encoders: Iterable[str]) -> dict[str, Any]:
    return {
        "corpus": job.corpus,
        "config": job.plan.config,
        "tokenizer_sha256": job.plan.config["tokenizer"]["sha256"],
        "tokenizer": f"../{TOKENIZER}",  # from the corpus' folder
        "encoder": ", ".join(f"{name} {job.versions[name]}" for name in sorted(encoders)),
        "inputs": len({part.input.name for slice in job.plan.slices for part in slice.parts}),
        "slices": len(job.plan.slices),
        "counts": counts.as_json(),
        "versions": job.versions,
        "files": files,
    }


# --- all of it ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """What became of a corpus."""

    corpus: str
    documents_read: int
    documents: int  # kept
    set_aside: dict[str, int]  # reason -> records that gave no document
    dropped: dict[str, int]  # reason -> documents that a filter dropped
    input_bytes: int
    characters: int  # of the documents kept
    tokens: int
    characters_per_token: float
    train_tokens: int
    validation_tokens: int
    blocks: int  # of training
    block_tokens: int
    tail_tokens: int  # of training: in no full block, not fed
    shards: int
    bytes: int  # of all shards


def summarized(manifest: Manifest) -> Summary:
    """From the manifest alone."""
    counts, generations = manifest.head["counts"], manifest.generations

    def total(split: str, key: str) -> int:
        return sum(int(generation[split][key]) for generation in generations)

    tokens = sum(counts["tokens"].values())
    return Summary(
        corpus=manifest.head["corpus"],
        documents_read=counts["read"],
        documents=sum(counts["documents"].values()),
        set_aside=counts["set_aside"],
        dropped=counts["dropped"],
        input_bytes=counts["input_bytes"],
        characters=counts["characters"],
        tokens=tokens,
        characters_per_token=round(counts["characters"] / max(tokens, 1), 3),
        train_tokens=total("train", "tokens"),
        validation_tokens=total("validation", "tokens"),
        blocks=total("train", "blocks"),
        block_tokens=manifest.format.block_tokens,
        tail_tokens=total("train", "tail_tokens"),
        shards=sum(int(generation["shards"]) for generation in generations),
        bytes=total("train", "bytes") + total("validation", "bytes"),
    )


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


def make_jobs(preparation: Preparation) -> list[Job]:
    """The tokenizer, and a planned job for each corpus."""
    if (other := preparation.card.compare_tokenizer) is not None and not other.is_file():
        raise ConfigError(f"card.compare_tokenizer: {other}: no such file")  # now, not when all the work is done
    tokenizer = make_tokenizer(preparation)
    jobs = [make_job(preparation, corpus, tokenizer) for corpus in preparation.corpora]
    if preparation.dedup is not None:
        _plan_duplicates(preparation, jobs, preparation.dedup)
    return jobs


def _plan_duplicates(preparation: Preparation, jobs: Sequence[Job], dedup: Dedup) -> None:
    marked = [job for job in jobs if job.from_texts]
    corpora = {job.corpus: (job.plan, _sealed_generations(job.folder, job.plan)) for job in marked}
    inputs = {(job.corpus, part.input) for job in marked for slice in job.plan.slices for part in slice.parts}
    text_bytes = sum(preparation.source(corpus).text_bytes(input) for corpus, input in inputs)
    with Lease.wait(preparation.out / ".duplicates.lease", log.info):
        duplicates.plan_round(preparation.out, dedup, corpora, text_bytes)
        for stage in BEFORE_SLICES:
            for each in works(jobs, preparation.out, dedup, stage):
                sweep(each)


def planned_jobs(preparation: Preparation) -> list[Job]:
    """The same as they are planned already, whatever the inputs are now."""
    if not (preparation.out / TOKENIZER).exists():
        raise ConfigError(f"{preparation.out}: not planned; run data-prep plan")
    tokenizer = Tokenizer.load(preparation.out / TOKENIZER)
    choose_encoder(tokenizer)  # the same as when it was planned
    return [planned_job(preparation, corpus, tokenizer) for corpus in preparation.corpora]


def stage_widths(preparation: Preparation) -> dict[str, int | None]:
    """The stages of a configuration in their order, before anything is planned, with the number of their tasks where
    the plan does not decide it."""
    before = {"texts": None, "buckets": None, "clusters": 1} if preparation.dedup is not None else {}
    return {**before, "slices": None, "seal": 1}


BEFORE_SLICES = ("texts", "buckets", "clusters")  # stages where duplicates are sought


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
        yield from [0] * any(_sealed(job.folder) is None or not is_published(job) for job in jobs)
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
    for job in jobs:
        sweep_leftovers(job)
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


def folders(where: Path) -> list[Path]:
    """The corpus folders of a config, of its `out`, or the corpus folder itself. Raises ConfigError where none is."""
    if where.is_file():
        preparation = load(Preparation, where)
        return [preparation.out / corpus for corpus in preparation.corpora]
    marks = (PLAN, shards.MANIFEST)
    found = [path for path in (where, *sorted(where.glob("*/"))) if any((path / mark).is_file() for mark in marks)]
    if not found:
        raise ConfigError(f"{where}: neither a config nor a folder of shards")
    return found


def verified(folder: Path) -> Iterator[str]:
    """A line for each damage of a corpus folder and its tokenizer."""
    damages = list(shards.verify(folder))
    yield from damages
    if not damages:
        try:
            folder_tokenizer(Manifest.open(folder))
        except ConfigError as error:
            yield str(error)


def folder_tokenizer(manifest: Manifest) -> Tokenizer:
    """The tokenizer that a corpus was made with. Raises ConfigError when it is not there, or another."""
    path = manifest.folder.parent / TOKENIZER
    tokenizer = Tokenizer.load(path)
    if tokenizer.sha256 != manifest.head["tokenizer_sha256"]:
        raise ConfigError(f"{path}: not the tokenizer of {manifest.folder} (sha256 differs); restore it")
    return tokenizer


@dataclass(frozen=True)
class Outline:
    """What a preparation is going to do, before anything is written. Tokens, text, times and room are estimates."""

    corpus: str
    inputs: int
    input_bytes: int
    slices: int
    slices_made: int
    tokens: int
    text_bytes: int  # kept
    kept: float | None  # share of documents
    core_seconds: float | None  # for the slices that are missing, on one core; None: nothing could be tried
    workers: int  # that can be at work at once
    seconds: float | None  # with so many
    shard_bytes: int
    texts_bytes: int  # of texts and marks, until the seal, where duplicates are sought
    worker_bytes: int  # of memory
    tried_bytes: int  # of input


def outlines(preparation: Preparation) -> Iterator[Outline]:
    """The plan of each corpus as it is, else as it would be, with estimates from a trial of about a second."""
    tokenizer = _tokenizer_for_trial(preparation)
    choice = preparation.tokenizer
    vocabulary = choice.vocab_size if isinstance(choice, TrainTokenizer) else tokenizer.vocab_size if tokenizer else 0
    for corpus in preparation.corpora:
        yield _outline(preparation, corpus, tokenizer, 2 if vocabulary <= 2**16 else 4)


def _tokenizer_for_trial(preparation: Preparation) -> Tokenizer | None:
    made, choice = preparation.out / TOKENIZER, preparation.tokenizer
    path = made if made.is_file() else choice.path if isinstance(choice, GivenTokenizer) else None
    if path is None:
        return None
    tokenizer = Tokenizer.load(path)
    choose_encoder(tokenizer)
    return tokenizer


def _outline(preparation: Preparation, corpus: str, tokenizer: Tokenizer | None, token_bytes: int) -> Outline:
    source, inputs, folder = preparation.source(corpus), preparation.inputs(corpus), preparation.out / corpus
    plan = Plan.read(folder)
    slices = plan.slices if plan else cut(inputs, source.can_split, preparation.slice_bytes, 0, 0)
    missing = [s for s in slices if plan is None or slice_record(folder, plan, s) is None]
    bytes = sum(input.bytes for input in inputs)
    trial = tried(source, inputs, preparation.clean, preparation.filters, tokenizer)
    whole = trial.scaled(bytes) if trial else None
    text = whole.text_bytes if whole else int(sum(map(source.text_bytes, inputs)))
    tokens = int(whole.tokens if whole else text / BYTES_PER_TOKEN)
    seconds = trial.scaled(sum(s.bytes for s in missing)).seconds if trial else None
    at_once = max(1, min(preparation.workers, len(missing)))
    return Outline(
        corpus=corpus,
        inputs=len(inputs),
        input_bytes=bytes,
        slices=len(slices),
        slices_made=len(slices) - len(missing),
        tokens=tokens,
        text_bytes=text,
        kept=trial.kept / trial.documents if trial else None,
        core_seconds=seconds,
        workers=at_once,
        seconds=None if seconds is None else seconds / at_once,
        shard_bytes=int(SHARD_OVERHEAD * tokens * token_bytes) + (SIDECAR_BYTES * whole.kept if whole else 0),
        texts_bytes=_texts_bytes(preparation.dedup, text, whole.kept if whole else 0),
        worker_bytes=memory_bytes(),
        tried_bytes=trial.input_bytes if trial else 0,
    )


def _texts_bytes(dedup: Dedup | None, text_bytes: int, documents: int) -> int:
    return 0 if dedup is None else int(TEXT_PACKED * text_bytes) + documents * dedup.document_bytes


TEXT_PACKED = 0.5  # of a text's bytes, by zstd
SHARD_OVERHEAD = 1.01  # headers of the tar and of its members, indexes
SIDECAR_BYTES = 60  # of a document: its row in the sidecar, compressed, and 12 bytes in ids.npy


def _remove_half_written(folder: Path) -> None:
    """Files that a killed process was writing; whoever holds the folder's lease is the only one to write there."""
    for path in folder.glob(".*.tmp-*"):
        path.unlink(missing_ok=True)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{path}: damaged ({error}); restore it, or prepare into another `out`") from None


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
