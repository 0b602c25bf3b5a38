"""The names and shapes of Hugging Face's GPT-2 (`GPT2LMHeadModel`), to and from ours; one parameter at a time.

Theirs keeps the matrices of a block transposed (a `Conv1D`, [in, out]) and leaves a tied output layer out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from pretrain.models.gpt import Gpt

PREFIX = "transformer."
OUTSIDE = {"embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f"}  # transposed: none
INSIDE = {"norm_attention": "ln_1", "norm_mlp": "ln_2"}
TRANSPOSED = {
    "attention.qkv": "attn.c_attn",
    "attention.project": "attn.c_proj",
    "mlp.expand": "mlp.c_fc",
    "mlp.project": "mlp.c_proj",
}
_OURS = {**{f"blocks.*.{ours}": f"h.*.{theirs}" for ours, theirs in (INSIDE | TRANSPOSED).items()}, **OUTSIDE}
_THEIRS = {theirs: ours for ours, theirs in _OURS.items()}
_BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks, in files that old versions wrote


def gpt2_config(model: Gpt) -> dict[str, Any]:
    """The `config.json` of a GPT of ours; raises ValueError where GPT2LMHeadModel has no counterpart."""
    if not model.bias:
        raise ValueError("model.bias: Hugging Face's GPT-2 always has biases, got false")
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": model.layers,
        "n_embd": model.width,
        "n_head": model.heads,
        "n_inner": model.mlp_ratio * model.width,
        "n_positions": model.context,
        "vocab_size": model.vocab_size,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": model.layer_norm_eps,
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": model.dropout,
        "tie_word_embeddings": model.tied,
    }


def to_gpt2(values: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Our parameters under Hugging Face's names."""
    for name, value in values:
        if name == "lm_head.weight":
            yield name, value
            continue
        yield PREFIX + _rename(name, _OURS), value.t() if _is_transposed(_rename(name, _OURS)) else value


def from_gpt2(values: Iterable[tuple[str, Tensor]], tied: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's GPT-2 parameters under our names; a tied output layer and old files' mask buffers are left out."""
    for full_name, value in values:
        name = full_name.removeprefix(PREFIX)
        if name.endswith(_BUFFERS) or (name == "lm_head.weight" and tied):
            continue
        if name == "lm_head.weight":
            yield name, value
            continue
        yield _rename(name, _THEIRS), value.t() if _is_transposed(name) else value


def _is_transposed(theirs: str) -> bool:
    return theirs.endswith(tuple(f"{layer}.weight" for layer in TRANSPOSED.values()))


def _rename(name: str, names: dict[str, str]) -> str:
    """`blocks.3.mlp.expand.weight` by the rule `blocks.*.mlp.expand` -> `h.*.mlp.c_fc`."""
    layer, dot, kind = name.rpartition(".")
    number = re.search(r"\.(\d+)\.", layer)
    rule = layer if number is None else layer.replace(number[0], ".*.", 1)
    if rule not in names:
        raise ValueError(f"{name}: no such parameter in a GPT-2")
    return names[rule].replace("*", number[1] if number else "*", 1) + dot + kind
