"""Dropout draws the same numbers wherever the same place of a run is computed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import checkpoint
from pretrain.checkpoint import Checkpoints, Position, Saver
from pretrain.engine import Engine
from pretrain.lineage import Lineage
from pretrain.models.weights import initialize
from pretrain.noise import Noise
from pretrain.ranks import Ranks
from tests.pretrain.engine import cases
from tests.processes import on_ranks

MODEL = cases.MODEL.model_copy(update={"dropout": 0.1})


def test_every_place_has_numbers_of_its_own() -> None:
    places = [(seed, step, rank) for seed in range(3) for step in range(11) for rank in range(12)]
    keys = {Noise(*place).key(micro_step) for place in places for micro_step in range(11)}
    assert len(keys) == 3 * 11 * 12 * 11


def test_the_numbers_of_a_seed_stay_what_they_are() -> None:
    assert Noise(seed=1, step=2, rank=3).key(4) == 8566714155411286064


def train(ranks: Ranks, engine: Engine, steps: range) -> list[float]:
    """Steps of several micro-batches; whatever is drawn in between changes nothing."""
    losses = []
    for step in steps:
        torch.rand(step + ranks.rank)
        fed = cases.batches(ranks, step, micro_rows=2)
        assert len(fed) > 1
        outcome = engine.step(
            fed, cases.GLOBAL_ROWS * cases.LENGTH, cases.OPTIM.rates((step + 1) / 4), Noise(7, step, ranks.rank)
        )
        losses.append(outcome.loss)
    return losses


def made(ranks: Ranks, kind: str) -> Engine:
    model = MODEL.build()
    initialize(model, seed=1)
    return cases.settings(kind, "fp32").build(model, cases.OPTIM, ranks)


def resumed(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """By engine: losses and the state's hash after a checkpoint, going on and in a fresh engine."""
    found = {}
    for kind in ("torch", "deepspeed"):
        place, live = folder / kind, made(ranks, kind)
        live.module.eval()
        undropped = sum(float(live.loss(batch)) for batch in cases.batches(ranks, 0, micro_rows=2))
        live.module.train()
        first = train(ranks, live, range(3))
        if ranks.rank == 0:
            Lineage(place).take(None, 0, None, "test")
        ranks.barrier()
        saver = Saver(place, Checkpoints(), 1, ranks.rank, ranks.size, {})
        saver.save(live.state(), Position(3, 3 * cases.GLOBAL_ROWS, 0, "0" * 32), digest_share=1)
        saver.wait()
        ranks.barrier()
        went_on = train(ranks, live, range(3, 6)), cases.state_hash(ranks, live)
        fresh = made(ranks, kind)
        state = fresh.state()
        checkpoint.load(checkpoint.open_checkpoint(checkpoint.live_checkpoints(place)[0]), state)
        fresh.loaded(state)
        found[kind] = {
            "undropped": undropped / (cases.GLOBAL_ROWS * cases.LENGTH),
            "first": first,
            "went_on": went_on,
            "resumed": (train(ranks, fresh, range(3, 6)), cases.state_hash(ranks, fresh)),
        }
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("dropout")
    return on_ranks(folder, 2, resumed, folder)


@pytest.mark.parametrize("kind", ["torch", "deepspeed"])
def test_a_fresh_engine_goes_on_to_the_same_bits(kind: str, both: list[dict[str, Any]]) -> None:
    for rank in both:
        assert rank[kind]["resumed"] == rank[kind]["went_on"]


def test_zero_drops_what_the_torch_engine_drops(both: list[dict[str, Any]]) -> None:
    for rank in both:
        assert rank["deepspeed"]["first"] == pytest.approx(rank["torch"]["first"], abs=2e-6)
        assert abs(rank["torch"]["first"][0] - rank["torch"]["undropped"]) > 1e-4
