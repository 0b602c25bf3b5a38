"""The order against its description: golden values, and a slow simulation that deals every block by hand."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs import ConfigError, fingerprint
from data_pipeline.order import (
    PHASE,
    ROUNDS,
    VERSION,
    WINDOW,
    Mixture,
    Order,
    Pool,
    Segment,
    Skips,
    Steps,
    Withdrawal,
    choose_lanes,
    cut,
    cut_range,
    digest,
    permute,
    unpermute,
)
from data_pipeline.shards import Format, Manifest, SealedSlice, ShardRecord, file_hash, seal, write_durably

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
Where = tuple[str, int, int, int, int]  # source, generation, epoch, block, row


# --- the oracle: Python integers and plain loops --------------------------------------------------------------------


def slow_mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def slow_permute(x: int, n: int, key: int) -> int:
    half = max((n - 1).bit_length() + 1 >> 1, 1)
    while True:
        left, right = x >> half, x & (1 << half) - 1
        for i in range(ROUNDS):
            round_key = slow_mix(key + (i + 1) * GOLDEN & MASK)
            left, right = right, left ^ slow_mix(right ^ round_key) & (1 << half) - 1
        x = left << half | right
        if x < n:
            return x


def slow_lane(seed: int, pool: Pool, lane: int, lanes: int, group_blocks: int) -> Iterator[tuple[int, int, int]]:
    """(epoch, block, row) of a lane's draws from a pool, for ever."""
    pool_key = xxhash.xxh3_64_intdigest(f"longhaul order {VERSION}\n{seed}\n{pool.source}\n{pool.generation}".encode())
    for epoch in count():
        key = slow_mix(pool_key + (epoch + 1) * GOLDEN & MASK)
        blocks = [slow_permute(place, pool.blocks, key) for place in range(lane, pool.blocks, lanes)]
        for group, begin in enumerate(range(0, len(blocks), group_blocks)):
            samples = [(block, row) for block in blocks[begin : begin + group_blocks] for row in range(pool.rows)]
            group_key = slow_mix(key ^ slow_mix((group * lanes + lane + 1) * GOLDEN & MASK))
            for i in range(len(samples)):
                yield epoch, *samples[slow_permute(i, len(samples), group_key)]


