"""Ranges of a bzip2 file, read by themselves: every block begins with a mark that can be found, and stands alone.

    https://github.com/dsnet/compress/blob/master/doc/bzip2-format.pdf (Tsai, "BZIP2: Format Specification", 2.2)

A file is streams end to end, a stream is `BZh`, a level, blocks at any bit, and an end mark. A block is unpacked here
by making it a stream of its own, so a damaged one costs no other, and a file of one stream can be cut like any other.
"""

from __future__ import annotations

import bz2
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

READ_BYTES = 256 * 2**10
MAX_PACKED_BITS = 8 * 2 * 2**20  # between two marks; a block is of 900 kB, and packs to 1 % more at the worst
BLOCK, END, MARK_BITS = 0x314159265359, 0x177245385090, 48
MARK_BYTES = 7  # that a mark touches, or that it and what must follow it touch


class Block(NamedTuple):
    offset: int  # the byte of the file in which it begins
    data: bytes | None  # at most 46 MB; None: damaged


class Mark(NamedTuple):
    bit: int  # of the file
    is_block: bool


def blocks(read: Callable[[int], bytes], start: int) -> Iterator[Block]:
    """The blocks of a file that begin at byte `start` or behind it, which is where `read` reads from.

    Bytes that merely look like a mark cut a block in two, which is seen because neither half can be unpacked.
    """
    packed = _Packed(read, start)
    while (first := packed.mark(0)) is not None:
        used = 1
        if first.is_block:
            data = packed.block(packed.mark(1))
            if data is None and (data := packed.block(packed.mark(2))) is not None:
                used = 2
            yield Block(first.bit // 8, data)
        packed.drop(used)


class _Packed:
    """What is read of a file and not yet unpacked, and the marks in it."""

    def __init__(self, read: Callable[[int], bytes], start: int) -> None:
        self.read = read
        self.data, self.offset = b"", start  # and its place in the file
        self.searched = start  # a mark that begins before this byte of the file is found
        self.marks: deque[Mark] = deque()
        self.is_over = False

    def mark(self, index: int) -> Mark | None:
        """That many marks ahead. None: there is none, or so far off that it cannot be the end of a block."""
        while len(self.marks) <= index and not self.is_over:
            if self.marks and 8 * (self.offset + len(self.data)) > self.marks[0].bit + MAX_PACKED_BITS:
                return None
            self._read_on()
        return self.marks[index] if len(self.marks) > index else None

    def drop(self, count: int) -> None:
        for _ in range(count):
            self.marks.popleft()

    def block(self, end: Mark | None) -> bytes | None:
        """Unpacked, from the first mark to `end`; None where that is not a block."""
        if end is None:
            return None
        begin = self.marks[0].bit
        size = end.bit - begin
        whole = int.from_bytes(self.data[begin // 8 - self.offset : -(-end.bit // 8) - self.offset], "big")
        bits = (whole >> -end.bit % 8) & ((1 << size) - 1)
        checksum = (bits >> max(0, size - MARK_BITS - 32)) & 0xFFFFFFFF  # of a stream of one block: the block's
        bits = (((bits << MARK_BITS) | END) << 32) | checksum
        size += MARK_BITS + 32
        try:
            return bz2.decompress(b"BZh9" + (bits << -size % 8).to_bytes(-(-size // 8), "big"))
        except (OSError, ValueError):
            return None

    def _read_on(self) -> None:
        more = self.read(READ_BYTES)
        self.is_over = not more
        keep = self.marks[0].bit // 8 if self.marks else self.searched
        self.data = self.data[keep - self.offset :] + more
        self.offset = keep
        self.marks += sorted(_marks(self.data, self.searched - keep, keep))
        self.searched = max(self.searched, keep + len(self.data) - MARK_BYTES + 1)


def _marks(data: bytes, begin: int, offset: int) -> Iterator[Mark]:
    """Those that begin in `data[begin:]` and lie in it whole. `offset` is the byte of the file where `data` begins."""
    for mark, is_block in ((BLOCK, True), (END, False)):
        for shift in range(8):
            wanted = mark << 8 - shift
            inner = wanted.to_bytes(MARK_BYTES, "big")[1:6]  # of whole bytes, at any shift
            mask = ((1 << MARK_BITS) - 1) << 8 - shift
            at = data.find(inner, begin + 1)
            while at >= 0:
                around = data[at - 1 : at - 1 + MARK_BYTES]
                if len(around) == MARK_BYTES and int.from_bytes(around, "big") & mask == wanted:
                    yield Mark(8 * (offset + at - 1) + shift, is_block)
                at = data.find(inner, at + 1)
