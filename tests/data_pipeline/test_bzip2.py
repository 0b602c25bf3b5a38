import bz2
import io
import random
from collections.abc import Iterator

import pytest

from data_pipeline.sources import bzip2
from data_pipeline.sources.bzip2 import Block, Mark, blocks


def unpacked(data: bytes, start: int = 0) -> list[Block]:
    file = io.BytesIO(data)
    file.seek(start)
    return list(blocks(lambda size: file.read(min(size, 1000)), start))  # marks lie across reads


def content(count: int, seed: int) -> bytes:
    return b" ".join(b"%d" % number for number in random.Random(seed).choices(range(10**6), k=count))


@pytest.mark.parametrize("level", [1, 9])
def test_blocks_end_to_end_are_the_content(level: int) -> None:
    data = content(200_000, level)
    packed = bz2.compress(data, level)
    found = unpacked(packed)
    assert b"".join(block.data or b"" for block in found) == data
    assert len(found) == -(-len(data) // (level * 100_000)) and found[0].offset == 4
    for block in found:
        assert unpacked(packed, block.offset + 1) == [b for b in found if b.offset > block.offset]


def test_streams_end_to_end_also_empty_ones() -> None:
    parts = [content(5000, 1), b"", b"x", b"", content(70_000, 2), b""]
    packed = b"".join(bz2.compress(part, 1 + i) for i, part in enumerate(parts))
    assert b"".join(block.data or b"" for block in unpacked(packed)) == b"".join(parts)
    assert unpacked(b"") == unpacked(bz2.compress(b"")) == unpacked(b"not packed" * 1000) == []


def test_one_block_may_unpack_to_much() -> None:
    data = bytes(10 * 2**20)
    assert [len(block.data or b"") for block in unpacked(bz2.compress(data))] == [len(data)]


@pytest.mark.parametrize("is_block", [True, False])
def test_bytes_that_look_like_a_mark_cut_nothing(is_block: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data = content(200_000, 3)
    packed = bz2.compress(data, 5)
    found = unpacked(packed)
    alike = packed[found[1].offset + 5000 :][:7]  # stands for a mark: an encoder cannot be made to write one
    real = bzip2._marks

    def with_more(data: bytes, begin: int, offset: int) -> Iterator[Mark]:
        yield from real(data, begin, offset)
        if (at := data.find(alike, begin)) >= 0:
            yield Mark(8 * (offset + at) + 3, is_block)

    monkeypatch.setattr(bzip2, "_marks", with_more)
    assert unpacked(packed) == found


def test_damage_costs_one_block() -> None:
    data = content(200_000, 4)
    packed = bytearray(bz2.compress(data, 1))
    found = unpacked(bytes(packed))
    for number in (0, 5, len(found) - 1):
        spoilt = bytearray(packed)
        spoilt[found[number].offset + 50] ^= 4
        assert unpacked(bytes(spoilt)) == [Block(b.offset, None if b is found[number] else b.data) for b in found]
    assert unpacked(bytes(packed[:-30])) == [*found[:-1], Block(found[-1].offset, None)]


def test_a_gap_without_marks_is_passed_over_in_bounded_memory() -> None:
    first, last = content(1000, 5), content(1000, 6)
    gap = random.Random(7).randbytes(6 * 2**20)
    packed = bz2.compress(first) + bz2.compress(first)[:-100] + gap + bz2.compress(last)
    assert [block.data for block in unpacked(packed)] == [first, None, last]
