"""DeepSpeed's ZeRO, stages 0 to 3: settings -> DeepSpeed's dict, one step, and its state as fragments.

The only file that imports deepspeed, and the only one that reads what DeepSpeed does not document (`_Flats`; tried with
0.19.8). What is known to go wrong inside DeepSpeed is answered beside the setting that answers it.
"""

from __future__ import annotations

import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from configs import Bool, ConfigError, Int
from pretrain.engine.plain import DTYPES
from pretrain.engine.recompute import recompute_blocks
from pretrain.engine.scale import LossScale, until_applied
from pretrain.engine.settings import Computation, Offload
from pretrain.engine.state import Fragment, Outcome, State, StepTimer, lay_out, optimizer_state, share
from pretrain.engine.tally import Tally, read, to_tell
from pretrain.engine.update import add_up, clipped_step
from pretrain.models.compiled import compiled
from pretrain.models.loss import loss_plan, plan_losses
from pretrain.noise import Noise
from pretrain.objectives import Batch
from pretrain.optim import Optim, Rates, set_rates
from pretrain.ranks import Ranks

BUCKET = 500_000_000  # elements that are reduced or gathered at a time
FLOOR = (0, 19, 8)  # what reads DeepSpeed's insides here was tried with it
TORCH_FLOOR = (2, 11)
KNOWN_BAD = [  # from, up to but not: what goes wrong there, newest first; issues of deepspeedai/DeepSpeed
    ((0, 18, 3), (0, 19, 4), "ZeRO 2 in bf16 reduces wrong gradients over ranks (#8224)"),
    ((0, 18, 5), (0, 18, 7), "its hooks make a step 2.5 times as long (#7886)"),
    ((0, 17, 6), (0, 18, 3), "ZeRO 2 computes wrong gradients (#7718)"),
    ((0, 0, 0), (0, 19, 0), "offloading drops gradients (#7967, #7981)"),
    ((0, 0, 0), FLOOR, "gradients go wrong silently in known ways"),
]


class DeepSpeed(Computation):
    """DeepSpeed ZeRO: 1 shards optimizer state and masters, 2 gradients too, 3 the weights too; 0 shards nothing."""

    kind: Literal["deepspeed"] = "deepspeed"
    zero_stage: Int = Field(default=1, ge=0, le=3)  # what is sharded over the ranks, see above
    offload: Offload = Offload()
    overlap_comm: Bool = False  # ZeRO 2 and 3 send while they compute: no other results; gain: measure it on your GPUs

    @model_validator(mode="after")
    def _refuse_what_deepspeed_does_wrong(self) -> DeepSpeed:
        if self.zero_stage == 0 and self.precision != "fp32":
            raise ValueError(
                f"zero_stage 0 with {self.precision} trains wrong in DeepSpeed: its optimizer takes a step on zero "
                f"gradients when built (deepspeedai/DeepSpeed PR 5104); use zero_stage 1, which on one GPU shards "
                f"nothing, or torch"
            )
        if self.zero_stage == 0 and self.offload.optimizer:
            raise ValueError("offload.optimizer needs zero_stage 1, 2 or 3, got 0")
        if self.zero_stage < 3 and self.offload.parameters:
            raise ValueError(f"offload.parameters needs zero_stage 3, got {self.zero_stage}")
        return self

    def build(self, model: nn.Module, optim: Optim, ranks: Ranks) -> ZeroEngine:
        """An engine over a model that holds its values in fp32; on the meta device: all 0, until a state is loaded.

        At stage 3 only one from the meta device can be larger than what a rank holds: it is sharded as it is laid out.
        """
        return ZeroEngine(self, model, optim, ranks)

    def compiles(self, device: torch.device) -> bool:
        """See `Computation.compiles`. At stage 3 every module's hooks break the graph, so that little is gained."""
        return super().compiles(device) and (self.compile is not None or self.zero_stage < 3)

    def deepspeed_config(self, clip_norm: float | None, parameters: int = BUCKET) -> dict[str, Any]:
        """The dict that DeepSpeed is given. The loop owns accumulation, schedule, logging and checkpoints."""
        return {
            "train_micro_batch_size_per_gpu": 1,  # nominal: the loop feeds what it likes
            "gradient_accumulation_steps": 1,  # nominal: the loop says which micro-batch is the last
            "gradient_clipping": clip_norm or 0.0,  # the default is 1.0 since 0.19.3
            "steps_per_print": 2**62,
            "timers": {"throughput": {"enabled": False}},  # it waits for the GPU before and after each micro-batch
            "bf16": {"enabled": self.precision == "bf16"},
            "fp16": {"enabled": self.precision == "fp16", "loss_scale_window": 2**62},  # the scale is ours to move
            "data_types": {"grad_accum_dtype": "fp32"},  # the default accumulates in the precision of the weights
            "communication_data_type": "fp32",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's, as without offload; DeepSpeed's needs a C++ compiler
            "zero_optimization": self._zero_config(parameters),
        }

    def _zero_config(self, parameters: int) -> dict[str, Any]:
        config: dict[str, Any] = {
            "stage": self.zero_stage,
            "round_robin_gradients": False,  # makes the fragment addresses wrong
            "memory_efficient_linear": False,  # stage 3 would replace torch's linear in the whole process
            # DeepSpeed's own default is on at stage 3 alone. It had races (#7965, #8061) that FLOOR is behind; where
            # nothing shows that it gains, it stays off.
            "overlap_comm": self.overlap_comm,
            # At stage 1 gradients stay where backward left them: a hook per parameter and micro-batch, and two copies
            # of all gradients, less.
            "contiguous_gradients": self.zero_stage > 1,
            "reduce_bucket_size": min(BUCKET, parameters),  # a buffer of so many is made in every backward pass
            "allgather_bucket_size": BUCKET,
        }
        pinned = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if self.offload.optimizer:
            config["offload_optimizer"] = pinned
        if self.offload.parameters:
            config["offload_param"] = pinned
        return config


