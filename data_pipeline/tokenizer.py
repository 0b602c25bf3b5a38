"""The tokenizer: a byte-level BPE as GPT-2's, trained here or given as a `tokenizer.json`. The only importer of it.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from configs import ConfigError, Int, Section

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
PIECE_CHARS = 4000  # texts are encoded in pieces: faster, and the encoder keeps over 100 bytes for every token


class TrainTokenizer(Section):
    """A new vocabulary, trained on a seeded sample of the corpora."""

    kind: Literal["train"] = "train"
    vocab_size: Int  # entries: 256 bytes, the merges, and <|endoftext|> as the last id
    sample_bytes: Int = 2**30  # of text, shared by the corpora as their sizes are
    seed: Int = 0


class GivenTokenizer(Section):
    """A ready `tokenizer.json` with an <|endoftext|>."""

    kind: Literal["file"] = "file"
    path: Path


TokenizerChoice = Annotated[TrainTokenizer | GivenTokenizer, Field(discriminator="kind")]


def train(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE with GPT-2's pre-tokenization and write it as `path`, whole or not at all.

    The same texts, in whatever order, give the same bytes. Raises ConfigError when the texts are too few for the size.
    """
    import tokenizers

    if not 257 < vocab_size <= 2**24:
        raise ConfigError(
            f"tokenizer.vocab_size: expected more than 257 (256 bytes and <|endoftext|>), got {vocab_size}"
        )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    tokenizer.add_special_tokens([END_OF_TEXT])
    got = tokenizer.get_vocab_size()
    if got != vocab_size:
        raise ConfigError(
            f"tokenizer.vocab_size: the sample gives only {got} entries, {vocab_size} asked for; "
            "take a smaller vocabulary or more text"
        )
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    tokenizer.save(str(temporary))
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


class Tokenizer:
    """A loaded `tokenizer.json`. Encoding never makes the document mark out of a text that spells it."""

    def __init__(self, path: Path, backend: tokenizers.Tokenizer, end_of_text: int, sha256: str) -> None:
        self.path, self.sha256 = path, sha256  # sha256 (hex) of the file
        self.end_of_text = end_of_text
        self._backend = backend

    @staticmethod
    def load(path: Path) -> Tokenizer:
        """Read a `tokenizer.json`. Raises ConfigError where it is missing, damaged or cannot serve."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # parallel by processes; threads and fork do not mix
        import tokenizers

        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such tokenizer file") from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
        try:
            backend = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{path}: not a tokenizer.json, or damaged: {_one_line(error)}") from None
        end_of_text = backend.token_to_id(END_OF_TEXT)
        if end_of_text is None:
            raise ConfigError(f"{path}: has no {END_OF_TEXT}, which ends each document; give a tokenizer that has it")
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # so a text's own <|endoftext|> is text
        tokenizer = Tokenizer(path, backend, end_of_text, hashlib.sha256(data).hexdigest())
        if end_of_text in tokenizer.encode_batch([f"a{END_OF_TEXT}b"])[0]:
            raise ConfigError(f"{path}: encodes a text's own {END_OF_TEXT} as the mark; declare it as a special token")
        return tokenizer

    @cached_property
    def vocab_size(self) -> int:
        """Ids are below this."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """The ids of each text, shape (n,), without marks at either end."""
        parts = [list(pieces(text)) if self._cuts_at_spaces else [text] for text in texts]
        flat = [part for several in parts for part in several]
        encoded = iter(self._backend.encode_batch_fast(flat, add_special_tokens=False))
        return [
            np.concatenate([np.array(next(encoded).ids, np.uint32) for _ in several] or [np.zeros(0, np.uint32)])
            for several in parts
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; the document mark stands as <|endoftext|>."""
        return str(self._backend.decode([int(id) for id in ids], skip_special_tokens=False))

    @cached_property
    def _cuts_at_spaces(self) -> bool:
        """Whether no token spans the place between a character and a space after it, as under GPT-2's pattern."""
        made: dict[str, Any] = json.loads(self._backend.to_str())
        pre = made.get("pre_tokenizer") or {}
        plain = pre.get("type") == "ByteLevel" and pre.get("use_regex", True) and not pre.get("add_prefix_space", True)
        return bool(plain and made.get("normalizer") is None and self._backend.encode("a b", add_special_tokens=False))


_CUT = re.compile(r"(?<=\S)(?=\s)")


def pieces(text: str, size: int = PIECE_CHARS) -> Iterator[str]:
    """A text in pieces of about `size` characters, cut before white space, where GPT-2's pattern always cuts."""
    begun = 0
    while len(text) - begun > size:
        cut = _CUT.search(text, begun + size)
        if cut is None:
            break
        yield text[begun : cut.start()]
        begun = cut.start()
    yield text[begun:]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
