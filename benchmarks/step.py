"""One training step on the CPU: ours against a bare torch loop, nanoGPT, litGPT; DeepSpeed's own cost, and by cause.

    python -m benchmarks.step [--rounds 5] [--nanogpt PATH] [--litgpt SITE-PACKAGES] [--out benchmarks]
    python -m benchmarks.step --only steps | pair | causes

Three tables: steps in one process; two ranks, ZeRO-1 against torch's DDP; where DeepSpeed's milliseconds go.
One shape, stated once: 11.6 M parameters in the proportions of GPT-2 124M (configs/model/gpt2-10m.yaml), 16,384 tokens
per step in micro-batches of 4 rows of 512, fp32, AdamW (torch's fused kernel for all), clipping at 1.0, random tokens.
All take a step in turn, in one process; the order turns with the round. Given is the median of each one's times, and
the median over rounds of its speed over that of the torch engine in the same round; also by CPU time, which with
`--threads 1` other work on the machine disturbs little.

nanoGPT (PATH: a checkout, or the bare repository of one) and litGPT (SITE-PACKAGES: pip install --target) are read at
run time, with this shape, the same optimizer and no compilation. litGPT's has rotary positions and a tied output layer.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import configs
from data_pipeline.document import Document
from data_pipeline.shards import Format, SealedSlice, SliceWriter, file_hash, seal
from pretrain.attempt import Attempt
from pretrain.engine import zero as zero_engine
from pretrain.engine.plain import Torch
from pretrain.engine.state import StepTimer
from pretrain.engine.zero import DeepSpeed
from pretrain.guard import StopSignals
from pretrain.meter import Startup
from pretrain.models.gpt import Gpt
from pretrain.models.weights import initialize
from pretrain.objectives import Batch, NextToken
from pretrain.optim import AdamW
from pretrain.ranks import Ranks
from pretrain.run import TrainRun
from pretrain.start import begin
from pretrain.watchdog import Watchdog

ROWS, MICRO_ROWS = 32, 4  # of 512 tokens
OPTIM = AdamW(lr_peak=1e-4)
Step = Callable[[], object]


class AnyModel(configs.Section):
    """For the model's own file."""

    model: Gpt


def shape(tiny: bool) -> Gpt:
    """The shape of all figures; `tiny` only shows that the program runs."""
    if tiny:
        return Gpt(layers=2, width=32, heads=2, context=64, vocab_size=512)
    return configs.build(AnyModel, {"model": "model/gpt2-10m.yaml"}, "benchmark").model


def batches(gpt: Gpt, rows: int = ROWS) -> list[Batch]:
    """A step's micro-batches of random tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(gpt.vocab_size, (rows, gpt.context + 1), generator=generator)
    made = [NextToken().batch(part, torch.full((len(part),), gpt.context)) for part in tokens.split(MICRO_ROWS)]
    return [each._replace(inputs=each.inputs.contiguous(), targets=each.targets.contiguous()) for each in made]


def ours(gpt: Gpt) -> nn.Module:
    """Our model, with its first values."""
    model = gpt.build()
    initialize(model, 1)
    return model


# --- what takes a step --------------------------------------------------------------------------------------------


def bare(model: nn.Module, loss_of: Callable[[Batch], Tensor], fed: list[Batch]) -> Step:
    """The loop that anybody would write: mean loss over micro-batches, clip, AdamW."""
    optimizer = OPTIM.over(OPTIM.groups(model))

    def step() -> None:
        for batch in fed:
            (loss_of(batch) / len(fed)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def bare_torch(gpt: Gpt, fed: list[Batch]) -> Step:
    """The bare loop around our model."""
    model = ours(gpt)
    return bare(model, lambda b: F.cross_entropy(model(b.inputs).flatten(0, 1), b.targets.flatten()), fed)


def engine(settings: Torch | DeepSpeed, gpt: Gpt, ranks: Ranks, fed: list[Batch]) -> Step:
    """One of our engines."""
    made: Any = settings.build(ours(gpt), OPTIM, ranks)
    count = sum(int(batch.weights.sum()) for batch in fed) * ranks.size
    return lambda: made.step(fed, count, OPTIM.rates(1.0))


class Defaults(DeepSpeed):
    """DeepSpeed's own gradient buffers and timers, for comparison with what our settings take away."""

    def deepspeed_config(self, clip_norm: float | None, parameters: int = 500_000_000) -> dict[str, Any]:
        """See `DeepSpeed.deepspeed_config`."""
        config = super().deepspeed_config(clip_norm, parameters)
        del config["timers"]
        return config

    def _zero_config(self, parameters: int) -> dict[str, Any]:
        config = super()._zero_config(parameters)
        return {k: v for k, v in config.items() if k not in ("contiguous_gradients", "reduce_bucket_size")}


