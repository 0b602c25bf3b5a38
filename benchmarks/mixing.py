"""How well lanes and windows mix, beside a full shuffle: variance of means, and the loss of a small model.

    python -m benchmarks.mixing --data FOLDER [--out benchmarks] [--steps 240] [--seeds 4]

FOLDER has books/*.txt, wikipedia/*.xml.bz2 and common_crawl/*.warc.gz. Their documents, in the order of the files and
in pieces of 2,000 tokens, become two corpora of the same tokens: one of blocks of 4,096 tokens, and one whose blocks
are single sequences of 128, so that its order is a full shuffle. A keyed twentieth of the pieces is held out.

Measures. CorgiPile's h_D (Xu et al. 2022: the variance between blocks, as a multiple of what shuffled data has; 1 for
shuffled data, at most the sequences of a block), of token frequencies in place of gradients. The inflation: the mean
square distance between the mean of h steps in a row and that of all data, over what h steps of a full shuffle without
replacement have; 1 is a full shuffle. Theory: with b sequences in a block, ICC = (h_D - 1) / (b - 1); with B sequences
in a step, G lanes and W blocks in a group, n = h B / G sequences come from each lane, out of W blocks, which
gives 1 + ICC (n - 1) / W while n is at most b W, and no more beyond (blocks drawn with replacement are assumed).

Training: a GPT of 2 layers and width 64 through our own stream and engine, equal but for the order; held-out loss. As
many runs at once as there are cores, a thread each. A seed gives first values and order; runs of one seed are compared.

What follows for the defaults is derived from these figures: see `conclusions`.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.rules import all_documents
from configs import build
from data_pipeline.document import Document
from data_pipeline.order import Order, Segment, Skips, Steps
from data_pipeline.shards import Format, SealedSlice, SliceWriter, Split, file_hash, id_hash, seal
from data_pipeline.stream import Corpora, Data, Stream, Validation
from data_pipeline.tokenizer import Tokenizer, train

LENGTH, BLOCK, BATCH, VOCABULARY, PIECE = 128, 4096, 32, 2048, 2000
ORDERS = {  # name: (block, lanes, blocks in a group)
    "full shuffle": (LENGTH, 1, 1),
    "32 lanes, groups of 8": (BLOCK, 32, 8),
    "32 lanes, groups of 2": (BLOCK, 32, 2),
    "32 lanes, groups of 1": (BLOCK, 32, 1),
    "8 lanes, groups of 8": (BLOCK, 8, 8),
    "8 lanes, groups of 1": (BLOCK, 8, 1),
    "1 lane, groups of 8": (BLOCK, 1, 8),
    "1 lane, groups of 1": (BLOCK, 1, 1),
}
HORIZONS = (1, 2, 4, 8, 16, 32, 64)
TRAINED = ("full shuffle", "32 lanes, groups of 8", "32 lanes, groups of 1", "1 lane, groups of 1")
AS_MIXED, NEARLY = 1.05, 1.25  # inflations: of one step, and over the steps that Adam averages
ADAM_STEPS = 8  # the horizon below 1 / (1 - beta1) = 10
STUDENT = (math.inf, 12.7, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36)  # standard errors of 95 %, by seeds - 1
BEGUN = time.perf_counter()
Floats = npt.NDArray[np.float32]


def write(data: Path, work: Path) -> None:
    """Both corpora."""
    documents = list(all_documents(data))
    train((document.text for document in documents), VOCABULARY, work / "tokenizer.json")
    tokenizer = Tokenizer.load(work / "tokenizer.json")
    pieces = []
    for document in documents:
        [ids] = tokenizer.encode_batch([document.text])
        pieces += [(f"{document.id}/{at}", ids[at : at + PIECE]) for at in range(0, len(ids), PIECE)]
    for block in (LENGTH, BLOCK):
        place, format = work / str(block) / "slices/s0", Format(block, VOCABULARY, VOCABULARY - 1)
        place.mkdir(parents=True)
        writer = SliceWriter(place, format)
        for name, ids in pieces:
            split: Split = "validation" if id_hash(name) % 20 == 0 else "train"
            writer.add(Document("", name, "benchmark", "", {}), ids, split)
        records = writer.close()
        (place / "slice.json").write_text("{}")
        hashes = file_hash(place / "ids.npy"), file_hash(place / "slice.json")
        seal(work / str(block), format, {"tokenizer_sha256": "0" * 64}, [SealedSlice("s0", 0, records, *hashes)])


def data_of(work: Path, block: int, group_blocks: int = 1) -> Data:
    sources = {"all": {"shards": str(work / str(block))}}
    return build(Data, {"seq_tokens": LENGTH, "group_blocks": group_blocks, "sources": sources}, "benchmark")


def stream_of(work: Path, name: str, seed: int) -> tuple[Stream, Corpora]:
    block, lanes, group_blocks = ORDERS[name]
    data = data_of(work, block, group_blocks)
    corpora = Corpora(data)
    pools = corpora.pools({"all": 1})
    order = Order(seed, pools, lanes, group_blocks, [Segment(0, {"all": 1.0}, {"all": 1})])
    return Stream(order, Steps([(0, BATCH)]), Skips(), corpora.shards(pools), data, BATCH), corpora


# --- variance ---------------------------------------------------------------------------------------------------------


def features(work: Path) -> tuple[Floats, int]:
    """Frequencies of tokens in each sequence of the corpus of blocks, in its own order, and how many a block has."""
    stream, _ = stream_of(work, "1 lane, groups of 1", 0)
    [shards] = stream.open_blocks.shards
    each = BLOCK // LENGTH
    found = np.zeros((shards.blocks * each, VOCABULARY), np.float32)
    for block in range(shards.blocks):
        ids = shards.read(block)[:BLOCK].reshape(each, LENGTH)
        for row in range(each):
            found[block * each + row] = np.bincount(ids[row], minlength=VOCABULARY) / LENGTH
    return found - found.mean(axis=0), each


def between_blocks(sequences: Floats, each: int) -> float:
    """h_D: b times the variance of block means, over that of sequences."""
    means = sequences.reshape(-1, each, sequences.shape[1]).mean(axis=1)
    return float(each * (means**2).sum(axis=1).mean() / (sequences**2).sum(axis=1).mean())


def inflation(work: Path, name: str, sequences: Floats, each: int, seeds: int) -> list[float]:
    """For each horizon: variance of the mean of its sequences over that of a full shuffle, over one epoch."""
    ratios: list[list[float]] = [[] for _ in HORIZONS]
    count, variance = len(sequences), (sequences**2).sum(axis=1).mean()
    for seed in range(seeds):
        if ORDERS[name][0] == LENGTH:
            place = np.random.default_rng(seed).permutation(count)
        else:
            order = stream_of(work, name, seed)[0].order
            where = order.locate(np.arange(count))
            place = where.block * each + where.row
        for i, horizon in enumerate(HORIZONS):
            size = horizon * BATCH
            whole = count // size * size
            means = sequences[place[:whole]].reshape(-1, size, sequences.shape[1]).mean(axis=1)
            expected = variance / size * (1 - size / count) / (1 - 1 / count)
            ratios[i].append(float((means**2).sum(axis=1).mean() / expected))
    return [statistics.mean(each) for each in ratios]


def predicted(name: str, h_d: float, each: int) -> list[float]:
    block, lanes, group_blocks = ORDERS[name]
    if block == LENGTH:
        return [1.0] * len(HORIZONS)
    icc = (h_d - 1) / (each - 1)
    found = []
    for horizon in HORIZONS:
        drawn = horizon * BATCH / lanes
        found.append(1 + icc * (min(drawn, each * group_blocks) - 1) / group_blocks)
    return found


# --- training ---------------------------------------------------------------------------------------------------------


@functools.cache
def alone() -> Any:
    """This process as the only rank; there is one process group in a process."""
    from pretrain.ranks import Ranks

    return Ranks.join()


def held_out(work: Path, name: str, seed: int, steps: int) -> float:
    """Loss on held-out pieces after `steps` steps; the model's first values are those of the seed."""
    import torch

    from pretrain.engine.plain import Torch
    from pretrain.models.gpt import Gpt
    from pretrain.models.weights import initialize
    from pretrain.objectives import NextToken
    from pretrain.optim import AdamW

    torch.set_num_threads(1)
    shape = {"layers": 2, "width": 64, "heads": 2, "context": LENGTH, "vocab_size": VOCABULARY}
    model = build(Gpt, shape, "benchmark").build()
    initialize(model, seed)
    optim, objective = AdamW(lr_peak=3e-3), NextToken()
    engine = Torch(precision="fp32").build(model, optim, alone())
    stream, _ = stream_of(work, name, seed)
    warm = max(steps // 20, 1)
    for batch in stream.batches(0, steps):
        factor = min((batch.step + 1) / warm, 0.1 + 0.9 * (steps - batch.step) / steps)
        rows = objective.batch(torch.from_numpy(batch.tokens[0]), torch.from_numpy(batch.valid[0]))
        engine.step([rows], BATCH * LENGTH, optim.rates(factor))
    manifest = Corpora(data_of(work, LENGTH)).manifests["all"]
    total = count = 0.0
    for each in Validation(manifest, 1, LENGTH, 200_000).batches(64, 0, 1):
        tokens, valid = each[0], each[1]
        total += float(engine.loss(objective.batch(torch.from_numpy(tokens), torch.from_numpy(valid))))
        count += int(valid.sum())
    return total / count


# --- what follows -----------------------------------------------------------------------------------------------------


def differences(losses: dict[str, list[float]], name: str) -> tuple[float, float]:
    """Mean over the seeds of an order's loss above that of a full shuffle, and its standard error (inf for a seed)."""
    each = [loss - full for loss, full in zip(losses[name], losses["full shuffle"], strict=True)]
    error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else math.inf
    return statistics.mean(each), error


def conclusions(found: dict[str, Any], group_blocks: int) -> list[str]:
    """Sentences on lanes and on `group_blocks`, the default, out of the figures alone."""
    inflations = {
        order[1:]: dict(zip(HORIZONS, found["orders"][name]["inflation"], strict=True))
        for name, order in ORDERS.items()
        if order[0] == BLOCK
    }
    one_step: dict[int, list[float]] = {}
    for (lanes, _), each in inflations.items():
        one_step.setdefault(lanes, []).append(each[1])
    groups = {width: each[ADAM_STEPS] for (lanes, width), each in inflations.items() if lanes == BATCH}
    return [*of_lanes(one_step), *of_groups(groups, group_blocks), *trained(found["losses"])]


def of_lanes(one_step: dict[int, list[float]]) -> list[str]:
    """What the variance of one step says, by lanes, for each width of groups."""
    worst = {lanes: max(each) for lanes, each in sorted(one_step.items())}
    enough = [lanes for lanes, most in worst.items() if most <= AS_MIXED]
    stated = ", ".join(f"{lanes} gives up to {most:.2f}" for lanes, most in worst.items())
    if not enough:
        verdict = "none is as mixed, so one lane for each sequence of a step is not enough"
    elif enough[0] == BATCH:
        verdict = f"{BATCH} are needed, one for each sequence of a step, which is what the stream chooses: that stays"
    else:
        verdict = f"{enough[0]} are enough, fewer than the sequences of a step, which is what the stream chooses"
    return [f"Lanes, one step of {BATCH} sequences, whatever the groups: {stated}; {verdict}."]


def of_groups(groups: dict[int, float], group_blocks: int) -> list[str]:
    """What the variance over ADAM_STEPS says, by blocks in a group, with a lane for each sequence."""
    enough = [width for width, value in sorted(groups.items()) if value <= NEARLY]
    stated = ", ".join(f"of {width} {value:.2f}" for width, value in sorted(groups.items()))
    if not enough:
        verdict = "none is near, so larger ones are to be tried"
    elif enough[0] == group_blocks:
        verdict = f"{group_blocks} is the least that is near, so `data.group_blocks: {group_blocks}` stays"
    else:
        verdict = f"{enough[0]} is the least that is near, but `data.group_blocks` is {group_blocks}: to be looked at"
    return [f"Groups, {ADAM_STEPS} steps, about what Adam averages, with {BATCH} lanes: {stated}; {verdict}."]


def trained(losses: dict[str, list[float]]) -> list[str]:
    """What training says: which orders are worse than a full shuffle beyond chance."""
    if not losses:
        return ["The losses were not measured in this sitting."]
    lines = []
    for name in losses:
        if name == "full shuffle":
            continue
        mean, error = differences(losses, name)
        seeds = len(losses[name])
        if seeds == 1:
            lines.append(f"Loss, {name}: {mean:+.4f} with one seed, which says nothing.")
            continue
        width = STUDENT[min(seeds - 1, len(STUDENT) - 1)] * error
        if abs(mean) <= width:
            what = "no difference that can be told from chance"
        else:
            what = "worse than a full shuffle" if mean > 0 else "better than a full shuffle"
        lines.append(
            f"Loss, {name}: {mean:+.4f} above a full shuffle, 95 % interval {mean - width:+.4f} to {mean + width:+.4f} "
            f"over {seeds} seeds: {what}."
        )
    return lines


# --- the page ---------------------------------------------------------------------------------------------------------


def plot(found: dict[str, Any], path: Path) -> None:
    """Inflation over the horizon, measured and predicted; and the losses beside that of a full shuffle."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "longhaul"
    from matplotlib import pyplot

    losses = found["losses"]
    figure = pyplot.figure(figsize=(12 if losses else 8, 4.5))
    axes = figure.add_subplot(1, 2 if losses else 1, 1)
    colors = {name: f"C{i}" for i, name in enumerate(ORDERS)}
    for name, side in found["orders"].items():
        axes.plot(HORIZONS, side["inflation"], "o-", color=colors[name], label=name, markersize=3)
        axes.plot(HORIZONS, side["predicted"], ":", color=colors[name], linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="steps in a row", ylabel="variance of their mean / of a full shuffle")
    axes.set_xticks(HORIZONS, [str(h) for h in HORIZONS])
    axes.set_yticks((1, 1.5, 2, 3, 4, 5), ("1", "1.5", "2", "3", "4", "5"))
    axes.minorticks_off()
    axes.legend(fontsize=7, loc="upper left", title="dotted: theory", title_fontsize=7)
    if losses:
        plot_losses(losses, figure.add_subplot(1, 2, 2), colors)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def plot_losses(losses: dict[str, list[float]], axes: Any, colors: dict[str, str]) -> None:
    """Each seed's loss above that of its full shuffle, and their mean."""
    others = [name for name in losses if name != "full shuffle"]
    for place, name in enumerate(others):
        each = [loss - full for loss, full in zip(losses[name], losses["full shuffle"], strict=True)]
        axes.plot([place] * len(each), each, "o", color=colors[name], markersize=4, alpha=0.5)
        axes.plot([place - 0.2, place + 0.2], [statistics.mean(each)] * 2, "-", color=colors[name])
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(others)), [name.replace(", ", ",\n") for name in others], fontsize=7)
    axes.set(ylabel="held-out loss above that of a full shuffle, by seed")


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| order | " + " | ".join(f"{h} steps" for h in HORIZONS) + " | theory, 1 step | theory, 16 steps |",
        "|---|" + "---:|" * (len(HORIZONS) + 2),
    ]
    for name, side in found["orders"].items():
        theory = side["predicted"]
        cells = [f"{x:.2f}" for x in (*side["inflation"], theory[0], theory[HORIZONS.index(16)])]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if found["losses"]:
        lines += ["", "| order | held-out loss | by seed | against a full shuffle |", "|---|---:|---|---:|"]
        for name, losses in found["losses"].items():
            seeds = ", ".join(f"{loss:.4f}" for loss in losses)
            mean, error = differences(found["losses"], name)
            spread = "" if math.isinf(error) or name == "full shuffle" else f" +- {error:.4f}"
            lines.append(f"| {name} | {statistics.mean(losses):.4f} | {seeds} | {mean:+.4f}{spread} |")
    return "\n".join(lines)


