"""A pairwise set of what can be asked of an engine: any two settings that may meet, meet in one of these rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain import checkpoint
from pretrain.checkpoint import Checkpoints, Position, Saver
from pretrain.engine import Engine
from pretrain.engine.plain import Torch
from pretrain.engine.scale import LossScale
from pretrain.engine.settings import Computation
from pretrain.engine.zero import DeepSpeed
from pretrain.lineage import Lineage
from pretrain.models import loss
from pretrain.ranks import Ranks
from tests.pretrain.engine import cases

STEPS = 3


class Combination(NamedTuple):
    engine: str
    precision: str
    offload: str
    recompute: str
    micro_batches: int
    ranks: int
    loss: str

    def settings(self) -> Torch | DeepSpeed:
        kind, stage = ("torch", 0) if self.engine == "torch" else ("deepspeed", int(self.engine[-1]))
        more: dict[str, Any] = {"recompute": self.recompute, "loss": self.loss}
        if kind == "deepspeed":
            more["offload"] = {"optimizer": self.offload != "nothing", "parameters": self.offload == "all"}
        return cases.settings(kind, self.precision, stage, **more)

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in self)


PAIRWISE = [
    Combination("torch", "fp32", "nothing", "none", 3, 1, "plain"),
    Combination("zero0", "fp32", "nothing", "selective", 3, 1, "plain"),
    Combination("zero0", "fp32", "nothing", "full", 3, 1, "plain"),
    Combination("zero1", "bf16", "optimizer", "none", 3, 1, "chunked"),
    Combination("zero2", "fp32", "optimizer", "selective", 1, 1, "plain"),
    Combination("zero2", "fp32", "nothing", "full", 1, 1, "chunked"),
    Combination("zero3", "bf16", "all", "full", 1, 1, "chunked"),
    Combination("zero3", "bf16", "optimizer", "none", 3, 1, "chunked"),
    Combination("torch", "bf16", "nothing", "selective", 1, 2, "chunked"),
    Combination("torch", "fp32", "nothing", "full", 1, 2, "chunked"),
    Combination("zero0", "fp32", "nothing", "none", 1, 2, "chunked"),
    Combination("zero1", "fp32", "optimizer", "full", 1, 2, "plain"),
    Combination("zero1", "fp32", "nothing", "selective", 3, 2, "plain"),
    Combination("zero2", "bf16", "optimizer", "none", 3, 2, "plain"),
    Combination("zero3", "fp32", "nothing", "full", 3, 2, "plain"),
    Combination("zero3", "fp32", "all", "selective", 3, 2, "plain"),
    Combination("zero3", "fp32", "all", "none", 3, 2, "plain"),
]
LEVELS: dict[str, list[Any]] = {
    "engine": ["torch", "zero0", "zero1", "zero2", "zero3"],
    "precision": ["fp32", "bf16"],
    "offload": ["nothing", "optimizer", "all"],
    "recompute": ["none", "selective", "full"],
    "micro_batches": [1, 3],
    "ranks": [1, 2],
    "loss": ["plain", "chunked"],
}


def first_losses(ranks: Ranks, rows: list[Combination]) -> dict[str, list[float]]:
    """The losses of the first steps, by combination; and of the torch engine in either precision."""
    loss.CHUNK_BYTES["cpu"] = 16 * 4 * cases.MODEL.vocab_size  # 16 tokens, of 32 to 384 in a micro-batch
    found = {
        precision: cases.losses(ranks, cases.settings("torch", precision, loss="plain"), STEPS, cases.GLOBAL_ROWS)
        for precision in ("fp32", "bf16")
    }
    for row in rows:
        micro_rows = cases.GLOBAL_ROWS // ranks.size // row.micro_batches
        found[row.name] = cases.losses(ranks, row.settings(), STEPS, micro_rows)
    return found


def graph_breaks(ranks: Ranks) -> dict[str, list[str]]:
    """Why the forward pass and the loss of each engine are not one graph, by its name."""
    found = {}
    for stage in (0, 1, 2):
        live = cases.make(ranks, cases.settings("deepspeed" if stage else "torch", "fp32", stage))
        cases.train(ranks, live, range(1))
        torch._dynamo.reset()
        explained = torch._dynamo.explain(live.module)(*cases.batches(ranks, 0, 2)[0])
        assert explained.graph_count > 0
        found[f"zero{stage}" if stage else "torch"] = [str(reason.reason) for reason in explained.break_reasons]
    return found


def host_reads(ranks: Ranks) -> dict[str, int]:
    """How often the host reads a number off the device in a step of two micro-batches in bf16, by engine."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    found = {}
    for name, settings in (("torch", cases.settings("torch", "bf16")), ("zero1", cases.settings("deepspeed", "bf16"))):
        live = cases.make(ranks, settings)
        cases.train(ranks, live, range(1))
        fed = cases.batches(ranks, 1, cases.GLOBAL_ROWS // 2)
        with Reads() as reads:  # type: ignore[no-untyped-call]
            live.step(fed, cases.GLOBAL_ROWS * cases.LENGTH, cases.OPTIM.rates(1.0))
        found[name] = reads.count
    return found


def elements_sent(ranks: Ranks) -> dict[str, int]:
    """How many numbers a step of ZeRO 1 in bf16 gives to each collective, by its name; and the parameters."""
    live = cases.make(ranks, cases.settings("deepspeed", "bf16"))
    sent = Counter(parameters=sum(p.numel() for p in live.module.parameters()))

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def count(*tensors: torch.Tensor, **more: Any) -> Any:
            sent[name] += max(tensor.numel() for tensor in tensors)
            return call(*tensors, **more)

        return count

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "reduce_scatter_tensor"):
            patch.setattr(torch.distributed, name, counted(name, getattr(torch.distributed, name)))
        live.step(cases.batches(ranks, 0, 2), cases.GLOBAL_ROWS * cases.LENGTH, cases.OPTIM.rates(1.0))
    return dict(sent)


