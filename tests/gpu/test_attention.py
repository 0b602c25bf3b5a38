"""FlexAttention, forward and backward, eager and within a compiled model. Skipped where there is no GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pretrain.models.gpt import Gpt
from pretrain.models.weights import initialize
from pretrain.objectives import Batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

# head width 32; rows of two blocks of 128, and a band that ends within one
BANDED = Gpt(layers=2, width=64, heads=2, context=256, vocab_size=128, attention=("dense", "banded"), band=96)


def batch(documents: bool) -> Batch:
    tokens = torch.randint(BANDED.vocab_size, (2, 257), generator=torch.Generator().manual_seed(1))
    ends = torch.tensor([[100, 230], [7, 150]])
    numbers = (torch.arange(256)[None, None] >= ends[..., None]).sum(1).int() if documents else None
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(2, 256), numbers)


def learned(model: nn.Module, forward: nn.Module, fed: Batch) -> tuple[float, dict[str, Tensor]]:
    """The loss per token, and the gradients."""
    loss = forward(*fed) / 512
    loss.backward()
    return float(loss), {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
def test_a_gpu_attends_to_what_a_cpu_does(documents: bool, compiled: bool) -> None:
    model = BANDED.build()
    initialize(model, 1)
    fed = batch(documents)
    there = copy.deepcopy(model).cuda()
    torch._dynamo.reset()
    forward: nn.Module = torch.compile(there, dynamic=False) if compiled else there  # type: ignore[assignment]
    numbers = None if fed.documents is None else fed.documents.cuda()
    moved = Batch(fed.inputs.cuda(), fed.targets.cuda(), fed.weights.cuda(), numbers)
    found, ours = learned(there, forward, moved)
    expected, wanted = learned(model, model, fed)
    assert found == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(ours, wanted, rtol=2e-2, atol=2e-5)
