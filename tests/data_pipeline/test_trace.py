"""From samples to documents and back, against every token labelled by hand; and digests read again."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import build
from data_pipeline.document import Document
from data_pipeline.find import by_ids
from data_pipeline.order import Order, Segment, Skips, Steps, Withdrawal, members
from data_pipeline.proof import stretch_digests
from data_pipeline.shards import SealedSlice, ShardError, Shards, SliceWriter, file_hash, read_parquet, seal
from data_pipeline.stream import Corpora, Data, Stream
from data_pipeline.trace import documents_in, documents_of
from tests.corpora import FORMAT, make_corpus, make_slice

T = 128
ROWS = FORMAT.block_tokens // T
Label = tuple[str, int]  # a document's id, and the number of its token


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """alpha with two generations, beta, and edges, whose documents begin where samples, blocks and shards do."""
    place = tmp_path_factory.mktemp("corpora")
    parts = [replace(make_slice(place / "alpha", f"s{n}", n, 60), generation=n // 2) for n in range(4)]
    seal(place / "alpha", FORMAT, {"corpus": "alpha", "tokenizer_sha256": "0" * 64}, parts)
    make_corpus(place / "beta", 2, slices=1, documents=60)
    (place / "edges/slices/s0").mkdir(parents=True)
    writer = SliceWriter(place / "edges/slices/s0", FORMAT)
    for n, tokens in enumerate([512] * 36 + [1, 127, 128, 896, 1024, 1151, 1, 768, 30, 40]):
        document = Document("", f"s0/{n}", "edges", f"https://example.org/s0/{n}")
        writer.add(document, np.full(tokens - 1, n), "train")
    shards = writer.close()
    (place / "edges/slices/s0/slice.json").write_text("{}")
    hashes = (file_hash(place / "edges/slices/s0" / name) for name in ("ids.npy", "slice.json"))
    seal(place / "edges", FORMAT, {"tokenizer_sha256": "0" * 64}, [SealedSlice("s0", 0, shards, *hashes)])
    return place


@pytest.fixture(scope="module")
def data(folder: Path) -> Data:
    sources = {name: {"shards": str(folder / name)} for name in ("alpha", "beta", "edges")}
    return build(Data, {"seq_tokens": T, "sources": sources, "group_blocks": 2}, "test")


@pytest.fixture(scope="module")
def corpora(data: Data) -> Corpora:
    return Corpora(data)


@pytest.fixture(scope="module")
def order(corpora: Corpora) -> Order:
    generations = {"alpha": 2, "beta": 1, "edges": 1}
    return Order(5, corpora.pools(generations), 4, 2, [Segment(0, dict.fromkeys(generations, 1), generations)])


def labels(shards: Shards, seq_tokens: int = T) -> list[list[Label]]:
    """What each sample of a pool holds, token by token: the slices' streams as their sidecars have them."""
    table, found = shards.table, []
    for slice in dict.fromkeys(table["slice"].to_pylist()):
        mine = [i for i, name in enumerate(table["slice"].to_pylist()) if name == slice]
        rows = [r for i in mine for r in read_parquet(shards.path(i, "docs.parquet").read_bytes()).to_pylist()]
        stream = [(row["id"], token) for row in rows for token in range(row["tokens"])]
        blocks = sum(table["blocks"][i].as_py() for i in mine)
        rows_in_all = blocks * FORMAT.block_tokens // seq_tokens
        found += [stream[n * seq_tokens : (n + 1) * seq_tokens + 1] for n in range(rows_in_all)]
    return found


def test_the_labels_are_whole(corpora: Corpora, order: Order) -> None:
    for shards in corpora.shards(order.pools):
        found = labels(shards)
        assert len(found) == shards.blocks * ROWS and {len(sample) for sample in found} == {T + 1}
        assert len(shards) > 2
    edges = [found[n * ROWS - 1][-1][1] for n in range(1, shards.blocks + 1)]
    assert edges.count(0) > 17 and max(edges) > 0  # blocks whose extra token is the first of a document, and others


def test_every_sample_leads_to_its_documents(corpora: Corpora, order: Order) -> None:
    shards = corpora.shards(order.pools)
    by_pool, samples = [labels(each) for each in shards], np.arange(900)
    seen: defaultdict[int, list[Any]] = defaultdict(list)
    for each in documents_in(order, shards, samples, T):
        seen[each.sample] += [(each.source, each.generation, each.epoch, each.id, n)
                              for n in range(each.first_token, each.end_token)]  # fmt: skip
        assert each.uri == f"https://example.org/{each.id}"
    named: dict[str, None] = {}
    at = order.locate(samples)
    for n, pool, epoch, block, row in zip(samples.tolist(), at.pool, at.epoch, at.block, at.row, strict=True):
        held, place = by_pool[pool][block * ROWS + row], order.pools[pool]
        assert seen[n] == [(place.source, place.generation, epoch, *label) for label in held]
        named |= {f"{place.source}:{id}": None for id, _ in held}
    assert at.epoch.max() > 0
    assert documents_of(order, shards, samples, T) == list(named)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("name", ["alpha", "beta", "edges"])
