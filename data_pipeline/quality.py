"""Rules of quality from published corpora: Gopher's, C4's, FineWeb's. Text -> why it is dropped, or None.

The verdicts are those of datatrove's filters, given the same words and sentences. Its own splitter for English (spaCy)
reads less than 1 MB/s, so words are found by one pattern here; tests compare verdicts with both. Words are those of
languages that put spaces between them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from configs import Bool, Float, Int, Section

Words = npt.NDArray[np.int64]

_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]+")  # a word, or a run of signs
_PARAGRAPHS = re.compile(r"\n{2,}")
_LINES = re.compile(r"\n+")
_SENTENCE_END = re.compile(r"[.!?…。！？]['\"”’)\]]*(?:\s+|\Z)")
_CITATION = re.compile(r"\[[0-9]*\]|\[edit\]|\[citation needed\]")
_C4_END = (".", "?", "!", '"', "'")
_TERMINAL = tuple(".?!。？！‼⁇⁈⁉…‽．｡।॥؟۔։።፧၊။។")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_TOP_NGRAMS = {2: 0.20, 3: 0.18, 4: 0.16}
_DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd: makes a hash of n words from one of n - 1


class Text:
    """A text with what several rules ask about it, each counted once."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        """Words and runs of signs, in order."""
        return _WORD.findall(self.text)

    @cached_property
    def counts(self) -> Counter[str]:
        """How often each word stands there, by first appearance."""
        return Counter(self.words)

    @cached_property
    def ids(self) -> Words:
        """Each word as its number by first appearance, shape (words,)."""
        numbers = {word: number for number, word in enumerate(self.counts)}
        return np.fromiter(map(numbers.__getitem__, self.words), np.int64, len(self.words))

    @cached_property
    def lengths(self) -> Words:
        """Characters of each word, shape (words,)."""
        return np.fromiter(map(len, self.words), np.int64, len(self.words))


class GopherQuality(Section):
    """Rae et al. 2021, "Scaling Language Models" (arXiv 2112.11446), section A1.1, "Quality filtering"."""

    min_words: Int = 50  # signs apart
    max_words: Int = 100_000
    min_word_length: Float = 3  # mean characters of a word
    max_word_length: Float = 10
    max_symbols: Float = 0.1  # hash signs per word, and ellipses per word
    max_bullet_lines: Float = 0.9  # share of lines that begin with a bullet
    max_ellipsis_lines: Float = 0.3  # share of lines that end with an ellipsis
    min_alphabetic_words: Float = 0.8  # share of words that have a letter
    signs_are_words: Bool = (
        True  # in that share, as in datatrove; false: lists and references weigh less against a text
    )
    min_stop_words: Int = 2  # different ones; 0 for other languages than the list's
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")

    def reason(self, text: Text) -> str | None:
        """Why a text is dropped, or None."""
        real = {word: n for word, n in text.counts.items() if word[-1].isalnum() or not _all_signs(word)}
        words = sum(real.values())
        if words < self.min_words:
            return "few words"
        if words > self.max_words:
            return "many words"
        mean = sum(len(word) * n for word, n in real.items()) / max(words, 1)
        if mean < self.min_word_length:
            return "short words"
        if mean > self.max_word_length:
            return "long words"
        return self._of_signs(text) or self._of_lines(text.text.splitlines()) or self._of_words(text, words)

    def _of_signs(self, text: Text) -> str | None:
        count = max(len(text.words), 1)
        if text.text.count("#") / count > self.max_symbols:
            return "hash signs"
        if (text.text.count("...") + text.text.count("…")) / count > self.max_symbols:
            return "ellipses"
        return None

    def _of_lines(self, lines: Sequence[str]) -> str | None:
        count = max(len(lines), 1)
        if sum(line.lstrip().startswith(("•", "-")) for line in lines) / count > self.max_bullet_lines:
            return "bullet lines"
        if sum(line.rstrip().endswith(("...", "…")) for line in lines) / count > self.max_ellipsis_lines:
            return "lines with ellipses"
        return None

    def _of_words(self, text: Text, words: int) -> str | None:
        lettered = sum(n for word, n in text.counts.items() if word.isalpha() or any(map(str.isalpha, word)))
        count = len(text.words) if self.signs_are_words else words
        if lettered / max(count, 1) < self.min_alphabetic_words:
            return "few words with letters"
        if sum(word in text.counts for word in set(self.stop_words)) < self.min_stop_words:
            return "few stop words"
        return None


class GopherRepetition(Section):
    """Rae et al. 2021 (arXiv 2112.11446), section A1.1, "Repetition removal", table A1: shares of a text."""

    max_duplicate_lines: Float = 0.3
    max_duplicate_paragraphs: Float = 0.3
    max_duplicate_line_chars: Float = 0.2
    max_duplicate_paragraph_chars: Float = 0.2
    max_top_ngram_chars: dict[Int, Float] = _TOP_NGRAMS  # n: share of the commonest n-gram
    max_duplicate_ngram_chars: dict[Int, Float] = _DUPLICATE_NGRAMS  # n: share of all repeated n-grams

    def reason(self, text: Text) -> str | None:
        """Why a text is dropped, or None."""
        size = max(len(text.text), 1)
        paragraphs = _PARAGRAPHS.split(text.text.strip())
        repeated, chars = duplicates(paragraphs)
        if repeated / len(paragraphs) > self.max_duplicate_paragraphs:
            return "duplicate paragraphs"
        if chars / size > self.max_duplicate_paragraph_chars:
            return "characters in duplicate paragraphs"
        lines = _LINES.split(text.text)
        repeated, chars = duplicates(lines)
        if repeated / len(lines) > self.max_duplicate_lines:
            return "duplicate lines"
        if chars / size > self.max_duplicate_line_chars:
            return "characters in duplicate lines"
        return self._of_ngrams(text, size)

    def _of_ngrams(self, text: Text, size: int) -> str | None:
        heaviest = max(((len(word) + 1) * n for word, n in text.counts.items()), default=0)
        for n, share in self.max_top_ngram_chars.items():
            if n * heaviest > share * size and top_ngram_chars(text, n) / size > share:
                return f"commonest {n}-gram"
        unrepeated = len(text.words) + 1  # n-grams of so many words do not repeat, so longer ones do not either
        for n, share in self.max_duplicate_ngram_chars.items():
            if n >= unrepeated:
                continue
            chars = duplicate_ngram_chars(text, n, int(share * size))
            if chars / size > share:
                return f"duplicate {n}-grams"
            if not chars:
                unrepeated = n
        return None


def duplicates(parts: Sequence[str]) -> tuple[int, int]:
    """How many of the parts stood there before, and their characters."""
    seen = set(parts)
    repeated = len(parts) - len(seen)
    return repeated, sum(map(len, parts)) - sum(map(len, seen)) if repeated else 0


def top_ngram_chars(text: Text, n: int) -> int:
    """Characters (spaces between words included) in the commonest n-gram times its count; the first of equals."""
    if len(text.words) < n:
        return 0
    _, first, counts = np.unique(_ngrams(text.ids, n), return_index=True, return_counts=True)
    at = int(first[counts == counts.max()].min())
    return int(text.lengths[at : at + n].sum() + n - 1) * int(counts.max())


def duplicate_ngram_chars(text: Text, n: int, enough: int) -> int:
    """Characters in n-grams that stood there before, none counted twice; a bound of it where that is not over `enough`.

    As Gopher counts it: from left to right, on a repeated n-gram past its end, else on by one word.
    """
    if len(text.words) < n:
        return 0
    grams = _ngrams(text.ids, n)
    repeated = np.ones(len(grams), np.bool_)
    repeated[np.unique(grams, return_index=True)[1]] = False
    starts = np.flatnonzero(repeated)
    steps = np.zeros(len(text.words) + 1, np.int64)
    steps[starts] += 1
    steps[starts + n] -= 1
    bound = int(text.lengths[np.cumsum(steps[:-1]) > 0].sum())  # what is counted lies in repeated n-grams
    return bound if bound <= enough else _walked(grams.tolist(), text.lengths, n)


def _walked(grams: Sequence[int], lengths: Words, n: int) -> int:
    ends = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    seen: set[int] = set()
    chars, at = 0, 0
    while at < len(grams):
        if grams[at] in seen:
            chars += ends[at + n] - ends[at]
            at += n
        else:
            seen.add(grams[at])
            at += 1
    return int(chars)


def _ngrams(ids: Words, n: int) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of each n words in a row, shape (words - n + 1,)."""
    each = (ids.astype(np.uint64) + np.uint64(1)) * _MIX
    each ^= each >> np.uint64(32)
    grams = each[: len(ids) - n + 1].copy()
    for i in range(1, n):
        grams *= _MIX
        grams += each[i : len(ids) - n + 1 + i]
        grams ^= grams >> np.uint64(29)
    return grams


