import json
from pathlib import Path

import pytest

from data_pipeline import estimate
from data_pipeline.clean import Clean
from data_pipeline.estimate import Trial, tried
from data_pipeline.filters import Filters
from data_pipeline.sources.inputs import Input
from data_pipeline.sources.text_files import TextFiles
from data_pipeline.tokenizer import Tokenizer, train
from tests.data_pipeline.inputs import sentences


def corpus(folder: Path, files: int, rows: int) -> TextFiles:
    for f in range(files):
        texts = [sentences(100 * f + i, 1 if i % 4 == 0 else 20) for i in range(rows)]
        (folder / f"{f}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return TextFiles(paths=[str(folder)])


def test_a_small_corpus_is_tried_whole(tmp_path: Path) -> None:
    source = corpus(tmp_path, 3, 40)
    train((sentences(i, 20) for i in range(100)), 300, tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    trial = tried(source, source.inputs(), Clean(), Filters(min_chars=200), tokenizer)
    assert trial is not None
    kept = [sentences(100 * f + i, 20) for f in range(3) for i in range(40) if i % 4]
    assert (trial.documents, trial.kept) == (120, 90)
    assert trial.text_bytes == sum(len(text) for text in kept)
    assert trial.tokens == sum(len(ids) + 1 for ids in tokenizer.encode_batch(kept))
    assert trial.input_bytes == sum(input.bytes for input in source.inputs()) and trial.seconds > 0


def test_a_large_one_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = corpus(tmp_path, 8, 400)
    monkeypatch.setattr(estimate, "TRIAL_S", 0.0)
    trial = tried(source, source.inputs(), Clean(), Filters(), None)
    whole = sum(input.bytes for input in source.inputs())
    assert trial is not None and trial.documents == 1 and trial.input_bytes < whole / 4


def test_what_would_have_to_be_fetched_is_not_tried(tmp_path: Path) -> None:
    source = corpus(tmp_path, 1, 4)
    remote = [Input("https://e.org/a.jsonl", None, None)]
    assert tried(source, remote, Clean(), Filters(), None) is None
    (tmp_path / "0.jsonl").write_text("")
    assert tried(source, source.inputs(), Clean(), Filters(), None) is None


def test_a_trial_is_scaled() -> None:
    assert Trial(100, 10, 4, 50, 12.5, 0.5).scaled(1000) == Trial(1000, 100, 40, 500, 125.0, 5.0)
