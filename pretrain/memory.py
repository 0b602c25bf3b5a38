"""Where a rank's memory goes, by arithmetic; and what to do when there was not enough of it.

States by Rajbhandari et al. 2020, section 3.1, with gradients summed in fp32: 2 + 4 + 12 bytes per parameter in bf16.
Activations by Korthikanti et al. 2022, equation 1, without the attention matrix, which fused attention does not keep.
What the engines hold on top was read off torch's own tracking of their steps (tests/pretrain/test_memory.py).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import psutil
import torch

from pretrain.engine import EngineSettings
from pretrain.engine.zero import DeepSpeed
from pretrain.models import Model
from pretrain.models.loss import LOGIT_BYTES, LossPlan, loss_plan
from pretrain.run import TrainRun

GIB = 2**30
MASTER, MOMENTS, SUM = 4, 8, 4  # bytes per parameter: fp32 masters, both moments of Adam, fp32 sums of gradients
GATHERED = 1_000_000_000  # parameters that ZeRO-3 holds whole at once (stage3_max_live_parameters)


@dataclass(frozen=True)
class Memory:
    """What one rank holds at the peak of a step, in bytes, by part. Parts that are offloaded are in `host`."""

    weights: float  # that compute
    gradients: float  # their fp32 sums
    optimizer: float  # fp32 masters, where they are not the weights, and moments
    activations: float  # kept for the backward pass, and of a block that is computed again
    logits: float  # and what the loss makes of them
    buffers: float  # buckets, gathered weights, and copies while gradients are added up and reduced
    host: float = 0.0

    @property
    def total(self) -> float:
        """On the device."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Bytes on the device by the name of the part."""
        return {part: size for part, size in asdict(self).items() if part != "host"}


@dataclass(frozen=True)
class Shape:
    """What of a model its memory follows from."""

    parameters: int
    embedding: int  # elements of the output layer
    layers: int
    width: int
    heads: int
    vocabulary: int
    inner: int  # width of the MLP
    dropout: bool
    matrix: int = 0  # elements per token of the attention matrices of all layers, where they are held

    @staticmethod
    def of(model: Model, kind: str = "cuda", seq_tokens: int = 0) -> Shape:
        """The shape of a model, and of what it holds on a device of a kind, cuda or cpu, in sequences of that length.

        On a CPU attention with dropout has no fused kernel, and holds its matrix.
        """
        inner = model.mlp_ratio * model.width
        return Shape(
            model.parameter_count(), model.vocab_size * model.width, model.layers, model.width, model.heads,
            model.vocab_size, inner, model.dropout > 0, held_matrix(model, kind, seq_tokens),
        )  # fmt: skip


def held_matrix(model: Model, kind: str, seq_tokens: int) -> int:
    """Elements per token of the attention matrices that all layers hold on a device of a kind, cuda or cpu."""
    if kind != "cpu" or model.dropout == 0:
        return 0
    return model.heads * sum(min(2 * (band or seq_tokens), seq_tokens) for band in model.bands)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or this machine had no memory left."""
    words = ("out of memory", "can't allocate memory")  # CUDA, NCCL and Triton have no class of their own for it
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in said for text in words)


def used_bytes(device: torch.device) -> int:
    """The most that this process has had of a GPU's memory at once; on a CPU, what it has of the machine's now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def width_of(engine: EngineSettings) -> int:
    """Bytes of a number in the precision that computes."""
    return 4 if engine.precision == "fp32" else 2


