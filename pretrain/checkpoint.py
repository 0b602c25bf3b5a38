"""Checkpoints: whole or absent, verified when loaded, loadable by any engine on any number of ranks.

    checkpoints/step-<step>.b<branch>/
        rank-<r>-of-<w>.bin     raw little-endian tensors: every owned fragment of one kind, then of the next
        rank-<r>-of-<w>.json    where each fragment lies; size; xxh3-128 of the file and of each 4 MiB chunk
        MANIFEST.json           position, lineage, identity, every file with size and hash; written last

Each rank copies its fragments into one reused host buffer (all that training waits for); a thread writes, hashes and
syncs them, reads them back from the disk, then writes the rank's JSON. Rank 0's thread waits for the JSON of every
rank, writes the manifest, renames the folder and syncs its parent. No collective runs in a thread. So what is committed
has been verified, and retention, which comes after a commit, never removes the newest that verifies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from pydantic import Field
from torch import Tensor

from configs import ConfigError, Float, Int, Section
from data_pipeline.failpoints import fail_at
from data_pipeline.shards import HashedFile, sync_folder, write_durably
from pretrain import disk
from pretrain.archive import MOST_WAITING, Archive, Archiver
from pretrain.engine.scale import LossScale
from pretrain.engine.state import MASTER, Fragment, State
from pretrain.lineage import Lineage, TakenOver

log = logging.getLogger("pretrain")

FORMAT_VERSION = 1
CHUNK_BYTES = 4 * 2**20
PAGE_BYTES = 4096
PEER_TIMEOUT_S = 1800.0  # how long rank 0 waits for the other ranks' files
NAME = re.compile(r"step-(\d+)\.b(\d+)")


class Damaged(Exception):
    """A checkpoint whose bytes are not those that were committed. One line: file, what is wrong."""


class SaveError(Exception):
    """A checkpoint that could not be written. One line: file, what is wrong."""


class Checkpoints(Section):
    """When checkpoints are saved, and which stay."""

    save_every_steps: Int = Field(default=1000, gt=0)  # beside those at a stop and at the end
    keep_last: Int = Field(default=3, gt=0)  # of those that verify
    keep_every_steps: Int | None = Field(default=None, gt=0)  # kept for good
    on_error: Literal["stop", "go_on"] = "stop"  # what a failed save does to the run
    peer_timeout_s: Float = Field(default=PEER_TIMEOUT_S, gt=0)  # how long a save waits for the other ranks' files
    archive: Archive | None = None  # copies elsewhere


@dataclass(frozen=True)
class Position:
    """Where a run is: three numbers that are all kept, and the digest of every sample fed so far."""

    step: int
    samples: int
    tokens: int
    digest: str  # 32 hex digits


@dataclass(frozen=True)
class Committed:
    """A committed checkpoint: its folder, its manifest, and the sha256 of the manifest's bytes."""

    folder: Path
    manifest: dict[str, Any]
    manifest_hash: str

    @property
    def position(self) -> Position:
        return Position(**self.manifest["position"])

    @property
    def branch(self) -> int:
        return int(self.manifest["branch"])

    @property
    def state(self) -> dict[str, Any]:
        """What a save was given as `extra`; nothing in checkpoints of older versions."""
        return dict(self.manifest.get("state", {}))


# --- finding --------------------------------------------------------------------------------------------------------


def folder_name(step: int, branch: int) -> str:
    return f"step-{step}.b{branch}"


def all_checkpoints(run_folder: Path) -> list[tuple[int, int, Path]]:
    """(step, branch, folder) of every committed checkpoint, dead ones too, newest step first."""
    found = []
    for path in (run_folder / "checkpoints").glob("step-*"):
        match = NAME.fullmatch(path.name)
        if match:
            found.append((int(match[1]), int(match[2]), path))
    return sorted(found, reverse=True)


