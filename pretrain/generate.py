"""Text from a model, token by token: pure functions of the model, the prompt and a seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from pydantic import Field
from torch import Tensor

from configs import Float, Int, Section
from pretrain.models.attention import Past
from pretrain.models.gpt import GPT


class Sampling(Section):
    """How the next token is drawn. Temperature 0 takes the likeliest; top_k and top_p cut the unlikely ones off."""

    max_tokens: Int = Field(200, gt=0)
    temperature: Float = Field(1.0, ge=0)
    top_k: Int | None = Field(None, gt=0)
    top_p: Float | None = Field(None, gt=0, le=1)
    seed: Int = Field(0, ge=0)

    def choose(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """The next tokens int64[B], from logits [B, V]; drawn on the CPU, so a seed means the same on every device."""
        logits = logits.detach().float().cpu()
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        logits = keep_top_p(keep_top_k(logits / self.temperature, self.top_k), self.top_p)
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(-1)


def keep_top_k(logits: Tensor, top_k: int | None) -> Tensor:
    """-inf for all but the k highest logits of each row (and any equal to the last of them)."""
    if top_k is None or top_k >= logits.size(-1):
        return logits
    least = logits.topk(top_k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Tensor, top_p: float | None) -> Tensor:
    """-inf for all but the likeliest tokens that together reach probability p (Holtzman et al. 2020, nucleus)."""
    if top_p is None:
        return logits
    ordered, places = logits.sort(dim=-1, descending=True)
    likelihood = ordered.softmax(dim=-1)
    before = likelihood.cumsum(dim=-1) - likelihood  # of all likelier tokens; 0 for the first, which always stays
    return logits.masked_fill((before >= top_p).gather(-1, places.argsort(dim=-1)), -torch.inf)


def sample(model: GPT, prompt: Sequence[int], sampling: Sampling, end: int | None = None) -> Iterator[int]:
    """The tokens that follow a prompt of at least one, as they are drawn; stops after `end`, which is not given out.

    The model is in evaluation mode. It sees at most its context: when that is full, the later half of it is read again
    and goes on.
    """
    assert prompt, "a prompt has at least one token; a text begins with <|endoftext|>"
    context = model.config.context
    generator = torch.Generator().manual_seed(sampling.seed)
    seen, past = list(prompt[-context:]), model.new_past()
    unread = seen
    for _ in range(sampling.max_tokens):
        token = int(sampling.choose(_last_logits(model, unread, past), generator))
        if token == end:
            return
        yield token
        seen, unread = [*seen, token], [token]
        if len(seen) > context:
            seen, past = seen[-max(context // 2, 1) :], model.new_past()
            unread = seen


@torch.no_grad()
def _last_logits(model: GPT, tokens: list[int], past: list[Past]) -> Tensor:
    """Logits [1, V] after the last of the tokens."""
    device = next(model.parameters()).device
    logits: Tensor = model(torch.tensor([tokens], device=device), past=past)
    return logits[:, -1]
