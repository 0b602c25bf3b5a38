from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch import Tensor

from configs import ConfigError, build
from pretrain.generate import Sampling, keep_top_k, keep_top_p, sample
from pretrain.models.gpt import GPT, Gpt
from pretrain.models.weights import initialize

TINY = Gpt(layers=2, width=32, heads=2, context=16, vocab_size=50)
GREEDY = Sampling(temperature=0, max_tokens=40)


@pytest.fixture(scope="module")
def model() -> GPT:
    model = TINY.build().eval()
    initialize(model, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # opinions strong enough that sampling shows them
    return model


def kept(logits: Tensor) -> list[list[bool]]:
    result: list[list[bool]] = logits.isfinite().tolist()
    return result


def test_greedy_takes_the_likeliest_of_the_full_forward(model: GPT) -> None:
    drawn = list(sample(model, [3, 1, 4], GREEDY))
    assert len(drawn) == 40
    row = [3, 1, 4, *drawn]
    for place in range(3, 17):  # up to a full context
        assert row[place] == int(model(torch.tensor([row[:place]]))[0, -1].argmax())
    assert row[17] == int(model(torch.tensor([row[9:17]]))[0, -1].argmax())  # then from the later half of it
    assert len(set(drawn)) > 3


def test_a_prompt_longer_than_the_context_is_seen_by_its_end(model: GPT) -> None:
    prompt = [i % 50 for i in range(40)]
    assert list(sample(model, prompt, GREEDY)) == list(sample(model, prompt[-16:], GREEDY))


def test_a_seed_draws_the_same_tokens(model: GPT) -> None:
    def draw(seed: int) -> list[int]:
        return list(sample(model, [3], Sampling(seed=seed, max_tokens=30)))

    torch.manual_seed(1)
    first = draw(7)
    torch.manual_seed(2)
    assert draw(7) == first
    assert draw(8) != first


def test_tokens_are_drawn_by_their_probability() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2, 0.0]).log().expand(20_000, 4)
    generator = torch.Generator().manual_seed(1)
    counts = Sampling().choose(logits, generator).bincount(minlength=4) / 20_000
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.3, 0.2, 0.0]), rtol=0, atol=0.015)
    colder = Sampling(temperature=0.5).choose(logits, generator).bincount(minlength=4) / 20_000
    torch.testing.assert_close(colder, torch.tensor([25, 9, 4, 0]) / 38, rtol=0, atol=0.015)


def test_top_k_keeps_the_likeliest() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    assert kept(keep_top_k(logits, 2)) == [[False, True, True, False], [False, False, True, True]]
    assert keep_top_k(logits, 9) is logits


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([[0.2, 0.5, 0.3], [0.96, 0.03, 0.01]]).log()
    assert kept(keep_top_p(logits, 0.75)) == [[False, True, True], [True, False, False]]
    assert kept(keep_top_p(logits, 0.01)) == [[False, True, False], [True, False, False]]
    assert kept(keep_top_p(logits, 0.9)) == [[True, True, True], [True, False, False]]


def test_one_token_left_to_choose_from_is_greedy(model: GPT) -> None:
    greedy = list(sample(model, [3], GREEDY))
    assert list(sample(model, [3], Sampling(top_k=1, max_tokens=40))) == greedy
    assert list(sample(model, [3], Sampling(top_p=1e-6, max_tokens=40))) == greedy


def test_it_stops_before_the_end_mark(model: GPT) -> None:
    drawn = list(sample(model, [3, 1, 4], GREEDY))
    end = drawn[5]
    assert list(sample(model, [3, 1, 4], GREEDY, end=end)) == drawn[: drawn.index(end)]


def test_it_streams_and_leaves_gradients_on(model: GPT) -> None:
    stream = sample(model, [3], GREEDY)
    first = list(islice(stream, 2))
    assert torch.is_grad_enabled()
    assert first + list(stream) == list(sample(model, [3], GREEDY))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -1.0, "temperature: input should be greater than or equal to 0, got -1.0"),
        ("top_k", 0, "top_k: input should be greater than 0, got 0"),
        ("top_p", 1.5, "top_p: input should be less than or equal to 1, got 1.5"),
    ],
)
def test_impossible_settings_are_refused(field: str, value: float, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(Sampling, {field: value}, "generate")
    assert str(error.value) == f"generate: {message}"
