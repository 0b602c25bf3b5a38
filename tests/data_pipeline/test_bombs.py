"""Inputs that are far larger inside than out: capped, set aside, in bounded memory."""

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from data_pipeline.sources.inputs import zstd
from tests.data_pipeline.inputs import http, page, warc_record

PROGRAM = """
import json, sys
from data_pipeline.sources.common_crawl import CommonCrawl
from data_pipeline.sources.inputs import Part, Reading, describe
from data_pipeline.sources.text_files import TextFiles
path = sys.argv[1]
source = (CommonCrawl if ".warc" in path else TextFiles)(paths=[path])
largest = 0
with Reading(Part(describe(path)), "c") as reading:
    for document in source.read(reading):
        largest, last = max(largest, len(document.text)), document.text[-10:]
    reading.finish()
status = open("/proc/self/status").read()  # ru_maxrss would begin with that of the process that forked this one
peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
print(json.dumps([largest, last, dict(reading.set_aside), peak]))
"""
GIB = 2**30


def child(path: Path) -> tuple[int, str, dict[str, int], int]:
    """(characters of the largest document, end of the last, what was set aside, peak memory) of a fresh process."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    largest, last, set_aside, peak = json.loads(done.stdout)
    return largest, last, set_aside, peak


def zeros(size: int, before: bytes, behind: bytes) -> bytes:
    """A gzip member of `size` zeros between two texts: one packed MiB again and again."""
    mib, packer = bytes(2**20), zlib.compressobj(wbits=-15)

    def packed(data: bytes, end: int = zlib.Z_FULL_FLUSH) -> bytes:
        return packer.compress(data) + packer.flush(end)

    count = size // len(mib)
    check = zlib.crc32(before)
    for _ in range(count):
        check = zlib.crc32(mib, check)
    body = packed(before) + packed(mib) * count + packed(behind, zlib.Z_FINISH)
    length = len(before) + count * len(mib) + len(behind)
    head = b"\x1f\x8b\x08" + bytes(7)
    return head + body + struct.pack("<II", zlib.crc32(behind, check), length)


def test_a_line_of_ten_gigabytes_is_let_go(tmp_path: Path) -> None:
    frame = zstd.compress(b"x" * 2**28)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstd.compress(b'{"text": "one"}\n"') + frame * 40 + zstd.compress(b'"\n{"text": "two"}\n'))
    assert path.stat().st_size < 2**20
    _, last, set_aside, peak = child(path)
    assert last == "two" and set_aside == {"a line of more than 67108864 bytes": 1} and peak < GIB


def test_a_json_string_of_a_hundred_megabytes_is_set_aside_and_one_of_sixty_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        for size in (100, 60):
            file.write(b'{"text": "' + b"y" * (size * 10**6) + b'"}\n')
        file.write(b'{"text": "end"}\n')
    largest, last, set_aside, peak = child(path)
    assert largest == 60 * 10**6 and last == "end" and peak < GIB
    assert set_aside == {"a line of more than 67108864 bytes": 1}


@pytest.mark.parametrize("name", ["a.txt.gz", "a.warc.gz"])
def test_a_gzip_bomb_stays_in_bounds(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.txt.gz":
        path.write_bytes(zeros(GIB, b"begin ", b" end"))
    else:
        head = warc_record("response", "https://e.org/", b"", "bomb").replace(b"Length: 0", b"Length: %d" % GIB)
        good = warc_record("response", "https://e.org/", http(page("Text.")), "good")
        path.write_bytes(zeros(GIB, head[:-4], b"\r\n\r\n") + zeros(0, good, b""))
    assert path.stat().st_size < 2 * 2**20
    largest, last, set_aside, peak = child(path)
    assert largest <= 64 * 2**20 and last.strip().endswith(("end", "Text.")) and peak < GIB
    assert set_aside == ({} if name == "a.txt.gz" else {"record too large": 1})
