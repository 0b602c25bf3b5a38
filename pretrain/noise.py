"""The random numbers of training, those of dropout: from the seed of the run and the place where they are used.

Nothing of them is saved: a resume on the same number of ranks, with the same micro-batches, draws the same.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch


class Noise(NamedTuple):
    """The random numbers of one step on one rank."""

    seed: int
    step: int
    rank: int

    def begin(self, micro_step: int) -> None:
        """Start torch's generators anew, on every device, for the micro-batch that comes now."""
        torch.manual_seed(self.key(micro_step))

    def key(self, micro_step: int) -> int:
        """64 bits that no other (seed, step, micro-step, rank) has."""
        place = f"longhaul noise {self.seed} {self.step} {micro_step} {self.rank}"
        return int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "little")
