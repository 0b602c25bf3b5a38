"""The order: sample number -> (source, generation, epoch, block, row), and back. Pure arithmetic, nothing is stored.

A *pool* is one generation of one source: N blocks of equally many samples. A keyed permutation of its blocks, another
for every epoch, deals them to G *lanes*: the block at place i belongs to lane i mod G. Within a lane, W consecutive
blocks form a *group*, whose samples are permuted by key. The mixture gives the pool of every place in a lane from a
window of fixed length; each lane runs through it at its own phase. Sample n stands in lane n mod G at place n div G.

Whatever reads the data (ranks, workers, micro-batches) has no part in any of it: a step is a range of sample numbers.
All blocks of a pool are equally long, so every position is a division, and every map here has its inverse.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from heapq import heappop, heappush
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from configs import ConfigError, fingerprint

VERSION = 1
WINDOW = 2**14  # places of the mixture's table; the resolution of weights
PHASE = 10125  # lane l starts its window at l * PHASE mod WINDOW: odd, near WINDOW / golden ratio, spreads any stride
ROUNDS = 8  # of the Feistel network
MAX_LANES = 512
MANY = 4  # samples of each block of a group, from which on it pays to find each block once

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15
_ONE = np.uint64(1)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_ROUNDS = np.array([[(i + 1) * _GOLDEN & 2**64 - 1] for i in range(ROUNDS)], np.uint64)


# --- keyed permutations ---------------------------------------------------------------------------------------------


def mix(x: Words) -> Words:
    """A bijection of 64-bit words that spreads every bit (the finalizer of SplitMix64, Steele et al. 2014)."""
    mixed = x.copy()
    _mix(mixed, np.empty_like(x))
    return mixed


def _mix(x: Words, scratch: Words) -> None:
    """`mix` in place. Here and below: most of the time that a sample's place takes is spent on new memory."""
    for shift, factor in zip(_SHIFTS, (*_FACTORS, None), strict=True):
        np.right_shift(x, shift, out=scratch)
        x ^= scratch
        if factor is not None:
            x *= factor


def permute(x: Ints, n: Ints, key: Words) -> Ints:
    """Where a keyed permutation of [0, n) takes x: a Feistel network over the next even power of two, walked until
    it falls below n (Black & Rogaway 2002, cycle-walking). Arrays of one shape, 0 <= x < n."""
    return _walk(x, n, key, range(ROUNDS))


def unpermute(y: Ints, n: Ints, key: Words) -> Ints:
    """The inverse of `permute`."""
    return _walk(y, n, key, range(ROUNDS - 1, -1, -1))