class C4(Section):
    """Raffel et al. 2020, "Exploring the Limits of Transfer Learning" (arXiv 1910.10683), section 2.2.

    Drops lines and then, by what is left, documents. The list of bad words is not applied.
    """

    citations: Bool = True  # removes marks such as [1], [edit], [citation needed] from lines
    end_punctuation: Bool = True  # drops lines that do not end a sentence; FineWeb leaves this out
    min_line_words: Int = 3
    max_word_chars: Int = 1000  # drops lines with a longer word
    min_sentences: Int = 5
    lorem_ipsum: Bool = True  # drops the document
    curly_bracket: Bool = True  # drops the document
    javascript: Bool = True  # drops lines
    policy: Bool = True  # drops lines about cookies and terms of use

    def kept(self, text: str) -> tuple[str, str | None]:
        """The lines that are kept, and why the whole is dropped, or None."""
        lower = text.lower()
        javascript = self.javascript and "javascript" in lower
        policy = self.policy and any(phrase in lower for phrase in _POLICY)
        lorem_ipsum = self.lorem_ipsum and "lorem ipsum" in lower
        kept, sentences = [], 0
        for line in text.splitlines():
            line = line.strip()
            words = line.split()
            if len(line) > self.max_word_chars and any(len(word) > self.max_word_chars for word in words):
                continue
            if self.citations and "[" in line:
                line = _CITATION.sub("", line)
            if self.end_punctuation and (not line.endswith(_C4_END) or line.endswith("...")):
                continue
            if len(words) < self.min_line_words:
                continue
            if lorem_ipsum and "lorem ipsum" in line.lower():
                return text, "lorem ipsum"
            if javascript and "javascript" in line.lower():
                continue
            if self.curly_bracket and "{" in line:
                return text, "curly bracket"
            if policy and any(phrase in line.lower() for phrase in _POLICY):
                continue
            if sentences < self.min_sentences:
                sentences += sentences_of(line)
            kept.append(line)
        if sentences < self.min_sentences:
            return text, "few sentences"
        return "\n".join(kept).strip(), None