def zero(kind: type[DeepSpeed] = DeepSpeed, precision: str = "fp32") -> DeepSpeed:
    """Settings of stage 1."""
    return configs.build(kind, {"zero_stage": 1, "precision": precision}, "benchmark")


def nanogpt_file(path: Path) -> Any:
    """nanoGPT's model.py (github.com/karpathy/nanoGPT) as a module, from a checkout or a bare repository."""
    if (path / "model.py").is_file():
        source = (path / "model.py").read_text()
    else:
        command = ["git", "-C", str(path), "show", "HEAD:model.py"]
        source = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    theirs = types.ModuleType("nanogpt_model")
    sys.modules["nanogpt_model"] = theirs
    exec(compile(source, "nanogpt/model.py", "exec"), theirs.__dict__)
    return theirs


def nanogpt_model(path: Path, gpt: Gpt, vocabulary: int) -> nn.Module:
    """nanoGPT's model in our shape."""
    theirs = nanogpt_file(path)
    with contextlib.redirect_stdout(sys.stderr):  # it prints its size
        model: nn.Module = theirs.GPT(
            theirs.GPTConfig(
                block_size=gpt.context, vocab_size=vocabulary, n_layer=gpt.layers, n_head=gpt.heads, n_embd=gpt.width
            )
        )
    return model


def nanogpt(path: Path, gpt: Gpt, fed: list[Batch], gelu: str = "none") -> Step:
    """nanoGPT's model and loss in the bare loop. Its GELU is the exact one (none); GPT-2's own, and ours, is tanh's."""
    model = nanogpt_model(path, gpt, gpt.vocab_size)
    for module in model.modules():
        if isinstance(module, nn.GELU):
            module.approximate = gelu
    return bare(model, lambda b: model(b.inputs, b.targets)[1], fed)


def litgpt(site: Path, gpt: Gpt, fed: list[Batch]) -> Step:
    """litGPT's model and loss (github.com/Lightning-AI/litgpt), from an installation of it, without its __init__."""
    sys.path.append(str(site))
    package = types.ModuleType("litgpt")
    package.__path__ = [str(site / "litgpt")]
    sys.modules["litgpt"] = package
    theirs, losses = importlib.import_module("litgpt.model"), importlib.import_module("litgpt.utils")
    config = importlib.import_module("litgpt.config").Config(
        name="benchmark", block_size=gpt.context, vocab_size=gpt.vocab_size, padded_vocab_size=gpt.vocab_size,
        n_layer=gpt.layers, n_head=gpt.heads, n_embd=gpt.width, parallel_residual=False, bias=True, lm_head_bias=False,
        norm_class_name="LayerNorm", mlp_class_name="GptNeoxMLP", gelu_approximate="tanh", rotary_percentage=1.0,
    )  # fmt: skip
    model = theirs.GPT(config)
    model.lm_head.weight = model.transformer.wte.weight
    return bare(model, lambda b: losses.chunked_cross_entropy(model(b.inputs), b.targets, chunk_size=0), fed)


