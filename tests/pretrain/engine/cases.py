"""A small model, its batches, and the runs of it that the engine tests compare. Importable by rank processes."""

from __future__ import annotations

import gc
import hashlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from configs import build
from pretrain import checkpoint, replicas
from pretrain.checkpoint import Checkpoints, Position, Saver
from pretrain.engine import Engine, Tally, zero
from pretrain.engine.plain import PlainEngine, Torch
from pretrain.engine.state import MASTER, put
from pretrain.engine.zero import DeepSpeed
from pretrain.lineage import Lineage
from pretrain.models.gpt import Gpt
from pretrain.models.weights import initial_value
from pretrain.objectives import Batch, NextToken
from pretrain.optim import AdamW, Rates
from pretrain.parent import give_first_values
from pretrain.ranks import Ranks

# width 62: at 3 and 4 ranks ZeRO's partitions are padded
MODEL = Gpt(layers=3, width=62, heads=2, context=64, vocab_size=509)
OPTIM = AdamW(lr_peak=1e-3)
GLOBAL_ROWS, LENGTH = 12, 32


def settings(kind: str, precision: str, stage: int = 1, **more: Any) -> Torch | DeepSpeed:
    more = {"precision": precision, "compile": False, **more}
    if kind == "torch":
        return build(Torch, more, "test")
    return build(DeepSpeed, {"zero_stage": stage, **more}, "test")


def make(ranks: Ranks, engine: Torch | DeepSpeed) -> Engine:
    """As a run makes it: empty, then filled with its initial values."""
    with torch.device("meta"):
        model = MODEL.build()
    live = engine.build(model, OPTIM, ranks)
    run: Any = SimpleNamespace(seed=1)
    give_first_values(live, run, None, ranks)
    return live


def batches(ranks: Ranks, step: int, micro_rows: int) -> list[Batch]:
    """This rank's micro-batches of a step: the same rows over all ranks, whatever their number."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(MODEL.vocab_size, (GLOBAL_ROWS, LENGTH + 1), generator=generator)
    mine = rows[GLOBAL_ROWS * ranks.rank // ranks.size : GLOBAL_ROWS * (ranks.rank + 1) // ranks.size]
    count = -(-GLOBAL_ROWS // ranks.size)
    filler = torch.zeros(-(-count // micro_rows) * micro_rows - len(mine), LENGTH + 1, dtype=torch.int64)
    valid = torch.tensor([LENGTH] * len(mine) + [0] * len(filler))
    whole = torch.cat([mine, filler])
    parts = zip(torch.split(whole, micro_rows), torch.split(valid, micro_rows), strict=True)
    return [NextToken().batch(tokens.to(ranks.device), v.to(ranks.device)) for tokens, v in parts]


def train(ranks: Ranks, engine: Engine, steps: range, micro_rows: int = 2, tallied: bool = True) -> list[float]:
    """The mean loss of each step, over all ranks. That the losses by source add up to it is looked at on the way."""
    losses = []
    for step in steps:
        fed, tally = batches(ranks, step, micro_rows), None
        if tallied:
            sources = (torch.arange(len(fed) * micro_rows) % 3).view(len(fed), micro_rows)
            tally = Tally(fed, sources.to(ranks.device), 3)
            fed = tally.batches
        outcome = engine.step(fed, GLOBAL_ROWS * LENGTH, OPTIM.rates((step + 1) / 4), tally=tally)
        assert outcome.applied
        if tally is not None:
            assert abs(sum(outcome.by_source) / (GLOBAL_ROWS * LENGTH) - outcome.loss) < 1e-5 * outcome.loss
        losses.append(float(ranks.sum(torch.tensor(outcome.loss, dtype=torch.float64))))
    return losses


def losses(ranks: Ranks, engine: Torch | DeepSpeed, steps: int, micro_rows: int = 2) -> list[float]:
    return train(ranks, make(ranks, engine), range(steps), micro_rows)


def gathered(ranks: Ranks, engine: Engine) -> dict[str, torch.Tensor]:
    """Every parameter's master and moments, whole, by `name/kind`."""
    state = engine.state()
    whole = {f"{n}/{k}": torch.zeros(torch.Size(s).numel()) for n, s in state.shapes.items() for k in state.flats[0]}
    for f in state.owned:
        for kind, flat in state.flats[f.flat].items():
            whole[f"{f.name}/{kind}"][f.start : f.start + f.numel] += flat[f.offset : f.offset + f.numel].cpu()
    summed = ranks.sum(torch.cat(list(whole.values())))  # in one, as collectives are slow where cores are few
    parts = torch.split(summed, [value.numel() for value in whole.values()])
    return dict(zip(whole, parts, strict=True))