class ZeroEngine:
    """A DeepSpeed engine behind our interface."""

    def __init__(self, settings: DeepSpeed, model: nn.Module, optim: Optim, ranks: Ranks) -> None:
        settings.check_device(ranks.device)
        deepspeed = _import()
        self.settings, self.optim, self.ranks = settings, optim, ranks
        self.timer = StepTimer(ranks.device)
        self.scale = LossScale() if settings.precision == "fp16" else None
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        plan_losses(model, loss_plan(settings.loss, ranks.device))
        recompute_blocks(model, settings.recompute)
        groups = optim.groups(model)
        config = settings.deepspeed_config(optim.clip_norm, sum(math.prod(shape) for shape in self.shapes.values()))
        model = lay_out(model, ranks.device, DTYPES[settings.precision], partial(_sharded, deepspeed, config))
        named = dict(model.named_parameters())
        groups = [
            {"params": [named[name] for name in group["names"]]} | {k: group[k] for k in ("decays", "weight_decay")}
            for group in groups
        ]
        self.engine, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optim.over(groups),
            config=config,
            dist_init_required=False,
        )
        if settings.zero_stage == 3 and settings.recompute == "selective":
            _hide_fetching(self.engine.optimizer.parameter_offload.get_param_coordinator())
        self.module: nn.Module = self.engine.module
        self.averaged = 1 if _lighten(self.engine) else ranks.size  # ranks over which DeepSpeed takes the mean
        if self.scale is not None:
            self.engine.optimizer.loss_scaler.raise_error_at_min_scale = False  # the guard decides
        if settings.compiles(ranks.device):
            # engine.compile() would have the compiler trace DeepSpeed's own hooks around the forward pass too
            self.module.forward = compiled(self.module.forward)

    def step(
        self,
        batches: Sequence[Batch],
        count: int,
        rates: Rates,
        noise: Noise | None = None,
        tally: Tally | None = None,
    ) -> Outcome:
        """See `Engine.step`. In fp16 an overflow is followed by another try with a lower scale."""
        set_rates(self.engine.optimizer.param_groups, rates)
        return until_applied(self.scale, lambda: self._attempt(batches, count, noise, tally), self.ranks)

    def _attempt(self, batches: Sequence[Batch], count: int, noise: Noise | None, tally: Tally | None) -> Outcome:
        """Where DeepSpeed averages over ranks, each rank's share is scaled up by their number."""
        if self.scale is not None:
            self.engine.optimizer.loss_scaler.cur_scale = self.scale.scale
        total = torch.zeros((), dtype=torch.float32, device=self.ranks.device)
        for i, batch in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(i == len(batches) - 1)
            if noise is not None:
                noise.begin(i)
            with self.timer.forward():
                loss = self.engine(*batch)
            with self.timer.part("backward"):
                self.engine.backward(loss * (self.averaged / count))
                total += loss.detach().float() / count
        told = to_tell(total, tally)
        with self.timer.part("optimizer"):
            norm = self._norm_without_zero() if self.settings.zero_stage == 0 else None
            if norm is not None and not math.isfinite(norm):
                self.engine.zero_grad()
                value, by_source = read(told)
                return Outcome(value, norm, applied=False, forward_s=self.timer.take(), by_source=by_source)
            skipped = self.engine.skipped_steps
            self.engine.step()
            if norm is None:
                norm = float(self.engine.get_global_grad_norm())
        applied = self.engine.skipped_steps == skipped and math.isfinite(norm)
        value, by_source = read(told)
        return Outcome(value, norm, applied, self.timer.take(), by_source)

    @torch.no_grad()
    def loss(self, batch: Batch) -> Tensor:
        """See `Engine.loss`."""
        loss: Tensor = self.engine.module(*batch)
        return loss.float()

    def replicas(self) -> list[Tensor]:
        """See `Engine.replicas`: the weights that compute."""
        return [p.data for p in self.module.parameters()] if self.settings.zero_stage < 3 else []

    def state(self) -> State:
        """See `Engine.state`."""
        state = _Flats(self.engine, self.shapes, self.ranks).state()
        state.loss_scale = self.scale
        return state

    def loaded(self, state: State) -> None:
        """See `Engine.loaded`."""
        _Flats(self.engine, self.shapes, self.ranks).refresh(state)
        self.scale = state.loss_scale

    def release(self) -> None:
        """See `Engine.release`. Hooks of stages 2 and 3 keep DeepSpeed's objects for good: what stays is empty."""
        optimizer = self.engine.optimizer
        self.engine.destroy()
        for parameter in self.module.parameters():
            parameter.data, parameter.grad = parameter.data.new_empty(0), None
            if hasattr(parameter, "ds_tensor"):
                parameter.ds_tensor.data = parameter.ds_tensor.data.new_empty(0)
        for holder in (getattr(optimizer, "optimizer", None), optimizer, self):
            if holder is not None:
                vars(holder).clear()

    def _norm_without_zero(self) -> float:
        """DeepSpeed gives no norm at stage 0: taken here from the reduced gradients, before it clips them."""
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))


