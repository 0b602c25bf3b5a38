from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from configs import ConfigError, build
from data_pipeline import prepare
from data_pipeline.classifier import Judge, QualityClassifier
from data_pipeline.clean import Clean
from data_pipeline.document import Document
from data_pipeline.made_once import make_classifier
from data_pipeline.preparation import Preparation
from data_pipeline.shards import Manifest
from tests.data_pipeline.inputs import REAL, real, sentences

SPAM = "buy cheap pills now click here best price free casino bonus login register cookie accept menu home contact"


def write(path: Path, texts: list[str]) -> dict[str, Any]:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"kind": "text_files", "paths": [str(path)]}


@pytest.fixture()
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Good texts, raw ones of both kinds, and a corpus of both to judge."""
    monkeypatch.chdir(tmp_path)
    good = [sentences(seed, 12) for seed in range(200)]
    words = SPAM.split()
    spam = [" ".join(words[i % 7 :: 1 + i % 3] * 6) + f" {i}" for i in range(200)]
    return {
        "name": "test",
        "out": str(tmp_path / "out"),
        "tokenizer": {"kind": "train", "vocab_size": "300"},
        "corpora": {"crawl": write(tmp_path / "crawl.jsonl", good[100:] + spam[100:])},
        "classifier": {
            "corpora": ["crawl"],
            "positives": [write(tmp_path / "good.jsonl", good[:100])],
            "negatives": [write(tmp_path / "raw.jsonl", spam[:90] + good[60:70])],
        },
        "slice_bytes": "20e3",
        "block_tokens": "128",
    }


def run(config: dict[str, Any]) -> dict[str, Any]:
    preparation = build(Preparation, config, "test")
    prepare.run(preparation)
    return Manifest.open(preparation.out / "crawl").head


def test_it_drops_most_of_the_worse_and_keeps_the_better(config: dict[str, Any]) -> None:
    head = run(config)
    dropped = head["counts"]["dropped"]["classifier: low quality"]
    assert 60 <= dropped <= 110 and head["counts"]["read"] == 200
    judge = Judge(Path(config["out"]) / "classifier.npy", 9, 0)
    assert judge.score(sentences(999, 12)) > 0.8 > 0.2 > judge.score(SPAM * 3)


def test_the_same_whatever_the_order_of_work(config: dict[str, Any], tmp_path: Path) -> None:
    first = run(config)
    again = run(config | {"out": str(tmp_path / "again"), "workers": "2"})
    assert first["config"]["classifier"] == again["config"]["classifier"]
    assert first["counts"] == again["counts"] and first["config"]["classifier"]["pareto"] == 9


def test_scores_decide_by_a_draw_of_the_documents_own(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """P(kept) is (2 - score)^-9: the tail of Lomax's distribution beyond 1 - score."""
    judge = Judge(Path("unread"), 9, 0)
    for score in (0.0, 0.5, 0.9, 1.0):
        monkeypatch.setattr(Judge, "score", lambda self, text, score=score: score)
        verdicts = [judge.reason(Document("", str(i), "", "")) for i in range(20_000)]
        assert verdicts == [judge.reason(Document("", str(i), "", "")) for i in range(20_000)]
        assert abs(verdicts.count(None) / 20_000 - (2 - score) ** -9) < 0.01
    other = [Judge(Path("unread"), 9, 1).reason(Document("", str(i), "", "")) for i in range(100)]
    monkeypatch.setattr(Judge, "score", lambda self, text: 0.9)
    assert [judge.reason(Document("", str(i), "", "")) for i in range(100)] != other


def test_it_is_made_once_and_another_is_refused(config: dict[str, Any]) -> None:
    first = make_classifier(build(Preparation, config, "test"))
    assert first["documents"] == {"positives": 100, "negatives": 100}
    Path("good.jsonl").unlink()
    assert make_classifier(build(Preparation, config, "test")) == first
    other = config | {"classifier": {**config["classifier"], "features": "1024"}}
    with pytest.raises(
        ConfigError,
        match=r"with another configuration: classifier\.features: 262144 -> 1024; use",
    ):
        make_classifier(build(Preparation, other, "test"))
    (Path(config["out"]) / "classifier.npy").write_bytes(b"x")
    with pytest.raises(
        ConfigError, match=r"classifier.npy: damaged or exchanged \(sha256 differs from classifier.made"
    ):
        run(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpora": ["wiki"]}, r"classifier.corpora: no corpus 'wiki'; there are crawl"),
        ({"positives": []}, r"classifier.positives: expected at least one corpus of text"),
        ({"negatives": [{"kind": "text_files", "paths": ["absent.txt"]}]}, r"classifier.negatives: .*absent.txt"),
    ],
)
def test_what_cannot_be_learnt_from(config: dict[str, Any], change: dict[str, Any], message: str) -> None:
    config = config | {"classifier": {**config["classifier"], **change}}
    with pytest.raises(ConfigError, match=message):
        make_classifier(build(Preparation, config, "test"))


def test_real_pages_score_below_real_books() -> None:
    sources = {"positives": [{"kind": "wikipedia", "paths": [str(real("wikipedia") / "*.bz2")]}]}
    sources["negatives"] = [{"kind": "common_crawl", "paths": [str(REAL / "common_crawl/site-pages-wget.warc.gz")]}]
    classifier = build(QualityClassifier, {"corpora": ["x"], "documents": "40", **sources}, "test")
    weights, counts = classifier.train(Clean().text)
    assert weights == classifier.train(Clean().text)[0] and min(counts.values()) >= 15
