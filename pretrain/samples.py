"""Texts over time: at every evaluation a run goes on with the same prompts, and keeps what it writes in its journal.

Every rank draws, since a model may be spread over all of them (ZeRO 3), and rank 0's tokens are those that count.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field

from configs import Float, Int
from data_pipeline.tokenizer import Tokenizer
from pretrain.generate import Sampling, Text, write_rows
from pretrain.models.gpt import GPT
from pretrain.ranks import Ranks


class Samples(Sampling):
    """What is written at every evaluation, and how it is drawn. The same seed every time: what changes is the model."""

    prompts: tuple[str, ...] = Field(min_length=1)  # "" begins a new text
    max_tokens: Int = Field(60, gt=0)
    temperature: Float = Field(0.7, ge=0)  # 0: the likeliest token
    top_k: Int | None = Field(40, gt=0)


def write_samples(
    model: GPT, tokenizer: Tokenizer, samples: Samples, ranks: Ranks, before_token: Callable[[], None] = lambda: None
) -> list[dict[str, str]]:
    """[{prompt, text}], on every rank alike. The model is in evaluation mode. Collective.

    `before_token` is called as often on every rank, and may raise on all of them alike.
    """

    def agree(tokens: list[int]) -> list[int]:
        before_token()
        told: list[int] = ranks.tell(tokens) if ranks.size > 1 else tokens
        return told

    texts = [Text(tokenizer, samples.stop) for _ in samples.prompts]
    with torch.compiler.set_stance("force_eager"):  # every length would be compiled anew
        for _ in write_rows(model, tokenizer, samples.prompts, samples, texts, agree=agree):
            pass
    return [{"prompt": prompt, "text": text.text} for prompt, text in zip(samples.prompts, texts, strict=True)]