def test_every_document_leads_to_its_samples(name: str, checked: bool, corpora: Corpora) -> None:
    manifest = corpora.manifests[name]
    held = defaultdict(set)
    for generation in range(len(manifest.generations)):
        for place, sample in enumerate(labels(manifest.shards("train", generation))):
            for id, _ in sample:
                held[generation, id].add(place)
    count = manifest.table["documents"].to_pylist()
    slices = {"alpha": ["s0", "s1", "s2", "s3"]}.get(name, ["s0"])
    ids = [f"{slice}/{n}" for slice in slices for n in range(46 if name == "edges" else 60)]
    found = list(by_ids(manifest, [*ids, "nobody's"], checked)) if checked else [
        document for id in ids[::7] for document in by_ids(manifest, [id])
    ]  # fmt: skip
    assert sorted(document.id for document in found) == sorted(ids if checked else ids[::7])
    assert sum(count) == len(ids)
    for document in found:
        expected = held[document.generation, document.id] if document.split == "train" else set()
        places = document.samples(T, FORMAT.block_tokens) if document.split == "train" else range(0)
        assert set(places) == expected, document
        assert (document.split == "validation") == (name != "edges" and int(document.id.split("/")[1]) % 10 == 9)
    if name == "edges" and checked:  # the last one lies in the tail, the one before it in the tail but for a target
        assert [len(document.samples(T, FORMAT.block_tokens)) for document in found][-2:] == [1, 0]


def test_damage_is_not_taken_for_absence(tmp_path: Path) -> None:
    manifest = make_corpus(tmp_path / "alpha", 1, slices=1, documents=60)
    path = tmp_path / "alpha/slices/s0/ids.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:])
    with pytest.raises(ShardError, match=r"ids\.npy: damaged \(hash differs\); see data-prep verify$"):
        list(by_ids(manifest, ["s0/1"], checked=True))
    path.write_bytes(whole)
    shards = manifest.shards("train", 0)
    sidecar = shards.path(0, "docs.parquet")
    sidecar.write_bytes(shards.path(1, "docs.parquet").read_bytes())
    with pytest.raises(ShardError, match=r"docs\.parquet: the file is damaged; run data-prep repair "):
        list(by_ids(manifest, ["s0/0"], checked=True))


# --- digests read again -----------------------------------------------------------------------------------------------


def test_digests_read_again_are_those_of_the_stream(data: Data, corpora: Corpora, order: Order) -> None:
    steps = Steps([(0, 10), (60, 25)])
    ranges = {0: np.array([[3, 9], [40, 80]]), 2: np.array([[0, 5]])}
    skips = Skips([(13, 17)], order, [Withdrawal(100, ranges)])
    stream = Stream(order, steps, skips, corpora.shards(order.pools), data, 4)
    ends = [0, 1, 2, 7, 30, 31]
    fed = [sum(stream.batch(step).digest for step in range(*pair)) % 2**128 for pair in pairwise(ends)]
    bounds = [steps.start(step) for step in ends]
    for workers in (1, 2):
        assert list(stretch_digests(order, skips, data, bounds, workers)) == fed
    assert list(stretch_digests(order, skips, data, bounds[2:4])) == fed[2:3]
    assert list(stretch_digests(order, skips, data, bounds[:1])) == []


def test_a_stretch_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    manifest = make_corpus(tmp_path / "alpha", 1, slices=1, documents=60)
    data = build(Data, {"seq_tokens": T, "sources": {"alpha": {"shards": str(tmp_path / "alpha")}}}, "test")
    order = Order(1, Corpora(data).pools({"alpha": 1}), 2, 2, [Segment(0, {"alpha": 1}, {"alpha": 1})])
    whole = list(stretch_digests(order, Skips(), data, [0, 10, 20, 30]))
    block = int(order.locate(np.array([15])).block[0])
    hit = [bool((order.locate(np.arange(n, n + 10)).block == block).any()) for n in (0, 10, 20)]
    shards = manifest.shards("train", 0)
    shard, row = shards.locate(block)
    tar = shards.path(shard, "tar")
    damaged = bytearray(tar.read_bytes())
    damaged[int(np.load(shards.path(shard, "index.npy"))[row]["offset"]) + 700] ^= 1
    tar.write_bytes(damaged)
    for found, before, is_hit in zip(stretch_digests(order, Skips(), data, [0, 10, 20, 30]), whole, hit, strict=True):
        assert (isinstance(found, str) and f"{tar}: block {row} is damaged" in found) if is_hit else found == before
    assert hit[1]


def test_members_of_ranges() -> None:
    assert members(np.array([[3, 5], [9, 9], [10, 12]])).tolist() == [3, 4, 10, 11]
    assert members(np.zeros((0, 2), np.int64)).tolist() == []
