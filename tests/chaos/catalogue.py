"""Every case by the row of the fault table that it proves, and how many trials a row asks for."""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.chaos import cases, preparation
from tests.chaos.cases import Result, Room

CASES: dict[str, Callable[[Room, random.Random], Result]] = {
    "T1": cases.kills,
    "T2": cases.torn,
    "T3": cases.every_failpoint,
    "T4": cases.full_disk,
    "T5": cases.damaged,
    "T12": cases.stopped,
    "P1": preparation.kills,
    "P2": preparation.every_failpoint,
}
TRIALS = {"T1": 200, "T2": 20, "T3": 60, "T4": 12, "T5": 40, "T12": 3, "P1": 200, "P2": 60}
