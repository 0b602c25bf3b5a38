"""Causal attention: softmax(Q K^T / sqrt(D)) V over what each position sees (Vaswani et al. 2017, section 3.2.1).

Shapes: B sequences, H heads, T queries, S keys, D channels per head.
What is not seen is not computed: a band or a document costs what it holds, not what the sequence holds.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class Seen:
    """What the positions of a batch see: themselves and those before them, within a band and within their document.

    Made once for all layers that see alike. `band` counts the position itself; None: no limit. `documents` int [B, T]
    says which document of its row each token is of, and never falls along a row; None: each row is one.
    """

    def __init__(self, band: int | None = None, documents: Tensor | None = None) -> None:
        self.band, self.documents = band, documents
        self._lengths: list[int] | None = None
        self._block_mask: BlockMask | None = None

    def lengths(self) -> list[int]:
        """The tokens of each document, over all rows laid end to end. Waits for the device."""
        assert self.documents is not None
        if self._lengths is None:
            ends = torch.ones_like(self.documents, dtype=torch.bool)
            ends[:, :-1] = self.documents[:, 1:] != self.documents[:, :-1]
            places = torch.cat([torch.tensor([-1]), ends.flatten().nonzero().flatten().cpu()])
            self._lengths = places.diff().tolist()
        return self._lengths

    def block_mask(self, length: int, device: torch.device) -> BlockMask:
        """The blocks of FlexAttention that hold anything seen."""
        if self._block_mask is None:
            make = _block_mask if self.documents is not None else _remembered_block_mask
            self._block_mask = make(self.band, self.documents, length, device)
        return self._block_mask


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Seen, dropout: float = 0.0) -> Tensor:
    """Attention to what is seen: q [B, H, T, D]; k, v [B, H, S, D] -> [B, H, T, D].

    With S > T the queries are the last T of the S positions, or of the last S: what a band leaves out may be missing.
    """
    queries, keys = q.size(-2), k.size(-2)
    if queries < keys:
        assert seen.documents is None, "the past is of one document"
        return _after_past(q, k, v, seen.band, dropout)
    band = None if seen.band is None or seen.band >= keys else seen.band
    if q.is_cuda and not dropout and (band is not None or seen.documents is not None):
        return _flexible(q, k, v, seen)
    if seen.documents is not None:
        return _within_documents(q, k, v, seen, dropout)
    return dense(q, k, v, dropout) if band is None else banded(q, k, v, band, dropout)


def dense(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Every position sees itself and all before it. q, k, v [B, H, T, D] -> [B, H, T, D]."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


def banded(q: Tensor, k: Tensor, v: Tensor, band: int, dropout: float = 0.0) -> Tensor:
    """Every position sees itself and the band - 1 before it (Child et al. 2019, section 4.2, its local half).

    The positions are cut into blocks of `band`; the queries of a block see no further than the block before. So a query
    costs 2 band keys, not T. q, k, v [B, H, T, D] -> [B, H, T, D].
    """
    length = q.size(-2)
    blocks = -(-length // band)
    padding = (0, 0, 0, blocks * band - length)
    q, k, v = (F.pad(x, padding).unflatten(-2, (blocks, band)) for x in (q, k, v))  # [B, H, N, W, D]
    first = dense(q[:, :, 0], k[:, :, 0], v[:, :, 0], dropout)  # no block before it
    if blocks == 1:
        return first[:, :, :length]
    k, v = (torch.cat([x[:, :, :-1], x[:, :, 1:]], dim=-2).flatten(1, 2) for x in (k, v))  # [B, H (N - 1), 2 W, D]
    mask = torch.ones(band, 2 * band, dtype=torch.bool, device=q.device).tril(band).triu(1)
    rest = F.scaled_dot_product_attention(q[:, :, 1:].flatten(1, 2), k, v, attn_mask=mask, dropout_p=dropout)
    return torch.cat([first, rest.unflatten(1, (-1, blocks - 1)).flatten(2, 3)], dim=-2)[:, :, :length]


def _after_past(q: Tensor, k: Tensor, v: Tensor, band: int | None, dropout: float) -> Tensor:
    """The queries are the last of the positions."""
    queries, keys = q.size(-2), k.size(-2)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    if band is not None:
        mask = mask.triu(keys - queries - band + 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # its shapes are the documents', other ones in every batch
def _within_documents(q: Tensor, k: Tensor, v: Tensor, seen: Seen, dropout: float) -> Tensor:
    """Each document by itself, all rows laid end to end."""
    batch, lengths = q.size(0), seen.lengths()
    pieces = (x.transpose(0, 1).flatten(1, 2).split(lengths, dim=1) for x in (q, k, v))  # [H, L, D] each
    within = Seen(seen.band)
    done = [attend(q_[None], k_[None], v_[None], within, dropout)[0] for q_, k_, v_ in zip(*pieces, strict=True)]
    return torch.cat(done, dim=1).unflatten(1, (batch, -1)).transpose(0, 1)


def _flexible(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
    """FlexAttention (Dong et al. 2024), which skips blocks of 128 x 128 of which nothing is seen."""
    y: Tensor = _flex_attention()(q, k, v, block_mask=seen.block_mask(q.size(-2), q.device))
    return y


@lru_cache(maxsize=1)
def _flex_attention() -> Any:
    """Compiled, since it is slower than dense attention otherwise; inside a compiled model it becomes part of it."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _block_mask(band: int | None, documents: Tensor | None, length: int, device: torch.device) -> BlockMask:
    from torch.nn.attention.flex_attention import create_block_mask

    def is_seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j <= i
        if band is not None:
            seen = seen & (i - j < band)
        if documents is not None:
            seen = seen & (documents[b, i] == documents[b, j])
        return seen

    rows = None if documents is None else documents.size(0)
    return create_block_mask(is_seen, rows, None, length, length, device=device)


_remembered_block_mask = lru_cache(maxsize=8)(_block_mask)


class Past:
    """What the attention of one layer remembers of the positions so far: keys and values [B, H, S, D].

    With a band it keeps those that the next position may see.
    """

    def __init__(self, band: int | None = None) -> None:
        self.band = band
        self.length = 0  # positions so far, those no longer kept too
        self._pair: tuple[Tensor, Tensor] | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """T more positions, k and v [B, H, T, D]; gives what is kept, followed by them, [B, H, S + T, D] each."""
        self.length += k.size(-2)
        if self._pair is not None:
            k, v = torch.cat([self._pair[0], k], dim=-2), torch.cat([self._pair[1], v], dim=-2)
        forgotten = 0 if self.band is None else max(k.size(-2) - (self.band - 1), 0)
        self._pair = k[:, :, forgotten:], v[:, :, forgotten:]
        return k, v


def positions_within(documents: Tensor) -> Tensor:
    """Each token's position in its document: int [B, T] document numbers -> int64 [B, T], 0 at the first of each."""
    places = torch.arange(documents.size(1), device=documents.device).expand_as(documents)
    begins = documents != documents.roll(1, dims=1)
    return places - torch.where(begins, places, 0).cummax(dim=1).values
