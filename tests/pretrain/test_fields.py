from __future__ import annotations

from typing import Any

import pytest

from configs import ConfigError
from pretrain.fields import FieldClass, check_same_run, field_class

RECORDED: dict[str, Any] = {
    "seed": 1,
    "model": {"kind": "gpt", "layers": 2},
    "data": {"seq_tokens": 64, "sources": {"wiki": {"shards": "/a", "weight": 0.5}}},
    "optim": {"kind": "adamw", "lr_peak": 0.1},
    "engine": {"kind": "torch", "precision": "fp32"},
    "track": [],
}


def with_value(path: str, value: Any) -> dict[str, Any]:
    """RECORDED with another value at a path."""
    head, _, rest = path.partition(".")

    def changed(tree: dict[str, Any], keys: list[str]) -> dict[str, Any]:
        return {**tree, keys[0]: changed(tree.get(keys[0], {}), keys[1:]) if len(keys) > 1 else value}

    return changed(RECORDED, [head, *rest.split(".")] if rest else [head])


@pytest.mark.parametrize(
    ("path", "its_class"),
    [
        ("seed", "identity"),
        ("model.layers", "identity"),
        ("data.sources.wiki.weight", "segment"),
        ("data.sources.wiki.shards", "free"),
        ("optim.lr_peak", "segment"),
        ("optim.kind", "identity"),
        ("engine.kind", "free"),
        ("engine.precision", "identity"),
        ("track", "free"),
        ("track.0.kind", "free"),
    ],
)
def test_the_longest_entry_decides(path: str, its_class: FieldClass) -> None:
    assert field_class(path) == its_class


@pytest.mark.parametrize("path", ["dropout", "data", "data.sources", "data.shuffle"])
def test_a_field_without_a_class_is_an_error(path: str) -> None:
    with pytest.raises(KeyError, match=f"{path} has no class: add it to CLASSES"):
        field_class(path)


@pytest.mark.parametrize(
    ("path", "value"),
    [("engine.kind", "deepspeed"), ("data.sources.wiki.shards", "/b"), ("track", [{"kind": "mlflow"}]), ("seed", 1)],
)
def test_what_is_free_may_differ(path: str, value: Any) -> None:
    check_same_run(RECORDED, with_value(path, value), "runs/a")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("seed", 2, "runs/a: seed: 1 -> 2: is part of what this run is; give another run_folder to start a new run"),
        (
            "model.layers",
            3,
            "runs/a: model.layers: 2 -> 3: is part of what this run is; give another run_folder to start a new run",
        ),
        (
            "engine.precision",
            "bf16",
            "runs/a: engine.precision: fp32 -> bf16: is part of what this run is; "
            "give another run_folder to start a new run",
        ),
        (
            "optim.lr_peak",
            0.2,
            "runs/a: optim.lr_peak: 0.1 -> 0.2: changes the course of this run; use `pretrain amend RUN key=value`",
        ),
        (
            "data.sources.books.weight",
            1.0,
            "runs/a: data.sources.books.weight: (absent) -> 1.0: changes the course of this run; "
            "use `pretrain amend RUN key=value`",
        ),
    ],
)
def test_what_is_not_free_may_not_differ(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_same_run(RECORDED, with_value(path, value), "runs/a")
    assert str(error.value) == message
