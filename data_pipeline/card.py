"""The data card: what became of the raw corpora, as a page for people and as JSON.

`card.json` and `card.html` lie beside the corpora. All in them follows from the shards and the configuration, but for
"made": the times. The page is one file without scripts, and no text of a corpus can become anything but text in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from configs import Section
from data_pipeline.dropped import examples, lost_documents
from data_pipeline.files import Unreadable
from data_pipeline.page import render
from data_pipeline.plan import PLAN, Plan
from data_pipeline.progress import size
from data_pipeline.samples import Sample, excerpts, samples
from data_pipeline.shards import MANIFEST, Manifest, write_durably
from data_pipeline.tokenizer import Tokenizer

CARD = "card.json"
PAGE = "card.html"
VERSION = 1
EXAMPLES = 10  # texts per reason in the JSON; the page shows PAGE_EXAMPLES, cut to PAGE_CHARS
PAGE_EXAMPLES = 5
PAGE_CHARS = 600
SAMPLES = 5  # texts that were kept
COMPARED = 50  # excerpts for the comparison of tokenizers
COMPARED_TOKENS = 2000  # of each
INPUTS = 1000  # listed; all of them are in plan.json
PAGE_INPUTS = 20
PAGE_LANGUAGES = 12


class Card(Section):
    """What the data card shows besides what the shards tell; changes no byte of them."""

    compare_tokenizer: Path | None = None  # a tokenizer.json, such as GPT-2's, to compare tokens per character with


Notes = Mapping[str, str | None]  # "about", "licence" of a corpus, from its configuration


def make(
    name: str,
    corpora: Sequence[tuple[Manifest, Tokenizer]],
    notes: Mapping[str, Notes],
    compare: Path | None = None,
) -> dict[str, Any]:
    """The card of some corpora as JSON. Raises ShardError on damage, ConfigError for a tokenizer that cannot serve."""
    other = None if compare is None else Tokenizer.load(compare)
    return {
        "version": VERSION,
        "name": name,
        "corpora": [_corpus(manifest, own, notes.get(manifest.head["corpus"], {}), other) for manifest, own in corpora],
        "made": {
            "at": _time(datetime.now(UTC).timestamp()),
            "longhaul": metadata.version("longhaul"),
            "corpora": {manifest.head["corpus"]: _times(manifest.folder) for manifest, _ in corpora},
        },
    }


def write(folder: Path, card: Mapping[str, Any]) -> Path:
    """Write `card.json` and `card.html`, unless they say the same already; the path of the page."""
    old = read(folder)
    if {**old, "made": None} != {**card, "made": None} or not (folder / PAGE).is_file():
        write_durably(folder / CARD, (json.dumps(card, indent=1, ensure_ascii=False) + "\n").encode())
        write_durably(folder / PAGE, page(card).encode())
    return folder / PAGE


def read(folder: Path) -> dict[str, Any]:
    """The card that lies in a folder; {} where there is none that can be read."""
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) else {}


def read_beside(manifest: Manifest) -> dict[str, Any]:
    """The card that lies beside a corpus, wherever that is; {} where there is none that can be read."""
    try:
        card = json.loads(manifest.beside(CARD))
    except (Unreadable, ValueError):
        return {}
    return card if isinstance(card, dict) else {}


def notes_of(card: Mapping[str, Any]) -> dict[str, Notes]:
    """What an earlier card says of each corpus that its shards do not."""
    return {c["corpus"]: {key: c.get(key) for key in ("about", "licence")} for c in card.get("corpora", [])}


# --- one corpus -----------------------------------------------------------------------------------------------------


def _corpus(manifest: Manifest, tokenizer: Tokenizer, notes: Notes, other: Tokenizer | None) -> dict[str, Any]:
    head, counts = manifest.head, manifest.head["counts"]
    config = head["config"]
    tokens = sum(counts["tokens"].values())
    here = _tars_are_here(manifest)
    return {
        "corpus": head["corpus"],
        "about": notes.get("about"),
        "licence": notes.get("licence"),
        "kind": config["source"]["kind"],
        "documents_read": counts["read"],
        "documents": sum(counts["documents"].values()),
        "tokens": tokens,
        "characters": counts["characters"],
        "text_bytes": counts["text_bytes"],
        "input_bytes": counts["input_bytes"],
        "shard_bytes": _total(manifest, "bytes"),
        "shards": sum(int(generation["shards"]) for generation in manifest.generations),
        "train_tokens": _total(manifest, "tokens", "train"),
        "validation_tokens": _total(manifest, "tokens", "validation"),
        "tail_tokens": _total(manifest, "tail_tokens", "train"),
        "blocks": _total(manifest, "blocks", "train"),
        "block_tokens": manifest.format.block_tokens,
        "tokens_per_character": _ratio(tokens, counts["characters"]),
        "compared": None if other is None or not here else _compared(manifest, tokenizer, other),
        "steps": steps(counts),
        "set_aside": counts["set_aside"],
        "dropped": _dropped(manifest, counts),
        "masked": counts.get("masked", {}),
        "decontaminated": counts.get("decontaminated", {}),
        "languages": counts["languages"],
        "languages_looked_at": counts["languages_looked_at"],
        "length_characters": counts["length_characters"],
        "length_tokens": counts["length_tokens"],
        "samples": [_shown(sample) for sample in samples(manifest, tokenizer, "train", SAMPLES)] if here else [],
        "inputs": _inputs(manifest),
        "settings": config,
        "encoder": head["encoder"],
        "versions": head["versions"],
        "hashes": {
            "manifest_sha256": head["sha256"],
            "tokenizer_sha256": head["tokenizer_sha256"],
            "generations_sha256": [generation["identity"] for generation in manifest.generations],
        },
    }


def _tars_are_here(manifest: Manifest) -> bool:
    """Not those that were published, and then removed."""
    names = zip(manifest.table["slice"].to_pylist(), manifest.table["name"].to_pylist(), strict=True)
    return all((manifest.folder / "slices" / slice / f"{name}.tar").is_file() for slice, name in names)


def steps(counts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each step let through, documents and bytes of text, and how many of both it took away.

    Every reason for dropping is a step of its own; what raised comes first, wherever it did.
    """
    lost = lost_documents(counts)
    found = [_step("read", counts["read"], counts["read_bytes"])]
    for reason in sorted(lost, key=lambda reason: (_stage(reason), -lost[reason], reason)):
        if _stage(reason) and found[-1]["step"] in ("read", "raises"):
            found.append(_cleaned(found[-1], counts))
        before, bytes = found[-1], counts["dropped_bytes"].get(reason, 0)
        found.append(_step(reason, before["documents"] - lost[reason], before["bytes"] - bytes, before))
    if found[-1]["step"] in ("read", "raises"):
        found.append(_cleaned(found[-1], counts))
    kept, before = _step("kept", sum(counts["documents"].values()), counts["text_bytes"]), found[-1]
    if (before["documents"], before["bytes"]) != (kept["documents"], kept["bytes"]):
        found.append(_step("cut out", kept["documents"], kept["bytes"], before))
    return [*found, kept]


