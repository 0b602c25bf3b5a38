"""What rank processes of the tests of `micro_batch_seqs: fit` run. Importable by them."""

from __future__ import annotations

import os
from typing import Any

import torch

import configs
from pretrain import fit
from pretrain.engine import Engine, EngineSettings
from pretrain.fit import tried
from pretrain.ranks import Ranks
from pretrain.run import TrainRun
from tests.pretrain.engine import cases


def a_run(**changes: Any) -> TrainRun:
    """A run of the engine tests' model, whose data are nowhere."""
    tree: dict[str, Any] = {
        "name": "small", "run_folder": "nowhere", "model": cases.MODEL.model_dump(mode="json"),
        "data": {"seq_tokens": cases.LENGTH, "sources": {"a": {"shards": "nowhere"}}}, "micro_batch_seqs": "fit",
        "batch_tokens": cases.GLOBAL_ROWS * cases.LENGTH, "train_tokens": 1_000_000, "optim": {"lr_peak": 1e-3},
        "schedule": {"kind": "constant"}, "engine": {"kind": "torch", "precision": "fp32"},
    }  # fmt: skip
    return configs.build(TrainRun, tree | changes, "test")


def after_trials(ranks: Ranks, settings: EngineSettings, failing: str) -> tuple[int, int, list[float], list[float]]:
    """(the micro-batch found, engines built, losses of three steps after the trials, the same without any)"""
    untouched = cases.train(ranks, cases.make(ranks, settings), range(3))
    built = 0

    def build() -> Engine:
        nonlocal built
        built += 1
        return cases.make(ranks, settings)

    os.environ["LONGHAUL_FAIL_AT"] = failing
    most = cases.GLOBAL_ROWS // ranks.size
    rows, engine = tried(a_run(), ranks, build(), build, most)
    del os.environ["LONGHAUL_FAIL_AT"]
    return rows, built, cases.train(ranks, engine, range(3)), untouched


def one_trial(ranks: Ranks, rows: int) -> list[tuple[int, bool]]:
    """For each micro-batch of a trial of `rows`: (its rows, whether attention was told of documents)"""
    data = {"seq_tokens": cases.LENGTH, "sources": {"a": {"shards": "nowhere"}}, "document_mask": True}
    engine = cases.make(ranks, cases.settings("torch", "fp32"))
    seen: list[tuple[int, bool]] = []
    engine.module.register_forward_pre_hook(lambda _, fed: seen.append((len(fed[0]), fed[3] is not None)))
    assert fit._fits(a_run(data=data), ranks, engine, rows)
    return seen


def one_rank_runs_out(settings: EngineSettings, alone: int) -> None:
    """A trial of which the step of one rank, alone, runs out of memory; the others wait for its gradients."""
    fit.GRACE_S = 1.0
    torch.set_num_threads(1)
    ranks = Ranks.join()
    if ranks.rank == alone:
        os.environ["LONGHAUL_FAIL_AT"] = "fit.step#6=oom"
    tried(a_run(), ranks, cases.make(ranks, settings), lambda: cases.make(ranks, settings), 6)
    os._exit(0)
