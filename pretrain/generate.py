"""Text from a model, token by token: pure functions of the model, the prompt and a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from configs import Float, Int, Section
from data_pipeline.tokenizer import Tokenizer
from pretrain.models.attention import Past
from pretrain.models.gpt import GPT


class Sampling(Section):
    """How the next token is drawn. Temperature 0 takes the likeliest; top_k and top_p cut the unlikely ones off.

    A text ends before the first of the `stop` strings in it.
    """

    max_tokens: Int = Field(200, gt=0)
    temperature: Float = Field(1.0, ge=0)
    top_k: Int | None = Field(None, gt=0)
    top_p: Float | None = Field(None, gt=0, le=1)
    seed: Int = Field(0, ge=0)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()

    def choose(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """The next tokens int64[B], from logits [B, V]; drawn on the CPU, so a seed means the same on every device."""
        logits = logits.detach().float().cpu()
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        likeliest = logits.argmax(dim=-1)
        shares = keep_top_p(keep_top_k(logits / self.temperature, self.top_k), self.top_p).softmax(dim=-1)
        sound = shares.isfinite().all(dim=-1)  # not where fp16 has overflowed
        drawn = torch.multinomial(shares.where(sound[:, None], 1.0), 1, generator=generator).squeeze(-1)
        return drawn.where(sound, likeliest)


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
    return (token for _, token in sample_rows(model, [prompt], sampling, end))


def sample_rows(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    end: int | None = None,
    done: set[int] | None = None,
    first_row: int = 0,
    agree: Callable[[list[int]], list[int]] = lambda tokens: tokens,
) -> Iterator[tuple[int, int]]:
    """`sample` for several prompts at once: (row, token) as they are drawn. A row that is put into `done` ends.

    All rows are equally long at every step: the shortest prompt is read at once, and what the others have beyond it is
    taken from them instead of drawn. So nothing is padded or masked, and the logits are those of each row alone. Row i
    is drawn with seed + first_row + i, so what it draws does not depend on the rows beside it. `agree` is called once a
    step with the tokens that were drawn, and gives those that count: several ranks that share a model go on alike.
    """
    assert all(prompts), "a prompt has at least one token; a text begins with <|endoftext|>"
    context, done = model.config.context, set() if done is None else done
    given = [list(prompt[-context:]) for prompt in prompts]
    generators = [torch.Generator().manual_seed(sampling.seed + first_row + row) for row in range(len(given))]
    left = [sampling.max_tokens] * len(given)
    place = min(map(len, given), default=0)  # how many tokens each row has had
    seen, past = [prompt[:place] for prompt in given], model.new_past()
    unread = seen
    while len(done) < len(given):
        logits = _last_logits(model, unread, past)
        unread = [prompt[place : place + 1] for prompt in given]
        drawing = [row for row in range(len(given)) if not unread[row] and row not in done]
        drawn = agree([int(sampling.choose(logits[row : row + 1], generators[row])) for row in drawing])
        unread = [tokens or [0] for tokens in unread]  # a row that is done goes on with the others, and nobody looks
        for row, token in zip(drawing, drawn, strict=True):
            left[row] -= 1
            if token == end or not left[row]:
                done.add(row)
            if token != end:
                unread[row] = [token]
                yield row, token
        seen, place = [had + new for had, new in zip(seen, unread, strict=True)], place + 1
        if len(seen[0]) > context:
            seen, past = [had[-max(context // 2, 1) :] for had in seen], model.new_past()
            unread = seen


@torch.no_grad()
def _last_logits(model: GPT, rows: list[list[int]], past: list[Past]) -> Tensor:
    """Logits [B, V] after the last of the tokens of each row."""
    device = next(model.parameters()).device
    logits: Tensor = model(torch.tensor(rows, device=device), past=past)
    return logits[:, -1]


class Text:
    """What the tokens of a row spell: given out in whole characters, and ended before the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self.tokens: list[int] = []
        self.text = ""  # given out
        self.stopped = False  # by a stop string

    def add(self, token: int) -> str:
        """The text that is certain now and was not before: not the half of a character, or of a stop string."""
        self.tokens.append(token)
        text = self._tokenizer.decode(self.tokens)
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._give(text[: min(found)])
        if text.endswith("\ufffd"):  # a character is whole only when all its bytes are there
            return ""
        return self._give(text[: len(text) - max((_begun(text, stop) for stop in self._stop), default=0)])

    def rest(self) -> str:
        """What was held back, when no token follows."""
        return "" if self.stopped else self._give(self._tokenizer.decode(self.tokens))

    def _give(self, text: str) -> str:
        piece, self.text = text[len(self.text) :], text
        return piece


def write_rows(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    texts: Sequence[Text],
    first_row: int = 0,
    agree: Callable[[list[int]], list[int]] = lambda tokens: tokens,
) -> Iterator[str]:
    """The pieces of what follows each prompt, as they come; `texts`, one for each, have them apart."""
    end, done = tokenizer.end_of_text, set[int]()
    rows = [[end, *ids.tolist()] for ids in tokenizer.encode_batch(prompts)]
    for row, token in sample_rows(model, rows, sampling, end, done, first_row, agree):
        yield texts[row].add(token)
        if texts[row].stopped:
            done.add(row)
    yield from (text.rest() for text in texts)


def _begun(text: str, stop: str) -> int:
    """How many characters of a stop string the text ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
