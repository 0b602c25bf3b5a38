"""The plan of the house, held: doors, import directions, the config's rules, quick commands."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
from pydantic import BeforeValidator

import configs
from configs import Section, leaf_paths
from data_pipeline.preparation import Preparation
from launch.cli import Where
from pretrain.fields import CLASSES, field_class
from pretrain.models import Model
from pretrain.prompts import Shots
from pretrain.run import TrainRun

ROOT = Path(__file__).parents[1]
ROOMS = ["configs", "data_pipeline", "pretrain", "launch"]  # each may import from those before it
DOORS = {
    "webdataset": "data_pipeline/shards.py",
    "tokenizers": "data_pipeline/tokenizer.py",
    "sklearn": "data_pipeline/classifier.py",
    "fasttext": "data_pipeline/language.py",
    "deepspeed": "pretrain/engine/zero.py",
    "mlflow": "pretrain/track/mlflow.py",
    "lm_eval": "pretrain/harness.py",
    "transformers": "pretrain/export.py",
    "submitit": "launch/slurm.py",
    "matplotlib": "pretrain/plots.py",
    "pynvml": "pretrain/track/system.py",
}
PARSERS = {int: configs.parse_int, float: configs.parse_float, bool: configs.parse_bool}


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> Iterator[str]:
    """The first name of every import of a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno}: a relative import"
            yield (node.module or "").split(".")[0]


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", DOORS)
def test_one_door_per_library(library: str) -> None:
    assert [name(path) for path in files(*ROOMS) if library in imported(path)] == [DOORS[library]]


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_lies_before_them(room: str) -> None:
    later = {*ROOMS[ROOMS.index(room) + 1 :], "tests", "benchmarks"}
    assert [(name(path), found) for path in files(room) for found in imported(path) if found in later] == []


def test_every_module_says_what_it_is() -> None:
    modules = [path for path in files(*ROOMS, "benchmarks") if path.read_text(encoding="utf-8").strip()]
    assert [name(path) for path in modules if not ast.get_docstring(ast.parse(path.read_bytes()))] == []


def test_files_are_named_by_what_they_hold() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [name(path) for path in files(*ROOMS, "tests", "benchmarks") if path.stem in vague] == []


# --- configs --------------------------------------------------------------------------------------------------------


class AnyModel(Section):
    """A model file is a section of a run."""

    model: Model


def load(path: Path) -> Section:
    folder = path.parent.relative_to(configs.CONFIGS).as_posix()
    if folder == "model":
        return configs.build(AnyModel, {"model": str(path)}, "test")
    if folder == "cluster":
        return configs.build(Where, {"launcher": str(path)}, "test")
    if folder == "data":
        return configs.load(Preparation, path)
    if folder == "prompts":
        return configs.load(Shots, path)
    assert folder == ".", f"configs/{folder}: which class loads it?"
    return configs.load(TrainRun, path)


@pytest.mark.parametrize("path", configs.all_files(), ids=lambda path: path.relative_to(configs.CONFIGS).as_posix())
def test_every_config_is_loaded(path: Path) -> None:
    loaded = load(path)
    assert configs.build(type(loaded), loaded.model_dump(mode="json"), "dumped") == loaded


def sections() -> list[type[Section]]:
    """Every config class of the project."""
    for path in files(*ROOMS):
        if path.name not in ("__main__.py", "__init__.py"):
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    found, queue = [], [Section]
    while queue:
        subclasses = [c for c in queue.pop().__subclasses__() if c.__module__.split(".")[0] in ROOMS]
        found += subclasses
        queue += subclasses
    return found


def bare(annotation: Any, metadata: tuple[Any, ...] = ()) -> bool:
    """Whether an annotation holds a number or flag that is not read by our parser."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return bare(inner, (*metadata, *more))
    if annotation in PARSERS:
        return not any(isinstance(m, BeforeValidator) and m.func is PARSERS[annotation] for m in metadata)
    return any(bare(argument) for argument in get_args(annotation) if get_origin(annotation) is not None)


def test_numbers_and_flags_are_read_by_our_parsers() -> None:
    assert len(sections()) > 20
    assert [
        f"{section.__module__}.{section.__name__}.{field}: write configs.Int, Float or Bool"
        for section in sections()
        for field, info in section.model_fields.items()
        if bare(info.annotation, tuple(info.metadata))
    ] == []


def test_bare_numbers_are_found() -> None:
    class Careless(Section):
        good: configs.Int | None = None
        many: list[configs.Float] = []  # noqa: RUF012
        number: int = 0
        numbers: dict[str, float] = {}  # noqa: RUF012
        flag: bool | None = None

    fields = Careless.model_fields.items()
    assert [f for f, info in fields if bare(info.annotation, tuple(info.metadata))] == ["number", "numbers", "flag"]


def test_every_field_of_a_run_has_a_class() -> None:
    assert {field_class(path) for path in leaf_paths(TrainRun)} == {"identity", "segment", "free"}


@pytest.mark.parametrize("entry", CLASSES)
def test_every_class_is_of_a_field(entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without:
        without.delitem(CLASSES, entry)
        before = {path: _class_or_none(path) for path in leaf_paths(TrainRun)}
        without.setitem(CLASSES, entry, "removed")
        after = {path: _class_or_none(path) for path in leaf_paths(TrainRun)}
    assert before != after, f"{entry} covers no field"


def _class_or_none(path: str) -> str | None:
    try:
        return field_class(path)
    except KeyError:
        return None


# --- commands -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", ["data_pipeline", "pretrain", "launch"])
def test_help_is_quick(room: str) -> None:
    program = (
        f"import sys; from {room}.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit as done: assert not done.code\n"
        "heavy = {'torch', 'mlflow', 'transformers', 'lm_eval', 'deepspeed', 'tokenizers', 'pyarrow'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert "Usage" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