def _walk(x: Ints, n: Ints, key: Words, rounds: range) -> Ints:
    half = np.maximum((np.frexp((n - 1).astype(np.float64))[1] + 1) // 2, 1).astype(np.uint64)
    limit, scratch = n.astype(np.uint64), np.empty((3, len(x)), np.uint64)
    walked: Words = x.astype(np.uint64)
    y, outside = walked, np.arange(len(x))
    while len(walked):
        walked = _feistel(walked, half, key, rounds, scratch[:, : len(walked)])
        y[outside] = walked
        left = np.flatnonzero(walked >= limit)
        walked, limit, half, key = (words[left] for words in (walked, limit, half, key))
        outside = outside[left]
    return y.astype(np.int64)


def _feistel(x: Words, half: Words, key: Words, rounds: range, scratch: Words) -> Words:
    new, round_key, other = scratch
    mask = (_ONE << half) - _ONE
    left: Words = x >> half
    right: Words = x & mask
    forward = rounds.step > 0
    for i in rounds:
        np.add(key, _ROUNDS[i], out=round_key)
        _mix(round_key, other)
        np.bitwise_xor(right if forward else left, round_key, out=new)
        _mix(new, other)
        new &= mask
        new ^= left if forward else right
        left, right, new = (right, new, left) if forward else (new, left, right)
    return (left << half) | right


# --- the mixture ----------------------------------------------------------------------------------------------------


class Mixture:
    """Weights as integers over a window: the pool of each place, and how often each pool came before it."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.counts = _apportion(np.array(weights, np.float64))  # places of each pool in the window
        self.pools = _spread(tuple(self.counts.tolist()))
        self.places = [np.flatnonzero(self.pools == p) for p in range(len(weights))]
        self._by_pool, self._first = np.concatenate(self.places), np.cumsum(self.counts) - self.counts
        before = np.zeros((WINDOW + 1, len(weights)), np.int32)
        np.cumsum(self.pools[:, None] == np.arange(len(weights)), axis=0, out=before[1:])
        self.before = before

    def pool(self, x: Ints) -> Ints:
        """The pool at places x >= 0."""
        pools: Ints = self.pools[x % WINDOW]
        return pools

    def drawn(self, x: Ints, pool: Ints) -> Ints:
        """How often `pool` stands before place x."""
        drawn: Ints = (x // WINDOW) * self.counts[pool] + self.before[x % WINDOW, pool]
        return drawn

    def place(self, pool: Ints, nth: Ints) -> Ints:
        """The places at which pools stand for the nth time (from 0), -1 where they never do."""
        count = self.counts[pool]
        window, rest = np.divmod(nth, np.maximum(count, 1))
        places: Ints = window * WINDOW + self._by_pool[np.minimum(self._first[pool] + rest, WINDOW - 1)]
        return np.where(count > 0, places, -1)


def _apportion(weights: npt.NDArray[np.float64]) -> Ints:
    """Whole places of the window by largest remainder; what has weight has at least one place."""
    if not (weights > 0).any():
        raise ConfigError("data.sources: no source has a weight above 0")
    total = weights[weights > 0].sum()  # numpy rounds the sum of eight and more by where they stand, zeros too
    shares = weights / total * WINDOW
    counts: Ints = np.maximum(np.floor(shares), weights > 0).astype(np.int64)
    remainder = shares - np.floor(shares)
    while counts.sum() < WINDOW:
        best = int(np.argmax(np.where(weights > 0, remainder, -1.0)))
        counts[best] += 1
        remainder[best] -= 1
    while counts.sum() > WINDOW:
        counts[int(np.argmax(counts))] -= 1
    return counts


@lru_cache(maxsize=64)
def _spread(counts: tuple[int, ...]) -> Ints:
    """The pool of each place of the window; before any place each pool is less than one sample away from its share.

    The j-th (from 0) of a pool's c places lies in [floor(j W / c), ceil((j + 1) W / c)); of those that may stand at a
    place, the one whose interval ends first does (Baruah et al. 1996, proportionate progress: always feasible).
    """
    pools: Ints = np.zeros(WINDOW, np.int64)
    drawn = [0] * len(counts)
    waiting = [(0, pool) for pool, count in enumerate(counts) if count]  # (begin of the interval, pool)
    ready: list[tuple[int, int]] = []  # (end of the interval, pool)
    for place in range(WINDOW):
        while waiting and waiting[0][0] <= place:
            pool = heappop(waiting)[1]
            heappush(ready, (-(-(drawn[pool] + 1) * WINDOW // counts[pool]), pool))
        pool = heappop(ready)[1]
        pools[place] = pool
        drawn[pool] += 1
        heappush(waiting, (drawn[pool] * WINDOW // counts[pool], pool))
    return pools


# --- the order ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """One generation of one source."""

    source: str
    generation: int
    blocks: int
    rows: int  # samples per block


@dataclass(frozen=True)
class Segment:
    """From a sample number on: the weight of each source, and how many of its generations are drawn from."""

    from_sample: int
    weights: Mapping[str, float]
    generations: Mapping[str, int]


@dataclass(frozen=True)
class Located:
    """Where samples lie; arrays of one shape."""

    pool: Ints  # index into Order.pools
    epoch: Ints
    block: Ints  # in the pool
    row: Ints  # sample within the block


@dataclass(frozen=True)
class Exhausted:
    """A source of which a generation passes its limit of epochs, and the first sample that would."""

    source: str
    sample: int
    generation: int


class Order:
    """The order of a run. Pools are listed once and for all, segments say what is drawn from them.

    Raises ConfigError where a pool has fewer blocks than there are lanes.
    """

    def __init__(
        self, seed: int, pools: Sequence[Pool], lanes: int, group_blocks: int, segments: Sequence[Segment]
    ) -> None:
        assert lanes & (lanes - 1) == 0 and 1 <= lanes <= MAX_LANES and group_blocks >= 1
        assert segments and segments[0].from_sample == 0
        for pool in pools:
            if pool.blocks < lanes:
                raise ConfigError(
                    f"source {pool.source}, generation {pool.generation}: {pool.blocks} blocks are fewer than the "
                    f"{lanes} lanes of this run; give it more text"
                )
        self.seed, self.pools, self.lanes, self.group_blocks = seed, list(pools), lanes, group_blocks
        self.segments = list(segments)
        self._blocks = np.array([p.blocks for p in pools], np.int64)
        self._rows = np.array([p.rows for p in pools], np.int64)
        self._keys = np.array([_pool_key(seed, p) for p in pools], np.uint64)
        self._phases: Ints = np.arange(lanes, dtype=np.int64) * PHASE % WINDOW
        self._from = np.array([s.from_sample for s in segments], np.int64)
        self._mixtures = [Mixture(self._weights(s)) for s in segments]
        self._first_places = -((np.arange(lanes)[None, :] - self._from[:, None]) // lanes)  # ceil((from - lane) / G)
        self._bases = self._cursors()

    @property
    def identity(self) -> str:
        """A hash over all that fixes the order up to the last segment's start."""
        return fingerprint(
            {
                "version": VERSION,
                "seed": self.seed,
                "lanes": self.lanes,
                "group_blocks": self.group_blocks,
                "pools": [[p.source, p.generation, p.blocks, p.rows] for p in self.pools],
                "segments": [[s.from_sample, dict(s.weights), dict(s.generations)] for s in self.segments],
            }
        )

    def locate(self, samples: Ints) -> Located:
        """Where the samples of these numbers lie."""
        lane, place = samples % self.lanes, samples // self.lanes
        segment = np.searchsorted(self._from, samples, side="right") - 1
        pool, draw = np.zeros_like(samples), np.zeros_like(samples)
        for s in np.unique(segment):
            at = np.flatnonzero(segment == s)
            pool[at], draw[at] = self._draw(int(s), lane[at], place[at])
        return self._locate_draw(pool, lane, draw)

    def sample_of(self, pool: int, epoch: int, block: int, row: int) -> int | None:
        """The number of the sample at (pool, epoch, block, row), or None where the mixture never comes to it."""
        place = (np.array([value], np.int64) for value in (pool, epoch, block, row))
        sample = int(self.samples_of(Located(*place))[0])
        return None if sample < 0 else sample

    def samples_of(self, at: Located) -> Ints:
        """The inverse of `locate`: the numbers of the samples at these places, -1 where the mixture never comes."""
        rows, key = self._rows[at.pool], self._block_keys(at.pool, at.epoch)
        nth, lane = np.divmod(unpermute(at.block, self._blocks[at.pool], key), self.lanes)
        first = nth // self.group_blocks * self.group_blocks  # block of the group, in its lane
        lane_blocks = self._lane_blocks(at.pool, lane)
        size = np.minimum(self.group_blocks, lane_blocks - first) * rows
        group_key = self._group_keys(key, lane, first // self.group_blocks)
        offset = unpermute((nth - first) * rows + at.row, size, group_key)
        return self._samples_of_draws(at.pool, lane, (at.epoch * lane_blocks + first) * rows + offset)

    def epochs_between(self, pool: int, begin: int, end: int) -> range:
        """The epochs of a pool that any lane draws from in samples [begin, end)."""
        sizes = self._lane_blocks(np.full(self.lanes, pool), np.arange(self.lanes)) * self.pools[pool].rows
        first, last = self._drawn_before(begin)[pool], self._drawn_before(end)[pool]
        drawn = last > first
        if not drawn.any():
            return range(0)
        return range(int((first // sizes)[drawn].min()), int(((last - 1) // sizes)[drawn].max()) + 1)

    def epochs(self, samples: int) -> dict[str, float]:
        """How many epochs of each source the first `samples` samples draw."""
        drawn = self._drawn_before(samples).sum(axis=1)
        totals: dict[str, list[float]] = {}
        for pool, count in zip(self.pools, drawn, strict=True):
            total = totals.setdefault(pool.source, [0.0, 0.0])
            total[0] += float(count)
            total[1] += pool.blocks * pool.rows if count else 0
        return {source: count / size if size else 0.0 for source, (count, size) in totals.items()}

    def drawn_at_last(self) -> list[int]:
        """The pools that the last segment draws from."""
        return np.flatnonzero(self._mixtures[-1].counts).tolist()

    def drawn(self, samples: int) -> dict[str, int]:
        """How many of the first `samples` samples each source gives."""
        totals: dict[str, int] = {}
        for pool, count in zip(self.pools, self._drawn_before(samples).sum(axis=1), strict=True):
            totals[pool.source] = totals.get(pool.source, 0) + int(count)
        return totals

    def exhausted(self, max_epochs: Mapping[str, float]) -> Exhausted | None:
        """The first sample that lies beyond its source's limit of epochs, or None where no limit is ever passed."""
        found: list[Exhausted] = []
        for index, pool in enumerate(self.pools):
            limit = max_epochs.get(pool.source)
            if limit is None:
                continue
            lanes = np.arange(self.lanes)
            pools = np.full(self.lanes, index)
            first = np.floor(limit * self._lane_blocks(pools, lanes) * pool.rows).astype(np.int64)
            samples = self._samples_of_draws(pools, lanes, first)
            if (samples >= 0).any():
                found.append(Exhausted(pool.source, int(samples[samples >= 0].min()), pool.generation))
        return min(found, key=lambda e: e.sample, default=None)

    def _weights(self, segment: Segment) -> list[float]:
        """A weight per pool: the source's, divided over its generations in proportion to their tokens."""
        weights = []
        for pool in self.pools:
            drawn = pool.generation < segment.generations.get(pool.source, 0)
            size = sum(
                p.blocks for p in self.pools
                if p.source == pool.source and p.generation < segment.generations[pool.source]
            ) if drawn else 1  # fmt: skip
            weights.append(segment.weights.get(pool.source, 0.0) * pool.blocks / size if drawn else 0.0)
        return weights

    def _cursors(self) -> list[Ints]:
        """What each (pool, lane) has drawn at the start of each segment."""
        bases = [np.zeros((len(self.pools), self.lanes), np.int64)]
        for s in range(1, len(self.segments)):
            bases.append(bases[-1] + self._drawn_in(s - 1, self._first_places[s] - self._first_places[s - 1]))
        return bases

    def _drawn_in(self, segment: int, places: Ints) -> Ints:
        """What each (pool, lane) draws in a segment's first `places` places of each lane."""
        mixture, pools = self._mixtures[segment], np.arange(len(self.pools))[:, None]
        return mixture.drawn(self._phases + places, pools) - mixture.drawn(self._phases, pools)

    def _drawn_before(self, sample: int) -> Ints:
        segment = bisect_right(self._from.tolist(), sample) - 1
        places = -((np.arange(self.lanes) - sample) // self.lanes) - self._first_places[segment]
        return self._bases[segment] + self._drawn_in(segment, places)

    def _draw(self, segment: int, lane: Ints, place: Ints) -> tuple[Ints, Ints]:
        """The pool at places of lanes, and which draw of that lane from that pool it is."""
        mixture, phase = self._mixtures[segment], self._phases[lane]
        x = place - self._first_places[segment][lane] + phase
        pool = mixture.pool(x)
        return pool, self._bases[segment][pool, lane] + mixture.drawn(x, pool) - mixture.drawn(phase, pool)

    def _locate_draw(self, pool: Ints, lane: Ints, draw: Ints) -> Located:
        rows, lane_blocks = self._rows[pool], self._lane_blocks(pool, lane)
        epoch, position = np.divmod(draw, lane_blocks * rows)
        group, offset = np.divmod(position, self.group_blocks * rows)
        size = np.minimum(self.group_blocks, lane_blocks - group * self.group_blocks) * rows
        block_key = self._block_keys(pool, epoch)
        nth, row = np.divmod(permute(offset, size, self._group_keys(block_key, lane, group)), rows)
        place = (group * self.group_blocks + nth) * self.lanes + lane
        return Located(pool, epoch, self._blocks_at(pool, epoch, place, block_key), row)

    def _blocks_at(self, pool: Ints, epoch: Ints, place: Ints, key: Words) -> Ints:
        """The blocks at places. Where many samples share a block, each place is walked from once."""
        size, kinds = int(self._blocks.max()), len(self.pools) * (int(epoch.max(initial=0)) + 1)
        if len(place) < MANY * self.lanes * len(self.pools) * self.group_blocks or kinds * size >= 2**63:
            return permute(place, self._blocks[pool], key)
        of = (epoch * len(self.pools) + pool) * size + place
        _, first, which = np.unique(of, return_index=True, return_inverse=True)
        blocks: Ints = permute(place[first], self._blocks[pool[first]], key[first])[which]
        return blocks

    def _samples_of_draws(self, pool: Ints, lane: Ints, draw: Ints) -> Ints:
        """The inverse of `_draw`, -1 for draws that never come."""
        found = np.full(draw.shape, -1, np.int64)
        for s, mixture in enumerate(self._mixtures):
            mine = draw >= self._bases[s][pool, lane]
            if s + 1 < len(self._mixtures):
                mine &= draw < self._bases[s + 1][pool, lane]
            at = np.flatnonzero(mine)
            p, of, phase = pool[at], lane[at], self._phases[lane[at]]
            x = mixture.place(p, mixture.drawn(phase, p) + draw[at] - self._bases[s][p, of])
            found[at] = np.where(x < 0, -1, (x - phase + self._first_places[s][of]) * self.lanes + of)
        return found

    def _lane_blocks(self, pool: Ints, lane: Ints) -> Ints:
        """How many of a pool's blocks a lane has: ceil((N - lane) / G)."""
        return (self._blocks[pool] - lane + self.lanes - 1) // self.lanes

    def _block_keys(self, pool: Ints, epoch: Ints) -> Words:
        return mix(self._keys[pool] + (epoch.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN))

    def _group_keys(self, block_key: Words, lane: Ints, group: Ints) -> Words:
        number = (group * self.lanes + lane + 1).astype(np.uint64)
        return mix(block_key ^ mix(number * np.uint64(_GOLDEN)))


def _pool_key(seed: int, pool: Pool) -> int:
    return xxhash.xxh3_64_intdigest(f"longhaul order {VERSION}\n{seed}\n{pool.source}\n{pool.generation}".encode())


def choose_lanes(blocks: Sequence[int], batch: int) -> int:
    """G for a run: the largest power of two up to 512, the smallest pool's blocks and the batch."""
    limit = min(*blocks, batch, MAX_LANES) if blocks else 1
    return 1 << (max(limit, 1).bit_length() - 1)


# --- steps ----------------------------------------------------------------------------------------------------------


class Steps:
    """Step -> range of sample numbers. `pieces` are (from_sample, sequences per step), each from a step's start."""

    def __init__(self, pieces: Sequence[tuple[int, int]]) -> None:
        assert pieces and pieces[0][0] == 0 and all(batch > 0 for _, batch in pieces)
        self.pieces = list(pieces)
        self._first_step = [0]
        for (start, batch), (end, _) in zip(self.pieces, self.pieces[1:], strict=False):
            steps, rest = divmod(end - start, batch)
            assert rest == 0, f"a piece of steps of {batch} samples cannot end after {end - start}"
            self._first_step.append(self._first_step[-1] + steps)

    def start(self, step: int) -> int:
        """The first sample of a step."""
        i = bisect_right(self._first_step, step) - 1
        from_sample, batch = self.pieces[i]
        return from_sample + (step - self._first_step[i]) * batch

    def batch(self, step: int) -> int:
        """How many samples a step takes."""
        return self.start(step + 1) - self.start(step)

    def step_of(self, sample: int) -> int:
        """The step that takes a sample."""
        i = bisect_right([start for start, _ in self.pieces], sample) - 1
        from_sample, batch = self.pieces[i]
        return self._first_step[i] + (sample - from_sample) // batch


@dataclass(frozen=True)
class Withdrawal:
    """Samples that are not fed from a sample number on, whatever their epoch: what was taken down, damaged blocks."""

    from_sample: int
    ranges: Mapping[int, Ints]  # by pool: int64 (n, 2), begin and end of samples, which are block * rows + row

    def numbers(self, order: Order, until: int) -> Ints:
        """The numbers below `until` that these samples have, of every epoch; sorted, each once."""
        found = [np.zeros(0, np.int64)]
        for pool, ranges in self.ranges.items():
            places = members(ranges)
            block, row = np.divmod(places, order.pools[pool].rows)
            for epoch in order.epochs_between(pool, self.from_sample, until):
                at = Located(np.full_like(places, pool), np.full_like(places, epoch), block, row)
                numbers = order.samples_of(at)
                found.append(numbers[(numbers >= self.from_sample) & (numbers < until)])
        return np.unique(np.concatenate(found))


class Skips:
    """Samples that keep their place and get weight 0: ranges [begin, end) of numbers, and what was withdrawn.

    The numbers of withdrawn samples follow from the order, epoch by epoch, and are kept sorted up to where they have
    been asked for: 8 bytes for each time that one would have been fed. So a count is a binary search.
    """

    def __init__(
        self,
        ranges: Sequence[tuple[int, int]] = (),
        order: Order | None = None,
        withdrawals: Sequence[Withdrawal] = (),
    ) -> None:
        assert order is not None or not withdrawals
        merged: list[tuple[int, int]] = []
        for begin, end in sorted(ranges):
            if merged and begin <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((begin, end))
        self.ranges, self.order, self.withdrawals = merged, order, list(withdrawals)
        self._known = 0, np.zeros(0, np.int64)  # the withdrawn samples below a number; replaced as one, for threads

    @cached_property
    def _arrays(self) -> tuple[Ints, Ints, Ints]:
        begins = np.array([b for b, _ in self.ranges], np.int64)
        ends = np.array([e for _, e in self.ranges], np.int64)
        return begins, ends, np.concatenate([[0], np.cumsum(ends - begins)])

    def before(self, sample: int) -> int:
        """How many skipped samples have a smaller number."""
        begins, ends, total = self._arrays
        i = int(np.searchsorted(begins, sample, side="right"))
        in_ranges = int(total[i]) - (max(0, int(ends[i - 1]) - sample) if i else 0)
        return in_ranges + int(np.searchsorted(self._withdrawn(sample), sample))

    def mask(self, samples: Ints) -> npt.NDArray[np.bool_]:
        """True for each sample that is skipped."""
        inside = self._in_ranges(samples)
        if self.withdrawals and len(samples):
            withdrawn = self._withdrawn(int(samples.max()) + 1)
            inside |= np.searchsorted(withdrawn, samples) < np.searchsorted(withdrawn, samples, side="right")
        return inside

    def _in_ranges(self, samples: Ints) -> npt.NDArray[np.bool_]:
        begins, ends, _ = self._arrays
        i = np.searchsorted(begins, samples, side="right")
        inside: npt.NDArray[np.bool_] = (i > 0) & (samples < np.concatenate([[0], ends])[i])
        return inside

    def _withdrawn(self, until: int) -> Ints:
        """The withdrawn samples that no range has, sorted: all below `until`, perhaps more."""
        known, numbers = self._known
        if self.withdrawals and until > known:
            assert self.order is not None
            known = until + until // 4
            numbers = np.unique(np.concatenate([w.numbers(self.order, known) for w in self.withdrawals]))
            numbers = numbers[~self._in_ranges(numbers)]
            self._known = known, numbers
        return numbers


def members(ranges: Ints) -> Ints:
    """The numbers in ranges [begin, end), int64 (n, 2)."""
    lengths = ranges[:, 1] - ranges[:, 0]
    before = np.cumsum(lengths) - lengths
    numbers: Ints = np.arange(int(lengths.sum())) + np.repeat(ranges[:, 0] - before, lengths)
    return numbers


def cut(samples: Ints, lanes: int, rank: int, ranks: int) -> Ints:
    """A rank's share of a step: its samples ordered by lane and cut into `ranks` nearly equal pieces."""
    ordered = samples[np.lexsort((samples, samples % lanes))]
    return ordered[len(samples) * rank // ranks : len(samples) * (rank + 1) // ranks]


def cut_range(begin: int, end: int, lanes: int, rank: int, ranks: int) -> Ints:
    """`cut` of the samples [begin, end), by arithmetic: what a rank reads costs no sorting of what all read."""
    return begin + _cut_from(begin % lanes, end - begin, lanes, rank, ranks)


@lru_cache(maxsize=16)
def _cut_from(lane: int, count: int, lanes: int, rank: int, ranks: int) -> Ints:
    """`cut_range` of `count` samples, counted from the first of them, which stands in `lane`."""
    first = (np.arange(lanes) - lane) % lanes  # of each lane
    ends = np.cumsum(count // lanes + (first < count % lanes))
    place = np.arange(count * rank // ranks, count * (rank + 1) // ranks)
    of = np.searchsorted(ends, place, side="right")
    before = np.concatenate([[0], ends])[of]
    cut: Ints = first[of] + (place - before) * lanes
    return cut


# --- the digest -----------------------------------------------------------------------------------------------------


def digest(samples: Ints, tokens: npt.NDArray[Any]) -> int:
    """The sum mod 2^128, over samples, of xxh3-128 of (number: 8 bytes, T + 1 ids: 4 bytes each, little-endian).

    `samples` has shape (b,), `tokens` (b, T + 1). Sums of parts add up to the sum of the whole, in any order.
    """
    rows = np.empty((len(samples), tokens.shape[1] + 2), "<u4")
    rows[:, :2] = np.ascontiguousarray(samples, "<i8").view("<u4").reshape(-1, 2)
    rows[:, 2:] = tokens
    return sum(map(xxhash.xxh3_128_intdigest, rows)) % 2**128
