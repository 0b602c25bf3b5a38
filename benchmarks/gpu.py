"""Training speed on one GPU, in under ten minutes: ours with and without DeepSpeed, nanoGPT, and what makes the speed.

    python -m benchmarks.gpu [--nanogpt PATH] [--out benchmarks/results] [--seconds 2] [--budget 560]
                             [--models 124M,1.3B,350M,760M] [--variants none | first | all]

The card's own bf16 matmul rate; then for 124M, 1.3B, 350M and 760M in bf16, at the same batch: ZeRO-1, the torch
engine, and nanoGPT compiled (PATH: a checkout of it). Then the torch engine with other settings: the vocabulary padded
within the product, attention kernels, micro-batches, not compiled, recomputation, the chunked loss; and by themselves
the attention kernels and the ways to the loss. Medians over steps after the warm-up, on random tokens, without the data
reading, checkpoints and tracking of a run.

A case is a process. Those of a group compile beside each other and take their first steps in turn; when all of them
stand still they are timed in turn, the rest asleep, three rounds of it: ratios are those of the same round. The rows of
a group are printed when it is done.

MFU is (6 N + 12 L C T) operations per token x tokens/s over the card's dense bf16 peak: attention counted as dense, N
without positions, the vocabulary not padded. What does not fit into --budget seconds is left out, and said to be.
Without a GPU the same program runs tiny models on the CPU, to show that it runs, and says so.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import gc
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import configs
from benchmarks import attention
from benchmarks.step import nanogpt_model
from pretrain.engine.plain import Torch
from pretrain.engine.tally import Tally
from pretrain.engine.zero import DeepSpeed
from pretrain.memory import GIB, Shape, step_memory
from pretrain.meter import peak_flops
from pretrain.models.gpt import Gpt
from pretrain.models.loss import LossPlan, chunked_loss, loss_plan, padded_product, plan_losses, weighted_loss
from pretrain.objectives import NextToken
from pretrain.optim import AdamW
from pretrain.ranks import Ranks

VOCABULARY, NANOGPT_VOCABULARY = 50257, 50304  # nanoGPT pads its own
FORMULA = "MFU = (6 N + 12 L C T) x tokens/s / peak: dense attention, N without positions, unpadded vocabulary"
LEAST_S = 25.0  # that a case takes; none is begun with less left
ROUNDS = 3  # in which the cases of a group are timed in turn
TOGETHER = 9  # cases that compile beside each other, on a core and a half or more each
CONTEXT = 0.8 * GIB  # of the GPU's memory, for a process that stands still, beside its states
COMPILING, ONE_THREAD = {"TORCHINDUCTOR_COMPILE_THREADS": "4"}, {"OMP_NUM_THREADS": "1"}  # on a GPU, on a CPU
RESERVE = 0.9  # of the GPU's memory is shared out between them; contexts and fragments take the rest


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    model: str
    engine: str  # torch | zero0 ... zero3 | nanogpt
    rows: int  # sequences per micro-batch
    micro_batches: int = 1
    compile: bool = True
    recompute: str = "none"
    loss: str = "plain"
    multiple: int | None = None  # rows of the output layer are padded to it within the product; None: by default
    attention: str = ""  # the kernel, of those below; as torch chooses otherwise
    tuned: bool = False  # torch.compile's mode max-autotune-no-cudagraphs

    @property
    def setting(self) -> str:
        """What differs from the rows before it."""
        parts = [("compiled, tuned" if self.tuned else "compiled") if self.compile else "eager"]
        parts += [f"recompute {self.recompute}"] if self.recompute != "none" else []
        parts += [f"{self.loss} loss"] if self.loss != "plain" else []
        parts += [f"vocabulary to {self.multiple}"] if self.multiple not in (None, 1) else []
        parts += ["vocabulary not padded"] if self.multiple == 1 else []
        parts += [f"{self.attention} attention"] if self.attention else []
        return ", ".join(parts)


SIZES: dict[str, dict[str, Any]] = {
    "124M": {"layers": 12, "width": 768, "heads": 12, "context": 1024},
    "350M": {"layers": 24, "width": 1024, "heads": 16, "context": 1024},
    "760M": {"layers": 24, "width": 1536, "heads": 16, "context": 2048},
    "1.3B": {"layers": 24, "width": 2048, "heads": 16, "context": 2048},
    "tiny": {"layers": 2, "width": 64, "heads": 2, "context": 128},
}
ROWS = {"124M": 32, "350M": 16, "760M": 8, "1.3B": 8, "tiny": 4}  # the same for all three
FIRST_VARIANTS = [
    Case("124M", "torch", 32, multiple=1),
    Case("124M", "torch", 64),
    Case("124M", "zero1", 64),
]
VARIANTS = [
    Case("124M", "torch", 32, compile=False),
    Case("124M", "zero1", 32, micro_batches=8),
    Case("1.3B", "torch", 16, recompute="selective"),
    Case("1.3B", "torch", 8, multiple=1),
    Case("124M", "torch", 64, loss="chunked"),
    Case("1.3B", "torch", 16, recompute="full"),
    Case("1.3B", "torch", 4),
    Case("124M", "torch", 32, attention="flash"),
    Case("124M", "torch", 32, attention="cuDNN"),
    Case("124M", "torch", 32, tuned=True),
]
TINY_VARIANTS = [Case("tiny", "torch", 4, compile=False, recompute="full", loss="chunked", attention="plain products")]


def cases(sizes: list[str], nanogpt: bool, compile: bool, variants: str = "none") -> list[Case]:
    """Every size with every engine, at the same batch; the first variants after the first size, the rest at the end."""
    engines = ["zero1", "torch", *(["nanogpt"] if nanogpt else [])]
    wanted: list[Case] = []
    for i, size in enumerate(sizes):
        wanted += [Case(size, engine, ROWS[size], compile=compile) for engine in engines]
        if i == 0 and variants != "none":
            wanted += [case for case in FIRST_VARIANTS if case.model in sizes]
    return wanted + ([case for case in VARIANTS if case.model in sizes] if variants == "all" else [])


def shape_of(case: Case) -> Gpt:
    """The model of a case."""
    vocabulary = 509 if case.model == "tiny" else VOCABULARY
    return configs.build(Gpt, {"vocab_size": vocabulary, **SIZES[case.model]}, "benchmark")


def engine_of(case: Case, cuda: bool) -> Torch | DeepSpeed:
    """The engine's settings of a case."""
    settings: dict[str, Any] = {
        "precision": "bf16" if cuda else "fp32",
        "compile": case.compile, "recompute": case.recompute, "loss": case.loss,
    }  # fmt: skip
    if case.engine.startswith("zero"):
        return configs.build(DeepSpeed, {**settings, "zero_stage": int(case.engine[-1])}, "benchmark")
    return configs.build(Torch, settings, "benchmark")


