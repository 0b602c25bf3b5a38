"""Weights that every rank holds alike: a flipped bit in one rank's memory makes them differ.

A sum over the bits of each parameter, taken on the device, changes with any single bit. Under ZeRO stage 3 no rank
holds another's weights, and there is nothing to compare.
"""

from __future__ import annotations

from collections import Counter

import torch

from pretrain.engine import Engine
from pretrain.ranks import Ranks


def odd_ranks(engine: Engine, ranks: Ranks) -> list[int]:
    """The ranks whose weights differ from those of the majority; all ranks where there is none, as with two."""
    if ranks.size == 1 or not engine.replicated:
        return []
    sums = [tuple(each) for each in ranks.gather(_checksums(engine).tolist())]
    if len(set(sums)) == 1:
        return []
    (most, count), *_ = Counter(sums).most_common(1)
    if count * 2 <= len(sums):
        return list(range(ranks.size))
    return [rank for rank, each in enumerate(sums) if each != most]


def _checksums(engine: Engine) -> torch.Tensor:
    """int64 [parameters]: the sum of each parameter's bits read as integers, modulo 2^64."""
    parameters = [p.detach() for p in engine.module.parameters()]
    integers = {2: torch.int16, 4: torch.int32}
    return torch.stack([p.view(integers[p.element_size()]).sum(dtype=torch.int64) for p in parameters]).cpu()
