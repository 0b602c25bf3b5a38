"""`micro_batch_seqs: fit`: the largest that fits, the same on every rank, and nothing else changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import configs
from configs import ConfigError
from pretrain import fit
from pretrain.guard import OUT_OF_MEMORY
from pretrain.memory import evened
from pretrain.run import TrainRun
from tests.pretrain.engine import cases
from tests.pretrain.fitted import a_run, after_trials, one_rank_runs_out, one_trial
from tests.processes import RankProcess, environment, free_port, on_ranks
from tests.runs import Started, losses, write_run


@pytest.mark.parametrize(
    ("kind", "precision", "ranks", "failing", "rows", "engines"),
    [
        ("torch", "bf16", 2, "", 6, 1),  # the largest fits
        ("torch", "fp32", 1, "fit.step#12=oom; fit.step#4=oom; fit.step#6=oom", 3, 3),
        ("deepspeed", "bf16", 1, "fit.step#12=oom", 6, 2),
    ],
)
def test_trials_find_the_largest_and_leave_no_trace(
    kind: str, precision: str, ranks: int, failing: str, rows: int, engines: int, tmp_path: Path
) -> None:
    found = on_ranks(tmp_path, ranks, after_trials, cases.settings(kind, precision), failing)
    for its_rows, its_engines, after, untouched in found:
        assert (its_rows, its_engines) == (rows, engines)
        assert after == untouched


@pytest.mark.parametrize(("rows", "passes"), [(12, 1), (6, 2), (2, 2)])
def test_a_trial_is_as_a_step_of_the_run(rows: int, passes: int, tmp_path: Path) -> None:
    """Gradients lie beside the second micro-batch, and attention may be told of documents."""
    assert on_ranks(tmp_path, 1, one_trial, rows) == [[(rows, True)] * passes]


def test_ranks_that_wait_for_one_without_memory_end_with_it(tmp_path: Path) -> None:
    port = free_port()
    processes = [
        RankProcess(
            one_rank_runs_out, cases.settings("torch", "fp32"), 0,
            variables=environment(rank, 2, port), log=tmp_path / str(rank),
        )
        for rank in range(2)
    ]  # fmt: skip
    codes = [process.wait(60) for process in processes]
    said = "rank 0 alone ran out of memory in a step of 6 sequences, and the others wait for it in a collective; "
    for rank in range(2):
        text = (tmp_path / str(rank)).read_text()
        assert said in text and "set micro_batch_seqs=3" in text, text
    assert codes == [OUT_OF_MEMORY] * 2


def test_a_run_that_fits_its_micro_batch_trains_as_with_any_other(tmp_path: Path) -> None:
    given, fitted = write_run(tmp_path / "given", steps=12), write_run(tmp_path / "fitted", steps=12)
    started = [Started(given), Started(fitted, 1, "micro_batch_seqs=fit")]
    assert [each.wait() for each in started] == [[0], [0]], started[1].text
    assert "micro_batch_seqs: 10 fit (10 by arithmetic)" in started[1].text
    assert losses(fitted.parent, 1) == pytest.approx(losses(given.parent, 1), abs=1e-5)
    assert configs.load(TrainRun, fitted.parent / "run" / "run.yaml").micro_batch_seqs == "fit"
    attempt = json.loads((fitted.parent / "run" / "journal" / "1.jsonl").read_text().splitlines()[0])
    assert attempt["config"]["micro_batch_seqs"] == 10


def test_on_a_cpu_the_arithmetic_decides_within_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(batch_tokens=64 * cases.LENGTH)
    sizes = []
    for free in (1, 10_000_000, 20_000_000, 10**9):
        monkeypatch.setattr(fit, "free_memory", lambda _device, free=free: float(free))
        sizes.append(fit.estimate(run, _Alone()))  # type: ignore[arg-type]
    assert sizes[0] == 1 and sizes[-1] == 64
    assert 1 < sizes[1] < sizes[2] < 64


def test_the_least_of_all_ranks_counts_and_those_of_a_node_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(batch_tokens=64 * cases.LENGTH)
    monkeypatch.setattr(fit, "free_memory", lambda _device: 30_000_000.0)
    alone, together = fit.estimate(run, _Alone()), fit.estimate(run, _Alone(hosts=["a", "a"]))  # type: ignore[arg-type]
    poor = fit.estimate(run, _Alone(others=[15e6]))  # type: ignore[arg-type]
    assert together < alone and poor < alone


def test_a_limit_of_the_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "CGROUP", tmp_path)
    free = fit.free_memory(_Alone().device)
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert fit.free_memory(_Alone().device) == 2e6 < free
    (tmp_path / "memory.max").write_text("max\n")
    assert fit.free_memory(_Alone().device) > 2e6


@pytest.mark.parametrize(
    ("largest", "seqs", "rows"),
    [
        (12, 12, 12), (11, 12, 6), (7, 12, 6), (5, 12, 4), (1, 12, 1),
        (10, 64, 8), (22, 64, 16),  # 7 x 10 and 3 x 22 would compute six and two rows for nothing
        (12, 13, 7), (20, 509, 17),  # but not 13 or 509 by one
    ],
)  # fmt: skip
def test_micro_batches_fill_a_step_with_few_rows_to_spare(largest: int, seqs: int, rows: int) -> None:
    assert evened(largest, seqs) == rows


@pytest.mark.parametrize("given", ["fits", "0", "2.5", "-1"])
def test_what_is_no_number_of_sequences_is_refused_in_a_line(given: str) -> None:
    with pytest.raises(ConfigError) as caught:
        a_run(micro_batch_seqs=given)
    assert str(caught.value) == (f"test: micro_batch_seqs: expected a whole number above 0, or fit, got '{given}'")


class _Alone:
    """A rank as `estimate` sees it."""

    def __init__(self, hosts: list[str] | None = None, others: list[float] | None = None) -> None:
        import torch

        self.hosts, self.others = hosts or ["a"], others or []
        self.rank, self.size, self.device = 0, 1, torch.device("cpu")

    def gather(self, value: float) -> list[float]:
        return [value, *self.others]
