"""The output layer and the loss it leads to: all logits at once, or those of a few tokens at a time.

Shapes: N tokens, C the width, V the vocabulary. Losses are weighted sums of cross-entropies in nats, in fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

LossKind = Literal["plain", "chunked"]
LOGIT_BYTES = 4  # they are exponentiated and summed in fp32
CHUNK_BYTES = {"cuda": 512 << 20, "cpu": 64 << 20}  # of logits: below, products become too small to be fast
MULTIPLE = {"cuda": 128}  # to which the vocabulary is padded within the product; 0.7 % of a step at 124M on an H200
SHARE_OF_MEMORY = 8  # logits of a micro-batch above an eighth of it are made by chunks on a GPU, where memory decides


@dataclass(frozen=True)
class LossPlan:
    """How many fp32 logits are held at a time."""

    whole_bytes: float = math.inf  # a micro-batch with no more than this is taken whole
    chunk_bytes: int = CHUNK_BYTES["cuda"]  # of larger ones
    multiple: int = 1  # whole micro-batches have a product of so many columns, or a multiple; the loss sees V of them

    def chunk_tokens(self, tokens: int, vocabulary: int) -> int:
        """Of how many tokens the logits are made at a time: all, or a multiple of 128 that `chunk_bytes` holds."""
        if tokens * vocabulary * LOGIT_BYTES <= self.whole_bytes:
            return tokens
        fits = self.chunk_bytes // (LOGIT_BYTES * vocabulary)
        return min(tokens, max(1, fits // 128 * 128 or fits))


def loss_plan(kind: LossKind | None, device: torch.device) -> LossPlan:
    """The plan that `engine.loss` stands for on a device."""
    return loss_plan_of(kind, device.type, device_memory(device))


def loss_plan_of(kind: LossKind | None, device: str, memory: float) -> LossPlan:
    """The same for a kind of device, cuda or cpu, with so many bytes of memory.

    None stands for what is fastest: chunks on a CPU; on a GPU all logits at once, if they take no more than an eighth
    of its memory.
    """
    chunk = CHUNK_BYTES[device]
    fastest = chunk if device == "cpu" else memory / SHARE_OF_MEMORY
    return LossPlan({"plain": math.inf, "chunked": 0.0, None: fastest}[kind], chunk, MULTIPLE.get(device, 1))


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory, or of this machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


class Head(nn.Linear):
    """[..., C] -> logits [..., V]; with targets, their loss. The weight is read in this module alone (ZeRO-3)."""

    plan = LossPlan()

    def forward(
        self, x: Tensor, targets: Tensor | None = None, weights: Tensor | None = None, losses: Tensor | None = None
    ) -> Tensor:
        """Logits of x [B, T, C]; or the sum of weights fp32[B, T] times the losses for targets int64[B, T].

        Its terms are put into `losses` fp32[B, T], where that is given.
        """
        if targets is None or weights is None:
            return super().forward(x)
        tokens = targets.numel()
        chunk = self.plan.chunk_tokens(tokens, self.out_features)
        if chunk >= tokens or self.bias is not None:
            padded = self.out_features % self.plan.multiple != 0 and self.bias is None
            logits = padded_product(x, self.weight, self.plan.multiple) if padded else super().forward(x)
            terms = weighted_losses(logits, targets, weights)
            loss = terms.sum()
        else:
            loss, terms = _chunked(x.flatten(0, -2), self.weight, targets.flatten(), weights.flatten(), chunk)
        if losses is not None:
            losses.copy_(terms.detach().view_as(losses))
        return loss


def padded_product(x: Tensor, weight: Tensor, multiple: int) -> Tensor:
    """x [..., C] @ weight [V, C]^T -> [..., V], with rows of zeros below the weight up to a multiple.

    A GPU's fast kernels want rows of 16 bytes or a multiple, and GPT-2's 50,257 logits are not.
    """
    rows = weight.size(0)
    return F.linear(x, F.pad(weight, (0, 0, 0, -rows % multiple)))[..., :rows]


def plan_losses(model: nn.Module, plan: LossPlan) -> None:
    """Have the output layers of a model go by a plan."""
    for module in model.modules():
        if isinstance(module, Head):
            module.plan = plan


def weighted_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Sum of weights [B, T] times the cross-entropy (nats) of logits [B, T, V] for targets [B, T]; all in fp32."""
    return weighted_losses(logits, targets, weights).sum()


def weighted_losses(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The terms of `weighted_loss`: [B * T]."""
    losses = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none")
    return losses * weights.flatten()


def chunked_loss(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, chunk: int) -> Tensor:
    """What `weighted_loss` gives for the logits hidden [N, C] @ weight [V, C]^T, holding those of `chunk` tokens.

    The gradients are made along with the loss, while a chunk's logits are there: as much work as the plain loss, no
    logits computed twice (Hsu et al. 2024, Liger Kernel, section 3.2). Those of the weight are summed in fp32.
    """
    return _chunked(hidden, weight, targets, weights, chunk)[0]


def _chunked(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """The loss, and its terms [N], which have no gradient."""
    found: tuple[Tensor, Tensor] = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, weights, chunk, torch.is_grad_enabled()
    )
    return found


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, chunk: int, learns: bool
    ) -> tuple[Tensor, Tensor]:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        terms = torch.empty(hidden.size(0), dtype=torch.float32, device=hidden.device)
        of_hidden = torch.empty_like(hidden) if learns else None
        of_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if learns else None
        for begin in range(0, hidden.size(0), chunk):
            x, target, share = (t[begin : begin + chunk] for t in (hidden, targets.unsqueeze(1), weights.unsqueeze(1)))
            logs = F.log_softmax((x @ weight.t()).float(), dim=1)
            each = -logs.gather(1, target) * share
            total += each.sum()
            terms[begin : begin + chunk] = each.squeeze(1)
            if of_hidden is None or of_weight is None:
                continue
            gradient = logs.exp_()  # softmax - one-hot, in place; the share comes in where rows are C wide, not V
            gradient = gradient.scatter_add_(1, target, -torch.ones_like(share)).to(hidden.dtype)
            of_hidden[begin : begin + chunk] = (gradient @ weight) * share
            x = (x * share).to(x.dtype)
            if hidden.dtype == torch.float32:
                of_weight.addmm_(gradient.t(), x)
            else:
                of_weight += gradient.t() @ x
            del logs, gradient  # before the next chunk's are made
        ctx.save_for_backward(of_hidden, of_weight)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(terms)
        return total, terms

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight = ctx.saved_tensors
        # in fp32: 1 / tokens rounded to bf16 would scale all gradients but this weight's, by up to 0.4 %
        of_hidden = (of_hidden.float() * scale).to(of_hidden.dtype)
        return of_hidden, (of_weight * scale).to(ctx.dtype), None, None, None, None
