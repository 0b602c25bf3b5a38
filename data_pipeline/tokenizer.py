"""The tokenizer: a BPE as GPT-2's or GPT-1's, trained here or given. The only importer of it.

GPT-2's merges bytes, so any text comes back as it was: Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners", section 2.2. GPT-1's merges the characters of words in lower case, the last one marked as the end: Radford
et al. 2018, "Improving Language Understanding by Generative Pre-Training", section 4.1, after Sennrich et al. 2016.

Two encoders read the same file: `tokenizers`, whose ids are the right ones by definition, and gigatoken, about forty
times as fast. gigatoken is used where its ids were proved equal: on `probes()` when a corpus is planned, and while
slices are made on a sample of every shard's own text.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from configs import ConfigError, Int, Section
from data_pipeline.shards import write_durably

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
END_OF_WORD, UNKNOWN = "</w>", "<unk>"  # of GPT-1
Encoder = Literal["gigatoken", "tokenizers"]
Ids = npt.NDArray[np.uint32]
PIECE_CHARS = 4000  # texts are encoded in pieces: faster, and the encoder keeps over 100 bytes for every token


class TrainTokenizer(Section):
    """A new vocabulary, trained on a seeded sample of the corpora."""

    kind: Literal["train"] = "train"
    vocab_size: Int  # entries: 256 bytes, the merges, and <|endoftext|> as the last id
    sample_bytes: Int = 2**30  # of text, shared by the corpora as their sizes are
    seed: Int = 0

    def train(self, texts: Iterable[str], path: Path) -> None:
        """Write the vocabulary of `texts` as `path`. Raises ConfigError."""
        train(texts, self.vocab_size, path)


class TrainGpt1Tokenizer(Section):
    """A new vocabulary of GPT-1's kind, trained on a seeded sample of the corpora."""

    kind: Literal["train_gpt1"] = "train_gpt1"
    vocab_size: Int = 40_479  # entries: <unk>, the characters, each also as the end of a word, merges, <|endoftext|>
    characters: Int = 238  # the most frequent ones, others are <unk>; 2 x 238, <unk> and one more are the paper's 478
    sample_bytes: Int = 2**30
    seed: Int = 0

    def train(self, texts: Iterable[str], path: Path) -> None:
        """Write the vocabulary of `texts` as `path`. Raises ConfigError."""
        train_gpt1(texts, self.vocab_size, self.characters, path)


class GivenTokenizer(Section):
    """A ready `tokenizer.json` with an <|endoftext|>."""

    kind: Literal["file"] = "file"
    path: Path

    def identity(self) -> str:
        """The sha256 (hex) of what was given. Raises ConfigError where it cannot serve."""
        return Tokenizer.load(self.path).sha256

    def write(self, path: Path) -> None:
        """Write it as `path`."""
        write_durably(path, self.path.read_bytes())


class GivenGpt1Tokenizer(Section):
    """GPT-1's vocabulary as it was released: its entries and its merges. <|endoftext|> becomes the last id."""

    kind: Literal["gpt1_files"] = "gpt1_files"
    vocabulary: Path  # encoder_bpe_40000.json, elsewhere vocab.json: {entry: id}
    merges: Path  # vocab_40000.bpe, elsewhere merges.txt: two entries a line

    def identity(self) -> str:
        """The sha256 (hex) of what was given. Raises ConfigError where it cannot serve."""
        return hashlib.sha256(self._canonical()).hexdigest()

    def write(self, path: Path) -> None:
        """Write it as a `tokenizer.json`."""
        write_durably(path, self._canonical())

    def _canonical(self) -> bytes:
        import tokenizers

        try:
            read = tokenizers.models.BPE.read_file(str(self.vocabulary), str(self.merges))
            return _gpt1(*read).to_str(pretty=True).encode()
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(
                f"{self.vocabulary}, {self.merges}: not the vocabulary and merges of a GPT-1: {_one_line(error)}"
            ) from None