def sentences_of(line: str) -> int:
    """How many sentences a line has, the last perhaps without its end."""
    ends = [match.end() for match in _SENTENCE_END.finditer(line)]
    return len(ends) + (not ends or ends[-1] < len(line)) if line else 0


class FineWeb(Section):
    """Penedo et al. 2024, "The FineWeb Datasets" (arXiv 2406.17557), section 3.5: FineWeb's own rules."""

    min_punctuated_lines: Float = 0.12  # share of lines that end a sentence
    max_short_lines: Float = 0.67  # share of lines of at most `short_line` characters
    short_line: Int = 30
    max_duplicate_line_chars: Float = 0.01
    max_line_ends: Float = 0.3  # per word

    def reason(self, text: Text) -> str | None:
        """Why a text is dropped, or None."""
        lines = [line for line in text.text.split("\n") if line.strip()]
        if not lines:
            return "few words"
        if sum(line.endswith(_TERMINAL) for line in lines) / len(lines) < self.min_punctuated_lines:
            return "few lines end a sentence"
        if sum(len(line) <= self.short_line for line in lines) / len(lines) > self.max_short_lines:
            return "short lines"
        line_ends = text.text.count("\n")
        if duplicates(lines)[1] / (len(text.text) - line_ends) > self.max_duplicate_line_chars:
            return "characters in duplicate lines"
        if line_ends / max(len(text.words), 1) > self.max_line_ends:
            return "list"
        return None


def _all_signs(word: str) -> bool:
    return not any(map(str.isalnum, word))