def expected_bytes(case: Case, cuda: bool) -> tuple[float, float]:
    """What a case is expected to hold between steps, and at their peak; nanoGPT's autocast a quarter more than ours."""
    engine, gpt = engine_of(case, cuda), shape_of(case)
    loss = loss_plan(engine.loss, torch.device("cuda" if cuda else "cpu"))
    memory = step_memory(Shape.of(gpt), engine, 1, case.rows * gpt.context, loss, case.compile)
    held = memory.weights + memory.gradients + memory.optimizer
    return held * 1.05 + CONTEXT, memory.total * (1.3 if case.engine == "nanogpt" else 1.1) + CONTEXT


def groups(wanted: list[Case], capacity: float, cuda: bool) -> list[list[Case]]:
    """The cases in their order. The first size is a group, that its rows come soon; then as many as fit in memory."""
    cut: list[list[Case]] = []
    held, above = 0.0, 0.0  # of the last group: what all hold, and the most that one of them needs for a moment
    for case in wanted:
        between, peak = expected_bytes(case, cuda)
        fits = held + between + max(above, peak - between) <= capacity
        another = len(cut) == 1 and case.model != cut[0][0].model
        if not cut or not fits or another or len(cut[-1]) == TOGETHER:
            cut.append([])
            held = above = 0.0
        cut[-1].append(case)
        held, above = held + between, max(above, peak - between)
    return cut


