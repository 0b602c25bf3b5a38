"""Corpora as jobs: planned, extended by new inputs, refused when they were made otherwise; sealed when all is made."""

from __future__ import annotations

import importlib.metadata
import logging
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from configs import ConfigError, differences
from data_pipeline import duplicates, shards
from data_pipeline.counts import Totals
from data_pipeline.dedup import Dedup
from data_pipeline.failures import forget_failures
from data_pipeline.lease import Lease, holder
from data_pipeline.made_once import TOKENIZER, judge, judgment, make_tokenizer, remove_half_written
from data_pipeline.plan import PLAN, Plan, Slice, chosen_block, compare, cut
from data_pipeline.preparation import NOT_IDENTITY, Preparation
from data_pipeline.shards import RECORD, Format, Manifest, SealedSlice, ShardRecord, seal
from data_pipeline.slices import Job, slice_record, sweep
from data_pipeline.sources.inputs import Part, Reading
from data_pipeline.sources.token_files import TokenFiles
from data_pipeline.stages import works
from data_pipeline.tokenizer import Tokenizer, choose_encoder

log = logging.getLogger("data-prep")

BEFORE_SLICES = ("texts", "buckets", "clusters")  # stages where duplicates are sought


def identity(preparation: Preparation, corpus: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a corpus' shards depend on besides its inputs."""
    source = preparation.source(corpus)
    return {
        "format": shards.FORMAT_VERSION,
        "corpus": corpus,
        "source": {**source.model_dump(mode="json", exclude=NOT_IDENTITY), "version": source.version},
        "clean": {**preparation.clean.model_dump(mode="json"), "version": preparation.clean.version},
        "filters": preparation.filters.identity(),
        "classifier": judgment(preparation, corpus),
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
        remove_half_written(folder)
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
        judge=judge(preparation, corpus),
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
    sealed = sealed_generations(folder, old)
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


def sealed_generations(folder: Path, plan: Plan) -> int:
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


def seal_corpus(job: Job) -> Manifest:
    """Write the manifest over all slices of the plan, which must be made. Nothing is written when it is sealed so."""
    with Lease.wait(job.folder / ".plan.lease", log.info):
        if (manifest := sealed_manifest(job.folder)) is not None:
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


def sealed_manifest(folder: Path) -> Manifest | None:
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
    corpora = {job.corpus: (job.plan, sealed_generations(job.folder, job.plan)) for job in marked}
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
