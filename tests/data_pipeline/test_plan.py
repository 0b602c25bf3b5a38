import dataclasses
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import ConfigError
from data_pipeline.plan import Plan, chosen_block, compare, cut
from data_pipeline.sources.inputs import Input


def inputs(*sizes: int) -> list[Input]:
    return [Input(f"{i:04d}", size, 1) for i, size in enumerate(sizes)]


def plan(*sizes: int, slice_bytes: int = 100) -> Plan:
    return Plan({"a": 1}, 2**14, tuple(cut(inputs(*sizes), lambda i: False, slice_bytes, 0, 0)))


@given(st.lists(st.integers(0, 500), max_size=40), st.integers(1, 300), st.booleans())
def test_slices_cover_every_byte_of_every_input_once_in_order(sizes: list[int], slice_bytes: int, split: bool) -> None:
    slices = cut(inputs(*sizes), lambda input: split, slice_bytes, 3, 7)
    parts = [part for slice in slices for part in slice.parts]
    assert list(dict.fromkeys(p.input.name for p in parts)) == [f"{i:04d}" for i in range(len(sizes))]
    for input in inputs(*sizes):
        ranges = [(p.start, input.size if p.stop is None else p.stop) for p in parts if p.input == input]
        assert ranges[0][0] == 0 and ranges[-1][1] == input.size
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    for slice in slices:
        assert slice.bytes <= slice_bytes or (len(slice.parts) == 1 and not split)
    assert [s.name for s in slices] == [f"3-{7 + i:05d}" for i in range(len(slices))]


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = Plan({"x": {"y": [1, None]}}, 2**15, tuple(cut(inputs(5, 500, 5), lambda i: True, 100, 0, 0)))
    assert Plan.read(tmp_path) is None
    made.write(tmp_path)
    assert Plan.read(tmp_path) == made
    first = (tmp_path / "plan.json").read_bytes()
    made.write(tmp_path)
    assert (tmp_path / "plan.json").read_bytes() == first


def test_a_damaged_plan_is_told(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"version": 1}'):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(ConfigError, match=r"plan\.json: damaged \("):
            Plan.read(tmp_path)
    (tmp_path / "plan.json").write_text('{"version": 99}')
    with pytest.raises(ConfigError, match="version 99 is newer than this code's; update longhaul"):
        Plan.read(tmp_path)


def test_a_slices_identity_changes_with_what_its_bytes_depend_on() -> None:
    old = plan(10, 20)
    identity = old.slices[0].identity(old)
    touched = Input("0000", 10, 999)
    part = dataclasses.replace(old.slices[0].parts[0], input=touched)
    later = dataclasses.replace(old.slices[0], parts=(part, *old.slices[0].parts[1:]))
    assert later.identity(old) == identity  # a time is not content
    for other in (
        plan(10, 21),
        dataclasses.replace(old, config={"a": 2}),
        dataclasses.replace(old, block_tokens=2**15),
    ):
        assert other.slices[0].identity(other) != identity


def test_blocks_are_chosen_by_what_tails_cost() -> None:
    assert chosen_block(300e9 * 4, 6000) == 2**16
    assert chosen_block(6e6 * 4, 2) == 2**15
    assert chosen_block(2.5e6, 1) == 2**14


def test_comparison_with_the_inputs_of_now() -> None:
    slices = plan(60, 60, 60, 60).slices
    made = {s.name: ["sha"] for s in slices[:2]}
    now = [Input("0000", 60, 2), Input("0001", 60, 2), Input("0002", 61, 2), Input("0003", 60, 1), Input("0009", 1, 1)]
    found = compare(
        slices, now, lambda s: made.get(s.name), lambda part: "sha" if part.input.name == "0000" else "other"
    )
    assert [s.name for s in found.kept] == ["0-00000", "0-00003"]  # only the time has changed; nothing has
    assert found.kept[0].parts[0].input.version == 2
    assert [s.name for s in found.changed] == ["0-00001", "0-00002"]
    assert found.changed_inputs == [
        "0001: written anew since it was planned",
        "0002: 60 bytes when it was planned, 61 now",
    ]


def test_inputs_may_go_once_their_slices_are_made() -> None:
    slices = plan(60, 60).slices
    assert compare(slices, [], lambda s: ["sha"], lambda p: "").kept == list(slices)
    with pytest.raises(ConfigError) as error:
        compare(slices, [], lambda s: ["sha"] if s.number == 0 else None, lambda p: "")
    assert str(error.value) == "0001: planned for slice 0-00001, and gone; put it back"


def test_a_plan_of_a_hundred_thousand_inputs(tmp_path: Path) -> None:
    made = Plan({}, 2**14, tuple(cut(inputs(*[10**9] * 100_000), lambda i: False, 256 * 2**20, 0, 0)))
    made.write(tmp_path)
    assert Plan.read(tmp_path) == made and len(made.slices) == 100_000
