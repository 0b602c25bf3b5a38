"""State that every rank holds alike: a flipped bit in one rank's memory makes it differ.

A sum over the bits of each tensor, taken on the device, changes with any single bit. The torch engine holds weights,
masters and moments everywhere, ZeRO 1 and 2 the weights that compute; under stage 3 there is nothing to compare.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from pretrain.engine import Engine
from pretrain.ranks import Ranks


def odd_ranks(engine: Engine, ranks: Ranks) -> list[int]:
    """The ranks whose weights differ from those of the majority; all ranks where there is none, as with two."""
    tensors = engine.replicas() if ranks.size > 1 else []
    if not tensors:
        return []
    sums = [tuple(each) for each in ranks.gather(_checksums(tensors))]
    if len(set(sums)) == 1:
        return []
    (most, count), *_ = Counter(sums).most_common(1)
    if count * 2 <= len(sums):
        return list(range(ranks.size))
    return [rank for rank, each in enumerate(sums) if each != most]


def _checksums(tensors: Sequence[torch.Tensor]) -> list[int]:
    """The sum of each tensor's bits read as integers, modulo 2^64."""
    integers = {2: torch.int16, 4: torch.int32}
    sums = [t.detach().view(integers[t.element_size()]).sum(dtype=torch.int64) for t in tensors]
    return [int(each) for each in torch.stack(sums).tolist()]
