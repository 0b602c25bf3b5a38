"""The digests of stretches of samples, read again from the shards by any number of processes.

A stretch's samples are read block by block, not in their order: a digest is a sum, so a block is read once for all of
its samples in a part of the work, and parts may be as many processes' as there are.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from multiprocessing.connection import Connection, wait

import numpy as np

from data_pipeline.failpoints import fail_at
from data_pipeline.order import Order, Skips, digest
from data_pipeline.shards import ShardError, Shards
from data_pipeline.stream import Corpora, Data

PART_SAMPLES = 2**17  # of which a process knows the places at a time; a group of 8 blocks of 512 lanes has as many

Piece = tuple[int, int, int]  # of which stretch, first sample, end
Result = tuple[dict[int, int], dict[int, str]]  # the sums of stretches, and what went wrong in some


def stretch_digests(
    order: Order,
    skips: Skips,
    data: Data,
    bounds: Sequence[int],
    workers: int = 1,
    look: Callable[[int, int], None] = lambda *_: None,
) -> Iterator[int | str]:
    """The digest of the samples that are fed from each bound up to the next; a line where they cannot be read.

    Raises ShardError where a process is killed. `look` is told of the parts that were read, and of how many there are.
    """
    parts = _parts(bounds, workers)
    reader = _Reader(order, skips, data)
    results = map(reader.read, parts) if workers == 1 else _read_by(workers, reader, parts)
    sums, problems = [0] * (len(bounds) - 1), [""] * (len(bounds) - 1)
    for done, (totals, found) in enumerate(results):
        look(done + 1, len(parts))
        for stretch, total in totals.items():
            sums[stretch] += total
        for stretch, problem in found.items():
            problems[stretch] = problems[stretch] or problem
    return (problem or total % 2**128 for total, problem in zip(sums, problems, strict=True))


def _read_by(workers: int, reader: _Reader, parts: Sequence[list[Piece]]) -> Iterator[Result]:
    """What the reader gives of each part, as it comes. Raises ShardError where a process dies.

    Each process has a pipe of its own: one that is killed while it holds a queue's lock would leave the others waiting.
    """
    spawn = multiprocessing.get_context("spawn")  # a fork would take locks of this process' threads along
    left: dict[Connection, int] = {}
    processes = {}
    for worker in range(min(workers, len(parts))):
        mine, theirs = spawn.Pipe(duplex=False)
        share = parts[worker::workers]
        process = spawn.Process(target=_work, args=(theirs, reader, share), daemon=True)
        process.start()
        theirs.close()
        left[mine], processes[mine] = len(share), process
    try:
        while left:
            for connection in wait(list(left)):
                assert isinstance(connection, Connection)
                try:
                    yield connection.recv()
                except (EOFError, ConnectionResetError):
                    processes[connection].join()
                    code = processes[connection].exitcode or 0
                    why = f"was killed (signal {-code}): out of memory?" if code < 0 else f"ended (exit code {code})"
                    raise ShardError(
                        f"one of the {workers} processes that read the data {why}; run the same command again, with "
                        f"fewer of them"
                    ) from None
                left[connection] -= 1
                if not left[connection]:
                    del left[connection]
    finally:
        for process in processes.values():
            process.kill()
            process.join()


def _work(pipe: Connection, reader: _Reader, parts: Sequence[list[Piece]]) -> None:
    """The life of a process."""
    for part in parts:
        fail_at("proof.part")
        pipe.send(reader.read(part))


def _parts(bounds: Sequence[int], workers: int) -> list[list[Piece]]:
    """All samples, cut into parts of about the same size, a few for each worker."""
    total = bounds[-1] - bounds[0] if bounds else 0
    size = max(1, min(PART_SAMPLES, -(-total // (4 * workers))))
    parts: list[list[Piece]] = [[]]
    room = size
    for stretch, (begin, end) in enumerate(pairwise(bounds)):
        while begin < end:
            taken = min(room, end - begin)
            parts[-1].append((stretch, begin, begin + taken))
            begin, room = begin + taken, room - taken
            if not room:
                parts.append([])
                room = size
    return [part for part in parts if part]


class _Reader:
    """What a process needs to read samples again; it opens the corpora by itself."""

    def __init__(self, order: Order, skips: Skips, data: Data) -> None:
        self.order, self.skips, self.data = order, skips, data

    @cached_property
    def shards(self) -> list[Shards]:
        """Those of each pool, opened by whoever reads."""
        return Corpora(self.data).shards(self.order.pools)

    def read(self, part: list[Piece]) -> Result:
        """The sums of the stretches of a part."""
        samples = np.concatenate([np.arange(begin, end) for _, begin, end in part])
        stretch = np.concatenate([np.full(end - begin, number) for number, begin, end in part])
        fed = ~self.skips.mask(samples)
        samples, stretch = samples[fed], stretch[fed]
        at, length = self.order.locate(samples), self.data.seq_tokens
        by_block = np.lexsort((stretch, at.block, at.pool))
        cuts = np.flatnonzero(np.diff(at.pool[by_block]) | np.diff(at.block[by_block])) + 1
        sums = {number: 0 for number, _, _ in part}
        problems: dict[int, str] = {}
        for mine in np.split(by_block, cuts) if len(samples) else ():
            pool, block = int(at.pool[mine[0]]), int(at.block[mine[0]])
            try:
                ids = self.shards[pool].read(block)
            except (ShardError, OSError) as error:
                problems |= {int(number): str(error) for number in stretch[mine]}
                continue
            rows = np.lib.stride_tricks.sliding_window_view(ids, length + 1)[at.row[mine] * length]
            for number in np.unique(stretch[mine]).tolist():
                own = stretch[mine] == number
                sums[number] += digest(samples[mine][own], rows[own])
        for each in self.shards:
            each.close()
        return sums, problems
