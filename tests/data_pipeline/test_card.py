import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
import yaml

import configs
from configs import ConfigError
from data_pipeline import prepare
from data_pipeline.card import columns, power, share, short, steps
from data_pipeline.counts import Totals
from data_pipeline.preparation import Preparation
from data_pipeline.samples import excerpts
from data_pipeline.shards import Manifest
from data_pipeline.summary import folder_tokenizer
from tests.data_pipeline.inputs import sentences

EVIL = "<script>document.documentElement.dataset.ran = 'yes'</script><img src=x onerror=\"document.title='ran'\">"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus whose texts, addresses and ids would rather be a program, in out/."""
    folder = tmp_path_factory.mktemp("card")
    rows = [
        {"text": f"{EVIL} {sentences(i, 1 if i % 5 == 0 else 9)}", "id": f'"><b>{i}', "url": f"javascript:alert({i})"}
        for i in range(100)
    ]
    rows[1]["url"] = "https://e.org/?a=1&b=<i>"
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "text_files", "paths": [str(folder / "mine.jsonl")], "id_field": "id", "uri_field": "url"}
    config = {
        "name": "</title><script>1</script>",
        "out": str(folder / "out"),
        "tokenizer": {"kind": "train", "vocab_size": 400},
        "corpora": {"mine": source | {"about": f"Made up. {EVIL}", "licence": "CC0 & more"}},
        "filters": {"min_chars": 250},
        "block_tokens": 1024,
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(config))
    prepare.run(load(folder))
    return folder


def load(folder: Path, *overrides: str) -> Preparation:
    return configs.load(Preparation, folder / "small.yaml", overrides)


def card(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "out/card.json").read_text()))


def browser() -> str:
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("no chromium: make debian-packages")
    return found


def browse(page: Path, *flags: str) -> str:
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'browser'}"]
    done = subprocess.run([*command, *flags, page.as_uri()], capture_output=True, timeout=120, check=True)
    return done.stdout.decode()


def test_the_card_counts_what_became_of_every_document(folder: Path) -> None:
    (mine,) = card(folder)["corpora"]
    (summary,) = prepare.run(load(folder))
    assert (mine["documents_read"], mine["documents"], mine["tokens"]) == (100, 80, summary.tokens)
    assert [(step["step"], step["documents"], step["less_documents"]) for step in mine["steps"]] == [
        ("read", 100, 0), ("clean", 100, 0), ("too short", 80, 20), ("kept", 80, 0),
    ]  # fmt: skip
    assert mine["steps"][-1]["bytes"] == mine["text_bytes"] and mine["steps"][2]["less_bytes"] > 0
    (dropped,) = mine["dropped"]
    assert (dropped["reason"], dropped["documents"], len(dropped["examples"])) == ("too short", 20, 10)
    row = dropped["examples"][0]
    assert row["input"].endswith("mine.jsonl") and row["text"].startswith("<script>") and row["offset"] >= 0
    assert mine["licence"] == "CC0 & more" and mine["hashes"]["manifest_sha256"]
    assert sum(mine["languages"].values()) == sum(mine["length_tokens"].values()) == 80


class Tags(HTMLParser):
    """What a page is made of."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attributes


def test_texts_of_a_corpus_stay_text(folder: Path) -> None:
    page = (folder / "out/card.html").read_text()
    found = Tags(page)
    assert not found.tags & {"script", "img", "i", "iframe", "object"} and "&lt;script&gt;" in page
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    links = {value for name, value in found.attributes if name in ("href", "src")}
    assert links == {"https://e.org/?a=1&b=<i>"}
    assert len(page) < 100_000