def whole_loop(gpt: Gpt, ranks: Ranks, folder: Path) -> Step:
    """A step of a real run with the torch engine: read, feed, step, post, judge; its journal is written."""
    corpus(folder / "corpus", gpt)
    run = configs.build(
        TrainRun,
        {
            "name": "benchmark", "run_folder": folder / "run", "model": gpt.model_dump(), "seed": 1,
            "data": {"seq_tokens": gpt.context, "sources": {"random": {"shards": folder / "corpus", "weight": 1.0}}},
            "batch_tokens": ROWS * gpt.context, "micro_batch_seqs": MICRO_ROWS, "train_tokens": 10**9,
            "optim": OPTIM.model_dump(), "schedule": {"kind": "cosine", "warmup_tokens": 10**6},
            "engine": {"kind": "torch", "precision": "fp32"}, "preflight": {"enabled": False}, "log_every_steps": 1,
        },
        "benchmark",
    )  # fmt: skip
    attempt = begin(run, ranks, StopSignals(), Watchdog(ranks, run.run_folder, 1e6, 1e6), Startup())

    going = loop_steps(attempt)
    return lambda: next(going)


def loop_steps(attempt: Attempt) -> Iterator[float]:
    """The steps of a run's loop, without evaluations and saves; after each the seconds that its batch took to come."""
    for batch, waited in attempt.batches():
        begun = time.perf_counter()
        tokens = attempt.course.tokens(batch.step + 1)
        now = attempt.course.at(batch.step)
        rates = now.optim.rates(now.schedule.factor(tokens, now.train_tokens))
        outcome = attempt.step(batch, int(tokens - attempt.course.tokens(batch.step)), rates)
        attempt.advance(batch)
        attempt.post(outcome, rates.lr, time.perf_counter() - begun, waited)
        attempt.judge(batch, outcome)
        yield waited


def corpus(folder: Path, gpt: Gpt) -> None:
    """A sealed corpus of random tokens, enough for the steps of a benchmark."""
    format = Format(block_tokens=2**14, vocab_size=gpt.vocab_size, end_of_text=gpt.vocab_size - 1)
    place = folder / "slices" / "s0"
    place.mkdir(parents=True)
    writer, random = SliceWriter(place, format), np.random.default_rng(1)
    for i in range(600):
        document = Document("", str(i), "random", f"https://example.org/{i}", {"input": "s0", "offset": i})
        writer.add(document, random.integers(gpt.vocab_size - 1, size=1500), "train")
    shards = writer.close()
    (place / "slice.json").write_text("{}")
    made = SealedSlice("s0", 0, shards, file_hash(place / "ids.npy"), file_hash(place / "slice.json"))
    seal(folder, format, {"corpus": "random", "tokenizer_sha256": "0" * 64}, [made])


