from __future__ import annotations

import hashlib
import math

import pytest
import torch

from pretrain.models.gpt import Gpt
from pretrain.models.weights import fill, initial_value, initialize

TINY = Gpt(layers=2, width=32, heads=2, context=16, vocab_size=64)


def test_matrices_are_spread_as_the_paper_says() -> None:
    model = Gpt(layers=8, width=128, heads=2, context=128, vocab_size=512).build()
    initialize(model, seed=1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            std = 0.02 / math.sqrt(16) if name.endswith("project.weight") else 0.02
            assert abs(float(parameter.detach().mean())) < 5 * std / math.sqrt(parameter.numel())
            assert abs(float(parameter.detach().std()) / std - 1) < 5 / math.sqrt(2 * parameter.numel())
    assert sum(name.endswith("project.weight") for name, _ in model.named_parameters()) == 16


def test_gpt1_starts_alike_everywhere() -> None:
    model = Gpt(layers=8, width=64, heads=2, context=32, vocab_size=64, norm="post").build()
    assert {model.initial_std(name) for name, p in model.named_parameters() if p.ndim == 2} == {0.02}
    assert "norm.weight" not in dict(model.named_parameters())


def test_biases_start_at_0_and_gains_at_1() -> None:
    model = TINY.build()
    initialize(model, seed=1)
    vectors = [(name, parameter) for name, parameter in model.named_parameters() if parameter.ndim == 1]
    assert len(vectors) == 2 * 8 + 2
    for name, parameter in vectors:
        assert parameter.eq(0 if name.endswith("bias") else 1).all(), name


def test_a_value_depends_on_seed_and_name_alone() -> None:
    large = Gpt(layers=2, width=32, heads=4, context=16, vocab_size=999, mlp_ratio=2).build()
    small = TINY.build()
    name = "blocks.1.attention.project.weight"
    value = initial_value(small, name, (32, 32), seed=7)
    torch.manual_seed(5)
    assert torch.equal(initial_value(large, name, (32, 32), seed=7), value)
    assert not torch.equal(initial_value(small, name, (32, 32), seed=8), value)
    assert not torch.equal(initial_value(small, name.replace("1", "0"), (32, 32), seed=7), value)


def test_the_values_of_a_seed_stay_what_they_are() -> None:
    value = initial_value(TINY.build(), "embed_tokens.weight", (64, 32), seed=1)
    assert hashlib.sha256(value.numpy().tobytes()).hexdigest()[:16] == "a52ba67ae290bfa8"


def test_a_model_in_bf16_gets_the_rounded_values() -> None:
    exact, rounded = TINY.build(), TINY.build().bfloat16()
    initialize(exact, seed=1)
    initialize(rounded, seed=1)
    assert torch.equal(exact.embed_tokens.weight.bfloat16(), rounded.embed_tokens.weight)


def test_fill_wants_each_parameter_once() -> None:
    model = TINY.build()
    named = [(name, parameter.detach().clone()) for name, parameter in model.named_parameters()]
    fill(model.named_parameters(), named)
    with pytest.raises(ValueError, match=r"^norm\.bias: no value given, as for 1 parameters in all$"):
        fill(model.named_parameters(), named[:-1])
    with pytest.raises(ValueError, match=r"^norm\.bias: given twice, or no parameter of this model$"):
        fill(model.named_parameters(), [*named, named[-1]])
    with pytest.raises(ValueError, match=r"^norm\.bias: the model has shape \[32\], the value \[31\]$"):
        fill(model.named_parameters(), [*named[:-1], ("norm.bias", torch.zeros(31))])