def progress(*words: object) -> None:
    print(f"{time.perf_counter() - BEGUN:6.0f} s", *words, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--work", type=Path, help="a folder that is kept: losses that are there are not made again")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mixing-") as name:
        work = arguments.work or Path(name)
        work.mkdir(parents=True, exist_ok=True)
        if not (work / str(BLOCK) / "MANIFEST.json").exists():
            write(arguments.data, work)
            progress("both corpora written")
        sequences, each = features(work)
        h_d = between_blocks(sequences, each)
        found: dict[str, Any] = {"h_d": h_d, "sequences": len(sequences), "orders": {}}
        for order in ORDERS:
            measured = inflation(work, order, sequences, each, 3)
            found["orders"][order] = {"inflation": measured, "predicted": predicted(order, h_d, each)}
            progress(order, [round(value, 2) for value in measured])
        del sequences
        found["losses"] = all_losses(work, arguments.steps, arguments.seeds)
    write_page(found, arguments.out, arguments.steps)


def all_losses(work: Path, steps: int, seeds: int) -> dict[str, list[float]]:
    """By order, for each seed; those in `losses.json` of the folder are not made again."""
    kept = work / "losses.json"
    made: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    keys = {(order, seed): f"{order}, seed {seed}, {steps} steps" for seed in range(seeds) for order in TRAINED}
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as processes:
        going = {
            processes.submit(held_out, work, order, seed, steps): key
            for (order, seed), key in keys.items()
            if key not in made
        }
        for done in as_completed(going):
            made[going[done]] = done.result()
            kept.write_text(json.dumps(made))
            progress(going[done], made[going[done]])
    return {order: [made[keys[order, seed]] for seed in range(seeds)] for order in TRAINED} if seeds else {}