# --- a case -------------------------------------------------------------------------------------------------------


class Turn:
    """One process at a time has the GPU: for a first step, or for its compiler to measure kernels."""

    def __init__(self, lock: Path) -> None:
        self._lock = lock.open("a")
        self.held = False

    def take(self, *_: Any) -> None:
        """Wait for it, unless it is held."""
        if not self.held:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            self.held = True

    def leave(self) -> None:
        """The next one's."""
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        self.held = False

    def governs_compiler(self) -> bool:
        """Have what is compiled run, and its kernels measured, in turn; False where this torch has no such places."""
        try:
            from torch._dynamo.callback import callback_handler
            from torch._inductor.runtime.benchmarking import benchmarker
        except ImportError:
            return False
        callback_handler.register_end_callback(self.take)
        theirs: Any = benchmarker
        measure = theirs.benchmark_gpu

        def alone(*arguments: Any, **named: Any) -> Any:
            held = self.held
            self.take()
            try:
                return measure(*arguments, **named)
            finally:
                if not held:
                    self.leave()

        theirs.benchmark_gpu = alone
        return True


def run(case: Case, seconds: float, nanogpt: Path | None, turn: Turn, begun: float) -> dict[str, Any]:
    """One case in this process: its first step, then, at each of some lines on stdin, a round of its timing; its row.

    `begun`: when the process did.
    """
    if case.tuned:
        from torch._inductor import config as inductor

        inductor.max_autotune = inductor.coordinate_descent_tuning = True
    ranks = Ranks.join()
    cuda = ranks.device.type == "cuda"
    gpt = shape_of(case)
    with _kernel(case):
        step = _nanogpt(case, gpt, nanogpt, ranks) if case.engine == "nanogpt" else _ours(case, gpt, ranks)
        if not case.compile or not turn.governs_compiler():
            turn.take()
        step()
        _wait(cuda)
        first = time.perf_counter() - begun
        rounds: list[list[float]] = []
        for _ in range(ROUNDS):
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()  # for those beside it
            turn.leave()
            print("READY", flush=True)
            sys.stdin.readline()
            rounds.append(_timed(step, seconds / ROUNDS, cuda))
    times = [spent for each in rounds for spent in each]
    rate = case.rows * gpt.context * case.micro_batches / statistics.median(times)
    peak = peak_flops(torch.cuda.get_device_name()) if cuda else None
    return {
        **asdict(case),
        "tokens_per_s": rate,
        "mfu": None if peak is None else rate * gpt.flops_per_token(gpt.context) / peak,
        "step_ms": 1e3 * statistics.median(times),
        "spread_ms": 1e3 * statistics.pstdev(times),
        "rounds_ms": [1e3 * statistics.median(each) for each in rounds],
        "steps": len(times),
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if cuda else None,
        "first_step_s": first,
    }


def _timed(step: Callable[[], object], seconds: float, cuda: bool) -> list[float]:
    """What the steps of so many seconds took, four at least, after a warm-up of three."""
    for _ in range(3):
        step()
    times: list[float] = []
    gc.collect()
    _wait(cuda)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 4:
        start = time.perf_counter()
        step()
        _wait(cuda)
        times.append(time.perf_counter() - start)
    return times