TokenizerChoice = Annotated[
    TrainTokenizer | TrainGpt1Tokenizer | GivenTokenizer | GivenGpt1Tokenizer, Field(discriminator="kind")
]
Given = GivenTokenizer | GivenGpt1Tokenizer


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
    _write(tokenizer, vocab_size, path)


def train_gpt1(texts: Iterable[str], vocab_size: int, characters: int, path: Path) -> None:
    """Train a BPE of GPT-1's kind and write it as `path`, whole or not at all.

    The same texts, in whatever order, give the same bytes: words are counted first, since the library numbers the ends
    of words in the order of a hash table, and equally frequent merges follow those numbers. Words with a character that
    is not among the most frequent have no part in it. Raises ConfigError when the texts are too few for the size.
    """
    import tokenizers

    if not 2 * characters + 2 < vocab_size <= 2**24 or characters < 1:
        raise ConfigError(
            f"tokenizer.vocab_size: expected more than {2 * characters + 2} (tokenizer.characters {characters}, each "
            f"also as the end of a word, {UNKNOWN} and {END_OF_TEXT}), got {vocab_size}"
        )
    words = _gpt1_words(texts)
    seen: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            seen[character] += count
    kept = sorted(sorted(seen, key=lambda character: (-seen[character], character))[:characters])
    known = {word: count for word, count in words.items() if set(word) <= set(kept)}
    ends = sorted({word[-1] for word in known})
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[UNKNOWN, *kept, *(character + END_OF_WORD for character in ends)],
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_repeated(known), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [(left, right) for left, right in model["merges"]]
    _write(_gpt1(tokenizer.get_vocab(with_added_tokens=True), merges), vocab_size, path)


def _gpt1_words(texts: Iterable[str]) -> Counter[str]:
    """How often each word stands in the texts, in lower case, a sign of punctuation being a word."""
    words: Counter[str] = Counter()
    empty = _gpt1({UNKNOWN: 0}, [])
    for text in texts:
        for piece in pieces(text, cut=_CUT_AT_BLANKS):
            normal = empty.normalizer.normalize_str(piece)
            words.update(word for word, _ in empty.pre_tokenizer.pre_tokenize_str(normal))
    return words


def _repeated(words: dict[str, int]) -> Iterator[str]:
    """Texts that hold each word as often as was counted: the library takes no counts."""
    for word, count in sorted(words.items()):
        for begin in range(0, count, 1000):
            yield f"{word} " * min(1000, count - begin)


def _gpt1(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """GPT-1's tokenizer, with <|endoftext|> as the last id.

    The paper cleans with ftfy and takes spaCy's words; here cleaning is the preparation's (`clean`), and words are
    BERT's, as in transformers where those two are missing: accents and control characters fall away, and each sign of
    punctuation is a word. So decoding gives readable text, not the text that was.
    """
    import tokenizers
    from tokenizers import Regex, decoders

    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, merges, unk_token=UNKNOWN, end_of_word_suffix=END_OF_WORD)
    )
    made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.Sequence(
        [
            decoders.BPEDecoder(suffix=END_OF_WORD),
            decoders.Fuse(),
            decoders.Replace(Regex(r" (?=[.,!?;:%)\]}])"), ""),
            decoders.Replace(Regex(r"(?<=[(\[{]) "), ""),
            decoders.Replace(Regex(r" ['’] (?=(s|t|m|d|re|ve|ll)\b)"), "'"),
        ]
    )
    made.add_special_tokens([END_OF_TEXT])
    return made


def _write(tokenizer: tokenizers.Tokenizer, vocab_size: int, path: Path) -> None:
    got = tokenizer.get_vocab_size()
    if got != vocab_size:
        raise ConfigError(
            f"tokenizer.vocab_size: the sample gives only {got} entries, {vocab_size} asked for; "
            "take a smaller vocabulary or more text"
        )
    write_durably(path, tokenizer.to_str(pretty=True).encode())


