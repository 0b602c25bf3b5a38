"""Before the queue: what a run needs, how fast it will be and what it costs, on cards that are not here.

Memory is arithmetic (`pretrain.memory`). Speed is an estimate: what others have published for models of that size on
that card, and the bytes that ranks send each other at the rates of data sheets. Tables below name the sources.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import psutil
import torch
import yaml
from pydantic import Field

import configs
from configs import Float, Int, Section
from pretrain.engine import EngineSettings
from pretrain.engine.plain import DTYPES
from pretrain.engine.zero import DeepSpeed
from pretrain.memory import (
    GIB,
    Memory,
    Shape,
    evened,
    held_matrix,
    largest_micro_batch,
    step_memory,
    sums_whole,
    width_of,
)  # fmt: skip
from pretrain.meter import PEAK_FLOPS, duration
from pretrain.models.gpt import Gpt
from pretrain.models.loss import LossPlan, loss_plan_of
from pretrain.run import TrainRun, load_run

if TYPE_CHECKING:
    from rich.console import Console

GB = 1e9
FRAMEWORK = 1.5 * GIB  # of a GPU: CUDA's context, the kernels and NCCL's channels
ROOM = 0.95  # of what is left: an allocator cannot fill every gap
STATE_BYTES = 12  # of a parameter in a checkpoint: master and moments
GPU_HOURS_PER_FAULT = 16_384 * 54 * 24 / 419
FAULT_SOURCE = "Dubey et al. 2024, Llama 3, table 5: 419 unexpected interruptions of 16,384 GPUs in 54 days"
RECOMPUTED = {"none": 1.0, "selective": 1.07, "full": 4 / 3}  # Korthikanti et al. 2022, table 4; one forward of three
TRIAL = {"layers": 2, "heads": 4, "context": 256, "vocab_size": 2048}  # of a small step that is timed on a CPU
LONG_S = 2.0  # of such a step, which is not waited for any longer
LAYER_S = 0.3e-3  # that no micro-step is shorter than, for each layer: some 60 kernels are started at 5 us each
HOST_GIB = 1500.0  # of a node of eight GPUs, as DGX have at least
HOST_UPDATE_BYTES_S = 20 * GB  # of masters, moments and gradients that one rank's share of a host updates
TOKENS_PER_PARAMETER = 20  # of a plan for a model file: Hoffmann et al. 2022, table 3
# tokens of a step where a model is planned without a run, for up to so many parameters: Brown et al. 2020, table 2.1
MODEL_BATCH = [(1e9, 1 << 19), (5e9, 1 << 20), (50e9, 1 << 21), (math.inf, 3_200 << 10)]
SAME_SPEED = 0.98  # of the fastest: the simpler way is taken
FASTER = 1.001  # than what would be advised: what is configured stays
MOST_NODES = 1 << 16
LEAST_HELD_S = 0.1  # of a save, whatever its size: ranks wait for each other
LEAST_INTERVAL_S = 60.0  # between saves


class Card(NamedTuple):
    """A kind of GPU, by its data sheet."""

    name: str  # as torch gives it, in part
    memory_gib: float  # that torch finds
    fp32_flops: float  # without tensor cores
    link_gb_s: float  # to the other GPUs of its node, one way
    network_gb_s: float  # of a node of eight, one way, as in NVIDIA's DGX
    mfu: str  # whose published shares of the peak are taken


CARDS = {
    "h100": Card("H100", 79.1, 67e12, 450, 400, "h100"),
    "h200": Card("H200", 139.8, 67e12, 450, 400, "h200"),
    "a100": Card("A100", 79.2, 19.5e12, 300, 200, "a100"),
}


class Published(NamedTuple):
    """A share of the dense bf16 peak that somebody has reached, by 6 N + 12 L C T operations per token.

    Where blocks were computed twice, those operations count as well, as `RECOMPUTED` does for what is planned.
    """

    parameters: float
    mfu: float
    source: str


MOSAIC = "llm-foundry, scripts/train/benchmarking"
MEASURED = "benchmarks/gpu_NVIDIA-H200_2026-11-26.md, one H200, ZeRO 1"
PUBLISHED = {
    "h100": [  # an H200 is the same chip with more and faster memory
        Published(124e6, 0.401, "llm.c, 8 x H100 (modded-nanogpt README)"),
        Published(1.3e9, 0.586, MEASURED),
        Published(13e9, 0.590, f"{MOSAIC}, 8 x H100, MFU 44.3 % with every block computed twice"),
        Published(30e9, 0.585, f"{MOSAIC}, 32 x H100, MFU 43.9 % with every block computed twice"),
        Published(70e9, 0.568, f"{MOSAIC}, 64 x H100, MFU 42.6 % with every block computed twice"),
        Published(175e9, 0.47, "Megatron-LM README, 96 x H100, tensor and pipeline parallel"),
    ],
    "a100": [
        Published(125e6, 0.432, f"{MOSAIC}, 8 x A100"),
        Published(350e6, 0.505, f"{MOSAIC}, 8 x A100"),
        Published(760e6, 0.569, f"{MOSAIC}, 8 x A100"),
        Published(1.3e9, 0.602, f"{MOSAIC}, 8 x A100"),
        Published(7e9, 0.642, f"{MOSAIC}, 8 x A100"),
        Published(176e9, 0.48, "BLOOM, 384 x A100, about 150 TFLOP/s, tensor and pipeline parallel"),
    ],
}
PUBLISHED["h200"] = [Published(124e6, 0.439, MEASURED), *PUBLISHED["h100"][1:]]


class Hardware(Section):
    """Where a run would be, apart from what it is."""

    gpu: Literal["h100", "h200", "a100", "cpu"] = "h100"  # cpu: this machine
    nodes: Int = Field(default=1, gt=0)
    gpus_per_node: Int = Field(default=8, gt=0)
    memory_gib: Float | None = Field(default=None, gt=0)  # of a GPU; null: the card's
    link_gb_s: Float | None = Field(default=None, gt=0)  # of a GPU to those of its node, one way; null: the card's
    network_gb_s: Float | None = Field(default=None, gt=0)  # of a node, one way; null: an eighth of the DGX's per GPU
    host_gib: Float | None = Field(default=None, gt=0)  # of a node, for offloading; null: 1,500 for each eight GPUs
    host_gb_s: Float = Field(default=25.0, gt=0)  # of a GPU to its host, one way: PCIe 4.0 x16, less its overhead
    save_gb_s: Float = Field(default=2.0, gt=0)  # of all ranks together to the file system
    usd_per_gpu_hour: Float | None = Field(default=None, gt=0)  # of this card; null: no price is told
    gpu_hours_per_fault: Float = Field(default=GPU_HOURS_PER_FAULT, gt=0)  # from which the interval of saves follows

    @property
    def ranks(self) -> int:
        """One for each GPU; one for this machine's CPU."""
        return 1 if self.gpu == "cpu" else self.nodes * self.gpus_per_node

    @property
    def kind(self) -> str:
        """cuda or cpu."""
        return "cpu" if self.gpu == "cpu" else "cuda"

    @property
    def memory(self) -> float:
        """Bytes of a GPU, or what this machine has available."""
        if self.gpu == "cpu":
            return float(psutil.virtual_memory().available)
        return (self.memory_gib or CARDS[self.gpu].memory_gib) * GIB

    @property
    def host(self) -> float:
        """Bytes of a node's memory."""
        if self.gpu == "cpu":
            return float(psutil.virtual_memory().total)
        return (self.host_gib or HOST_GIB / 8 * self.gpus_per_node) * GIB

    @property
    def room(self) -> float:
        """Bytes that a step may take."""
        return ROOM * (self.memory - (0 if self.gpu == "cpu" else FRAMEWORK))

    @property
    def sent_per_s(self) -> float:
        """Bytes per second that a rank sends in a ring over all ranks: what passes its narrowest place.

        NCCL has a ring for each network card, and of each ring one link leaves a node: so together the rings send at
        the rate of the whole node (what nccl-tests calls the bus bandwidth), and each rank at the rate of them all.
        """
        if self.gpu == "cpu":
            return math.inf
        card = CARDS[self.gpu]
        link = self.link_gb_s or card.link_gb_s
        network = self.network_gb_s or card.network_gb_s * self.gpus_per_node / 8
        return GB * (link if self.nodes == 1 else min(link, network))