def _kernel(case: Case) -> Any:
    """The attention kernel of a case, for what is traced and what is run."""
    backend = ATTENTION[case.attention] if case.attention else None
    return contextlib.nullcontext() if backend is None else sdpa_kernel(backend)


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def _ours(case: Case, gpt: Gpt, ranks: Ranks) -> Callable[[], object]:
    optim = AdamW(lr_peak=1e-4)
    with ranks.device:
        model = gpt.build()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=model.initial_std(name))
    engine: Any = engine_of(case, ranks.device.type == "cuda").build(model, optim, ranks)
    if case.multiple is not None:
        plan: LossPlan = engine.module.lm_head.plan
        plan_losses(engine.module, replace(plan, multiple=case.multiple))
    rows = torch.randint(gpt.vocab_size, (case.rows, gpt.context + 1), device=ranks.device)
    batch = NextToken().batch(rows, torch.full((case.rows,), gpt.context, device=ranks.device))
    count = case.rows * gpt.context * case.micro_batches

    def step() -> None:
        sources = torch.zeros(case.micro_batches, case.rows, dtype=torch.int64, device=ranks.device)
        tally = Tally([batch] * case.micro_batches, sources, 1)  # as in a run
        engine.step(tally.batches, count, optim.rates(1.0), tally=tally)

    return step


def _nanogpt(case: Case, gpt: Gpt, path: Path | None, ranks: Ranks) -> Callable[[], object]:
    """As its train.py does: fp32 weights, bf16 by autocast, fused AdamW, clipping at 1.0."""
    assert path is not None
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    cuda = ranks.device.type == "cuda"
    model: Any = nanogpt_model(path, gpt, NANOGPT_VOCABULARY if cuda else gpt.vocab_size).to(ranks.device)
    groups = [[p for p in model.parameters() if p.dim() >= 2], [p for p in model.parameters() if p.dim() < 2]]
    decays = [{"params": group, "weight_decay": d} for group, d in zip(groups, (0.1, 0.0), strict=True)]
    optimizer = torch.optim.AdamW(decays, lr=1e-4, betas=(0.9, 0.95), fused=True)
    model = torch.compile(model) if case.compile else model
    rows = torch.randint(gpt.vocab_size, (case.rows, gpt.context + 1), device=ranks.device)
    inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def step() -> None:
        for _ in range(case.micro_batches):
            with torch.autocast(ranks.device.type, dtype=torch.bfloat16, enabled=cuda):
                loss = model(inputs, targets)[1] / case.micro_batches
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# --- parts by themselves ------------------------------------------------------------------------------------------


def seconds_of(work: Callable[[], object], repeats: int) -> float:
    """The median time of a piece of work, after a warm-up of three."""
    cuda = torch.cuda.is_available()
    times = []
    for i in range(repeats + 3):
        _wait(cuda)
        begun = time.perf_counter()
        work()
        _wait(cuda)
        if i >= 3:
            times.append(time.perf_counter() - begun)
    return statistics.median(times)


