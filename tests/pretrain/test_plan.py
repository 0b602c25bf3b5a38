"""`pretrain plan`: what a run needs and what to expect, for every config that ships."""

from __future__ import annotations

import itertools
import json
import math
import shlex
import time
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
from typer.testing import CliRunner

import configs
from configs import ConfigError
from pretrain import plan as plans
from pretrain.cli import app
from pretrain.engine.zero import DeepSpeed
from pretrain.memory import GIB
from pretrain.models.gpt import Gpt
from pretrain.plan import CARDS, GPU_HOURS_PER_FAULT, PUBLISHED, Hardware, expected_mfu, load_plan, make_plan
from tests.pretrain.fitted import a_run

PLANNED = [path for path in configs.all_files() if path.parent.name in ("configs", "model")]
GPT3 = {"kind": "gpt", "layers": 96, "width": 12288, "heads": 96, "context": 2048, "vocab_size": 50257}


@pytest.fixture(autouse=True)
def _no_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here depends on how fast this machine is."""
    monkeypatch.setattr(plans, "_cpu_tflops", lambda _precision, _width: 0.06)


@pytest.fixture
def gpt3(tmp_path: Path) -> Path:
    path = tmp_path / "gpt3.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in GPT3.items()))
    return path


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_config_can_be_planned(path: Path) -> None:
    made = load_plan(path, ["hardware.gpu=h100", "hardware.nodes=16"])
    assert [each.hardware.split()[-1] for each in made.expected][:3] == ["H100", "H200", "A100"]
    assert made.advised.micro_batch_seqs > 0 and made.advised.memory.total < 79 * GIB
    json.dumps(made.tree())


def test_gpt_3_is_shared_by_1024_gpus(gpt3: Path) -> None:
    made = load_plan(gpt3, ["hardware.nodes=128", "batch_tokens=3200Ki"])
    assert made.parameters == 174_604_259_328
    assert made.advised.zero_stage == 3 and made.advised.offload == "none" and made.advised.micro_batch_seqs > 0
    assert made.as_configured.micro_batch_seqs == 0
    assert made.reason.startswith("ZeRO 1 alone needs 1,")
    assert made.advised.memory.total < 79 * GIB < made.as_configured.memory.total
    assert made.saves.bytes == 12 * made.parameters


def test_what_one_gpu_does_not_hold_says_what_is_needed(gpt3: Path) -> None:
    made = load_plan(gpt3, ["hardware.nodes=1", "hardware.gpus_per_node=1"])
    assert made.advised.micro_batch_seqs == 0
    assert made.reason.startswith("does not fit; about 64 GPUs are needed (hardware.nodes=64)")
    fits = load_plan(gpt3, ["hardware.nodes=64", "hardware.gpus_per_node=1"])
    assert fits.advised.micro_batch_seqs > 0


def test_hardware_is_apart_from_the_run_and_the_run_may_be_overridden() -> None:
    path = configs.CONFIGS / "gpt2-small.yaml"
    made = load_plan(path, ["hardware.gpu=a100", "batch_tokens=64Ki", "hardware.usd_per_gpu_hour=2"])
    assert made.hardware.gpu == "a100" and made.batch_seqs == 64
    first = made.expected[0]
    assert first.gpu_hours == pytest.approx(first.days * 24 * 8)
    assert first.gpu_hours is not None and first.usd == pytest.approx(first.gpu_hours * 2)
    assert all(each.usd is None for each in made.expected[1:])  # whose price is another


@pytest.mark.parametrize(
    "overrides",
    [
        ["hardware.nodes=64", "batch_tokens=3200Ki", "engine={kind: torch, loss: chunked}"],
        ["hardware.nodes=32", "batch_tokens=3200Ki", "micro_batch_seqs=1"],
        ["hardware.nodes=4", "hardware.host_gib=4000", "batch_tokens=3200Ki"],
        ["hardware.nodes=512", "engine.zero_stage=3", "engine.recompute=full", "engine.offload.optimizer=true"],
    ],
)
def test_what_is_advised_can_be_given_as_it_is_printed(overrides: list[str]) -> None:
    path = configs.CONFIGS / "gpt3-175b.yaml"
    printed = CliRunner().invoke(app, ["plan", str(path), *overrides]).stdout
    (line,) = (line for line in printed.splitlines() if line.startswith("advised: "))
    advised = shlex.split(line.removeprefix("advised: "))
    assert advised and all("=" in change for change in advised)
    followed = load_plan(path, [*overrides, *advised])
    assert followed.as_configured == followed.advised and followed.as_configured.fits and not followed.changes


def test_a_micro_batch_that_is_given_is_the_one_that_is_planned() -> None:
    path = configs.CONFIGS / "gpt2-xl.yaml"
    fits = load_plan(path, ["micro_batch_seqs=4"])
    assert fits.as_configured.micro_batch_seqs == 4 and not fits.notes
    more = load_plan(path, ["hardware.nodes=64", "micro_batch_seqs=4"])  # than a rank has of a step
    assert more.as_configured.micro_batch_seqs == more.advised.micro_batch_seqs == 1 and not more.changes
    large = load_plan(path, ["micro_batch_seqs=64"])
    assert large.as_configured.micro_batch_seqs == 64 and not large.as_configured.fits
    (note,) = large.notes
    assert note.startswith("as configured: does not fit: micro_batch_seqs=64 needs 1")


def test_smaller_steps_at_first_take_longer_and_leave_ranks_idle() -> None:
    path = configs.CONFIGS / "gpt3-13b.yaml"
    wide = ["hardware.nodes=16", "hardware.network_gb_s=25"]
    ramped, level = load_plan(path, wide), load_plan(path, [*wide, "batch_ramp=null"])
    assert ramped.advised == level.advised and ramped.expected[0].days > 1.01 * level.expected[0].days
    assert ramped.notes == ("112 of 128 ranks have nothing to do at first: a step has 16 sequences",)
    assert not level.notes


def test_the_host_s_memory_decides_where_states_are_offloaded() -> None:
    path = configs.CONFIGS / "gpt3-175b.yaml"
    small, large = (load_plan(path, ["hardware.nodes=4", f"hardware.host_gib={gib}"]) for gib in (256, 4000))
    assert not small.advised.fits and "(hardware.host_gib)" in small.reason
    assert large.advised.offload.startswith("optimizer") and "of 4,000 GiB (hardware.host_gib)" in large.reason


def test_a_tiny_model_waits_for_its_kernels() -> None:
    """However few its operations, a layer's kernels are started one after the other."""
    made = load_plan(configs.CONFIGS / "gpt2-10m.yaml", ["hardware.gpus_per_node=1", "micro_batch_seqs=1"])
    layers, length = 5, made.seq_tokens
    assert made.as_configured.tokens_per_s <= length / (layers * plans.LAYER_S)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "hardware.gpu=h300",
            "command line (hardware.gpu=h300): hardware.gpu: expected 'h100', 'h200', 'a100' or 'cpu'",
        ),
        ("hardware.node=2", "command line (hardware.node=2): hardware.node: unknown key; did you mean hardware.nodes?"),
    ],
)
def test_hardware_that_is_not_known_is_refused(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_plan(configs.CONFIGS / "gpt2-small.yaml", [override])
    assert str(caught.value).startswith(said)


def test_more_ranks_save_more_often_by_the_root_of_their_number(gpt3: Path) -> None:
    """Young 1974: sqrt(2 x cost x time between faults); the cost falls with the ranks as well, which each copy less."""
    few, many = (
        load_plan(gpt3, [f"hardware.nodes={nodes}", "hardware.save_gb_s=1000", "batch_tokens=3200Ki"]).saves
        for nodes in (16, 64)
    )
    assert few.mtbf_s == pytest.approx(GPU_HOURS_PER_FAULT * 3600 / 128) == pytest.approx(4 * many.mtbf_s)
    assert few.interval_s == pytest.approx(math.sqrt(2 * few.held_s * few.mtbf_s))
    assert few.interval_s == pytest.approx(4 * many.interval_s)


def test_a_small_model_is_not_saved_all_the_time() -> None:
    run = a_run(batch_tokens=2**20)
    few, many = (make_plan(run, Hardware(nodes=nodes)).saves for nodes in (1, 4096))
    assert few.held_s == many.held_s == plans.LEAST_HELD_S
    assert many.interval_s == plans.LEAST_INTERVAL_S < few.interval_s


def test_no_save_is_begun_before_the_one_before_it_is_whole() -> None:
    run = a_run(batch_tokens=2**20)
    saves = make_plan(run, Hardware(save_gb_s=1e-8)).saves
    assert saves.interval_s == 2 * saves.write_s


def test_rings_leave_a_node_by_all_its_network_cards() -> None:
    rates = [Hardware(nodes=2, gpus_per_node=gpus).sent_per_s / 1e9 for gpus in (8, 1)]
    assert rates == [400, 50]  # of the H100's 450 within the node
    assert Hardware(nodes=2, network_gb_s=25).sent_per_s == 25e9 and Hardware(nodes=1).sent_per_s == 450e9


def test_no_advice_is_slower_than_what_is_configured() -> None:
    for name, hardware in (("gpt3-2.7b", "h100"), ("gpt2-xl", "h100"), ("gpt3-2.7b", "a100"), ("gpt2-small", "h200")):
        for nodes in (1, 3):
            made = load_plan(configs.CONFIGS / f"{name}.yaml", [f"hardware.gpu={hardware}", f"hardware.nodes={nodes}"])
            assert not made.as_configured.fits or made.advised.tokens_per_s > 0.999 * made.as_configured.tokens_per_s


def test_advice_leaves_alone_what_it_does_not_know_better() -> None:
    path = configs.CONFIGS / "gpt2-small.yaml"
    assert not load_plan(path, ["engine.overlap_comm=true", "micro_batch_seqs=fit"]).changes
    alone = ["hardware.gpus_per_node=1", "engine={kind: torch}", "micro_batch_seqs=fit"]
    assert not load_plan(path, alone).changes


def test_the_share_of_the_peak_lies_between_what_was_published() -> None:
    for card, rows in PUBLISHED.items():
        assert all(expected_mfu(card, int(row.parameters))[0] == pytest.approx(row.mfu, abs=1e-3) for row in rows)
        assert all(0.3 < row.mfu < 0.7 and row.source for row in rows)
        for low, high in pairwise(rows):
            between = expected_mfu(card, int(math.sqrt(low.parameters * high.parameters)))[0]
            assert between == pytest.approx((low.mfu + high.mfu) / 2, abs=1e-3)
    assert "expect less" in expected_mfu("h100", 10_000_000)[1]
    assert all(card.mfu in PUBLISHED for card in CARDS.values())


@pytest.mark.parametrize(("second_s", "tokens"), [(1.0, 16), (1e-6, 1024)])
def test_a_slow_machine_is_timed_by_a_few_tokens(second_s: float, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without instructions for bf16 would take a minute for more. A first step that is slow decides nothing."""
    monkeypatch.undo()  # the fixed speed
    looks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: second_s * next(looks))
    gpt = Gpt(width=32, **plans.TRIAL)
    expected = tokens * gpt.flops_per_token(min(tokens, 256)) / 1e12 / second_s
    plans._cpu_tflops.cache_clear()
    assert plans._cpu_tflops("fp32", 32) == pytest.approx(expected)
    plans._cpu_tflops.cache_clear()


@pytest.mark.parametrize(
    ("stage", "precision", "micro_steps", "elements"),
    [
        (1, "bf16", 4, 4 + 2),
        (1, "fp16", 4, 2 * 4 + 2),  # DeepSpeed's own way: an all-reduce
        (2, "bf16", 4, 4 * 2 * 4 + 2),
        (3, "bf16", 4, 4 * (4 + 2 * 2)),
        (3, "bf16", 1, 8),
    ],
)
def test_what_ranks_send_is_that_of_the_zero_paper(
    stage: int, precision: Literal["bf16", "fp16"], micro_steps: int, elements: int
) -> None:
    """Rajbhandari et al. 2020, section 7: 2, 2 and 3 times the model, here with gradients in fp32."""
    sent = plans._sent_bytes(DeepSpeed(zero_stage=stage, precision=precision), 1000, 2, 8, micro_steps)
    assert sent == pytest.approx(1000 * elements * 7 / 8)


def test_a_slower_network_is_a_larger_share_of_the_step() -> None:
    path = configs.CONFIGS / "gpt2-small.yaml"
    fast, slow = (
        load_plan(path, ["hardware.nodes=2", f"hardware.network_gb_s={rate}"]).expected[0].choice for rate in (400, 25)
    )
    assert slow.communication > fast.communication
    assert slow.tokens_per_s < fast.tokens_per_s


def test_the_command_prints_a_table_or_json(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["plan", str(configs.CONFIGS / "gpt2-small.yaml"), "hardware.nodes=2"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    for text in (
        "124,439,808 parameters",
        "masters, moments",
        "16 x H200",
        "estimates",
        "checkpoint: 1.493 GB",
        "advised:",
    ):
        assert text in shown.stdout
    assert all(len(line) <= 200 for line in shown.stdout.splitlines())
    tree = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert tree["parameters"] == 124_439_808 and tree["estimates"] is True
    assert tree["hardware"]["nodes"] == 2 and len(tree["expected"]) == 4
    assert tree["advised"]["memory"]["weights"] == 2 * 124_439_808
    assert {row["source"] for row in tree["sources"]["h100"]} == {row.source for row in PUBLISHED["h100"]}


@pytest.mark.parametrize(
    ("name", "seqs"), [("gpt3-350m", 256), ("gpt3-2.7b", 512), ("gpt3-13b", 1024), ("gpt3-175b", 1600)]
)
def test_a_model_by_itself_has_the_batch_of_its_size(name: str, seqs: int) -> None:
    assert load_plan(configs.CONFIGS / "model" / f"{name}.yaml", ["hardware.nodes=64"]).batch_seqs == seqs