class Given(Section):
    """What is given beside a run."""

    hardware: Hardware


@dataclass(frozen=True)
class Choice:
    """How the states are kept, and what is computed twice."""

    zero_stage: int  # 0: torch alone, or DeepSpeed without ZeRO
    offload: str  # none, optimizer, or optimizer and parameters
    recompute: str
    micro_batch_seqs: int  # as it is given, or the largest that fits, evened over the step; 0: none does
    fits: bool
    memory: Memory  # with it, or with one sequence where none fits
    host_lacks: float  # bytes of a node's memory, for what is offloaded there; 0: there is room
    tokens_per_s: float  # expected, over all ranks
    communication: float  # share of a step


@dataclass(frozen=True)
class Expected:
    """A run on a kind of hardware. Rates are estimates."""

    hardware: str
    ranks: int
    memory_bytes: float  # of one rank's device
    choice: Choice
    mfu: float | None
    days: float
    gpu_hours: float | None
    usd: float | None  # for the card that was asked for, where its price is given
    source: str  # of the share of the peak


@dataclass(frozen=True)
class Saves:
    """How often to save."""

    bytes: int
    held_s: float  # that a save holds the ranks up: the copy to their hosts
    write_s: float  # until it is whole; the ranks go on meanwhile
    mtbf_s: float
    interval_s: float
    interval_steps: int | None  # None where nothing fits


