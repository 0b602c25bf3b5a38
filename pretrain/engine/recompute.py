"""Activation checkpointing: what the backward pass needs of a block is computed again instead of kept.

full keeps what enters each block (Chen et al. 2016). selective keeps the results of matrix products and attention,
which are dear to compute, and computes what lies between them again (Korthikanti et al. 2022, section 5). Both give
the bits that none gives, dropout included: the random numbers of a block are drawn again from the same state. So what
draws some is never kept, attention with dropout neither: the numbers behind it would be others. FlexAttention is
computed again as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from pretrain.engine.settings import Recompute

_aten = torch.ops.aten
PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default}
ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def recompute_blocks(model: nn.Module, kind: Recompute) -> None:
    """Have the blocks of a model, `model.blocks`, computed again in the backward pass."""
    if kind == "none":
        return
    blocks: Any = model.blocks
    config: Any = model.config
    kept = PRODUCTS if config.dropout else PRODUCTS | ATTENTION
    for block in blocks:
        block.forward = _recomputed(block.forward, kind, kept)


def _recomputed(forward: Callable[..., Any], kind: Recompute, kept: set[Any]) -> Callable[..., Any]:
    more: dict[str, Any] = {}
    if kind == "selective":
        more = {"context_fn": partial(create_selective_checkpoint_contexts, partial(_policy, kept))}

    def twice(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        return checkpoint(forward, *arguments, use_reentrant=False, **more, **named)

    return twice


def _policy(kept: set[Any], _context: Any, operation: Any, *_arguments: Any, **_named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE
