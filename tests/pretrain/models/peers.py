"""What the comparisons with transformers' models share: a model with telling values, and gradients by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.models.gpt import GPT, Gpt
from pretrain.models.weights import initialize


def with_telling_values(config: Gpt) -> GPT:
    """A model in evaluation mode with no bias left at 0 and no gain at 1."""
    model = config.build().eval()
    initialize(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def gradients_of(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
