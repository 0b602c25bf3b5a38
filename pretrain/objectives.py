"""What is learned from a row of tokens: rows in, (inputs, targets, weights) out. Pure; one class, one objective."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from configs import Section


class Batch(NamedTuple):
    """What a model's forward takes to give its loss: `model(*batch)`. B rows of T tokens."""

    inputs: Tensor  # int64 [B, T]
    targets: Tensor  # int64 [B, T]
    weights: Tensor  # float32 [B, T]; the share of each target in the loss, 0 where it does not count
    documents: Tensor | None = (
        None  # int [B, T], which document of its row each input is of; None: rows are not divided
    )
    losses: Tensor | None = None  # float32 [B, T]: forward puts the weighted loss of each target here, where asked to


class NextToken(Section):
    """Predict each token from those before it (Radford et al. 2018, equation 1)."""

    kind: Literal["next_token"] = "next_token"

    def batch(self, tokens: Tensor, valid: Tensor, documents: Tensor | None = None) -> Batch:
        """From rows int64[B, T + 1], of which the first `valid` int64[B] targets count: T, or 0 in a filler row.

        The last target of a document is the first token of the next, as without `documents` int[B, T].
        """
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        places = torch.arange(targets.size(1), device=tokens.device)
        return Batch(inputs, targets, (places < valid[:, None]).float(), documents)


Objective = NextToken
