"""Finished corpora: where they are, what became of their documents, whether they are whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from configs import ConfigError, load
from data_pipeline import shards
from data_pipeline.files import Missing, Outage, Unreadable, files_of, is_remote, watched
from data_pipeline.made_once import TOKENIZER
from data_pipeline.plan import PLAN
from data_pipeline.preparation import Preparation
from data_pipeline.shards import Manifest, ShardError, Unreachable
from data_pipeline.tokenizer import Tokenizer


@dataclass(frozen=True)
class Summary:
    """What became of a corpus."""

    corpus: str
    documents_read: int
    documents: int  # kept
    set_aside: dict[str, int]  # reason -> records that gave no document
    dropped: dict[str, int]  # reason -> documents that a filter dropped
    input_bytes: int
    characters: int  # of the documents kept
    tokens: int
    characters_per_token: float
    train_tokens: int
    validation_tokens: int
    blocks: int  # of training
    block_tokens: int
    tail_tokens: int  # of training: in no full block, not fed
    shards: int
    bytes: int  # of all shards


def summarized(manifest: Manifest) -> Summary:
    """From the manifest alone."""
    counts, generations = manifest.head["counts"], manifest.generations

    def total(split: str, key: str) -> int:
        return sum(int(generation[split][key]) for generation in generations)

    tokens = sum(counts["tokens"].values())
    return Summary(
        corpus=manifest.head["corpus"],
        documents_read=counts["read"],
        documents=sum(counts["documents"].values()),
        set_aside=counts["set_aside"],
        dropped=counts["dropped"],
        input_bytes=counts["input_bytes"],
        characters=counts["characters"],
        tokens=tokens,
        characters_per_token=round(counts["characters"] / max(tokens, 1), 3),
        train_tokens=total("train", "tokens"),
        validation_tokens=total("validation", "tokens"),
        blocks=total("train", "blocks"),
        block_tokens=manifest.format.block_tokens,
        tail_tokens=total("train", "tail_tokens"),
        shards=sum(int(generation["shards"]) for generation in generations),
        bytes=total("train", "bytes") + total("validation", "bytes"),
    )


def folders(where: Path) -> list[Path]:
    """The corpus folders of a config, of its `out`, or the corpus folder itself. Raises ConfigError where none is."""
    if where.is_file():
        preparation = load(Preparation, where)
        return [preparation.out / corpus for corpus in preparation.corpora]
    marks = (PLAN, shards.MANIFEST)
    found = [path for path in (where, *sorted(where.glob("*/"))) if any((path / mark).is_file() for mark in marks)]
    if not found:
        raise ConfigError(f"{where}: neither a config nor a folder of shards")
    return found


def opened(where: str) -> list[Manifest]:
    """The corpora of a config, of its `out`, or of one folder or address. Raises ConfigError and ShardError."""
    if is_remote(where):
        return [Manifest.read(files_of(where))]
    return list(map(Manifest.open, folders(Path(where))))


def verified(folder: Path, look: Callable[[int, int], None] = lambda *_: None) -> Iterator[str]:
    """A line for each damage of a corpus folder and its tokenizer. `look`: as of `shards.verify`."""
    damages = list(shards.verify(folder, look))
    yield from damages
    if not damages:
        try:
            folder_tokenizer(Manifest.open(folder))
        except (ConfigError, ShardError) as error:
            yield str(error)


def folder_tokenizer(manifest: Manifest) -> Tokenizer:
    """The tokenizer that a corpus was made with. Raises ConfigError when it is not there, or another; Unreachable."""
    return read_tokenizer(manifest, tokenizer_file(manifest))


def tokenizer_file(manifest: Manifest) -> bytes:
    """What the file of that tokenizer holds. Raises ConfigError when it is not there; Unreachable."""
    try:
        return watched(lambda: manifest.beside(TOKENIZER))
    except Missing:
        raise ConfigError(f"{manifest.name_beside(TOKENIZER)}: no such tokenizer file") from None
    except Outage as error:
        raise Unreachable(str(error)) from None
    except Unreadable as error:
        raise ConfigError(str(error)) from None


def read_tokenizer(manifest: Manifest, data: bytes) -> Tokenizer:
    """The tokenizer of a corpus from what its file holds. Raises ConfigError where it is none, or another."""
    path = manifest.name_beside(TOKENIZER)
    tokenizer = Tokenizer.read(data, path)
    if tokenizer.sha256 != manifest.head["tokenizer_sha256"]:
        raise ConfigError(f"{path}: not the tokenizer of {manifest.address} (sha256 differs); restore it")
    return tokenizer
