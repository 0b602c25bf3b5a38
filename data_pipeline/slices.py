"""Make one slice: read, clean, filter, encode, write.

A slice is made under its lease in a temporary folder, which gets its name when everything in it is on disk. Killed at
any point, a slice is whole or absent. What a slice holds depends on its inputs and the configuration, on nothing else.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from configs import ConfigError, Float, Int, Section
from data_pipeline.classifier import Judge
from data_pipeline.clean import Clean
from data_pipeline.counts import Counts, text_bytes
from data_pipeline.decontaminate import Decontamination, pieces_of
from data_pipeline.dedup import TEXTS, read_texts
from data_pipeline.document import Document
from data_pipeline.dropped import Dropped
from data_pipeline.duplicates import DropList, read_drops
from data_pipeline.failpoints import fail_at
from data_pipeline.filters import Filters
from data_pipeline.killers import KILLS, left_out, mark
from data_pipeline.lease import Lease, holder, remove_dead
from data_pipeline.plan import Plan, Slice
from data_pipeline.shards import (
    RECORD,
    Format,
    ShardRecord,
    SliceWriter,
    Split,
    file_hash,
    sync_folder,
    write_durably,
)
from data_pipeline.sources import Source
from data_pipeline.sources.inputs import (
    MAX_NOTES,
    Damage,
    InputError,
    Part,
    Reading,
    describe,
    is_content_error,
    is_remote,
)
from data_pipeline.tokenizer import Encoder, Ids, Tokenizer

log = logging.getLogger("data-prep")

BATCH_CHARS = 4_000_000  # encoded at once
BATCH_DOCUMENTS = 4096
PROVE_EVERY = 8  # batches, 32 MB of text: in each shard of the usual size some 15 samples
PROVE_CHARS = 20_000  # the canonical encoder takes about 5 ms for so many
POISON_LIMIT = 100  # documents of a slice that may raise whatever their share; beyond, at most a tenth may


class Validation(Section):
    """Which documents are kept from training: those whose text's hash, keyed by `seed`, falls below `fraction`."""

    fraction: Float = 0.005
    seed: Int = 0

    def split(self, text: str) -> Split:
        """The same for equal texts, in every corpus."""
        return self.split_bytes(text.encode())

    def split_bytes(self, data: bytes) -> Split:
        """The same for equal bytes: of a text in UTF-8, or of ids as 4 little-endian bytes each."""
        place = xxhash.xxh3_64_intdigest(data, self.seed & (2**64 - 1)) / 2**64
        return "validation" if place < self.fraction else "train"


Tell = Callable[[int, int], None]  # (input bytes, documents) of the slice so far