@dataclass(frozen=True)
class Plan:
    """What `pretrain plan` shows."""

    name: str
    parameters: int
    flops_per_token: int
    batch_seqs: int
    seq_tokens: int
    train_tokens: int
    hardware: Hardware
    as_configured: Choice
    advised: Choice
    reason: str
    changes: tuple[str, ...]  # from what is configured to what is advised, as given on the command line
    notes: tuple[str, ...]  # what is wrong as it is configured
    by_recompute: dict[str, Memory]  # of the advised engine and micro-batch
    expected: list[Expected]
    saves: Saves

    def tree(self) -> dict[str, Any]:
        """For programs."""
        fields = {key: value for key, value in vars(self).items() if key not in ("hardware", "expected")}
        tree = {
            key: asdict(value) if hasattr(value, "__dataclass_fields__") else value for key, value in fields.items()
        }
        tree["by_recompute"] = {key: asdict(value) for key, value in self.by_recompute.items()}
        tree["expected"] = [asdict(each) for each in self.expected]
        tree["hardware"] = self.hardware.model_dump(mode="json")
        tree["sources"] = {card: [each._asdict() for each in each_list] for card, each_list in PUBLISHED.items()}
        return tree | {"estimates": True}


def load_plan(path: Path, overrides: Sequence[str]) -> Plan:
    """The plan of a run's config, a run folder or a model's file, `hardware` taken apart. Raises ConfigError."""
    given = [text for text in overrides if text.startswith(("hardware=", "hardware."))]
    hardware = configs.build(Given, {"hardware": {}}, "command line", given).hardware
    rest = [text for text in overrides if text not in given]
    return make_plan(_model_run(path, rest) or load_run(path, rest), hardware)


def _model_run(path: Path, overrides: Sequence[str]) -> TrainRun | None:
    """A run of a model's file by itself, as long as is worth it for its size; None where it is another file."""
    if path.is_dir() or configs.read(path).get("kind") != "gpt":
        return None
    model = configs.load(Gpt, path)
    seqs, parameters = 2 ** int(math.log2(model.context)), model.parameter_count()
    batch = next(tokens for most, tokens in MODEL_BATCH if parameters <= most)
    tree: dict[str, Any] = {
        "name": path.stem, "run_folder": f"runs/{path.stem}", "model": model.model_dump(mode="json"),
        "data": {"seq_tokens": seqs, "sources": {"any": {"shards": "out/any"}}}, "batch_tokens": batch,
        "micro_batch_seqs": "fit", "train_tokens": TOKENS_PER_PARAMETER * parameters,
        "optim": {"kind": "adamw", "lr_peak": 1e-4}, "schedule": {"kind": "cosine"}, "engine": {"kind": "deepspeed"},
    }  # fmt: skip
    return configs.build(TrainRun, tree, str(path), list(overrides))


def make_plan(run: TrainRun, hardware: Hardware) -> Plan:
    """The plan of a run on some hardware, and what to expect of it elsewhere."""
    shape, flops = Shape.of(run.model), run.model.flops_per_token(run.data.seq_tokens)
    task = _Task(run, shape, flops)
    configured = task.choice(run.engine, hardware, task.given)
    advised, reason = task.advise(hardware)
    engine = _engine_of(run.engine, advised)
    rows, there = max(1, advised.micro_batch_seqs), task.shape_on(hardware)
    by_recompute = {
        kind: step_memory(there, engine.model_copy(update={"recompute": kind}), hardware.ranks,
                          rows * run.data.seq_tokens, task.loss(engine, hardware), task.compiles(engine, hardware),
                          rows < task.each(hardware))
        for kind in ("none", "selective", "full")
    }  # fmt: skip
    elsewhere = {"gpu": None, "memory_gib": None, "link_gb_s": None, "usd_per_gpu_hour": None}
    places = [hardware, *(hardware.model_copy(update=elsewhere | {"gpu": gpu})
                          for gpu in ("h100", "h200", "a100", "cpu") if gpu != hardware.gpu)]  # fmt: skip
    expected = [task.expect(place) for place in places]
    return Plan(
        run.name, shape.parameters, flops, run.batch_seqs, run.data.seq_tokens, run.train_tokens, hardware, configured,
        advised, reason, _changes(run, engine, configured, advised), _notes(run, configured, hardware), by_recompute,
        expected, _saves(shape, advised, run, hardware),
    )  # fmt: skip


