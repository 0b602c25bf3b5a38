import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import configs
from configs import ConfigError
from data_pipeline import prepare
from data_pipeline.dropped import by_rule
from data_pipeline.find import Found, by_id, by_text, by_token, token_bytes
from data_pipeline.preparation import Preparation
from data_pipeline.progress import Progress
from data_pipeline.shards import Manifest
from data_pipeline.summary import folder_tokenizer, folders
from data_pipeline.tokenizer import Tokenizer
from tests.data_pipeline.inputs import sentences, write_corpora

BLOCK = 1024


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Manifest, Tokenizer]]:
    """Web pages, articles and a file of lines; slices of several shards, documents across blocks and shards."""
    folder = tmp_path_factory.mktemp("find")
    write_corpora(folder)
    rows = [{"text": text_of(i), "id": f"row-{i}", "url": f"https://e.org/{i}"} for i in range(300)]
    (folder / "lines.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows))
    )
    config = {
        "name": "found",
        "out": str(folder / "out"),
        "tokenizer": {"kind": "train", "vocab_size": 500},
        "corpora": {
            "crawl": {"kind": "common_crawl", "paths": [str(folder / "crawl")]},
            "lines": {
                "kind": "text_files", "paths": [str(folder / "lines.jsonl")], "id_field": "id", "uri_field": "url",
            },
        },
        "filters": {"min_chars": 100},
        "validation": {"fraction": 0.1},
        "slice_bytes": 60_000,
        "shard_bytes": 10_000,
        "block_tokens": BLOCK,
    }  # fmt: skip
    (folder / "found.yaml").write_text(yaml.safe_dump(config))
    preparation = configs.load(Preparation, folder / "found.yaml", [])
    prepare.run(preparation)
    return [(manifest, folder_tokenizer(manifest)) for manifest in map(Manifest.open, folders(folder / "out"))]


def text_of(i: int) -> str:
    if i % 30 == 0:
        return f"short {i}"
    return f"{sentences(i, 4 + i % 60)} Nadel im Heuhaufen Nº{i}ß. {sentences(1000 + i, i % 9)}".strip()


def lines(corpora: list[tuple[Manifest, Tokenizer]]) -> tuple[Manifest, Tokenizer]:
    return next(pair for pair in corpora if pair[0].head["corpus"] == "lines")


def searched(pair: tuple[Manifest, Tokenizer], text: str) -> Iterator[Found]:
    return by_text(*pair, text, Progress(token_bytes(pair[0])), lambda _: None)


def test_a_document_is_found_by_its_id_with_its_whole_text(corpora: Any) -> None:
    for i in (1, 7, 59, 298):
        (found,) = by_id(*lines(corpora), f"row-{i}")
        assert (found.text, found.uri, found.corpus) == (text_of(i), f"https://e.org/{i}", "lines")
        with Path(str(found.input)).open("rb") as file:
            file.seek(found.offset or 0)
            assert json.loads(file.readline())["id"] == f"row-{i}"
    assert not list(by_id(*lines(corpora), "row-300")) and not list(by_id(*lines(corpora), "row-0"))


def test_any_token_leads_back_to_its_document(corpora: Any) -> None:
    """Of every shard: the first and last token of its first and last row."""
    shards, across = 0, 0
    for manifest, tokenizer in corpora:
        table = manifest.table.to_pylist()
        for shard in table:
            shards += 1
            rows = shard["blocks"] + (shard["tail_tokens"] > 0)
            for row in {0, rows - 1}:
                size = shard["tail_tokens"] if row == shard["blocks"] else BLOCK
                for token in (0, size - 1):
                    place = f"{manifest.head['corpus']}:{shard['slice']}/{shard['name']}:{row}:{token}"
                    at = by_token(corpora, place)
                    (whole,) = by_id(manifest, tokenizer, at.document.id)
                    assert at.place == place and at.document.text in whole.text
                    assert at.id == tokenizer.end_of_text or at.piece.strip("\ufffd") in whole.text
                    first, last = (p.rsplit("/")[1].split(":")[0] for p in (whole.first_token, whole.last_token))
                    across += first != last
    assert shards > 10 and across > 3


def test_a_text_is_found_once_in_each_document_that_has_it(corpora: Any) -> None:
    found = list(searched(lines(corpora), "Nadel im Heuhaufen Nº"))
    assert sorted(int(x.id[4:]) for x in found) == [i for i in range(300) if i % 30]
    for x in found:
        assert f"Heuhaufen Nº{x.id[4:]}ß." in x.text and x.text in text_of(int(x.id[4:]))
    (one,) = searched(lines(corpora), "Nº217ß. ")
    assert one.id == "row-217"
    assert not list(searched(lines(corpora), "short 30"))  # it was dropped
    assert not list(searched(lines(corpora), "<|endoftext|>"))


def test_a_text_is_found_wherever_blocks_are_cut(corpora: Any) -> None:
    """Every document by its end: some ends lie across two blocks, some across two shards."""
    for i in range(1, 300, 23):
        if i % 30:
            end = text_of(i)[-60:]
            assert f"row-{i}" in [x.id for x in searched(lines(corpora), end)]


def test_what_no_document_has_is_not_found_across_two(corpora: Any) -> None:
    assert not list(searched(lines(corpora), f"{text_of(1)[-30:]}{text_of(2)[:30]}"))


def test_a_search_says_how_far_it_is(corpora: Any) -> None:
    progress, seen = Progress(token_bytes(lines(corpora)[0])), []
    list(by_text(*lines(corpora), "Nº217ß", progress, lambda p: seen.append(p.bytes)))
    assert seen == sorted(seen) and seen[-1] == progress.total_bytes and progress.documents == 1


def test_what_a_rule_dropped_is_listed(corpora: Any) -> None:
    rows = list(by_rule(lines(corpora)[0], "too short"))
    assert [row["id"] for row in rows] == [f"row-{i}" for i in range(0, 300, 30)]
    assert rows[1]["text"] == "short 30" and rows[1]["uri"] == "https://e.org/30" and rows[1]["characters"] == 8


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("lines:0-0", "expected CORPUS:SLICE/SHARD:ROW:TOKEN, such as wiki:0-00000/train-00000:3:512, got 'lines:0-0'"),
        ("0-00000/train-00000:0:0", "0-00000/train-00000:0:0: expected one of the corpora crawl, lines in front, as in "
         "CORPUS:0-00000/train-00000:0:0"),
        ("lines:0-00000/train-00099:0:0", "lines:0-00000/train-00099:0:0: no such shard; inspect shows some places"),
        ("lines:0-00000/train-00000:0:1024", "lines:0-00000/train-00000:0:1024: the shard has 2 rows of 1024 tokens; "
         "both count from 0"),
    ],
)  # fmt: skip
def test_a_wrong_place_is_told(corpora: Any, place: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        by_token(corpora, place)
    assert str(error.value).removeprefix("--token: ").removeprefix("--token ") == said


def test_the_bytes_of_tokens_are_the_text(corpora: Any) -> None:
    tokenizer = lines(corpora)[1]
    text = "Nº ß 中文 👩\u200d🚀 \x00\x7f\xa0\xad <|endoftext|> don't\n\n"
    pieces = tokenizer.token_bytes
    assert pieces is not None
    assert b"".join(pieces[id] for id in tokenizer.encode_batch([text])[0]) == text.encode()
