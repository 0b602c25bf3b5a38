"""DeepSpeed's ZeRO, stages 0 to 3: settings -> DeepSpeed's dict, one step, and its state as fragments.

The only file that imports deepspeed, and the only one that reads what DeepSpeed does not document (`_Flats`; tried with
0.19.8). What is known to go wrong inside DeepSpeed is answered beside the setting that answers it.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from configs import Bool, ConfigError, Int, Section
from pretrain.engine.state import ForwardTimer, Fragment, Outcome, State, optimizer_state, share
from pretrain.noise import Noise
from pretrain.objectives import Batch
from pretrain.optim import Optim, Rates, set_rates
from pretrain.ranks import Ranks

FLOOR = (0, 19, 8)


class DeepSpeed(Section):
    """DeepSpeed ZeRO: 1 shards optimizer state and masters, 2 gradients too, 3 the weights too; 0 shards nothing."""

    kind: Literal["deepspeed"] = "deepspeed"
    zero_stage: Int = Field(default=1, ge=0, le=3)
    precision: Literal["fp32", "bf16"] = "bf16"
    compile: Bool = False

    @model_validator(mode="after")
    def _refuse_stage_0_in_bf16(self) -> DeepSpeed:
        if self.zero_stage == 0 and self.precision == "bf16":
            raise ValueError(
                "zero_stage 0 with bf16 trains wrong in DeepSpeed: its optimizer takes a step on zero gradients when "
                "built (deepspeedai/DeepSpeed PR 5104); use zero_stage 1, which on one GPU shards nothing, or torch"
            )
        return self

    def build(self, model: nn.Module, optim: Optim, ranks: Ranks) -> ZeroEngine:
        """An engine over a model that holds its initial values in fp32."""
        return ZeroEngine(self, model, optim, ranks)

    def deepspeed_config(self, clip_norm: float | None) -> dict[str, Any]:
        """The dict that DeepSpeed is given. The loop owns accumulation, schedule, logging and checkpoints."""
        return {
            "train_micro_batch_size_per_gpu": 1,  # nominal: the loop feeds what it likes
            "gradient_accumulation_steps": 1,  # nominal: the loop says which micro-batch is the last
            "gradient_clipping": clip_norm or 0.0,  # the default is 1.0 since 0.19.3
            "steps_per_print": 2**62,
            "bf16": {"enabled": self.precision == "bf16"},
            "data_types": {"grad_accum_dtype": "fp32"},  # the default accumulates in bf16
            "communication_data_type": "fp32",
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": self.zero_stage,
                "round_robin_gradients": False,  # makes the fragment addresses wrong
                "memory_efficient_linear": False,  # stage 3 would replace torch's linear in the whole process
                "overlap_comm": False,
                "reduce_bucket_size": 500_000_000,
                "allgather_bucket_size": 500_000_000,
            },
        }


class ZeroEngine:
    """A DeepSpeed engine behind our interface."""

    def __init__(self, settings: DeepSpeed, model: nn.Module, optim: Optim, ranks: Ranks) -> None:
        deepspeed = _import()
        self.settings, self.optim, self.ranks = settings, optim, ranks
        self.timer = ForwardTimer(ranks.device)
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        model = model.to(ranks.device)
        groups = [{key: g[key] for key in ("params", "decays", "weight_decay")} for g in optim.groups(model)]
        self.engine, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optim.over(groups),
            config=settings.deepspeed_config(optim.clip_norm),
            dist_init_required=False,
        )
        self.module: nn.Module = self.engine.module
        if settings.compile:
            self.engine.compile(compile_kwargs={"dynamic": False})

    def step(self, batches: Sequence[Batch], count: int, rates: Rates, noise: Noise | None = None) -> Outcome:
        """See `Engine.step`. DeepSpeed averages over ranks, so each rank's share is scaled up by their number."""
        set_rates(self.engine.optimizer.param_groups, rates)
        total = torch.zeros((), dtype=torch.float32, device=self.ranks.device)
        for i, batch in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(i == len(batches) - 1)
            if noise is not None:
                noise.begin(i)
            with self.timer.forward():
                loss = self.engine(*batch)
            self.engine.backward(loss * (self.ranks.size / count))
            total += loss.detach().float() / count
        norm = self._norm_without_zero() if self.settings.zero_stage == 0 else None
        if norm is not None and not math.isfinite(norm):
            self.engine.zero_grad()
            return Outcome(float(total), norm, applied=False, forward_s=self.timer.take())
        skipped = self.engine.skipped_steps
        self.engine.step()
        if norm is None:
            norm = float(self.engine.get_global_grad_norm())
        applied = self.engine.skipped_steps == skipped and math.isfinite(norm)
        return Outcome(float(total), norm, applied, self.timer.take())

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
        return _Flats(self.engine, self.shapes, self.ranks).state()

    def loaded(self, state: State) -> None:
        """See `Engine.loaded`."""
        _Flats(self.engine, self.shapes, self.ranks).refresh(state)

    def _norm_without_zero(self) -> float:
        """DeepSpeed gives no norm at stage 0: taken here from the reduced gradients, before it clips them."""
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))


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


def _import() -> Any:
    """deepspeed, its version checked, and without the compiled CPU collective that would need a C++ compiler."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    version = tuple(int(part) for part in deepspeed.__version__.split("+")[0].split(".")[:3])
    if version < FLOOR:
        raise ConfigError(
            f"deepspeed {deepspeed.__version__} is older than {'.'.join(map(str, FLOOR))}, below which gradients go "
            f"wrong silently in known ways; pip install -c constraints.txt deepspeed"
        )
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)
    return deepspeed