@dataclass(frozen=True, kw_only=True)
class Work:
    """A stage of a preparation: of each slice of a plan it makes a folder, whole or absent."""

    folder: Path
    corpus: str
    stage: str
    tokenizer: Path
    encoder: Encoder = "tokenizers"
    plan: Plan

    def folder_of(self, slice: Slice) -> Path:
        return self.folder / self.stage / slice.name

    def lease_of(self, slice: Slice) -> Path:
        return self.folder / self.stage / f".{slice.name}.lease"

    def record(self, slice: Slice) -> dict[str, Any] | None:
        return slice_record(self.folder, self.plan, slice, self.stage)

    def is_made(self, slice: Slice) -> bool:
        return self.record(slice) is not None

    def write(self, slice: Slice, folder: Path, tokenizer: Tokenizer, tell: Tell) -> None:
        """Fill the folder; the record comes last."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Job(Work):
    """A planned corpus, with what is needed to make its slices."""

    stage: str = "slices"
    source: Source
    clean: Clean
    filters: Filters
    judge: Judge | None
    decontamination: Decontamination | None
    validation: Validation
    format: Format
    versions: dict[str, str]  # of the libraries that shape the text
    publish: str | None = None  # where finished slices are sent
    keep_local: bool = True  # the tars of those
    from_texts: bool = False  # slices are made of the texts that an earlier stage left, without the duplicates
    drops: Mapping[str, DropList] | None = None  # by slice, where they are known: the documents that go

    def record(self, slice: Slice) -> dict[str, Any] | None:
        """With another list of duplicates than now, a slice is not made."""
        record, drops = super().record(slice), (self.drops or {}).get(slice.name)
        return record if record is None or drops is None or record.get("duplicates") == drops.hash else None

    def write(self, slice: Slice, folder: Path, tokenizer: Tokenizer, tell: Tell) -> None:
        _write(self, slice, tokenizer, folder, tell)


def slice_record(folder: Path, plan: Plan, slice: Slice, stage: str = "slices") -> dict[str, Any] | None:
    """The record of a made slice; None for one that is not made, or was made from another plan."""
    try:
        record = json.loads(Path(f"{folder}/{stage}/{slice.name}/{RECORD}").read_bytes())
    except (OSError, ValueError):
        return None
    fits = isinstance(record, dict) and record.get("identity") == slice.identity(plan)
    return record if fits else None


# --- one slice ------------------------------------------------------------------------------------------------------


def make_slice(job: Work, slice: Slice, tokenizer: Tokenizer, tell: Tell) -> bool:
    """Make a slice unless it is made or another process is at it. True when it was made here."""
    if job.is_made(slice):
        return False
    lease = Lease.take(job.lease_of(slice))
    if lease is None:
        return False
    with lease:
        if job.is_made(slice):
            return False
        temporary = job.folder / job.stage / f".tmp-{slice.name}-{lease.owner.token}"
        temporary.mkdir()
        try:
            fail_at(f"{job.stage}.begun")
            job.write(slice, temporary, tokenizer, tell)
            fail_at(f"{job.stage}.written")
            return _publish(job, slice, temporary)
        except FileNotFoundError:
            if temporary.exists():
                raise
            return False  # stopped for so long that another took the lease over
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _write(job: Job, slice: Slice, tokenizer: Tokenizer, folder: Path, tell: Tell) -> None:
    try:
        _write_with(job, slice, tokenizer, folder, tell)
    except EncodersDiffer as difference:
        log.warning("%s: slice %s: %s; it is made with tokenizers", job.corpus, slice.name, difference)
        shutil.rmtree(folder)
        folder.mkdir()
        tokenizer.use("tokenizers")
        try:
            _write_with(job, slice, tokenizer, folder, tell)
        finally:
            tokenizer.use(job.encoder)


def _write_with(job: Job, slice: Slice, tokenizer: Tokenizer, folder: Path, tell: Tell) -> None:
    counts, hashes = Counts(gone=Dropped(folder)), list[str]()
    writer = SliceWriter(folder, job.format)
    encoding = _Encoding(tokenizer, writer, counts)
    for document in _documents(job, slice, counts, hashes, tell):
        if document.ids is not None:
            _take(document, job, tokenizer, writer, counts)
        else:
            encoding.add(document, job.validation.split(document.text))
    encoding.flush()
    record = _record(job, slice, counts, hashes, writer.close(), counts.gone.close()) | {"encoder": tokenizer.encoder}
    write_durably(folder / RECORD, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())


def _publish(job: Work, slice: Slice, temporary: Path) -> bool:
    target = job.folder_of(slice)
    try:
        temporary.rename(target)
    except OSError:
        if job.is_made(slice):  # another process, with the same bytes
            return False
        shutil.rmtree(target, ignore_errors=True)  # of another plan, or not ours
        temporary.rename(target)
    sync_folder(target.parent)
    fail_at(f"{job.stage}.published")
    return True


def _documents(job: Job, slice: Slice, counts: Counts, hashes: list[str], tell: Tell) -> Iterator[Document]:
    """The documents to keep, cleaned; fills `counts` and, part by part, the sha256 of the bytes read."""
    read = _without_duplicates if job.from_texts else extracted
    for document in read(job, slice, counts, hashes, tell):
        yield from _decontaminated(job, document, counts)


def _without_duplicates(job: Job, slice: Slice, counts: Counts, hashes: list[str], tell: Tell) -> Iterator[Document]:
    """From the texts that an earlier stage left."""
    folder, drops = job.folder / "texts" / slice.name, (job.drops or {}).get(slice.name)
    if drops is None or not (folder / TEXTS).is_file():
        raise ConfigError(f"{folder}: not made, or its duplicates not sought yet; run data-prep run")
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if file_hash(folder / TEXTS) != record["files"][TEXTS]:
        raise ConfigError(f"{folder / TEXTS}: damaged; remove its folder and run again")
    counts.add(record["counts"])
    counts.notes += record["counts"]["notes"]
    counts.gone.begin_with(folder)
    hashes += [part["sha256"] for part in record["parts"]]
    gone = {drop.ordinal: drop for drop in read_drops(drops)}
    documents = max(record["documents"], 1)
    for ordinal, document in enumerate(read_texts(folder, job.corpus)):
        drop = gone.get(ordinal)
        if drop is None:
            yield document
        else:
            _drop(document, drop.reason, counts, drop.stays)
        tell(slice.bytes * ordinal // documents, ordinal)


def extracted(job: Job, slice: Slice, counts: Counts, hashes: list[str], tell: Tell) -> Iterator[Document]:
    """From the inputs: read, cleaned, let through by the filters."""
    temporary = counts.gone.path.parent
    aside = left_out(temporary.parent, slice.name)  # of the stage that reads, which need not be the job's own
    for number, part in enumerate(slice.parts):
        if number in aside:
            hashes.append("")
            counts.set_aside[KILLS] += 1
            _note(counts, f"{part.input.name}: {KILLS}: set aside")
            continue
        _check_unchanged(part, slice)
        mark(temporary, number)
        before = counts.input_bytes
        with Reading(part, job.corpus, job.source.on_damage) as reading:
            for document in _read(job.source, reading):
                counts.read += 1
                counts.read_bytes += text_bytes(document.text)
                kept = _prepared(job, document, counts)
                if kept is not None:
                    yield kept
                tell(before + reading.bytes_read, counts.read)
            hashes.append(reading.finish())
        _check_unchanged(part, slice)
        counts.input_bytes = before + reading.bytes_read
        counts.set_aside.update(reading.set_aside)
        _note(counts, *reading.notes)
        tell(counts.input_bytes, counts.read)
    mark(temporary, None)


def _check_unchanged(part: Part, slice: Slice) -> None:
    if is_remote(part.input.name):
        return  # every request names the version that the plan has
    try:
        now = describe(part.input.name)
    except FileNotFoundError:
        raise InputError(f"{part.input.name}: planned for slice {slice.name}, and gone; put it back") from None
    if now != part.input:
        raise InputError(f"{part.input.name}: changed since it was planned; run data-prep run again, which plans anew")


def _read(source: Source, reading: Reading) -> Iterator[Document]:
    """What a source reads; where its reader fails on what it finds, the rest of the file counts as damaged."""
    documents = source.read(reading)
    try:
        yield from documents
    except GeneratorExit:
        raise
    except BaseException as error:
        if not is_content_error(error):
            raise
        reading.damaged(Damage(reading.position, f"cannot be read on ({said(error)})"))


def _prepared(job: Job, document: Document, counts: Counts) -> Document | None:
    """Cleaned and let through by the filters, or None (counted). What is tokens already stays as it is."""
    if document.ids is not None:
        return document
    try:
        text = job.clean.text(document.text, counts.masked)
        document = Document(text, document.id, document.source, document.uri, document.meta)
        document, reason = job.filters.judged(document)
        if reason is None and job.judge is not None:
            reason = job.judge.reason(document)
    except BaseException as error:
        if not is_content_error(error):
            raise
        _poison(document, error, counts)
        return None
    counts.cleaned_bytes += text_bytes(text)  # a rule may have cut lines out since
    if reason is not None:
        _drop(document, reason, counts)
        return None
    return document


def _decontaminated(job: Job, document: Document, counts: Counts) -> Iterator[Document]:
    """The document, or what is left of it between evaluation texts. What is tokens already stays as it is."""
    if job.decontamination is None or document.ids is not None:
        yield document
        return
    try:
        cut = job.decontamination.cut(document.text)
    except BaseException as error:
        if not is_content_error(error):
            raise
        counts.cleaned_bytes -= text_bytes(document.text)
        _poison(document, error, counts)
        return
    if cut is None:
        yield document
    elif cut.reason is not None:
        _drop(document, cut.reason, counts)
    else:
        counts.decontaminated.update(documents=1, pieces=len(cut.pieces), characters=cut.characters)
        yield from pieces_of(document, cut)


def _drop(document: Document, reason: str, counts: Counts, stays: str | None = None) -> None:
    """Every document that is dropped comes here: counted, and its place and perhaps its text kept.

    `stays` is `corpus: id` of the document that it is a duplicate of.
    """
    counts.dropped[reason] += 1
    counts.dropped_bytes[reason] += text_bytes(document.text)
    counts.gone.add(document, reason, stays)


class EncodersDiffer(Exception):
    """gigatoken gave other ids than tokenizers on a sample of a slice's own text."""


