"""What rank processes of the GPU's tests run: many cases in one process, as a start takes ten seconds there.

What goes wrong in a case is its result, and the next one is tried.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from pretrain.engine import EngineSettings
from pretrain.engine.recompute import recompute_blocks
from pretrain.engine.settings import Recompute
from pretrain.models.gpt import Gpt
from pretrain.models.loss import plan_losses
from pretrain.models.weights import initialize
from pretrain.ranks import Ranks
from tests.pretrain.engine import cases
from tests.pretrain.fitted import after_trials
from tests.pretrain.tracked import gpu_peak

STEPS = 5


def each(named: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """What every one gives, or the end of its traceback, by name."""
    found: dict[str, Any] = {}
    for name, function in named.items():
        try:
            found[name] = function()
        except Exception:
            found[name] = traceback.format_exc()[-1500:]
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return found


def first_losses(ranks: Ranks, named: dict[str, EngineSettings]) -> dict[str, list[float] | str]:
    """The losses of the first steps by name."""
    return each({name: partial(cases.losses, ranks, settings, STEPS) for name, settings in named.items()})


def padded_losses(ranks: Ranks, settings: EngineSettings, multiple: int) -> list[float]:
    """The losses of the first steps with the output layer's rows padded to a multiple."""
    live = cases.make(ranks, settings)
    head: Any = live.module.lm_head
    plan_losses(live.module, replace(head.plan, multiple=multiple))
    return cases.train(ranks, live, range(STEPS))


def compiled_losses(ranks: Ranks, named: dict[str, EngineSettings], multiple: int) -> dict[str, list[float] | str]:
    """The same of what is compiled, and of the torch engine with a padded output layer."""
    torch_ = named["torch"]
    return first_losses(ranks, named) | each({"padded": partial(padded_losses, ranks, torch_, multiple)})


def crossings(
    ranks: Ranks, pairs: dict[str, tuple[EngineSettings, EngineSettings]], folder: Path
) -> dict[str, tuple[list[str], list[float], list[float]] | str]:
    """By name: what of the saved state is another one when loaded, and the losses after it, of both."""

    def cross(name: str, saved: EngineSettings, loaded: EngineSettings) -> tuple[list[str], list[float], list[float]]:
        before = cases.save_and_go_on(ranks, saved, folder / name)
        after = cases.load_and_go_on(ranks, loaded, folder / name)
        others = [k for k, value in before["at_save"].items() if not torch.equal(value, after["at_save"][k])]
        return others, before["losses"], after["losses"]

    return each({name: partial(cross, name, *pair) for name, pair in pairs.items()})


def peaks(ranks: Ranks, gpt: Gpt, named: dict[str, EngineSettings], rows: int) -> dict[str, tuple[int, int] | str]:
    """Bytes at the peak of a step, measured and by arithmetic, by name."""
    return each({n: partial(gpu_peak, ranks, gpt, settings, rows, gpt.context) for n, settings in named.items()})


def trials(ranks: Ranks, named: dict[str, EngineSettings], failing: str) -> dict[str, Any]:
    """What `micro_batch_seqs: fit` finds by name, see `after_trials`."""
    return each({name: partial(after_trials, ranks, settings, failing) for name, settings in named.items()})


def strays(ranks: Ranks) -> dict[str, float]:
    """How far gradients with dropout are from those of blocks that are kept, over their length, by recomputation."""
    gradients = {}
    for kind in get_args(Recompute):
        with ranks.device:
            model = cases.MODEL.model_copy(update={"dropout": 0.2}).build()
        initialize(model, 1)
        recompute_blocks(model.bfloat16(), kind)
        torch.manual_seed(3)
        model(*cases.batches(ranks, 0, cases.GLOBAL_ROWS)[0]).backward()
        gradients[kind] = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
    kept = gradients["none"]
    return {kind: float((found - kept).norm() / kept.norm()) for kind, found in gradients.items()}
