"""Calls made ahead by threads, in their order; who takes the results may look first whether the next is there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Reading(Generic[T]):
    """The results of calls. While one is looked at, `depth` further ones are under way. To be used as a context.

    At its end it waits for calls that have begun, unless it `is_remote`: then a server that does not answer holds it up
    no longer than a second.
    """

    def __init__(
        self, calls: Iterable[Callable[[], T]], threads: int, depth: int, name: str, is_remote: bool = False
    ) -> None:
        self._calls, self._depth, self._is_remote, self._is_over = iter(calls), depth, is_remote, False
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._ahead: deque[Future[T]] = deque()

    def ready(self, timeout_s: float = 0.0) -> bool:
        """Whether the next result, or its error, is there at once; waits for it so long. True where there is none."""
        self._begin(self._depth)
        return not self._ahead or not wait([self._ahead[0]], timeout_s).not_done

    def take(self) -> T:
        """The next result; there must be one. Raises what its call raises; CancelledError where all is over."""
        self._begin(self._depth + 1)
        next_one = self._ahead.popleft()
        while True:
            try:
                return next_one.result(timeout=1.0)  # less work than `wait`
            except TimeoutError:
                if next_one.done():  # its own, or it has come just now
                    return next_one.result()
                if self._is_over:
                    raise CancelledError from None

    def _begin(self, count: int) -> None:
        if self._is_over:
            raise CancelledError
        while len(self._ahead) < count and (call := next(self._calls, None)) is not None:
            self._ahead.append(self._pool.submit(call))

    def __enter__(self) -> Reading[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._is_over = True
        self._pool.shutdown(wait=not self._is_remote, cancel_futures=True)