def _take(document: Document, job: Job, tokenizer: Tokenizer, writer: SliceWriter, counts: Counts) -> None:
    """A document whose tokens are made already: checked, and without its own <|endoftext|>, which the writer adds."""
    ids = document.ids
    assert ids is not None
    low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
    if low < 0 or high >= tokenizer.vocab_size:
        raise InputError(
            f"{document.id}: token id {low if low < 0 else high} is not among the {tokenizer.vocab_size} of the "
            "tokenizer; set tokenizer.path to the one that made this file"
        )
    ids = ids[:-1] if len(ids) and ids[-1] == tokenizer.end_of_text else ids
    split = job.validation.split_bytes(ids.astype("<u4").tobytes())
    writer.add(document, ids, split)
    counts.keep(document, split, len(ids))


class _Encoding:
    """Gathers documents, encodes them many at a time, and writes them."""

    def __init__(self, tokenizer: Tokenizer, writer: SliceWriter, counts: Counts) -> None:
        self.tokenizer, self.writer, self.counts = tokenizer, writer, counts
        self.documents: list[tuple[Document, Split]] = []
        self.characters = 0
        self.batches = 0

    def add(self, document: Document, split: Split) -> None:
        self.documents.append((document, split))
        self.characters += len(document.text)
        if self.characters >= BATCH_CHARS or len(self.documents) >= BATCH_DOCUMENTS:
            self.flush()

    def flush(self) -> None:
        encoded = self._encoded([document.text for document, _ in self.documents])
        for (document, split), ids in zip(self.documents, encoded, strict=True):
            if ids is None:
                continue
            self.writer.add(document, ids, split)
            self.counts.keep(document, split, len(ids))
        self.documents, self.characters = [], 0

    def _encoded(self, texts: Sequence[str]) -> Sequence[Ids | None]:
        try:
            encoded = self.tokenizer.encode_batch(texts)
        except BaseException as error:
            if not is_content_error(error):
                raise
            return [self._encoded_alone(document) for document, _ in self.documents]
        if self.batches % PROVE_EVERY == 0:
            self._prove(texts, encoded)
        self.batches += 1
        return encoded

    def _encoded_alone(self, document: Document) -> Ids | None:
        try:
            return self.tokenizer.encode_batch([document.text])[0]
        except BaseException as error:
            if not is_content_error(error):
                raise
            self.counts.cleaned_bytes -= text_bytes(document.text)
            _poison(document, error, self.counts)
            return None

    def _prove(self, texts: Sequence[str], encoded: Sequence[Ids]) -> None:
        """Hold the batch's first document of a usual length to the canonical ids."""
        if self.tokenizer.encoder == "tokenizers":
            return
        place = next((i for i, text in enumerate(texts) if 0 < len(text) <= PROVE_CHARS), None)
        if place is not None and not np.array_equal(encoded[place], self.tokenizer.canonical_batch([texts[place]])[0]):
            raise EncodersDiffer(f"gigatoken gives other ids than tokenizers for {self.documents[place][0].id}")


