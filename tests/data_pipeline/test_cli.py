"""The command as a person runs it."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import configs
from data_pipeline.cli import app
from data_pipeline.preparation import Preparation
from data_pipeline.summary import verified
from tests.data_pipeline.inputs import sentences
from tests.data_pipeline.servers import Server

ROOT = Path(__file__).parents[2]


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "data_pipeline.cli", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a prepared corpus in out/, and its small.yaml."""
    folder = tmp_path_factory.mktemp("cli")
    rows = [{"text": sentences(i, 10), "id": f"row-{i}", "url": f"https://e.org/{i}"} for i in range(200)]
    rows.append({"text": "", "id": "none", "url": "https://e.org/none"})
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nbad\n")
    mine = {"kind": "text_files", "paths": ["mine.jsonl"], "id_field": "id", "uri_field": "url"}
    config = {
        "name": "small",
        "out": "out",
        "tokenizer": {"kind": "train", "vocab_size": 400, "sample_bytes": "200Ki"},
        "corpora": {"mine": mine},
        "validation": {"fraction": 0.1},
        "block_tokens": 1024,
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(config))
    done = command("run", "small.yaml", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_run_ends_with_a_table_on_stdout(folder: Path) -> None:
    done = command("run", "small.yaml", folder=folder)
    rows = {line[:36].strip(): line[36:].strip() for line in done.stdout.splitlines()}
    names = list(rows)
    assert done.stdout.splitlines()[0].strip() == "mine"
    table = {name: value for line in done.stdout.splitlines() for name, _, value in [line.strip().rpartition("  ")]}
    table = {name.strip(): value.strip() for name, value in table.items()}
    assert table["documents read"] == "201" and table["documents kept"] == "200"
    assert table["dropped: empty"] == "1" and table["set aside: not JSON (Expecting value)"] == "1"
    assert any(name.startswith("characters per token") for name in names)
    assert done.stdout.splitlines()[-1].endswith(" s")
    assert done.stderr == ""


def test_json_says_the_same(folder: Path) -> None:
    shown = json.loads(command("run", "small.yaml", "--json", folder=folder).stdout)
    mine = shown["corpora"]["mine"]
    assert mine["documents"] == 200 and mine["dropped"] == {"empty": 1} and shown["seconds"] >= 0
    assert mine["tokens"] == mine["train_tokens"] + mine["validation_tokens"]
    inspected = json.loads(command("inspect", "out", "--json", "--samples", "2", folder=folder).stdout)["mine"]
    assert {k: v for k, v in inspected.items() if k != "samples"} == mine and len(inspected["samples"]) == 2


def test_inspect_shows_texts_with_where_they_came_from(folder: Path) -> None:
    done = command("inspect", "small.yaml", "--samples", "4", folder=folder)
    heads = [line for line in done.stdout.splitlines() if line.startswith("--- ")]
    assert len(heads) == 4 and heads[0].startswith("--- mine: 0-00000/train-00000 row 0: row-")
    number = heads[0].partition("row-")[2].partition(",")[0]
    assert heads[0].endswith(f" tokens, https://e.org/{number}")
    shown = done.stdout.splitlines()[done.stdout.splitlines().index(heads[0]) + 1]
    assert len(shown) > 100 and sentences(int(number), 10).startswith(shown[:100])


def test_inspect_finds_documents(folder: Path) -> None:
    words = sentences(42, 10)
    done = command("inspect", "out", "--doc", "row-42", folder=folder)
    head, origin, place, text, *_ = done.stdout.splitlines()
    assert (head, text) == ("--- mine: row-42  https://e.org/42", words)
    assert origin.startswith("    from mine.jsonl at byte ") and re.fullmatch(
        r" +\d+ tokens: mine:\S+ to mine:\S+", place
    )
    (found,) = json.loads(command("inspect", "out", "--search", words[60:110], "--json", folder=folder).stdout)
    assert found["id"] == "row-42" and words[60:110] in found["text"]
    at = json.loads(command("inspect", "out", "--token", found["first_token"], "--json", folder=folder).stdout)
    assert at["document"]["id"] == "row-42" and words.startswith(at["piece"])
    empty = (folder / "mine.jsonl").read_bytes().index(b'{"text": ""')
    assert command("inspect", "out", "--dropped", "empty", folder=folder).stdout.splitlines()[:3] == [
        "--- mine: none  https://e.org/none", "    empty, 0 characters",
        f"    from mine.jsonl at byte {empty}",
    ]  # fmt: skip
    none = command("inspect", "out", "--search", "no such words", folder=folder)
    assert (none.returncode, none.stdout, none.stderr) == (1, "", "data-prep: no text contains 'no such words'\n")


def test_inspect_of_a_corpus_on_a_server_says_the_same(folder: Path) -> None:
    server = Server()
    files = {path.relative_to(folder / "out"): path for path in (folder / "out").rglob("*") if path.is_file()}
    server.files = {f"/out/{name}": path.read_bytes() for name, path in files.items()}

    def said(*arguments: str) -> list[str]:
        results = [CliRunner().invoke(app, ["inspect", *arguments]) for arguments in (
            (str(folder / "out/mine"), *arguments), (f"{server.address}/out/mine", *arguments),
        )]  # fmt: skip
        assert [result.exit_code for result in results] == [0, 0], results
        return [result.stdout for result in results]

    try:
        place = json.loads(said("--doc", "row-42", "--json")[0])[0]["last_token"]
        for arguments in (
            ("--samples", "2"), ("--doc", "row-42"), ("--token", place), ("--search", sentences(42, 10)[60:110]),
            ("--dropped", "empty"),
        ):  # fmt: skip
            here, there = said(*arguments)
            assert there == here and len(here) > 50
        refused = CliRunner().invoke(app, ["inspect", f"{server.address}/none"]).exception
        assert str(refused).startswith(f"{server.address}/none: no MANIFEST.json: not a corpus")
    finally:
        server.close()


def test_print_config_can_be_loaded_again(folder: Path, tmp_path: Path) -> None:
    done = command("run", "small.yaml", "workers=3", "--print-config", folder=folder)
    (tmp_path / "again.yaml").write_text(done.stdout)
    assert configs.load(Preparation, tmp_path / "again.yaml").workers == 3


def test_dry_run_writes_nothing(folder: Path) -> None:
    done = command("run", "small.yaml", "out=elsewhere", "--dry-run", folder=folder)
    assert done.returncode == 0 and not (folder / "elsewhere").exists()
    shown = json.loads(command("run", "small.yaml", "--dry-run", "--json", folder=folder).stdout)
    assert shown["mine"]["inputs"] == 1 and shown["mine"]["slices"] == shown["mine"]["slices_made"] == 1
    assert shown["mine"]["input_bytes"] == (folder / "mine.jsonl").stat().st_size
    made = json.loads(command("run", "small.yaml", "--json", folder=folder).stdout)["corpora"]["mine"]
    assert shown["mine"]["tokens"] == made["tokens"]  # all was tried
    assert shown["mine"]["core_seconds"] == 0  # all is made
    assert 0.4 < shown["mine"]["shard_bytes"] / made["bytes"] < 1.6  # blocks of 1,024 tokens have much around them
    table = command("run", "small.yaml", "out=elsewhere", "--dry-run", folder=folder).stdout
    assert [line[:28].strip() for line in table.splitlines()[1:]] == [
        "inputs", "input bytes", "slices", "slices made", "text kept, about", "documents kept, about", "tokens, about",
        "time left on one core, about", "with the config's workers", "disk for shards, about",
        "memory of a worker, about", "from a trial on",
    ]  # fmt: skip


def test_tokenizer_says_where_it_is(folder: Path) -> None:
    done = command("tokenizer", "small.yaml", folder=folder)
    assert done.stdout.startswith("out/tokenizer.json  400 entries  sha256 ") and done.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["run", "none.yaml"], 2, "none.yaml: no such file"),
        (["run", "small.yaml", "worker=2"], 2, "command line (worker=2): worker: unknown key; did you mean workers?"),
        (["run", "small.yaml", "validation.fraction=0.2"], 2, "out/mine: was prepared with another configuration: "
         "validation.fraction: 0.1 -> 0.2; use another `out`, or put it back"),
        (["work", "small.yaml", "--stage", "slice", "--tasks", "0"], 2, "--stage slice: expected slices or seal"),
        (["work", "small.yaml", "--tasks", "x"], 2,
         "--tasks: expected first-last such as 0-9, or a share such as 0/16, got 'x'"),
        (["work", "small.yaml", "--tasks", "4/4"], 2, "--tasks: expected a share such as 0/4 to 3/4, got '4/4'"),
        (["work", "small.yaml", "--tasks", "0-7"], 2, "--tasks 0-7: the stage slices has the tasks 0-0"),
        (["verify", "nowhere"], 2, "nowhere: neither a config nor a folder of shards"),
        (["inspect", "nowhere"], 2, "nowhere: neither a config nor a folder of shards"),
        (["inspect", "out", "--dropped", "long"], 2, "--dropped long: nothing was; the reasons here are empty"),
        (["inspect", "out", "--doc", "a", "--search", "b"], 2, "expected one of --search, --doc, --dropped and "
         "--token, with what to look for"),
        (["run", "small.yaml", "out=/proc/nowhere"], 1, None),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(folder: Path, arguments: list[str], code: int, said: str | None) -> None:
    done = command(*arguments, folder=folder)
    assert done.returncode == code and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("data-prep: ") and (said is None or line == f"data-prep: {said}")


