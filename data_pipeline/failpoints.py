"""Failpoints: places with a name where a test makes something go wrong. Without LONGHAUL_FAIL_AT they do nothing.

    LONGHAUL_FAIL_AT="checkpoint.written@1=kill; journal.append#30=ENOSPC; train.batch#12=nan"

NAME, then `@RANK` (default: every rank), then `#N` (where the caller gives a number, as a step: at that number; else at
the N-th passage of this process; default: at every one), then `=` and an action:

    kill        SIGKILL of this process
    stop, term  SIGSTOP, SIGTERM of this process
    sleep:S     wait S seconds, then go on
    oom         torch.OutOfMemoryError
    an errno's name, as ENOSPC or EIO: OSError
    nan, flip, scale:X   for `spoil` alone: fill a tensor with NaN where it is not 0, flip one bit, multiply by X
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

VARIABLE = "LONGHAUL_FAIL_AT"
RULE = re.compile(r"([\w.]+)(?:@(\d+))?(?:#(\d+))?=(\w+)(?::([\d.]+))?")
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
FLIPPED_BIT = 1 << 30  # of an fp32 number: its highest exponent bit but the sign's


@dataclass(frozen=True)
class Rule:
    """One failure that was asked for."""

    name: str
    rank: int | None
    number: int | None
    action: str
    value: float


_passages: Counter[str] = Counter()


def fail_at(name: str, number: int | None = None) -> None:
    """Fail here if that was asked for. `number` is what `#N` is compared with; without it, passages are counted."""
    for rule in _due(name, number):
        _fail(rule)


def spoil(name: str, tensor: Tensor, number: int | None = None) -> None:
    """Spoil a tensor in place if that was asked for; any other action is as with `fail_at`."""
    import torch

    for rule in _due(name, number):
        with torch.no_grad():
            if rule.action == "nan":
                tensor[tensor != 0] = float("nan")
            elif rule.action == "scale":
                tensor.mul_(rule.value)
            elif rule.action == "flip":
                tensor.view(-1)[:1].view(torch.int32).bitwise_xor_(FLIPPED_BIT)
            else:
                _fail(rule)


def _due(name: str, number: int | None) -> list[Rule]:
    rules = _rules(os.environ.get(VARIABLE, ""))
    if not rules:
        return []
    _passages[name] += 1
    at = _passages[name] if number is None else number
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    return [r for r in rules if r.name == name and r.rank in (None, rank) and r.number in (None, at)]


@cache
def _rules(text: str) -> list[Rule]:
    found = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        match = RULE.fullmatch(part)
        if match is None:
            raise ValueError(f"{VARIABLE}: expected NAME@RANK#N=ACTION:VALUE, got {part!r}")
        name, rank, number, action, value = match.groups()
        found.append(Rule(name, _number(rank), _number(number), action, float(value or 0)))
    return found


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)


def _fail(rule: Rule) -> None:
    if rule.action in SIGNALS:
        os.kill(os.getpid(), SIGNALS[rule.action])
    elif rule.action == "sleep":
        time.sleep(rule.value)
    elif rule.action == "oom":
        import torch

        raise torch.OutOfMemoryError(f"out of memory, as asked for at {rule.name}")
    elif (number := getattr(errno, rule.action, None)) is not None:
        raise OSError(number, os.strerror(number), rule.name)
    else:
        raise ValueError(f"{VARIABLE}: {rule.name}: no action {rule.action!r}")
