"""Validation loss per corpus: the same rows whatever the number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from pydantic import Field

from configs import Int, Section
from data_pipeline.stream import Validation
from pretrain.engine import Engine
from pretrain.objectives import Objective
from pretrain.ranks import Pending, Ranks


class Evaluation(Section):
    """When and on how much validation text a run is measured."""

    every_steps: Int = Field(default=500, gt=0)
    tokens: Int = Field(default=1_000_000, gt=0)  # per corpus, at most


class Abandoned(Exception):
    """A rank was asked to stop: the evaluation is left unfinished, on all ranks at the same batch."""


def validation_losses(
    engine: Engine,
    objective: Objective,
    corpora: Mapping[str, Validation],
    ranks: Ranks,
    rows: int,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Mean loss (nats per token) of each corpus that has validation text, and its exponential, the perplexity.

    `asked_to_stop` is called before each batch; when it is true on any rank, Abandoned is raised on all of them a
    batch later.
    """
    engine.module.eval()
    try:
        return _losses(engine, objective, corpora, ranks, rows, asked_to_stop)
    finally:
        engine.module.train()


def _losses(
    engine: Engine,
    objective: Objective,
    corpora: Mapping[str, Validation],
    ranks: Ranks,
    rows: int,
    asked_to_stop: Callable[[], bool],
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    asked: Pending | None = None
    for name, validation in corpora.items():
        total = torch.zeros((), dtype=torch.float64)
        for read in validation.batches(rows, ranks.rank, ranks.size):
            before, asked = asked, ranks.sum_later(torch.tensor([float(asked_to_stop())]))
            if before is not None and before.result().item():
                asked.result()
                raise Abandoned
            tokens, valid, documents = (
                None if part is None else torch.from_numpy(part).to(ranks.device) for part in read
            )
            assert tokens is not None and valid is not None
            total += engine.loss(objective.batch(tokens, valid, documents)).double().cpu()
        if validation.tokens:
            loss = float(ranks.sum(total)) / validation.tokens
            metrics[f"validation/{name}/loss"] = loss
            metrics[f"validation/{name}/perplexity"] = math.exp(min(loss, 700.0))
    return metrics