def _sharded(deepspeed: Any, config: dict[str, Any], parameters: nn.Module) -> None:
    """Leave this rank its part of parameters at stage 3."""
    if config["zero_optimization"]["stage"] == 3:
        deepspeed.zero.Init(module=parameters, config_dict_or_path=config)


def _hide_fetching(coordinator: Any) -> None:
    """Bring and take away weights unseen by torch's selective recomputation.

    It matches each operation of a block's second pass with one of its first, and ends the run where one is left over;
    but whether a weight is there already is another matter in each.
    """
    for name in ("fetch_sub_module", "release_sub_module"):
        setattr(coordinator, name, _unseen(getattr(coordinator, name)))


def _unseen(function: Callable[..., None]) -> Callable[..., None]:
    def run(*arguments: Any, **named: Any) -> None:
        with _disable_current_modes():
            function(*arguments, **named)

    return run


def _lighten(engine: Any) -> bool:
    """Take from DeepSpeed's optimizer of ZeRO 1 in bf16 what costs a GPU time; whether this is that optimizer.

    It takes the norm tensor by tensor and waits for it on the host, twice; copies all gradients into another flat
    tensor and back to reduce them, all of them on every rank, and on one rank too; zeroes the sums twice a step; and
    adds an fp32 copy of each gradient. Its tensors, and what lies where in them, stay as they are.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    if type(engine.optimizer) is not BF16_Optimizer:
        return False

    class Lighter(BF16_Optimizer):  # type: ignore[misc]
        @torch.no_grad()
        def update_hp_grads(self, clear_lp_grads: bool = False) -> None:
            groups = zip(self.bf16_groups, self.fp32_groups_gradients, self.fp32_groups_has_gradients, strict=True)
            for parameters, sums, has in groups:
                add_up([t.view_as(p) for t, p in zip(sums, parameters, strict=True)], parameters, first=not any(has))
                has[:] = [True] * len(has)

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            self.overflow = False  # the guard hears of it by the norm
            mine = self.fp32_groups_gradient_flat_partition  # views into these:
            self._global_grad_norm = _reduced(mine, self.fp32_groups_gradients_flat, self.dp_process_group)
            for master, gradient in zip(self.fp32_groups_flat_partition, mine, strict=True):
                master.grad = gradient
            clipped_step(self.optimizer, self._global_grad_norm, self.clip_grad or None)
            self._lazy_init_hp_params_optimizer_state()
            self.update_lp_params()
            self.clear_hp_grads()

        def clear_hp_grads(self) -> None:
            for has in self.fp32_groups_has_gradients:
                has[:] = [False] * len(has)  # the next micro-batch overwrites the sums

    engine.optimizer.__class__ = Lighter
    engine.enable_backward_allreduce = False  # it is done in `step`
    return True


def _reduced(mine: Sequence[Tensor], gradients: Sequence[Tensor], group: Any) -> Tensor:
    """Sum gradients over the ranks, each rank's part of them alone: half of what an all-reduce sends. Their norm."""
    if torch.distributed.get_world_size(group) == 1:
        norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(flat) for flat in gradients]))
        return norm
    for part, flat in zip(mine, gradients, strict=True):
        torch.distributed.reduce_scatter_tensor(part, flat, group=group)
    squares = torch.stack([torch.linalg.vector_norm(part) for part in mine]).double().square().sum()
    torch.distributed.all_reduce(squares, group=group)
    return squares.sqrt().float()