def test_a_browser_shows_the_card_and_runs_nothing(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "card.html"
    shutil.copy(folder / "out/card.html", page)
    dom = browse(page, "--dump-dom")
    assert "data-ran" not in dom and "<title>&lt;/title&gt;&lt;script&gt;1&lt;/script&gt;: data card</title>" in dom
    assert "too short" in dom and dom.count('class="bar"') == 3
    shots = []
    for flags in ([], ["--force-dark-mode", "--enable-features=WebContentsForceDark"]):
        browse(page, f"--screenshot={tmp_path / 'shot.png'}", "--window-size=1200,1600", *flags)
        shots.append((tmp_path / "shot.png").read_bytes())
    assert shots[0] != shots[1] and min(map(len, shots)) > 30_000  # an empty page has a tenth of it


def test_what_a_script_of_a_page_would_do_is_seen_by_the_test(tmp_path: Path) -> None:
    """The test before this one can fail."""
    (tmp_path / "bare.html").write_text(f"<!doctype html><html><body>{EVIL}</body></html>")
    assert 'data-ran="yes"' in browse(tmp_path / "bare.html", "--dump-dom")


def test_made_again_it_says_the_same(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").glob("card.*")}
    prepare.write_card(load(folder))
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == 2
    first = card(folder)
    for path in before:
        path.unlink()
    prepare.write_card(load(folder))
    assert {**card(folder), "made": None} == {**first, "made": None}


def test_a_folder_is_enough_and_keeps_what_the_config_said(folder: Path) -> None:
    first = card(folder)
    (folder / "out/card.html").unlink()
    assert prepare.write_card_of(folder / "out") == folder / "out/card.html"
    assert {**card(folder), "made": None} == {**first, "made": None}


def test_tokenizers_are_compared_on_the_same_text(folder: Path) -> None:
    tokenizer = folder / "other.json"
    tokenizer.write_text((folder / "out/tokenizer.json").read_text())
    prepare.write_card(load(folder, f"card.compare_tokenizer={tokenizer}"))
    compared = card(folder)["corpora"][0]["compared"]
    assert compared["own_tokens"] == compared["other_tokens"] > 1000 and compared["tokenizer"] == "other.json"
    assert re.search(
        r"other\.json</dt><dd>0\.\d+ on the same \(\+0\.0 % tokens", (folder / "out/card.html").read_text()
    )
    prepare.write_card(load(folder))
    assert card(folder)["corpora"][0]["compared"] is None


def test_a_tokenizer_to_compare_with_is_asked_for_before_the_work(folder: Path) -> None:
    with pytest.raises(ConfigError) as error:
        prepare.run(load(folder, "card.compare_tokenizer=none.json", f"out={folder / 'other'}"))
    assert str(error.value) == "card.compare_tokenizer: none.json: no such file"


def test_excerpts_come_from_all_over_a_corpus(folder: Path) -> None:
    manifest = Manifest.open(folder / "out/mine")
    tokenizer = folder_tokenizer(manifest)
    train = manifest.table.filter(pc.equal(manifest.table["split"], "train"))
    rows = sum(train["blocks"].to_pylist()) + 1  # and the tail
    assert 5 < rows == len(set(excerpts(manifest, tokenizer, "train", 1000, 100)))
    assert len(set(excerpts(manifest, tokenizer, "train", 3, 100))) == 3


def test_a_funnel_has_what_raised_first_and_what_was_cut_out_last() -> None:
    counts = Totals(read=10, read_bytes=1000, cleaned_bytes=850, text_bytes=500)
    counts.set_aside.update({"raises": 1, "redirect": 4})
    counts.dropped.update({"near duplicate": 3, "too short": 2})
    counts.dropped_bytes.update({"raises": 100, "near duplicate": 200, "too short": 50})
    counts.documents.update({"train": 5})
    found = [
        (s["step"], s["documents"], s["bytes"], s["less_documents"], s["less_bytes"]) for s in steps(counts.as_json())
    ]
    assert found == [
        ("read", 10, 1000, 0, 0),
        ("raises", 9, 900, 1, 100),
        ("clean", 9, 850, 0, 50),
        ("too short", 7, 800, 2, 50),
        ("near duplicate", 4, 600, 3, 200),
        ("cut out", 5, 500, -1, 100),
        ("kept", 5, 500, 0, 0),
    ]


def test_lines_that_a_rule_cuts_are_not_laid_to_cleaning(tmp_path: Path) -> None:
    lines = "\n".join(f"This is sentence number {i} of the text, and it is a long one." for i in range(9))
    rows = [{"text": f"{lines}\nno end"} for _ in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "name": "cut",
        "out": str(tmp_path / "out"),
        "tokenizer": {"kind": "train", "vocab_size": 280},
        "corpora": {"a": {"kind": "text_files", "paths": [str(tmp_path / "a.jsonl")]}},
        "filters": {"c4": {}},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    prepare.run(load(tmp_path))
    (mine,) = card(tmp_path)["corpora"]
    assert [(step["step"], step["less_bytes"]) for step in mine["steps"]] == [
        ("read", 0), ("clean", 0), ("cut out", 20 * len("\nno end")), ("kept", 0),
    ]  # fmt: skip


def test_numbers_are_short(folder: Path) -> None:
    assert [short(n) for n in (0, 9_999, 10_000, 999_600, 1_234_567, 3.2e12)] == [
        "0", "9,999", "10 k", "1 M", "1.23 M", "3.2 T",
    ]  # fmt: skip
    assert [share(*x) for x in ((0, 5), (1, 10**6), (1, 200), (1, 3), (5, 5), (1, 0))] == [
        "0.0 %", "< 0.01 %", "0.50 %", "33.3 %", "100.0 %", "0.0 %",
    ]  # fmt: skip
    assert [power(n) for n in (0, 1, 512, 4096, 2**21)] == ["0", "1", "512", "4k", "2M"]
    assert [(c["low"], c["high"], c["count"]) for c in columns({"2": 4, "4": 1})] == [(2, 3, 4), (4, 7, 0), (8, 15, 1)]
    assert columns({}) == [] and columns({"0": 1})[0]["high"] == 0