def matmul_rate(size: int, device: str) -> float:
    """TFLOP/s of a bf16 matrix product of random values."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, 30 if device == "cuda" else 3) / 1e12


ATTENTION = {
    "as torch chooses": None,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "plain products": SDPBackend.MATH,
}


def attention_rates(device: str, is_time: Callable[[], bool]) -> list[str]:
    """Lines of a table: forward and backward of causal attention by kernel, as if nothing were masked."""
    shapes = [(32, 12, 1024, 64), (8, 16, 2048, 128)] if device == "cuda" else [(2, 2, 128, 64)]
    lines = [
        "| attention | B, H, T, D | ms, forward and backward | TFLOP/s as if nothing were masked |",
        "|---|---|---:|---:|",
    ]
    for shape in shapes:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))

        def work(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
            F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

        batch, heads, length, width = shape
        operations = 3.5 * 4 * batch * heads * length**2 * width
        for name, backend in ATTENTION.items():
            if name == "plain products" and device == "cuda" and batch * heads * length**2 * 6 > 20e9:
                continue
            if not is_time():
                return [*lines, f"| {name} | {shape} | left out: out of time | - |"]
            try:
                if backend is None:
                    spent = seconds_of(work, 20)
                else:
                    with sdpa_kernel(backend):
                        spent = seconds_of(work, 20)
            except RuntimeError as error:
                lines.append(f"| {name} | {shape} | {str(error).splitlines()[0][:60]} | - |")
                continue
            lines.append(f"| {name} | {shape} | {1e3 * spent:.2f} | {operations / spent / 1e12:.1f} |")
    return lines


def skipping_rates(device: str, is_time: Callable[[], bool]) -> list[str]:
    """Lines of a table: attention that skips what is not seen against dense, as far as there is time."""
    lengths, heads = ((2048, 8192, 32768), 12) if device == "cuda" else ((256, 512), 2)
    lines = [
        "| tokens | attention, a band of 256, documents of 512 | ms (spread, passes) | times as fast as dense | MiB |",
        "|---:|---|---:|---:|---:|",
    ]
    for length in lengths:
        dense_ms: float | None = None
        for kind in attention.KINDS:
            if not is_time():
                return [*lines, f"| {length:,} | {kind} | left out: out of time | | |"]
            case = attention.Case(kind, length, heads, band=256, document=512)
            row = attention.run_case(case, longest_s=0.5 if device == "cuda" else 0.05, timeout_s=60)
            dense_ms = row.get("ms") if kind == "dense" else dense_ms
            lines.append(attention.line(row, dense_ms))
    return lines


def loss_rates(device: str, is_time: Callable[[], bool]) -> list[str]:
    """Lines of a table: output layer and loss, forward and backward, by how the logits are made."""
    tokens, width, vocabulary = (32 * 1024, 768, VOCABULARY) if device == "cuda" else (256, 64, 509)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    weight = (0.02 * torch.randn(vocabulary, width, device=device)).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=device)
    weights = torch.ones(tokens, device=device)

    def plain() -> Tensor:
        return weighted_loss(hidden @ weight.t(), targets, weights)

    ways: dict[str, Callable[[], Tensor]] = {"plain": plain}

    def padded() -> Tensor:
        return weighted_loss(padded_product(hidden, weight, 128), targets, weights)

    ways["padded to 128"] = padded
    if device == "cuda":
        ways["plain, compiled"] = torch.compile(plain, dynamic=False)
        ways["padded to 128, compiled"] = torch.compile(padded, dynamic=False)
    for chunk in (tokens // 16, tokens // 4):

        def chunked(chunk: int = chunk) -> Tensor:
            return chunked_loss(hidden, weight, targets, weights, chunk)

        ways[f"chunks of {chunk}"] = chunked
        if device == "cuda":
            ways[f"chunks of {chunk}, compiled"] = torch.compile(chunked, dynamic=False)
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        theirs: Any = F.linear_cross_entropy
        options = torch.nn.LinearCrossEntropyOptions()
        ways["torch's linear_cross_entropy"] = lambda: theirs(hidden, weight, targets, reduction="sum", options=options)
    lines = [f"| loss of {tokens} x {width} x {vocabulary} | ms, forward and backward | peak GiB |", "|---|---:|---:|"]
    for name, way in ways.items():
        if not is_time():
            return [*lines, f"| {name} | left out: out of time | - |"]
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()

        def work(way: Callable[[], Tensor] = way) -> None:
            hidden.grad = weight.grad = None
            way().backward()

        try:
            spent = seconds_of(work, 10)
        except RuntimeError as error:
            lines.append(f"| {name} | {str(error).splitlines()[0][:60]} | - |")
            continue
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.2f}" if device == "cuda" else "-"
        lines.append(f"| {name} | {1e3 * spent:.2f} | {memory} |")
    return lines


# --- the table ----------------------------------------------------------------------------------------------------


HEAD = [
    "| model | engine | setting | rows x micro | tokens/s | MFU | step ms (spread) | peak GiB | first step s |",
    "|---|---|---|---|---:|---:|---:|---:|---:|",
]


def line(row: dict[str, Any]) -> str:
    """A row of the table in Markdown."""
    case = Case(**{field: row[field] for field in Case.__dataclass_fields__})
    shape = f"| {case.model} | {case.engine} | {case.setting} | {case.rows} x {case.micro_batches} |"
    if "error" in row:
        return f"{shape} {row['error']} |"
    mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
    memory = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
    speed = f"{row['tokens_per_s']:,.0f} | {mfu} | {row['step_ms']:.1f} ({row['spread_ms']:.1f})"
    return f"{shape} {speed} | {memory} | {row['first_step_s']:.0f} |"


def costs(rows: list[dict[str, Any]], compiled: bool = True) -> list[str]:
    """What DeepSpeed costs, and how far ahead of nanoGPT we are, by size, from the rows at the same batch."""
    done = [(Case(**{f: r[f] for f in Case.__dataclass_fields__}), r) for r in rows if "step_ms" in r]
    by_case = {(c.model, c.engine): r for c, r in done if c == Case(c.model, c.engine, ROWS[c.model], compile=compiled)}
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        torch_, zero, theirs = (by_case.get((model, engine)) for engine in ("torch", "zero1", "nanogpt"))
        if torch_ and zero:
            cost = [100 * (ratio - 1) for ratio in _ratios(zero, torch_)]
            more = ""
            if theirs:
                over = _ratios(theirs, zero)
                more = f"; over nanoGPT {statistics.median(over):.2f}x ({min(over):.2f} to {max(over):.2f})"
            between = f"({min(cost):+.1f} to {max(cost):+.1f})"
            lines.append(f"{model}: DeepSpeed costs {statistics.median(cost):+.1f}% {between} of a step{more}")
    return lines


def _ratios(one: dict[str, Any], other: dict[str, Any]) -> list[float]:
    """How much longer a step of one takes than of the other, round by round."""
    return [a / b for a, b in zip(one["rounds_ms"], other["rounds_ms"], strict=True)]


def _own_cache(case: Case) -> dict[str, str]:
    """The compiler's memory knows no attention kernel: what was compiled with one would be taken for another."""
    if not case.attention:
        return {}
    name = case.attention.replace(" ", "-")
    return {"TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"longhaul-inductor-{name}")}


class Worker:
    """The process of a case, as one that runs out of memory must not spoil the next."""

    def __init__(self, case: Case, options: argparse.Namespace, place: Path) -> None:
        self.case = case
        self._log = (place / f"{id(self)}.log").open("w+")
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--case", json.dumps(asdict(case))]
        command += ["--seconds", str(options.seconds), "--lock", str(place / "lock")]
        command += ["--nanogpt", str(options.nanogpt)] if options.nanogpt else []
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env={**(COMPILING if torch.cuda.is_available() else ONE_THREAD), **os.environ, **_own_cache(case)},
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for printed in self._process.stdout or []:
            self._lines.put(printed.strip())
        self._lines.put(None)

    def expect(self, begin: str, until: float) -> tuple[str | None, str]:
        """The rest of the next line that begins so; or None, and why there is none."""
        while True:
            try:
                printed = self._lines.get(timeout=max(0.01, until - time.perf_counter()))
            except queue.Empty:
                return None, "not done in time"
            if printed is None:
                self._process.wait()
                self._log.seek(0)
                return None, ([x for x in self._log.read().strip().splitlines() if x] or ["no output"])[-1][:160]
            if printed.startswith(begin):
                return printed[len(begin) :], ""

    def go(self, until: float, last: bool) -> tuple[dict[str, Any] | None, str]:
        """Have it time itself for a round; its row after the last one, and what went wrong."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        said, error = self.expect("ROW " if last else "READY", until)
        return (json.loads(said) if last and said else None), error

    def end(self) -> None:
        """Give its memory back."""
        self._process.kill()
        self._process.wait()


def run_together(group: list[Case], options: argparse.Namespace, until: float) -> Iterator[dict[str, Any]]:
    """Rows of cases that compile beside each other and are timed one by one."""
    with tempfile.TemporaryDirectory() as place:
        workers = [Worker(case, options, Path(place)) for case in group]
        try:
            timing = until - len(workers) * (options.seconds + 2)  # from when on those that are ready are timed
            errors = [worker.expect("READY", timing)[1] for worker in workers]
            rows: list[dict[str, Any] | None] = [None] * len(workers)
            for i in range(ROUNDS):
                for which, worker in enumerate(workers):
                    if errors[which]:
                        worker.end()
                    else:
                        rows[which], errors[which] = worker.go(until, last=i == ROUNDS - 1)
            for worker, row, error in zip(workers, rows, errors, strict=True):
                yield row or {**asdict(worker.case), "error": error}
        finally:
            for worker in workers:
                worker.end()


def main() -> None:
    """Measure, print each row when it is there, and write the tables to a file named after hardware and date."""
    begun = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--budget", type=float, default=560)
    parser.add_argument("--nanogpt", type=Path)
    parser.add_argument("--models", default="124M,1.3B,350M,760M")
    parser.add_argument("--variants", choices=["none", "first", "all"], default="all")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--lock", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    if options.case:
        row = run(Case(**json.loads(options.case)), options.seconds, options.nanogpt, Turn(options.lock), begun)
        print("ROW " + json.dumps(row))
        sys.stdout.flush()
        os._exit(0)  # DeepSpeed leaves a thread that aborts some exits
    device, name = ("cuda", torch.cuda.get_device_name()) if cuda else ("cpu", "CPU")
    text = [f"# One {name}, {datetime.date.today()}", "", f"`python -m benchmarks.gpu`, torch {torch.__version__}."]
    if cuda:
        text.append(f"cuDNN {torch.backends.cudnn.version()}; MFU against {peak_flops(name) or 0:.3g} FLOP/s.")
    else:
        text.append("NO GPU HERE: tiny models on the CPU, to show that this program runs; no figure of speed.")
    text += [f"{FORMULA}.", f"bf16 matmul: {matmul_rate(8192 if cuda else 256, device):.3g} TFLOP/s.", ""]
    print("\n".join([*text, *HEAD]), flush=True)
    sizes = options.models.split(",") if cuda else ["tiny"]
    wanted = cases(sizes, options.nanogpt is not None, cuda, options.variants if cuda else "none")
    wanted += [] if cuda else TINY_VARIANTS
    text += [] if options.nanogpt else ["Without nanoGPT: no --nanogpt was given.", ""]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"gpu_{name.replace(' ', '-')}_{datetime.date.today()}.md"

    def write(parts: list[str]) -> None:
        """What there is by now: whoever ends this early has it."""
        path.write_text("\n".join([*text, *HEAD, *map(line, rows), "", *parts]) + "\n")

    def is_time() -> bool:
        return bool(options.budget - (time.perf_counter() - begun) > LEAST_S)

    capacity = RESERVE * torch.cuda.mem_get_info()[1] if cuda else 2.0 * GIB
    rows: list[dict[str, Any]] = []
    for group in groups(wanted, capacity, cuda):
        until = begun + options.budget
        if until - time.perf_counter() < LEAST_S:
            made: Any = ({**asdict(case), "error": "left out: out of time"} for case in group)
        else:
            made = run_together(group, options, until)
        for row in made:
            rows.append(row)
            print(line(row), flush=True)
            write([])
    parts = [*costs(rows, compiled=cuda), ""]
    write(parts)
    for tables in (attention_rates, loss_rates, skipping_rates):
        parts += [*tables(device, is_time), ""] if is_time() else []
        write(parts)
    print("\n".join(["", *parts]))
    print(f"\n{path}", flush=True)
    os._exit(0)  # DeepSpeed leaves a thread that aborts some exits


if __name__ == "__main__":
    main()
