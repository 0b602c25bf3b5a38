"""Parity with transformers' GPT-2, which was written by others from the same paper and weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from configs import CONFIGS, load
from pretrain.models.gpt import GPT, Gpt
from pretrain.models.hugging_face import from_theirs, theirs_config, to_theirs
from pretrain.models.weights import fill
from tests.pretrain.models.peers import gradients_of, with_telling_values

transformers = pytest.importorskip("transformers")

SMALL = Gpt(layers=3, width=60, heads=5, context=40, vocab_size=211, mlp_ratio=3, layer_norm_eps=1e-3)


def pair(config: Gpt) -> tuple[GPT, Any]:
    """A model of ours, and theirs with the same values."""
    ours = with_telling_values(config)
    with torch.device("meta"):
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**theirs_config(config))).eval()
    state = {name: value.detach().clone().requires_grad_() for name, value in to_theirs(ours.named_parameters())}
    missing, unexpected = theirs.load_state_dict(state, strict=False, assign=True)
    assert missing == (["lm_head.weight"] if config.tied else []) and not unexpected
    theirs.tie_weights()
    return ours, theirs


def rows(config: Gpt, batch: int, length: int) -> Tensor:
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_gradients_equal_theirs(tied: bool) -> None:
    config = SMALL.model_copy(update={"tied": tied})
    ours, theirs = pair(config)
    batch = rows(config, 2, 41)
    inputs, targets = batch[:, :-1], batch[:, 1:]
    logits = theirs(inputs).logits
    torch.testing.assert_close(ours(inputs), logits, rtol=0, atol=1e-5)

    expected = gradients_of(F.cross_entropy(logits.flatten(0, 1), targets.flatten()), theirs)
    gradients = dict(to_theirs(gradients_of(ours(inputs, targets, torch.ones(2, 40)) / 80, ours).items()))
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_smallest_gpt2_gives_their_logits() -> None:
    config = load(Gpt, CONFIGS / "model/gpt2-small.yaml")
    ours, theirs = pair(config)
    tokens = rows(config, 1, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back_again(tied: bool) -> None:
    config = SMALL.model_copy(update={"tied": tied})
    ours, theirs = pair(config)
    back = config.build()
    fill(back.named_parameters(), from_theirs(theirs.state_dict().items(), tied=tied))
    for (name, value), other in zip(ours.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_files_of_old_versions_are_read() -> None:
    """Without the prefix, and with the causal masks that were once saved as buffers."""
    ours, theirs = pair(SMALL)
    old = {name.removeprefix("transformer."): value for name, value in theirs.state_dict().items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 40, 40)
    old["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    back = SMALL.build()
    fill(back.named_parameters(), from_theirs(old.items()))
    name = "blocks.2.mlp.project.weight"
    assert torch.equal(back.get_parameter(name), ours.get_parameter(name))


def test_what_is_no_gpt2_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^h\.0\.attn\.q_proj\.weight: no such parameter in a GPT-2$"):
        list(from_theirs([("transformer.h.0.attn.q_proj.weight", torch.zeros(1))]))
    with pytest.raises(ValueError, match=r"^model\.bias: Hugging Face's GPT-2 always has biases, got false$"):
        theirs_config(SMALL.model_copy(update={"bias": False}))
