"""The blocks that are in use, bounded in number, shared by the threads that make batches of them.

A block has a number over all pools (`OpenBlocks.numbers`). What is open lies side by side in one array, so that the
rows of a batch are one gather by numpy however many blocks they come from.

Blocks of remote shards are fetched by threads of their own, ahead of need. Others are read by the thread that needs
them, outside the lock, the kernel having been told ahead of need: whoever else needs one meanwhile waits for that
thread, and several read at the same time.
"""

from __future__ import annotations

import itertools
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipeline.shards import ShardError, Shards, Tokens, Unreachable

LOOK_AHEAD = 4096  # samples of coming steps whose blocks are looked at when a batch is begun: it holds up other readers
EXPECTED = 64  # blocks that the kernel is told of ahead
NONE = np.iinfo(np.int64).max  # where no block is open

Ints = npt.NDArray[np.int64]


class Block(NamedTuple):
    """What is held of a block."""

    ids: Tokens  # (block_tokens + 1,)
    starts: Ints | None  # of its documents, the first that of the one open at token 0; where wanted


_Promise = Future[Block | None]  # of None where a thread that makes a batch reads the block, into the open ones


class Wanted(NamedTuple):
    """Rows to fill: `rows[i]` with the tokens of block `numbers[i]` from `firsts[i]` on."""

    rows: Tokens  # (n, T + 1)
    numbers: Ints
    firsts: Ints
    starts: list[Ints | None] | None = None  # those of each row's block, where wanted

    def fill_from(self, block: Block, number: int) -> int:
        """Fill the rows that a block has; how many they are."""
        mine = np.flatnonzero(self.numbers == number).tolist()
        for row in mine:
            first = int(self.firsts[row])
            self.rows[row] = block.ids[first : first + self.rows.shape[1]]
            if self.starts is not None:
                self.starts[row] = block.starts
        return len(mine)


