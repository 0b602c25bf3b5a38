"""The presets of papers, run whole on a little real text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import configs
from data_pipeline import prepare
from data_pipeline.preparation import Preparation
from data_pipeline.samples import excerpts
from data_pipeline.shards import Manifest
from data_pipeline.tokenizer import Tokenizer
from tests.data_pipeline.inputs import REAL, real

SMALL = ["block_tokens=1024", "validation.fraction=0"]


def head(preparation: Preparation, corpus: str) -> dict[str, Any]:
    return Manifest.open(preparation.out / corpus).head


def test_gpt3s_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are judged, and one into which a line of LAMBADA was planted is cut in two."""
    crawl = real("common_crawl/site-pages-wget.warc.gz")
    book = real("books/alice-in-wonderland.txt").read_text(encoding="utf-8")
    lambada = REAL / "eval/lambada_openai.jsonl"
    row = json.loads(lambada.read_text(encoding="utf-8").splitlines()[7])
    (tmp_path / "web.txt").write_text(f"{book[5000:9000]} {row['context']} {row['continuation']} {book[9000:13000]}")
    (tmp_path / "answer.txt").write_text(f"{row['context']} {row['continuation']} Write to a@b.example.org.")
    (tmp_path / "book.txt").write_text(book)
    wikipedia = f"[{{kind: text_files, paths: [{tmp_path}/book.txt, {tmp_path}/web.txt]}}]"
    monkeypatch.chdir(tmp_path)
    preparation = configs.load(
        Preparation,
        configs.CONFIGS / "data/gpt3.yaml",
        [
            f"out={tmp_path}/out",
            f"tokenizer.path={real('tokenizer/gpt2-tokenizer.json')}",
            f"corpora={{webtext2: {{kind: text_files, paths: [{tmp_path}/web.txt, {tmp_path}/answer.txt]}}, "
            f"common_crawl: {{kind: common_crawl, paths: [{crawl}]}}}}",
            "clean.mask=[email]",
            f"classifier.positives={wikipedia}",
            f"classifier.negatives=[{{kind: common_crawl, paths: [{crawl}]}}]",
            f"decontamination.sets={{lambada: {{paths: [{lambada}], fields: [context, continuation]}}}}",
            *SMALL,
        ],
    )
    prepare.run(preparation)
    judged, cut = head(preparation, "common_crawl"), head(preparation, "webtext2")
    assert judged["counts"]["dropped"]["classifier: low quality"] >= 5
    assert judged["config"]["classifier"]["pareto"] == 9 and cut["config"]["classifier"] is None
    assert cut["counts"]["documents"] == {"train": 2} and cut["counts"]["read"] == 2
    assert cut["counts"]["dropped"] == {"decontamination: no piece long enough": 1}
    assert cut["counts"]["masked"] == {"email": 1}
    counts = cut["counts"]["decontaminated"]
    assert (counts["documents"], counts["pieces"]) == (1, 2)
    assert 400 + len(row["context"]) <= counts["characters"] <= 410 + len(row["context"]) + len(row["continuation"])


def test_gpt1s_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = real("books/alice-in-wonderland.txt").read_text(encoding="utf-8")
    (tmp_path / "books").mkdir()
    (tmp_path / "books/alice.txt").write_text(book.replace("Alice", "Aliceâ€™s ﬁnd", 1), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    books = f"{{bookcorpus: {{kind: bookcorpus, paths: [{tmp_path}/books]}}}}"
    overrides = [f"corpora={books}", "tokenizer.vocab_size=1000", "tokenizer.characters=60", f"out={tmp_path}/out"]
    preparation = configs.load(Preparation, configs.CONFIGS / "data/gpt1.yaml", [*overrides, *SMALL])
    assert preparation.clean.text("Aliceâ€™s ﬁnd") == "Alice’s find"
    prepare.run(preparation)
    made = head(preparation, "bookcorpus")
    assert made["counts"]["documents"]["train"] >= 1 and made["vocab_size"] == 1000
    assert made["encoder"].startswith("tokenizers ")
    manifest, tokenizer = Manifest.open(tmp_path / "out/bookcorpus"), Tokenizer.load(tmp_path / "out/tokenizer.json")
    text = next(excerpts(manifest, tokenizer, "train", 1, 1000))
    assert "alice was beginning to get very tired of sitting by her sister on the bank, and of" in text
