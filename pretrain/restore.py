"""A checkpoint as a model that computes: for generation, evaluation and export."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from configs import ConfigError
from data_pipeline.stream import Corpora
from data_pipeline.summary import folder_tokenizer
from data_pipeline.tokenizer import Tokenizer
from pretrain import checkpoint
from pretrain.checkpoint import Committed
from pretrain.generate import Sampling, sample
from pretrain.models.gpt import GPT
from pretrain.models.weights import fill
from pretrain.run import TrainRun, load_run


@dataclass(frozen=True)
class Restored:
    """A run, one of its checkpoints, and the model with that checkpoint's weights in evaluation mode."""

    run: TrainRun
    committed: Committed
    model: GPT
    tokenizer: Tokenizer

    def write(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        """The text that follows a prompt, piece by piece; stops at the end of a document."""
        ids = [self.tokenizer.end_of_text, *self.tokenizer.encode_batch([prompt])[0].tolist()]
        given: list[int] = []
        shown = ""
        for token in sample(self.model, ids, sampling, self.tokenizer.end_of_text):
            given.append(token)
            text = self.tokenizer.decode(given)
            if not text.endswith("\ufffd"):  # a character is whole only when all its bytes are there
                yield text[len(shown) :]
                shown = text


def open_run(name: str) -> Restored:
    """Open RUN (its newest whole checkpoint) or RUN@step. Raises ConfigError."""
    path, at, step = name.rpartition("@")
    run = load_run(Path(path if at else name))
    folders = checkpoint.live_checkpoints(run.run_folder)
    if at:
        folders = [f for f in folders if f.name.startswith(f"step-{step}.")]
    if not folders:
        raise ConfigError(f"{run.run_folder}: no checkpoint{f' of step {step}' if at else ''}")
    committed = checkpoint.open_checkpoint(folders[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = run.model.build().to(device)
    fill(model.named_parameters(), checkpoint.read_weights(committed))
    return Restored(run, committed, model.eval(), _tokenizer(run))


def _tokenizer(run: TrainRun) -> Tokenizer:
    return folder_tokenizer(next(iter(Corpora(run.data).manifests.values())))
