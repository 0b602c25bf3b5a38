"""The names and shapes of Hugging Face's GPT-2 (`GPT2LMHeadModel`), to and from ours; one parameter at a time.

Theirs keeps the matrices of a block transposed (a `Conv1D`, [in, out]) and leaves a tied output layer out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from configs import ConfigError, differences
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

_FREE = ("architectures", "resid_pdrop", "embd_pdrop", "attn_pdrop")  # keys of config.json that change no weight
_DEFAULTS = {  # of GPT2Config, for keys that a config.json leaves out
    "n_positions": 1024,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}


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


def read_gpt2(folder: Path, model: Gpt) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a Hugging Face folder under our names, one at a time. Raises ConfigError where they differ."""
    wanted = gpt2_config(model)
    found = _DEFAULTS | json.loads((folder / "config.json").read_text())
    if found["n_inner"] is None and "n_embd" in found:
        found["n_inner"] = 4 * found["n_embd"]
    keys = [key for key in wanted if key not in _FREE]
    lines = differences({k: found[k] for k in keys if k in found}, {k: wanted[k] for k in keys})
    if lines:
        raise ConfigError(f"{folder / 'config.json'}: is not the run's model: {'; '.join(lines)}")
    return from_gpt2(_read(weight_files(folder)), model.tied)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder. Pickles are not read. Raises ConfigError."""
    index = folder / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else []
    paths = [folder / Path(name).name for name in names or ["model.safetensors"]]
    for path in paths:
        if not path.is_file():
            raise ConfigError(
                f"{path}: missing; weights are read from safetensors only, never from pickles (.bin, .pt)"
            )
    return paths


def _read(paths: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118, no mapping
                    yield name, file.get_tensor(name).float()
        except SafetensorError as error:
            raise ConfigError(f"{path}: damaged, or no safetensors file: {error}") from None


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
