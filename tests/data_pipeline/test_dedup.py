import hashlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from scipy.stats import binomtest

import configs
from configs import ConfigError
from data_pipeline import dedup, duplicates, prepare
from data_pipeline.dedup import Dedup, Near, exact_marks, near_marks, read_marks, shingles, write_marks
from data_pipeline.document import Document
from data_pipeline.preparation import Preparation
from data_pipeline.shards import Manifest
from data_pipeline.summary import Summary, folder_tokenizer, folders, verified
from tests.data_pipeline.inputs import REAL, sentences

# --- marks ----------------------------------------------------------------------------------------------------------


def grams(text: str, words: int) -> set[tuple[str, ...]]:
    """The n-grams of a text in Latin letters, another way."""
    found = re.findall(r"[^\W_]+", text.lower())
    return {tuple(found[i : i + words]) for i in range(max(1, len(found) - words + 1))} if found else set()


def real_texts(count: int) -> list[str]:
    """Passages of real books, else of made-up words."""
    books = [path.read_text(encoding="utf-8", errors="replace") for path in sorted((REAL / "books").glob("*.txt"))]
    whole = " ".join(books) if books else sentences(1, 40_000)
    words = whole.split()
    starts = [i * 80 % (len(words) - 150) for i in range(count)]
    return [" ".join(words[start : start + 150]) for start in starts]


def test_the_n_grams_are_those_of_another_way_to_find_them() -> None:
    rng = random.Random(3)
    words = ["one", "Two", "tHree", "vier", "äpfel", "ÉTÉ", "x", "42", "don't", "a_b", "—", "“", "!"]
    texts = [rng.choice(["", " ", ", "]).join(rng.choices(words, k=rng.randint(0, 60))) for _ in range(300)]
    texts += ["", "!!!", "one", "one two three four five"]
    for n in (1, 2, 5):
        hashes, offsets = shingles(texts, n)
        each = [hashes[a:b].tolist() for a, b in itertools.pairwise(offsets.astype(int))]
        seen: dict[Any, int] = {}
        for text, found in zip(texts, each, strict=True):
            expected = grams(text, n)
            assert len(set(found)) == len(expected)
            assert shingles([text], n)[0].tolist() == found  # whatever it is hashed together with
            if len(expected) == 1:
                assert seen.setdefault(next(iter(expected)), found[0]) == found[0]
        assert len({h for found in each for h in found}) == len(set().union(*(grams(t, n) for t in texts)))


def test_scripts_without_spaces_have_a_word_for_each_character() -> None:
    hashes, offsets = shingles(["汉字漢字汉字漢字汉", "ไทยไทย", "\U00020000\U00020001", "😀😀"], 2)
    assert np.diff(offsets.astype(int)).tolist() == [8, 5, 1, 0] and len(set(hashes[:8].tolist())) == 4


def test_the_marks_are_known() -> None:
    """Marks of one version, machine and library must fit those of another; they lie in folders for long."""
    probe = Dedup().identity()["probe"]
    assert probe == "01eca336909e4f74fe19a357127a4cb4edab082a9ca2c90cb22f671a0fa85026"


@pytest.mark.parametrize("similarity", [0.5, 0.8, 0.9])
def test_pairs_are_found_as_often_as_the_theory_says(similarity: float) -> None:
    """1 - (1 - s^r)^b, each pair at its own s, by brute force over its n-grams. A chance of 1e-6 to fail by chance."""
    near, rng = Near(seed=5), random.Random(int(100 * similarity))
    found, expected, s_of_all = 0, [], []
    for text in real_texts(1500):
        other = mutated(text, similarity, rng)
        a, b = grams(text, 5), grams(other, 5)
        s = len(a & b) / len(a | b)
        s_of_all.append(s)
        expected.append(1 - (1 - s**near.rows) ** near.bands)
        first, second = (set(near_marks([each], near)["key"].tolist()) for each in (text, other))
        found += bool(first & second)
    assert abs(np.mean(s_of_all) - similarity) < 0.06
    mean = float(np.mean(expected))
    assert binomtest(found, len(expected), mean).pvalue > 1e-6, (found / len(expected), mean)


