"""Slow ranks, by the time of their own work: data and forward passes, without the wait for other ranks.

Under ZeRO stage 3 the forward pass waits for the weights of the others, so that a slow rank slows all alike there.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

STEPS = 50  # over which times are added up
LEAST_SHARE = 0.05  # of the step's time, that a rank must be behind the median to be worth a word


class Stragglers:
    """Adds up each rank's own time."""

    def __init__(self, ranks: int, factor: float) -> None:
        self._own, self._seconds, self._steps, self._factor = [0.0] * ranks, 0.0, 0, factor

    def add(self, own_s: Sequence[float], step_s: float) -> list[tuple[int, float]]:
        """One step; every STEPS steps (rank, its time over the median's) of those that are slow."""
        self._own = [a + b for a, b in zip(self._own, own_s, strict=True)]
        self._seconds += step_s
        self._steps += 1
        if self._steps < STEPS:
            return []
        own, seconds = self._own, self._seconds
        self._own, self._seconds, self._steps = [0.0] * len(own), 0.0, 0
        median = statistics.median_low(own)
        least = max(self._factor * median, median + LEAST_SHARE * seconds)
        return [(rank, mine / median) for rank, mine in enumerate(own) if mine > least and median > 0]
