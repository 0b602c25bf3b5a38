"""Duplicates across slices and corpora: marks to pairs to the documents that go.

    texts      per slice       the kept documents' texts, compressed, and their marks              (slices.py)
    buckets    by range        of all marks in some ranges of hashes: pairs of documents that share one
    clusters   once            connected pairs; the first document of each cluster stays, the others are listed to go
    slices     per slice       the texts without those that go                                     (slices.py)

A *place* is a number: a slice's number in the round, then the document's ordinal in its slice. Slices are numbered by
what stays first: slices that are sealed already, then by the config's order of corpora, then by the plan's order. So
the smallest place of a cluster stays, whoever found the pairs, in whatever order. What is sealed is never taken back.

A *round* is one such numbering. As long as nothing is sealed, new inputs make a new round of all slices; then only
those that are not sealed lose documents. Every task of every stage makes one folder, whole or absent, as a slice does.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from configs import ConfigError, fingerprint
from data_pipeline.dedup import MARKS, RANGES, U64, Dedup, mark_edges, read_ids, read_marks
from data_pipeline.plan import Plan, Slice
from data_pipeline.shards import RECORD, sync_file, sync_folder, write_durably

FOLDER = "duplicates.d"  # no corpus can have this name
ROUNDS = "rounds.json"
DROPS = "drops.json"
PAIRS = "pairs"
MARKS_AT_ONCE = 2**23  # of a bucket's in memory: about 400 MB with what sorting them takes
PAIRS_AT_ONCE = 2**23
MARKS_PER_BUCKET = 2**26
BYTES_PER_DOCUMENT = 1500  # of text, about: so many tasks there are
PAIR = np.dtype([("first", "<u8"), ("second", "<u8"), ("exact", "?")])
REASONS = ("near duplicate", "duplicate")  # by whether an earlier document has the same text
DROP_TABLE = pa.schema([("ordinal", pa.uint32()), ("exact", pa.bool_()), ("stays", pa.string())])


@dataclass(frozen=True)
class Round:
    """A numbering of slices (corpus, name). The first `sealed` of them are never changed; `buckets` is a number."""

    slices: tuple[tuple[str, str], ...]
    sealed: int
    buckets: int
    marks: str  # fingerprint of what the marks and the clusters depend on

    @cached_property
    def name(self) -> str:
        return fingerprint(asdict(self))[:16]

    def folder(self, out: Path) -> Path:
        return out / FOLDER / self.name

    def is_decided(self, out: Path) -> bool:
        """Whether it is known which documents go."""
        return self.sealed == len(self.slices) or (clusters_folder(out, self) / RECORD).is_file()


def plan_round(out: Path, dedup: Dedup, corpora: Mapping[str, tuple[Plan, int]], text_bytes: float) -> None:
    """Number the slices of all corpora (each its plan, and how many of its generations are sealed), in their order.

    Nothing is written where the last round still fits. The caller holds a lease.
    """
    slices = [(c, s.name, s.generation < sealed) for c, (plan, sealed) in corpora.items() for s in plan.slices]
    fresh = [(corpus, name) for corpus, name, is_sealed in slices if not is_sealed]
    sealed = [(corpus, name) for corpus, name, is_sealed in slices if is_sealed]
    rounds = read_rounds(out)
    marks = fingerprint([dedup.identity(), dedup.across])
    if rounds:
        last = rounds[-1]
        if not fresh:
            return
        known, still = set(last.slices), set(fresh)
        same = known == {*fresh, *sealed} and [each for each in last.slices if each in still] == fresh
        if same and last.marks == marks:
            return
        before = [each for each in last.slices if each in set(sealed)]
        sealed = before + [each for each in sealed if each not in known]
    expected = text_bytes / BYTES_PER_DOCUMENT * dedup.marks
    buckets = min(RANGES, 1 << max(0, int(expected / MARKS_PER_BUCKET)).bit_length())
    new = Round((*sealed, *fresh), len(sealed), buckets, marks)
    (out / FOLDER).mkdir(exist_ok=True)
    tree = {"version": 1, "rounds": [asdict(each) for each in [*rounds, new]]}
    write_durably(out / FOLDER / ROUNDS, (json.dumps(tree, indent=1) + "\n").encode())


def read_rounds(out: Path) -> list[Round]:
    """All rounds, the last one being the one to work on."""
    path = out / FOLDER / ROUNDS
    try:
        rounds = json.loads(path.read_text(encoding="utf-8"))["rounds"]
        return [Round(tuple((c, s) for c, s in r["slices"]), r["sealed"], r["buckets"], r["marks"]) for r in rounds]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: damaged ({error}); restore it, or prepare into another `out`") from None


def last_round(out: Path) -> Round:
    rounds = read_rounds(out)
    if not rounds:
        raise ConfigError(f"{out}: its duplicates are not planned; run data-prep plan")
    return rounds[-1]


# --- buckets --------------------------------------------------------------------------------------------------------


def write_bucket(folder: Path, out: Path, round: Round, dedup: Dedup, number: int) -> int:
    """Pairs of documents that share a mark of the bucket's ranges, into `folder`. How many."""
    texts = [texts_folder(out, *each) for each in round.slices]
    for path in texts:
        if not path.is_dir():
            raise ConfigError(f"{path}: not made; the stage texts comes before the stage buckets")
    begin, end = RANGES * number // round.buckets, RANGES * (number + 1) // round.buckets
    salts = _salts(round, dedup)
    count = 0
    with (folder / PAIRS).open("wb") as file:
        for name in MARKS:
            paths = [path / name for path in texts]
            for first, last in _groups(paths, begin, end):
                pairs = _pairs(*_gathered(paths, salts, first, last))
                file.write(pairs.tobytes())
                count += len(pairs)
    sync_file(folder / PAIRS)
    return count


