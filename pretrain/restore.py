"""A checkpoint as a model that computes: for generation, evaluation and export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from configs import ConfigError
from data_pipeline.progress import Count
from data_pipeline.stream import Corpora
from data_pipeline.tokenizer import Tokenizer
from pretrain import checkpoint
from pretrain.checkpoint import Committed, Damaged
from pretrain.generate import Sampling, Text, write_rows
from pretrain.models.gpt import GPT
from pretrain.models.weights import fill
from pretrain.ranks import Ranks
from pretrain.run import TrainRun, load_run


@dataclass(frozen=True)
class Restored:
    """A run, one of its checkpoints, and the model with that checkpoint's weights in evaluation mode."""

    run: TrainRun
    committed: Committed
    model: GPT
    tokenizer: Tokenizer

    def write(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        """The text that follows a prompt, piece by piece; stops at the end of a document or at a stop string."""
        return filter(None, self._write_batch([prompt], sampling, [Text(self.tokenizer, sampling.stop)]))

    def write_texts(self, prompts: Sequence[str], sampling: Sampling, batch: int = 8) -> Iterator[Text]:
        """What follows each of several prompts, in their order, `batch` of them at once; i is drawn with seed + i."""
        total = len(prompts) * sampling.max_tokens
        with Count() as show:
            for begin in range(0, len(prompts), batch):
                texts = [Text(self.tokenizer, sampling.stop) for _ in prompts[begin : begin + batch]]
                for made, _ in enumerate(self._write_batch(prompts[begin : begin + batch], sampling, texts, begin)):
                    show(begin * sampling.max_tokens + made, total, "generate", "tokens")
                yield from texts

    def _write_batch(
        self, prompts: Sequence[str], sampling: Sampling, texts: list[Text], begin: int = 0
    ) -> Iterator[str]:
        """The pieces of all of them as they come; `texts` has them apart."""
        return write_rows(self.model, self.tokenizer, prompts, sampling, texts, begin)


def open_run(name: str) -> Restored:
    """Open RUN (its newest checkpoint) or RUN@step. Raises ConfigError."""
    run, folders = named_checkpoints(name)
    return restore(run, opened(folders[0]))


def named_checkpoints(name: str) -> tuple[TrainRun, list[Path]]:
    """The run of RUN or RUN@step, and its live checkpoints, newest first, or that one. Raises ConfigError."""
    path, at, step = name.rpartition("@")
    run = load_run(Path(path if at else name))
    alive = checkpoint.live_checkpoints(run.run_folder)
    folders = [f for f in alive if not at or f.name.startswith(f"step-{step}.")]
    if not folders:
        there = ", ".join(f.name.removeprefix("step-").split(".")[0] for f in reversed(alive)) or "none"
        raise ConfigError(f"{run.run_folder}: no checkpoint{f' of step {step}' if at else ''}; there are: {there}")
    return run, folders


def opened(folder: Path) -> Committed:
    """A checkpoint whose manifest is whole. Raises ConfigError."""
    try:
        return checkpoint.open_checkpoint(folder)
    except Damaged as error:
        raise ConfigError(f"{error}; give RUN@step of another checkpoint") from None


def restore(run: TrainRun, committed: Committed, device: torch.device | None = None) -> Restored:
    """The model of a checkpoint, on the GPU where there is one. Raises ConfigError where its files are damaged."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    restored = Restored(run, committed, run.model.build().to(device).eval(), run_tokenizer(run))
    load_weights(restored.model, committed)
    return restored


def load_weights(model: GPT, committed: Committed) -> None:
    """Fill a model with the weights of a checkpoint. Raises ConfigError where its files are damaged."""
    try:
        fill(model.named_parameters(), checkpoint.read_weights(committed), f"load {committed.folder.name}")
    except Damaged as error:
        raise ConfigError(f"{error}; give RUN@step of another checkpoint") from None


def run_tokenizer(run: TrainRun) -> Tokenizer:
    """The tokenizer of a run's corpora. Raises ConfigError, and Unreachable."""
    from data_pipeline.summary import folder_tokenizer  # here: it imports every source of text

    return folder_tokenizer(next(iter(Corpora(run.data).manifests.values())))


def same_tokenizer(corpora: Corpora, ranks: Ranks) -> Tokenizer:
    """The same on every rank, read by rank 0: so that all have it, or none. Raises ConfigError, and Unreachable."""
    from data_pipeline.summary import read_tokenizer, tokenizer_file

    manifest = next(iter(corpora.manifests.values()))
    return read_tokenizer(manifest, ranks.first(lambda: tokenizer_file(manifest)))
