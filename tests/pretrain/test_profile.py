from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs import ConfigError, build
from pretrain.profile import BESIDES, Profile, breakdown, merged, overlap
from tests.runs import TORCH, Started, write_run


def event(name: str, begin: float, end: float, own: float = 0.0) -> Any:
    """What torch's profiler says of a span, in microseconds."""
    span, device = SimpleNamespace(start=begin, end=end), torch._C._autograd.DeviceType.CPU
    return SimpleNamespace(name=name, time_range=span, device_type=device, self_cpu_time_total=own)


def test_a_profiled_run_says_where_a_step_goes(tmp_path: Path) -> None:
    overrides = ["profile.steps=[3, 5]", "preflight.enabled=false", "evaluation.every_steps=4"]
    started = Started(write_run(tmp_path, TORCH, steps=8), 2, *overrides)
    assert started.wait() == [0, 0], started.text
    folder = tmp_path / "run" / "profile"
    assert f"profile: {folder / 'steps-3-5.md'}" in started.text
    table = (folder / "steps-3-5.md").read_text().splitlines()
    assert table[0].startswith("Where a step goes (3 steps, ")
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in table if line.startswith("| ")}
    parts = ("data wait", "forward", "backward", "optimizer", "communication", "other")
    assert all(part in rows for part in parts)
    spent = {part: float(rows[part][0]) for part in parts}
    assert min(spent["forward"], spent["backward"], spent["optimizer"], spent["communication"]) > 0
    assert sum(float(rows[part][1].rstrip("%| ")) for part in parts) == pytest.approx(100, abs=0.5)
    assert "aten::addmm" in rows
    with gzip.open(folder / "steps-3-5.trace.json.gz") as trace:
        names = {entry.get("name") for entry in json.load(trace)["traceEvents"]}
    assert {"step: forward", "step: backward", "step: optimizer", "step: communication"} <= names


def test_waiting_for_others_is_communication_wherever_it_happens() -> None:
    spans = [
        event("step: forward", 0, 100), event("step: backward", 100, 300), event("gloo:all_reduce", 250, 320),
        event("step: communication", 300, 340), event("step: optimizer", 340, 400), event("aten::mm", 10, 60, own=50),
        event("aten::mm", 110, 190, own=70),
    ]  # fmt: skip
    found = breakdown(spans, 1, whole=500e-6, waited=20e-6)
    expected = {"data wait": 20, "forward": 100, "backward": 150, "optimizer": 60, "communication": 90, "other": 80}
    assert found.parts == pytest.approx({part: us / 1e6 for part, us in expected.items()})
    if torch.cuda.is_available():
        return  # there, kernels are listed
    [(name, seconds, calls)] = found.operators
    assert (name, calls) == ("aten::mm", 2) and seconds == pytest.approx(120e-6)


def test_what_is_done_between_steps_is_no_part_of_them() -> None:
    spans = [
        event("step: forward", 0, 100), event(BESIDES, 100, 400), event("step: communication", 150, 250),
        event("aten::mm", 110, 390, own=280), event("step: forward", 400, 500),
    ]  # fmt: skip
    found = breakdown(spans, 2, whole=600e-6, waited=0.0)
    assert sum(found.parts.values()) == pytest.approx(300e-6) and found.parts["forward"] == pytest.approx(200e-6)
    assert found.parts["communication"] == 0 and not found.operators


def test_spans() -> None:
    assert merged([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    assert overlap([(0, 4), (10, 12)], [(3, 11)]) == 2
    assert overlap([(0, 1)], [(1, 2)]) == 0


@pytest.mark.parametrize("steps", [[0, 3], [5, 4]])
def test_steps_are_in_order(steps: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"steps: expected \[first, last\] from 1 on, such as \[100, 105\], got \["):
        build(Profile, {"steps": steps}, "test")
