"""The blocks that are in use, bounded in number, shared by the threads that make batches of them.

Those of remote shards are fetched by threads of their own, ahead of need. Others are read by the thread that needs
them, outside the lock: whoever else needs one meanwhile waits for that thread, and several read at the same time.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipeline.shards import Shards, Tokens

LOOK_AHEAD = 4096  # blocks named by coming steps that are looked at when a batch is begun: it holds up other readers

Key = tuple[int, int]  # (pool, block)


class Block(NamedTuple):
    """What is held of a block."""

    ids: Tokens  # (block_tokens + 1,)
    starts: npt.NDArray[np.int64] | None  # of its documents, the first that of the one open at token 0; where wanted


class _Own(Future[Block]):
    """The promise of a thread that makes a batch, not of one that fetches: it is always kept."""


class OpenBlocks:
    """The blocks in use, least recently used out first. `ahead` is told what steps will read."""

    def __init__(
        self,
        shards: Sequence[Shards],
        capacity: int,
        fetch_threads: int = 1,
        prefetch_blocks: int | None = None,
        with_starts: bool = False,
    ) -> None:
        self.shards, self.capacity, self.fetch_threads, self.with_starts = shards, capacity, fetch_threads, with_starts
        self.depth = min(prefetch_blocks or capacity // 2, capacity // 2)  # the rest is for those in use
        self.remote = [each.files.is_far for each in shards]
        self.blocks: OrderedDict[Key, Block | Future[Block]] = OrderedDict()
        self.fetched: dict[Key, Future[Block]] = {}  # ahead, not read yet: not to be pushed out
        self.steps: Iterator[list[Key]] = iter(())
        self.wanted: deque[Key] = deque()  # of the step that is looked at
        self.fetchers: ThreadPoolExecutor | None = None
        self.ended = False  # nothing more is to be read
        self.lock = threading.Lock()

    def take(self, keys: Sequence[Key]) -> list[Block | Future[Block]]:
        """Blocks, or promises of them that `result` waits for. Raises CancelledError where the reading has ended."""
        mine: list[tuple[Key, _Own]] = []
        try:
            with self.lock:
                if self.ended:
                    raise CancelledError
                found = [self._take(key, mine) for key in keys]
                if self.fetchers is not None:
                    self._go_ahead(self.fetchers)
        finally:  # others may wait for what was promised, whatever went wrong since
            for key, promise in mine:
                self._keep(key, promise)
        return found

    def result(self, key: Key, promise: Future[Block]) -> Block:
        """The block that was promised. Raises ShardError; CancelledError where the reading has ended meanwhile."""
        if isinstance(promise, _Own):
            return promise.result()
        while not promise.done() and wait([promise], timeout=1.0).not_done:
            if self.ended:
                raise CancelledError
        try:
            block = promise.result()
        except BaseException:
            with self.lock:
                self.blocks.pop(key, None)  # who asks again reads again
            raise
        self._put(key, promise, block)
        return block

    @contextmanager
    def ahead(self, steps: Iterator[list[Key]]) -> Iterator[None]:
        """While this lasts, remote blocks are fetched ahead in the order in which `steps` names them.

        Behind it nothing can be read until `ended` is false again.
        """
        if any(self.remote):
            with self.lock:
                self.fetchers = ThreadPoolExecutor(self.fetch_threads, thread_name_prefix="longhaul-fetch")
                self.steps = steps
        try:
            yield
        finally:
            with self.lock:
                fetchers, self.fetchers, self.steps, self.ended = self.fetchers, None, iter(()), True
                self.fetched.clear()
                self.wanted.clear()
                for key in [k for k, held in self.blocks.items() if isinstance(held, Future) and not held.done()]:
                    del self.blocks[key]
            if fetchers is not None:  # a server that does not answer holds up no end
                fetchers.shutdown(wait=False, cancel_futures=True)

    def _take(self, key: Key, mine: list[tuple[Key, _Own]]) -> Block | Future[Block]:
        held = self.blocks.get(key)
        if held is not None:
            self.blocks.move_to_end(key)
            return held
        held = self.fetched.pop(key, None)
        if held is None:
            if self.remote[key[0]] and self.fetchers is not None:
                held = self.fetchers.submit(self._read, key)
            else:
                held = _Own()
                mine.append((key, held))
        self._make_room()
        self.blocks[key] = held
        return held

    def _keep(self, key: Key, promise: _Own) -> None:
        """Read what this thread has promised."""
        try:
            block = self._read(key)
        except BaseException as error:
            with self.lock:
                if self.blocks.get(key) is promise:
                    del self.blocks[key]  # who asks again reads again
            promise.set_exception(error)
        else:
            self._put(key, promise, block)
            promise.set_result(block)

    def _put(self, key: Key, promise: Future[Block], block: Block) -> None:
        with self.lock:
            if self.blocks.get(key) is promise:
                self.blocks[key] = block

    def _read(self, key: Key) -> Block:
        shards, block = self.shards[key[0]], key[1]
        if not self.with_starts:
            return Block(shards.read(block), None)
        ids, documents = shards.read_with_documents(block)
        return Block(ids, documents[:, 1])

    def _make_room(self) -> None:
        while self.blocks and len(self.blocks) + len(self.fetched) >= self.capacity:
            self.blocks.popitem(last=False)

    def _go_ahead(self, fetchers: ThreadPoolExecutor) -> None:
        """Order what the next steps need."""
        looked_at = 0
        while looked_at < LOOK_AHEAD:
            while self.wanted and len(self.fetched) < self.depth:
                key = self.wanted.popleft()
                if self.remote[key[0]] and key not in self.blocks and key not in self.fetched:
                    self._make_room()
                    self.fetched[key] = fetchers.submit(self._read, key)
            if self.wanted:
                return
            step = next(self.steps, None)
            if step is None:
                return
            self.wanted.extend(step)
            looked_at += len(step) + 1