class _Flats:
    """This rank's flat fp32 masters inside a DeepSpeed engine, and which range of which parameter lies where.

    Stage 0 keeps whole parameters. Stages 1 and 2 keep one flat partition per parameter group; each parameter knows its
    piece by `_hp_mapping`. Stage 3 keeps one flat per sub-group, each parameter cut evenly over the ranks, padded.
    """

    def __init__(self, engine: Any, shapes: dict[str, tuple[int, ...]], ranks: Ranks) -> None:
        self.engine, self.zero, self.shapes, self.ranks = engine, engine.optimizer, shapes, ranks
        self.stage = engine.zero_optimization_stage()
        self.base = self.zero if self.stage == 0 else self.zero.optimizer
        self.names = {parameter: name for name, parameter in engine.module.named_parameters()}

    def state(self) -> State:
        """The state, its moments created where no step has been taken."""
        masters = self._masters()
        flats = [optimizer_state(self.base, master) for master in masters]
        held = self._fragments()
        owned = share(self.shapes, self.ranks.rank, self.ranks.size) if self.stage == 0 else held
        count = [float(self.base.state[master]["step"]) for master in masters]
        assert len(set(count)) <= 1, f"optimizer step counts differ: {sorted(set(count))}"
        step = count[0] if count else 0.0
        return State(self.shapes, flats, held, owned, dict.fromkeys(self.shapes, step))

    def refresh(self, state: State) -> None:
        """Bring what was loaded into masters and moments to the step counts and to the weights that compute."""
        (step,) = set(state.steps.values())  # the optimizers here step all parameters together
        for master in self._masters():
            self.base.state[master]["step"].fill_(step)
        if self.stage in (1, 2):
            self.zero.update_lp_params()
        elif self.stage == 3:
            self.zero.checkpoint_event_prologue()
            for target, master in zip(self.zero.fp16_partitioned_groups_flat, self._masters(), strict=True):
                target.data.copy_(master.data)
            self.zero.checkpoint_event_epilogue()

    def _masters(self) -> list[Tensor]:
        if self.stage == 3:
            return list(self.zero.fp32_partitioned_groups_flat)
        if self.stage == 0:
            return list(self.names)
        return [group["params"][0] for group in self.base.param_groups]

    def _fragments(self) -> list[Fragment]:
        if self.stage == 0:
            return [Fragment(name, 0, p.numel(), i, 0) for i, (p, name) in enumerate(self.names.items())]
        return self._even_fragments() if self.stage == 3 else self._mapped_fragments()

    def _mapped_fragments(self) -> list[Fragment]:
        fragments = []
        for parameter, name in self.names.items():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is None:
                continue  # no piece of it on this rank
            piece, place = mapping.lp_fragment_address, mapping.hp_fragment_address
            fragments.append(Fragment(name, piece.start, piece.numel, mapping.param_group_index, place.start))
        return fragments

    def _even_fragments(self) -> list[Fragment]:
        fragments = []
        for flat, group in enumerate(self.zero.fp16_groups):
            offset = 0
            for parameter in group:
                size = parameter.partition_numel()
                start = torch.distributed.get_rank(parameter.ds_process_group) * size
                numel = min(size, parameter.ds_numel - start)
                if numel > 0:
                    fragments.append(Fragment(self.names[parameter], start, numel, flat, offset))
                offset += size
        return fragments


def check_versions(deepspeed: str, pytorch: str) -> None:
    """Raise ConfigError for versions that are known to go wrong, with what goes wrong."""
    version = _numbers(deepspeed)
    for begin, end, what in KNOWN_BAD:
        if begin <= version < end:
            floor = ".".join(map(str, FLOOR))
            raise ConfigError(
                f"deepspeed {deepspeed}: {what}; expected {floor} or later: pip install -c constraints.txt deepspeed"
            )
    if _numbers(pytorch) < TORCH_FLOOR:
        floor = ".".join(map(str, TORCH_FLOOR))
        raise ConfigError(
            f"torch {pytorch} with deepspeed {deepspeed}: never tried together; expected torch {floor} or later: "
            f"pip install -c constraints.txt torch, or engine.kind: torch"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _import() -> Any:
    """deepspeed, its version checked, and without the compiled CPU collective that would need a C++ compiler."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    absent = "mlflow" not in sys.modules
    if absent:  # DeepSpeed's autotuner would import it, for 2.3 s and 114 MB of every rank, and takes its absence
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed
        import deepspeed.ops
    finally:
        if absent:
            del sys.modules["mlflow"]

    check_versions(deepspeed.__version__, torch.__version__)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    deepspeed.utils.nvtx.enable_nvtx = False  # two calls into the driver around each of its own
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", f"`torch.distributed.{name}` is deprecated", FutureWarning)
    return deepspeed