def step_memory(
    shape: Shape, engine: EngineSettings, ranks: int, tokens: int, loss: LossPlan | None = None, compiles: bool = False,
    accumulates: bool = True,
) -> Memory:  # fmt: skip
    """The peak of one rank's memory in a step of micro-batches of `tokens` tokens, of several where it accumulates.

    Above the states the most is held where the loss is taken, in the backward pass of the block that comes first in it,
    or where the gradients are added up and reduced.
    """
    width = width_of(engine)
    states = _states(shape, engine, ranks)
    kept = tokens * _kept_per_token(shape, width, engine.recompute)
    head = _loss_bytes(shape, width, tokens, loss or LossPlan(), compiles)
    first_block = tokens * _block_per_token(shape, width, engine.recompute) + width * shape.embedding
    late = states.gradients if not accumulates and _sums_late(engine) else 0.0
    held = _held_to_communicate(shape, engine)
    stage = engine.zero_stage if isinstance(engine, DeepSpeed) else 0
    early = stage == 3 or (stage == 1 and accumulates)  # else its bucket comes after the loss and goes before
    backward = kept + max(head + (held if early else 0.0), first_block + held)
    rest = max(backward, late + _reduction_bytes(shape, engine, ranks)) - kept - head
    gradients = states.gradients - late + min(late, rest)
    return Memory(
        states.weights, gradients, states.optimizer, kept, head, states.buffers + rest - min(late, rest), states.host
    )


def _states(shape: Shape, engine: EngineSettings, ranks: int) -> Memory:
    """What lies there between steps."""
    n, width = shape.parameters, width_of(engine)
    if not isinstance(engine, DeepSpeed):
        optimizer = n * (MOMENTS + (MASTER if width == 2 else 0))
        return Memory(n * width, n * SUM, optimizer, 0, 0, 0)
    stage, share = engine.zero_stage, 1 / ranks
    if stage == 0:
        return Memory(n * width, n * SUM, n * MOMENTS, 0, 0, 0)
    weights = n * width * (share if stage == 3 else 1.0)
    gradients = n * SUM * (share if stage >= 2 else 1.0)
    held = n * (MASTER + MOMENTS) * share
    host = 0.0
    buffers = float(bucket_elements(engine, n)) * SUM if stage == 3 else 0.0  # the bucket is held all the time
    if engine.offload.optimizer:
        host, held = held + n * SUM * share, 0.0  # the masters' gradients
        if stage == 3 or (stage == 2 and width == 4):
            host, gradients = host + n * SUM * share, 0.0  # added up there; else here, and sent at the end of a step
        if stage < 3:
            largest = float(width * max(shape.embedding, shape.inner * shape.width))  # one parameter, on its way
            buffers, host = buffers + largest, host + largest + n * width * share  # and the weights that compute
    if engine.offload.parameters:
        host, weights = host + weights, 0.0
    return Memory(weights, gradients, held, 0, 0, buffers, host)


def _held_to_communicate(shape: Shape, engine: EngineSettings) -> float:
    """What lies there during the backward pass: DeepSpeed's bucket, or at stage 3 the weights that are gathered.

    At stage 1 gradients stay where they are made (`contiguous_gradients: false`), and no bucket is filled, unless the
    optimizer is offloaded, which fills it with their sums.
    """
    if not isinstance(engine, DeepSpeed) or (engine.zero_stage < 2 and not engine.offload.optimizer):
        return 0.0
    if engine.zero_stage == 3:
        return float(min(shape.parameters, GATHERED)) * width_of(engine)
    width = SUM if engine.zero_stage == 1 else width_of(engine)
    buckets = 2 if engine.overlap_comm and engine.zero_stage == 2 else 1  # one is filled while the other is sent
    return float(buckets * bucket_elements(engine, shape.parameters)) * width


def sums_whole(engine: DeepSpeed) -> bool:
    """Whether it is DeepSpeed's optimizer for ZeRO 1 in bf16 alone, which sums all gradients in one flat tensor.

    Each rank is then sent its part of it alone.
    """
    return engine.zero_stage == 1 and engine.precision == "bf16" and not engine.offload.optimizer


def _sums_late(engine: EngineSettings) -> bool:
    """Whether the sums of gradients are made where the first micro-batch is reduced, and not before."""
    return isinstance(engine, DeepSpeed) and engine.zero_stage in (1, 2) and not sums_whole(engine)


def bucket_elements(engine: DeepSpeed, parameters: int) -> int:
    """How many gradients DeepSpeed sends at once."""
    return int(engine.deepspeed_config(None, parameters)["zero_optimization"]["reduce_bucket_size"])


