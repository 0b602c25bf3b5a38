from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from configs import ConfigError, build
from data_pipeline.tokenizer import Tokenizer
from pretrain.generate import Sampling, Text, keep_top_k, keep_top_p, sample, sample_rows
from pretrain.models.gpt import GPT, Gpt
from pretrain.models.weights import initialize
from pretrain.restore import Restored, open_run
from tests.pretrain.finished_run import finished, make_corpus

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


def test_what_all_agree_on_is_what_goes_on(model: GPT) -> None:
    """Another rank's tokens in the place of one's own, as where they are given out by rank 0."""
    others = list(sample(model, [3, 1, 4], GREEDY))
    theirs = iter(others)
    rows = sample_rows(model, [[3, 1, 4]], Sampling(max_tokens=40, seed=5), agree=lambda mine: [next(theirs)])
    assert [token for _, token in rows] == others


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


def test_a_row_that_is_not_finite_ends_nothing() -> None:
    """As an fp16 forward that overflows gives it, in the midst of a training run."""
    logits = torch.tensor([[0.0, 1.0, 2.0], [torch.nan, 1.0, 2.0], [0.0, torch.inf, 2.0]])
    for sampling in (Sampling(), Sampling(top_k=2, top_p=0.5), GREEDY):
        chosen = sampling.choose(logits, torch.Generator().manual_seed(1))
        assert chosen.shape == (3,) and 0 <= int(chosen.min()) <= int(chosen.max()) < 3


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


# --- several rows at once -------------------------------------------------------------------------------------------

SHAPES = {
    "gpt2": TINY,
    "gpt1": TINY.model_copy(update={"norm": "post"}),
    "gpt3": TINY.model_copy(update={"attention": ("dense", "banded"), "band": 5}),
}


def with_opinions(config: Gpt) -> GPT:
    model = config.build().eval()
    initialize(model, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model


@pytest.mark.parametrize("name", SHAPES)
def test_rows_of_any_lengths_draw_what_each_draws_alone(name: str) -> None:
    """Prompts from one token to more than the context, texts that run over the context, some that end early."""
    model = with_opinions(SHAPES[name])
    prompts = [[3], [7, 1, 4, 1, 5, 9, 2, 6], list(range(40)), [8, 2], [3]]
    sampling = Sampling(temperature=0.8, max_tokens=25, seed=4)

    def draw(end: int | None) -> list[list[int]]:
        seeds = [sampling.model_copy(update={"seed": 4 + row}) for row in range(len(prompts))]
        return [list(sample(model, prompt, seed, end=end)) for prompt, seed in zip(prompts, seeds, strict=True)]

    whole = draw(None)
    drawn = {token for text in whole for token in text}
    end = max(drawn, key=lambda token: len({[*text, token].index(token) for text in whole}))  # where they differ most
    alone = draw(end)
    together: list[list[int]] = [[] for _ in prompts]
    for row, token in sample_rows(model, prompts, sampling, end=end):
        together[row].append(token)
    assert together == alone
    assert len({len(text) for text in alone}) > 1 and alone[0] != alone[4]
    second = [token for _, token in sample_rows(model, prompts[3:4], sampling, end=end, first_row=3)]
    assert second == alone[3]  # whatever the batch it is in


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_what_is_remembered_gives_the_logits_of_the_whole(name: str) -> None:
    model = with_opinions(SHAPES[name])
    tokens = torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(2))
    whole, past = model(tokens), model.new_past()
    parts = [model(tokens[:, begin:end], past=past) for begin, end in ((0, 6), (6, 7), (7, 8), (8, 13), (13, 16))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=2e-5)


def test_a_row_ends_when_its_reader_has_enough(model: GPT) -> None:
    done: set[int] = set()
    seen = []
    for row, token in sample_rows(model, [[3], [3, 1]], GREEDY, done=done):
        seen.append((row, token))
        if row == 0 and len(seen) > 4:
            done.add(0)
    assert [row for row, _ in seen].count(0) == 4 and [row for row, _ in seen].count(1) == 40


# --- text -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "alpha")


@pytest.mark.parametrize(
    ("stop", "pieces", "stopped"),
    [((), "so Ünder wir — das", False), (("wir",), "so Ünder ", True), (("zz", "er w", "wir"), "so Ünd", True),
     (("das ist",), "so Ünder wir — das", False), (("— da",), "so Ünder wir ", True)],
)  # fmt: skip
def test_pieces_are_whole_characters_and_end_before_a_stop_string(
    stop: tuple[str, ...], pieces: str, stopped: bool, tokenizer: Tokenizer
) -> None:
    text, given = Text(tokenizer, stop), []
    for token in tokenizer.encode_batch(["so Ünder wir — das"])[0]:
        given.append(text.add(int(token)))
        if text.stopped:
            break
    given.append(text.rest())
    assert "".join(given) == text.text == pieces
    assert text.stopped == stopped
    assert not any("\ufffd" in piece for piece in given)


@pytest.fixture(scope="module")
def restored(tmp_path_factory: pytest.TempPathFactory) -> Restored:
    run, _ = finished(tmp_path_factory.mktemp("run"))
    return open_run(str(run.run_folder))


def test_many_texts_are_those_of_each_prompt(restored: Restored) -> None:
    sampling = Sampling(max_tokens=12, temperature=0.7)
    prompts = ["the river", "no", "", "and no boat came to its shore that day", "42"]
    found = [text.text for text in restored.write_texts(prompts, sampling, batch=2)]
    for number, prompt in enumerate(prompts):
        alone = restored.write(prompt, sampling.model_copy(update={"seed": number}))
        assert found[number] == "".join(alone)
    assert len(set(found)) == 5
    short = next(restored.write_texts(prompts, sampling.model_copy(update={"stop": (found[0][3:5],)})))
    assert short.stopped and short.text == found[0][: found[0].index(found[0][3:5])]


def test_the_tokens_are_those_of_the_full_forward(restored: Restored) -> None:
    (text,) = restored.write_texts(["the river was"], Sampling(temperature=0, max_tokens=20))
    row = [restored.tokenizer.end_of_text, *restored.tokenizer.encode_batch(["the river was"])[0].tolist()]
    for token in text.tokens:
        assert token == int(restored.model(torch.tensor([row]))[0, -1].argmax())
        row.append(token)


def test_a_checkpoint_that_is_not_there_is_one_line(restored: Restored, tmp_path: Path) -> None:
    folder = restored.run.run_folder
    with pytest.raises(ConfigError) as error:
        open_run(f"{folder}@7")
    assert str(error.value) == f"{folder}: no checkpoint of step 7; there are: 10"
    with pytest.raises(ConfigError, match=r"no run\.yaml: not a run folder$"):
        open_run(str(tmp_path))