def _poison(document: Document, error: BaseException, counts: Counts) -> None:
    """A document that raises is set aside; too many of them are a fault of ours or of the configuration."""
    line = f"{document.meta.get('input')}: document {document.id}: raises {said(error)}"
    counts.set_aside["raises"] += 1
    counts.dropped_bytes["raises"] += text_bytes(document.text)
    counts.gone.add(document, "raises")
    _note(counts, line)
    if counts.set_aside["raises"] > max(POISON_LIMIT, counts.read / 10):
        raise InputError(f"{counts.set_aside['raises']} of {counts.read} documents raise an error, the last: {line}")


def _note(counts: Counts, *lines: str) -> None:
    counts.notes += lines[: MAX_NOTES - len(counts.notes)]


def said(error: BaseException) -> str:
    """An error as one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _record(
    job: Job,
    slice: Slice,
    counts: Counts,
    hashes: Sequence[str],
    shards: Sequence[ShardRecord],
    files: dict[str, str],
) -> dict[str, Any]:
    """A slice's record: what it was made of, what became of it, its shards."""
    return {
        "slice": slice.name,
        "generation": slice.generation,
        "identity": slice.identity(job.plan),
        "parts": parts_record(slice, hashes),
        "counts": counts.record(),
        "shards": [asdict(shard) for shard in shards],
        "files": files,
        "versions": job.versions,
    } | ({"duplicates": job.drops[slice.name].hash} if job.drops and slice.name in job.drops else {})


def parts_record(slice: Slice, hashes: Sequence[str]) -> list[dict[str, Any]]:
    """What a slice was made of; `hashes` are the sha256 of its parts."""
    return [
        {"input": p.input.name, "size": p.input.size, "start": p.start, "stop": p.stop, "sha256": sha256}
        for p, sha256 in zip(slice.parts, hashes, strict=True)
    ]


# --- a folder of slices ---------------------------------------------------------------------------------------------


def sweep(job: Work) -> None:
    """Remove what dead processes left in the slices' folder, and slices that the plan does not have."""
    folder = job.folder / job.stage
    folder.mkdir(parents=True, exist_ok=True)
    sweep_leftovers(job)
    planned = {slice.name: slice for slice in job.plan.slices}
    for path in sorted(folder.glob("[!.]*")):
        if path.name not in planned or not job.is_made(planned[path.name]):
            shutil.rmtree(path)


def sweep_leftovers(job: Work) -> None:
    """Remove leases and temporary folders of processes that are no more."""
    folder = job.folder / job.stage
    for path in sorted(folder.glob(".*")):
        if path.name.endswith(".lease"):
            remove_dead(path)
        elif path.name.startswith(".tmp-"):
            slice_name, _, token = path.name.removeprefix(".tmp-").rpartition("-")
            owner = holder(folder / f".{slice_name}.lease")
            if owner is None or owner.token != token:
                shutil.rmtree(path, ignore_errors=True)
