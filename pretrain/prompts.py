"""Prompts from files: many at once; and a few examples before a question, with or without steps to its answer.

Examples before the question are GPT-3's few-shot setting (Brown et al. 2020, section 2); worked-out answers in them are
chains of thought (Wei et al. 2022); a suffix as "Let's think step by step." asks for them without examples (Kojima et
al. 2022).
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import field_validator

from configs import ConfigError, Section


class Example(Section):
    """A question with its answer, which may show the steps to it."""

    question: str
    answer: str


class Shots(Section):
    """How a question is put: after an instruction and examples, in their form, with the beginning of its answer."""

    instruction: str = ""
    examples: tuple[Example, ...] = ()
    question: str = "Q: {}"  # {} is where its text stands
    answer: str = "A: {}"
    between: str = "\n\n"  # instruction, examples and question
    begin_answer: str = ""  # what the answer asked for begins with, such as "Let's think step by step."
    stop: tuple[str, ...] = ()  # where it ends, besides the end of the text

    @field_validator("question", "answer")
    @classmethod
    def _has_one_place(cls, form: str) -> str:
        if form.count("{}") != 1:
            raise ValueError(f"expected {{}} once, where the text stands, got {form!r}")
        return form

    def prompt(self, question: str) -> str:
        """The whole prompt; it ends where the answer goes on, without a space at its end, as tokens begin with one."""
        blocks = [self.instruction] if self.instruction else []
        blocks += [f"{self._question(e.question)}\n{self.answer.replace('{}', e.answer)}" for e in self.examples]
        answer = self.answer.partition("{}")[0] + self.begin_answer
        return self.between.join([*blocks, f"{self._question(question)}\n{answer}"]).rstrip(" ")

    def _question(self, text: str) -> str:
        return self.question.replace("{}", text)


def read_prompts(path: Path) -> list[str]:
    """One prompt per line; of a .jsonl, strings or objects with a "prompt". Empty lines are none.

    Raises ConfigError.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8") from None
    numbered = [(number, line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ConfigError(f"{path}: no prompts")
    if path.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_prompt(line, f"{path}:{number}") for number, line in numbered]


def _prompt(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError:
        raise ConfigError(f"{where}: not JSON") from None
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise ConfigError(f'{where}: expected a string, or an object with a string "prompt"')
    return prompt
