"""Documents of finished shards found again: by their ids, by what their text contains, by one of their tokens.

A token's place is written `CORPUS:SLICE/SHARD:ROW:TOKEN`, as in `wikipedia:0-00000/train-00000:3:512`. A row is a block
of its shard, or the tail behind the last one.
"""

from __future__ import annotations

import io
import math
import re
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs import ConfigError
from data_pipeline.files import Damaged, Files, Unreadable
from data_pipeline.progress import Progress
from data_pipeline.shards import Manifest, ShardError, Shards, Split, Tokens, chosen, id_hash
from data_pipeline.tokenizer import Tokenizer

T = TypeVar("T")
U = TypeVar("U")

FEW = 16  # ids that are sought one by one in an index that need not be read whole
MOST_SIDECARS = 4  # held of a stream
LOOKED_UP_AT_ONCE = 16  # indices: where shards are far, a request takes its time
AROUND = 60  # tokens shown on either side of what was asked for
BETWEEN = b"\xff"  # stands for the mark between documents: no text has this byte
TOKEN_PLACE = re.compile(r"(?:(?P<corpus>[^:/]+):)?(?P<slice>[^:/]+)/(?P<shard>[^:/]+):(?P<row>\d+):(?P<token>\d+)")


@dataclass(frozen=True)
class Found:
    """A document as the shards hold it, and where it came from."""

    corpus: str
    id: str
    uri: str
    input: str | None
    offset: int | None  # a byte of the input, or of its packed member
    language: str | None
    split: Split
    first_token: str  # place
    last_token: str  # place; of its <|endoftext|>
    tokens: int  # with <|endoftext|>
    text: str


class Stream:
    """One split of one slice: its tokens by their position, in whichever shard they lie."""

    def __init__(self, manifest: Manifest, generation: int, split: Split, slice: str) -> None:
        self.manifest, self.split, self.slice = manifest, split, slice
        shards = manifest.shards(split, generation)
        self.shards = Shards(manifest, chosen(shards.table, {"slice": slice}))
        self._sidecars: OrderedDict[int, pa.Table] = OrderedDict()
        self.begins = np.cumsum([0, *self.shards.table["tokens"].to_pylist()]).tolist()  # position of each shard
        first = int(pc.index(shards.table["slice"], slice).as_py())
        self.first_block = int(shards.ends[first - 1]) if first else 0  # of the generation's blocks of the split

    def place(self, position: int) -> tuple[int, int, int]:
        """(shard, row, token of the row) of a position."""
        shard = int(np.searchsorted(self.begins, position, side="right")) - 1
        row, token = divmod(position - self.begins[shard], self.manifest.format.block_tokens)
        return shard, row, token

    def position(self, shard: int, row: int, token: int) -> int:
        """The inverse of `place`."""
        return int(self.begins[shard]) + row * self.manifest.format.block_tokens + token

    def tokens(self, begin: int, end: int) -> Tokens:
        """The ids from one position up to another."""
        parts = []
        while begin < end:
            shard, row, token = self.place(begin)
            ids = self.shards.member(shard, row)[: self.manifest.format.block_tokens]
            parts.append(ids[token : token + end - begin])
            begin += len(parts[-1])
        return np.concatenate(parts) if parts else np.zeros(0, self.manifest.format.dtype)

    def name(self, position: int) -> str:
        """A position as a person may give it back."""
        shard, row, token = self.place(position)
        return f"{self.manifest.head['corpus']}:{self.slice}/{self.shards.table['name'][shard]}:{row}:{token}"

    def entry(self, ordinal: int, shard: int) -> dict[str, Any] | None:
        """The sidecar's row of a document that begins in `shard` or before it."""
        for number in range(shard, -1, -1):
            table = self._sidecar(number)
            row = int(np.searchsorted(table["ordinal"].to_numpy(), ordinal))
            if row < len(table) and table["ordinal"][row].as_py() == ordinal:
                return dict(table.slice(row, 1).to_pylist()[0])
        return None

    def _sidecar(self, shard: int) -> pa.Table:
        if shard not in self._sidecars:
            while len(self._sidecars) >= MOST_SIDECARS:
                self._sidecars.popitem(last=False)
            self._sidecars[shard] = self.shards.sidecar(shard)
        return self._sidecars[shard]

    def around(self, entry: dict[str, Any], tokenizer: Tokenizer, position: int, width: int = AROUND) -> str:
        """The text up to `width` tokens on either side of a position, within its document."""
        begin, end = entry["start"], entry["start"] + entry["tokens"] - 1
        ids = self.tokens(max(begin, position - width), min(end, position + width))
        return tokenizer.decode(ids).strip("\ufffd")

    def found(self, entry: dict[str, Any], tokenizer: Tokenizer, text: str | None = None) -> Found:
        """A document by its sidecar's row; `text` in place of the whole."""
        begin, end = entry["start"], entry["start"] + entry["tokens"]
        if text is None:
            text = tokenizer.decode(self.tokens(begin, end - 1))
        return Found(
            corpus=self.manifest.head["corpus"],
            id=entry["id"],
            uri=entry["uri"],
            input=entry["input"],
            offset=entry["offset"],
            language=entry["language"],
            split=self.split,
            first_token=self.name(begin),
            last_token=self.name(end - 1),
            tokens=entry["tokens"],
            text=text,
        )


