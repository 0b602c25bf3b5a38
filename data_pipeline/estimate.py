"""How much work a corpus is, from a trial of a second on its own inputs: for the plan that `--dry-run` shows.

The trial reads, cleans, filters and encodes documents of inputs chosen by a hash of their names, in this process on one
core, and writes nothing. What it leaves out are GPT-3's classifier, the search for duplicates and evaluation sets.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import xxhash

from data_pipeline.clean import Clean
from data_pipeline.filters import Filters
from data_pipeline.sources import Source
from data_pipeline.sources.inputs import Input, Part, Reading, is_content_error, is_remote
from data_pipeline.tokenizer import Tokenizer

TRIAL_S = 1.0
TRIAL_INPUTS = 20
BYTES_PER_TOKEN = 4.0  # of text, where there is no tokenizer yet
ENCODE_BYTES_PER_S = 20e6  # of text, where there is no tokenizer yet: gigatoken does more, tokenizers an eighth
ENCODE_CHARS = 1_000_000  # at once


@dataclass(frozen=True)
class Trial:
    """What a trial found. Bytes of input as they are packed, of text as UTF-8."""

    input_bytes: int
    documents: int  # read
    kept: int
    text_bytes: int  # of those kept
    tokens: float  # of those kept
    seconds: float  # on one core

    def scaled(self, input_bytes: int) -> Trial:
        """The same for so much input."""
        factor = input_bytes / self.input_bytes
        return Trial(
            input_bytes=input_bytes,
            documents=round(self.documents * factor),
            kept=round(self.kept * factor),
            text_bytes=round(self.text_bytes * factor),
            tokens=self.tokens * factor,
            seconds=self.seconds * factor,
        )


def tried(
    source: Source, inputs: Sequence[Input], clean: Clean, filters: Filters, tokenizer: Tokenizer | None
) -> Trial | None:
    """A second of work on some of the inputs; None where there is nothing to try, or it would have to be fetched."""
    chosen = sorted(inputs, key=lambda input: xxhash.xxh3_64_intdigest(input.name.encode("utf-8", "replace")))
    read, documents, kept, made, texts = 0, 0, 0, 0, list[str]()
    begun = time.process_time()
    for input in [input for input in chosen if not is_remote(input.name) and input.bytes][:TRIAL_INPUTS]:
        with Reading(Part(input), "", "skip") as reading:
            try:
                for document in source.read(reading):
                    documents += 1
                    if document.ids is not None:
                        kept, made = kept + 1, made + len(document.ids)
                    else:
                        judged, reason = filters.judged(replace(document, text=clean.text(document.text)))
                        if reason is None:
                            texts.append(judged.text)
                    if time.process_time() - begun > TRIAL_S:
                        break
            except Exception as error:
                if not is_content_error(error):
                    raise
            read += reading.bytes_read
        if time.process_time() - begun > TRIAL_S:
            break
    if not documents or not read:
        return None
    seconds = time.process_time() - begun
    size = sum(len(text.encode()) for text in texts)
    tokens, encoding = _encoded(texts, size, tokenizer)
    return Trial(read, documents, kept + len(texts), size, made + tokens, seconds + encoding)


def _encoded(texts: Sequence[str], size: int, tokenizer: Tokenizer | None) -> tuple[float, float]:
    """(tokens, seconds) of all texts, from some of them."""
    if tokenizer is None or not size:
        return size / BYTES_PER_TOKEN + len(texts), size / ENCODE_BYTES_PER_S
    some, characters = list[str](), 0
    for text in texts:
        some.append(text[:ENCODE_CHARS])
        characters += len(some[-1])
        if characters >= ENCODE_CHARS:
            break
    tokenizer.encode_batch(some[:1])  # the first call prepares
    begun = time.process_time()
    ids = tokenizer.encode_batch(some)
    factor = size / sum(len(text.encode()) for text in some)
    return sum(map(len, ids)) * factor + len(texts), (time.process_time() - begun) * factor


def memory_bytes() -> int:
    """The most this process has held so far; a worker does the same work on other documents."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