def live_checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoints of the live lineage, newest first."""
    found = all_checkpoints(run_folder)
    alive: list[tuple[int, int, Path]] = []
    for number, limit in Lineage(run_folder).live():
        alive += [(s, b, path) for s, b, path in found if b == number and (limit is None or s <= limit)]
    return [path for _, _, path in sorted(alive, reverse=True)]


def open_checkpoint(folder: Path, expected_hash: str | None = None) -> Committed:
    """Read and check a checkpoint's manifest. Raises Damaged; an I/O error other than absence stays what it is."""
    path = folder / "MANIFEST.json"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise Damaged(f"{path}: missing") from None
    found = hashlib.sha256(data).hexdigest()
    if expected_hash is not None and found != expected_hash:
        raise Damaged(f"{path}: hash {found[:12]} is not the {expected_hash[:12]} that was agreed on")
    try:
        manifest = json.loads(data)
        claimed = manifest["sha256"]
        version = manifest["format"]
    except (ValueError, KeyError, TypeError):
        raise Damaged(f"{path}: not a manifest") from None
    if claimed != _self_hash(manifest):
        raise Damaged(f"{path}: damaged (its own hash differs)")
    if version > FORMAT_VERSION:
        raise ConfigError(f"{path}: format {version} is newer than this code's {FORMAT_VERSION}; update longhaul")
    for name, file in manifest["files"].items():
        if not (folder / name).is_file():
            raise Damaged(f"{folder / name}: missing")
        if (size := (folder / name).stat().st_size) != file["bytes"]:
            raise Damaged(f"{folder / name}: {size} bytes, expected {file['bytes']}")
    return Committed(folder, manifest, found)


def verify(folder: Path) -> list[str]:
    """Read every byte of a checkpoint; one line per damage, nothing when it is whole."""
    try:
        committed = open_checkpoint(folder)
    except Damaged as error:
        return [str(error)]
    return [
        f"{folder / name}: damaged (hash differs)"
        for name, file in committed.manifest["files"].items()
        if _file_hash(folder / name) != file["hash"]
    ]


def _self_hash(manifest: dict[str, Any]) -> str:
    body = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


# --- saving ---------------------------------------------------------------------------------------------------------