def _reduction_bytes(shape: Shape, engine: EngineSettings, ranks: int) -> float:
    """What is needed, above the states, while the gradients of a micro-batch are added up and reduced."""
    n, width = shape.parameters, width_of(engine)
    last = float(width * shape.embedding)  # of the tied embedding, which gets two gradients, and their sum
    if not isinstance(engine, DeepSpeed):
        return n * width + 2 * last if width == 2 else last
    sent = min(n, bucket_elements(engine, n))
    copies = SUM * sent if width == 2 else 0  # gradients go in fp32
    if engine.zero_stage == 0:
        return float(SUM * sent)
    if sums_whole(engine):
        return n * width + 2 * last
    if engine.zero_stage == 3:
        return max(float(SUM * sent), _held_to_communicate(shape, engine) + width * sent)
    if engine.zero_stage == 1 and engine.offload.optimizer:  # in bf16 and fp16 this rank's part of the sums is apart
        own = SUM * n / ranks if width == 2 else 0.0
        return _held_to_communicate(shape, engine) + SUM * sent + own
    return _held_to_communicate(shape, engine) + width * sent + copies  # what is sent goes as one tensor


def _kept_per_token(shape: Shape, width: int, recompute: str) -> float:
    """Bytes of a token's activations that the backward pass needs.

    A block: what enters it, both norms' results, q, k, v, what attention gives, the sum before the second norm, and the
    MLP before and after its GELU; the norms' means and spreads, and attention's sums, in fp32.
    """
    c, inner = shape.width, shape.inner
    sums = 4 * shape.heads
    matrix = {"none": 13, "selective": 5, "full": 0}[recompute] * shape.matrix  # softmax in fp32, dropped, and the mask
    if recompute == "full":
        block = float(width * c)
    elif recompute == "selective":  # what enters, and every product's result
        block = width * (6 * c + inner) + sums
    else:
        block = width * (8 * c + 2 * inner) + sums + 16 + (2 * c if shape.dropout else 0)
    return (
        shape.layers * block + matrix + 2 * width * c + 40
    )  # the last norm, before and after; tokens, targets, weights


def _block_per_token(shape: Shape, width: int, recompute: str) -> float:
    """Bytes of a token while one block's backward runs: what is computed again, and gradients of activations."""
    c, inner = shape.width, shape.inner
    again = {"none": 0, "selective": 10 * c + 2 * inner, "full": 7 * c + 2 * inner}[recompute]
    matrix = {"none": 0, "selective": 3, "full": 13}[recompute] * shape.matrix / shape.layers
    return float(width * (again + c + inner - 2 * c)) + matrix  # the last norm's results have gone


def _loss_bytes(shape: Shape, width: int, tokens: int, loss: LossPlan, compiles: bool) -> float:
    """Bytes of logits and their gradients, where the loss holds the most of them."""
    chunk = loss.chunk_tokens(tokens, shape.vocabulary)
    if chunk >= tokens:
        aligned = 1 if loss.multiple > 1 else 2  # the compiler pads a copy where we have not padded
        per_logit = aligned * width if compiles else 12  # eager: logarithms of softmax, and two gradients, in fp32
        padding = 2 * width * shape.embedding if shape.vocabulary % loss.multiple else 0  # a copy and its gradient
        return float(tokens * shape.vocabulary * per_logit + padding)
    head, hidden = shape.embedding, tokens * shape.width * width
    forward = chunk * shape.vocabulary * 2 * LOGIT_BYTES + SUM * head  # a chunk's logits, and what is made of them
    return float(hidden + max(forward, head * (2 * SUM + (width if width == 2 else 0))))