@lru_cache
def slow_mixture(weights: tuple[float, ...]) -> list[int]:
    """The pool of each place of the window."""
    shares = [weight / sum(weights) * WINDOW for weight in weights]
    counts = [max(int(share), 1) if share else 0 for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: int(shares[i]) - shares[i])
    for i in by_remainder[: max(WINDOW - sum(counts), 0)]:
        counts[i] += 1
    while sum(counts) > WINDOW:
        counts[counts.index(max(counts))] -= 1
    drawn, table = [0] * len(counts), []
    for place in range(WINDOW):
        ends = [
            (-(-(drawn[i] + 1) * WINDOW // c), i) for i, c in enumerate(counts) if c and drawn[i] * WINDOW // c <= place
        ]
        table.append(min(ends)[1])
        drawn[table[-1]] += 1
    return table


def slow_weights(pools: Sequence[Pool], segment: Segment) -> tuple[float, ...]:
    weights = []
    for pool in pools:
        used = [p for p in pools if p.source == pool.source and p.generation < segment.generations.get(p.source, 0)]
        weight = segment.weights.get(pool.source, 0.0)
        weights.append(weight * pool.blocks / sum(p.blocks for p in used) if pool in used else 0.0)
    return tuple(weights)


def slow_order(order: Order, samples: int) -> list[Where]:
    """The first samples of an order, counted up one by one."""
    draws = {
        (p, lane): slow_lane(order.seed, pool, lane, order.lanes, order.group_blocks)
        for p, pool in enumerate(order.pools)
        for lane in range(order.lanes)
    }
    places = [0] * order.lanes  # of each lane, since the segment began
    waiting = list(order.segments)
    found: list[Where] = []
    for sample in range(samples):
        while waiting and waiting[0].from_sample <= sample:
            mixture = slow_mixture(slow_weights(order.pools, waiting.pop(0)))
            places = [0] * order.lanes
        lane = sample % order.lanes
        index = mixture[(lane * PHASE + places[lane]) % WINDOW]
        places[lane] += 1
        pool = order.pools[index]
        found.append((pool.source, pool.generation, *next(draws[index, lane])))
    return found


def located(order: Order, samples: Any) -> list[Where]:
    at = order.locate(np.asarray(samples, np.int64))
    return [
        (order.pools[pool].source, order.pools[pool].generation, epoch, block, row)
        for pool, epoch, block, row in zip(*(x.tolist() for x in (at.pool, at.epoch, at.block, at.row)), strict=True)
    ]


WEIGHTS = st.sampled_from([0.0, 0.25, 1.0, 3.0])


@st.composite
def orders(draw: st.DrawFn, max_segments: int = 3) -> Order:
    lanes = draw(st.sampled_from([1, 2, 4, 8]))
    names = draw(st.sampled_from([["a"], ["a", "b"], ["a", "b", "c"]]))
    generations = {name: draw(st.integers(1, 2)) for name in names}
    rows = draw(st.sampled_from([1, 2, 4]))
    pools = [Pool(n, g, draw(st.integers(lanes, 30)), rows) for n in names for g in range(generations[n])]
    begins = sorted(draw(st.lists(st.integers(0, 500), max_size=max_segments - 1)))
    segments: list[Segment] = []
    for begin in [0, *begins]:
        weights = {name: draw(WEIGHTS) for name in names}
        weights[draw(st.sampled_from(names))] = 1.0
        before = segments[-1].generations if segments else dict.fromkeys(names, 1)
        segments.append(Segment(begin, weights, {n: draw(st.integers(before[n], generations[n])) for n in names}))
    return Order(draw(st.integers(0, 2**62)), pools, lanes, draw(st.integers(1, 5)), segments)


# --- golden: whatever changes these changes the order of every run ---------------------------------------------------

POOLS = [Pool("books", 0, 40, 4), Pool("web", 0, 1000, 4), Pool("web", 1, 24, 4)]
SEGMENTS = [
    Segment(0, {"books": 0.25, "web": 0.75}, {"books": 1, "web": 1}),
    Segment(100_001, {"books": 0.5, "web": 0.5}, {"books": 1, "web": 2}),
]


GOLDEN_PERMUTATION = [11, 2, 4, 8, 5, 1, 7, 10, 9, 6, 0, 3]
GOLDEN_LARGE = [176315353714, 219895585708, 415540223769]
GOLDEN_MIXTURE = [0, 0, 0, 1, 0, 0, 1, 0, 0, 2, 0, 0, 0, 1, 0, 0, 1, 0, 0, 2]
GOLDEN_TABLE = "349453b62190e1a0"
GOLDEN_SAMPLES = [
    ("web", 0, 0, 781, 1),
    ("web", 0, 0, 228, 2),
    ("books", 0, 0, 16, 3),
    ("web", 0, 0, 712, 2),
    ("web", 0, 0, 216, 1),
    ("books", 0, 156, 0, 3),
    ("web", 0, 18, 802, 1),
    ("web", 0, 18, 121, 0),
    ("books", 0, 156, 6, 0),
    ("web", 0, 122076, 921, 2),
    ("web", 0, 122070312506, 167, 2),
]
GOLDEN_IDENTITY = "21eaabf61ed31cdee31334de3b38f4e5471c20d4283d43f1e45f2e945af1d82e"
GOLDEN_DIGEST = "c087fa2877e5c05c34be5cd6c0e6fbe9"


def golden_order() -> Order:
    return Order(7, POOLS, 8, 3, SEGMENTS)


def test_golden_permutation() -> None:
    n, key = np.full(12, 12), np.full(12, 0x0123456789ABCDEF, np.uint64)
    assert permute(np.arange(12), n, key).tolist() == GOLDEN_PERMUTATION
    large = permute(np.array([0, 1, 10**12]), np.full(3, 10**12 + 39), np.full(3, 1, np.uint64))
    assert large.tolist() == GOLDEN_LARGE


def test_golden_mixture() -> None:
    assert Mixture([0.7, 0.2, 0.1]).pools[:20].tolist() == GOLDEN_MIXTURE
    assert Mixture([0.7, 0.2, 0.1]).counts.tolist() == [11469, 3277, 1638]
    assert xxhash.xxh3_64_hexdigest(Mixture([0.7, 0.2, 0.1]).pools.astype("<i8").tobytes()) == GOLDEN_TABLE


def test_golden_samples() -> None:
    samples = [0, 1, 2, 3, 1000, 99_999, 100_000, 100_001, 100_002, 10**9, 10**15]
    assert located(golden_order(), samples) == GOLDEN_SAMPLES


def test_golden_identity() -> None:
    assert golden_order().identity == GOLDEN_IDENTITY


def test_golden_digest() -> None:
    samples, tokens = np.array([0, 5, 10**12]), np.arange(12, dtype=np.uint16).reshape(3, 4)
    assert f"{digest(samples, tokens):032x}" == GOLDEN_DIGEST
    assert digest(samples[:0], tokens[:0]) == 0


# --- permutations and the mixture -----------------------------------------------------------------------------------


@given(n=st.integers(1, 5000), key=st.integers(0, MASK))
@settings(max_examples=60, deadline=None)
@example(n=1, key=0)
@example(n=2, key=MASK)
@example(n=4096, key=1)
@example(n=4097, key=1)
def test_a_permutation_is_one_and_has_its_inverse(n: int, key: int) -> None:
    x, sizes, keys = np.arange(n), np.full(n, n), np.full(n, key, np.uint64)
    y = permute(x, sizes, keys)
    assert np.array_equal(np.sort(y), x)
    assert np.array_equal(unpermute(y, sizes, keys), x)


@given(n=st.integers(1, 10**12), key=st.integers(0, MASK), share=st.floats(0, 1, exclude_max=True))
@settings(max_examples=60, deadline=None)
def test_a_permutation_is_the_one_described(n: int, key: int, share: float) -> None:
    x = int(n * share)
    y = int(permute(np.array([x]), np.array([n]), np.array([key], np.uint64))[0])
    assert y == slow_permute(x, n, key)
    assert unpermute(np.array([y]), np.array([n]), np.array([key], np.uint64)) == [x]


def test_keys_give_unrelated_permutations() -> None:
    n = 1000
    keys = [np.full(n, key, np.uint64) for key in range(2)]
    first, second = (permute(np.arange(n), np.full(n, n), key) for key in keys)
    assert (first == second).sum() < 10  # 1 is expected
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.15
    assert abs(np.corrcoef(first, np.arange(n))[0, 1]) < 0.15


MANY_WEIGHTS = st.lists(st.floats(0, 1), min_size=1, max_size=30).filter(lambda w: max(w) > 0)


@given(weights=MANY_WEIGHTS)
@settings(max_examples=25, deadline=None)
@example(weights=[0.5] + [0.01] * 50)
@example(weights=[1.0, 1e-9])
def test_a_mixture_keeps_to_its_weights(weights: list[float]) -> None:
    mixture = Mixture(weights)
    shares = np.array(weights) / sum(weights) * WINDOW
    assert mixture.counts.sum() == WINDOW
    assert ((mixture.counts > 0) == (np.array(weights) > 0)).all()  # whatever has weight is drawn
    above = shares >= 1
    assert (np.abs(mixture.counts - shares)[above] < 1 + (~above).sum()).all()
    away = mixture.before - np.arange(WINDOW + 1)[:, None] * mixture.counts / WINDOW
    assert np.abs(away).max() < 1  # in every prefix
    for pool in range(len(weights)):
        assert np.array_equal(mixture.places[pool], np.flatnonzero(mixture.pools == pool))


@given(weights=st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=1, max_size=4).filter(any))
@settings(max_examples=10, deadline=None)
def test_a_mixture_is_the_one_described(weights: list[float]) -> None:
    assert Mixture(weights).pools.tolist() == slow_mixture(tuple(weights))


def test_every_lane_keeps_to_the_weights() -> None:
    """Exactly over any window's length, and by less than two samples in any prefix, whatever the lane's phase."""
    pools = [Pool(name, 0, 64, 1) for name in "abcd"]
    order = Order(1, pools, 16, 1, [Segment(0, {"a": 5, "b": 3, "c": 1, "d": 0.1}, dict.fromkeys("abcd", 1))])
    counts = Mixture([5, 3, 1, 0.1]).counts
    pool = order.locate(np.arange(2 * WINDOW * 16)).pool.reshape(-1, 16)  # (place, lane)
    drawn = np.cumsum(pool[:, :, None] == np.arange(4), axis=0)
    assert (drawn[WINDOW - 1] == counts).all()
    assert (drawn[WINDOW:] - drawn[:-WINDOW] == counts).all()
    away = drawn - np.arange(1, 2 * WINDOW + 1)[:, None, None] * counts / WINDOW
    assert np.abs(away).max() < 2


def test_sources_without_weight_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^data\.sources: no source has a weight above 0$"):
        Mixture([0.0, 0.0])


# --- the order ------------------------------------------------------------------------------------------------------


@given(order=orders())
@settings(max_examples=25, deadline=None)
def test_a_seek_equals_counting_up(order: Order) -> None:
    counted = slow_order(order, 700)
    assert located(order, np.arange(700)) == counted
    scattered = np.random.default_rng(0).permutation(700)[:50]
    assert located(order, scattered) == [counted[n] for n in scattered]


@given(order=orders(), samples=st.lists(st.integers(0, 10**12) | st.integers(0, 2000), max_size=20))
@settings(max_examples=40, deadline=None)
def test_every_place_leads_back_to_its_sample(order: Order, samples: list[int]) -> None:
    for segment in order.segments[1:]:  # the first draws of a segment, and the last before it
        samples += range(max(segment.from_sample - 20, 0), segment.from_sample + 60)
    at = order.locate(np.array(samples, np.int64))
    places = zip(*(x.tolist() for x in (at.pool, at.epoch, at.block, at.row)), strict=True)
    assert [order.sample_of(*place) for place in places] == samples


@given(order=orders(max_segments=1))
@settings(max_examples=25, deadline=None)
def test_every_place_of_the_first_epochs_has_its_own_sample(order: Order) -> None:
    segment, found = order.segments[0], set()
    weights = slow_weights(order.pools, segment)
    for index, pool in enumerate(order.pools):
        for block in range(min(pool.blocks, 5)):
            for epoch, row in ((0, 0), (1, pool.rows - 1)):
                sample = order.sample_of(index, epoch, block, row)
                if not weights[index]:
                    assert sample is None
                    continue
                assert sample is not None
                assert located(order, [sample]) == [(pool.source, pool.generation, epoch, block, row)]
                found.add((sample, index, epoch, block, row))
    assert len({sample for sample, *_ in found}) == len(found)


@given(order=orders())
@settings(max_examples=25, deadline=None)
def test_an_epoch_has_every_sample_once(order: Order) -> None:
    """Across lanes and segments: none is left out of an epoch, none comes twice."""
    samples = np.arange(6000)
    at = order.locate(samples)
    for index, pool in enumerate(order.pools):
        size = pool.blocks * pool.rows
        mine = at.pool == index
        keys = (at.epoch * size + at.block * pool.rows + at.row)[mine]
        assert len(np.unique(keys)) == len(keys)  # nothing twice
        for lane in range(order.lanes):
            lane_size = len(range(lane, pool.blocks, order.lanes)) * pool.rows
            epochs = at.epoch[mine & (samples % order.lanes == lane)]
            assert (np.diff(epochs) >= 0).all()
            assert (np.bincount(epochs)[:-1] == lane_size).all()  # whole before the next begins
        finished = min(
            (at.epoch[mine & (samples % order.lanes == lane)].max(initial=0) for lane in range(order.lanes)), default=0
        )
        assert (np.bincount(at.epoch[mine], minlength=finished)[:finished] == size).all()


@given(order=orders())
@settings(max_examples=20, deadline=None)
def test_a_segment_leaves_the_past_alone(order: Order) -> None:
    whole = located(order, np.arange(600))
    for s in range(1, len(order.segments)):
        before = Order(order.seed, order.pools, order.lanes, order.group_blocks, order.segments[:s])
        begin = order.segments[s].from_sample
        assert located(before, np.arange(begin)) == whole[:begin]


@given(order=orders(max_segments=2), name=st.sampled_from(["A", "aa", "bb", "z"]))
@settings(max_examples=20, deadline=None)
def test_an_added_source_leaves_the_past_alone(order: Order, name: str) -> None:
    """Wherever its name sorts among the others."""
    pools = sorted([*order.pools, Pool(name, 0, 17, order.pools[0].rows)], key=lambda p: (p.source, p.generation))
    last = order.segments[-1]
    begin = last.from_sample + 150
    added = Segment(begin, {**last.weights, name: 1.0}, {**last.generations, name: 1})
    after = Order(order.seed, pools, order.lanes, order.group_blocks, [*order.segments, added])
    assert located(after, np.arange(begin)) == located(order, np.arange(begin))
    assert name in {where[0] for where in located(after, np.arange(begin, begin + 100))}


def test_a_source_added_to_many_leaves_the_past_alone() -> None:
    """With a weight of 0 among eight and more the sum of the weights rounded otherwise."""
    weights = {"b": 0.7, "c": 0.4, "e": 0.15, "f": 0.7, "g": 0.1, "h": 0.2, "i": 0.5, "j": 0.05}
    first, every = Segment(0, weights, dict.fromkeys(weights, 1)), {**weights, "d": 1.0}
    added = Segment(10**6, every, dict.fromkeys(every, 1))
    pools = {name: Pool(name, 0, 17, 2) for name in sorted(every)}
    before = Order(1, [pools[name] for name in weights], 4, 2, [first])
    after = Order(1, [*pools.values()], 4, 2, [first, added])
    assert located(after, np.arange(20_000)) == located(before, np.arange(20_000))


def test_an_added_generation_is_drawn_in_proportion_to_its_tokens() -> None:
    pools = [Pool("a", 0, 300, 2), Pool("a", 1, 100, 2), Pool("b", 0, 50, 2)]
    segments = [Segment(0, {"a": 1, "b": 1}, {"a": 1, "b": 1}), Segment(WINDOW, {"a": 1, "b": 1}, {"a": 2, "b": 1})]
    order = Order(3, pools, 1, 4, segments)
    pool = order.locate(np.arange(2 * WINDOW)).pool
    assert np.bincount(pool[:WINDOW], minlength=3).tolist() == [WINDOW // 2, 0, WINDOW // 2]
    assert np.bincount(pool[WINDOW:], minlength=3).tolist() == [WINDOW * 3 // 8, WINDOW // 8, WINDOW // 2]


QUARTERS = st.integers(1, 12).map(lambda n: n / 4)


@given(order=orders(), limits=st.dictionaries(st.sampled_from(["a", "b"]), QUARTERS))
@settings(max_examples=40, deadline=None)
def test_exhaustion_is_where_counting_finds_it(order: Order, limits: dict[str, float]) -> None:
    at, expected = order.locate(np.arange(3000)), None
    drawn: Counter[tuple[int, int]] = Counter()
    for sample, index in enumerate(at.pool.tolist()):
        lane, pool = sample % order.lanes, order.pools[index]
        drawn[index, lane] += 1
        mine = len(range(lane, pool.blocks, order.lanes)) * pool.rows
        if drawn[index, lane] > limits.get(pool.source, float("inf")) * mine:
            expected = (pool.source, sample)
            break
    found = order.exhausted(limits)
    if expected is None:
        assert found is None or found.sample >= 3000
    else:
        assert found is not None
        assert (found.source, found.sample) == expected


@given(order=orders(), samples=st.integers(0, 1500))
@settings(max_examples=30, deadline=None)
def test_epochs_are_counted(order: Order, samples: int) -> None:
    drawn = Counter((source, generation) for source, generation, *_ in located(order, np.arange(samples)))
    for source, epochs in order.epochs(samples).items():
        mine = [p for p in order.pools if p.source == source]
        size = sum(p.blocks * p.rows for p in mine if drawn[source, p.generation])
        total = sum(drawn[source, p.generation] for p in mine)
        assert epochs == (pytest.approx(total / size) if size else 0)


def test_a_pool_smaller_than_the_lanes_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        Order(1, [Pool("wiki", 1, 7, 4)], 8, 1, [Segment(0, {"wiki": 1}, {"wiki": 2})])
    assert str(error.value) == (
        "source wiki, generation 1: 7 blocks are fewer than the 8 lanes of this run; give it more text"
    )


def test_the_identity_knows_all_that_fixes_the_order() -> None:
    pool, segment = Pool("a", 0, 40, 4), Segment(0, {"a": 1.0}, {"a": 1})
    variants = [
        Order(1, [pool], 8, 3, [segment]),
        Order(2, [pool], 8, 3, [segment]),
        Order(1, [Pool("b", 0, 40, 4)], 8, 3, [Segment(0, {"b": 1.0}, {"b": 1})]),
        Order(1, [Pool("a", 0, 41, 4)], 8, 3, [segment]),
        Order(1, [Pool("a", 0, 40, 2)], 8, 3, [segment]),
        Order(1, [pool], 4, 3, [segment]),
        Order(1, [pool], 8, 2, [segment]),
        Order(1, [pool], 8, 3, [segment, Segment(64, {"a": 1.0}, {"a": 1})]),
        Order(1, [pool], 8, 3, [Segment(0, {"a": 2.0}, {"a": 1})]),
    ]
    assert len({order.identity for order in variants}) == len(variants)
    assert Order(1, [pool], 8, 3, [segment]).identity == variants[0].identity


@pytest.mark.parametrize(
    ("blocks", "batch", "lanes"),
    [([5000, 9000], 2000, 512), ([5000, 100], 2000, 64), ([5000], 33, 32), ([1], 8, 1), ([700], 1, 1)],
)
def test_lanes_are_chosen(blocks: list[int], batch: int, lanes: int) -> None:
    assert choose_lanes(blocks, batch) == lanes


# --- ranks, steps, skips ---------------------------------------------------------------------------------------------


@given(begin=st.integers(0, 10**9), batch=st.integers(1, 300), lanes=st.sampled_from([1, 2, 8, 64]))
@settings(max_examples=60, deadline=None)
def test_a_step_has_the_same_samples_for_any_ranks(begin: int, batch: int, lanes: int) -> None:
    samples = np.arange(begin, begin + batch)
    for ranks in range(1, 10):
        pieces = [cut(samples, lanes, rank, ranks) for rank in range(ranks)]
        by_arithmetic = [cut_range(begin, begin + batch, lanes, rank, ranks) for rank in range(ranks)]
        assert [piece.tolist() for piece in by_arithmetic] == [piece.tolist() for piece in pieces]
        assert sorted(np.concatenate(pieces).tolist()) == samples.tolist()  # the same, each once
        sizes = [len(piece) for piece in pieces]
        assert max(sizes) - min(sizes) <= 1


@given(begin=st.integers(0, 10**6), times=st.integers(1, 5), ranks=st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=30, deadline=None)
def test_a_rank_reads_its_own_lanes(begin: int, times: int, ranks: int) -> None:
    samples = np.arange(begin, begin + 8 * times)
    for rank in range(ranks):
        lanes = set((cut(samples, 8, rank, ranks) % 8).tolist())
        assert lanes == set(range(8 * rank // ranks, 8 * (rank + 1) // ranks))


@given(pieces=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_steps_are_counted_piece_by_piece(pieces: list[tuple[int, int]]) -> None:
    """Pieces as (steps, sequences per step); one of no steps is overruled by the next."""
    begins = np.concatenate([[0], np.cumsum([steps * batch for steps, batch in pieces])]).tolist()
    steps = Steps([(begin, batch) for begin, (_, batch) in zip(begins, pieces, strict=False)])
    batches = [batch for n, batch in pieces[:-1] for _ in range(n)] + [pieces[-1][1]] * 20
    start = 0
    for step, batch in enumerate(batches):
        assert (steps.start(step), steps.batch(step)) == (start, batch)
        assert {steps.step_of(sample) for sample in range(start, start + batch)} == {step}
        start += batch


RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)).map(lambda r: (r[0], r[0] + r[1])), max_size=6)


@given(ranges=RANGES)
@settings(max_examples=100, deadline=None)
def test_skips_are_counted(ranges: list[tuple[int, int]]) -> None:
    skips = Skips(ranges)
    naive = [any(begin <= n < end for begin, end in ranges) for n in range(80)]
    assert skips.mask(np.arange(80)).tolist() == naive
    assert [skips.before(n) for n in range(80)] == [sum(naive[:n]) for n in range(80)]
    assert all(end < begin for (_, end), (begin, _) in pairwise(skips.ranges))


@st.composite
def withdrawals(draw: st.DrawFn, order: Order) -> Withdrawal:
    """Some samples of some pools, from anywhere on."""
    ranges = {}
    for index in draw(st.sets(st.integers(0, len(order.pools) - 1), min_size=1)):
        size = order.pools[index].blocks * order.pools[index].rows
        cuts = sorted(draw(st.sets(st.integers(0, size), min_size=2, max_size=6)))
        ranges[index] = np.array(list(zip(cuts[::2], cuts[1::2], strict=False)), np.int64).reshape(-1, 2)
    return Withdrawal(draw(st.integers(0, 900)), ranges)


@given(data=st.data(), order=orders(), ranges=RANGES)
@settings(max_examples=15, deadline=None)
def test_what_is_withdrawn_is_skipped_in_every_epoch_and_counted(
    data: st.DataObject, order: Order, ranges: list[tuple[int, int]]
) -> None:
    withdrawn = [data.draw(withdrawals(order)) for _ in range(data.draw(st.integers(1, 2)))]
    skips, samples = Skips(ranges, order, withdrawn), np.arange(1500)
    at = order.locate(samples)
    naive = np.array([any(begin <= n < end for begin, end in ranges) for n in samples])
    for each in withdrawn:
        for index, spans in each.ranges.items():
            place = at.block * order.pools[index].rows + at.row
            for begin, end in spans.tolist():
                naive |= (samples >= each.from_sample) & (at.pool == index) & (place >= begin) & (place < end)
    first = data.draw(st.integers(0, 1499))  # whatever is asked for first
    assert skips.before(first) == naive[:first].sum()
    assert np.array_equal(skips.mask(samples[::-1]), naive[::-1])
    assert [skips.before(n) for n in range(0, 1500, 7)] == np.concatenate([[0], np.cumsum(naive)])[:1500:7].tolist()


# --- the digest ------------------------------------------------------------------------------------------------------


def test_the_digest_is_the_sum_described() -> None:
    numbers, tokens = [3, 2**40], [[1, 2, 70_000], [4, 5, 6]]
    expected = 0
    for number, row in zip(numbers, tokens, strict=True):
        data = number.to_bytes(8, "little") + b"".join(t.to_bytes(4, "little") for t in row)
        expected += xxhash.xxh3_128_intdigest(data)
    for dtype in (np.int64, np.uint32, np.int32):
        assert digest(np.array(numbers), np.array(tokens, dtype)) == expected % 2**128
    assert digest(np.array(numbers[::-1]), np.array(tokens[::-1])) == expected % 2**128
    parts = [digest(np.array([n]), np.array([t])) for n, t in zip(numbers, tokens, strict=True)]
    assert sum(parts) % 2**128 == expected % 2**128


# --- sizes of a real plan --------------------------------------------------------------------------------------------

SIZES = Format(block_tokens=2**16, vocab_size=50257, end_of_text=50256)
BLOCKS = 763  # 50 M tokens in a shard of 100 MB


def sealed_plan(folder: Path, shards: int) -> Manifest:
    """A manifest over shards that are not there."""
    folder.mkdir()
    records = [
        ShardRecord(
            f"train-{n:05d}", "train", BLOCKS, 0, BLOCKS * 2**16, 50_000, 10**8, f"{n:032x}", "0" * 32, "0" * 32
        )
        for n in range(shards)
    ]
    slices = [SealedSlice(f"s{n:04d}", 0, records[n::100], "0" * 32, "0" * 32) for n in range(min(shards, 100))]
    return seal(folder, SIZES, {"tokenizer_sha256": "0" * 64}, slices)


def test_a_plan_of_300_billion_tokens_seeks_anywhere(tmp_path: Path) -> None:
    sealed_plan(tmp_path / "plan", 6000)
    begun = time.perf_counter()
    shards = Manifest.open(tmp_path / "plan").shards("train", 0)
    pool = Pool("web", 0, shards.blocks, 2**16 // 2048)
    order = Order(1, [pool], 512, 8, [Segment(0, {"web": 1.0}, {"web": 1})])
    opened = time.perf_counter() - begun
    assert (len(shards), shards.blocks, shards.blocks * 2**16) == (6000, 4_578_000, 300_023_808_000)
    samples = np.array([0, 1, 146_000_000, 147_000_000, 10**10])  # an epoch has 146,496,000
    begun = time.perf_counter()
    at = order.locate(samples)
    seek = time.perf_counter() - begun
    print(f"opened in {opened * 1e3:.0f} ms, five seeks in {seek * 1e3:.1f} ms")
    assert at.epoch.tolist() == [0, 0, 0, 1, 68]
    for i, sample in enumerate(samples.tolist()):
        block = int(at.block[i])
        shard, row = shards.locate(block)
        assert shard * BLOCKS + row == block
        assert shards.path(shard, "tar").name == f"{shards.table['name'][shard]}.tar"
        assert order.sample_of(0, int(at.epoch[i]), block, int(at.row[i])) == sample


def test_a_million_shards_open(tmp_path: Path) -> None:
    """Written column by column: only the reader is of interest."""
    n = 1_000_000
    small = sealed_plan(tmp_path / "plan", 100)
    columns = {column: pa.repeat(small.table[column][0], n) for column in small.table.column_names}
    columns["slice"] = pa.array([f"s{i // 1000:04d}" for i in range(n)])
    columns["blocks"] = pa.array(np.arange(n) % 7 + 1)
    path = tmp_path / "plan" / small.head["table"]
    pq.write_table(pa.table(columns, small.table.schema), path)
    head = {**small.head, "table_hash": file_hash(path)}
    head["sha256"] = fingerprint({k: v for k, v in head.items() if k != "sha256"})
    write_durably(tmp_path / "plan" / "MANIFEST.json", json.dumps(head).encode())
    begun = time.perf_counter()
    shards = Manifest.open(tmp_path / "plan").shards("train", 0)
    print(f"opened in {time.perf_counter() - begun:.2f} s")
    assert (len(shards), shards.blocks) == (n, int((np.arange(n) % 7 + 1).sum()))
    assert shards.locate(shards.blocks - 1) == (n - 1, (n - 1) % 7)
    assert shards.path(n - 1, "tar") == tmp_path / "plan" / "slices" / "s0999" / "train-00000.tar"
