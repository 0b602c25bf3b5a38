"""Where a step goes: torch's profiler over the steps that a run asks for."""

from __future__ import annotations

from pydantic import Field, model_validator

from configs import Int, Section


class Profile(Section):
    """Which steps are looked at, counted from 1 as the log counts them; null: none."""

    steps: tuple[Int, Int] | None = Field(default=None)  # first and last, both looked at

    @model_validator(mode="after")
    def _in_order(self) -> Profile:
        if self.steps is not None and not 0 < self.steps[0] <= self.steps[1]:
            raise ValueError(f"steps: expected [first, last] from 1 on, such as [100, 105], got {list(self.steps)}")
        return self
