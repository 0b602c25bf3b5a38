from __future__ import annotations

import math

import pytest
import torch

from pretrain.models.gpt import Gpt
from pretrain.models.weights import initialize
from pretrain.optim import AdamW, Rates, set_rates

TINY = Gpt(layers=2, width=16, heads=2, context=8, vocab_size=32)


def test_matrices_decay_and_nothing_else_does() -> None:
    model = TINY.build()
    decayed, rest = AdamW(lr_peak=1e-3, weight_decay=0.3).groups(model)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert set(decayed["names"]) == {
        "embed_tokens.weight",
        "embed_positions.weight",
        *(
            f"blocks.{layer}.{matrix}.weight"
            for layer in range(2)
            for matrix in ("attention.qkv", "attention.project", "mlp.expand", "mlp.project")
        ),
    }
    assert {name.rpartition(".")[0] for name in rest["names"] if name.endswith("weight")} == {
        "norm",
        *(f"blocks.{layer}.norm_{part}" for layer in range(2) for part in ("attention", "mlp")),
    }


def test_every_parameter_is_in_one_group_under_its_name() -> None:
    model = TINY.build()
    groups = AdamW(lr_peak=1e-3).groups(model)
    grouped = {name: p for group in groups for name, p in zip(group["names"], group["params"], strict=True)}
    named = dict(model.named_parameters())
    assert sum(len(group["params"]) for group in groups) == len(named)
    assert grouped.keys() == named.keys() and all(grouped[name] is named[name] for name in named)


def test_three_steps_are_adam_with_decoupled_decay() -> None:
    """Against Loshchilov & Hutter's algorithm 2, in double precision."""
    model = TINY.build()
    initialize(model, seed=1)
    config = AdamW(lr_peak=1e-2, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.5)
    optimizer = config.over(config.groups(model))
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(value) for name, value in expected.items()}
    second = {name: torch.zeros_like(value) for name, value in expected.items()}
    tokens = torch.randint(32, (4, 9), generator=torch.Generator().manual_seed(1))
    for step, lr in enumerate([1e-3, 1e-2, 5e-3], start=1):
        set_rates(optimizer.param_groups, Rates(lr, 0.5))
        optimizer.zero_grad()
        model(tokens[:, :-1], tokens[:, 1:], torch.ones(4, 8)).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            gradient = parameter.grad.double()
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.9 * second[name] + 0.1 * gradient**2
            update = first[name] / (1 - 0.8**step) / ((second[name] / (1 - 0.9**step)).sqrt() + 1e-6)
            decay = 0.5 * expected[name] if parameter.ndim == 2 else 0.0
            expected[name] = expected[name] - lr * (update + decay)
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_it_learns_a_row_by_heart() -> None:
    model = TINY.build()
    initialize(model, seed=1)
    config = AdamW(lr_peak=1e-2)
    optimizer = config.over(config.groups(model))
    row = torch.randint(32, (1, 9), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(row[:, :-1], row[:, 1:], torch.ones(1, 8)) / 8
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(math.log(32), abs=0.1)
    assert losses[-1] < 0.1
