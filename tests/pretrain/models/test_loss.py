"""The chunked loss against the plain one, and which of them is taken."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.models.loss import (
    CHUNK_BYTES,
    Head,
    LossPlan,
    chunked_loss,
    loss_plan,
    loss_plan_of,
    weighted_loss,
    weighted_losses,
)

C, V, T = 24, 131, 40


def gradients(dtype: torch.dtype, chunk: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, gradient of the hidden states, gradient of the weight; `chunk` None: the plain loss."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(2, T, C, generator=generator).to(dtype).requires_grad_()
    head = Head(C, V, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, C, generator=generator))
    head.to(dtype)
    targets = torch.randint(V, (2, T), generator=generator)
    weights = torch.rand(2, T, generator=generator) * (torch.arange(2 * T).view(2, T) % 7 > 0)
    head.plan = LossPlan() if chunk is None else LossPlan(0, chunk * 4 * V)
    terms = torch.zeros(2, T)
    loss = head(hidden, targets, weights, terms) / 3
    with torch.no_grad():
        logits = (hidden.float() @ head.weight.float().t()).view(-1, V)
        torch.testing.assert_close(terms.view(-1), weighted_losses(logits, targets, weights), rtol=0.02, atol=0.02)
    loss.backward()
    assert hidden.grad is not None
    assert head.weight.grad is not None
    return loss.detach(), hidden.grad, head.weight.grad


@pytest.mark.parametrize("chunk", [1, 7, 32, 80])
def test_chunks_change_neither_value_nor_gradient(chunk: int) -> None:
    for plain, chunked in zip(gradients(torch.float32, None), gradients(torch.float32, chunk), strict=True):
        torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-6)


def test_padded_rows_change_neither_value_nor_gradient() -> None:
    hidden, weight = torch.randn(2, T, C), torch.randn(V, C)
    targets, weights = torch.randint(V, (2, T)), torch.rand(2, T)
    found = []
    for multiple in (1, 64):
        x, head = hidden.clone().requires_grad_(), Head(C, V, bias=False)
        head.weight = torch.nn.Parameter(weight.clone())
        head.plan = LossPlan(multiple=multiple)
        loss = head(x, targets, weights)
        loss.backward()
        assert head(x).shape == (2, T, V) and head.weight.grad is not None
        found.append((loss.detach(), x.grad, head.weight.grad))
    for plain, padded in zip(*found, strict=True):
        torch.testing.assert_close(padded, plain)


def test_chunks_are_about_as_near_to_the_truth_in_bf16_as_the_plain_loss() -> None:
    exact = gradients(torch.float64, None)
    plain, chunked = gradients(torch.bfloat16, None), gradients(torch.bfloat16, 16)
    for true, one, other in zip(exact, plain, chunked, strict=True):
        assert other.dtype == one.dtype
        assert (other.double() - true).norm() <= 1.2 * (one.double() - true).norm() + 1e-6 * true.norm()


def test_without_gradients_none_are_made() -> None:
    hidden, weight = torch.randn(T, C), torch.randn(V, C, requires_grad=True)
    targets, weights = torch.randint(V, (T,)), torch.ones(T)
    with torch.no_grad():
        loss = chunked_loss(hidden, weight, targets, weights, 9)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, weighted_loss(hidden @ weight.detach().t(), targets, weights))


def test_logits_of_the_whole_batch_are_never_held() -> None:
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = function(*arguments, **(named or {}))
            largest = max([largest, *(t.numel() for t in [out] if isinstance(t, torch.Tensor))])
            return out

    hidden, weight = torch.randn(500, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
    with Watch():  # type: ignore[no-untyped-call]
        chunked_loss(hidden, weight, torch.randint(V, (500,)), torch.ones(500), 50).backward()
    assert largest <= max(50 * V, 500 * C)


def test_device_and_memory_choose() -> None:
    cpu = torch.device("cpu")
    assert loss_plan("plain", cpu) == LossPlan(math.inf, CHUNK_BYTES["cpu"])
    assert loss_plan("chunked", cpu) == LossPlan(0, CHUNK_BYTES["cpu"])
    by_memory = loss_plan_of(None, "cuda", 80e9)
    assert by_memory.chunk_tokens(32 * 1024, 50257) == 32 * 1024
    assert by_memory.chunk_tokens(64 * 1024, 50257) == 2560
    by_speed = loss_plan(None, cpu)  # on a CPU of any memory
    assert [by_speed.chunk_tokens(tokens, 16384) for tokens in (100, 1024, 1025, 2048)] == [100, 1024, 1024, 1024]
    assert LossPlan(0, 100).chunk_tokens(10, 50257) == 1


def test_all_gradients_have_the_scale_that_the_loss_is_divided_by() -> None:
    """Which bf16 cannot hold: 1 / 491,520 is 0.36 % off in it."""
    found = {}
    for count in (1, 491_520):
        x, head = torch.randn(64, C, generator=torch.Generator().manual_seed(1)).bfloat16(), Head(C, V, bias=False)
        head.weight = torch.nn.Parameter(torch.randn(V, C, generator=torch.Generator().manual_seed(2)).bfloat16())
        head.plan = LossPlan(0, 16 * 4 * V)
        x.requires_grad_()
        (head(x[None], torch.arange(64)[None], torch.ones(1, 64)) / count).backward()
        assert x.grad is not None
        found[count] = float(x.grad.double().norm())
    assert found[1] / found[491_520] == pytest.approx(491_520, rel=5e-4)
