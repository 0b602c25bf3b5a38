"""GPT-1's parity with transformers' `OpenAIGPTLMHeadModel`, which was written by others from the same paper."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from configs import CONFIGS, load
from pretrain.models.gpt import GPT, Gpt
from tests.pretrain.models.peers import gradients_of, with_telling_values

transformers = pytest.importorskip("transformers")

SMALL = Gpt(layers=3, width=60, heads=5, context=40, vocab_size=211, layer_norm_eps=1e-3, norm="post")
NAMES = {
    "embed_tokens": "tokens_embed",
    "embed_positions": "positions_embed",
    "blocks": "h",
    "norm_attention": "ln_1",
    "norm_mlp": "ln_2",
    "attention": "attn",
    "qkv": "c_attn",
    "project": "c_proj",
    "expand": "c_fc",
}


def theirs_of(name: str) -> str:
    return "transformer." + ".".join(NAMES.get(part, part) for part in name.split("."))


def under_their_names(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Theirs keep the matrices of a block transposed."""
    inside = re.compile(r"blocks\.\d+\.(attention|mlp)\.\w+\.weight")
    return {theirs_of(name): value.t() if inside.fullmatch(name) else value for name, value in values.items()}


def pair(config: Gpt) -> tuple[GPT, Any]:
    """A model of ours, and theirs with the same values."""
    ours = with_telling_values(config)
    theirs = transformers.OpenAIGPTLMHeadModel(
        transformers.OpenAIGPTConfig(
            vocab_size=config.vocab_size,
            n_positions=config.context,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            layer_norm_epsilon=config.layer_norm_eps,
        )
    ).eval()
    state = under_their_names({name: value.detach() for name, value in ours.named_parameters()})
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    theirs.tie_weights()
    return ours, theirs


def test_logits_and_gradients_equal_theirs() -> None:
    ours, theirs = pair(SMALL)
    batch = torch.randint(SMALL.vocab_size, (2, 41), generator=torch.Generator().manual_seed(3))
    inputs, targets = batch[:, :-1], batch[:, 1:]
    logits = theirs(inputs).logits
    torch.testing.assert_close(ours(inputs), logits, rtol=0, atol=1e-5)

    expected = gradients_of(F.cross_entropy(logits.flatten(0, 1), targets.flatten()), theirs)
    found = under_their_names(gradients_of(ours(inputs, targets, torch.ones(2, 40)) / 80, ours))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_gpt1_as_released_has_their_parameters() -> None:
    """The released model, which is their default, has no document mark: 40,478 rows."""
    with torch.device("meta"):
        theirs = transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig())
    count = load(Gpt, CONFIGS / "model/gpt1.yaml", ["vocab_size=40478"]).parameter_count()
    assert count == sum(p.numel() for p in theirs.parameters()) == 116_534_784


def test_gpt1_in_its_own_width_gives_their_logits() -> None:
    config = load(Gpt, CONFIGS / "model/gpt1.yaml", ["layers=2", "dropout=0"])
    ours, theirs = pair(config)
    tokens = torch.randint(config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)
