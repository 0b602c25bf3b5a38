"""The GPT family: decoder-only transformers, one after the other a line or two apart.

GPT-1 (Radford et al. 2018, section 4.1) normalizes what each sub-block adds up to, as Vaswani et al. 2017 do.
GPT-2 (Radford et al. 2019, section 2.3) normalizes the input of each sub-block instead, and once more at the end.
GPT-3 (Brown et al. 2020, section 2.1) is GPT-2 with every second layer's attention locally banded.

Shapes: B sequences, T tokens, C the width, H heads of D = C / H, V the vocabulary.
Every weight is read in the forward of the module that owns it, so ZeRO-3 can bring it and take it away.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from configs import Bool, Float, Int, Section
from pretrain.models.attention import Past, Seen, attend, positions_within, see
from pretrain.models.loss import Head


class Gpt(Section):
    """The shape of a GPT. `attention` is a pattern: it is repeated over the layers, first layer first."""

    kind: Literal["gpt"] = "gpt"
    layers: Int = Field(gt=0)
    width: Int = Field(gt=0)  # of the embedding and the residual stream
    heads: Int = Field(gt=0)  # of attention, each width / heads wide
    context: Int = Field(gt=0)  # positions, the longest sequence
    vocab_size: Int = Field(gt=0)  # that of the token shards
    mlp_ratio: Int = Field(4, gt=0)  # width of the MLP, in widths
    norm: Literal["pre", "post"] = "pre"  # before each sub-block, or after it has been added
    attention: tuple[Literal["dense", "banded"], ...] = ("dense",)  # repeated over the layers
    band: Int | None = Field(None, gt=0)  # tokens that a position of a banded layer sees, itself included
    bias: Bool = True  # of linear layers and norms
    tied: Bool = True  # the output layer is the token embedding
    dropout: Float = Field(0.0, ge=0, lt=1)  # of embeddings, attention and residuals
    layer_norm_eps: Float = Field(1e-5, gt=0)

    @model_validator(mode="after")
    def _fits_together(self) -> Gpt:
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got width {self.width} and heads {self.heads}")
        if not self.attention:
            raise ValueError("attention must name the kind of at least one layer, got []")
        if ("banded" in self.attention) != (self.band is not None):
            got = f"attention [{', '.join(self.attention)}] and band {'null' if self.band is None else self.band}"
            raise ValueError(f"band is the width of banded layers: expected both or neither, got {got}")
        return self

    @property
    def bands(self) -> list[int | None]:
        """The band of each layer, None where it is dense: the pattern repeated."""
        pattern = [self.band if kind == "banded" else None for kind in self.attention]
        return [pattern[layer % len(pattern)] for layer in range(self.layers)]

    def build(self) -> GPT:
        """The model on torch's current default device, its values still to be set (weights.initialize)."""
        return GPT(self)

    def parameter_count(self) -> int:
        """How many parameters the model has, the tied embedding counted once."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.build().parameters())

    def flops_per_token(self, seq_tokens: int) -> int:
        """Floating-point operations to train on one token: 6 N + 12 L C T (PaLM, Chowdhery et al. 2022, appendix B).

        N counts every parameter but those that are only looked up: the positions, and an untied token embedding (a tied
        one is the output layer, which is a product). Attention counts all T tokens though half of them are masked, in a
        banded layer its band; neither a padded vocabulary nor recomputation counts, nor what a document mask saves.
        """
        looked_up = self.context + (0 if self.tied else self.vocab_size)
        products = self.parameter_count() - looked_up * self.width
        keys = sum(min(band or seq_tokens, seq_tokens) for band in self.bands)
        return 6 * products + 12 * keys * self.width


class Attention(nn.Module):
    """Heads side by side: each attends in its own D of the C channels; one projection mixes them."""

    def __init__(self, config: Gpt) -> None:
        super().__init__()
        self.head_width = config.width // config.heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.project = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor, seen: Seen, past: Past | None = None) -> Tensor:
        """[B, T, C] -> [B, T, C]; `past` is extended by these T positions."""
        q, k, v = (self._split(part) for part in self.qkv(x).chunk(3, dim=-1))
        if past is not None:
            k, v = past.extend(k, v)
        y = attend(q, k, v, seen, self.dropout if self.training else 0.0)
        merged: Tensor = self.project(y.transpose(1, 2).flatten(2))  # [B, H, T, D] -> [B, T, C]
        return merged

    def _split(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), x.size(1), -1, self.head_width).transpose(1, 2)  # [B, T, C] -> [B, H, T, D]


class MLP(nn.Module):
    """project(gelu(expand(x))), with the tanh approximation of GELU that OpenAI's models use."""

    def __init__(self, config: Gpt) -> None:
        super().__init__()
        inner = config.mlp_ratio * config.width
        self.expand = nn.Linear(config.width, inner, bias=config.bias)
        self.project = nn.Linear(inner, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        y: Tensor = self.project(F.gelu(self.expand(x), approximate="tanh"))
        return y


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); GPT-1: norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, config: Gpt) -> None:
        super().__init__()
        self.norm_first = config.norm == "pre"
        self.norm_attention = nn.LayerNorm(config.width, config.layer_norm_eps, bias=config.bias)
        self.attention = Attention(config)
        self.norm_mlp = nn.LayerNorm(config.width, config.layer_norm_eps, bias=config.bias)
        self.mlp = MLP(config)
        self.dropout = _dropout(config)

    def forward(self, x: Tensor, seen: Seen, past: Past | None = None) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        if self.norm_first:
            x = x + self.dropout(self.attention(self.norm_attention(x), seen, past))
            y: Tensor = x + self.dropout(self.mlp(self.norm_mlp(x)))
        else:
            x = self.norm_attention(x + self.dropout(self.attention(x, seen, past)))
            y = self.norm_mlp(x + self.dropout(self.mlp(x)))
        return y


