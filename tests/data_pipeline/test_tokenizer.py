import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import ConfigError
from data_pipeline.tokenizer import END_OF_TEXT, Tokenizer, choose_encoder, pieces, probes, train
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
