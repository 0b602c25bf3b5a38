from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs import CONFIGS, ConfigError, build, load
from pretrain.cli import app
from pretrain.prompts import Shots, read_prompts
from tests.pretrain.finished_run import finished

FORM = {
    "instruction": "Add.",
    "examples": [{"question": "1 + 1", "answer": "2"}, {"question": "{}?", "answer": "one {} brace"}],
    "begin_answer": "Let's think step by step. ",
}


def test_examples_stand_before_the_question_in_its_form() -> None:
    assert build(Shots, FORM, "test").prompt("2 + 3") == (
        "Add.\n\nQ: 1 + 1\nA: 2\n\nQ: {}?\nA: one {} brace\n\nQ: 2 + 3\nA: Let's think step by step."
    )
    assert Shots().prompt("why") == "Q: why\nA:"
    assert Shots(question="{}", answer="{}", between="\n").prompt("why") == "why\n"


def test_a_form_has_one_place_for_its_text() -> None:
    with pytest.raises(ConfigError, match=r"^test: question: .*expected {} once, where the text stands, got 'Q:'"):
        build(Shots, {"question": "Q:"}, "test")


def test_the_prompts_of_the_house_are_forms() -> None:
    for path in (CONFIGS / "prompts").glob("*.yaml"):
        assert load(Shots, path).prompt("How many?").count("How many?") == 1


def test_prompts_of_a_file(tmp_path: Path) -> None:
    plain, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_bytes(b"one \r\n\n{two}\n  three")
    lines.write_text('"a\\nb"\n{"prompt": "c", "id": 1}\n')
    assert read_prompts(plain) == ["one ", "{two}", "  three"]
    assert read_prompts(lines) == ["a\nb", "c"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [("p.txt", "\n \n", "no prompts"), ("p.jsonl", "a", ":1: not JSON"),
     ("p.jsonl", '"a"\n{"text": 1}', ':2: expected a string, or an object with a string "prompt"'),
     ("none.txt", None, "cannot be read: No such file or directory")],
)  # fmt: skip
def test_a_bad_file_of_prompts_is_one_line(name: str, text: str | None, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        read_prompts(tmp_path / name)
    assert str(error.value) == f"{tmp_path / name}{'' if said.startswith(':') else ': '}{said}"


def test_the_command(tmp_path: Path) -> None:
    """A file of questions, examples before them, two texts each, for programs; the same as one by one."""
    run, _ = finished(tmp_path / "run")
    (tmp_path / "form.yaml").write_text("examples: [{question: boat, answer: shore}]\nstop: ['Q:']\n")
    (tmp_path / "ask.txt").write_text("river\nday\n")
    common = ["--max-tokens", "8", "--temperature", "0.9", "--shots", str(tmp_path / "form.yaml")]

    def say(*more: str) -> str:
        done = CliRunner().invoke(app, ["generate", str(run.run_folder), *more, *common])
        assert done.exit_code == 0, done.output
        return done.stdout

    found = [
        json.loads(line) for line in say("--file", str(tmp_path / "ask.txt"), "--samples", "2", "--json").splitlines()
    ]
    assert [each["seed"] for each in found] == [0, 1, 2, 3]
    assert found[2]["prompt"] == "Q: boat\nA: shore\n\nQ: day\nA:"
    assert {each["checkpoint"] for each in found} == {"step-10.b1"}
    assert say("day", "--seed", "2") == found[2]["prompt"] + found[2]["text"] + "\n"
    blocks = say("--file", str(tmp_path / "ask.txt"), "--samples", "2")
    assert f"--- 3 of 4, seed 2\n{found[2]['prompt']}{found[2]['text']}\n" in blocks
    both = CliRunner().invoke(app, ["generate", str(run.run_folder), "x", "--file", str(tmp_path / "ask.txt")])
    assert str(both.exception) == "--file: give a prompt or a file of prompts, got both"