def test_a_mistaken_option_is_2(folder: Path) -> None:
    assert command("run", "--no-such", folder=folder).returncode == 2


def test_verify_finds_any_changed_byte(folder: Path) -> None:
    assert command("verify", "out", folder=folder).stdout == "whole\n"
    rng = random.Random(3)
    loose = {"tokenizer.made.json", "card.json", "card.html"}
    files = sorted(path for path in (folder / "out").rglob("*") if path.is_file() and path.name not in loose)
    assert len(files) > 9
    for path in files:
        data = path.read_bytes()
        place = rng.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :])
        lines = list(verified(folder / "out/mine"))
        assert lines and path.name in lines[0], (path, place, lines)
        if path.suffix == ".tar":
            done = command("verify", "out", folder=folder)
            assert done.returncode == 1 and path.name in done.stdout
        path.write_bytes(data)
    assert command("verify", "small.yaml", folder=folder).stdout == "whole\n"


def test_an_unfinished_folder_is_told(folder: Path, tmp_path: Path) -> None:
    done = command("verify", "small.yaml", folder=folder)
    assert done.returncode == 0
    config = yaml.safe_load((folder / "small.yaml").read_text())
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({**config, "out": "unmade"}))
    done = command("verify", str(tmp_path / "other.yaml"), folder=folder)
    assert done.returncode == 1
    assert done.stdout == "unmade/mine: no MANIFEST.json: not a corpus, or not finished; run data-prep run\n"


@pytest.mark.parametrize(
    ("told", "code", "words"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 3, "stopped by SIGTERM")],
)
def test_told_to_stop_it_leaves_its_slices_at_once_and_says_how_to_go_on(
    folder: Path, told: signal.Signals, code: int, words: str
) -> None:
    rows = "".join(json.dumps({"text": sentences(i, 40)}) + "\n" for i in range(20_000))
    (folder / "large.jsonl").write_text(rows)
    overrides = ["out=large", "corpora.mine.paths=[large.jsonl]", "corpora.mine.id_field=null"]
    process = subprocess.Popen(
        [sys.executable, "-m", "data_pipeline.cli", "run", "small.yaml", *overrides, "corpora.mine.uri_field=null"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a suite in the background ignores
    )
    while not list(folder.glob("large/mine/slices/.tmp-*")):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, told)
    _, said = process.communicate()
    assert process.returncode == code
    assert said.splitlines()[-1] == f"data-prep: {words}; the same command goes on"
    assert not list(folder.glob("large/mine/slices/.*"))  # neither lease nor temporary folder: the next begins at once
