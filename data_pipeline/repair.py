"""Damaged files of finished shards, made whole: copied from where they were published, or made again from their inputs.

A slice's bytes follow from its inputs and configuration, so what is made again must have the hashes that the manifest
names; else nothing is touched. Each file is swapped in by one rename: who reads meanwhile reads the old one or the new.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from configs import ConfigError, load
from data_pipeline.dedup import TEXTS
from data_pipeline.files import Damaged, Files, Unreadable, files_of
from data_pipeline.jobs import planned_jobs
from data_pipeline.lease import Lease
from data_pipeline.preparation import Preparation
from data_pipeline.publish import MARK, target_of
from data_pipeline.shards import MANIFEST, RECORD, Manifest, ShardError, file_hash, sync_file, sync_folder
from data_pipeline.slices import Job
from data_pipeline.sources.inputs import InputError
from data_pipeline.stages import works
from data_pipeline.summary import folders
from data_pipeline.tokenizer import Tokenizer

log = logging.getLogger("data-prep")

PIECE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Shard:
    """What a user names: [CORPUS/]SLICE/SHARD."""

    corpus: str | None
    slice: str
    name: str

    @staticmethod
    def read(text: str) -> Shard:
        parts = text.split("/")
        if len(parts) not in (2, 3) or not all(parts):
            raise ConfigError(f"expected SLICE/SHARD or CORPUS/SLICE/SHARD, as messages name it, got {text!r}")
        return Shard(parts[0] if len(parts) == 3 else None, parts[-2], parts[-1].removesuffix(".tar"))


@dataclass(frozen=True)
class _File:
    """A file that the manifest names."""

    slice: str
    name: str  # in the slice's folder
    hash: str

    @property
    def path(self) -> str:
        return f"slices/{self.slice}/{self.name}"


Look = Callable[[int, int, str, str], None]  # done, of how many, what is done, in which unit


def repair(where: Path, named: str | None = None, look: Look = lambda *_: None) -> Iterator[str]:
    """Make damaged files whole, of one shard or of all; a line for each. Raises ShardError and ConfigError.

    `where` is a corpus folder, or the config that made it; without the config, only a published copy can help. Of a
    named shard the published copy is looked at too, and sent again where it is damaged.
    """
    preparation = load(Preparation, where) if where.is_file() else None
    shard = Shard.read(named) if named is not None else None
    found = False
    for folder in folders(where):
        if shard is not None and shard.corpus not in (None, folder.name):
            continue
        manifest = Manifest.open(folder)
        key = None if shard is None else (shard.slice, shard.name)
        files = [file for file in _files(manifest) if key in (None, (file.slice, file.name.split(".")[0]))]
        found = found or bool(files)
        try:
            yield from _Repair(manifest, preparation, shard is not None, look).run(files)
        except InputError as error:
            raise ShardError(str(error)) from None
    if shard is not None and not found:
        raise ConfigError(f"{where}: no shard {named}; name it as {MANIFEST} does, SLICE/SHARD")


def _files(manifest: Manifest) -> Iterator[_File]:
    """Every file of the slices that the table names."""
    seen: set[str] = set()
    names = ("slice", "name", "hash", "index_hash", "docs_hash", "ids_hash", "record_hash")
    columns = [manifest.table[name].to_pylist() for name in names]
    for slice_, name, hash, index_hash, docs_hash, ids_hash, record_hash in zip(*columns, strict=True):
        yield _File(slice_, f"{name}.tar", hash)
        yield _File(slice_, f"{name}.index.npy", index_hash)
        yield _File(slice_, f"{name}.docs.parquet", docs_hash)
        if slice_ not in seen:
            seen.add(slice_)
            yield _File(slice_, "ids.npy", ids_hash)
            yield _File(slice_, RECORD, record_hash)


class _Repair:
    """The repair of one corpus."""

    def __init__(self, manifest: Manifest, preparation: Preparation | None, with_copy: bool, look: Look) -> None:
        self.look = look
        self.manifest, self.folder = manifest, manifest.folder
        self.preparation, self.with_copy = preparation, with_copy
        self.address = preparation.publish if preparation is not None else _published_at(manifest.folder)
        self.copy: Files | None = files_of(f"{self.address}/{self.folder.name}") if self.address else None
        self.keeps_tars = preparation is None or preparation.keep_local

    def run(self, files: Sequence[_File]) -> Iterator[str]:
        """Of these files, those that are damaged."""
        damaged: dict[str, list[_File]] = {}
        for number, file in enumerate(files):
            self.look(number, len(files), f"repair {self.folder.name}: read", "files")
            if not self._is_whole(file):
                damaged.setdefault(file.slice, []).append(file)
        for slice_, its in damaged.items():
            yield from self._mend(slice_, its)
        if self.with_copy and self.copy is not None:
            yield from self._mend_copy(files)

    def _is_whole(self, file: _File) -> bool:
        path = self.folder / file.path
        if not path.is_file():
            return path.suffix == ".tar" and not self.keeps_tars
        return file_hash(path) == file.hash

    def _mend(self, slice: str, files: Sequence[_File]) -> Iterator[str]:
        left = []
        for file in files:
            if self._copied(file):
                yield f"{self.folder / file.path}: copied from {self.address}"
            else:
                left.append(file)
        if left:
            with self._made(slice, left) as made:
                for file in left:
                    _swap(made / file.name, self.folder / file.path)
                    yield f"{self.folder / file.path}: made again from its inputs"

    def _copied(self, file: _File) -> bool:
        """Whether the published copy is whole, and now here."""
        if self.copy is None:
            return False
        target = self.folder / file.path
        part = target.with_name(f".{target.name}.tmp-repair")
        try:
            with part.open("wb") as to:
                hash = _hash_of(self.copy, file.path, to.write)
            if hash == file.hash:
                _swap(part, target)
            return hash == file.hash
        except (Unreadable, Damaged) as error:
            log.warning("%s", error)
            return False
        finally:
            part.unlink(missing_ok=True)

    def _mend_copy(self, files: Sequence[_File]) -> Iterator[str]:
        """Send again what is damaged where it was published."""
        assert self.copy is not None and self.address is not None
        target = target_of(self.address)
        for number, file in enumerate(files):
            self.look(number, len(files), f"repair {self.folder.name}: read at {self.address}", "files")
            try:
                if _hash_of(self.copy, file.path) == file.hash:
                    continue
            except Unreadable as error:
                log.warning("%s", error)
            path, name = self.folder / file.path, f"{self.folder.name}/{file.path}"
            if path.is_file():
                target.put(path, name, file.hash)
            else:
                with self._made(file.slice, [file]) as made:
                    target.put(made / file.name, name, file.hash)
            yield f"{self.address}/{name}: sent again"

    @contextmanager
    def _made(self, slice_name: str, files: Sequence[_File]) -> Iterator[Path]:
        """The folder of a slice that is made again, in which the files have their hashes. Removed at the end."""
        job = self._job(slice_name, files[0])
        slice = next(each for each in job.plan.slices if each.name == slice_name)
        tokenizer = Tokenizer.load(job.tokenizer)
        tokenizer.use(job.encoder)
        with Lease.wait(job.lease_of(slice), log.info) as lease:
            folder = job.folder / job.stage / f".tmp-{slice.name}-{lease.owner.token}"
            folder.mkdir()
            try:
                title = f"repair {self.folder.name}: make {slice.name} again"
                job.write(slice, folder, tokenizer, lambda read, *_: self.look(read, slice.bytes, title, "bytes"))
                for file in files:
                    self._check(job, file, folder / file.name)
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def _job(self, slice: str, file: _File) -> Job:
        path = self.folder / file.path
        if self.preparation is None:
            raise ConfigError(
                f"{path}: damaged, and no published copy is known; name the config that made it: "
                f"data-prep repair CONFIG {slice}/{file.name.split('.')[0]}"
            )
        jobs = [job for job in planned_jobs(self.preparation) if job.folder == self.folder]
        if self.preparation.dedup is not None:
            works_ = works(jobs, self.preparation.out, self.preparation.dedup, "slices")
            jobs = [job for job in works_ if isinstance(job, Job)]
            if jobs[0].from_texts and not (self.folder / "texts" / slice / TEXTS).is_file():
                raise ConfigError(
                    f"{path}: damaged, and the texts that it was made of are removed (dedup.keep_texts is false); "
                    "only a published copy can repair it"
                )
        return jobs[0]

    def _check(self, job: Job, file: _File, made: Path) -> None:
        if made.is_file() and file_hash(made) == file.hash:
            return
        was, now = self.manifest.head.get("versions", {}), job.versions
        differ = ", ".join(f"{name} {was.get(name)} -> {now[name]}" for name in now if now[name] != was.get(name))
        why = f"use the libraries that made it ({differ})" if differ else "put its inputs back as they were"
        raise ShardError(f"{job.folder / file.path}: made again it is another file, so it is left as it is; {why}")


def _published_at(folder: Path) -> str | None:
    """Where the mark beside a manifest says that the corpus was sent."""
    try:
        return (folder / MARK).read_text().rpartition(" ")[0] or None
    except OSError:
        return None


def _hash_of(files: Files, name: str, write: Callable[[bytes], object] = len) -> str:
    """The xxh3-128 (hex) of a file, which is written on the way."""
    digest, at = xxhash.xxh3_128(), 0
    while data := files.raw(name, at, PIECE_BYTES):
        digest.update(data)
        write(data)
        at += len(data)
        if len(data) < PIECE_BYTES:
            break
    return digest.hexdigest()


def _swap(new: Path, target: Path) -> None:
    sync_file(new)
    target.parent.mkdir(parents=True, exist_ok=True)
    new.replace(target)
    sync_folder(target.parent)
