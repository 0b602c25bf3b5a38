import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import ConfigError
from data_pipeline.tokenizer import (
    END_OF_TEXT,
    GivenGpt1Tokenizer,
    Tokenizer,
    choose_encoder,
    pieces,
    probes,
    train,
    train_gpt1,
)
from tests.data_pipeline.inputs import real, sentences

TEXTS = [sentences(i, 30) for i in range(40)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train(TEXTS, 400, path)
    return Tokenizer.load(path)


def test_the_vocabulary_ends_with_the_mark(trained: Tokenizer) -> None:
    assert trained.vocab_size == 400 and trained.end_of_text == 399
    assert trained.sha256 == hashlib.sha256(trained.path.read_bytes()).hexdigest()


def test_the_same_sample_gives_the_same_bytes_in_any_order(trained: Tokenizer, tmp_path: Path) -> None:
    train(reversed(TEXTS), 400, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == trained.path.read_bytes()
    train(TEXTS[:-1], 400, tmp_path / "other.json")
    assert (tmp_path / "other.json").read_bytes() != trained.path.read_bytes()


@given(st.text(max_size=100))
@settings(max_examples=300)
def test_what_is_encoded_decodes_to_itself(trained: Tokenizer, text: str) -> None:
    (ids,) = trained.encode_batch([text])
    assert trained.decode(ids) == text
    assert trained.end_of_text not in ids


def test_a_text_that_spells_the_mark_does_not_get_it(trained: Tokenizer) -> None:
    text = f"before {END_OF_TEXT} after{END_OF_TEXT}"
    (ids,) = trained.encode_batch([text])
    assert trained.end_of_text not in ids and trained.decode(ids) == text
    assert trained.decode([trained.end_of_text]) == END_OF_TEXT


@given(
    st.lists(
        st.sampled_from(["a", "B", "7", " ", "  ", "\n", "\t", "'s", "é", "中", "!", "?!", "😀", "\u00a0"]), max_size=60
    )
)
@settings(max_examples=300)
def test_pieces_never_change_the_ids(trained: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    cut = list(pieces(text, 4))
    assert "".join(cut) == text
    (whole,) = trained.encode_batch([text])
    assert np.concatenate([*trained.encode_batch(cut), np.zeros(0, np.uint32)]).tolist() == whole.tolist()


def test_long_texts_are_cut_and_come_out_whole(trained: Tokenizer) -> None:
    text = " ".join(TEXTS) * 3
    assert len(list(pieces(text))) > 5
    (ids,) = trained.encode_batch([text])
    assert trained.decode(ids) == text


def test_too_little_text_for_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        train(["hello world"], 4096, tmp_path / "tokenizer.json")
    assert str(error.value) == (
        "tokenizer.vocab_size: the sample gives only 266 entries, 4096 asked for; "
        "take a smaller vocabulary or more text"
    )
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="expected more than 257"):
        train(TEXTS, 256, tmp_path / "tokenizer.json")


def test_files_that_cannot_serve_are_refused_in_one_line(trained: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ConfigError) as error:
        Tokenizer.load(path)
    assert str(error.value) == f"{path}: no such tokenizer file"
    whole = trained.path.read_text()
    for damaged in (whole[: len(whole) // 2], "", "{}", "\x00\x01"):
        path.write_text(damaged)
        with pytest.raises(ConfigError) as error:
            Tokenizer.load(path)
        assert str(error.value).startswith(f"{path}: not a tokenizer.json, or damaged: ") and "\n" not in str(
            error.value
        )
    tree = json.loads(whole)
    path.write_text(json.dumps({**tree, "added_tokens": []}))
    with pytest.raises(ConfigError) as error:
        Tokenizer.load(path)
    assert str(error.value) == f"{path}: has no {END_OF_TEXT}, which ends each document; give a tokenizer that has it"
    path.write_text(json.dumps({**tree, "added_tokens": [{**tree["added_tokens"][0], "special": False}]}))
    with pytest.raises(ConfigError) as error:
        Tokenizer.load(path)
    assert str(error.value) == (
        f"{path}: encodes a text's own {END_OF_TEXT} as the mark; declare it as a special token"
    )


def test_gpt2s_own() -> None:
    tokenizer = Tokenizer.load(real("tokenizer/gpt2-tokenizer.json"))
    assert tokenizer.vocab_size == 50257 and tokenizer.end_of_text == 50256
    hello, mark = tokenizer.encode_batch(["Hello world", END_OF_TEXT])
    assert hello.tolist() == [15496, 995]
    assert 50256 not in mark


# --- the fast encoder -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fast(trained: Tokenizer) -> Tokenizer:
    pytest.importorskip("gigatoken", reason="gigatoken is not installed")
    tokenizer = Tokenizer.load(trained.path)
    line = choose_encoder(tokenizer)
    assert tokenizer.encoder == "gigatoken"
    assert re.fullmatch(r"gigatoken \S+, proved equal to tokenizers \S+ on [\d,]+ characters", line)
    return tokenizer


@given(st.lists(st.text(max_size=200), max_size=5))
@settings(max_examples=300)
def test_both_encoders_give_the_same_ids(fast: Tokenizer, texts: list[str]) -> None:
    assert fast.agrees(texts)


def test_both_encoders_give_gpt2s_ids_of_real_books(tmp_path: Path) -> None:
    pytest.importorskip("gigatoken", reason="gigatoken is not installed")
    tokenizer = Tokenizer.load(real("tokenizer/gpt2-tokenizer.json"))
    tokenizer.use("gigatoken")
    texts = [path.read_text(encoding="utf-8", errors="replace")[:200_000] for path in real("books").glob("*.txt")]
    assert len(texts) > 5 and tokenizer.agrees([*texts, *probes()])


def test_the_fast_encoder_does_not_see_the_mark_either(fast: Tokenizer) -> None:
    text = f"before {END_OF_TEXT} after"
    (ids,) = fast.encode_batch([text])
    assert fast.end_of_text not in ids and fast.decode(ids) == text


def test_a_file_that_gigatoken_does_not_know_is_encoded_by_tokenizers(trained: Tokenizer, tmp_path: Path) -> None:
    tree = json.loads(trained.path.read_text())
    tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}] * 2}
    (tmp_path / "other.json").write_text(json.dumps(tree))
    tokenizer = Tokenizer.load(tmp_path / "other.json")
    line = choose_encoder(tokenizer)
    assert tokenizer.encoder == "tokenizers" and line.startswith("tokenizers ")
    assert "gigatoken cannot read it" in line or "gigatoken gives other ids" in line


# --- GPT-1's kind -----------------------------------------------------------------------------------------------------

GPT1_TEXTS = [*TEXTS, 'Don\'t stop! "Why?" (she asked), naïve.', "IT'S 3 o'clock; we'll go.", *("é" * 3 for _ in "12")]


@pytest.fixture(scope="module")
def gpt1(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("gpt1") / "tokenizer.json"
    train_gpt1(GPT1_TEXTS, 300, 40, path)
    return Tokenizer.load(path)


def model_of(tokenizer: Tokenizer) -> dict[str, Any]:
    model: dict[str, Any] = json.loads(tokenizer.path.read_text())["model"]
    return model


def test_gpt1s_entries_are_symbols_merges_and_the_mark(gpt1: Tokenizer) -> None:
    model = model_of(gpt1)
    symbols = [entry for entry in model["vocab"] if len(entry.removesuffix("</w>")) == 1]
    assert model["vocab"]["<unk>"] == 0 and gpt1.vocab_size == 300 and gpt1.end_of_text == 299
    assert len(symbols) + 1 + len(model["merges"]) + 1 == 300
    assert sum(len(symbol) == 1 for symbol in symbols) <= 40


def test_gpt1s_bytes_are_the_same_in_any_order_and_process(gpt1: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "again.json"
    program = (
        "import sys; from pathlib import Path; from data_pipeline.tokenizer import train_gpt1\n"
        "from tests.data_pipeline.test_tokenizer import GPT1_TEXTS\n"
        "train_gpt1(reversed(GPT1_TEXTS), 300, 40, Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=True, cwd=Path(__file__).parents[2])
    assert path.read_bytes() == gpt1.path.read_bytes()


def test_gpt1_is_in_lower_case_and_reads_well(gpt1: Tokenizer) -> None:
    for text, read in [
        ("Don't  stop!", "don't stop!"),
        ("Why? (She asked),\nwe'll go.", "why? (she asked), we'll go."),
        ("naïve", "naive"),
        ("three 猫 go", "three <unk>go"),
    ]:
        (ids,) = gpt1.encode_batch([text])
        assert gpt1.decode(ids) == read
    (ids,) = gpt1.encode_batch([f"go{END_OF_TEXT}<unk>"])
    assert gpt1.end_of_text not in ids
    assert gpt1.decode([*gpt1.encode_batch(["go."])[0], gpt1.end_of_text]) == f"go. {END_OF_TEXT}"


def test_gpt1s_ids_are_those_of_transformers(gpt1: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    model = model_of(gpt1)
    theirs = transformers.OpenAIGPTTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    for text in [*GPT1_TEXTS, *(probe for probe in probes() if "<" not in probe)]:
        assert gpt1.encode_batch([text])[0].tolist() == theirs(text)["input_ids"]


def test_pieces_never_change_gpt1s_ids(gpt1: Tokenizer) -> None:
    assert gpt1._cut is not None
    for text in probes():
        cut = list(pieces(text, 4, gpt1._cut))
        whole = gpt1._backend.encode(text, add_special_tokens=False).ids
        assert [id for part in cut for id in gpt1._backend.encode(part, add_special_tokens=False).ids] == whole


def test_gpt1_is_encoded_by_the_library_since_gigatoken_cannot(gpt1: Tokenizer) -> None:
    assert choose_encoder(gpt1).startswith("tokenizers ")
    assert gpt1.encoder == "tokenizers"


def test_a_released_gpt1_vocabulary_gets_the_mark_as_its_last_id(gpt1: Tokenizer, tmp_path: Path) -> None:
    model = model_of(gpt1)
    (tmp_path / "encoder.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (tmp_path / "vocab.bpe").write_text("\n".join(lines) + "\n")
    given = GivenGpt1Tokenizer(vocabulary=tmp_path / "encoder.json", merges=tmp_path / "vocab.bpe")
    given.write(tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == gpt1.path.read_bytes()
    assert given.identity() == gpt1.sha256
    (tmp_path / "vocab.bpe").write_text("no merges\n")
    with pytest.raises(ConfigError, match=r"encoder\.json, .*vocab\.bpe: not the vocabulary and merges of a GPT-1: "):
        given.identity()


def test_what_is_wrong_with_a_gpt1_vocabulary_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        train_gpt1(GPT1_TEXTS, 82, 40, tmp_path / "tokenizer.json")
    assert str(error.value) == (
        "tokenizer.vocab_size: expected more than 82 (tokenizer.characters 40, each also as the end of a word, <unk> "
        "and <|endoftext|>), got 82"
    )
    with pytest.raises(ConfigError, match=r"^tokenizer\.vocab_size: the sample gives only \d+ entries, 5000 asked for"):
        train_gpt1(GPT1_TEXTS, 5000, 40, tmp_path / "tokenizer.json")
    assert not list(tmp_path.iterdir())