def streams(manifest: Manifest, slice: str | None = None) -> Iterator[Stream]:
    """Every stream of a corpus that has tokens, or those of one slice."""
    table = manifest.table.select(["slice", "generation", "split"])
    if slice is not None:
        table = chosen(table, {"slice": slice})
    for row in dict.fromkeys(zip(*(column.to_pylist() for column in table.columns), strict=True)):
        yield Stream(manifest, generation=row[1], split=row[2], slice=row[0])


# --- by id ----------------------------------------------------------------------------------------------------------


def by_id(manifest: Manifest, tokenizer: Tokenizer, id: str) -> Iterator[Found]:
    """The documents of this id: one, or more where an input gives it to several."""
    wanted = id_hash(id)
    slices = list(dict.fromkeys(manifest.table["slice"].to_pylist()))
    for slice, ordinals in zip(slices, _looked_up(slices, lambda each: _ordinals(manifest, each, wanted)), strict=True):
        for stream in streams(manifest, slice) if ordinals else ():
            last = len(stream.shards) - 1
            for entry in filter(None, (stream.entry(ordinal, last) for ordinal in ordinals)):
                if entry["id"] == id:
                    yield stream.found(entry, tokenizer)
            stream.shards.close()


def _looked_up(slices: Iterable[T], look: Callable[[T], U]) -> Iterator[U]:
    """What `look` finds for each slice, in their order."""
    with ThreadPoolExecutor(LOOKED_UP_AT_ONCE) as threads:
        yield from threads.map(look, slices)


