"""What a run no longer feeds: documents that were taken down, and damaged blocks.

`pretrain amend RUN takedown=FILE` and `skip_blocks=SOURCE:GENERATION:BLOCK[-BLOCK]` withdraw samples, in every epoch
from the segment's first sample on. They keep their numbers, get weight 0, and are not counted as consumed. Beside the
segment records lie, never changed and named by their hash,

    withdrawn-<hash>.parquet   source, generation, begin, end: ranges of samples (block * rows of a block + row)
    takedown-<hash>.txt        the ids as they were given, which are sought in what later amendments add, too
"""

from __future__ import annotations

import hashlib
import io
import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs import ConfigError
from data_pipeline.find import Held, by_ids
from data_pipeline.order import Ints
from data_pipeline.shards import read_parquet, write_durably
from data_pipeline.stream import Corpora

TAKEDOWN, SKIP_BLOCKS = "takedown", "skip_blocks"
BLOCKS = re.compile(r"(?P<source>[\w-]+):(?P<generation>\d+):(?P<first>\d+)(?:-(?P<last>\d+))?")

Ranges = dict[tuple[str, int], Ints]  # by source and generation: int64 (n, 2), begins and ends of samples
Generations = Mapping[str, int]  # of each source, those in use


@dataclass(frozen=True)
class Withdrawn:
    """What a segment record keeps of it. `files`: sha256 by name; `folder` is where they lie, which is not kept."""

    what: list[str]  # the changes of amend, each with what it came to
    samples: int
    files: dict[str, str]
    folder: str = field(default="", compare=False)

    def ranges(self) -> Ranges:
        """The samples. Raises ConfigError where the file is gone or not as it was written."""
        (data,) = (self._read(name) for name in self.files if name.endswith(".parquet"))
        table = read_parquet(data)
        keys = list(zip(table["source"].to_pylist(), table["generation"].to_pylist(), strict=True))
        spans = np.stack([table["begin"].to_numpy(), table["end"].to_numpy()], axis=1)
        return {key: spans[[i for i, k in enumerate(keys) if k == key]] for key in dict.fromkeys(keys)}

    def ids(self) -> list[str]:
        """The ids that were taken down, as they were given."""
        return [
            id for name in self.files if name.endswith(".txt") for id in self._read(name).decode().split("\n") if id
        ]

    def copy_to(self, folder: Path) -> None:
        """Bring the files to another run's records."""
        for name in self.files:
            if not (folder / name).is_file():
                write_durably(folder / name, self._read(name))

    def remove(self, unless: Container[str] = ()) -> None:
        """Remove the files of a record that is not to be."""
        for name in self.files:
            if name not in unless:
                (Path(self.folder) / name).unlink()

    def _read(self, name: str) -> bytes:
        path = Path(self.folder) / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}, but a segment record names it; bring it back") from None
        if hashlib.sha256(data).hexdigest() != self.files[name]:
            raise ConfigError(f"{path}: damaged (hash differs from its segment record's); bring back a whole one")
        return data


@dataclass(frozen=True)
class Found:
    """What is to be withdrawn: samples, and for those who asked for it, what became of their ids."""

    what: list[str]
    ranges: Ranges
    ids: list[str]  # as given
    held: list[tuple[str, Held]]  # source and place of each document found
    of_documents: Ranges  # the samples of those
    unknown: list[str]  # ids that no source has

    def write(self, folder: Path) -> Withdrawn:
        """Write the files; the same ones where they lie there already."""
        folder.mkdir(parents=True, exist_ok=True)
        keys = sorted(self.ranges)
        columns = {
            "source": pa.array([k[0] for k in keys for _ in self.ranges[k]], pa.string()),
            "generation": pa.array([k[1] for k in keys for _ in self.ranges[k]], pa.int32()),
            "begin": pa.array([int(r[0]) for k in keys for r in self.ranges[k]], pa.int64()),
            "end": pa.array([int(r[1]) for k in keys for r in self.ranges[k]], pa.int64()),
        }
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns), buffer, compression="zstd")
        contents = {"withdrawn-{}.parquet": buffer.getvalue()}
        if self.ids:
            contents["takedown-{}.txt"] = "".join(f"{id}\n" for id in self.ids).encode()
        files = {}
        for pattern, data in contents.items():
            sha256 = hashlib.sha256(data).hexdigest()
            files[pattern.format(sha256[:16])] = sha256
            write_durably(folder / pattern.format(sha256[:16]), data)
        return Withdrawn(self.what, sum(size(r) for r in self.ranges.values()), files, str(folder))


def split(changes: Sequence[str]) -> tuple[list[str], list[str]]:
    """The changes of an amendment that are of its configuration, and those that withdraw samples."""
    withdrawing = [change for change in changes if change.partition("=")[0] in (TAKEDOWN, SKIP_BLOCKS)]
    return [change for change in changes if change not in withdrawing], withdrawing


