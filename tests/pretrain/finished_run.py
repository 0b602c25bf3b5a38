"""A run with a checkpoint, as training leaves it, without training: a real tokenizer, corpus, lineage and weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import configs
from data_pipeline import tokenizer as tokenizers
from data_pipeline.document import Document
from data_pipeline.made_once import TOKENIZER
from data_pipeline.shards import Format, SealedSlice, SliceWriter, file_hash, seal
from data_pipeline.stream import Corpora
from data_pipeline.tokenizer import Tokenizer
from pretrain import checkpoint
from pretrain.checkpoint import Checkpoints, Committed, Position, Saver
from pretrain.engine.state import Fragment, State, share
from pretrain.lineage import Lineage
from pretrain.models.gpt import GPT
from pretrain.models.weights import initialize
from pretrain.run import TrainRun
from pretrain.segments import Segments, first_segment

VOCABULARY = 300
WORDS = ["the", "river", "was", "deep", "and", "no", "boat", "came", "to", "its", "shore", "that", "day", "Ünder", "42"]
SHAPES: dict[str, dict[str, Any]] = {
    "gpt1": {"norm": "post"},
    "gpt2": {"tied": False, "mlp_ratio": 3},
    "gpt3": {"attention": ["dense", "banded"], "band": 8},
}
RUN = """
name: {name}
run_folder: {folder}/run
model: {{kind: gpt, layers: 3, width: 48, heads: 4, context: 64, vocab_size: {vocabulary}}}
data: {{seq_tokens: 32, sources: {{alpha: {{shards: {folder}/alpha}}}}}}
batch_tokens: 64
micro_batch_seqs: 2
train_tokens: 640
optim: {{kind: adamw, lr_peak: 1e-3}}
schedule: {{kind: cosine, warmup_tokens: 64}}
engine: {{kind: torch, precision: fp32}}
evaluation: {{tokens: 2000}}
"""


def text(seed: int, words: int) -> str:
    """Words in a row."""
    rng = np.random.default_rng(seed)
    return " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), words))


def make_corpus(folder: Path) -> Tokenizer:
    """A small corpus with a tokenizer that was trained on it, beside it."""
    path = folder.parent / TOKENIZER
    tokenizers.train((text(i, 200) for i in range(20)), VOCABULARY, path)
    tokenizer = Tokenizer.load(path)
    format = Format(block_tokens=256, vocab_size=VOCABULARY, end_of_text=tokenizer.end_of_text, shard_bytes=16 * 2**10)
    place = folder / "slices" / "s0"
    place.mkdir(parents=True)
    writer = SliceWriter(place, format)
    for i in range(40):
        document = Document("", f"s0/{i}", folder.name, f"https://example.org/{i}", {"input": "s0", "offset": i})
        writer.add(document, tokenizer.encode_batch([text(i, 80)])[0], "validation" if i % 10 == 9 else "train")
    shards = writer.close()
    (place / "slice.json").write_text("{}")
    made = SealedSlice("s0", 0, shards, file_hash(place / "ids.npy"), file_hash(place / "slice.json"))
    seal(folder, format, {"corpus": folder.name, "tokenizer_sha256": tokenizer.sha256}, [made])
    return tokenizer


def write_config(folder: Path, name: str = "gpt2", *overrides: str) -> TrainRun:
    """The corpus, where it is not there yet, and the run over it, not begun."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "alpha").exists():
        make_corpus(folder / "alpha")
    path = folder / "config.yaml"
    path.write_text(RUN.format(folder=folder, name=name, vocabulary=VOCABULARY))
    shape = [f"model.{key}={json.dumps(value)}" for key, value in SHAPES[name].items()]
    return configs.load(TrainRun, path, [*shape, *overrides])


def values(run: TrainRun, seed: int) -> GPT:
    """A model with opinions: matrices larger than at the start, and no bias left at 0."""
    model = run.model.build()
    initialize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
            else:
                parameter.mul_(4)
    return model.eval()


def begin(run: TrainRun) -> None:
    """The run folder as a start leaves it."""
    run.run_folder.mkdir()
    (run.run_folder / "run.yaml").write_text(configs.dump(run))
    Segments(run.run_folder).write(first_segment(run, Corpora(run.data)))
    Lineage(run.run_folder).take(None, 0, None, "start")


KINDS = ("fp32", "exp_avg", "exp_avg_sq")


def commit(run: TrainRun, model: GPT, step: int, ranks: int = 2, kinds: tuple[str, ...] = KINDS) -> Committed:
    """Save a model as several ranks do; of the optimizer's state the `kinds`, the weights first."""
    named = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in named.items()}
    facts = {"identity": run.identity(), "tokenizer": Corpora(run.data).tokenizer_sha256, "segments": 1}
    savers = [Saver(run.run_folder, Checkpoints(keep_last=9), 1, r, ranks, facts) for r in range(ranks)]
    for rank, saver in enumerate(savers):
        flats = [{k: torch.zeros(p.numel()) for k in kinds} for p in named.values()]
        for flat, parameter in zip(flats, named.values(), strict=True):
            flat["fp32"].copy_(parameter.detach().flatten())
        held = [Fragment(name, 0, p.numel(), i, 0) for i, (name, p) in enumerate(named.items())]
        state = State(shapes, flats, held, share(shapes, rank, ranks), dict.fromkeys(shapes, float(step)))
        saver.save(state, Position(step, 2 * step, 64 * step, hashlib.md5(b"").hexdigest()), digest_share=0)
    for saver in savers:
        saver.wait()
    return checkpoint.open_checkpoint(checkpoint.live_checkpoints(run.run_folder)[0])


def finished(folder: Path, name: str = "gpt2", *overrides: str) -> tuple[TrainRun, GPT]:
    """A run with one checkpoint, at step 10, and the model that it holds."""
    run = write_config(folder, name, *overrides)
    begin(run)
    model = values(run, seed=7)
    commit(run, model, 10)
    return run, model