def largest_micro_batch(
    shape: Shape, engine: EngineSettings, ranks: int, seq_tokens: int, most: int, capacity: float,
    loss: LossPlan | None = None, compiles: bool = False,
) -> int:  # fmt: skip
    """The most sequences, up to `most`, of which a step fits into `capacity` bytes; 0 where one does not.

    A step of all of them at once adds nothing up.
    """

    def fits(rows: int) -> bool:
        need = step_memory(shape, engine, ranks, rows * seq_tokens, loss, compiles, accumulates=rows < most)
        return need.total <= capacity

    if fits(most):
        return most
    low, high = 0, most - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def evened(largest: int, seqs: int) -> int:
    """The micro-batch, no larger than `largest`, that costs least for `seqs` sequences.

    Rows that fill up the last one are computed too, and each costs about half a row more than its rows.
    """
    fewest = math.ceil(seqs / largest)
    tried = range(fewest, min(seqs, 3 * fewest) + 1)  # beyond, the half rows cost more than any rows that fill up
    micro_steps = min(tried, key=lambda steps: (math.ceil(seqs / steps) + 0.5) * steps)
    return math.ceil(seqs / micro_steps)


def run_memory(run: TrainRun, ranks: int, rows: int, device: torch.device) -> Memory:
    """The peak of one rank of a run, with micro-batches of `rows` sequences."""
    loss = loss_plan(run.engine.loss, device)
    rows = min(rows, -(-run.batch_seqs // ranks))
    accumulates = rows * ranks < run.batch_seqs
    tokens, compiles = rows * run.data.seq_tokens, run.engine.compiles(device)
    shape = Shape.of(run.model, device.type, run.data.seq_tokens)
    return step_memory(shape, run.engine, ranks, tokens, loss, compiles, accumulates)


LABELS = {"optimizer": "masters and moments", "logits": "logits and loss"}


def explain_out_of_memory(run: TrainRun, ranks: int, where: str, device: torch.device) -> str:
    """The table, what the device says, and the remedy, in lines."""
    rows = 1 if run.micro_batch_seqs == "fit" else run.micro_batch_seqs
    memory = run_memory(run, ranks, rows, device)
    lines = [f"out of memory in {where}. One rank of {ranks} needs about:"]
    lines += [f"    {LABELS.get(part, part):<22}{size / GIB:>9.2f} GiB" for part, size in memory.parts().items()]
    lines.append(f"    {'together':<22}{memory.total / GIB:>9.2f} GiB")
    if memory.host:
        lines.append(f"    {'offloaded':<22}{memory.host / GIB:>9.2f} GiB of the host")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        peak = torch.cuda.max_memory_allocated(device)
        lines.append(f"    {'device':<22}{total / GIB:>9.2f} GiB, {free / GIB:.2f} free, {peak / GIB:.2f} at the peak")
    return "\n".join([*lines, f"remedy: {remedy(run, ranks, rows, memory)}"])


def remedy(run: TrainRun, ranks: int, rows: int, memory: Memory) -> str:
    """What to change: the micro-batch where the batch's parts are the larger ones, else what holds the states."""
    for_batch = memory.activations + memory.logits
    if rows > 1 and for_batch > memory.total / 4:
        fewer = max(1, rows // 2)
        return f"micro_batch_seqs={fewer} (now {rows}); the loss stays as it is"
    if for_batch > memory.total / 4 and memory.logits > memory.activations and run.engine.loss != "chunked":
        return "engine.loss=chunked, which holds the logits of few tokens at a time"
    if for_batch > memory.total / 4 and run.engine.recompute != "full":
        more = "selective" if run.engine.recompute == "none" else "full"
        return f"engine.recompute={more}, which keeps fewer activations and computes them again"
    if not isinstance(run.engine, DeepSpeed):
        offload = ", offload: {optimizer: true}" if ranks == 1 else ""  # one rank has nobody to share its states with
        return f"engine={{kind: deepspeed, zero_stage: 1, precision: {run.engine.precision}{offload}}}, or more ranks"
    if run.engine.zero_stage < 3 and ranks > 1:
        return f"engine.zero_stage={run.engine.zero_stage + 1}, or more ranks"  # and all else of the engine as it is
    if not run.engine.offload.optimizer:
        return "more ranks, of which each has a smaller share; or engine.offload.optimizer=true"
    if not run.engine.offload.parameters:
        stage = "engine.zero_stage=3 " if run.engine.zero_stage < 3 else ""
        return f"more ranks; or {stage}engine.offload.parameters=true"
    return "more ranks: stage 3 gives each a smaller share"