def write_page(found: dict[str, Any], out: Path, steps: int) -> None:
    cores, today = os.cpu_count(), datetime.date.today()
    each = BLOCK // LENGTH
    group_blocks = int(Data.model_fields["group_blocks"].default)
    follows = "\n".join(f"- {line}" for line in conclusions(found, group_blocks))
    text = (
        "# Mixing: lanes and windows beside a full shuffle\n\n"
        f"`python -m benchmarks.mixing`, {today}, {cores} cores, Python {platform.python_version()}; "
        f"{found['sequences']:,} sequences of {LENGTH}, {each} in a block, {BATCH} in a step; {steps} "
        f"steps of training.\n\n"
        f"h_D of the blocks is {found['h_d']:.2f} (1: shuffled; {each}: blocks of equal sequences).\n\n"
        f"Variance of the mean of steps in a row, over that of a full shuffle:\n\n{table(found)}\n\n"
        f"![the same as a plot](mixing_CPU-{cores}-cores_{today}.svg)\n\n"
        f"What follows, derived from these figures (as mixed: within {AS_MIXED} in one step and {NEARLY} over "
        f"{ADAM_STEPS}):\n\n{follows}\n"
    )
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"mixing_CPU-{cores}-cores_{today}.md").write_text(text)
    plot(found, out / f"mixing_CPU-{cores}-cores_{today}.svg")


if __name__ == "__main__":
    main()