def ddp(gpt: Gpt, ranks: Ranks, fed: list[Batch]) -> Step:
    """torch's DistributedDataParallel, which reduces with the last micro-batch."""
    model = nn.parallel.DistributedDataParallel(ours(gpt))
    optimizer = OPTIM.over(OPTIM.groups(model))

    def step() -> None:
        for i, batch in enumerate(fed):
            with model.no_sync() if i + 1 < len(fed) else contextlib.nullcontext():
                loss = F.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten())
                (loss / len(fed)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# --- measuring ----------------------------------------------------------------------------------------------------


Times = dict[str, list[tuple[float, float]]]  # seconds by the clock and of CPU, one pair per round


def interleaved(subjects: dict[str, Step], rounds: int) -> Times:
    """What each one's steps took; the first round is left out."""
    times: Times = {name: [] for name in subjects}
    names = list(subjects)
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            begun, spent = time.perf_counter(), time.process_time()
            subjects[name]()
            if turn:
                times[name].append((time.perf_counter() - begun, time.process_time() - spent))
            print(f"round {turn}: {name} {time.process_time() - spent:.1f} s of CPU", file=sys.stderr, flush=True)
    return times


def table(times: Times, tokens: int, base: str) -> str:
    """Medians, and speeds over that of `base` in the same round, by the clock and by CPU time."""
    lines = [
        f"| step | ms, median (least to most) | tokens/s | over {base} | CPU ms, median | over {base}, by CPU |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, seconds in times.items():
        clock, cpu = ([each[i] for each in seconds] for i in (0, 1))
        ratios = [statistics.median(b[i] / s[i] for b, s in zip(times[base], seconds, strict=True)) for i in (0, 1)]
        middle = statistics.median(clock)
        spread = f"{1e3 * middle:.0f} ({1e3 * min(clock):.0f} to {1e3 * max(clock):.0f})"
        by_cpu = f"{1e3 * statistics.median(cpu):.0f} | {ratios[1]:.3f}"
        lines.append(f"| {name} | {spread} | {tokens / middle:,.0f} | {ratios[0]:.3f} | {by_cpu} |")
    return "\n".join(lines)


class PartTimer(StepTimer):
    """Adds up the CPU time of each part of an engine's steps."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.spent: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """See `StepTimer.part`."""
        begun = time.process_time()
        yield
        self.spent[name] = self.spent.get(name, 0.0) + time.process_time() - begun


def operators(step: Step) -> Counter[str]:
    """How often a step calls each of torch's operators."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return Counter(event.name for event in profile.events() or [] if event.name.startswith("aten::"))


def causes(gpt: Gpt, ranks: Ranks, rounds: int, precision: str) -> str:
    """DeepSpeed's own cost by part and by operator: what a step costs beyond the torch engine's.

    It depends on parameters and micro-batches, hardly on tokens; so these are few, that the rest may not drown it.
    """
    fed = [Batch(*(part[:1, :16] for part in batch[:3])) for batch in batches(gpt)]
    kinds: dict[str, Torch | DeepSpeed] = {
        "torch engine": configs.build(Torch, {"precision": precision}, "benchmark"),
        "ZeRO-1": zero(precision=precision),
        "ZeRO-1, DeepSpeed's way": zero(Defaults, precision),
    }
    made: dict[str, Any] = {}
    for name, kind in kinds.items():
        ours_too = not isinstance(kind, Defaults)
        with mock.patch.object(zero_engine, "_lighten", zero_engine._lighten if ours_too else lambda engine: False):
            made[name] = kind.build(ours(gpt), OPTIM, ranks)
    steps: dict[str, Step] = {n: partial(e.step, fed, 16 * len(fed), OPTIM.rates(1.0)) for n, e in made.items()}
    spent: dict[str, list[dict[str, float]]] = {name: [] for name in made}
    for turn in range(rounds + 1):
        for name, engine_ in made.items():
            engine_.timer = PartTimer()
            begun = time.process_time()
            steps[name]()
            whole = time.process_time() - begun
            parts = dict(engine_.timer.spent)
            parts["whole step"] = whole
            if turn:
                spent[name].append(parts)
    middle = {n: {p: 1e3 * statistics.median(r[p] for r in rows) for p in rows[0]} for n, rows in spent.items()}
    names, base = list(made), middle["torch engine"]
    lines = [
        f"| CPU ms of {len(fed)} micro-batches of 16 tokens, {precision} | {' | '.join(names)} |",
        "|---|---:|---:|---:|",
    ]
    for part in base:
        cells = [f"{middle[n].get(part, 0.0):.1f} ({middle[n].get(part, 0.0) - base[part]:+.1f})" for n in names[1:]]
        lines.append(f"| {part} | {base[part]:.1f} | {' | '.join(cells)} |")
    calls = {name: operators(step) for name, step in steps.items()}
    more = calls[names[2]] - calls[names[0]]
    lines += ["", f"| calls per step | {' | '.join(names)} |", "|---|---:|---:|---:|"]
    lines += [f"| {op} | {' | '.join(str(calls[n][op]) for n in names)} |" for op, _ in more.most_common(14)]
    return "\n".join(lines)


def why(options: argparse.Namespace) -> str:
    """The table of causes."""
    torch.set_num_threads(options.threads)
    ranks, gpt = Ranks.join(), shape(options.tiny)
    return "\n\n".join(causes(gpt, ranks, options.rounds, precision) for precision in ("fp32", "bf16"))


def alone(options: argparse.Namespace) -> str:
    """One process, all cores: the table of steps."""
    gpt = shape(options.tiny)
    fed = batches(gpt)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks.join()
        settings = Torch(precision="fp32")
        subjects = {
            "torch engine": engine(settings, gpt, ranks, fed),
            "torch engine in our loop": whole_loop(gpt, ranks, Path(folder)),
            "bare torch loop": bare_torch(gpt, fed),
            "ZeRO-1": engine(zero(), gpt, ranks, fed),
            "ZeRO-1, DeepSpeed's buffers": engine(zero(Defaults), gpt, ranks, fed),
        }
        if options.nanogpt:
            subjects["nanoGPT"] = nanogpt(options.nanogpt, gpt, fed)
            subjects["nanoGPT, with GPT-2's GELU"] = nanogpt(options.nanogpt, gpt, fed, "tanh")
        if options.litgpt:
            subjects["litGPT"] = litgpt(options.litgpt, gpt, fed)
        return table(interleaved(subjects, options.rounds), ROWS * gpt.context, "torch engine")


def paired(options: argparse.Namespace) -> str:
    """Two ranks of one thread each; what rank 0 prints."""
    from tests.processes import environment, free_port

    port = free_port()
    command = [sys.executable, "-m", "benchmarks.step", "--rank", "--rounds", str(options.rounds)]
    command += ["--tiny"] if options.tiny else []
    started = [
        subprocess.Popen(command, env=environment(rank, 2, port), stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=900)[0] for process in started]
    assert all(process.returncode == 0 for process in started)
    return "\n".join(line for line in printed[0].splitlines() if line.startswith("|"))


def one_of_two(options: argparse.Namespace) -> str:
    """One of the two ranks, with half of the rows."""
    torch.set_num_threads(1)
    ranks, gpt = Ranks.join(), shape(options.tiny)
    fed = batches(gpt, ROWS // ranks.size)
    subjects = {
        "DDP": ddp(gpt, ranks, fed),
        "torch engine": engine(Torch(precision="fp32"), gpt, ranks, fed),
        "ZeRO-1": engine(zero(), gpt, ranks, fed),
        "ZeRO-1, DeepSpeed's buffers": engine(zero(Defaults), gpt, ranks, fed),
    }
    times = interleaved(subjects, options.rounds)
    dist.barrier()
    return table(times, ROWS * gpt.context, "DDP")


def main() -> None:
    """Measure, print, and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--nanogpt", type=Path)
    parser.add_argument("--litgpt", type=Path)
    parser.add_argument("--only", choices=list(PARTS), help="one of the three tables")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    options = parser.parse_args()
    if options.rank:
        _leave(one_of_two(options))
    if options.only:
        _leave(PARTS[options.only](options))
    gpt, begun = shape(options.tiny), time.perf_counter()
    text = [
        f"# One training step, {hardware()}, {datetime.date.today()}",
        "",
        f"`python -m benchmarks.step`: {gpt.parameter_count():,} parameters, {ROWS * gpt.context:,} tokens per step in "
        f"micro-batches of {MICRO_ROWS * gpt.context:,}, fp32, {options.rounds} rounds, torch {torch.__version__}, "
        f"{options.threads} threads.",
    ]
    for part in PARTS:  # each in a process of its own: what lives there is part of what is measured
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.step", "--only", part, *sys.argv[1:]],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        lines = [line for line in done.stdout.splitlines() if line.startswith("|") or not line]
        text += ["", f"## {TITLES[part]}", "", *lines]
        print("\n".join([f"## {TITLES[part]}", *lines]), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"step_{hardware()}_{datetime.date.today()}.md"
    path.write_text("\n".join([*text, "", f"Taken in {time.perf_counter() - begun:.0f} s."]) + "\n")
    print(f"\n{path}", flush=True)


PARTS: dict[str, Callable[[argparse.Namespace], str]] = {"steps": alone, "pair": paired, "causes": why}
TITLES = {
    "steps": "One process",
    "pair": "Two ranks of one thread",
    "causes": "DeepSpeed's own cost, one process",
}


def hardware() -> str:
    """This machine in a file's name."""
    return f"CPU-{os.cpu_count()}-cores"


def _leave(text: str) -> NoReturn:
    print(text, flush=True)
    os._exit(0)  # DeepSpeed leaves a thread that aborts some exits


if __name__ == "__main__":
    main()
