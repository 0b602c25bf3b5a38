"""The values of a model's parameters, by name: what training starts from, and how values get in.

A parameter's name is its first in `named_parameters()`; a tied one has no second.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.progress import Count


class Initial(Protocol):
    """A model that knows how it starts."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As torch's modules."""

    def initial_std(self, name: str) -> float:
        """The standard deviation of the matrix of that name."""


def initial_value(model: Initial, name: str, shape: Sequence[int], seed: int) -> Tensor:
    """One parameter before the first step, fp32 on the CPU: the same bits on every rank, engine and stage.

    Matrices are N(0, std) from a generator of their own, keyed by (seed, name); biases are 0, the gains of norms 1.
    """
    if len(shape) < 2:
        return torch.zeros(*shape) if name.endswith("bias") else torch.ones(*shape)
    key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:16], "little")
    values = np.random.Generator(np.random.Philox(key=key)).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(values).mul_(model.initial_std(name))


def initialize(model: Initial, seed: int) -> None:
    """Give every parameter its initial value, in place, holding one more at a time."""
    named = list(model.named_parameters())
    fill(named, ((name, initial_value(model, name, p.shape, seed)) for name, p in named), "initial values")


@torch.no_grad()
def fill(
    parameters: Iterable[tuple[str, Tensor]], values: Iterable[tuple[str, Tensor]], title: str = "weights"
) -> None:
    """Copy values into the parameters of the same name, cast to their dtypes. See `matched`."""
    named = dict(parameters)
    for name, value in matched({name: tuple(p.shape) for name, p in named.items()}, values, title):
        named[name].copy_(value)


def matched(
    shapes: Mapping[str, Sequence[int]], values: Iterable[tuple[str, Tensor]], title: str
) -> Iterator[tuple[str, Tensor]]:
    """The values as they come; rank 0 shows how far it is.

    Raises ValueError unless every parameter of `shapes` gets exactly one value, of its shape.
    """
    waiting = dict(shapes)
    total, done = sum(math.prod(shape) for shape in waiting.values()), 0
    with Count(os.environ.get("RANK", "0") == "0") as count:
        for name, value in values:
            shape = waiting.pop(name, None)
            if shape is None:
                raise ValueError(f"{name}: given twice, or no parameter of this model")
            if list(shape) != list(value.shape):
                raise ValueError(f"{name}: the model has shape {list(shape)}, the value {list(value.shape)}")
            yield name, value
            done += value.numel()
            count(done, total, title, "parameters")
    if waiting:
        raise ValueError(f"{next(iter(waiting))}: no value given, as for {len(waiting)} parameters in all")
