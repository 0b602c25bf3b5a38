"""Where a step goes: torch's profiler over the steps that a run asks for, and a table of its parts.

The parts are the engine's (`StepTimer.part`); communication is what the collectives took, wherever they ran, and is
taken out of the part that waited for it. Rank 0 is looked at: in a step of collectives the others are like it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

from configs import Int, Section
from pretrain.engine.state import PART, StepTimer

PARTS = ("data wait", "forward", "backward", "optimizer", "communication", "other")
COLLECTIVES = ("gloo:", "nccl")  # how their spans and kernels are called
BESIDES = PART + "besides"  # what is done between steps, evaluations and saves: no part of them
TOP = 12  # operators in the table
MEMORY_EVENTS = 200_000  # of the allocator, remembered for its snapshot

Span = tuple[float, float]  # begin and end in seconds


class Profile(Section):
    """Which steps are looked at, counted from 1 as the log counts them; null: none."""

    steps: tuple[Int, Int] | None = Field(default=None)  # first and last, both looked at

    @model_validator(mode="after")
    def _in_order(self) -> Profile:
        if self.steps is not None and not 0 < self.steps[0] <= self.steps[1]:
            raise ValueError(f"steps: expected [first, last] from 1 on, such as [100, 105], got {list(self.steps)}")
        return self


@dataclass(frozen=True)
class Breakdown:
    """Seconds by part of all steps, and the operators (on a GPU kernels) that took most: name, seconds, calls."""

    steps: int
    parts: dict[str, float]
    operators: list[tuple[str, float, int]]

    def table(self) -> str:
        """As Markdown: milliseconds per step and shares."""
        steps, whole = self.steps, sum(self.parts.values())
        lines = [f"Where a step goes ({steps} steps, {1e3 * whole / steps:.1f} ms each)", ""]
        lines += ["| part | ms per step | share |", "|---|---:|---:|"]
        lines += [f"| {part} | {1e3 * s / steps:.1f} | {s / whole:.1%} |" for part, s in self.parts.items()]
        lines += ["", "| operator | ms per step | share | calls per step |", "|---|---:|---:|---:|"]
        lines += [
            f"| {name} | {1e3 * s / steps:.1f} | {s / whole:.1%} | {calls / steps:.0f} |"
            for name, s, calls in self.operators
        ]
        return "\n".join(lines)


class Profiler:
    """Looks at the steps asked for; costs a comparison in all others."""

    def __init__(self, settings: Profile, folder: Path, rank: int, timer: StepTimer) -> None:
        """`folder` takes what is written; `timer` is the engine's, which names the parts of a step."""
        self.steps = settings.steps if rank == 0 else None
        self.folder, self.timer = folder, timer
        self._running: torch.profiler.profile | None = None
        self._first, self._begun, self._waited = 0, 0.0, 0.0

    def before(self, step: int, waited: float) -> None:
        """Step `step`, counted from 1, is about to be made, after `waited` seconds for its batch."""
        if self.steps is None or not self.steps[0] <= step <= self.steps[1]:
            return
        if self._running is None:
            self._start(step)
            self._begun -= waited
        self._waited += waited

    def besides(self) -> contextlib.AbstractContextManager[Any]:
        """Around what is done between steps and is no part of them."""
        return contextlib.nullcontext() if self._running is None else torch.profiler.record_function(BESIDES)

    def after(self, step: int) -> Path | None:
        """Step `step` has been made; the file with the table where it was the last one asked for."""
        if self._running is None or self.steps is None or step < self.steps[1]:
            return None
        return self.finish(step)

    def finish(self, step: int) -> Path | None:
        """Write down what has been seen up to `step`; None where nothing was looked at."""
        running, self._running = self._running, None
        if running is None:
            return None
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.synchronize()
        whole = time.perf_counter() - self._begun
        running.stop()
        self.timer.exact = False
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"steps-{self._first}-{step}"
        running.export_chrome_trace(str(self.folder / f"{name}.trace.json.gz"))
        if on_gpu:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"{name}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        found = breakdown(running.events() or [], step - self._first + 1, whole, self._waited)
        path = self.folder / f"{name}.md"
        path.write_text(found.table() + "\n", encoding="utf-8")
        return path

    def _start(self, step: int) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=MEMORY_EVENTS)
        self._running = torch.profiler.profile(activities=activities)
        self._running.start()
        self.timer.exact = True
        self._first, self._begun, self._waited = step, time.perf_counter(), 0.0


def breakdown(events: Iterable[Any], steps: int, whole: float, waited: float) -> Breakdown:
    """From a profiler's events, the seconds of the steps together and of their wait for data."""
    events = list(events)
    besides = merged(_span(event) for event in events if event.name == BESIDES and _on_cpu(event))
    whole -= sum(end - begin for begin, end in besides)
    spans: dict[str, list[Span]] = {}
    collectives: list[Span] = []
    operators: dict[str, tuple[float, int]] = {}
    on_gpu = torch.cuda.is_available()
    for event in events:
        span = _span(event)
        if any(begin <= span[0] < end for begin, end in besides):
            continue
        if event.name.startswith(PART):
            if _on_cpu(event):  # a GPU shows the same part a second time
                spans.setdefault(event.name.removeprefix(PART), []).append(span)
        elif event.name.startswith(COLLECTIVES):
            collectives.append(span)
        seconds = _own_seconds(event, on_gpu)
        if seconds and not event.name.startswith(PART):
            before = operators.get(event.name, (0.0, 0))
            operators[event.name] = (before[0] + seconds, before[1] + 1)
    collectives = merged([*collectives, *spans.pop("communication", [])])
    parts = {part: sum(e - b for b, e in of) - overlap(of, collectives) for part, of in spans.items()}
    parts |= {"data wait": waited, "communication": sum(end - begin for begin, end in collectives)}
    known = {part: max(parts.get(part, 0.0), 0.0) for part in PARTS[:-1]}
    known["other"] = max(whole - sum(known.values()), 0.0)
    most = sorted(operators.items(), key=lambda item: -item[1][0])[:TOP]
    return Breakdown(steps, known, [(name, seconds, calls) for name, (seconds, calls) in most])


def _own_seconds(event: Any, on_gpu: bool) -> float:
    """What a kernel took, or on a CPU an operator without the operators that it calls."""
    if on_gpu:
        spans_kernels = getattr(event, "is_user_annotation", False)  # as the optimizer's step does, on the GPU as well
        return 0.0 if _on_cpu(event) or spans_kernels else float(event.time_range.end - event.time_range.start) / 1e6
    return float(event.self_cpu_time_total) / 1e6


def _on_cpu(event: Any) -> bool:
    return bool(event.device_type == torch._C._autograd.DeviceType.CPU)


def _span(event: Any) -> Span:
    return event.time_range.start / 1e6, event.time_range.end / 1e6


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same seconds in spans that do not overlap, in order."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def overlap(spans: Sequence[Span], others: Sequence[Span]) -> float:
    """The seconds that two lists of spans have in common; neither overlaps itself."""
    return sum(max(0.0, min(e, end) - max(b, begin)) for b, e in spans for begin, end in others)
