"""The names and shapes of Hugging Face's GPT-2 and GPT-1, to and from ours; one parameter at a time.

    norm: pre     GPT-2 and GPT-3   GPT2LMHeadModel
    norm: post    GPT-1             OpenAIGPTLMHeadModel

Theirs keep the matrices of a block transposed (a `Conv1D`, [in, out]) and leave a tied output layer out. Neither has
banded attention: those weights go under GPT-2's names, and `approximation` says what is lost.
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
OURSELVES = "longhaul"  # the key of config.json under which stands what theirs has no word for
GPT2 = {"embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f"}
GPT1 = {"embed_tokens": "tokens_embed", "embed_positions": "positions_embed"}
BLOCK = {"norm_attention": "ln_1", "norm_mlp": "ln_2"}
TRANSPOSED = {
    "attention.qkv": "attn.c_attn",
    "attention.project": "attn.c_proj",
    "mlp.expand": "mlp.c_fc",
    "mlp.project": "mlp.c_proj",
}
_BLOCKS = {f"blocks.*.{ours}": f"h.*.{theirs}" for ours, theirs in (BLOCK | TRANSPOSED).items()}
_OURS = {"gpt2": _BLOCKS | GPT2, "openai-gpt": _BLOCKS | GPT1}
_THEIRS = {theirs: ours for names in _OURS.values() for ours, theirs in names.items()}
_BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks, in files that old versions wrote

_FREE = ("architectures", "resid_pdrop", "embd_pdrop", "attn_pdrop", OURSELVES)  # change no weight
_DEFAULTS: dict[str, dict[str, Any]] = {  # of GPT2Config and OpenAIGPTConfig, for keys that a config.json leaves out
    "gpt2": {
        "n_positions": 1024,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    "openai-gpt": {"n_positions": 512, "afn": "gelu", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
}


def theirs_config(model: Gpt) -> dict[str, Any]:
    """The `config.json` of a GPT of ours; raises ValueError where Hugging Face's has no counterpart."""
    if not model.bias:
        raise ValueError("model.bias: Hugging Face's GPT-2 always has biases, got false")
    kind = _kind(model)
    if kind == "openai-gpt" and model.mlp_ratio != 4:
        raise ValueError(f"model.mlp_ratio: Hugging Face's GPT-1 always has 4, got {model.mlp_ratio}")
    own: dict[str, Any] = {
        "gpt2": {"n_inner": model.mlp_ratio * model.width, "activation_function": "gelu_new"},
        "openai-gpt": {"afn": "gelu"},  # their name for the tanh approximation here
    }
    return {
        "model_type": kind,
        "architectures": ["GPT2LMHeadModel" if kind == "gpt2" else "OpenAIGPTLMHeadModel"],
        "n_layer": model.layers,
        "n_embd": model.width,
        "n_head": model.heads,
        "n_positions": model.context,
        "vocab_size": model.vocab_size,
        **own[kind],
        "layer_norm_epsilon": model.layer_norm_eps,
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": model.dropout,
        "tie_word_embeddings": model.tied,
        OURSELVES: _pattern(model),
    }


def approximation(model: Gpt) -> str | None:
    """What an export of this model does otherwise than the model; None where it computes the same."""
    if set(model.attention) == {"dense"}:
        return None
    return (
        f"an approximation: layers with banded attention see the last {model.band} tokens in this model and all of "
        f"them in Hugging Face's; logits are equal for the first {model.band} tokens of a text, not beyond"
    )


def to_theirs(values: Iterable[tuple[str, Tensor]], kind: str = "gpt2") -> Iterator[tuple[str, Tensor]]:
    """Our parameters under Hugging Face's names; `kind` is the `model_type` of the config."""
    for name, value in values:
        if name == "lm_head.weight":
            yield name, value
            continue
        theirs = _rename(name, _OURS[kind])
        yield PREFIX + theirs, value.t() if _is_transposed(theirs) else value


def from_theirs(values: Iterable[tuple[str, Tensor]], tied: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's parameters under our names; a tied output layer and old files' mask buffers are left out."""
    for full_name, value in values:
        name = full_name.removeprefix(PREFIX)
        if name.endswith(_BUFFERS) or (name == "lm_head.weight" and tied):
            continue
        if name == "lm_head.weight":
            yield name, value
            continue
        yield _rename(name, _THEIRS), value.t() if _is_transposed(name) else value


def read_folder(folder: Path, model: Gpt) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a Hugging Face folder under our names, one at a time. Raises ConfigError where they differ."""
    wanted = theirs_config(model)
    found = read_config(folder)
    found = _DEFAULTS.get(found.get("model_type", "gpt2"), {}) | found
    if found.get("n_inner") is None and "n_embd" in found:
        found["n_inner"] = 4 * found["n_embd"]
    keys = [key for key in wanted if key not in _FREE]
    lines = differences({k: found[k] for k in keys if k in found}, {k: wanted[k] for k in keys})
    pattern = {"attention": ["dense"], **{k: v for k, v in found.get(OURSELVES, {}).items() if k in _pattern(model)}}
    lines += differences(pattern, _pattern(model))
    if lines:
        raise ConfigError(f"{folder / 'config.json'}: is not the run's model: {'; '.join(lines)}")
    return from_theirs(_read(weight_files(folder)), model.tied)


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a Hugging Face folder. Raises ConfigError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected an object")
    return config


def _kind(model: Gpt) -> str:
    return "gpt2" if model.norm == "pre" else "openai-gpt"


def _pattern(model: Gpt) -> dict[str, Any]:
    """The attention of each layer in turn, as the config has it; dense alone is theirs."""
    if set(model.attention) == {"dense"}:
        return {"attention": ["dense"]}
    return {"attention": list(model.attention), "band": model.band}


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
