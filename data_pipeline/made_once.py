"""What a preparation makes once for all its corpora: the tokenizer, and where asked for the classifier of quality.

out/tokenizer.json        trained, or a copy of the given one; tokenizer.made.json: how it was made
out/classifier.npy        classifier.made.json: how it was made
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from configs import ConfigError, differences
from data_pipeline import shards
from data_pipeline.classifier import Judge
from data_pipeline.language import file_sha256
from data_pipeline.lease import Lease
from data_pipeline.preparation import Preparation
from data_pipeline.progress import Display, Elapsed, Progress, size
from data_pipeline.sources.inputs import Input, Part, Reading
from data_pipeline.tokenizer import (
    Given,
    Tokenizer,
    TokenizerChoice,
    TrainGpt1Tokenizer,
    TrainTokenizer,
    choose_encoder,
)

log = logging.getLogger("data-prep")

TOKENIZER = "tokenizer.json"
TOKENIZER_MADE = "tokenizer.made.json"
CLASSIFIER = "classifier.npy"
CLASSIFIER_MADE = "classifier.made.json"
TOKENIZER_READ = 8  # a sample is taken from at most this many times its size of text


def make_tokenizer(preparation: Preparation) -> Tokenizer:
    """The folder's tokenizer: loaded when it is there, else trained or copied. Raises ConfigError on another's."""
    out = preparation.out
    out.mkdir(parents=True, exist_ok=True)
    with Lease.wait(out / ".tokenizer.lease", log.info):
        remove_half_written(out)
        made = _read_json(out / TOKENIZER_MADE)
        wanted = _tokenizer_identity(preparation.tokenizer)
        if made is None:
            made = _make_tokenizer(preparation, wanted)
            shards.write_durably(out / TOKENIZER_MADE, _json_bytes(made))
    if differ := differences(made["config"], wanted):
        raise ConfigError(
            f"{out}: its tokenizer was made with another configuration: {'; '.join(f'tokenizer.{d}' for d in differ)}; "
            "use another `out`, or put it back"
        )
    tokenizer = Tokenizer.load(out / TOKENIZER)
    if tokenizer.sha256 != made["sha256"]:
        raise ConfigError(f"{out / TOKENIZER}: damaged or exchanged (sha256 differs from {TOKENIZER_MADE}); restore it")
    why = choose_encoder(tokenizer)
    if tokenizer.encoder == "tokenizers":
        log.warning("encoding is slow: %s", why)
    return tokenizer


def _tokenizer_identity(choice: TokenizerChoice) -> dict[str, Any]:
    if isinstance(choice, Given):
        return {"kind": choice.kind, "sha256": choice.identity()}
    return choice.model_dump(mode="json")


def _make_tokenizer(preparation: Preparation, identity: dict[str, Any]) -> dict[str, Any]:
    path, choice = preparation.out / TOKENIZER, preparation.tokenizer
    sample: dict[str, dict[str, int]] = {}
    if isinstance(choice, Given):
        choice.write(path)
    else:
        with Elapsed("tokenizer: counting pairs and merging them") as merging:
            choice.train(merging.after(_sampled(preparation, choice, sample)), path)
    return {"config": identity, "sample": sample, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _sampled(
    preparation: Preparation, choice: TrainTokenizer | TrainGpt1Tokenizer, taken: dict[str, dict[str, int]]
) -> Iterator[str]:
    """Cleaned texts for training, of each corpus as many bytes as its share of all text; fills `taken`.

    Inputs are read in the order of a keyed hash of their names, and documents taken by a keyed hash of their ids, so
    the sample depends on neither the order of inputs nor on the host. Texts kept for validation are not in it.
    """
    inputs = {corpus: preparation.inputs(corpus) for corpus in preparation.corpora}
    texts = {c: sum(map(source.text_bytes, inputs[c])) for c, source in preparation.corpora.items()}
    progress = Progress(min(choice.sample_bytes, int(sum(texts.values()))))
    with Display("tokenizer: sample") as display:
        for corpus in preparation.corpora:
            budget = int(choice.sample_bytes * min(1.0, texts[corpus] / max(sum(texts.values()), 1)))
            got = taken[corpus] = {"documents": 0, "bytes": 0}
            for text in _sampled_of(preparation, corpus, inputs[corpus], budget, choice.seed):
                got["documents"] += 1
                got["bytes"] += len(text.encode())
                progress.done_documents += 1
                progress.done_bytes += len(text.encode())
                display(progress)
                yield text
            log.info("tokenizer: %s: %s documents, %s of text", corpus, f"{got['documents']:,}", size(got["bytes"]))


def _sampled_of(
    preparation: Preparation, corpus: str, inputs: Sequence[Input], budget: int, seed: int
) -> Iterator[str]:
    source = preparation.source(corpus)
    ordered = sorted(inputs, key=lambda input: (_place(input.name, seed), input.name))
    expected = min(sum(map(source.text_bytes, inputs)), TOKENIZER_READ * budget)
    share = min(1.0, 1.25 * budget / max(expected, 1))  # of documents; the quarter more is for what filters drop
    left = budget
    for input in ordered:
        with Reading(Part(input), corpus) as reading:
            for document in source.read(reading):
                if _place(document.id, seed) >= share:
                    continue
                text = preparation.clean.text(document.text)
                if text and preparation.validation.split(text) == "train":
                    yield text
                    left -= len(text.encode())
                if left <= 0:
                    return


def _place(name: str, seed: int) -> float:
    """From 0 to 1, by a keyed hash."""
    return xxhash.xxh3_64_intdigest(name.encode("utf-8", "replace"), seed & (2**64 - 1)) / 2**64


def make_classifier(preparation: Preparation) -> dict[str, Any]:
    """Train the folder's classifier unless it is there; how it was made. Raises ConfigError on another's."""
    classifier, out = preparation.classifier, preparation.out
    if classifier is None:
        raise ConfigError("classifier: not in this configuration")
    out.mkdir(parents=True, exist_ok=True)
    with Lease.wait(out / ".classifier.lease", log.info):
        made = _read_json(out / CLASSIFIER_MADE)
        if made is None:
            weights, counts = classifier.train(preparation.clean.text)
            shards.write_durably(out / CLASSIFIER, weights)
            sha256 = hashlib.sha256(weights).hexdigest()
            made = {"config": classifier.learnt_from(), "documents": counts, "sha256": sha256}
            shards.write_durably(out / CLASSIFIER_MADE, _json_bytes(made))
            log.info("classifier: learnt from %s good and %s raw texts", *counts.values())
    if differ := differences(made["config"], classifier.learnt_from()):
        raise ConfigError(
            f"{out}: its classifier was made with another configuration: "
            f"{'; '.join(f'classifier.{d}' for d in differ)}; use another `out`, or put it back"
        )
    if file_sha256(out / CLASSIFIER) != made["sha256"]:
        raise ConfigError(
            f"{out / CLASSIFIER}: damaged or exchanged (sha256 differs from {CLASSIFIER_MADE}); restore it"
        )
    assert isinstance(made, dict)
    return made


def judgment(preparation: Preparation, corpus: str) -> dict[str, Any] | None:
    """What the classifier's verdicts on a corpus depend on."""
    classifier = preparation.classifier
    if classifier is None or corpus not in classifier.corpora:
        return None
    made = make_classifier(preparation)
    settings = classifier.model_dump(mode="json", include={"pareto", "seed"})
    return {**settings, "sha256": made["sha256"], "version": classifier.version}


def judge(preparation: Preparation, corpus: str) -> Judge | None:
    classifier = preparation.classifier
    if classifier is None or corpus not in classifier.corpora:
        return None
    return Judge(preparation.out / CLASSIFIER, classifier.pareto, classifier.seed)


def remove_half_written(folder: Path) -> None:
    """Files that a killed process was writing; whoever holds the folder's lease is the only one to write there."""
    for path in folder.glob(".*.tmp-*"):
        path.unlink(missing_ok=True)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{path}: damaged ({error}); restore it, or prepare into another `out`") from None


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
