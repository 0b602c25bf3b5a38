"""What torch.compile makes, anew for each shape that comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

SHAPES = 64  # for which a function is compiled, at most


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, compiled for each shape that comes: every stage of a batch-size ramp may bring one.

    torch gives up after 8, with a warning, and everything from there on would be eager.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    result: Callable[..., Any] = torch.compile(function, dynamic=False)
    return result
