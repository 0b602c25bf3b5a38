"""The losses of a step added up by the corpus that each row is from, beside the loss that is learned from.

A forward pass puts the terms of its sum into a buffer; they are added up by source on the device, in fp64, when all
have passed. They come to the host in the one transfer that brings the step's loss, so no step waits for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.objectives import Batch


class Tally:
    """The losses of one rank's micro-batches in one step."""

    def __init__(self, batches: Sequence[Batch], sources: Tensor, count: int) -> None:
        """`sources` int64 [micro-batches, B]: of `count` sources, the one of each row."""
        self._losses = torch.zeros(len(batches), *batches[0].targets.shape, device=sources.device)
        self._members = sources[..., None] == torch.arange(count, device=sources.device)
        self.batches = [batch._replace(losses=losses) for batch, losses in zip(batches, self._losses, strict=True)]

    def sums(self) -> Tensor:
        """float64 [sources], on the device; what is not finite spoils the sum of its own source alone."""
        rows = self._losses.sum(dim=2, dtype=torch.float64)[..., None]
        return torch.where(self._members, rows, 0.0).sum(dim=(0, 1))


def to_tell(total: Tensor, tally: Tally | None) -> Tensor:
    """A step's loss and the sums of a tally, on the device: asked for before the update, and `read` after it."""
    total = total.double()[None]
    return total if tally is None else torch.cat([total, tally.sums()])


def read(told: Tensor) -> tuple[float, tuple[float, ...]]:
    """The loss and the sums of `to_tell`, in one transfer."""
    loss, *sums = told.tolist()
    return loss, tuple(sums)
