"""Causal attention: softmax(Q K^T / sqrt(D)) V over what each position may see (Vaswani et al. 2017, section 3.2.1)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def dense(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Every position sees itself and all before it.

    q [B, H, T, D]; k, v [B, H, S, D] with S >= T: the queries are the last T of the S positions. Gives [B, H, T, D].
    """
    queries, keys = q.size(-2), k.size(-2)
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout)


class Past:
    """What the attention of one layer remembers of the positions so far: keys and values [B, H, S, D]."""

    def __init__(self) -> None:
        self._pair: tuple[Tensor, Tensor] | None = None

    @property
    def length(self) -> int:
        """S, the number of positions remembered."""
        return 0 if self._pair is None else self._pair[0].size(-2)

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Remember T more positions, k and v [B, H, T, D]; give all of them, [B, H, S + T, D] each."""
        if self._pair is not None:
            k, v = torch.cat([self._pair[0], k], dim=-2), torch.cat([self._pair[1], v], dim=-2)
        self._pair = k, v
        return k, v
