"""Where a rank's memory goes, by arithmetic; and what to do when there was not enough of it.

States by Rajbhandari et al. 2020, section 3.1 (fp32 gradients, as accumulated here); activations by Korthikanti et al.
2022, equation 1, without the attention matrix, which fused attention does not keep: 34 bytes per token, layer and
width in bf16, twice that in fp32; logits and their gradient at the width of the computation and once in fp32.
"""

from __future__ import annotations

import psutil
import torch

from pretrain.engine.zero import DeepSpeed
from pretrain.run import TrainRun

GIB = 2**30


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or this machine had no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def used_bytes(device: torch.device) -> int:
    """The most that this process has had of a GPU's memory at once; on a CPU, what it has of the machine's now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def memory_table(run: TrainRun, ranks: int) -> dict[str, float]:
    """What each part takes on one rank, in bytes."""
    parameters, stage = run.model.parameter_count(), 0
    if isinstance(run.engine, DeepSpeed):
        stage = run.engine.zero_stage
    width = 4 if run.engine.precision == "fp32" else 2
    rows = min(run.micro_batch_seqs, -(-run.batch_seqs // ranks))
    tokens = rows * run.data.seq_tokens
    return {
        "weights": parameters * width / (ranks if stage == 3 else 1),
        "gradients": parameters * 4 / (ranks if stage >= 2 else 1),
        "masters and moments": parameters * (12 if width == 2 else 8) / (ranks if stage >= 1 else 1),
        "activations": 34 * (width / 2) * tokens * run.model.width * run.model.layers,
        "logits": tokens * run.model.vocab_size * (2.0 * width + 4),
    }


def explain_out_of_memory(run: TrainRun, ranks: int, where: str, device: torch.device) -> str:
    """The table, what the device says, and the remedy, in lines."""
    table = memory_table(run, ranks)
    lines = [f"out of memory in {where}. One rank of {ranks} needs about:"]
    lines += [f"    {part:<22}{size / GIB:>9.2f} GiB" for part, size in table.items()]
    lines.append(f"    {'together':<22}{sum(table.values()) / GIB:>9.2f} GiB")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        peak = torch.cuda.max_memory_allocated(device)
        lines.append(f"    {'device':<22}{total / GIB:>9.2f} GiB, {free / GIB:.2f} free, {peak / GIB:.2f} at the peak")
    return "\n".join([*lines, f"remedy: {remedy(run, table)}"])


def remedy(run: TrainRun, table: dict[str, float]) -> str:
    """What to change: the micro-batch where the batch's parts are the larger ones, else what holds the states."""
    for_batch = table["activations"] + table["logits"]
    if run.micro_batch_seqs > 1 and for_batch > sum(table.values()) / 4:
        fewer = max(1, run.micro_batch_seqs // 2)
        return f"micro_batch_seqs={fewer} (now {run.micro_batch_seqs}); the loss stays as it is"
    stage = run.engine.zero_stage if isinstance(run.engine, DeepSpeed) else 0
    if stage < 3:
        wanted = max(1, stage + 1)
        return f"engine={{kind: deepspeed, zero_stage: {wanted}, precision: {run.engine.precision}}}, or more ranks"
    return "more ranks: stage 3 gives each a smaller share"