class GPT(nn.Module):
    """Token and position embeddings, the blocks, a last norm where the blocks do not end in one, the output layer."""

    def __init__(self, config: Gpt) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.embed_positions = nn.Embedding(config.context, config.width)
        self.dropout = _dropout(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        if config.norm == "pre":
            self.norm: nn.Module = nn.LayerNorm(config.width, config.layer_norm_eps, bias=config.bias)
        else:
            self.norm = nn.Identity()
        self.lm_head = Head(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        documents: Tensor | None = None,
        losses: Tensor | None = None,
        past: list[Past] | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of tokens int64[B, T]; with targets int64[B, T] and weights float32[B, T], their loss.

        The loss is the weighted sum over all tokens, not a mean: ranks and micro-batches add up, and the caller divides
        once, by the weights of the whole step. Its terms are put into `losses` float32[B, T], where that is given. With
        `documents` int[B, T], which document of its row each token is of
        (it never falls along a row), positions begin again at each and attention stays inside. With `past`, from
        `new_past`, the tokens follow those already in it.
        """
        start = past[0].length if past else 0
        length = tokens.size(1)
        assert start + length <= self.config.context, "the caller keeps sequences within the context"
        positions = torch.arange(start, start + length, device=tokens.device)
        if documents is not None:
            assert past is None, "a past is of one document"
            positions = positions_within(documents)
        x = self.dropout(self.embed_tokens(tokens) + self.embed_positions(positions))  # [B, T, C]
        flexible = past is None and not (self.training and self.config.dropout)
        seen = {band: see(tokens, band, documents, flexible) for band in set(self.config.bands)}
        for layer, (band, block) in enumerate(zip(self.config.bands, self.blocks, strict=True)):
            x = block(x, seen[band], past[layer] if past else None)
        result: Tensor = self.lm_head(self.norm(x), targets, weights, losses)
        return result

    def new_past(self) -> list[Past]:
        """An empty memory for `forward`, one part per layer."""
        return [Past(band) for band in self.config.bands]

    def initial_std(self, name: str) -> float:
        """The spread of a matrix before training: 0.02, and less for what is added to the residual stream.

        GPT-2, section 2.3: the weights of residual layers are scaled by 1 / sqrt(N), N the number of residual layers.
        GPT-1 norms after adding, so N(0, 0.02) was enough everywhere (section 4.1).
        """
        scaled = self.config.norm == "pre" and name.endswith("project.weight")
        return 0.02 / math.sqrt(2 * self.config.layers) if scaled else 0.02


def _dropout(config: Gpt) -> nn.Module:
    return nn.Dropout(config.dropout) if config.dropout else nn.Identity()  # 0 leaves no random numbers in the graph
