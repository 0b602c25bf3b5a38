"""Causal attention: softmax(Q K^T / sqrt(D)) V over what each position sees (Vaswani et al. 2017, section 3.2.1).

Shapes: B sequences, H heads, T queries, S keys, D channels per head.
What is not seen is not computed: a band or a document costs what it holds, not what the sequence holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn import functional as F

from pretrain.models.compiled import compiled

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class Seen:
    """What the positions of a batch see: themselves and those before them, within a band and within their document."""

    band: int | None = None  # counts the position itself; None: no limit
    lengths: tuple[int, ...] | None = None  # of the documents, over all rows laid end to end; None: a row is one
    block_mask: BlockMask | None = None  # the same for FlexAttention, where that computes it


def see(rows: Tensor, band: int | None, documents: Tensor | None = None, flexible: bool = True) -> Seen:
    """What the positions of `rows` [B, T] see, made once for all layers that see alike.

    `documents` int [B, T] says which document of its row each token is of, and never falls along a row. FlexAttention
    is for GPUs (it has no backward on the CPU), and for what is not `flexible` neither: it has no dropout. Without it,
    documents are counted on the host, which waits for the device.
    """
    masked = documents is not None or (band is not None and band < rows.size(1))
    if flexible and rows.is_cuda and masked:
        anew = documents is not None or torch.compiler.is_compiling()  # a compiler sees through memories, and warns
        make = _block_mask if anew else _remembered_block_mask
        return Seen(band, block_mask=make(band, documents, rows.size(1), rows.device))
    return Seen(band, None if documents is None else document_lengths(documents))


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Seen, dropout: float = 0.0) -> Tensor:
    """Attention to what is seen: q [B, H, T, D]; k, v [B, H, S, D] -> [B, H, T, D].

    With S > T the queries are the last T of the S positions; those that the band leaves out may be missing.
    """
    queries, keys = q.size(-2), k.size(-2)
    if queries < keys:
        return _after_past(q, k, v, seen.band, dropout)
    if seen.block_mask is not None:
        return _flexible(q, k, v, seen.block_mask)
    if seen.lengths is not None:
        return _within_documents(q, k, v, seen.lengths, seen.band, dropout)
    if seen.band is not None and seen.band < keys:
        return banded(q, k, v, seen.band, dropout)
    return dense(q, k, v, dropout)


def dense(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Every position sees itself and all before it. q, k, v [B, H, T, D] -> [B, H, T, D]."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


def banded(q: Tensor, k: Tensor, v: Tensor, band: int, dropout: float = 0.0) -> Tensor:
    """Every position sees itself and the band - 1 before it (Child et al. 2019, section 4.3, its local half).

    The positions are cut into blocks of `band`; the queries of a block see no further than the block before. So a query
    costs 2 band keys, not T. q, k, v [B, H, T, D] -> [B, H, T, D].
    """
    length = q.size(-2)
    blocks = -(-length // band)
    padding = (0, 0, 0, blocks * band - length)
    q, k, v = (F.pad(x, padding).reshape(*x.shape[:2], blocks, band, -1) for x in (q, k, v))  # [B, H, N, W, D]
    first = dense(q[:, :, 0], k[:, :, 0], v[:, :, 0], dropout)  # no block before it
    if blocks == 1:
        return first[:, :, :length]
    k, v = (torch.cat([x[:, :, :-1], x[:, :, 1:]], dim=-2).flatten(1, 2) for x in (k, v))  # [B, H (N - 1), 2 W, D]
    mask = torch.ones(band, 2 * band, dtype=torch.bool, device=q.device).tril(band).triu(1)
    rest = F.scaled_dot_product_attention(q[:, :, 1:].flatten(1, 2), k, v, attn_mask=mask, dropout_p=dropout)
    rest = rest.reshape(*first.shape[:2], -1, first.size(-1))  # [B, H, (N - 1) W, D]
    return torch.cat([first, rest], dim=-2)[:, :, :length]


def _after_past(q: Tensor, k: Tensor, v: Tensor, band: int | None, dropout: float) -> Tensor:
    """The queries are the last of the positions."""
    queries, keys = q.size(-2), k.size(-2)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    if band is not None:
        mask = mask.triu(keys - queries - band + 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


# Left out of compiled models, since its shapes are the documents', other ones in every batch. torch.compiler.disable
# does the same and imports the compiler at once, for 2 s of every start.
@_disable_dynamo
def _within_documents(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], band: int | None, dropout: float
) -> Tensor:
    """Each document by itself, all rows laid end to end."""
    batch = q.size(0)
    pieces = (torch.split(x.transpose(0, 1).flatten(1, 2), list(lengths), dim=1) for x in (q, k, v))  # [H, L, D] each
    one = Seen(band)
    done = [attend(q_[None], k_[None], v_[None], one, dropout)[0] for q_, k_, v_ in zip(*pieces, strict=True)]
    joined = torch.cat(done, dim=1)  # [H, B T, D]
    return joined.reshape(joined.size(0), batch, -1, joined.size(-1)).transpose(0, 1)


def _flexible(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Tensor:
    """FlexAttention (Dong et al. 2024), which skips blocks of 128 x 128 of which nothing is seen.

    Compiled, since it is slower than dense attention otherwise; in a compiled model it becomes part of that.
    """
    from torch.nn.attention.flex_attention import flex_attention

    compute: Any = flex_attention if torch.compiler.is_compiling() else _compiled_once(flex_attention)
    y: Tensor = compute(q, k, v, block_mask=block_mask)
    return y


_compiled_once = lru_cache(maxsize=2)(compiled)


def _block_mask(band: int | None, documents: Tensor | None, length: int, device: torch.device) -> BlockMask:
    """Compiled, since it would lay out all [B, T, T] otherwise; on a CPU, where tests alone make one, it does."""
    from torch.nn.attention.flex_attention import create_block_mask

    def is_seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j <= i
        if band is not None:
            seen = seen & (i - j < band)
        if documents is not None:
            seen = seen & (documents[b, i] == documents[b, j])
        return seen

    rows = None if documents is None else documents.size(0)
    plainly = torch.compiler.is_compiling() or device.type == "cpu"
    create: Any = create_block_mask if plainly else _compiled_once(create_block_mask)
    made: BlockMask = create(is_seen, rows, None, length, length, device=device)
    return made


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


@_disable_dynamo
def document_lengths(documents: Tensor) -> tuple[int, ...]:
    """The tokens of each document of int [B, T] document numbers, over all rows laid end to end."""
    ends = torch.ones_like(documents, dtype=torch.bool)
    ends[:, :-1] = documents[:, 1:] != documents[:, :-1]
    places = [-1, *ends.flatten().nonzero().flatten().tolist()]
    return tuple(end - before for before, end in pairwise(places))


def positions_within(documents: Tensor) -> Tensor:
    """Each token's position in its document: int [B, T] document numbers -> int64 [B, T], 0 at the first of each."""
    places = torch.arange(documents.size(1), device=documents.device).expand_as(documents)
    begins = documents != documents.roll(1, dims=1)
    return places - torch.where(begins, places, 0).cummax(dim=1).values
