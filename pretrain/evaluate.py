"""Validation loss per corpus: the same rows whatever the number of ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pydantic import Field

from configs import Int, Section
from data_pipeline.stream import Validation
from pretrain.engine import Engine
from pretrain.objectives import Objective
from pretrain.ranks import Ranks


class Evaluation(Section):
    """When and on how much validation text a run is measured."""

    every_steps: Int = Field(default=500, gt=0)
    tokens: Int = Field(default=1_000_000, gt=0)  # per corpus, at most


def validation_losses(
    engine: Engine, objective: Objective, corpora: Mapping[str, Validation], ranks: Ranks, rows: int
) -> dict[str, float]:
    """Mean loss (nats per token) of each corpus that has validation text, and its exponential, the perplexity."""
    engine.module.eval()
    metrics: dict[str, float] = {}
    for name, validation in corpora.items():
        total = torch.zeros((), dtype=torch.float64)
        for tokens, valid in validation.batches(rows, ranks.rank, ranks.size):
            batch = objective.batch(torch.from_numpy(tokens).to(ranks.device), torch.from_numpy(valid).to(ranks.device))
            total += engine.loss(batch).double().cpu()
        if validation.tokens:
            loss = float(ranks.sum(total)) / validation.tokens
            metrics[f"validation/{name}/loss"] = loss
            metrics[f"validation/{name}/perplexity"] = math.exp(min(loss, 700.0))
    engine.module.train()
    return metrics
