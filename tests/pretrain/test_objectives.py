from __future__ import annotations

import torch

from configs import build
from pretrain.models.gpt import Gpt
from pretrain.models.weights import initialize
from pretrain.objectives import NextToken, Objective


def test_each_token_is_the_target_of_the_place_before_it() -> None:
    tokens = torch.arange(10).view(2, 5)
    inputs, targets, weights, documents, losses = NextToken().batch(tokens, torch.tensor([4, 4]))
    assert inputs.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert targets.tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert weights.dtype == torch.float32 and weights.tolist() == [[1.0] * 4] * 2
    assert documents is None and losses is None


def test_only_the_first_valid_targets_count() -> None:
    weights = NextToken().batch(torch.zeros(3, 5, dtype=torch.int64), torch.tensor([4, 0, 2])).weights
    assert weights.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]]


def test_documents_go_along_and_change_no_target() -> None:
    tokens, valid = torch.arange(10).view(2, 5), torch.tensor([4, 2])
    numbers = torch.tensor([[0, 0, 1, 1], [0, 1, 2, 2]])
    plain, divided = NextToken().batch(tokens, valid), NextToken().batch(tokens, valid, numbers)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(divided[:3], plain[:3], strict=True))
    assert divided.documents is numbers


def test_a_batch_is_what_a_model_takes() -> None:
    model = Gpt(layers=1, width=8, heads=1, context=4, vocab_size=16).build()
    initialize(model, seed=1)
    tokens = torch.randint(16, (3, 5), generator=torch.Generator().manual_seed(1))
    objective = NextToken()
    whole = model(*objective.batch(tokens, torch.tensor([4, 4, 3])))
    parts = [model(*objective.batch(tokens[i : i + 1], torch.tensor([n]))) for i, n in enumerate([4, 4, 3])]
    torch.testing.assert_close(whole, torch.stack(parts).sum())
    assert model(*objective.batch(tokens, torch.tensor([0, 0, 0]))) == 0


def test_it_is_what_the_config_names() -> None:
    assert build(Objective, {"kind": "next_token"}, "run.yaml") == NextToken()
