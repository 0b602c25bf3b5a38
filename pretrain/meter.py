"""How fast a run is: tokens per second, share of the hardware's peak, share of time without data, time left.

Pure arithmetic over seconds measured elsewhere with a monotonic clock. Operations per token are the model's to say
(`flops_per_token`): they depend on its shape.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

# Dense bf16 FLOP/s by a part of the device's name, the longer name first (NVIDIA's data sheets, without sparsity).
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}
STEPS_REMEMBERED = 200  # what the time left is estimated from


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its name as torch gives it; None where the table has none, as for a CPU."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)


@dataclass(frozen=True)
class Speed:
    """One reading. Rates are over the steps since the reading before."""

    tokens_per_s: float  # of all ranks together
    mfu: float | None  # 0 to 1; None without a known peak
    data_wait: float  # 0 to 1, the share of step time spent waiting for a batch
    eta_s: float  # evaluations and saves at their share so far included


class Meter:
    """Adds up steps and reads them off."""

    def __init__(self, flops_per_token: int, peak: float | None) -> None:
        """`peak` is the FLOP/s of all devices of the run together, or None."""
        self._flops_per_token, self._peak = flops_per_token, peak
        self._tokens, self._seconds, self._waited = 0, 0.0, 0.0
        self._recent: deque[tuple[int, float]] = deque(maxlen=STEPS_REMEMBERED)  # tokens, seconds

    def step(self, tokens: int, seconds: float, waited: float = 0.0) -> None:
        """One step over all ranks: its tokens, how long it took, and how much of that it waited for data."""
        self._tokens, self._seconds, self._waited = (
            self._tokens + tokens,
            self._seconds + seconds,
            self._waited + waited,
        )
        self._recent.append((tokens, seconds))

    def aside(self, seconds: float) -> None:
        """Time between steps, for an evaluation or a save: part of the time left, not of the speed."""
        self._recent.append((0, seconds))

    def read(self, tokens_left: int) -> Speed:
        """The speed since the last reading; begins the next one."""
        rate = _ratio(self._tokens, self._seconds)
        data_wait = _ratio(self._waited, self._seconds)
        self._tokens, self._seconds, self._waited = 0, 0.0, 0.0
        per_token = _ratio(sum(s for _, s in self._recent), sum(t for t, _ in self._recent))
        mfu = None if self._peak is None else rate * self._flops_per_token / self._peak
        return Speed(tokens_per_s=rate, mfu=mfu, data_wait=data_wait, eta_s=per_token * tokens_left)


class Startup:
    """What the seconds from the start of this process went into, until its first step."""

    def __init__(self) -> None:
        self.began = psutil.Process().create_time()  # seconds since the epoch
        self.seconds = {"imports": max(0.0, round(time.time() - self.began, 3))}
        self._at = time.perf_counter()

    def mark(self, part: str) -> None:
        """What was done since the last mark is over."""
        now = time.perf_counter()
        self.seconds[part], self._at = round(now - self._at, 3), now

    def restart(self) -> None:
        """The process begins again by itself, after a rollback."""
        self.began, self.seconds, self._at = time.time(), {}, time.perf_counter()


class Ledger:
    """What the seconds of one rank went into, by kind."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}

    def add(self, kind: str, seconds: float) -> None:
        self._spent[kind] = self._spent.get(kind, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """What was added since the last call."""
        spent, self._spent = self._spent, {}
        return spent


class BySource:
    """The mean training loss of each corpus over the steps since the last reading: every target counts once."""

    def __init__(self, sources: Sequence[str]) -> None:
        self._sources = sources
        self._losses: list[float] = []
        self._targets: list[int] = []
        self._begin()

    def add(self, losses: Sequence[float], targets: Sequence[int]) -> None:
        """One step over all ranks: sums of losses (nats), and how many targets they are of."""
        self._losses = [a + b for a, b in zip(self._losses, losses, strict=True)]
        self._targets = [a + b for a, b in zip(self._targets, targets, strict=True)]

    def take(self) -> dict[str, float]:
        """`train_loss/NAME` of each source that was fed since the last call."""
        rows = zip(self._sources, self._losses, self._targets, strict=True)
        found = {f"train_loss/{name}": loss / targets for name, loss, targets in rows if targets}
        self._begin()
        return found

    def _begin(self) -> None:
        self._losses, self._targets = [0.0] * len(self._sources), [0] * len(self._sources)


def duration(seconds: float) -> str:
    """Seconds as people read them: 42s, 7m 05s, 3h 07m, 12d 04h."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m {s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h {s // 60 % 60:02d}m"
    return f"{s // 86400}d {s // 3600 % 24:02d}h"


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