class _Hashes(Sequence[int]):
    """The sorted hashes of a slice's `ids.npy`, read a page at a time: a search looks at a few of millions."""

    HEADER = 128  # bytes, as numpy pads them
    NEAR, FAR = 2**12, 2**16  # bytes of a page

    def __init__(self, files: Files, name: str) -> None:
        self.files, self.name = files, name
        header = io.BytesIO(files.raw(name, 0, self.HEADER))
        if np.lib.format.read_magic(header) != (1, 0):
            raise ValueError("not an index")
        shape, _, self.dtype = np.lib.format.read_array_header_1_0(header)
        self._begin, self._length = header.tell(), int(shape[0])
        self._rows = max(1, (self.FAR if files.is_far else self.NEAR) // self.dtype.itemsize)  # of a page
        self._pages: dict[int, npt.NDArray[Any]] = {}

    def __len__(self) -> int:
        return self._length

    def row(self, number: int) -> Any:
        page, place = divmod(number, self._rows)
        if page not in self._pages:
            count, size = min(self._rows, self._length - page * self._rows), self.dtype.itemsize
            data = self.files.raw(self.name, self._begin + page * self._rows * size, count * size)
            self._pages[page] = np.frombuffer(data, self.dtype, count)
        return self._pages[page][place]

    def __getitem__(self, number: Any) -> Any:
        return int(self.row(number)["hash"])

    def first(self, wanted: int) -> int:
        """Where `wanted` is or would be. Hashes are spread evenly, so that is about where its size says."""
        guess, far = wanted * len(self) >> 64, 3 * math.isqrt(len(self)) + 1  # six standard deviations
        low, high = max(0, guess - far), min(len(self), guess + far)
        if low and self[low - 1] >= wanted:
            low = 0
        if high < len(self) and self[high] < wanted:
            high = len(self)
        return bisect_left(self, wanted, low, high)


def _ordinals(manifest: Manifest, slice: str, wanted: int) -> list[int]:
    name = f"slices/{slice}/ids.npy"
    try:
        hashes = _Hashes(manifest.files, name)
        number, found = hashes.first(wanted), []
        while number < len(hashes) and hashes[number] == wanted:
            found.append(int(hashes.row(number)["ordinal"]))
            number += 1
        return found
    except Unreadable as error:
        raise ShardError(f"{error}; see data-prep verify") from None
    except ValueError as error:
        raise ShardError(f"{manifest.address}/{name}: cannot be read ({error}); see data-prep verify") from None


# --- many, by their ids ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """Where a document lies in its corpus: in the stream of a split of a slice."""

    id: str
    uri: str
    generation: int
    split: Split
    slice: str
    start: int  # of its first token in that stream
    tokens: int  # with <|endoftext|>
    block: int  # of the generation's blocks of the split, at which the stream begins
    blocks: int  # full ones of the stream

    def samples(self, seq_tokens: int, block_tokens: int) -> range:
        """The samples of the generation (block * rows + row) that hold any token of it, as target alone too.

        A sample has one token more than it has inputs, so one that begins a sample is held by the sample before also.
        None where all of it lies in the stream's tail.
        """
        rows = block_tokens // seq_tokens
        first, last = max(self.start - 1, 0) // seq_tokens, (self.start + self.tokens - 1) // seq_tokens
        end = min(last + 1, self.blocks * rows)
        return range(self.block * rows + min(first, end), self.block * rows + end)


def by_ids(manifest: Manifest, ids: Iterable[str], checked: bool = False) -> Iterator[Held]:
    """Where the documents of these ids lie; several of one id where an input gives it to several.

    `checked` holds every index that is looked into to its hash: damage is never taken for absence. Raises ShardError.
    """
    wanted = set(ids)
    hashes = np.array(sorted({id_hash(id) for id in wanted}), np.uint64)
    table = manifest.table
    indices = dict(zip(table["slice"].to_pylist(), table["ids_hash"].to_pylist(), strict=True))
    look = partial(_many_ordinals, manifest, hashes, checked)
    for slice, ordinals in zip(indices, _looked_up(indices.items(), look), strict=True):
        left = set(ordinals.tolist())
        for stream in streams(manifest, slice) if left else ():
            for shard in range(len(stream.shards)):
                for entry in _entries(stream.shards, shard, ordinals):
                    left.discard(entry["ordinal"])
                    if entry["id"] in wanted:
                        yield _held(stream, entry)
            stream.shards.close()
        if left:
            folder = f"{manifest.address}/slices/{slice}"
            raise ShardError(f"{folder}: no sidecar has document {min(left)} of ids.npy; see data-prep verify")


def _held(stream: Stream, entry: dict[str, Any]) -> Held:
    generation = stream.shards.table["generation"][0].as_py()
    return Held(
        entry["id"], entry["uri"], generation, stream.split, stream.slice, entry["start"], entry["tokens"],
        stream.first_block, stream.shards.blocks,
    )  # fmt: skip


def _many_ordinals(
    manifest: Manifest, hashes: npt.NDArray[np.uint64], checked: bool, of: tuple[str, str]
) -> npt.NDArray[np.int64]:
    """The ordinals under any of these hashes in a slice, `of` its name and its index' hash. Few hashes are sought in
    the file, unless it is to be checked; for many it is read whole."""
    slice, index_hash = of
    if not checked and len(hashes) <= FEW:
        return np.array([n for wanted in hashes.tolist() for n in _ordinals(manifest, slice, wanted)], np.int64)
    name = f"slices/{slice}/ids.npy"
    try:
        data = manifest.files.whole(name, index_hash)
    except Damaged:
        raise ShardError(f"{manifest.address}/{name}: damaged (hash differs); see data-prep verify") from None
    except Unreadable as error:
        raise ShardError(f"{error}; see data-prep verify") from None
    index = np.load(io.BytesIO(data), allow_pickle=False)
    begin = np.searchsorted(index["hash"], hashes)
    end = np.searchsorted(index["hash"], hashes, side="right")
    here = begin < end  # nearly none, where many are sought in many slices
    parts = [index["ordinal"][b:e] for b, e in zip(begin[here].tolist(), end[here].tolist(), strict=True)]
    return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64)


def _entries(shards: Shards, shard: int, ordinals: npt.NDArray[np.int64]) -> Iterator[dict[str, Any]]:
    """The sidecar's rows of those of the documents that begin in a shard."""
    file = pq.ParquetFile(pa.BufferReader(shards.sidecar_bytes(shard)))
    statistics = [file.metadata.row_group(i).column(0).statistics for i in range(file.metadata.num_row_groups)]
    if not any(s is None or ((ordinals >= s.min) & (ordinals <= s.max)).any() for s in statistics):
        return
    table = file.read(["ordinal", "start", "tokens", "id", "uri"], use_threads=False)
    yield from table.take(np.flatnonzero(np.isin(table["ordinal"].to_numpy(), ordinals))).to_pylist()


# --- by a token -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class At:
    """A token, and the document it belongs to, whose text is what stands around the token."""

    place: str
    id: int
    piece: str
    document: Found