class _Task:
    """A run, and what its memory and speed are with other engines on other hardware."""

    def __init__(self, run: TrainRun, shape: Shape, flops: int) -> None:
        self.run, self.shape, self.flops = run, shape, flops

    def shape_on(self, hardware: Hardware) -> Shape:
        """The model's shape, and what attention holds there."""
        return replace(self.shape, matrix=held_matrix(self.run.model, hardware.kind, self.run.data.seq_tokens))

    def loss(self, engine: EngineSettings, hardware: Hardware) -> LossPlan:
        """How the loss is taken there."""
        return loss_plan_of(engine.loss, hardware.kind, hardware.memory)

    def compiles(self, engine: EngineSettings, hardware: Hardware) -> bool:
        """Whether the forward pass is compiled there."""
        return engine.compiles(torch.device(hardware.kind))

    @property
    def given(self) -> int | None:
        """The micro-batch of the configuration; None where it is to be found."""
        return None if self.run.micro_batch_seqs == "fit" else self.run.micro_batch_seqs

    def each(self, hardware: Hardware) -> int:
        """The sequences of a step that a rank has there, at most."""
        return math.ceil(self.run.batch_seqs / hardware.ranks)

    def choice(self, engine: EngineSettings, hardware: Hardware, given: int | None = None) -> Choice:
        """What an engine comes to on some hardware, with a given micro-batch or the largest that fits."""
        loss, compiles = self.loss(engine, hardware), self.compiles(engine, hardware)
        each, seq_tokens, shape = self.each(hardware), self.run.data.seq_tokens, self.shape_on(hardware)
        if given is None:
            most = largest_micro_batch(shape, engine, hardware.ranks, seq_tokens, each, hardware.room, loss, compiles)
            rows = evened(most, each) if most else 0
        else:
            rows = min(given, each)
        tokens, accumulates = max(1, rows) * seq_tokens, max(1, rows) < each
        memory = step_memory(shape, engine, hardware.ranks, tokens, loss, compiles, accumulates)
        lacks = max(0.0, memory.host * hardware.gpus_per_node - hardware.host) if hardware.kind == "cuda" else 0.0
        fits = rows > 0 and memory.total <= hardware.room and not lacks
        seconds, sent = self._step_s(engine, hardware, max(1, rows), self.run.batch_seqs)
        stage = engine.zero_stage if isinstance(engine, DeepSpeed) else 0
        offload = engine.offload if isinstance(engine, DeepSpeed) else None
        named = "none" if offload is None or not offload.optimizer else "optimizer"
        named = "optimizer and parameters" if offload is not None and offload.parameters else named
        rate = self.run.batch_seqs * seq_tokens / seconds
        rows = rows if fits or given is not None else 0
        return Choice(stage, named, engine.recompute, rows, fits, memory, lacks, rate, sent / seconds)

    def advise(self, hardware: Hardware) -> tuple[Choice, str]:
        """The simplest of the fastest ways in which a step fits, and why it is that one.

        The host's memory is slow, and taken only where that of the GPUs does not do.
        """
        if hardware.gpu == "cpu":
            configured = self.choice(self.run.engine, hardware, self.given)
            found = configured if configured.fits else self.choice(self.run.engine, hardware)
            return found, "one rank has nothing to share"
        choices = [self.choice(engine, hardware) for engine in _engines(self.run.engine)]
        if hardware.ranks == 1 and not isinstance(self.run.engine, DeepSpeed):  # with nobody to share with
            choices = [self.choice(self.run.engine, hardware), *choices]
        fitting = [each for each in choices if each.fits]
        fitting = [each for each in fitting if each.offload == "none"] or fitting
        if not fitting:
            least = min(choices, key=lambda choice: choice.memory.total)
            return least, self._what_is_needed(hardware)
        fastest = max(choice.tokens_per_s for choice in fitting)
        best = next(choice for choice in fitting if choice.tokens_per_s >= SAME_SPEED * fastest)
        configured = self.choice(self.run.engine, hardware, self.given)
        if configured.fits and configured.offload == "none" and configured.tokens_per_s > FASTER * best.tokens_per_s:
            return configured, "no other way is faster"
        return best, _reason(best, choices, hardware)

    def _what_is_needed(self, hardware: Hardware) -> str:
        engines = _engines(self.run.engine)
        kept = self._least_nodes([engine for engine in engines if not engine.offload.optimizer], hardware)
        offloaded = self._least_nodes([engine for engine in engines if engine.offload.optimizer], hardware)
        if kept is None:
            return "does not fit, however many GPUs: one sequence is too long for one of them"
        text = f"does not fit; about {kept * hardware.gpus_per_node} GPUs are needed (hardware.nodes={kept})"
        if offloaded is not None and offloaded < kept:
            host = hardware.host / GIB
            text += f", {offloaded * hardware.gpus_per_node} with the states on hosts of {host:,.0f} GiB, slowly"
        wanting = [each for engine in engines if (each := self.choice(engine, hardware)).host_lacks]
        roomy = [each for each in wanting if each.memory.total <= hardware.room]
        if roomy and (offloaded is None or offloaded > hardware.nodes):
            least = min(each.memory.host for each in roomy) * hardware.gpus_per_node / GIB
            text += f"; {hardware.ranks} would do with {math.ceil(least):,} GiB a host (hardware.host_gib)"
        return text

    def _least_nodes(self, engines: Sequence[DeepSpeed], hardware: Hardware) -> int | None:
        """The power of two of nodes, no fewer than there are, on which a step fits with one of the engines."""
        nodes = hardware.nodes
        while nodes <= MOST_NODES:
            more = hardware.model_copy(update={"nodes": nodes})
            if any(self.choice(engine, more).fits for engine in engines):
                return nodes
            nodes *= 2
        return None

    def _step_s(self, engine: EngineSettings, hardware: Hardware, rows: int, seqs: int) -> tuple[float, float]:
        """Seconds of a step of `seqs`, and those of them in which ranks send; nothing is sent while they compute."""
        ranks, n, width = hardware.ranks, self.shape.parameters, width_of(engine)
        each = math.ceil(seqs / ranks)
        rows = min(rows, each)
        micro_steps = math.ceil(each / rows)  # filler rows are computed too
        flops = rows * self.run.data.seq_tokens * self.flops * RECOMPUTED[engine.recompute]
        least = self.shape.layers * LAYER_S if hardware.kind == "cuda" else 0.0
        computed = micro_steps * max(flops / self.rate(engine, hardware), least)
        sent = _sent_bytes(engine, n, width, ranks, micro_steps) / hardware.sent_per_s
        moved = 0.0
        if isinstance(engine, DeepSpeed) and engine.offload.optimizer and hardware.kind == "cuda":
            moved = n * (4 + width) / ranks / (GB * hardware.host_gb_s) + n * 16 / ranks / HOST_UPDATE_BYTES_S
            if engine.offload.parameters:
                moved += 2 * micro_steps * n * width / ranks / (GB * hardware.host_gb_s)
        return computed + sent + moved, sent

    def train_s(self, engine: EngineSettings, hardware: Hardware, rows: int) -> float:
        """Seconds of the whole run, whose first steps are smaller where its batch grows."""
        end = self.run.train_tokens / self.run.data.seq_tokens
        pieces = [(sample, seqs) for sample, seqs in self.run.step_pieces(0) if sample < end]
        ends = [*(sample for sample, _ in pieces[1:]), end]
        return sum(
            (until - begin) / seqs * self._step_s(engine, hardware, max(1, rows), seqs)[0]
            for (begin, seqs), until in zip(pieces, ends, strict=True)
        )

    def rate(self, engine: EngineSettings, hardware: Hardware) -> float:
        """The operations per second that one rank computes."""
        if hardware.gpu == "cpu":
            return 1e12 * _cpu_tflops(engine.precision, min(512, self.run.model.width) // 4 * 4)
        card = CARDS[hardware.gpu]
        peak = PEAK_FLOPS[card.name] if width_of(engine) == 2 else card.fp32_flops
        return expected_mfu(card.mfu, self.shape.parameters)[0] * peak

    def expect(self, hardware: Hardware) -> Expected:
        """The run there, with what is best there."""
        choice, _ = self.advise(hardware)
        rate = choice.tokens_per_s
        ranks = hardware.ranks
        if hardware.gpu == "cpu":
            mfu, source = None, "a step of two such layers, 512 wide at most, timed now"
            name = f"this machine, {torch.get_num_threads()} threads"
        else:
            card = CARDS[hardware.gpu]
            mfu = rate * self.flops / (ranks * PEAK_FLOPS[card.name])
            source, name = expected_mfu(card.mfu, self.shape.parameters)[1], f"{ranks} x {card.name}"
        hours = self.train_s(_engine_of(self.run.engine, choice), hardware, choice.micro_batch_seqs) / 3600
        gpu_hours = None if hardware.gpu == "cpu" else hours * ranks
        priced = gpu_hours is not None and hardware.usd_per_gpu_hour is not None
        usd = gpu_hours * hardware.usd_per_gpu_hour if priced else None  # type: ignore[operator]
        return Expected(name, ranks, hardware.memory, choice, mfu, hours / 24, gpu_hours, usd, source)


def expected_mfu(card: str, parameters: int) -> tuple[float, str]:
    """The share of the peak for a model of a size, between what was published for the next smaller and larger ones."""
    rows = PUBLISHED[card]
    if parameters <= rows[0].parameters:
        below = (
            "" if parameters > 0.9 * rows[0].parameters else "; nothing is published for smaller models: expect less"
        )
        return rows[0].mfu, rows[0].source + below
    for low, high in pairwise(rows):
        if parameters <= high.parameters:
            place = math.log(parameters / low.parameters) / math.log(high.parameters / low.parameters)
            return low.mfu + place * (high.mfu - low.mfu), high.source if place > 0.5 else low.source
    return rows[-1].mfu, rows[-1].source


def _sent_bytes(engine: EngineSettings, n: int, width: int, ranks: int, micro_steps: int) -> float:
    """The bytes that each rank sends in a step: an all-reduce twice what it reduces, a gather or scatter once.

    Rajbhandari et al. 2020, section 7; gradients go in fp32, at stages 2 and 3 in every micro-step. At stage 2
    DeepSpeed reduces them to all ranks, each of which takes its part.
    """
    stage = engine.zero_stage if isinstance(engine, DeepSpeed) else 0
    gradients, weights = 4 * n, width * n
    sent = {
        0: 2 * gradients,
        1: (1 if isinstance(engine, DeepSpeed) and sums_whole(engine) else 2) * gradients + weights,
        2: micro_steps * 2 * gradients + weights,
        3: micro_steps * (gradients + 2 * weights),
    }[stage]
    return sent * (ranks - 1) / ranks


def _engines(configured: EngineSettings) -> list[DeepSpeed]:
    """The engines to choose from, in the configured precision: those that give the same speed, simpler ones first."""
    tree = _as_configured(configured)
    return [
        DeepSpeed.model_validate({**tree, "zero_stage": stage, "recompute": recompute, "offload": offload})
        for offload in ({}, {"optimizer": True}, {"optimizer": True, "parameters": True})
        for stage in (1, 2, 3)
        for recompute in ("none", "selective", "full")
        if stage == 3 or "parameters" not in offload
    ]


def _as_configured(configured: EngineSettings) -> dict[str, Any]:
    """What no advice changes."""
    tree = {"precision": configured.precision, "compile": configured.compile, "loss": configured.loss}
    return tree | ({"overlap_comm": configured.overlap_comm} if isinstance(configured, DeepSpeed) else {})


def _engine_of(configured: EngineSettings, choice: Choice) -> EngineSettings:
    if not isinstance(configured, DeepSpeed) and choice.zero_stage == 0:
        return configured
    tree = _as_configured(configured)
    offload = {"optimizer": "optimizer" in choice.offload, "parameters": "parameters" in choice.offload}
    stage = choice.zero_stage
    return DeepSpeed.model_validate({**tree, "zero_stage": stage, "recompute": choice.recompute, "offload": offload})


def _changes(run: TrainRun, engine: EngineSettings, configured: Choice, advised: Choice) -> tuple[str, ...]:
    """What makes the configured engine and micro-batch those that are advised, as it is given on the command line."""
    before, after = run.engine.model_dump(mode="json"), engine.model_dump(mode="json")
    if before["kind"] == after["kind"]:
        was = configs.flatten(before)
        paths = {path: value for path, value in configs.flatten(after).items() if value != was[path]}
        changes = [f"engine.{path}={_flow(value)}" for path, value in paths.items()]
    else:
        plain = DeepSpeed().model_dump(mode="json")
        named = ("kind", "zero_stage", "precision")
        changes = [f"engine={_flow({k: after[k] for k in after if k in named or after[k] != plain[k]})}"]
    if run.micro_batch_seqs != "fit" and configured.micro_batch_seqs != advised.micro_batch_seqs:
        changes.append(f"micro_batch_seqs={advised.micro_batch_seqs}")
    return tuple(changes)


def _flow(value: object) -> str:
    """As YAML, on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf)
    return text.removesuffix("...\n").strip()


def _notes(run: TrainRun, configured: Choice, hardware: Hardware) -> tuple[str, ...]:
    """What is wrong with a run as it is configured, a line each."""
    notes = []
    total, rows = configured.memory.total, configured.micro_batch_seqs
    if rows and total > hardware.room:
        room = f"{total / GIB:,.1f} GiB, and there is room for {hardware.room / GIB:,.1f}"
        notes.append(f"as configured: does not fit: micro_batch_seqs={rows} needs {room}")
    if configured.host_lacks:
        needs = (hardware.host + configured.host_lacks) / GIB
        had = f"{hardware.host / GIB:,.0f} (hardware.host_gib)"
        notes.append(f"as configured: does not fit: what is offloaded needs {needs:,.0f} GiB of a node's {had}")
    least = min(seqs for _, seqs in run.step_pieces(0))
    if least < hardware.ranks:
        when = "" if run.batch_ramp is None else " at first"
        idle = f"{hardware.ranks - least} of {hardware.ranks} ranks have nothing to do{when}"
        notes.append(f"{idle}: a step has {least} sequences")
    return tuple(notes)


def _reason(best: Choice, choices: Sequence[Choice], hardware: Hardware) -> str:
    """Why it is this one: what the simpler ones lack."""
    simplest = choices[0]
    if best is simplest:
        fills = best.memory.total / hardware.memory
        return f"fits, {fills:.0%} of the memory used; more sharding would only send more"
    if best.offload != "none":
        least = min(each.memory.total for each in choices if each.offload == "none") / GIB
        host = f"{best.memory.host * hardware.gpus_per_node / GIB:,.0f} of {hardware.host / GIB:,.0f} GiB"
        return f"without offloading at least {least:,.0f} GiB are needed; the host gives {host} (hardware.host_gib)"
    named = f"ZeRO {simplest.zero_stage}" if simplest.zero_stage else "it"
    if not simplest.fits:
        needs = simplest.memory.total / GIB
        return f"{named} alone needs {needs:,.0f} GiB of {hardware.memory / GIB:.0f} with one sequence"
    gain = best.tokens_per_s / simplest.tokens_per_s - 1
    return f"{gain:.0%} faster than {named} alone, whose micro-batch is {simplest.micro_batch_seqs}"


@cache
def _cpu_tflops(precision: str, width: int) -> float:
    """What a training step of two layers reaches here, forward and backward: the best of some, of up to 1,024 tokens.

    A CPU without instructions for bf16 takes a minute for so many: of more tokens only while a step is short.
    """
    gpt, best, begun = Gpt(width=max(4, width), **TRIAL), 0.0, time.perf_counter()
    model = gpt.build().to(DTYPES[precision])
    for rows, length in ((1, 16), (1, 256), (4, 256)):
        tokens = torch.zeros(rows, length, dtype=torch.int64)
        tflop = tokens.numel() * gpt.flops_per_token(length) / 1e12
        for _ in range(5):  # the first warms up, and others may compute here too
            if best and (tflop / best > LONG_S or time.perf_counter() - begun > 5 * LONG_S):
                return best
            started = time.perf_counter()
            model(tokens, tokens, torch.ones(tokens.shape)).backward()
            best = max(best, tflop / (time.perf_counter() - started))
    return best


def _saves(shape: Shape, choice: Choice, run: TrainRun, hardware: Hardware) -> Saves:
    """Young 1974: the interval sqrt(2 x cost of a save x mean time between faults) loses least.

    What a save costs is the copy to the host; the writing goes on beside the training, so that no interval is shorter.
    """
    size = STATE_BYTES * shape.parameters
    held = max(LEAST_HELD_S, size / hardware.ranks / (GB * hardware.host_gb_s))
    write = size / (GB * hardware.save_gb_s)
    mtbf = 3600 * hardware.gpu_hours_per_fault / hardware.ranks
    interval = max(math.sqrt(2 * held * mtbf), 2 * write, LEAST_INTERVAL_S)
    step_s = run.batch_seqs * run.data.seq_tokens / choice.tokens_per_s
    steps = max(1, round(interval / step_s)) if choice.fits else None
    return Saves(size, held, write, mtbf, interval, steps)


# --- for people -----------------------------------------------------------------------------------------------------

NAMES = {"optimizer": "masters, moments", "logits": "logits, loss"}
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")


def show(plan: Plan, console: Console) -> None:
    """What the run is, where its memory goes, what to expect, and how often to save."""
    ranks = plan.hardware.ranks
    _say(console, f"{plan.name}: {plan.parameters:,} parameters, {plan.flops_per_token / 1e9:,.3g} GFLOP per token,")
    _say(console, f"steps of {plan.batch_seqs:,} x {plan.seq_tokens:,} tokens, {plan.train_tokens / 1e9:,.4g} G tokens")
    if not plan.advised.fits:
        _say(console, f"\n{plan.hardware.gpu} x {ranks}: {plan.reason}. What comes nearest:")
    _say(console, f"\nmemory of one rank of {ranks}, GiB of {plan.hardware.memory / GIB:,.1f}")
    console.print(_memory_table(plan))
    for note in plan.notes:
        _say(console, note)
    if plan.advised.fits:
        _say(console, f"advised: {shlex.join(plan.changes) or 'as configured'}\n         {plan.reason}")
    _say(console, "\nexpected, each with what is best there (estimates: see the sources)")
    console.print(_expected_table(plan))
    if plan.hardware.usd_per_gpu_hour is None and plan.hardware.gpu != "cpu":
        _say(console, f"  hardware.usd_per_gpu_hour=PRICE tells what {plan.expected[0].hardware} cost")
    for source in dict.fromkeys(f"{each.hardware}: {each.source}" for each in plan.expected):
        _say(console, f"  {source}")
    _say(console, _saves_lines(plan))


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _memory_table(plan: Plan) -> Any:
    from rich.table import Table

    configured, advised = plan.as_configured, plan.advised
    columns = {"as configured": configured.memory, "advised": advised.memory}
    columns |= {f"recompute {kind}": memory for kind, memory in plan.by_recompute.items()}
    table = Table("", box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for part in PARTS:
        table.add_row(NAMES.get(part, part), *(_gib(memory.parts()[part]) for memory in columns.values()))
    table.add_row("together", *(_gib(memory.total) for memory in columns.values()))
    if any(memory.host for memory in columns.values()):
        table.add_row("on the host", *(_gib(memory.host) for memory in columns.values()))
    table.add_row("micro-batch", _rows(configured), *[_rows(advised)] * (len(columns) - 1))
    return table


def _rows(choice: Choice) -> str:
    return str(choice.micro_batch_seqs) if choice.micro_batch_seqs else "none fits"


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"


def _expected_table(plan: Plan) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    names = ("hardware", "ZeRO", "recompute", "offload", "micro-batch", "tokens/s", "MFU", "sending", "time")
    priced = ("USD",) if plan.expected[0].usd is not None else ()
    for name in (*names, "GPU-hours", *priced):
        table.add_column(name, justify="left" if name == "hardware" else "right", no_wrap=True)
    for each in plan.expected:
        choice, fits = each.choice, each.choice.fits
        row = [
            each.hardware, str(choice.zero_stage), choice.recompute, choice.offload,
            _rows(choice), f"{choice.tokens_per_s:,.0f}" if fits else "",
            f"{each.mfu:.1%}" if fits and each.mfu is not None else "",
            f"{choice.communication:.0%}" if fits else "", duration(each.days * 86400) if fits else "does not fit",
            _few(each.gpu_hours) if fits else "",
        ]  # fmt: skip
        table.add_row(*row, *[_few(each.usd) if fits else ""] * len(priced))
    return table


def _few(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _saves_lines(plan: Plan) -> str:
    saves = plan.saves
    whole = plan.train_tokens // (plan.batch_seqs * plan.seq_tokens)
    steps = "" if saves.interval_steps is None else f", checkpoint.save_every_steps={saves.interval_steps}"
    steps = ", longer than this run" if saves.interval_steps is not None and saves.interval_steps > whole else steps
    return (
        f"\ncheckpoint: {saves.bytes / GB:,.4g} GB; ranks held up {saves.held_s:.3g} s, whole after "
        f"{duration(saves.write_s)} at {plan.hardware.save_gb_s:g} GB/s\n"
        f"save every {duration(saves.interval_s)}{steps}: a fault every {duration(saves.mtbf_s)}\n"
        f"  {FAULT_SOURCE}"
    )
