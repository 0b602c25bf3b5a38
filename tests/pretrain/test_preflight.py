"""The preflight: what is wrong with a node is said with its name, before the first step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pretrain.preflight import Fitness, Preflight, _culprits, _faults
from tests.runs import Started, write_run

VERSIONS = {"torch": "2.13.0", "longhaul code": "abc"}
HOST = os.uname().nodename


def fitness(tflops: float = 600.0, peak: float | None = 989.0, problem: str = "", **versions: str) -> Fitness:
    return Fitness(tflops, peak, VERSIONS | versions, problem)


def test_equal_and_quick_ranks_have_no_fault() -> None:
    assert _faults(Preflight(), [fitness(), fitness(620), fitness(580)]) == []


def test_the_rank_that_differs_is_named() -> None:
    assert _faults(Preflight(), [fitness(), fitness(torch="2.11.0"), fitness()]) == [
        (1, "torch 2.11.0, the other ranks have 2.13.0")
    ]


def test_a_slow_gpu_is_named_and_so_are_gpus_that_are_all_slow() -> None:
    assert _faults(Preflight(), [fitness(), fitness(), fitness(190)]) == [
        (2, "matmul at 32% of the median rank's rate")
    ]
    assert _faults(Preflight(), [fitness(100), fitness(100)])[0] == (0, "matmul at 10% of 989 TFLOP/s")
    assert _faults(Preflight(), [fitness(0.1, None), fitness(0.02, None)]) == []  # a CPU's speed is nobody's business


@pytest.mark.parametrize(("settings", "words"), [
    ("preflight.least_free_gib=1e9", "GiB free, expected at least 1e+09"),
    ("preflight.least_all_reduce_gb_s=1e6", "GB/s over 2 ranks, expected at least 1e+06"),
])  # fmt: skip
def test_a_run_on_a_node_that_is_not_fit_does_not_begin(settings: str, words: str, tmp_path: Path) -> None:
    config = write_run(tmp_path)
    (tmp_path / "run" / "logs" / "attempt-1").mkdir(parents=True)
    started = Started(config, 2, settings, variables={"LONGHAUL_ATTEMPT": "1"})
    assert started.wait() == [1, 1]
    (line,) = [x for x in started.text.splitlines() if x.startswith("pretrain:")]
    assert words in line and line.startswith("pretrain: preflight: ")
    assert not (tmp_path / "run" / "lineage").exists()
    assert not (tmp_path / "run" / "logs" / "attempt-1" / "suspects.jsonl").exists()  # it is no single node's fault


def test_only_a_minority_is_to_blame() -> None:
    assert _culprits([(2, "its device computes wrong results")], 4) == [2]
    assert _culprits([(0, "x"), (1, "x"), (2, "x"), (3, "x")], 4) == []
    assert _culprits([(1, "torch 2.11.0, the other ranks have 2.13.0")], 2) == []
    assert _culprits([(None, "all-reduce at 1 GB/s")], 4) == []


def test_a_rank_that_slurm_gave_a_gpu_must_see_it(tmp_path: Path) -> None:
    (tmp_path / "run" / "logs" / "attempt-1").mkdir(parents=True)
    variables = {"LONGHAUL_ATTEMPT": "1", "SLURM_GPUS_ON_NODE": "2"}
    started = Started(write_run(tmp_path), 1, variables=variables)
    assert started.wait() == [1]
    assert f"preflight: rank 0 ({HOST}): was given 2 GPU(s) by SLURM, and torch sees none" in started.text


def test_what_a_preflight_measures_is_said(tmp_path: Path) -> None:
    started = Started(write_run(tmp_path, steps=10), 2)
    assert started.wait() == [0, 0]
    assert "preflight: 2 ranks, matmul" in started.text
