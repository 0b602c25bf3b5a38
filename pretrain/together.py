"""Ranks that are asked to stop while they wait for a batch, or in an evaluation: all of them end at one place."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

from data_pipeline.ahead import Reading
from pretrain.ranks import Pending, Ranks

T = TypeVar("T")

LOOK_S = 1.0  # between two looks for a signal, while a batch is waited for


class Abandoned(Exception):
    """A rank was asked to stop: what they were at is left unfinished, on all ranks at the same batch."""


class Poll:
    """Called before each batch on every rank: raises Abandoned on all of them, a batch after one was asked to stop."""

    def __init__(self, ranks: Ranks, asked_to_stop: Callable[[], bool]) -> None:
        self._ranks, self._asked_to_stop = ranks, asked_to_stop
        self._asked: Pending | None = None

    def __call__(self) -> None:
        before, self._asked = self._asked, self._ranks.sum_later(torch.tensor([float(self._asked_to_stop())]))
        if before is not None and before.result().item():
            self._asked.result()
            raise Abandoned


class Together:
    """Takes the batches of one reading on every rank, none before all have theirs: so all can stop while one waits for
    its storage.

    Whether the next batch is there is told when the one before it is taken, so where storage keeps up nobody waits for
    what is told.
    """

    def __init__(self, ranks: Ranks, asked_to_stop: Callable[[], bool]) -> None:
        self._ranks, self._asked_to_stop = ranks, asked_to_stop
        self._late: Pending | None = None
        self.own_s = 0.0  # that the last batch was waited for here, without the wait for the other ranks

    def take(self, reading: Reading[T]) -> T:
        """This rank's next batch. Raises Abandoned on all ranks where one is asked to stop while one waits."""
        is_late = self._late is None or self._late.result().item() > 0
        self.own_s = 0.0
        while is_late:
            begun = time.perf_counter()
            waits = not reading.ready(LOOK_S)
            self.own_s += time.perf_counter() - begun
            late, asked = self._ranks.sum(torch.tensor([float(waits), float(self._asked_to_stop())])).tolist()
            if late and asked:
                raise Abandoned
            is_late = late > 0
        begun = time.perf_counter()
        taken = reading.take()
        self.own_s += time.perf_counter() - begun
        self._late = self._ranks.sum_later(torch.tensor([float(not reading.ready())]))
        return taken