def _cleaned(before: Mapping[str, Any], counts: Mapping[str, Any]) -> dict[str, Any]:
    return _step("clean", before["documents"], counts["cleaned_bytes"], before)


def _step(name: str, documents: int, bytes: int, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {
        "step": name,
        "documents": documents,
        "bytes": bytes,
        "less_documents": before["documents"] - documents if before else 0,
        "less_bytes": before["bytes"] - bytes if before else 0,
    }


def _stage(reason: str) -> int:
    """What raised, then filters, then duplicates, then what evaluation sets have."""
    if reason == "raises":
        return 0
    return 2 if "duplicate" in reason else 3 if reason.startswith("decontamination") else 1


def _dropped(manifest: Manifest, counts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each reason with its counts and some of the documents, the most frequent first."""
    lost, shown = lost_documents(counts), examples(manifest, EXAMPLES)
    return [
        {
            "reason": reason,
            "documents": lost[reason],
            "bytes": counts["dropped_bytes"].get(reason, 0),
            "examples": shown.get(reason, []),
        }
        for reason in sorted(lost, key=lambda reason: (-lost[reason], reason))
    ]


def _compared(manifest: Manifest, own: Tokenizer, other: Tokenizer) -> dict[str, Any]:
    """Both tokenizers on the same texts, from all over the corpus."""
    texts = list(excerpts(manifest, own, "train", COMPARED, COMPARED_TOKENS))
    characters = sum(map(len, texts))
    own_tokens, other_tokens = (sum(map(len, tokenizer.encode_batch(texts))) for tokenizer in (own, other))
    return {
        "tokenizer": other.path.name,
        "sha256": other.sha256,
        "vocab_size": other.vocab_size,
        "excerpts": len(texts),
        "characters": characters,
        "own_tokens": own_tokens,
        "other_tokens": other_tokens,
        "own_tokens_per_character": _ratio(own_tokens, characters),
        "other_tokens_per_character": _ratio(other_tokens, characters),
    }


def _shown(sample: Sample) -> dict[str, Any]:
    place = f"{sample.slice}/{sample.shard}:{sample.row}"
    return {"id": sample.id, "uri": sample.uri, "place": place, "tokens": sample.tokens, "text": sample.text}


def _inputs(manifest: Manifest) -> dict[str, Any]:
    plan = Plan.read(manifest.folder)
    sizes = {part.input.name: part.input.size for slice in plan.slices for part in slice.parts} if plan else {}
    listed = [{"name": name, "bytes": bytes} for name, bytes in list(sizes.items())[:INPUTS]]
    return {"count": len(sizes), "bytes": manifest.head["counts"]["input_bytes"], "first": listed}


def _total(manifest: Manifest, key: str, *splits: str) -> int:
    return sum(int(g[split][key]) for g in manifest.generations for split in splits or ("train", "validation"))


def _ratio(tokens: int, characters: int) -> float | None:
    return round(tokens / characters, 4) if characters else None


def _times(folder: Path) -> dict[str, str | None]:
    """When a corpus was planned and when it was finished, by its files' times."""
    planned, sealed = folder / PLAN, folder / MANIFEST
    return {
        "planned": _time(planned.stat().st_mtime) if planned.is_file() else None,
        "finished": _time(sealed.stat().st_mtime),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


# --- the page -------------------------------------------------------------------------------------------------------


def page(card: Mapping[str, Any]) -> str:
    """The card as one HTML file. Everything put in is escaped."""
    return render(
        Path(__file__).with_name("card.html.jinja"),
        FILTERS,
        card=card,
        corpora=card["corpora"],
        total={key: sum(c[key] for c in card["corpora"]) for key in SUMMED},
        limits={"examples": PAGE_EXAMPLES, "chars": PAGE_CHARS, "inputs": PAGE_INPUTS, "languages": PAGE_LANGUAGES},
    )


SUMMED = ("documents_read", "documents", "tokens", "characters", "text_bytes", "input_bytes", "shard_bytes", "shards")


def _unbroken(text: str) -> str:
    """A number and its unit stay on one line."""
    return text.replace(" ", "\u00a0")


def short(number: float) -> str:
    """1234567 -> `1.23 M`; below ten thousand as it is."""
    if number < 10_000:
        return f"{number:,}"
    for unit in ("k", "M", "B", "T"):
        number /= 1000
        if number < 999.5 or unit == "T":
            return f"{number:.3g} {unit}"
    raise AssertionError


def share(part: float, whole: float) -> str:
    """A part of a whole in percent, as exact as its size deserves."""
    percent = 100 * part / whole if whole else 0.0
    if 0 < percent < 0.01:
        return "< 0.01 %"
    return f"{percent:.2f} %" if 0 < percent < 1 else f"{percent:.1f} %"


def link(uri: str) -> bool:
    """Whether an address may be a link: `javascript:` and the like may not."""
    return uri.startswith(("https://", "http://"))


def columns(lengths: Mapping[str, int]) -> list[dict[str, Any]]:
    """A histogram's columns from the first power of two that has documents to the last: from, to, count, height."""
    counts = {int(n): count for n, count in lengths.items() if count}
    highest = max(counts.values(), default=1)
    return [
        {"low": 2**n // 2, "high": 2**n - 1, "count": counts.get(n, 0), "height": counts.get(n, 0) / highest}
        for n in (range(min(counts), max(counts) + 1) if counts else ())
    ]


def power(number: int) -> str:
    """A power of two as an axis names it: 4096 -> `4k`."""
    for unit, size_ in (("G", 2**30), ("M", 2**20), ("k", 2**10)):
        if number >= size_:
            return f"{number // size_}{unit}"
    return str(number)


def settings(config: Mapping[str, Any]) -> str:
    """A configuration as YAML."""
    import yaml

    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=100)


FILTERS: dict[str, Callable[..., Any]] = {
    "size": lambda count: _unbroken(size(count)),
    "short": lambda number: _unbroken(short(number)),
    "share": lambda part, whole: _unbroken(share(part, whole)),
    "columns": columns,
    "link": link,
    "power": power,
    "settings": settings,
}