class Tokenizer:
    """A loaded `tokenizer.json`. Encoding never makes the document mark out of a text that spells it."""

    def __init__(self, path: Path, data: bytes, backend: tokenizers.Tokenizer, end_of_text: int) -> None:
        self.path, self.data, self.sha256 = path, data, hashlib.sha256(data).hexdigest()  # of the file
        self.end_of_text = end_of_text
        self._backend = backend
        self._fast: Any = None  # gigatoken's backend, once `use` has asked for it

    @staticmethod
    def load(path: Path) -> Tokenizer:
        """Read a `tokenizer.json`. Raises ConfigError where it is missing, damaged or cannot serve."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such tokenizer file") from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
        return Tokenizer.read(data, path)

    @staticmethod
    def read(data: bytes, path: Path | str) -> Tokenizer:
        """The same of what such a file holds; `path` is where it lies. Raises ConfigError."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # parallel by processes; threads and fork do not mix
        import tokenizers

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
        tokenizer = Tokenizer(Path(path), data, backend, end_of_text)
        if end_of_text in tokenizer.encode_batch([f"a{END_OF_TEXT}b"])[0]:
            raise ConfigError(f"{path}: encodes a text's own {END_OF_TEXT} as the mark; declare it as a special token")
        return tokenizer

    @cached_property
    def vocab_size(self) -> int:
        """Ids are below this."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def encoder(self) -> Encoder:
        """What `encode_batch` encodes with."""
        return "tokenizers" if self._fast is None else "gigatoken"

    def use(self, encoder: Encoder) -> None:
        """Encode with `encoder` from now on. Raises ConfigError where gigatoken is missing or cannot read the file."""
        self._fast = None if encoder == "tokenizers" else _gigatoken(self._backend.to_str(), self.path)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, shape (n,), without marks at either end."""
        if self._fast is None:
            return self.canonical_batch(texts)
        encoded = self._fast.encode_batch(list(texts), parallel=False).layout
        ends, ids = np.asarray(encoded.offsets.data).tolist(), np.asarray(encoded.content.data)
        return [ids[begin:end] for begin, end in itertools.pairwise(ends)]

    def canonical_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text as `tokenizers` gives them."""
        cut = self._cut
        parts = [[text] if cut is None else list(pieces(text, cut=cut)) for text in texts]
        flat = [part for several in parts for part in several]
        encoded = iter(self._backend.encode_batch_fast(flat, add_special_tokens=False))
        return [
            np.concatenate([np.array(next(encoded).ids, np.uint32) for _ in several] or [np.zeros(0, np.uint32)])
            for several in parts
        ]

    def agrees(self, texts: Sequence[str]) -> bool:
        """Whether the encoder in use gives the ids of `tokenizers`."""
        both = zip(self.encode_batch(texts), self.canonical_batch(texts), strict=True)
        return self._fast is None or all(np.array_equal(ours, right) for ours, right in both)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; the document mark stands as <|endoftext|>."""
        return str(self._backend.decode([int(id) for id in ids], skip_special_tokens=False))

    @cached_property
    def token_bytes(self) -> list[bytes] | None:
        """The bytes that each id stands for, an added token for those of its text. None where ids are not bytes."""
        made: dict[str, Any] = json.loads(self._backend.to_str())
        if (made.get("decoder") or {}).get("type") != "ByteLevel":
            return None
        added = {token["id"]: token["content"] for token in made.get("added_tokens", [])}
        byte_of, found = _byte_level(), [b""] * self.vocab_size
        for token, id in self._backend.get_vocab(with_added_tokens=True).items():
            found[id] = added[id].encode() if id in added else bytes(byte_of[character] for character in token)
        return found

    @cached_property
    def _cut(self) -> re.Pattern[str] | None:
        """Where a text may be cut without changing its ids: GPT-2's and GPT-1's tokens span no blank after a
        character. None where that is not known."""
        made: dict[str, Any] = json.loads(self._backend.to_str())
        pre, normalizer = made.get("pre_tokenizer") or {}, made.get("normalizer")
        if not self._backend.encode("a b", add_special_tokens=False):
            return None
        if pre.get("type") == "BertPreTokenizer" and (normalizer or {}).get("type") == "BertNormalizer":
            return _CUT_AT_BLANKS
        plain = pre.get("type") == "ByteLevel" and pre.get("use_regex", True) and not pre.get("add_prefix_space", True)
        return _CUT if plain and normalizer is None else None