class Saver:
    """Saves one rank's part in the background, one save in flight; on rank 0 it also commits and retires.

    `on_commit(committed, seconds since the save began)` and `on_removed(folder)` are called on rank 0, from the thread.
    """

    def __init__(
        self,
        run_folder: Path,
        settings: Checkpoints,
        branch: int,
        rank: int,
        ranks: int,
        facts: dict[str, Any],
        on_commit: Callable[[Committed, float], None] = lambda committed, seconds: None,
        on_removed: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        self.root = run_folder / "checkpoints"
        self.lineage, self.settings, self.branch = Lineage(run_folder), settings, branch
        self.rank, self.ranks, self.facts = rank, ranks, facts
        self.on_commit, self.on_removed = on_commit, on_removed
        self.last_step: int | None = None  # of the save begun last
        self.archiver = Archiver(settings.archive, run_folder) if settings.archive and rank == 0 else None
        self._archived: set[Path] = set()  # handed to the archiver
        self._buffer: Tensor | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, state: State, position: Position, digest_share: int, extra: dict[str, Any] | None = None) -> float:
        """Snapshot, and write in the background; seconds that the caller was held up.

        `position.digest` is the digest at the attempt's start; every rank adds its `digest_share` through its file.
        `extra` (JSON) is kept in the manifest as `state`: what else a resume needs, the same on every rank.
        """
        self._join()
        begun = time.perf_counter()
        record = self._snapshot(state)
        record |= {"digest_share": f"{digest_share:032x}", "steps": state.steps}
        if state.loss_scale is not None:
            record["loss_scale"] = asdict(state.loss_scale)
        held_up = time.perf_counter() - begun
        self.last_step = position.step
        self._thread = threading.Thread(
            target=self._run, args=(record, position, extra or {}, begun), name="longhaul-save", daemon=True
        )
        self._thread.start()
        return held_up

    def poll(self) -> Exception | None:
        """The error of the last save, once; None while it runs or when it went well."""
        if self._thread is not None and self._thread.is_alive():
            return None
        error, self._error = self._error, None
        return error

    def close(self, seconds: float | None = None) -> None:
        """End the archiving, after at most `seconds` (default: those of the settings)."""
        if self.archiver is not None and self.settings.archive is not None:
            self.archiver.close(self.settings.archive.close_seconds if seconds is None else seconds)

    def done(self, timeout_s: float) -> bool:
        """Whether no save is in flight, after waiting for at most `timeout_s`."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the save in flight. Raises its error."""
        self._join()
        if (error := self.poll()) is not None:
            raise error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _snapshot(self, state: State) -> dict[str, Any]:
        kinds = list(state.flats[0]) if state.flats else [MASTER]
        fragments: list[dict[str, Any]] = [
            {"name": f.name, "shape": list(state.shapes[f.name]), "start": f.start, "numel": f.numel, "at": {}}
            for f in state.owned
        ]
        size = 4 * sum(f.numel for f in state.owned) * len(kinds)
        on_gpu = any(t.is_cuda for flat in state.flats for t in flat.values())
        if self._buffer is None or self._buffer.numel() != size:
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
        position = 0
        for kind in kinds:
            for fragment, entry in zip(state.owned, fragments, strict=True):
                source = state.flats[fragment.flat][kind][fragment.offset : fragment.offset + fragment.numel]
                assert source.dtype == torch.float32, f"{fragment.name}: {kind} is {source.dtype}"
                target = self._buffer[position : position + 4 * fragment.numel].view(torch.float32)
                target.copy_(source, non_blocking=on_gpu)
                entry["at"][kind] = position
                position += 4 * fragment.numel
        if on_gpu:
            torch.cuda.synchronize()
        return {"kinds": kinds, "fragments": fragments}

    def _run(self, record: dict[str, Any], position: Position, extra: dict[str, Any], begun: float) -> None:
        folder = self.root / f".tmp-{folder_name(position.step, self.branch)}"
        needs = self._needs_bytes(record)
        try:
            fail_at("checkpoint.begun")
            folder.mkdir(parents=True, exist_ok=True)
            if self.rank == 0:
                self._sweep_older(position.step)
                if (line := disk.shortage(folder, needs, 2 * self.ranks + 2)) is not None:
                    raise SaveError(f"{line}: checkpoint of step {position.step} not saved")
            self._write(folder, record)
            if self.rank == 0:
                committed = self._commit(folder, position, extra)
                self.on_commit(committed, time.perf_counter() - begun)
                fail_at("checkpoint.told")
        except Exception as error:
            self._error = self._abandon(folder, position.step, error, needs)
        else:
            if self.rank == 0:
                self._after_commit()

    def _after_commit(self) -> None:
        """What can be made up for after a later save, and so fails none."""
        try:
            self.archive()
            self._retire()
        except OSError as error:
            log.warning("%s; tried again after the next save", error)

    def _abandon(self, folder: Path, step: int, error: Exception, needs: int) -> Exception:
        """Give a failed save's room back, let rank 0 know, and say what went wrong."""
        if isinstance(error, OSError):
            line = disk.explain(error, self.root, needs)
            error = self._taken_over() or SaveError(f"{line}: checkpoint of step {step} not saved")
        if isinstance(error, TakenOver):
            return error  # the attempt that has taken over sweeps what this one wrote
        if self.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                (folder / f"{self._stem(self.rank)}.bin").unlink(missing_ok=True)
                (folder / f"{self._stem(self.rank)}.failed").write_text(str(error))
        return error

    def _stem(self, rank: int) -> str:
        return f"rank-{rank}-of-{self.ranks}"

    def _needs_bytes(self, record: dict[str, Any]) -> int:
        """What the whole checkpoint takes: every rank's share is about as large as this one's."""
        assert self._buffer is not None
        size = self._buffer.numel()
        return (size + len(json.dumps(record)) + 40 * (size // CHUNK_BYTES) + 2 * PAGE_BYTES) * self.ranks

    def _sweep_older(self, step: int) -> None:
        """Remove what failed saves of this attempt left: their other ranks may have written on."""
        for path in self.root.glob(f".tmp-step-*.b{self.branch}"):
            match = NAME.fullmatch(path.name.removeprefix(".tmp-"))
            if match and int(match[1]) < step:
                shutil.rmtree(path, ignore_errors=True)

    def _taken_over(self) -> TakenOver | None:
        """Another attempt sweeps what this one writes."""
        try:
            self.lineage.check(self.branch)
        except TakenOver as error:
            return error
        return None

    def _write(self, folder: Path, record: dict[str, Any]) -> None:
        assert self._buffer is not None
        path = folder / f"{self._stem(self.rank)}.bin"
        data = memoryview(self._buffer.numpy().data)
        chunks = []
        with path.open("wb", buffering=0) as raw:
            file = HashedFile(raw)
            for begin in range(0, len(data), CHUNK_BYTES):
                fail_at("checkpoint.writing")
                chunk = data[begin : begin + CHUNK_BYTES]
                chunks.append(xxhash.xxh3_128_hexdigest(chunk))
                written = 0
                while written < len(chunk):  # a raw write may be short when the disk fills up
                    written += raw.write(chunk[written:])
                file.hash.update(chunk)
                file.size += len(chunk)
            fail_at("checkpoint.written")
            os.fsync(raw.fileno())
        fail_at("checkpoint.synced")
        _read_back(path, chunks)
        fail_at("checkpoint.verified")
        record |= {"bytes": file.size, "hash": file.hash.hexdigest(), "chunk_bytes": CHUNK_BYTES, "chunks": chunks}
        write_durably(path.with_suffix(".json"), json.dumps(record).encode())
        fail_at("checkpoint.described")

    def _commit(self, folder: Path, position: Position, extra: dict[str, Any]) -> Committed:
        stems = [self._stem(rank) for rank in range(self.ranks)]
        self._await_peers(folder, stems)
        fail_at("checkpoint.gathered")
        files, digest = {}, int(position.digest, 16)
        for stem in stems:
            data = (folder / f"{stem}.json").read_bytes()
            record = json.loads(data)
            digest = (digest + int(record["digest_share"], 16)) % 2**128
            files[f"{stem}.json"] = {"bytes": len(data), "hash": xxhash.xxh3_128_hexdigest(data)}
            files[f"{stem}.bin"] = {"bytes": record["bytes"], "hash": record["hash"]}
            if (size := (folder / f"{stem}.bin").stat().st_size) != record["bytes"]:
                raise SaveError(f"{folder / stem}.bin: {size} bytes after writing {record['bytes']}")
        manifest = {
            "format": FORMAT_VERSION,
            "position": asdict(Position(position.step, position.samples, position.tokens, f"{digest:032x}")),
            "branch": self.branch,
            "state": extra,
            "world_size": self.ranks,
            "time": time.time(),
            "files": files,
            **self.facts,
        }
        manifest["sha256"] = _self_hash(manifest)
        data = json.dumps(manifest, indent=1).encode()
        write_durably(folder / "MANIFEST.json", data)
        fail_at("checkpoint.manifest_written")
        self.lineage.check(self.branch)
        final = self.root / folder_name(position.step, self.branch)
        folder.rename(final)
        fail_at("checkpoint.renamed")
        sync_folder(self.root)
        fail_at("checkpoint.committed")
        return Committed(final, manifest, hashlib.sha256(data).hexdigest())

    def _await_peers(self, folder: Path, stems: list[str]) -> None:
        deadline = time.monotonic() + self.settings.peer_timeout_s
        while missing := [stem for stem in stems if not (folder / f"{stem}.json").is_file()]:
            for stem in missing:
                if (failed := folder / f"{stem}.failed").is_file():
                    raise SaveError(failed.read_text() or f"{failed}: checkpoint not saved")
            if time.monotonic() > deadline:
                raise SaveError(f"{folder}: {', '.join(missing)} not written in {self.settings.peer_timeout_s:.0f} s")
            self.lineage.check(self.branch)
            time.sleep(0.02)

    def archive(self) -> None:
        """Have the newest checkpoints archived that are due; those that are there already cost a look (rank 0)."""
        if self.archiver is None or self.settings.archive is None:
            return
        every = self.settings.archive.every_steps
        matches = [(NAME.fullmatch(path.name), path) for path in live_checkpoints(self.root.parent)]
        due = [path for match, path in matches if match and int(match[1]) and int(match[1]) % every == 0]
        for path in reversed(due[:MOST_WAITING]):
            if path not in self._archived:
                self._archived.add(path)
                self.archiver.add(path)

    def _retire(self) -> None:
        """Remove what retention no longer keeps. What was just committed, and so verified, always stays."""
        run_folder = self.root.parent
        live = live_checkpoints(run_folder)
        kept = set(live[: self.settings.keep_last]) | (self.archiver.waiting() if self.archiver else set())
        every = self.settings.keep_every_steps
        for step, branch, path in all_checkpoints(run_folder):
            for_good = every is not None and step > 0 and step % every == 0 and path in live
            if path in kept or for_good or branch > self.branch:
                continue
            try:
                remove(path)
            except OSError as error:
                log.warning("%s: cannot be removed: %s; tried again after the next save", path, error.strerror)
            else:
                self.on_removed(path)


def _read_back(path: Path, chunks: list[str]) -> None:
    """Raise SaveError unless a file that was just synced comes back from the disk as it was written."""
    with path.open("rb", buffering=0) as file:
        disk.forget_cached(file.fileno())
        for number, expected in enumerate(chunks):
            chunk = os.pread(file.fileno(), CHUNK_BYTES, number * CHUNK_BYTES)
            if xxhash.xxh3_128_hexdigest(chunk) != expected:
                raise SaveError(
                    f"{path}: the disk gives back other bytes than were written, from byte {number * CHUNK_BYTES} on: "
                    f"checkpoint not saved"
                )
        disk.forget_cached(file.fileno())  # nobody reads it soon, and the host's memory has better uses


def remove(folder: Path) -> None:
    """Delete a checkpoint: first its name, then its bytes, so that a kill in between leaves nothing half."""
    doomed = folder.with_name(f".del-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    fail_at("checkpoint.removing")
    folder.rename(doomed)
    fail_at("checkpoint.unnamed")
    sync_folder(doomed.parent)
    for path in doomed.iterdir():
        fail_at("checkpoint.deleting")
        path.unlink(missing_ok=True)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(run_folder: Path) -> None:
    """Remove what killed saves and deletions left. Only the attempt that has just taken its branch may call this."""
    for path in (run_folder / "checkpoints").glob(".*"):
        if path.name.startswith((".tmp-", ".del-")):
            shutil.rmtree(path, ignore_errors=True)


# --- loading --------------------------------------------------------------------------------------------------------


def load(committed: Committed, state: State, look: Callable[[int, int, str, str], None] = lambda *_: None) -> None:
    """Fill a rank's flat tensors and step counts from a checkpoint, hashing every chunk it reads.

    `look` is told how much of it is done (done, of how much, what, in which unit).
    Raises Damaged on any difference, ConfigError where the parameters are others.
    """
    world = committed.manifest["world_size"]
    parts: dict[str, list[_Saved]] = {}
    shapes: dict[str, list[int]] = {}
    steps: dict[str, float] = {}
    files = []
    for rank in range(world):
        file = _RankFile(committed, rank, world)
        files.append(file)
        steps |= file.record["steps"]
        for entry in file.record["fragments"]:
            parts.setdefault(entry["name"], []).append(_Saved(entry["start"], entry["numel"], entry["at"], file))
            shapes[entry["name"]] = entry["shape"]
    _check_shapes(committed.folder, shapes, {n: list(s) for n, s in state.shapes.items()})
    for name, saved in parts.items():
        _check_tiling(committed.folder, name, sorted(saved, key=lambda s: s.start), shapes[name])
    for flat in state.flats:
        for tensor in flat.values():
            tensor.zero_()  # padding must be finite
    try:
        total, done = sum(fragment.numel for fragment in state.held), 0
        for fragment in state.held:
            for part in parts[fragment.name]:
                _copy(part, fragment, state.flats[fragment.flat])
            done += fragment.numel
            look(done, total, f"load {committed.folder.name}", "parameters")
    finally:
        for file in files:
            file.close()
    state.steps = {name: steps[name] for name in state.steps}
    saved_scale = files[0].record.get("loss_scale")  # every rank has the same
    if state.loss_scale is not None and saved_scale is not None:
        state.loss_scale = LossScale(**saved_scale)


def read_weights(committed: Committed) -> Iterator[tuple[str, Tensor]]:
    """(name, fp32 tensor of its full shape) of every parameter of a checkpoint, verified, one at a time."""
    world = committed.manifest["world_size"]
    files = [_RankFile(committed, rank, world) for rank in range(world)]
    try:
        entries = [(entry, file) for file in files for entry in file.record["fragments"]]
        shapes = {entry["name"]: entry["shape"] for entry, _ in entries}
        for name, shape in shapes.items():
            tensor = torch.empty(torch.Size(shape).numel(), dtype=torch.float32)
            for entry, file in entries:
                if entry["name"] == name:
                    part = _Saved(entry["start"], entry["numel"], entry["at"], file)
                    _copy(part, Fragment(name, 0, tensor.numel(), 0, 0), {MASTER: tensor})
            yield name, tensor.view(shape)
    finally:
        for file in files:
            file.close()


@dataclass(frozen=True)
class _Saved:
    """A saved fragment: the range it covers, and where each kind lies in its file."""

    start: int
    numel: int
    at: dict[str, int]
    file: _RankFile


def _copy(saved: _Saved, wanted: Fragment, flat: dict[str, Tensor]) -> None:
    """Copy what two ranges of one parameter share, for every kind that the target holds."""
    begin = max(saved.start, wanted.start)
    count = min(saved.start + saved.numel, wanted.start + wanted.numel) - begin
    if count <= 0:
        return
    for kind, target in flat.items():
        if kind not in saved.at:
            raise Damaged(f"{saved.file.path}: holds no {kind} of {wanted.name}")
        data = saved.file.read(saved.at[kind] + 4 * (begin - saved.start), 4 * count)
        offset = wanted.offset + begin - wanted.start
        target[offset : offset + count].copy_(torch.frombuffer(data, dtype=torch.float32))


def _check_shapes(folder: Path, saved: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise ConfigError(
                f"{folder}: parameter {name} is {saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} in "
                f"this model"
            )


def _check_tiling(folder: Path, name: str, saved: list[_Saved], shape: list[int]) -> None:
    position = 0
    for part in saved:
        if part.start != position:
            raise Damaged(f"{folder}: parameter {name}: elements {position} to {part.start} are in no file, or in two")
        position += part.numel
    if position != torch.Size(shape).numel():
        raise Damaged(f"{folder}: parameter {name}: {position} elements of {torch.Size(shape).numel()}")


class _RankFile:
    """One rank's file, read by chunks that are verified before any of their bytes are used."""

    def __init__(self, committed: Committed, rank: int, world: int) -> None:
        stem = f"rank-{rank}-of-{world}"
        data = (committed.folder / f"{stem}.json").read_bytes()
        if xxhash.xxh3_128_hexdigest(data) != committed.manifest["files"][f"{stem}.json"]["hash"]:
            raise Damaged(f"{committed.folder / stem}.json: damaged (hash differs)")
        self.record: dict[str, Any] = json.loads(data)
        self.path = committed.folder / f"{stem}.bin"
        self._descriptor: int | None = None
        self._held: tuple[int, bytes] = (-1, b"")

    def read(self, offset: int, size: int) -> bytearray:
        data, step = bytearray(size), self.record["chunk_bytes"]
        position = offset
        while position < offset + size:
            number, inside = divmod(position, step)
            chunk = self._chunk(number)
            part = chunk[inside : inside + offset + size - position]
            data[position - offset : position - offset + len(part)] = part
            position += len(part)
        return data

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _chunk(self, number: int) -> bytes:
        if self._held[0] != number:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY)
            step = self.record["chunk_bytes"]
            chunk = os.pread(self._descriptor, step, number * step)
            if xxhash.xxh3_128_hexdigest(chunk) != self.record["chunks"][number]:
                raise Damaged(f"{self.path}: damaged between byte {number * step} and {number * step + len(chunk)}")
            self._held = (number, chunk)
        return self._held[1]
