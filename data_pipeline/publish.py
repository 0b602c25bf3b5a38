"""Finished shards copied elsewhere: into an object store that speaks S3, or a folder.

    PREFIX/tokenizer.json, card, …      as in `out`
    PREFIX/<corpus>/slices/<slice>/     each slice when it is made, its record last
    PREFIX/<corpus>/MANIFEST.json       last of all

So whoever finds a record finds its slice whole, and whoever finds a manifest finds a whole corpus. A file that is there
with the same hash is not sent again, and the same command after a kill sends what is missing.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.failpoints import fail_at
from data_pipeline.plan import PLAN, Slice
from data_pipeline.shards import MANIFEST, RECORD, ShardError, file_hash, read_head, sync_folder, write_durably
from data_pipeline.slices import Job
from data_pipeline.sources.inputs import InputError

MARK = ".published"  # beside a manifest: where it was sent, and its hash
HASH = "xxh3-128"  # the attribute under which an object bears its hash


class Target(Protocol):
    """Where files go. Both raise InputError or OSError."""

    def hash_of(self, name: str) -> str | None:
        """The xxh3-128 (hex) of the file there, None where there is none."""
        ...

    def put(self, path: Path, name: str, hash: str) -> None:
        """Copy a file; it appears there whole or not at all."""
        ...


def check_address(address: str) -> None:
    """Raises ValueError for what is neither s3://bucket/… nor a folder."""
    if not re.match(r"s3://[^/]", address) and "://" in address:
        raise ValueError(f"publish: expected s3://bucket/prefix or a folder, got {address!r}")


def target_of(address: str) -> Target:
    return Bucket(address) if address.startswith("s3://") else Folder(Path(address))


class Folder:
    """A folder, on this machine or shared."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def hash_of(self, name: str) -> str | None:
        path = self.folder / name
        return file_hash(path) if path.is_file() else None

    def put(self, path: Path, name: str, hash: str) -> None:
        to = self.folder / name
        to.parent.mkdir(parents=True, exist_ok=True)
        temporary = to.with_name(f".{to.name}.tmp-{os.getpid()}")
        shutil.copyfile(path, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(to)
        sync_folder(to.parent)


class Bucket:
    """A prefix in an object store; the library sends large files in parts, and tries again."""

    def __init__(self, address: str) -> None:
        from data_pipeline.sources.remote import store

        self.address = address.rstrip("/")
        bucket, _, prefix = self.address.removeprefix("s3://").partition("/")
        self.store, self.prefix = store(bucket), f"{prefix}/" if prefix else ""

    def hash_of(self, name: str) -> str | None:
        import obstore

        try:
            about: Any = obstore.get(self.store, self.prefix + name, options={"head": True})
        except FileNotFoundError:
            return None
        except Exception as error:
            raise self._refusal(name, error) from None
        return dict(about.attributes).get(HASH)

    def put(self, path: Path, name: str, hash: str) -> None:
        import obstore

        try:
            obstore.put(self.store, self.prefix + name, path, attributes={HASH: hash})
        except Exception as error:
            raise self._refusal(name, error) from None

    def _refusal(self, name: str, error: Exception) -> InputError:
        from data_pipeline.sources.remote import refusal

        return refusal(f"publish: {self.address}/{name}", error)


def publish_slice(job: Job, slice: Slice) -> None:
    """Send a made slice, unless that is done; then remove its tars where they are not to be kept."""
    assert job.publish is not None
    folder, slices = job.folder_of(slice), job.folder / "slices"
    mark, done = slices / f".{slice.name}{MARK}", _mark(job.publish, folder / RECORD)
    if not (mark.is_file() and mark.read_bytes() == done):
        target, there = target_of(job.publish), f"{job.corpus}/slices/{slice.name}"
        if target.hash_of(f"{there}/{RECORD}") != file_hash(folder / RECORD):
            _check_whole(job, slice)
            files = sorted(folder.glob("[!.]*"), key=lambda path: (path.name == RECORD, path.name))
            _send(target, ((path, f"{there}/{path.name}") for path in files))
        fail_at("publish.sent")
        write_durably(mark, done)
    fail_at("publish.marked")
    if not job.keep_local:
        for tar in folder.glob("*.tar"):
            tar.unlink()


def publish_rest(out: Path, jobs: Iterable[Job]) -> None:
    """Send what is not sent of finished corpora, and what lies beside them; the manifests last of all."""
    manifests, others, address = [], sorted(path for path in out.glob("[!.]*") if path.is_file()), ""
    for job in jobs:
        assert job.publish is not None
        address = job.publish
        for slice in job.plan.slices:
            publish_slice(job, slice)
        head = read_head(job.folder)
        names = {PLAN, head["table"], *head.get("files", {})}
        others += [job.folder / name for name in sorted(names) if not name.startswith("slices/")]
        manifests.append(job.folder / MANIFEST)
    _send(target_of(address), ((path, path.relative_to(out).as_posix()) for path in [*others, *manifests]))
    for manifest in manifests:
        write_durably(manifest.parent / MARK, _mark(address, manifest))


def is_published(job: Job) -> bool:
    """Whether a sealed corpus is where it is to be published, if anywhere."""
    mark = job.folder / MARK
    return job.publish is None or (mark.is_file() and mark.read_bytes() == _mark(job.publish, job.folder / MANIFEST))


def _mark(address: str, what: Path) -> bytes:
    return f"{address} {file_hash(what)}\n".encode()


def _check_whole(job: Job, slice: Slice) -> None:
    record = job.record(slice)
    assert record is not None
    for shard in record["shards"]:
        tar = job.folder_of(slice) / f"{shard['name']}.tar"
        if not tar.is_file():
            raise ShardError(f"{tar}: missing here, and not at {job.publish}; remove its folder to make it again")


def _send(target: Target, files: Iterable[tuple[Path, str]]) -> None:
    for path, name in files:
        hash = file_hash(path)
        if target.hash_of(name) != hash:
            target.put(path, name, hash)
            fail_at("publish.file")
