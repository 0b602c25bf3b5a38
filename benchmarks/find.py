"""Searching finished shards: how fast, beside decoding with `tokenizers` and reading the text itself.

    python -m benchmarks.find [--text FOLDER] [--tokenizer tokenizer.json] [--mb 50] [--rounds 3]

The text files of FOLDER are prepared into shards, as often as it takes. Then, in this process on one core: our search
for a text that no document has, `tokenizers` decoding the same blocks, and `bytes.find` over the text as it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml

import configs
from data_pipeline import prepare
from data_pipeline.find import by_id, by_text, streams, token_bytes
from data_pipeline.preparation import Preparation
from data_pipeline.progress import Progress
from data_pipeline.shards import Manifest
from data_pipeline.summary import folder_tokenizer
from data_pipeline.tokenizer import Tokenizer

ABSENT = "no document of any corpus has these words in this order, for they are ours"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=Path("../shared/data/books"))
    parser.add_argument("--tokenizer", type=Path, default=Path("../shared/data/tokenizer/gpt2-tokenizer.json"))
    parser.add_argument("--mb", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        manifest = prepared(arguments.text, arguments.tokenizer, arguments.mb * 1_000_000, Path(scratch))
        tokenizer = folder_tokenizer(manifest)
        size = manifest.head["counts"]["text_bytes"]
        text = (Path(scratch) / "text.jsonl").read_bytes()
        sides: dict[str, Callable[[], object]] = {
            "inspect --search": lambda: search(manifest, tokenizer),
            "decoding with tokenizers": lambda: decode(manifest, tokenizer),
            "bytes.find in the JSON lines": lambda: text.find(ABSENT.encode()),
        }
        rates = {name: size / median(side, arguments.rounds) / 1e6 for name, side in sides.items()}
        id = "document 100"
        print(f"{size / 1e6:.0f} MB of text, {sum(manifest.head['counts']['documents'].values()):,} documents")
        for name, rate in rates.items():
            print(f"{name:<30} {rate:10.1f} MB/s  {rate / rates['decoding with tokenizers']:8.1f}x")
        seconds = median(lambda: list(by_id(manifest, tokenizer, id)), arguments.rounds)
        print(f"{'inspect --doc':<30} {1000 * seconds:10.1f} ms")


def prepared(folder: Path, tokenizer: Path, size: int, scratch: Path) -> Manifest:
    """Shards of about `size` bytes of text, in documents of 4,000 characters."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.txt"))]
    cut = [text[i : i + 4000] for text in texts for i in range(0, len(text), 4000)]
    with (scratch / "text.jsonl").open("w") as file:
        number = 0
        while file.tell() < size:
            row = {"text": cut[number % len(cut)], "id": f"document {number}"}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            number += 1
    config = {
        "name": "search",
        "out": str(scratch / "out"),
        "tokenizer": {"kind": "file", "path": str(tokenizer)},
        "corpora": {"text": {"kind": "text_files", "paths": [str(scratch / "text.jsonl")], "id_field": "id"}},
    }
    (scratch / "search.yaml").write_text(yaml.safe_dump(config))
    prepare.run(configs.load(Preparation, scratch / "search.yaml", []))
    return Manifest.open(scratch / "out/text")


def search(manifest: Manifest, tokenizer: Tokenizer) -> None:
    found = list(by_text(manifest, tokenizer, ABSENT, Progress(token_bytes(manifest)), lambda _: None))
    assert not found


def decode(manifest: Manifest, tokenizer: Tokenizer) -> None:
    wanted, block = ABSENT, manifest.format.block_tokens
    for stream in streams(manifest):
        for shard in range(len(stream.shards)):
            for row in range(stream.shards.table["blocks"][shard].as_py()):
                assert wanted not in tokenizer.decode(stream.shards.member(shard, row)[:block])
        stream.shards.close()


def median(side: Callable[[], object], rounds: int) -> float:
    """CPU seconds."""
    seconds = []
    for _ in range(rounds):
        begun = time.process_time()
        side()
        seconds.append(time.process_time() - begun)
    return max(statistics.median(seconds), 1e-6)


if __name__ == "__main__":
    main()
