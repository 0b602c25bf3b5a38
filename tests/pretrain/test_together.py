"""Waiting for storage, all ranks together: what one waits for makes none deaf to a signal, and blames no other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.blocks import Block
from data_pipeline.shards import Shards
from data_pipeline.stream import Corpora, Validation
from pretrain.evaluate import validation_losses
from pretrain.objectives import Batch, NextToken
from pretrain.ranks import Place, Ranks
from pretrain.together import Abandoned
from tests.pretrain.finished_run import write_config


@pytest.fixture(scope="module")
def alone() -> Iterator[Ranks]:
    """This process as the only rank."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "")  # so that what Ranks sets is taken back
        yield Ranks(Place(0, 1, 0, None, "alone"))
        dist.destroy_process_group()


class Losses:
    """As an engine is asked for them."""

    module: nn.Module = nn.Identity()

    def loss(self, batch: Batch) -> Tensor:
        return torch.ones(())


class Away(Validation):
    """Validation text whose storage does not answer until `answers`, or 20 s have gone."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.asked, self.answers = threading.Event(), threading.Event()

    def _block(self, shards: Shards, shard: int, row: int) -> Block:
        self.asked.set()
        self.answers.wait(20)
        return super()._block(shards, shard, row)


def test_a_signal_is_heard_while_the_second_corpus_is_waited_for(alone: Ranks, tmp_path: Path) -> None:
    manifest = Corpora(write_config(tmp_path).data).manifests["alpha"]
    first, second = Validation(manifest, 1, 32, 10**6), Away(manifest, 1, 32, 10**6)

    def asked() -> bool:
        if second.asked.is_set():
            second.answers.set()  # so that the reading can end
        return second.asked.is_set()

    corpora = {"alpha": first, "beta": second}
    with pytest.raises(Abandoned):
        validation_losses(Losses(), NextToken(), corpora, alone, 4, asked_while_waiting=asked)