def find(
    corpora: Corpora,
    generations: Generations,
    changes: Sequence[str],
    earlier: Sequence[str] = (),
    before: Generations | None = None,
) -> Found | None:
    """What `changes` withdraw of the generations in use; None where that is nothing.

    `earlier` are ids that were taken down already when the generations `before` were in use: they are sought in those
    that came since. Raises ConfigError, ShardError.
    """
    what: list[str] = []
    spans: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
    files: dict[str, list[str]] = {}
    held: list[tuple[str, Held]] = []
    unknown: list[str] = []
    for change in changes:
        name, _, value = change.partition("=")
        if name == SKIP_BLOCKS:
            key, blocks = _blocks(corpora, generations, value)
            rows = corpora.manifests[key[0]].format.block_tokens // corpora.data.seq_tokens
            spans[key].append((blocks.start * rows, blocks.stop * rows))
            what.append(change)
        else:
            files[change] = read_ids(Path(value))
    given = [id for ids in files.values() for id in ids]
    if given:
        held = list(documents(corpora, generations, given))
        known = {name for source, document in held for name in (document.id, f"{source}:{document.id}")}
        unknown = [id for id in given if id not in known]
        what += [f"{change} ({len(known.intersection(ids))} of {len(ids)} ids found)" for change, ids in files.items()]
    if earlier:
        added = list(documents(corpora, generations, earlier, before))
        what += [f"{len(added)} documents of earlier takedowns in what was added"] if added else []
        held += added
    of_documents: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
    for source, document in held:
        samples = document.samples(corpora.data.seq_tokens, corpora.manifests[source].format.block_tokens)
        if document.split == "train" and len(samples):
            of_documents[source, document.generation].append((samples.start, samples.stop))
    if not what:
        return None
    ranges = {key: merged([*spans[key], *of_documents[key]]) for key in {**spans, **of_documents}}
    return Found(what, ranges, given, held, {key: merged(each) for key, each in of_documents.items()}, unknown)


def read_ids(path: Path) -> list[str]:
    """The ids of a file, one a line, each once. Raises ConfigError."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # an id may have other line ends in it
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(
            f"{TAKEDOWN}={path}: {reason}; expected a file with an id, or SOURCE:ID, on each line"
        ) from None
    ids = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not ids:
        raise ConfigError(f"{TAKEDOWN}={path}: no ids; expected an id, or SOURCE:ID, on each line")
    return ids


def documents(
    corpora: Corpora,
    generations: Generations,
    ids: Sequence[str],
    before: Generations | None = None,
    checked: bool = True,
) -> Iterator[tuple[str, Held]]:
    """(source, place) of every document of these ids in the generations in use, but for those `before`.

    An id may have its source in front. `checked`: see `by_ids`.
    """
    for source, count in generations.items():
        first = before.get(source, 0) if before is not None else 0
        mine = set(ids) | {id.removeprefix(f"{source}:") for id in ids}
        for document in by_ids(corpora.manifests[source], mine, checked) if first < count else ():
            if first <= document.generation < count:
                yield source, document


def _blocks(corpora: Corpora, generations: Generations, value: str) -> tuple[tuple[str, int], range]:
    match = BLOCKS.fullmatch(value)
    if match is None:
        raise ConfigError(
            f"{SKIP_BLOCKS}={value}: expected SOURCE:GENERATION:BLOCK or SOURCE:GENERATION:BLOCK-BLOCK, as in wiki:0:17"
        )
    source, generation = match["source"], int(match["generation"])
    if source not in generations:
        raise ConfigError(f"{SKIP_BLOCKS}={value}: no source {source}; this run has {', '.join(generations)}")
    if generation >= generations[source]:
        raise ConfigError(f"{SKIP_BLOCKS}={value}: {generations[source]} generations of {source} are in use, from 0")
    first, last = int(match["first"]), int(match["last"] or match["first"])
    blocks = corpora.manifests[source].generations[generation]["train"]["blocks"]
    if not first <= last < blocks:
        raise ConfigError(f"{SKIP_BLOCKS}={value}: expected blocks from 0 to {blocks - 1}, the first one first")
    return (source, generation), range(first, last + 1)


def merged(spans: Iterable[tuple[int, int]]) -> Ints:
    """Ranges sorted and apart, int64 (n, 2)."""
    found: list[list[int]] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1][1] = max(end, found[-1][1])
        else:
            found.append([begin, end])
    return np.array(found, np.int64).reshape(-1, 2)


def size(ranges: Ints) -> int:
    """How many samples lie in ranges."""
    return int((ranges[:, 1] - ranges[:, 0]).sum())
