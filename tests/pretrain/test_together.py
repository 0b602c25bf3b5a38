"""Waiting for storage, all ranks together: what one waits for makes none deaf to a signal, and blames no other."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.ahead import Reading
from data_pipeline.blocks import Block
from data_pipeline.files import Folder
from data_pipeline.shards import Shards
from data_pipeline.stream import Corpora, Validation
from pretrain.attempt import Attempt
from pretrain.evaluate import validation_losses
from pretrain.guard import KILL_WAIT, STOPPED, StopSignals
from pretrain.objectives import Batch, NextToken
from pretrain.ranks import Ranks
from pretrain.restore import same_tokenizer
from pretrain.run import load_run
from pretrain.together import Abandoned, Together
from tests.pretrain.finished_run import write_config
from tests.processes import on_ranks


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


def tokenizer_on(ranks: Ranks, config: str) -> str:
    corpora = Corpora(load_run(Path(config)).data)
    if ranks.rank == 1:  # which sees its storage no more
        corpora.manifests = {
            name: replace(each, files=Folder(Path("/none/x"))) for name, each in corpora.manifests.items()
        }
    return same_tokenizer(corpora, ranks).sha256


def test_a_rank_without_its_storage_has_the_tokenizer_that_rank_0_has(tmp_path: Path) -> None:
    run = write_config(tmp_path)
    first, second = on_ranks(tmp_path, 2, tokenizer_on, str(tmp_path / "config.yaml"))
    assert first == second == Corpora(run.data).tokenizer_sha256


def own_seconds(ranks: Ranks) -> float:
    """Of two batches, which come slowly on rank 1."""
    together, own_s = Together(ranks, lambda: False), 0.0
    with Reading((partial(time.sleep, 0.6 * ranks.rank) for _ in range(2)), 1, 1, "test") as reading:
        for _ in range(2):
            together.take(reading)
            own_s += together.own_s
    return own_s


def test_a_rank_that_waits_for_another_s_batch_does_not_count_it_as_its_own(tmp_path: Path) -> None:
    quick, slow = on_ranks(tmp_path, 2, own_seconds)
    assert quick < slow / 2


@pytest.mark.parametrize(
    ("kill_wait", "save_s", "saved_at", "saves"),
    [("30", 5.0, 3, True), ("30", 60.0, 3, False), ("30", 60.0, 4, True), ("30", None, None, True)],
)
def test_a_stop_in_a_wait_begins_no_save_that_cannot_end(
    kill_wait: str, save_s: float | None, saved_at: int | None, saves: bool, alone: Ranks
) -> None:
    """At step 4. Where that is saved already there is nothing to begin."""
    handlers = {number: signal.getsignal(number) for number in StopSignals.SIGNALS}
    try:
        stop = StopSignals({KILL_WAIT: kill_wait})
        os.kill(os.getpid(), signal.SIGTERM)
        attempt = SimpleNamespace(
            ranks=alone, stop=stop, save_s=save_s, position=SimpleNamespace(step=4),
            saver=SimpleNamespace(last_step=saved_at),
        )  # fmt: skip
        ending = Attempt.asked_to_stop(cast(Attempt, attempt))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert (ending.exit_code, ending.saves) == (STOPPED, saves)
    assert saves or ending.why == "stopped without a save, for which the time left is too short"
