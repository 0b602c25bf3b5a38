"""What a checkpoint needs of an engine: fp32 masters and optimizer moments as named ranges of parameters.

An engine holds flat 1-D tensors; a fragment says which range of which parameter lies where in them. Any engine, stage
or number of ranks can load what any other wrote, because both speak of (parameter name, range), never of partitions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.failpoints import fail_at
from pretrain.engine.scale import LossScale

MASTER = "fp32"
PART = "step: "  # before the name of a part, in a profile


@dataclass(frozen=True)
class Outcome:
    """What one step did on one rank."""

    loss: float  # this rank's share of the step's mean loss: the sum over ranks is the mean
    grad_norm: float  # of the whole gradient, before clipping
    applied: bool  # False: the gradient was not finite, and the weights are as before
    forward_s: float = 0.0  # of this rank's forward passes, in which it waits for no other
    by_source: tuple[float, ...] = ()  # this rank's sums of losses (nats), by source; empty where none are asked for


class StepTimer:
    """Adds up the seconds of a step's forward passes; on a GPU by events, read when the step has ended there.

    Names the parts of a step to torch's profiler. While `exact`, a part ends when the GPU is done with it.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self.exact = False

    @contextmanager
    def forward(self) -> Iterator[None]:
        """One forward pass."""
        begun = self._now()
        fail_at("engine.forward")
        with self.part("forward"):
            yield
        self._spans.append((begun, self._now()))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the step: forward, backward, communication or optimizer."""
        with torch.profiler.record_function(f"{PART}{name}"):
            yield
            if self.exact and self._on_gpu:
                torch.cuda.synchronize()

    def take(self) -> float:
        """The seconds since the last call. On a GPU the device must have come past them."""
        spans, self._spans = self._spans, []
        if self._on_gpu:
            return sum(float(begin.elapsed_time(end)) for begin, end in spans) / 1000
        return float(sum(end - begin for begin, end in spans))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True)
class Fragment:
    """A range of a flattened parameter, and where it lies in a rank's flat tensors."""

    name: str
    start: int  # in the flattened parameter
    numel: int
    flat: int  # index into State.flats
    offset: int  # in that flat tensor


@dataclass
class State:
    """One rank's part of the training state.

    `flats[i]` maps a kind (fp32, exp_avg, exp_avg_sq, ...) to a 1-D tensor; all kinds of a flat have one shape.
    `held` is what the rank needs, `owned` what it writes: over all ranks the owned fragments of each parameter
    tile it exactly. `steps` is the optimizer's own step count by parameter name, `loss_scale` that of fp16.
    """

    shapes: dict[str, tuple[int, ...]]
    flats: list[dict[str, Tensor]]
    held: list[Fragment]
    owned: list[Fragment]
    steps: dict[str, float] = field(default_factory=dict)
    loss_scale: LossScale | None = None


def share(shapes: dict[str, tuple[int, ...]], rank: int, ranks: int) -> list[Fragment]:
    """A rank's nearly equal share of parameters that every rank holds whole; flat i is the i-th parameter."""
    total = sum(_numel(shape) for shape in shapes.values())
    begin, end = total * rank // ranks, total * (rank + 1) // ranks
    fragments, position = [], 0
    for flat, (name, shape) in enumerate(shapes.items()):
        numel = _numel(shape)
        first, last = max(begin - position, 0), min(end - position, numel)
        if first < last:
            fragments.append(Fragment(name, first, last - first, flat, first))
        position += numel
    return fragments


@torch.no_grad()
def put(state: State, values: Iterable[tuple[str, Tensor]]) -> None:
    """Fill a rank's masters from parameters' whole values, as they come; all else is as before the first step."""
    held: dict[str, list[Fragment]] = {}
    for fragment in state.held:
        held.setdefault(fragment.name, []).append(fragment)
    for flat in state.flats:
        for tensor in flat.values():
            tensor.zero_()  # padding must be finite
    for name, value in values:
        for fragment in held.get(name, []):
            part = value.reshape(-1)[fragment.start : fragment.start + fragment.numel]
            state.flats[fragment.flat][MASTER][fragment.offset : fragment.offset + fragment.numel].copy_(part)
    state.steps = dict.fromkeys(state.steps, 0.0)


def lay_out(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    then: Callable[[nn.Module], object] = lambda _: None,
) -> nn.Module:
    """Give a model of the meta device parameters of zeros, a module at a time; what is tied stays tied.

    `then` gets each module's new parameters before those of the next one are made. Another model is moved as it is.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        return model.to(device)
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        new = nn.ParameterList()
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in made:
                made[parameter] = nn.Parameter(torch.zeros(parameter.shape, dtype=dtype, device=device))
                new.append(made[parameter])
            setattr(module, key, made[parameter])
        if len(new):
            then(new)
    return model


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def optimizer_state(optimizer: torch.optim.Optimizer, master: Tensor) -> dict[str, Tensor]:
    """The flat tensors of one master parameter, its moments created as AdamW would at its first step where missing."""
    state = optimizer.state[master]
    if "exp_avg" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=_step_device(optimizer, master))
        state["exp_avg"] = torch.zeros_like(master, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(master, memory_format=torch.preserve_format)
    kinds = {MASTER: master.detach().view(-1)}
    kinds |= {
        k: v.view(-1) for k, v in state.items() if isinstance(v, Tensor) and v.numel() == master.numel() and v.ndim
    }
    return kinds


def _step_device(optimizer: torch.optim.Optimizer, master: Tensor) -> torch.device:
    """Where torch's AdamW keeps a parameter's step count: beside it when fused or capturable, else on the host."""
    group = optimizer.param_groups[0]
    return master.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