def save_and_go_on(ranks: Ranks, engine: Torch | DeepSpeed, folder: Path) -> dict[str, Any]:
    """Three steps, a checkpoint, three more steps: the state at the checkpoint, the later losses, the last state."""
    live = make(ranks, engine)
    train(ranks, live, range(3))
    if ranks.rank == 0:
        Lineage(folder).take(None, 0, None, "test")
    ranks.barrier()
    saver = Saver(folder, Checkpoints(), 1, ranks.rank, ranks.size, {})
    at_save = gathered(ranks, live)
    saver.save(live.state(), Position(3, 3 * GLOBAL_ROWS, 0, "0" * 32), digest_share=1)
    later = train(ranks, live, range(3, 6))  # beside the writer
    saver.wait()
    ranks.barrier()
    return {"at_save": at_save, "losses": later, "end": gathered(ranks, live)}


def load_and_go_on(ranks: Ranks, engine: Torch | DeepSpeed, folder: Path) -> dict[str, Any]:
    """Load that checkpoint into a fresh engine; the same facts."""
    live = make(ranks, engine)
    committed = checkpoint.open_checkpoint(checkpoint.live_checkpoints(folder)[0])
    state = live.state()
    checkpoint.load(committed, state)
    live.loaded(state)
    at_save = gathered(ranks, live)
    weights = {n: p.detach().float().cpu() for n, p in live.module.named_parameters()} if ranks.size == 1 else {}
    return {
        "at_save": at_save,
        "losses": train(ranks, live, range(3, 6)),
        "end": gathered(ranks, live),
        "bf16": weights,
    }


def skips_nan(ranks: Ranks, engine: Torch | DeepSpeed) -> tuple[list[bool], bool]:
    """Whether each of three steps was applied when the second has a NaN weight, and whether all masters are finite."""
    live = make(ranks, engine)
    applied = []
    for step in range(3):
        fed = batches(ranks, step, 2)
        if step == 1:
            fed[0] = fed[0]._replace(weights=fed[0].weights * float("nan"))
        applied.append(live.step(fed, GLOBAL_ROWS * LENGTH, OPTIM.rates(1.0)).applied)
    finite = all(bool(v.isfinite().all()) for key, v in gathered(ranks, live).items() if key.endswith(MASTER))
    return applied, finite


def with_and_without_tally(ranks: Ranks, engine: Torch | DeepSpeed) -> list[tuple[list[float], str]]:
    """The losses of three steps, and a hash of the state behind them."""
    found = []
    for tallied in (True, False):
        live = make(ranks, engine)
        found.append((train(ranks, live, range(3), tallied=tallied), state_hash(ranks, live)))
    return found


def decays(ranks: Ranks, engine: Torch | DeepSpeed) -> list[tuple[float, float]]:
    """(learning rate, weight decay) of every group after a step with other rates than those of the start."""
    live = make(ranks, engine)
    live.step(batches(ranks, 0, 2), GLOBAL_ROWS * LENGTH, Rates(lr=5e-4, weight_decay=0.25))
    optimizer = live.optimizer if isinstance(live, PlainEngine) else live.engine.optimizer  # type: ignore[attr-defined]
    return sorted((group["lr"], group["weight_decay"]) for group in optimizer.param_groups)