class _Held:
    """The open blocks, each in a slot of one array. Not for several threads at once."""

    def __init__(self, slots: int, block_tokens: int, row_tokens: int, dtype: np.dtype[np.generic]) -> None:
        self.slots, self.length, self.row_tokens = slots, block_tokens + 1, row_tokens
        self.numbers = np.full(slots, NONE)  # of the blocks, sorted; of each the following:
        self.at = np.arange(slots)  # its slot
        self.left = np.zeros(slots, np.int64)  # rows that were not read yet: each is read once in an epoch
        self.used = np.zeros(slots, np.int64)  # when it was read last; 0 when no row is left, or there is none
        self.clock = 1
        self.tokens = np.empty(slots * self.length, dtype)  # the memory of a slot is taken when a block comes into it
        self.rows = np.lib.stride_tricks.sliding_window_view(self.tokens, row_tokens)  # the row from each token on
        self.starts: list[Ints | None] = [None] * slots

    def __len__(self) -> int:
        return int(self.numbers.searchsorted(NONE))

    def __contains__(self, number: int) -> bool:
        place = int(self.numbers.searchsorted(number))
        return place < self.slots and int(self.numbers[place]) == number

    def find(self, numbers: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Where blocks of these numbers stand, and whether they do."""
        places = self.numbers.searchsorted(numbers)
        places[places == self.slots] = 0
        return places, self.numbers[places] == numbers

    def fill(self, wanted: Wanted, rows: Ints) -> Ints:
        """Fill those of the rows whose blocks are open; the others."""
        numbers, firsts = wanted.numbers[rows], wanted.firsts[rows]
        places, is_open = self.find(numbers)
        missing = np.flatnonzero(~is_open)
        if len(missing):
            places, firsts = places[is_open], firsts[is_open]
            rows, missing = rows[is_open], rows[missing]
        slots = self._take(places)
        wanted.rows[rows] = self.rows[slots * self.length + firsts]
        if wanted.starts is not None:
            for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
                wanted.starts[row] = self.starts[slot]
        return missing

    def _take(self, places: Ints) -> Ints:
        """The slots at places, which a row each is read from now."""
        self.clock += 1
        np.subtract.at(self.left, places, 1)
        self.used[places] = np.where(self.left[places] > 0, self.clock, 0)
        return self.at[places]

    def put(self, number: int, block: Block, rows: int) -> None:
        """Open a block, `rows` of which are read, in place of one that is read through or else was used least recently.

        It must not be open.
        """
        out, into = int(self.used.argmin()), int(self.numbers.searchsorted(number))
        slot, left = int(self.at[out]), (len(block.ids) - 1) // (self.row_tokens - 1) - rows
        used = self.clock if left > 0 else 0
        for column, value in ((self.numbers, number), (self.at, slot), (self.left, left), (self.used, used)):
            if out < into:
                column[out : into - 1] = column[out + 1 : into]
                column[into - 1] = value
            else:
                column[into + 1 : out + 1] = column[into:out]
                column[into] = value
        begin = slot * self.length
        self.tokens[begin : begin + len(block.ids)] = block.ids
        self.starts[slot] = block.starts


class OpenBlocks:
    """The blocks in use. `ahead` is told what steps will read. `row_tokens` are read at a time, of all pools alike."""

    def __init__(
        self,
        shards: Sequence[Shards],
        row_tokens: int,
        capacity: int,
        fetch_threads: int = 1,
        prefetch_blocks: int | None = None,
        with_starts: bool = False,
    ) -> None:
        self.shards, self.fetch_threads, self.with_starts = shards, fetch_threads, with_starts
        self.remote = [each.files.is_far for each in shards]
        self.any_remote = any(self.remote)
        self.depth = min(prefetch_blocks or capacity // 2, capacity // 2) if self.any_remote else 0  # fetched ahead
        self.capacity = capacity - self.depth  # blocks that are held for rows
        longest = max((each.format for each in shards), key=lambda format: format.block_bytes)
        self.held = _Held(self.capacity, longest.block_tokens, row_tokens, longest.dtype)
        self.firsts = [*itertools.accumulate((each.blocks for each in shards), initial=0)]  # of each pool
        self.block_bytes = longest.block_bytes
        self.reading: dict[int, _Promise] = {}
        self.fetched: dict[int, _Promise] = {}  # ahead, not asked for yet
        self.expected: set[int] = set()  # that the kernel was told of, and not read yet
        self.steps: Iterator[Ints] = iter(())
        self.wanted: deque[int] = deque()  # of the steps that are looked at
        self.fetchers: ThreadPoolExecutor | None = None
        self.ended = False  # nothing more is to be read
        self.lock = threading.Lock()
        self.buffers = threading.local()  # what a thread reads into: new memory for each block costs as much as it

    def numbers(self, pool: Ints, block: Ints) -> Ints:
        """The numbers of blocks of pools."""
        numbers: Ints = np.array(self.firsts)[pool] + block
        return numbers

    def place(self, number: int) -> tuple[int, int]:
        """(pool, block) of a number."""
        pool = bisect_right(self.firsts, number) - 1
        return pool, number - self.firsts[pool]

    def fill(self, wanted: Wanted) -> tuple[int, ShardError] | None:
        """Fill rows. The number of a block that is damaged, missing or cannot be read comes back with what is said.

        Raises Unreachable where storage is away, and CancelledError where the reading has ended.
        """
        rows = np.arange(len(wanted.numbers))
        while len(rows):
            again = []  # what another thread has read is open now, or, where there is little room, closed again
            for number, promise in self._fill(wanted, rows):
                try:
                    block = self._result(number, promise)
                except Unreachable:
                    raise
                except ShardError as error:
                    return number, error
                if block is not None:
                    self._done(number, promise, block, wanted.fill_from(block, number))
                else:
                    again.append(number)
            rows = np.flatnonzero(np.isin(wanted.numbers, again)) if again else rows[:0]
        return None

    def _fill(self, wanted: Wanted, rows: Ints) -> list[tuple[int, _Promise]]:
        """The same without waiting: what others are reading comes back as promises, as does what cannot be read."""
        mine: list[tuple[int, _Promise]] = []
        others: list[tuple[int, _Promise]] = []
        try:
            with self.lock:
                if self.ended:
                    raise CancelledError
                missing = self.held.fill(wanted, rows)
                for number in dict.fromkeys(wanted.numbers[missing].tolist()):
                    promise = self._promised(number)
                    (mine if promise is None else others).append((number, promise or _Promise()))
                self.reading |= [*mine, *others]
                self._go_ahead()
            for number, _ in mine[1:]:
                self._expect(number)
        finally:  # others may wait for what was promised, whatever went wrong since
            for number, promise in mine:
                if not self._keep(number, promise, wanted):
                    others.append((number, promise))
        return others

    @contextmanager
    def ahead(self, steps: Iterator[Ints]) -> Iterator[None]:
        """While this lasts, blocks are fetched or expected ahead in the order in which `steps` gives their numbers.

        Behind it nothing can be read until `ended` is false again.
        """
        with self.lock:
            self.steps = steps
            if self.any_remote:
                self.fetchers = ThreadPoolExecutor(self.fetch_threads, thread_name_prefix="longhaul-fetch")
        try:
            yield
        finally:
            with self.lock:
                fetchers, self.fetchers, self.steps, self.ended = self.fetchers, None, iter(()), True
                for left in (self.fetched, self.expected, self.wanted):
                    left.clear()
                self.reading = {number: promise for number, promise in self.reading.items() if promise.done()}
            if fetchers is not None:  # a server that does not answer holds up no end
                fetchers.shutdown(wait=False, cancel_futures=True)

    def _promised(self, number: int) -> _Promise | None:
        """What others read, or a thread that fetches will; None for what this thread is to read."""
        promise = self.reading.get(number) or self.fetched.pop(number, None)
        if promise is None and self.fetchers is not None and self._is_remote(number):
            return self.fetchers.submit(self._fetch, number)
        return promise

    def _keep(self, number: int, promise: _Promise, wanted: Wanted) -> bool:
        """Read what this thread has promised. Where that fails, the promise says so."""
        try:
            if not hasattr(self.buffers, "block"):
                self.buffers.block = bytearray(self.block_bytes)
            block = self._read(number, self.buffers.block)
            rows = wanted.fill_from(block, number)
        except BaseException as error:
            self._done(number, promise)
            promise.set_exception(error)
            return False
        self._done(number, promise, block, rows)
        promise.set_result(None)
        return True

    def _result(self, number: int, promise: _Promise) -> Block | None:
        """The block of a promise; None where another thread has read it. Raises what its reading raised."""
        while not promise.done() and wait([promise], timeout=1.0).not_done:
            if self.ended:
                raise CancelledError
        try:
            return promise.result()
        except BaseException:
            self._done(number, promise)
            raise

    def _done(self, number: int, promise: _Promise, block: Block | None = None, rows: int = 0) -> None:
        """A promise is kept, and so many rows are read; or it is broken: then who asks again reads again."""
        with self.lock:
            if self.reading.get(number) is not promise:
                return
            del self.reading[number]
            if block is not None:
                self.held.put(number, block, rows)

    def _read(self, number: int, buffer: bytearray | None = None) -> Block:
        """Read a block; into a buffer, where it is given and the place allows it."""
        pool, block = self.place(number)
        self.expected.discard(number)
        if not self.with_starts:
            return Block(self.shards[pool].read(block, buffer), None)
        ids, documents = self.shards[pool].read_with_documents(block, buffer)
        return Block(ids, documents[:, 1])

    def _fetch(self, number: int) -> Block | None:
        return self._read(number)

    # --- ahead of need ------------------------------------------------------------------------------------------------

    def _go_ahead(self) -> None:
        """Order what the next steps need."""
        if not self.wanted and (numbers := next(self.steps, None)) is not None:
            self.wanted += numbers[~self.held.find(numbers)[1]].tolist()
        while self.wanted and self._has_room(self.wanted[0]):
            self._order(self.wanted.popleft())

    def _has_room(self, number: int) -> bool:
        return len(self.fetched) < self.depth if self._is_remote(number) else len(self.expected) < EXPECTED

    def _order(self, number: int) -> None:
        if any(number in known for known in (self.expected, self.fetched, self.reading, self.held)):
            return
        if not self._is_remote(number):
            self._expect(number)
        elif self.fetchers is not None:
            self.fetched[number] = self.fetchers.submit(self._fetch, number)

    def _expect(self, number: int) -> None:
        """Have the kernel read a block of this machine's disk meanwhile."""
        pool, block = self.place(number)
        self.expected.add(number)
        self.shards[pool].expect(block)

    def _is_remote(self, number: int) -> bool:
        return self.any_remote and self.remote[self.place(number)[0]]
