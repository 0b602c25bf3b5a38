"""The preflight: what is wrong with a node is said with its name, before the first step."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pretrain.preflight import Fitness, Preflight, _faults
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
    if "free" in words:
        lines = (tmp_path / "run" / "logs" / "attempt-1" / "suspects.jsonl").read_text().splitlines()
        assert [json.loads(each)["host"] for each in lines] == [HOST, HOST]
        assert json.loads(lines[0])["cause"].startswith("preflight: ")


def test_what_a_preflight_measures_is_said(tmp_path: Path) -> None:
    started = Started(write_run(tmp_path, steps=10), 2)
    assert started.wait() == [0, 0]
    assert "preflight: 2 ranks, matmul" in started.text