def _gigatoken(canonical: str, path: Path) -> Any:
    """gigatoken's backend. It takes marks in a text for marks whatever it is told, so it is told of none."""
    try:
        import gigatoken
    except ImportError:
        raise ConfigError("gigatoken is not installed (pip install gigatoken)") from None
    try:
        return gigatoken.Tokenizer.from_json(json.dumps({**json.loads(canonical), "added_tokens": []})).backend
    except Exception as error:  # what it cannot read it refuses with several kinds
        raise ConfigError(f"{path}: gigatoken cannot read it ({_one_line(error)})") from None


def choose_encoder(tokenizer: Tokenizer) -> str:
    """Make `tokenizer` use the fastest encoder whose ids are right. Gives a line that says which, and why."""
    texts, canonical = probes(), f"tokenizers {importlib.metadata.version('tokenizers')}"
    try:
        tokenizer.use("gigatoken")
    except ConfigError as error:
        return f"{canonical}: {error}"
    size = f"{sum(map(len, texts)):,} characters"
    if tokenizer.agrees(texts):
        return f"gigatoken {importlib.metadata.version('gigatoken')}, proved equal to {canonical} on {size}"
    tokenizer.use("tokenizers")
    return f"{canonical}: gigatoken gives other ids on {size} of hard text"


def probes() -> list[str]:
    """Texts on which encoders have differed or may: every kind of space, rare characters, contractions, marks."""
    draw = random.Random(0)
    spaces = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\u2028", "\x0b", "\x85", "\u200b", "\ufeff"]
    words = [
        "it's",
        "IT'S",
        "we'll",
        "’re",
        "'",
        "naïve",
        "e\u0301",
        "ß",
        "İ",
        "中文",
        "हिन्दी",
        "한국어",
        "👩\u200d🚀",
        "1234",
        "²",
        "½",
        "3.14",
    ]
    words += [END_OF_TEXT, "<|", "!!!", "...", "a", "_", "\x00", "\ufffd", "http://x.y/?z=1#w", "x" * 300, "=" * 90]
    mixed = ["".join(draw.choice(draw.choice([spaces, words])) for _ in range(60)) for _ in range(300)]
    planes = [range(0x20, 0x3000), range(0x3000, 0xD800), range(0xE000, 0x30000)]
    rare = ["".join(chr(draw.choice(draw.choice(planes))) for _ in range(60)) for _ in range(300)]
    return ["", " ", "\n", *spaces, *words, *mixed, *rare]


def _byte_level() -> dict[str, int]:
    """Which byte each character of a byte-level token stands for: itself where it can be seen, else one above 255."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(unseen)}


_CUT = re.compile(r"(?<=\S)(?=\s)")
_CUT_AT_BLANKS = re.compile(r"(?<=\S)(?=[ \n])")  # rarer spaces are control characters to BERT, and fall away


def pieces(text: str, size: int = PIECE_CHARS, cut: re.Pattern[str] = _CUT) -> Iterator[str]:
    """A text in pieces of about `size` characters, cut before white space, where GPT-2's pattern always cuts."""
    begun = 0
    while len(text) - begun > size:
        place = cut.search(text, begun + size)
        if place is None:
            break
        yield text[begun : place.start()]
        begun = place.start()
    yield text[begun:]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