def mutated(text: str, similarity: float, rng: random.Random) -> str:
    """About so similar by its 5-grams: words are exchanged, each of which spoils five of them."""
    words = text.split()
    spoilt = (len(words) - 4) * (1 - similarity) / (1 + similarity) / 5
    count = int(spoilt) + (rng.random() < spoilt % 1)
    step = len(words) // max(count, 1)
    for i in range(count):
        words[min(len(words) - 1, i * step + step // 2)] = f"other{rng.random()}".replace(".", "")
    return " ".join(words)


def test_minhash_agrees_with_datasketch() -> None:
    """The estimates of similarity by two libraries, over the same pairs, are equally good."""
    datasketch = pytest.importorskip("datasketch")
    near, rng = Near(bands=16, rows=8), random.Random(1)
    ours, theirs = [], []
    for text in real_texts(150):
        other = mutated(text, 0.7, rng)
        a, b = grams(text, 5), grams(other, 5)
        s = len(a & b) / len(a | b)
        signatures = dedup._min_hashes(*shingles([text, other], 5), near)
        ours.append(float((signatures[0] == signatures[1]).mean()) - s)
        hashes = [datasketch.MinHash(num_perm=128, seed=1), datasketch.MinHash(num_perm=128, seed=1)]
        for minhash, set_ in zip(hashes, (a, b), strict=True):
            minhash.update_batch([" ".join(gram).encode() for gram in set_])
        theirs.append(hashes[0].jaccard(hashes[1]) - s)
    assert abs(np.mean(ours)) < 0.015 and abs(np.mean(theirs)) < 0.015
    assert np.std(ours) < 1.3 * np.std(theirs)


def test_a_file_of_marks_gives_its_ranges(tmp_path: Path) -> None:
    marks = exact_marks([f"text {i}" for i in range(5000)])
    write_marks(tmp_path / "exact.marks", marks)
    edges = [0, 1, 100, 101, 2048, 4096]
    parts = [read_marks(tmp_path / "exact.marks", a, b) for a, b in itertools.pairwise(edges)]
    assert sorted(np.concatenate(parts).tolist()) == sorted(marks.tolist())
    for (a, b), part in zip(itertools.pairwise(edges), parts, strict=True):
        assert (part["key"] >> np.uint64(52) >= a).all() and (part["key"] >> np.uint64(52) < b).all()
    (tmp_path / "exact.marks").write_bytes((tmp_path / "exact.marks").read_bytes()[:-1])
    with pytest.raises(Exception, match=r"exact\.marks: damaged: \d+ bytes where \d+ were expected; remove its folder"):
        read_marks(tmp_path / "exact.marks", 0, 4096)


# --- preparations ---------------------------------------------------------------------------------------------------

CONFIG = {
    "name": "small",
    "out": "out",
    "tokenizer": {"kind": "train", "vocab_size": 400},
    "corpora": {
        "best": {"kind": "text_files", "paths": ["best/*.jsonl"]},
        "rest": {"kind": "text_files", "paths": ["rest/*.jsonl"]},
    },
    "dedup": {"near": None},
    "validation": {"fraction": 0},
    "slice_bytes": 20_000,
    "shard_bytes": 20_000,
    "block_tokens": 1024,
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with two corpora of three files each, and small.yaml."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(7)
    for corpus in ("best", "rest"):
        (tmp_path / corpus).mkdir()
        for f in range(3):
            texts = [sentences(rng.randint(0, 120), 12) for _ in range(30)]
            write_texts(tmp_path / corpus / f"{f}.jsonl", texts)
    write_config(CONFIG)
    return tmp_path


def write_texts(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def read_jsonl(folder: Path) -> list[list[str]]:
    files = sorted(folder.glob("*.jsonl"))
    return [[json.loads(line)["text"] for line in path.read_text().splitlines()] for path in files]


def write_config(config: dict[str, Any]) -> None:
    Path("small.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def load(*overrides: str) -> Preparation:
    return configs.load(Preparation, Path("small.yaml"), overrides)


def run(*overrides: str) -> list[Summary]:
    return prepare.run(load(*overrides))


def kept(corpus: str) -> list[str]:
    """The texts of a corpus' training blocks and tails, in order."""
    manifest = Manifest.open(Path("out") / corpus)
    tokenizer, stream = folder_tokenizer(manifest), []
    for generation in range(len(manifest.generations)):
        shards = manifest.shards("train", generation)
        for shard in range(len(shards)):
            blocks = shards.table["blocks"][shard].as_py()
            for row in range(blocks):
                stream += shards.member(shard, row)[:-1].tolist()
            if shards.table["tail_tokens"][shard].as_py():
                stream += shards.member(shard, blocks).tolist()
    ends = [i for i, id in enumerate(stream) if id == manifest.format.end_of_text]
    return [tokenizer.decode(stream[a + 1 : b]) for a, b in zip([-1, *ends], ends, strict=False)]


def contents() -> dict[str, str]:
    """Every file but those that tell who was at work, and the card, which shows the configuration as it is written."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "-"
        for path in sorted(Path("out").rglob("*"))
        if not path.name.endswith(".lease") and path.stem != "card"
    }


def documents(corpus: str) -> list[Document]:
    """Those that the first stage left, where it is kept."""
    folders = sorted(Path("out", corpus, "texts").glob("[!.]*"))
    return [document for folder in folders for document in dedup.read_texts(folder, corpus)]


def first_of_each(texts: list[str], seen: set[str]) -> list[str]:
    return [text for text in texts if not (text in seen or seen.add(text))]  # type: ignore[func-returns-value]


def test_the_first_of_equal_texts_stays_across_slices_and_corpora(here: Path) -> None:
    best, rest = run()
    seen: set[str] = set()
    expected = {c: first_of_each([t for file in read_jsonl(here / c) for t in file], seen) for c in ("best", "rest")}
    assert kept("best") == expected["best"] and kept("rest") == expected["rest"]
    assert best.dropped == {"duplicate": 90 - len(expected["best"])} and best.documents_read == 90
    assert rest.dropped == {"duplicate": 90 - len(expected["rest"])} and len(seen) < 120 < 180
    assert len(Manifest.open(here / "out/rest").table) >= 2
    assert not [line for folder in folders(here / "out") for line in verified(folder)]


def test_the_order_of_corpora_says_which_stays(here: Path) -> None:
    write_config({**CONFIG, "corpora": dict(reversed(CONFIG["corpora"].items()))})  # type: ignore[attr-defined]
    rest, best = run()
    assert kept("rest") == first_of_each([t for file in read_jsonl(here / "rest") for t in file], set())
    assert best.dropped["duplicate"] > rest.dropped["duplicate"]


def test_each_corpus_for_itself(here: Path) -> None:
    run("dedup.across=each")
    for corpus in ("best", "rest"):
        assert kept(corpus) == first_of_each([t for file in read_jsonl(here / corpus) for t in file], set())


def test_near_duplicates_go_with_all_that_they_hang_on(here: Path) -> None:
    for path in here.rglob("*.jsonl"):
        path.unlink()
    a = [f"word{i}" for i in range(400)]
    b, c = [*a[6:], *(f"more{i}" for i in range(6))], []
    c = [*b[6:], *(f"last{i}" for i in range(6))]
    chain = [" ".join(words) for words in (a, b, c)]
    other = sentences(5, 40)
    write_texts(here / "best/0.jsonl", [chain[2], other, other, other.upper(), other])
    write_texts(here / "rest/0.jsonl", [])
    write_texts(here / "rest/1.jsonl", [chain[1], chain[0], sentences(6, 40), "!", "?"])
    near = "dedup.near={bands: 20, rows: 4, ngram_words: 5}"
    best, rest = run(near, "slice_bytes=2000", "dedup.keep_texts=true")
    assert kept("best") == [chain[2], other] and kept("rest") == [sentences(6, 40), "!", "?"]
    assert best.dropped == {"duplicate": 2, "near duplicate": 1} and rest.dropped == {"near duplicate": 2}
    rows = [row for path in here.glob("out/*/slices/*/dropped.parquet") for row in pq.read_table(path).to_pylist()]
    of_line = {document.text: f"best: {document.id}" for document in reversed(documents("best"))}
    stays = Counter((row["reason"], row["stays"]) for row in rows)
    same, nearly = of_line[other], of_line[chain[2]]
    assert stays == {("duplicate", same): 2, ("near duplicate", same): 1, ("near duplicate", nearly): 2}
    assert all(row["text"] for row in rows)


def test_empty_corpora(here: Path) -> None:
    for path in here.rglob("rest/*.jsonl"):
        write_texts(path, [])
    best, rest = run("dedup.near={}")
    assert rest.documents == 0 and best.documents > 0 and rest.dropped == {}


def test_running_again_does_nothing_and_texts_are_removed_after_the_seal(here: Path) -> None:
    first = run("dedup.near={}")
    before = {path: path.stat().st_mtime_ns for path in (here / "out").rglob("*") if path.is_file()}
    assert not list((here / "out").rglob("texts.parquet")) and not list((here / "out").rglob("pairs"))
    assert run("dedup.near={}") == first
    assert {path: path.stat().st_mtime_ns for path in (here / "out").rglob("*") if path.is_file()} == before
    assert all(not stage.missing for stage in prepare.stages(load("dedup.near={}")))


def test_texts_can_be_kept(here: Path) -> None:
    run("dedup.keep_texts=true")
    texts = [document.text for document in documents("best")]
    assert texts == list(itertools.chain(*read_jsonl(here / "best")))


def test_later_inputs_lose_what_is_sealed_already_and_take_nothing_back(here: Path) -> None:
    run()
    before = {name: hash for name, hash in contents().items() if "/slices/" in name}
    old = {"best": kept("best"), "rest": kept("rest")}
    fresh = [sentences(1000, 5), old["rest"][0], old["best"][0], sentences(1000, 5), sentences(1001, 5)]
    write_texts(here / "best/9.jsonl", fresh)
    run()
    assert kept("rest") == old["rest"] and kept("best") == [*old["best"], sentences(1000, 5), sentences(1001, 5)]
    after = contents()
    assert {name: after[name] for name in before} == before
    write_texts(here / "rest/9.jsonl", [sentences(1001, 5), sentences(1002, 5)])
    run()
    assert kept("rest") == [*old["rest"], sentences(1002, 5)]
    assert not [line for folder in folders(here / "out") for line in verified(folder)]


def test_a_sealed_slice_that_is_lost_is_made_again_the_same(here: Path) -> None:
    run()
    whole = contents()
    shutil.rmtree(here / "out/rest/slices/0-00001")
    run()
    assert contents() == whole


def test_inputs_that_come_before_the_seal_change_only_the_slices_concerned(here: Path) -> None:
    for name, tasks in (("texts", 100), ("buckets", 1), ("clusters", 1), ("slices", 100)):
        count = next(stage.tasks for stage in prepare.stages(load()) if stage.name == name)
        prepare.run_stage(load(), name, 0, min(count, tasks) - 1)
    made = {path.parent.name: path.stat().st_mtime_ns for path in here.glob("out/rest/slices/*/slice.json")}
    best, rest = (list(itertools.chain(*read_jsonl(here / corpus))) for corpus in ("best", "rest"))
    lost = next(text for text in rest if text not in best)
    write_texts(here / "best/9.jsonl", [lost])
    run()
    now = {path.parent.name: path.stat().st_mtime_ns for path in here.glob("out/rest/slices/*/slice.json")}
    assert lost in kept("best") and lost not in kept("rest")
    assert 0 < sum(now[name] != made[name] for name in made) < len(made)


COMMAND = [sys.executable, "-m", "data_pipeline.cli", "run", "small.yaml", "workers=2", "dedup.near={}"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.mark.timeout(600)
def test_the_bytes_depend_on_neither_workers_nor_tasks_nor_the_order_of_inputs_nor_kills(here: Path) -> None:
    near = "dedup.near={}"
    run(near)
    whole = contents()
    shutil.rmtree("out")
    paths = 'corpora.rest.paths=["rest/2.jsonl", "rest/0.jsonl", "rest/1.jsonl"]'
    for stage in prepare.stages(load(near, paths)):
        for number in reversed(range(stage.tasks)):
            prepare.run_stage(load(near, paths), stage.name, number, number)
    assert contents() == whole
    shutil.rmtree("out")
    names = ("texts", "buckets", "clusters", "slices")
    for name in names:
        failing = {**ENVIRONMENT, "LONGHAUL_FAIL_AT": f"{name}.written=kill"}
        failed = subprocess.run(COMMAND, env=failing, capture_output=True, text=True)
        assert failed.returncode == 1 and "its worker died" in failed.stderr, failed.stderr
    failing = {**ENVIRONMENT, "LONGHAUL_FAIL_AT": ";".join(f"{name}.published=kill" for name in names)}
    done = subprocess.run(COMMAND, env=failing, capture_output=True, text=True)  # each worker dies after its first
    assert done.returncode == 0 and "once more in a fresh process" in done.stderr, done.stderr
    assert contents() == whole


def test_a_stage_out_of_turn_is_said(here: Path) -> None:
    stages = [stage.name for stage in prepare.stages(load())]
    assert stages == ["texts", "buckets", "clusters", "slices", "seal"]
    with pytest.raises(
        Exception, match=r"out/best/texts/0-00000: not made; the stage texts comes before the stage buck"
    ):
        prepare.run_stage(load(), "buckets", 0, 0)
    with pytest.raises(
        Exception, match=r"buckets/0-00000: not made; the stage buckets comes before the stage clusters"
    ):
        prepare.run_stage(load(), "clusters", 0, 0)
    with pytest.raises(Exception, match=r"out/best/texts/0-00000: not made, or its duplicates not sought yet"):
        prepare.run_stage(load(), "slices", 0, 0)


def test_nothing_to_seek_is_refused(here: Path) -> None:
    with pytest.raises(ConfigError, match="neither exact nor near duplicates are asked for; leave `dedup` out"):
        load("dedup.exact=false")


def test_many_pairs_in_small_portions_give_the_same_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a plain union of sets."""
    rng = random.Random(2)
    pairs = np.array([sorted(rng.sample(range(600), 2)) for _ in range(500)], np.uint64)
    sets = {i: {i} for i in range(600)}
    for a, b in pairs.tolist():
        union = sets[a] | sets[b]
        sets.update(dict.fromkeys(union, union))
    expected = {(min(sets[i]), i) for i in range(600) if min(sets[i]) != i}
    forest = np.empty((0, 2), np.uint64)
    for part in np.array_split(pairs, 7):
        forest = duplicates._forest(np.concatenate([forest, part]))
    assert {tuple(edge) for edge in forest.tolist()} == expected