def graphs_and_reads(ranks: Ranks) -> tuple[dict[str, list[str]], dict[str, int]]:
    """`graph_breaks` and `host_reads`, of one process."""
    return graph_breaks(ranks), host_reads(ranks)


def cross(ranks: Ranks, folder: Path) -> dict[str, tuple[str, list[float]]]:
    """What each loads that the one before saved, offloaded or not: by name the gathered state, and the next loss."""
    ways = [
        ("zero3-all", cases.settings("deepspeed", "bf16", 3, offload={"optimizer": True, "parameters": True})),
        ("torch", cases.settings("torch", "bf16", recompute="full")),
        ("zero1-optimizer", cases.settings("deepspeed", "bf16", 1, offload={"optimizer": True})),
        ("zero2-optimizer", cases.settings("deepspeed", "bf16", 2, offload={"optimizer": True})),
        ("zero3-optimizer", cases.settings("deepspeed", "bf16", 3, offload={"optimizer": True})),
        ("zero3-all again", cases.settings("deepspeed", "bf16", 3, offload={"optimizer": True, "parameters": True})),
    ]
    found: dict[str, tuple[str, list[float]]] = {}
    before: Path | None = None
    for i, (name, settings) in enumerate(ways):
        live = cases.make(ranks, settings)
        if before is None:
            cases.train(ranks, live, range(3))
        else:
            load(live, before)
        before = folder / str(i)
        save(ranks, live, before)
        found[name] = (cases.state_hash(ranks, live), cases.train(ranks, live, range(3, 4)))
    return found


def save(ranks: Ranks, engine: Engine, folder: Path) -> None:
    if ranks.rank == 0:
        Lineage(folder).take(None, 0, None, "test")
    ranks.barrier()
    saver = Saver(folder, Checkpoints(), 1, ranks.rank, ranks.size, {})
    saver.save(engine.state(), Position(3, 3 * cases.GLOBAL_ROWS, 0, "0" * 32), digest_share=1)
    saver.wait()
    ranks.barrier()


def load(engine: Engine, folder: Path) -> None:
    state = engine.state()
    checkpoint.load(checkpoint.open_checkpoint(checkpoint.live_checkpoints(folder)[0]), state)
    engine.loaded(state)


def half(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """fp16 where it is slow and refused, for its arithmetic alone: each engine's losses with a scale that overflows at
    first, the scales, and what is left of a scale after a checkpoint and after a loss that is not finite."""
    from deepspeed.accelerator import get_accelerator

    Computation.check_device = lambda *_: None  # type: ignore[method-assign]
    type(get_accelerator()).is_fp16_supported = lambda _: True
    found: dict[str, Any] = {"fp32": cases.losses(ranks, cases.settings("torch", "fp32"), STEPS)}
    for name, stage in (("torch", 0), ("zero1", 1), ("zero2", 2), ("zero3", 3)):
        live: Any = cases.make(ranks, cases.settings("torch" if not stage else "deepspeed", "fp16", stage))
        live.scale.scale = 2.0**40
        losses = cases.train(ranks, live, range(STEPS))
        kept = LossScale(live.scale.scale, live.scale.good_steps)
        save(ranks, live, folder / name)
        live.scale = LossScale()
        load(live, folder / name)
        restored = live.scale == kept
        spoiled = cases.batches(ranks, STEPS, 2)
        spoiled[0] = spoiled[0]._replace(weights=spoiled[0].weights * float("nan"))
        applied = live.step(spoiled, cases.GLOBAL_ROWS * cases.LENGTH, cases.OPTIM.rates(1.0)).applied
        again = cases.train(ranks, live, range(STEPS, STEPS + 1))
        found[name] = {
            "losses": losses,
            "scale": kept,
            "restored": restored,
            "applied": applied,
            "after": live.scale.scale,
            "next": again,
            "finite": all(bool(v.isfinite().all()) for v in cases.gathered(ranks, live).values()),
        }
    return found


def bits(model: Any, batch: Any) -> list[torch.Tensor]:
    """A loss and its gradients."""
    torch.manual_seed(3)
    value = model(*batch)
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