def texts_folder(out: Path, corpus: str, slice_name: str) -> Path:
    return out / corpus / "texts" / slice_name


def _salts(round: Round, dedup: Dedup) -> U64:
    """What makes marks of different corpora differ where each is for itself; one for each slice."""
    corpora = {corpus: int(fingerprint(corpus)[:16], 16) for corpus, _ in round.slices}
    salts = [corpora[corpus] if dedup.across == "each" else 0 for corpus, _ in round.slices]
    return np.array(salts, np.uint64)


def _groups(paths: Sequence[Path], begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges from `begin` to `end`, with about MARKS_AT_ONCE marks in each group."""
    edges = sum((mark_edges(path, begin, end) for path in paths), np.zeros(end - begin + 1, np.int64))
    first = 0
    for last in range(1, end - begin + 1):
        if last == end - begin or edges[last + 1] - edges[first] > MARKS_AT_ONCE:
            yield begin + first, begin + last
            first = last


def _gathered(paths: Sequence[Path], salts: U64, first: int, last: int) -> tuple[npt.NDArray[Any], U64]:
    """All slices' marks of some ranges, and their places."""
    parts = [read_marks(path, first, last) for path in paths]
    marks = np.concatenate(parts)
    lengths = [len(part) for part in parts]
    marks["key"] ^= np.repeat(salts, lengths)
    numbers = np.repeat(np.arange(len(paths), dtype=np.uint64), lengths)
    return marks, (numbers << np.uint64(32)) | marks["ordinal"]


def _pairs(marks: npt.NDArray[Any], places: U64) -> npt.NDArray[Any]:
    """(first, second): each place with the first of those that share its mark; sorted, each once."""
    exact = "rest" in (marks.dtype.names or ())
    order = np.lexsort((marks["rest"], marks["key"])) if exact else np.argsort(marks["key"], kind="stable")
    keys, places = marks[order], places[order]
    differs = keys["key"][1:] != keys["key"][:-1]
    if exact:
        differs |= keys["rest"][1:] != keys["rest"][:-1]
    starts = np.flatnonzero(np.concatenate([[True], differs])[: len(keys)])
    lengths = np.diff(np.append(starts, len(keys)))
    several = np.repeat(lengths > 1, lengths)
    firsts = np.repeat(np.minimum.reduceat(places, starts), lengths) if len(starts) else places
    taken = several & (places != firsts)
    return _pair_table(firsts[taken], places[taken], exact)


def _pair_table(first: U64, second: U64, exact: bool) -> npt.NDArray[Any]:
    """Sorted, each once."""
    order = np.lexsort((first, second))
    first, second = first[order], second[order]
    new = np.ones(len(first), np.bool_)
    new[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    pairs = np.empty(int(new.sum()), PAIR)
    pairs["first"], pairs["second"], pairs["exact"] = first[new], second[new], exact
    return pairs


# --- clusters -------------------------------------------------------------------------------------------------------


def write_clusters(folder: Path, out: Path, round: Round) -> int:
    """The documents that go, of each slice that is not sealed, into `folder`. How many."""
    buckets = [round.folder(out) / "buckets" / bucket.name / PAIRS for bucket in bucket_slices(round)]
    forest, exact = np.empty((0, 2), np.uint64), [np.empty(0, np.uint64)]
    for pairs in _chunks(buckets):
        forest = _forest(np.concatenate([forest, np.column_stack([pairs["first"], pairs["second"]])]))
        exact.append(pairs["second"][pairs["exact"]])
    gone, stays = _decided(forest, out, round)
    same_text = np.isin(gone, np.concatenate(exact))
    _write_drops(folder, out, round, gone, stays, same_text)
    return len(gone)


def bucket_slices(round: Round) -> tuple[Slice, ...]:
    """A bucket is planned as a slice without inputs."""
    return tuple(Slice(0, number, ()) for number in range(round.buckets))


def _chunks(paths: Sequence[Path]) -> Iterator[npt.NDArray[Any]]:
    """The pairs of all buckets, many at a time."""
    waiting: list[npt.NDArray[Any]] = []
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"{path.parent}: not made; the stage buckets comes before the stage clusters")
        with path.open("rb") as file:
            while len(pairs := np.fromfile(file, PAIR, PAIRS_AT_ONCE)):
                waiting.append(pairs)
                if sum(map(len, waiting)) >= PAIRS_AT_ONCE:
                    yield np.concatenate(waiting)
                    waiting = []
    if waiting:
        yield np.concatenate(waiting)


def _forest(pairs: U64) -> U64:
    """The connected components of a graph of places, shape (edges, 2), each as a star around its first place.

    Memory is that of its places, not of all pairs ever found. Source: scipy.sparse.csgraph.connected_components.
    """
    if not len(pairs):
        return pairs
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    nodes, ends = np.unique(pairs, return_inverse=True)
    first, second = ends.reshape(-1, 2).T
    graph = coo_matrix((np.ones(len(first), np.bool_), (first, second)), shape=(len(nodes), len(nodes)))
    _, labels = connected_components(graph, directed=False)
    _, smallest = np.unique(labels, return_index=True)  # nodes are sorted, so the first of a label is the smallest
    roots = nodes[smallest[labels]]
    others = roots != nodes
    return np.column_stack([roots[others], nodes[others]])


def _decided(forest: U64, out: Path, round: Round) -> tuple[U64, U64]:
    """Of each cluster: the places that go, sorted, and for each the place that stays.

    A sealed document that went in an earlier round keeps nobody from staying, and only what is not sealed goes.
    """
    roots = np.concatenate([forest[:, 0], np.unique(forest[:, 0])])
    places = np.concatenate([forest[:, 1], np.unique(forest[:, 0])])
    went = np.isin(places, _went_before(places, out, round))
    order = np.lexsort((places, went, roots))
    roots, places = roots[order], places[order]
    starts = np.flatnonzero(np.concatenate([[True], roots[1:] != roots[:-1]])[: len(roots)])
    stays = np.repeat(places[starts], np.diff(np.append(starts, len(roots))))
    goes = (places != stays) & (places >> np.uint64(32) >= np.uint64(round.sealed))
    order = np.argsort(places[goes])
    return places[goes][order], stays[goes][order]


def _went_before(places: U64, out: Path, round: Round) -> U64:
    """The places of documents of sealed slices that earlier rounds let go."""
    if not round.sealed:
        return np.empty(0, np.uint64)
    lists = drop_lists(out)
    found = [np.empty(0, np.uint64)]
    for number in np.unique(places >> np.uint64(32)):
        if number < round.sealed and (drops := lists.get(round.slices[int(number)])) is not None:
            ordinals = np.array([drop.ordinal for drop in read_drops(drops)], np.uint64)
            found.append((np.uint64(number) << np.uint64(32)) | ordinals)
    return np.concatenate(found)


def _write_drops(
    folder: Path, out: Path, round: Round, gone: U64, stays: U64, same_text: npt.NDArray[np.bool_]
) -> None:
    ids = _ids(out, round, np.unique(stays))
    hashes: dict[str, dict[str, str]] = defaultdict(dict)
    edges = np.searchsorted(gone, np.arange(len(round.slices) + 1, dtype=np.uint64) << np.uint64(32))
    for number in range(round.sealed, len(round.slices)):
        corpus, name = round.slices[number]
        mine = slice(edges[number], edges[number + 1])
        if mine.start == mine.stop:
            hashes[corpus][name] = ""
            continue
        named = [ids[int(place)] for place in stays[mine]]
        ordinals = (gone[mine] & np.uint64(2**32 - 1)).astype(np.uint32)
        listed = [ordinals.tolist(), same_text[mine].tolist(), named]
        path = folder / corpus / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(
            pa.table([pa.array(c, t.type) for c, t in zip(listed, DROP_TABLE, strict=True)], DROP_TABLE), path
        )
        sync_file(path)
        hashes[corpus][name] = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    for corpus_folder in folder.iterdir():
        sync_folder(corpus_folder)
    write_durably(folder / DROPS, (json.dumps(hashes, indent=1) + "\n").encode())


def _ids(out: Path, round: Round, places: U64) -> dict[int, str]:
    """`corpus: id` of each place; the places are sorted."""
    named: dict[int, str] = {}
    for number, group in itertools.groupby(places.tolist(), key=lambda place: place >> 32):
        mine = list(group)
        corpus, name = round.slices[number]
        ids = read_ids(texts_folder(out, corpus, name), np.array(mine, np.uint64) & np.uint64(2**32 - 1))
        named |= {place: f"{corpus}: {id}" for place, id in zip(mine, ids.to_pylist(), strict=True)}
    return named


# --- what goes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DropList:
    """Which documents of a slice go: the list's sha256 ("" for none), and where it is."""

    hash: str
    path: Path


@dataclass(frozen=True)
class Drop:
    """One document that goes: its ordinal among the slice's texts, why, and `corpus: id` of the one that stays."""

    ordinal: int
    reason: str
    stays: str


def drop_lists(out: Path) -> dict[tuple[str, str], DropList]:
    """By corpus and slice, of the last finished round that decided about the slice."""
    lists: dict[tuple[str, str], DropList] = {}
    for round in read_rounds(out):
        folder = clusters_folder(out, round)
        if not (folder / RECORD).is_file():
            continue
        for corpus, hashes in json.loads((folder / DROPS).read_text(encoding="utf-8")).items():
            for name, hash_ in hashes.items():
                lists[corpus, name] = DropList(hash_, folder / corpus / f"{name}.parquet")
    return lists


def clusters_folder(out: Path, round: Round) -> Path:
    return round.folder(out) / "clusters" / "0-00000"


def read_drops(drops: DropList) -> list[Drop]:
    """Sorted by ordinal."""
    if not drops.hash:
        return []
    try:
        rows = pq.read_table(drops.path).to_pylist()
    except FileNotFoundError:
        raise ConfigError(f"{drops.path}: the list of duplicates is gone; restore it") from None
    return [Drop(row["ordinal"], REASONS[row["exact"]], row["stays"]) for row in rows]


def remove_what_is_done(out: Path) -> None:
    """Remove pairs, and rounds that decide about no slice any more."""
    rounds = read_rounds(out)
    needed = {drops.path.parents[3] for drops in drop_lists(out).values()}
    for round in rounds:
        shutil.rmtree(round.folder(out) / "buckets", ignore_errors=True)
        if round.folder(out) not in needed:
            shutil.rmtree(round.folder(out), ignore_errors=True)
