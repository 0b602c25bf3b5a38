from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from configs import CONFIGS, ConfigError, Section, dump, load
from pretrain.models import Model
from pretrain.models.gpt import GPT, Gpt
from pretrain.models.loss import weighted_loss
from pretrain.models.weights import initialize

TINY = Gpt(layers=3, width=48, heads=4, context=32, vocab_size=101)


class Run(Section):
    model: Model


def started(config: Gpt = TINY, seed: int = 1) -> GPT:
    model = config.build()
    initialize(model, seed)
    return model.eval()


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(TINY.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("path", sorted((CONFIGS / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_model_config_loads_and_builds(path: Path) -> None:
    with torch.device("meta"):
        assert load(Gpt, path).build().lm_head.weight.is_meta


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2-small", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("gpt2-10m", 11_572_160),
        ("gpt1", 116_535_552),
        ("gpt3-125m", 125_226_240),
        ("gpt3-350m", 355_871_744),
        ("gpt3-760m", 760_300_032),
        ("gpt3-1.3b", 1_315_723_264),
        ("gpt3-2.7b", 2_651_553_280),
        ("gpt3-6.7b", 6_658_404_352),
        ("gpt3-13b", 12_853_386_240),
        ("gpt3-175b", 174_604_259_328),
        ("demo", 1_350_400),
    ],
)
def test_parameter_counts(name: str, count: int) -> None:
    """Counted on the meta device, so that 175 B weigh nothing."""
    assert load(Gpt, CONFIGS / f"model/{name}.yaml").parameter_count() == count


def test_every_model_config_has_its_count_above() -> None:
    counted = {case[0] for mark in vars(test_parameter_counts)["pytestmark"] for case in mark.args[1]}
    assert counted == {path.stem for path in (CONFIGS / "model").glob("*.yaml")}


def test_an_untied_model_has_one_more_table() -> None:
    untied = TINY.model_copy(update={"tied": False})
    assert untied.parameter_count() - TINY.parameter_count() == TINY.vocab_size * TINY.width


def test_a_model_without_biases_has_matrices_and_gains_only() -> None:
    model = TINY.model_copy(update={"bias": False}).build()
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]


def test_flops_per_token_count_products_not_lookups() -> None:
    assert TINY.flops_per_token(16) == 6 * (TINY.parameter_count() - 32 * 48) + 12 * 3 * 48 * 16
    untied = TINY.model_copy(update={"tied": False})
    assert untied.flops_per_token(16) == TINY.flops_per_token(16)


def test_a_banded_layer_costs_its_band() -> None:
    banded = TINY.model_copy(update={"attention": ("dense", "banded"), "band": 4})
    assert TINY.flops_per_token(16) - banded.flops_per_token(16) == 12 * 48 * (16 - 4)
    assert TINY.flops_per_token(3) == banded.flops_per_token(3)


def test_flops_per_token_of_the_smallest_gpt2() -> None:
    small = load(Gpt, CONFIGS / "model/gpt2-small.yaml")
    assert small.flops_per_token(1024) == 6 * 123_653_376 + 12 * 12 * 768 * 1024


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("heads=5", "model: width must be a multiple of heads, got width 128 and heads 5"),
        ("layers=0", "model.layers: input should be greater than 0, got 0"),
        ("dropout=1", "model.dropout: input should be less than 1, got 1.0"),
        ("attention=[sparse]", "model.attention.0: expected 'dense' or 'banded', got 'sparse'"),
        (
            "attention=[dense, banded]",
            "model: band is the width of banded layers: expected both or neither, got attention [dense, banded] and "
            "band null",
        ),
        (
            "band=256",
            "model: band is the width of banded layers: expected both or neither, got attention [dense] and band 256",
        ),
        ("attention=[]", "model: attention must name the kind of at least one layer, got []"),
        ("n_layer=3", "model.n_layer: unknown key; did you mean model.layers?"),
    ],
)
def test_what_is_wrong_with_a_model_is_said(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: model/demo.yaml\n")
    with pytest.raises(ConfigError) as error:
        load(Run, path, [f"model.{override}"])
    assert str(error.value).endswith(message)


def test_a_dumped_model_loads_back(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text(dump(TINY))
    assert load(Gpt, tmp_path / "model.yaml") == TINY


def test_the_attention_pattern_is_tiled() -> None:
    assert len(TINY.model_copy(update={"attention": ("dense", "dense")}).build().blocks) == 3


def test_a_tied_head_is_the_embedding() -> None:
    model = started()
    assert model.lm_head.weight is model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_no_position_sees_what_comes_after_it() -> None:
    model, row = started(), tokens(1, 20)
    changed = row.clone()
    changed[0, 12] = (changed[0, 12] + 1) % TINY.vocab_size
    before, after = model(row), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert (before[:, 12:] - after[:, 12:]).abs().amax(-1).gt(0).all()


def test_the_loss_is_the_weighted_sum_of_the_token_losses() -> None:
    model, rows = started(), tokens(2, 17)
    weights = torch.rand(2, 16)
    loss = model(rows[:, :-1], rows[:, 1:], weights)
    logits = model(rows[:, :-1]).double()
    expected = -(logits.log_softmax(-1).gather(-1, rows[:, 1:, None]).squeeze(-1) * weights).sum()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_the_loss_of_bf16_logits_is_computed_in_fp32() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = (4 * torch.randn(8, 128, 1000, generator=generator)).bfloat16()
    targets = torch.randint(1000, (8, 128), generator=generator)
    weights = torch.ones(8, 128)
    weights[-1] = 0
    exact = F.cross_entropy(logits[:-1].double().flatten(0, 1), targets[:-1].flatten(), reduction="sum")
    torch.testing.assert_close(weighted_loss(logits, targets, weights).double(), exact, rtol=1e-6, atol=0)


def test_a_filler_row_changes_neither_loss_nor_gradient() -> None:
    rows = tokens(3, 17)
    weights = torch.ones(3, 16)
    weights[2] = 0
    with_filler, without = started(), started()
    loss = with_filler(rows[:, :-1], rows[:, 1:], weights)
    loss.backward()
    same = without(rows[:2, :-1], rows[:2, 1:], weights[:2])
    same.backward()
    torch.testing.assert_close(loss, same, rtol=1e-6, atol=0)
    for a, b in zip(with_filler.parameters(), without.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_a_new_model_predicts_nothing_in_particular() -> None:
    rows = tokens(8, 33)
    loss = started()(rows[:, :-1], rows[:, 1:], torch.ones(8, 32)) / 256
    assert abs(float(loss.detach()) - math.log(TINY.vocab_size)) < 0.05


def test_dropout_acts_in_training_only() -> None:
    model, row = started(TINY.model_copy(update={"dropout": 0.5})), tokens(1, 16)
    assert torch.equal(model(row), model(row))
    model.train()
    torch.manual_seed(1)
    first, second = model(row), model(row)
    torch.manual_seed(1)
    assert torch.equal(model(row), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("cuts", [(1,), (7, 8, 9), (5, 20), tuple(range(1, 32))], ids=lambda cuts: f"{len(cuts)} cuts")
def test_logits_with_a_past_equal_the_full_forward(cuts: tuple[int, ...]) -> None:
    model, rows = started(), tokens(2, 32)
    past = model.new_past()
    parts = [model(part, past=past) for part in rows.tensor_split(cuts, dim=1)]
    assert past[0].length == 32
    torch.testing.assert_close(torch.cat(parts, dim=1), model(rows), rtol=0, atol=1e-5)


def test_it_compiles_whole_with_its_loss() -> None:
    model, rows = started(), tokens(2, 17)
    batch = rows[:, :-1], rows[:, 1:], torch.ones(2, 16)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(*batch), model(*batch))
