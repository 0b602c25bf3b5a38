"""The dynamic loss scale of fp16 (Micikevicius et al. 2018, section 3.2): gradients are kept in fp16's narrow range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pretrain.engine.state import Outcome
    from pretrain.ranks import Ranks

FIRST, LOWEST = 2.0**16, 1.0
GOOD_STEPS = 1000  # in a row, after which the scale doubles


@dataclass
class LossScale:
    """A step whose gradient overflows is made again with half the scale, so that no step and no sample is lost."""

    scale: float = FIRST
    good_steps: int = 0  # since it last changed

    def lower(self) -> bool:
        """Halve it after an overflow; False where it cannot fall any more."""
        self.good_steps = 0
        if self.scale <= LOWEST:
            return False
        self.scale /= 2
        return True

    def passed(self) -> None:
        """A step was applied."""
        self.good_steps += 1
        if self.good_steps % GOOD_STEPS == 0:
            self.scale, self.good_steps = self.scale * 2, 0


def until_applied(scale: LossScale | None, attempt: Callable[[], Outcome], ranks: Ranks) -> Outcome:
    """What one attempt at a step gives; in fp16, what the first one gives that does not overflow.

    A loss that is not finite on any rank is not the scale's fault, and ends it too. Every rank decides alike.
    """
    while True:
        outcome = attempt()
        if scale is None:
            return outcome
        if outcome.applied:
            scale.passed()
            return outcome
        if not ranks.sum(torch.tensor([outcome.loss])).isfinite().item() or not scale.lower():
            return outcome
