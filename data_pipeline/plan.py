"""The plan of a corpus: its inputs cut into slices, each the unit of work, of restart and of identity.

Made from names, sizes and settings alone, so that every host plans the same. Inputs that appear later make slices of
their own and never change older ones.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from configs import ConfigError, canonical_json
from data_pipeline.shards import write_durably
from data_pipeline.sources.inputs import Input, Part

PLAN = "plan.json"
PLAN_VERSION = 1
BLOCK_TOKENS = (2**16, 2**15, 2**14)  # to choose from; the last where even it leaves tails of 1 % and more
BYTES_PER_TOKEN = 4.0  # of text, about


@dataclass(frozen=True)
class Slice:
    """A group of whole inputs, or a range of one. Numbered within its generation, and no number is used twice."""

    generation: int
    number: int
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        return f"{self.generation}-{self.number:05d}"

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    def identity(self, plan: Plan) -> str:
        """sha256 (hex) over all that its shards depend on, but the bytes of its inputs."""
        parts = [[p.input.name, p.input.size, p.start, p.stop] for p in self.parts]
        canonical = f"{plan.head_of_identity},{canonical_json([self.name, parts])[1:]}"
        return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """The slices of a corpus in their order, the configuration that made them, and the chosen block length."""

    config: Mapping[str, Any]
    block_tokens: int
    slices: tuple[Slice, ...]

    @cached_property
    def head_of_identity(self) -> str:
        """What the canonical JSON of every slice's identity begins with: long, and the same for all."""
        return canonical_json([self.config, self.block_tokens])[:-1]

    @staticmethod
    def read(folder: Path) -> Plan | None:
        """A corpus folder's plan, None where there is none yet. Raises ConfigError when it cannot be used."""
        path = folder / PLAN
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            if tree["version"] > PLAN_VERSION:
                raise ConfigError(f"{path}: version {tree['version']} is newer than this code's; update longhaul")
            slices = tuple(_slice(entry) for entry in tree["slices"])
            return Plan(tree["config"], tree["block_tokens"], slices)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: damaged ({error}); restore it, or prepare into another folder") from None

    def write(self, folder: Path) -> None:
        head = {"version": PLAN_VERSION, "config": self.config, "block_tokens": self.block_tokens}
        # json.dumps is fast only without indent
        lines = ",\n  ".join(json.dumps(_entry(slice), ensure_ascii=False) for slice in self.slices)
        text = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
        write_durably(folder / PLAN, f'{text},\n "slices": [\n  {lines}\n ]\n}}\n'.encode())


def _entry(slice: Slice) -> dict[str, Any]:
    parts = [[p.input.name, p.input.size, p.input.version, p.start, p.stop] for p in slice.parts]
    return {"generation": slice.generation, "number": slice.number, "parts": parts}


def _slice(entry: dict[str, Any]) -> Slice:
    parts = tuple(Part(Input(name, size, version), start, stop) for name, size, version, start, stop in entry["parts"])
    return Slice(entry["generation"], entry["number"], parts)


def cut(
    inputs: Iterable[Input], can_split: Callable[[Input], bool], slice_bytes: int, generation: int, first: int
) -> list[Slice]:
    """Slices of about `slice_bytes`, numbered from `first`: inputs in their order, grouped while they fit, and large
    ones cut into ranges where they can be. An input of unknown size is a slice."""
    groups: list[list[Part]] = []
    room = -1  # bytes left in the last group
    for input in inputs:
        if input.size is None:
            groups.append([Part(input)])
            room = -1
        elif input.size > slice_bytes and can_split(input):
            groups += [[part] for part in _ranges(input.size, input, slice_bytes)]
            room = -1
        elif input.size <= room:
            groups[-1].append(Part(input))
            room -= input.size
        else:
            groups.append([Part(input)])
            room = slice_bytes - input.size
    return [Slice(generation, number, tuple(group)) for number, group in enumerate(groups, first)]


def _ranges(size: int, input: Input, slice_bytes: int) -> Iterator[Part]:
    count = -(-size // slice_bytes)
    edges = [size * i // count for i in range(count + 1)]
    for start, stop in itertools.pairwise(edges):
        yield Part(input, start, stop)


def chosen_block(text_bytes: float, slices: int) -> int:
    """The largest block that keeps the expected tails, half a block for each slice, under 1 % of the tokens."""
    tokens = text_bytes / BYTES_PER_TOKEN
    fitting = [block for block in BLOCK_TOKENS if slices * block / 2 <= 0.01 * tokens]
    return fitting[0] if fitting else BLOCK_TOKENS[-1]


@dataclass(frozen=True)
class Comparison:
    """Planned slices against the inputs of now: those that stay (with new times), those of which an input changed."""

    kept: list[Slice]
    changed: list[Slice]
    changed_inputs: list[str]  # one line each, what was and what is


def compare(
    slices: Iterable[Slice],
    inputs: Iterable[Input],
    hashes: Callable[[Slice], list[str] | None],
    rehash: Callable[[Part], str],
) -> Comparison:
    """Find inputs that changed since they were planned.

    `hashes` gives the sha256 of a made slice's parts, or None for one not made; `rehash` that of a part as it is now.
    A file with another time but the same bytes has not changed. A made slice does not need its inputs any more.
    Raises ConfigError for an input that is gone before its slice was made.
    """
    now = {input.name: input for input in inputs}
    lines: dict[str, str] = {}
    updated: list[Slice] = []
    for slice in slices:
        if all(now.get(part.input.name) == part.input for part in slice.parts):
            updated.append(slice)
            continue
        known = hashes(slice)
        parts = []
        for i, part in enumerate(slice.parts):
            current = now.get(part.input.name)
            if current is None and known is None:
                raise ConfigError(f"{part.input.name}: planned for slice {slice.name}, and gone; put it back")
            if current is None or current == part.input:
                parts.append(part)
                continue
            as_it_is = replace(part, input=current)
            same = current.size == part.input.size and known is not None and rehash(as_it_is) == known[i]
            if not same:
                lines[current.name] = f"{current.name}: {_difference(part.input, current)}"
            parts.append(as_it_is if same else part)
        updated.append(replace(slice, parts=tuple(parts)))
    is_changed = [any(part.input.name in lines for part in slice.parts) for slice in updated]
    return Comparison(
        [slice for slice, bad in zip(updated, is_changed, strict=True) if not bad],
        [slice for slice, bad in zip(updated, is_changed, strict=True) if bad],
        [lines[name] for name in sorted(lines)],
    )


def _difference(old: Input, new: Input) -> str:
    if old.size != new.size:
        return f"{old.size} bytes when it was planned, {new.size} now"
    return "written anew since it was planned"
