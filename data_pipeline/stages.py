"""The stages before the slices where duplicates are sought. Each task makes a folder, as a slice is made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline import duplicates
from data_pipeline.counts import Counts
from data_pipeline.dedup import TEXTS, Dedup, TextWriter
from data_pipeline.dropped import DROPPED, Dropped
from data_pipeline.duplicates import Round
from data_pipeline.plan import Plan, Slice
from data_pipeline.shards import RECORD, write_durably
from data_pipeline.slices import Job, Tell, Work, extracted, parts_record
from data_pipeline.tokenizer import Tokenizer

NOT_OF_TEXTS = (
    "tokenizer",
    "encoder",
    "format",
    "validation",
    "shard_bytes",
    "block_tokens",
    "dedup",
    "decontamination",
)


@dataclass(frozen=True, kw_only=True)
class Texts(Work):
    """Read, clean, filter, and mark: what every later stage needs of a corpus' inputs, so that they are read once."""

    stage: str = "texts"
    job: Job
    dedup: Dedup
    round: Round

    def is_made(self, slice: Slice) -> bool:
        """Marks are needed until it is decided what goes, texts until the slice is made."""
        decided = self.round.is_decided(self.folder.parent)
        has_texts = self.record(slice) is not None and (self.folder_of(slice) / TEXTS).is_file()
        return has_texts or (self.job.is_made(slice) and (decided or self.record(slice) is not None))

    def write(self, slice: Slice, folder: Path, tokenizer: Tokenizer, tell: Tell) -> None:
        counts, hashes, writer = Counts(gone=Dropped(folder)), list[str](), TextWriter(folder, self.dedup)
        for document in extracted(self.job, slice, counts, hashes, tell):
            writer.add(document)
        files = writer.close() | counts.gone.close()
        record = {
            "slice": slice.name,
            "identity": slice.identity(self.plan),
            "parts": parts_record(slice, hashes),
            "counts": counts.record(),
            "documents": writer.documents,
            "files": files,
        }
        _write_record(folder, record)


def remove_texts(texts: Work) -> None:
    """What no one needs when all is sealed. Marks stay, for inputs that come later."""
    for slice in texts.plan.slices:
        for name in (TEXTS, DROPPED):
            (texts.folder_of(slice) / name).unlink(missing_ok=True)


def texts_of(job: Job, dedup: Dedup, round: Round) -> Texts:
    """The stage of a corpus that comes first. What shapes no text is not in its identity."""
    config = {key: value for key, value in job.plan.config.items() if key not in NOT_OF_TEXTS}
    plan = Plan({**config, "dedup": dedup.identity()}, 0, job.plan.slices)
    return Texts(
        folder=job.folder, corpus=job.corpus, tokenizer=job.tokenizer, plan=plan, job=job, dedup=dedup, round=round
    )


@dataclass(frozen=True, kw_only=True)
class Buckets(Work):
    """Pairs of documents that share a mark. A slice of its plan is a bucket: some ranges of marks."""

    stage: str = "buckets"
    out: Path
    dedup: Dedup
    round: Round

    def is_made(self, slice: Slice) -> bool:
        return super().is_made(slice) or self.round.is_decided(self.out)

    def write(self, slice: Slice, folder: Path, tokenizer: Tokenizer, tell: Tell) -> None:
        pairs = duplicates.write_bucket(folder, self.out, self.round, self.dedup, slice.number)
        _write_record(folder, _plain_record(self.plan, slice, pairs=pairs))


@dataclass(frozen=True, kw_only=True)
class Clusters(Work):
    """Which documents go. One task, with memory for those that have a duplicate: about 150 bytes each."""

    stage: str = "clusters"
    out: Path
    round: Round

    def is_made(self, slice: Slice) -> bool:
        return self.round.is_decided(self.out)

    def write(self, slice: Slice, folder: Path, tokenizer: Tokenizer, tell: Tell) -> None:
        gone = duplicates.write_clusters(folder, self.out, self.round)
        _write_record(folder, _plain_record(self.plan, slice, documents=gone))


def _plain_record(plan: Plan, slice: Slice, **found: int) -> dict[str, Any]:
    counts = {"read": 0, "notes": []}
    return {"slice": slice.name, "identity": slice.identity(plan), "counts": counts, **found}


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    write_durably(folder / RECORD, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())


def works(jobs: Sequence[Job], out: Path, dedup: Dedup, stage: str) -> Sequence[Work]:
    """What a stage before the slices, or the slices themselves, have to make."""
    round = duplicates.last_round(out)
    folder, tokenizer = round.folder(out), jobs[0].tokenizer
    marked = [job for job in jobs if job.from_texts]
    if stage == "texts":
        return [texts_of(job, dedup, round) for job in marked]
    if stage == "buckets":
        plan = Plan({"round": round.name}, 0, duplicates.bucket_slices(round))
        return [
            Buckets(
                folder=folder, corpus="duplicates", tokenizer=tokenizer, plan=plan, out=out, dedup=dedup, round=round
            )
        ]
    if stage == "clusters":
        plan = Plan({"round": round.name}, 0, (Slice(0, 0, ()),))
        return [Clusters(folder=folder, corpus="duplicates", tokenizer=tokenizer, plan=plan, out=out, round=round)]
    lists = duplicates.drop_lists(out) if round.is_decided(out) else {}
    drops = {
        job.corpus: {name: drops for (corpus, name), drops in lists.items() if corpus == job.corpus} for job in marked
    }
    return [replace(job, drops=drops.get(job.corpus)) for job in jobs]
