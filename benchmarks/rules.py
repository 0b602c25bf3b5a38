"""Cleaning, filters, decontamination: MB/s of each step on one core, ours and datatrove's; and what each rule drops.

    python -m benchmarks.rules --data FOLDER [--rounds 3]     rates; datatrove's English splitter comes with spaCy
    python -m benchmarks.rules --data FOLDER --verdicts       each document dropped, by rule, with its beginning

FOLDER has common_crawl/*.warc.gz, wikipedia/*.xml.bz2, books/*.txt, eval/*.jsonl. Books, cut into documents of 4 kB,
are the ordinary text, once without and once with their non-ASCII characters; pages in many languages are the other.
Every step sees the same documents in the same process; what counts is CPU time, the median of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from data_pipeline.clean import Clean
from data_pipeline.decontaminate import Decontamination, EvaluationSet
from data_pipeline.document import Document
from data_pipeline.filters import Filters
from data_pipeline.language import language
from data_pipeline.quality import C4, FineWeb, GopherQuality, GopherRepetition, Text
from data_pipeline.sources import Source
from data_pipeline.sources.bookcorpus import BookCorpus
from data_pipeline.sources.common_crawl import CommonCrawl
from data_pipeline.sources.inputs import Part, Reading
from data_pipeline.sources.wikipedia import Wikipedia

DOCUMENT_CHARS = 4000
Step = Callable[[str], Any]


def documents(data: Path, source: type[Any], pattern: str) -> Iterator[Document]:
    """Those of one kind of file. Damaged files give what can be read."""
    made: Source = source(paths=[str(data / pattern)])
    for input in made.inputs():
        with Reading(Part(input), pattern.split("/")[0], "skip") as reading:
            yield from made.read(reading)


def all_documents(data: Path) -> Iterator[Document]:
    yield from documents(data, CommonCrawl, "common_crawl/*.warc.gz")
    yield from documents(data, Wikipedia, "wikipedia/*.xml.bz2")
    yield from documents(data, BookCorpus, "books/*.txt")


def decontamination(data: Path) -> Decontamination:
    fields: dict[str, list[str] | None] = {"lambada_openai": ["context", "continuation"], "piqa": ["query", "choices"]}
    files = sorted((data / "eval").glob("*.jsonl"))
    return Decontamination(
        sets={path.stem: EvaluationSet(paths=[str(path)], fields=fields.get(path.stem)) for path in files}
    )


# --- rates ----------------------------------------------------------------------------------------------------------


def steps(data: Path) -> dict[str, Step]:
    off = {"tidy": False, "unicode": "as_is"}
    cut = decontamination(data)
    cut.cut("read the sets")
    return {
        "clean, off": Clean(**off).text,
        "clean, default": Clean().text,
        "tidy alone": Clean(unicode="as_is").text,
        "NFC alone": Clean(tidy=False).text,
        "masks alone": Clean(**off, mask=("email", "ip")).text,
        "ftfy alone": Clean(**off, fix_encoding=True).text,
        "language (resiliparse)": language,
        "Gopher quality": lambda text: GopherQuality().reason(Text(text)),
        "Gopher repetition": lambda text: GopherRepetition().reason(Text(text)),
        "C4": C4().kept,
        "FineWeb": lambda text: FineWeb().reason(Text(text)),
        "all four rules": all_rules,
        "decontamination": cut.cut,
    }


def all_rules(text: str) -> None:
    """Each to its verdict, whatever the others say; shared words are counted once."""
    made = Text(text)
    GopherQuality().reason(made)
    GopherRepetition().reason(made)
    C4().kept(text)
    FineWeb().reason(made)


@cache
def datatroves() -> dict[str, Step]:
    """The same steps of datatrove, with its own splitter for English."""
    from datatrove.data import Document as Theirs
    from datatrove.pipeline import filters
    from datatrove.pipeline.formatters.pii import PIIFormatter
    from datatrove.utils.text import split_into_parts

    made = [filters.GopherQualityFilter(), filters.GopherRepetitionFilter()]
    made += [filters.C4QualityFilter(), filters.FineWebQualityFilter()]

    def applied(some: Sequence[Any]) -> Step:
        def step(text: str) -> None:
            split_into_parts.cache_clear()  # it keeps the words of the last five texts, which the next filter uses
            for each in some:
                each.filter(Theirs(text=text, id=""))

        return step

    names = ("Gopher quality", "Gopher repetition", "C4", "FineWeb")
    alone = {name: applied([each]) for name, each in zip(names, made, strict=True)}
    return {"masks alone": PIIFormatter().format, **alone, "all four rules": applied(made)}


def rate(step: Step, texts: Sequence[str], rounds: int) -> float:
    """MB/s of UTF-8 on one core."""
    size = sum(len(text.encode()) for text in texts)
    times = []
    for _ in range(rounds):
        begun = time.process_time()
        for text in texts:
            step(text)
        times.append(time.process_time() - begun)
    return size / 1e6 / max(statistics.median(times), 1e-9)


def show_rates(data: Path, rounds: int) -> None:
    books = [d.text.replace("  \n", "\n") for d in documents(data, BookCorpus, "books/*.txt")]
    cut = [book[at : at + DOCUMENT_CHARS] for book in books for at in range(0, len(book), DOCUMENT_CHARS)][::4]
    ascii_text = [text.encode("ascii", "ignore").decode() for text in cut]
    pages = [d.text for d in documents(data, CommonCrawl, "common_crawl/*.warc.gz") if not d.text.isascii()] * 5
    print(
        "MB/s on one core | ASCII books | datatrove | ratio | books | pages in many languages\n---|---|---|---|---|---"
    )
    for name, step in steps(data).items():
        ours = rate(step, ascii_text, rounds)
        theirs = rate(datatroves()[name], ascii_text[:100], 1) if name in datatroves() else None
        other = f"{theirs:,.2f} | {ours / theirs:,.1f}" if theirs else " | "
        print(f"{name} | {ours:,.1f} | {other} | {rate(step, cut, rounds):,.1f} | {rate(step, pages, rounds):,.1f}")


# --- verdicts -------------------------------------------------------------------------------------------------------


def show_verdicts(data: Path) -> None:
    """Every rule alone over every document, by corpus."""
    rules = {
        "gopher quality": Filters(gopher_quality=GopherQuality()),
        "gopher quality, signs are no words": Filters(gopher_quality=GopherQuality(signs_are_words=False)),
        "gopher repetition": Filters(gopher_repetition=GopherRepetition()),
        "c4": Filters(c4=C4()),
        "c4, lines without an end kept": Filters(c4=C4(end_punctuation=False)),
        "fineweb": Filters(fineweb=FineWeb()),
        "language en": Filters(languages=["en"]),
    }
    cleaned = [(d, Clean().text(d.text)) for d in all_documents(data)]
    texts = [Document(text, d.id, d.source, d.uri, d.meta) for d, text in cleaned]
    print(f"{len(texts)} documents, {sum(len(d.text) for d in texts):,} characters")
    for name, rule in rules.items():
        dropped: dict[tuple[str, str], list[Document]] = defaultdict(list)
        for document in texts:
            _, reason = rule.judged(document)
            if reason:
                dropped[document.source, reason].append(document)
        print(f"\n## {name}: {sum(map(len, dropped.values()))} dropped")
        for (corpus, reason), found in sorted(dropped.items()):
            print(f"{corpus}: {reason}: {len(found)} of {sum(d.source == corpus for d in texts)}")
            for document in found[:4]:
                beginning = " ".join(document.text.split())[:110]
                print(f"    {document.uri[:70]} ({len(document.text)} characters): {beginning}")
    cut = decontamination(data)
    hits = [(d, c) for d in texts if (c := cut.cut(d.text))]
    print(f"\n## decontamination: {len(hits)} documents hold evaluation text")
    for document, found_cut in hits:
        print(f"    {document.uri[:70]}: {found_cut.reason or f'{len(found_cut.pieces)} pieces kept'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--verdicts", action="store_true")
    options = parser.parse_args()
    if options.verdicts:
        show_verdicts(options.data)
    else:
        show_rates(options.data, options.rounds)


if __name__ == "__main__":
    main()
