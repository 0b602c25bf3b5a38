"""A classifier of quality decides what is kept: Brown et al. 2020, "Language Models are Few-Shot Learners", appendix A.

Logistic regression over hashed words, good texts against raw ones; a document is kept where a draw from a Pareto
distribution is greater than 1 - its score, so that some of the worse are kept too. The door of scikit-learn.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import field_validator

from configs import ConfigError, Int, Section
from data_pipeline.document import Document
from data_pipeline.sources import Source
from data_pipeline.sources.inputs import Part, Reading
from data_pipeline.sources.token_files import TokenFiles

Words = npt.NDArray[np.int64]

WEAK = 1000.0  # regularization: next to none, as Spark's default; the Pareto rule needs scores near 0 and 1
SEED_MASK = 2**64 - 1


class QualityClassifier(Section):
    """What the classifier learns from, and how it is applied (the paper's numbers; where it gives none, ours)."""

    corpora: list[str]  # whose documents it judges; the paper: Common Crawl alone
    positives: list[Source]  # good texts; the paper: WebText, Wikipedia, books
    negatives: list[Source]  # raw texts; the paper: Common Crawl before filtering
    documents: Int = 20_000  # learnt from, of each side, the same number of each input (ours)
    features: Int = 2**18  # places that words are hashed to: the default of Spark's HashingTF, which the paper used
    pareto: Int = 9  # the paper's alpha: the larger, the fewer of the low scores are kept
    seed: Int = 0  # of the draws

    version: ClassVar[int] = 1  # raised when the same document would be judged otherwise

    @field_validator("positives", "negatives")
    @classmethod
    def _texts(cls, sources: list[Source]) -> list[Source]:
        if not sources or any(isinstance(source, TokenFiles) for source in sources):
            raise ValueError("expected at least one corpus of text")
        return sources

    def learnt_from(self) -> dict[str, Any]:
        """What the weights depend on, but for the files' bytes."""
        return self.model_dump(mode="json", exclude={"corpora", "pareto", "seed"}) | {"version": self.version}

    def train(self, clean: Callable[[str], str]) -> tuple[bytes, dict[str, int]]:
        """The weights as an `.npy` file, and how many texts of each side they were learnt from. Raises ConfigError."""
        from sklearn.linear_model import LogisticRegression

        texts, counts = [], {}
        for side, sources in (("positives", self.positives), ("negatives", self.negatives)):
            found = [text for source in sources for text in self._sampled(side, source, len(sources), clean)]
            if not found:
                raise ConfigError(f"classifier.{side}: no text in these inputs")
            texts += found
            counts[side] = len(found)
        labels = np.repeat([1, 0], [counts["positives"], counts["negatives"]])
        model = LogisticRegression(C=WEAK, solver="liblinear", class_weight="balanced", random_state=0)
        model.fit(_matrix(texts, self.features), labels)
        file = io.BytesIO()
        np.save(file, np.concatenate([model.coef_[0], model.intercept_]).astype(np.float32))
        return file.getvalue(), counts

    def _sampled(self, side: str, source: Source, sources: int, clean: Callable[[str], str]) -> Iterator[str]:
        try:
            inputs = source.inputs()
        except ConfigError as error:
            raise ConfigError(f"classifier.{side}: {error}") from None
        each = math.ceil(self.documents / sources / len(inputs))
        for input in inputs:
            taken = 0
            with Reading(Part(input), side) as reading:
                for document in source.read(reading):
                    if taken == each:
                        break
                    if text := clean(document.text):
                        taken += 1
                        yield text


@dataclass(frozen=True)
class Judge:
    """A trained classifier over the documents of one corpus."""

    path: Path  # of the weights: shape (features + 1,), float32, the last one the intercept
    pareto: int
    seed: int

    def reason(self, document: Document) -> str | None:
        """Why a document is dropped, or None. Depends on its text and id alone."""
        place = xxhash.xxh3_64_intdigest(document.id.encode("utf-8", "replace"), self.seed & SEED_MASK) / 2**64
        # A draw x = (1 - place)^(-1 / pareto) - 1 is kept where x > 1 - score; whole powers are the same on every host.
        kept = (1 - place) * (2 - self.score(document.text)) ** self.pareto < 1
        return None if kept else "classifier: low quality"

    def score(self, text: str) -> float:
        """From 0 (like the negatives) to 1 (like the positives)."""
        places, values = _features(text, len(self.weights) - 1)
        products = self.weights[places].astype(np.float64) * values
        logit = math.fsum(products.tolist()) + float(self.weights[-1])  # exact, so in any order the same
        return 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0

    @cached_property
    def weights(self) -> npt.NDArray[np.float32]:
        """Raises ConfigError where they cannot be read."""
        try:
            weights = np.load(self.path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ConfigError(f"{self.path}: not a classifier's weights, or damaged: {error}") from None
        assert isinstance(weights, np.ndarray)
        return weights


def _features(text: str, size: int) -> tuple[Words, npt.NDArray[np.float64]]:
    """Where each word of a text is hashed to, and its count in a row of length 1: lower case, between white space."""
    counts = Counter(text.lower().split())
    places = [xxhash.xxh3_64_intdigest(word.encode()) % size for word in counts]
    length = math.sqrt(sum(n * n for n in counts.values()))
    return np.array(places, np.int64), np.array(list(counts.values()), np.float64) / (length or 1.0)


def _matrix(texts: Sequence[str], size: int) -> Any:
    """Sparse rows, shape (texts, size)."""
    from scipy.sparse import csr_matrix

    rows = [_features(text, size) for text in texts]
    starts = np.cumsum([0, *(len(places) for places, _ in rows)])
    columns, values = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    return csr_matrix((values, columns, starts), shape=(len(texts), size))
