"""The whole-run configs against what the papers print."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from configs import CONFIGS
from data_pipeline.order import Steps
from pretrain.run import TrainRun, load_run


class Row(NamedTuple):
    """Of table 2.1 of Brown et al. 2020."""

    parameters: float
    layers: int
    heads: int
    head_width: int
    batch_tokens: float
    lr: float


TABLE = {
    "125m": Row(125e6, 12, 12, 64, 0.5e6, 6.0e-4),
    "350m": Row(350e6, 24, 16, 64, 0.5e6, 3.0e-4),
    "760m": Row(760e6, 24, 16, 96, 0.5e6, 2.5e-4),
    "1.3b": Row(1.3e9, 24, 16, 128, 1e6, 2.0e-4),  # 24 heads as printed, see the model's config
    "2.7b": Row(2.7e9, 32, 32, 80, 1e6, 1.6e-4),
    "6.7b": Row(6.7e9, 32, 32, 128, 2e6, 1.2e-4),
    "13b": Row(13e9, 40, 40, 128, 2e6, 1.0e-4),
    "175b": Row(175e9, 96, 96, 128, 3.2e6, 0.6e-4),
}


def recipe(name: str) -> TrainRun:
    return load_run(CONFIGS / f"{name}.yaml")


@pytest.mark.parametrize("size", TABLE)
def test_gpt3_is_as_its_table_says(size: str) -> None:
    run, row = recipe(f"gpt3-{size}"), TABLE[size]
    model = run.model
    assert model.parameter_count() == pytest.approx(row.parameters, rel=0.02)
    assert (model.layers, model.heads, model.width) == (row.layers, row.heads, row.heads * row.head_width)
    assert (model.context, run.data.seq_tokens, model.bands[:3]) == (2048, 2048, [None, 256, None])
    assert run.batch_tokens == pytest.approx(row.batch_tokens, rel=0.05)
    assert run.optim.lr_peak == row.lr
    assert (run.optim.beta1, run.optim.beta2, run.optim.eps) == (0.9, 0.95, 1e-8)
    assert (run.optim.weight_decay, run.optim.clip_norm) == (0.1, 1.0)
    weights = {name: source.weight for name, source in run.data.sources.items()}
    assert weights == {"common_crawl": 0.6, "webtext2": 0.22, "books1": 0.08, "books2": 0.08, "wikipedia": 0.03}
    assert run.train_tokens == 300e9
    marks = [run.schedule.factor(int(tokens), run.train_tokens) for tokens in (37.5e6, 375e6, 260e9, 300e9)]
    assert marks == pytest.approx([0.1, 1.0, 0.1, 0.1])


@pytest.mark.parametrize("size", TABLE)
def test_gpt3s_batch_grows_from_32_thousand_tokens_over_4_to_12_billion(size: str) -> None:
    run = recipe(f"gpt3-{size}")
    assert run.batch_ramp is not None and 4e9 <= run.batch_ramp.over_tokens <= 12e9
    pieces = run.step_pieces(0)
    steps = Steps(pieces)
    assert steps.batch(0) * 2048 == 2**15
    assert pieces[-1][1] == run.batch_seqs
    assert pieces[-1][0] * 2048 == pytest.approx(run.batch_ramp.over_tokens, rel=1e-3)
    total = steps.step_of(int(300e9) // 2048)
    assert total > 300e9 / run.batch_tokens  # the ramp takes more steps


def test_gpt1_is_as_its_section_says() -> None:
    run = recipe("gpt1")
    assert (run.batch_seqs, run.data.seq_tokens, run.batch_ramp) == (64, 512, None)
    assert (run.model.norm, run.model.dropout, run.model.vocab_size) == ("post", 0.1, 40_479)
    assert (run.optim.lr_peak, run.optim.weight_decay) == (2.5e-4, 0.01)
    update = run.batch_tokens
    factors = [run.schedule.factor(updates * update, run.train_tokens) for updates in (1, 1000, 2000)]
    assert factors == [1 / 2000, 0.5, 1.0]
    assert run.schedule.factor(run.train_tokens, run.train_tokens) == 0


@pytest.mark.parametrize("size", ["small", "medium", "large", "xl"])
def test_gpt2_has_the_published_batch(size: str) -> None:
    run = recipe(f"gpt2-{size}")
    assert (run.batch_seqs, run.data.seq_tokens, run.model.context) == (512, 1024, 1024)
    assert run.model.norm == "pre" and run.batch_ramp is None
