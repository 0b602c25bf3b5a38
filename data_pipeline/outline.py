"""What a preparation is going to read, make and take, before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from data_pipeline.dedup import Dedup
from data_pipeline.estimate import memory_bytes, tried
from data_pipeline.made_once import TOKENIZER
from data_pipeline.plan import BYTES_PER_TOKEN, Plan, cut
from data_pipeline.preparation import Preparation
from data_pipeline.slices import slice_record
from data_pipeline.tokenizer import Given, GivenTokenizer, Tokenizer, choose_encoder

TEXT_PACKED = 0.5  # of a text's bytes, by zstd
SHARD_OVERHEAD = 1.01  # headers of the tar and of its members, indexes
SIDECAR_BYTES = 60  # of a document: its row in the sidecar, compressed, and 12 bytes in ids.npy


@dataclass(frozen=True)
class Outline:
    """What a preparation is going to do, before anything is written. Tokens, text, times and room are estimates."""

    corpus: str
    inputs: int
    input_bytes: int
    slices: int
    slices_made: int
    tokens: int
    text_bytes: int  # kept
    kept: float | None  # share of documents
    core_seconds: float | None  # for the slices that are missing, on one core; None: nothing could be tried
    workers: int  # that can be at work at once
    seconds: float | None  # with so many
    shard_bytes: int
    texts_bytes: int  # of texts and marks, until the seal, where duplicates are sought
    worker_bytes: int  # of memory
    tried_bytes: int  # of input


def outlines(preparation: Preparation) -> Iterator[Outline]:
    """The plan of each corpus as it is, else as it would be, with estimates from a trial of about a second."""
    tokenizer = _tokenizer_for_trial(preparation)
    choice = preparation.tokenizer
    vocabulary = (tokenizer.vocab_size if tokenizer else 0) if isinstance(choice, Given) else choice.vocab_size
    for corpus in preparation.corpora:
        yield _outline(preparation, corpus, tokenizer, 2 if vocabulary <= 2**16 else 4)


def _tokenizer_for_trial(preparation: Preparation) -> Tokenizer | None:
    made, choice = preparation.out / TOKENIZER, preparation.tokenizer
    path = made if made.is_file() else choice.path if isinstance(choice, GivenTokenizer) else None
    if path is None:
        return None
    tokenizer = Tokenizer.load(path)
    choose_encoder(tokenizer)
    return tokenizer


def _outline(preparation: Preparation, corpus: str, tokenizer: Tokenizer | None, token_bytes: int) -> Outline:
    source, inputs, folder = preparation.source(corpus), preparation.inputs(corpus), preparation.out / corpus
    plan = Plan.read(folder)
    slices = plan.slices if plan else cut(inputs, source.can_split, preparation.slice_bytes, 0, 0)
    missing = [s for s in slices if plan is None or slice_record(folder, plan, s) is None]
    bytes = sum(input.bytes for input in inputs)
    trial = tried(source, inputs, preparation.clean, preparation.filters, tokenizer)
    whole = trial.scaled(bytes) if trial else None
    text = whole.text_bytes if whole else int(sum(map(source.text_bytes, inputs)))
    tokens = int(whole.tokens if whole else text / BYTES_PER_TOKEN)
    seconds = trial.scaled(sum(s.bytes for s in missing)).seconds if trial else None
    at_once = max(1, min(preparation.workers, len(missing)))
    return Outline(
        corpus=corpus,
        inputs=len(inputs),
        input_bytes=bytes,
        slices=len(slices),
        slices_made=len(slices) - len(missing),
        tokens=tokens,
        text_bytes=text,
        kept=trial.kept / trial.documents if trial else None,
        core_seconds=seconds,
        workers=at_once,
        seconds=None if seconds is None else seconds / at_once,
        shard_bytes=int(SHARD_OVERHEAD * tokens * token_bytes) + (SIDECAR_BYTES * whole.kept if whole else 0),
        texts_bytes=_texts_bytes(preparation.dedup, text, whole.kept if whole else 0),
        worker_bytes=memory_bytes(),
        tried_bytes=trial.input_bytes if trial else 0,
    )


def _texts_bytes(dedup: Dedup | None, text_bytes: int, documents: int) -> int:
    return 0 if dedup is None else int(TEXT_PACKED * text_bytes) + documents * dedup.document_bytes