ENGINES = [("torch", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]


def state_hash(ranks: Ranks, engine: Engine) -> str:
    """Of every master and moment, gathered."""
    digest = hashlib.sha256()
    for key, value in sorted(gathered(ranks, engine).items()):
        digest.update(key.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def save_with_every_engine(ranks: Ranks, precision: str, folder: Path) -> dict[str, tuple[str, list[float]]]:
    """Each engine's checkpoint after three steps: by its folder's name, the gathered state and the next loss."""
    found = {}
    for kind, stage in ENGINES:
        place = folder / f"{kind}-{stage}-on-{ranks.size}"
        live = make(ranks, settings(kind, precision, stage))
        train(ranks, live, range(3))
        if ranks.rank == 0:
            Lineage(place).take(None, 0, None, "test")
        ranks.barrier()
        saver = Saver(place, Checkpoints(), 1, ranks.rank, ranks.size, {})
        state = state_hash(ranks, live)
        saver.save(live.state(), Position(3, 3 * GLOBAL_ROWS, 0, "0" * 32), digest_share=1)
        saver.wait()
        found[place.name] = (state, train(ranks, live, range(3, 4)))
    return found


def load_with_every_engine(ranks: Ranks, precision: str, folder: Path) -> dict[str, tuple[str, list[float]]]:
    """Each engine loads what each engine saved, one after the other into the same one, as a rollback does.

    On how many ranks it was saved goes round, so that all pairs of engines and of ranks are met. By
    `checkpoint into engine`: the gathered state and the next loss.
    """
    found = {}
    for i, (kind, stage) in enumerate(ENGINES):
        live = make(ranks, settings(kind, precision, stage))
        for j, (saved_kind, saved_stage) in enumerate(ENGINES):
            place = folder / f"{saved_kind}-{saved_stage}-on-{(i + j + ranks.size) % 4 + 1}"
            state = live.state()
            checkpoint.load(checkpoint.open_checkpoint(checkpoint.live_checkpoints(place)[0]), state)
            live.loaded(state)
            here = f"{place.name} into {kind}-{stage}-on-{ranks.size}"
            found[here] = (state_hash(ranks, live), train(ranks, live, range(3, 4)))
    return found


def odd_after_a_flip(ranks: Ranks, engine: Torch | DeepSpeed, kind: str) -> tuple[list[int], list[int]]:
    """The odd ranks before and after one bit of rank 1's tensor of a kind has flipped."""
    made = make(ranks, engine)
    train(ranks, made, range(2))
    before = replicas.odd_ranks(made, ranks)
    tensor = next(made.module.parameters()).data if kind == "weights" else made.state().flats[0][kind]
    if ranks.rank == 1:
        tensor.view(-1)[:1].view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).bitwise_xor_(1)
    return before, replicas.odd_ranks(made, ranks)


def left_after_release(ranks: Ranks, engines: list[Torch | DeepSpeed]) -> list[int]:
    """Bytes of tensors, for each engine, that a step and a release have left."""
    found = []
    for engine in engines:
        before = _tensor_bytes()
        live = make(ranks, engine)
        train(ranks, live, range(1))
        live.release()
        found.append(_tensor_bytes() - before)
    return found


def initial_masters(ranks: Ranks, engines: list[Torch | DeepSpeed]) -> list[bool]:
    """Whether the masters of each engine are, to the last bit, what a run's seed gives, and its moments 0."""
    found, model = [], MODEL.build()
    for engine in engines:
        live = make(ranks, engine)
        whole = gathered(ranks, live)
        for name, shape in live.state().shapes.items():
            whole[f"{name}/{MASTER}"] -= initial_value(model, name, shape, seed=1).flatten()
        found.append(not any(values.any() for values in whole.values()))
    return found


def most_while_built(alone: Ranks, model: Gpt, engine: Torch | DeepSpeed) -> int:
    """Bytes of tensors, at the most, while rank 0 of eight builds an engine and fills it. For a process of its own.

    The others are torch's fake process group, whose collectives do nothing.
    """
    dist.destroy_process_group()
    os.environ["WORLD_SIZE"] = "8"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    alone.cpu = dist.group.WORLD
    zero.BUCKET = 2**20  # gradients that are reduced at a time have a buffer: small beside this model
    tracker = MemTracker()
    with torch.device("meta"):
        empty = model.build()
    with tracker:
        state = engine.build(empty, OPTIM, alone).state()
        put(state, ((name, torch.ones(shape)) for name, shape in state.shapes.items()))
    return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


def losses_of_weights_that_come_and_go(ranks: Ranks, engines: list[DeepSpeed]) -> list[list[float]]:
    """Of each engine, at stage 3 with no weight kept on every rank because it is small."""
    whole, patched = DeepSpeed._zero_config, cast(Any, DeepSpeed)
    patched._zero_config = lambda self, count: whole(self, count) | {"stage3_param_persistence_threshold": 0}
    return [losses(ranks, engine, 3) for engine in engines]


def _tensor_bytes() -> int:
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if isinstance(found, torch.Tensor):
            for tensor in (found, found.grad if found.is_leaf else None):
                if tensor is not None:
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())