def by_token(corpora: Sequence[tuple[Manifest, Tokenizer]], place: str) -> At:
    """What lies at a token's place. Raises ConfigError where there is no such place."""
    match = TOKEN_PLACE.fullmatch(place)
    if match is None:
        raise ConfigError(
            f"--token: expected CORPUS:SLICE/SHARD:ROW:TOKEN, such as wiki:0-00000/train-00000:3:512, got {place!r}"
        )
    fits = [pair for pair in corpora if match["corpus"] in (None, pair[0].head["corpus"])]
    if len(fits) != 1:
        names = ", ".join(manifest.head["corpus"] for manifest, _ in corpora)
        raise ConfigError(f"--token {place}: expected one of the corpora {names} in front, as in CORPUS:{place}")
    manifest, tokenizer = fits[0]
    for stream in streams(manifest, match["slice"]):
        shards = stream.shards.table["name"].to_pylist()
        if match["shard"] in shards:
            return _at(stream, shards.index(match["shard"]), int(match["row"]), int(match["token"]), place, tokenizer)
    raise ConfigError(f"--token {place}: no such shard; inspect shows some places")


def _at(stream: Stream, shard: int, row: int, token: int, place: str, tokenizer: Tokenizer) -> At:
    table, block = stream.shards.table, stream.manifest.format.block_tokens
    blocks, tail = table["blocks"][shard].as_py(), table["tail_tokens"][shard].as_py()
    rows = blocks + (tail > 0)
    if row >= rows or token >= (tail if row == blocks else block):
        last = f", the last of {tail}" if tail else ""
        raise ConfigError(f"--token {place}: the shard has {rows} rows of {block} tokens{last}; both count from 0")
    ordinals, starts = stream.shards.documents(shard, row).T
    ordinal = int(ordinals[np.searchsorted(starts, token, side="right") - 1])
    entry = stream.entry(ordinal, shard)
    if entry is None:
        name = f"{stream.manifest.address}/{stream.shards.name(shard, 'docs.parquet')}"
        raise ShardError(f"{name}: no document {ordinal}; see data-prep verify")
    position = stream.position(shard, row, token)
    (id,) = stream.tokens(position, position + 1).tolist()
    text = stream.around(entry, tokenizer, position)
    return At(stream.name(position), id, tokenizer.decode([id]), stream.found(entry, tokenizer, text))


# --- by text --------------------------------------------------------------------------------------------------------


Show = Callable[[Progress], None]


def by_text(manifest: Manifest, tokenizer: Tokenizer, text: str, progress: Progress, show: Show) -> Iterator[Found]:
    """The documents that contain a text, each once with what stands around it. Reads and decodes everything.

    Ids become bytes, not characters, since a token may end within one. Raises ConfigError for a tokenizer whose tokens
    are not bytes.
    """
    pieces = tokenizer.token_bytes
    if pieces is None:
        raise ConfigError(f"{tokenizer.path}: --search needs a byte-level tokenizer, such as GPT-2's")
    pieces = [*pieces[: tokenizer.end_of_text], BETWEEN, *pieces[tokenizer.end_of_text + 1 :]]
    for stream in streams(manifest):
        for hit in _search(stream, pieces, text.encode(), progress, show):
            progress.done_documents += 1
            entry = stream.entry(hit.ordinal, hit.shard)
            if entry is not None:
                around = stream.around(entry, tokenizer, hit.position, AROUND + len(text.encode()))
                yield stream.found(entry, tokenizer, around)
        stream.shards.close()


@dataclass(frozen=True)
class _Hit:
    ordinal: int
    shard: int
    position: int  # of the token in which it begins, or of one behind that within what was searched for


def _search(stream: Stream, pieces: Sequence[bytes], wanted: bytes, progress: Progress, show: Show) -> Iterator[_Hit]:
    block, last, carried = stream.manifest.format.block_tokens, -1, b""
    for shard in range(len(stream.shards)):
        blocks, tail = (stream.shards.table[key][shard].as_py() for key in ("blocks", "tail_tokens"))
        for row in range(blocks + (tail > 0)):
            ids = stream.shards.member(shard, row)[:block].tolist()
            data = carried + b"".join(map(pieces.__getitem__, ids))
            place = data.find(wanted)
            if place >= 0:
                ordinals, starts = stream.shards.documents(shard, row).T
                lengths = np.fromiter((len(pieces[id]) for id in ids), np.int64, len(ids))
                ends = len(carried) + np.cumsum(lengths)  # where each token's bytes end
            while place >= 0:
                token = int(np.searchsorted(ends, place, side="right"))
                which = max(int(np.searchsorted(starts, token, side="right")) - 1, 0)
                if (ordinal := int(ordinals[which])) != last:
                    yield _Hit(ordinal, shard, stream.position(shard, row, token))
                    last = ordinal
                end = data.find(BETWEEN, place)
                place = data.find(wanted, end) if end >= 0 else -1
            carried = data[max(0, len(data) - len(wanted) + 1) :] if len(wanted) > 1 else b""
            progress.done_bytes += len(ids) * stream.manifest.format.dtype.itemsize
            show(progress)


def token_bytes(manifest: Manifest) -> int:
    """Of all tokens of a corpus: what a search reads."""
    return int(sum(manifest.table["tokens"].to_pylist())) * manifest.format.dtype.itemsize
