"""The command `data-prep`."""

from __future__ import annotations

import itertools
import json
import logging
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import configs
from configs import ConfigError

if TYPE_CHECKING:
    from data_pipeline.find import At, Found
    from data_pipeline.outline import Outline
    from data_pipeline.preparation import Preparation
    from data_pipeline.shards import Manifest
    from data_pipeline.summary import Summary
    from data_pipeline.tokenizer import Tokenizer

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Raw corpora to token shards.")
log = logging.getLogger("data-prep")

Config = Annotated[Path, typer.Argument(help="a YAML file, such as configs/data/demo.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value")]
Where = Annotated[Path, typer.Argument(help="a folder of shards, or the config that made it")]
AsJson = Annotated[bool, typer.Option("--json", help="the same as JSON")]


@app.callback()
def data_prep() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the plan, and do nothing")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="show the resolved config")] = False,
    as_json: AsJson = False,
) -> None:
    """Prepare all corpora of a config, or do what is missing: tokenizer, slices, manifest."""
    from data_pipeline import prepare
    from data_pipeline.outline import outlines
    from data_pipeline.progress import Elapsed

    preparation = _load(config, overrides)
    if print_config:
        print(configs.dump(preparation), end="")
    elif dry_run:
        with Elapsed("looking at the inputs", at_once=True):
            outlined = list(outlines(preparation))
        _show_outlines(outlined, as_json)
    else:
        begun = time.monotonic()
        with _stoppable():
            summaries = prepare.run(preparation)
        _show_summaries(summaries, time.monotonic() - begun, as_json)


@app.command()
def tokenizer(config: Config, overrides: Overrides = None) -> None:
    """Make the tokenizer of a config, and print where it is."""
    from data_pipeline.made_once import make_tokenizer

    preparation = _load(config, overrides)
    made = make_tokenizer(preparation)
    print(f"{made.path}  {made.vocab_size} entries  sha256 {made.sha256}")


@app.command()
def classifier(config: Config, overrides: Overrides = None) -> None:
    """Train the classifier of quality of a config, and print where it is and what it learnt from."""
    from data_pipeline.made_once import CLASSIFIER, make_classifier

    preparation = _load(config, overrides)
    made = make_classifier(preparation)
    learnt = ", ".join(f"{count} {side}" for side, count in made["documents"].items())
    print(f"{preparation.out / CLASSIFIER}  {learnt}  sha256 {made['sha256']}")


@app.command()
def plan(config: Config, overrides: Overrides = None) -> None:
    """Make the tokenizer and the plans of a config, and print how many slices each corpus has."""
    from data_pipeline.jobs import make_jobs

    with _stoppable(lambda: False):
        for job in make_jobs(_load(config, overrides)):
            print(f"{job.corpus}  {len(job.plan.slices)} slices")


@app.command()
def work(
    config: Config,
    overrides: Overrides = None,
    stage: Annotated[str, typer.Option(help="one of the preparation's stages")] = "slices",
    tasks: Annotated[str, typer.Option(help="first-last, from 0, or a share of those planned, as 3/16")] = "",
) -> None:
    """Do some tasks of one stage: a part of an array of jobs. `run` does what is left, and seals."""
    from data_pipeline import prepare
    from data_pipeline.work import Done

    preparation, done = _load(config, overrides), Done()
    range_or_share = re.fullmatch(r"(\d+)(?:([-/])(\d+))?", tasks)
    if range_or_share is None:
        raise ConfigError(f"--tasks: expected first-last such as 0-9, or a share such as 0/16, got {tasks!r}")
    first, separator, last = int(range_or_share[1]), range_or_share[2], int(range_or_share[3] or range_or_share[1])
    if separator == "/" and first >= last:
        raise ConfigError(f"--tasks: expected a share such as 0/{last} to {last - 1}/{last}, got {tasks!r}")
    with _stoppable(lambda: done.made > 0):
        if separator == "/":
            prepare.run_share(preparation, stage, first, last, done)
        else:
            prepare.run_stage(preparation, stage, first, last)


@app.command()
def verify(where: Where, as_json: AsJson = False) -> None:
    """Read every byte of finished shards. A line for each damage, and exit 1."""
    from data_pipeline.progress import Count
    from data_pipeline.summary import folders, verified

    damages: list[str] = []
    with Count() as count:
        for folder in folders(where):
            title = f"verify {folder.name}"
            damages += verified(folder, lambda read, all, title=title: count(read, all, title, "shards"))  # type: ignore[misc]
    print(json.dumps(damages, ensure_ascii=False) if as_json else "\n".join(damages or ["whole"]))
    raise typer.Exit(1 if damages else 0)


@app.command()
def repair(
    where: Where,
    shard: Annotated[str | None, typer.Argument(help="SLICE/SHARD, as messages name it; without it all")] = None,
) -> None:
    """Make damaged files of finished shards whole: from where they were published, or again from their inputs."""
    from data_pipeline import repair as repairs
    from data_pipeline.progress import Count

    mended = 0
    with _stoppable(), Count() as count:
        for line in repairs.repair(where, shard, count):
            print(line, flush=True)
            mended += 1
    if not mended:
        print("whole")


@app.command()
def card(where: Where, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Write the data card of finished shards beside them, as `run` does: card.html and card.json. Print where."""
    from data_pipeline.card import CARD
    from data_pipeline.prepare import write_card, write_card_of
    from data_pipeline.progress import Elapsed

    with Elapsed("card: counting, and choosing samples", at_once=True):
        path = write_card(_load(where, overrides)) if where.is_file() else write_card_of(where)
    print((path.parent / CARD).read_text(encoding="utf-8") if as_json else path, end="" if as_json else "\n")


@app.command()
def inspect(
    where: Annotated[str, typer.Argument(help="a folder of shards, the config that made it, or a corpus' address")],
    samples: Annotated[int, typer.Option(min=0, help="decoded texts per corpus")] = 3,
    search: Annotated[str | None, typer.Option(help="documents whose text contains this")] = None,
    doc: Annotated[str | None, typer.Option(help="the document of this id")] = None,
    dropped: Annotated[str | None, typer.Option(help="the documents that this rule dropped")] = None,
    token: Annotated[str | None, typer.Option(help="what lies at CORPUS:SLICE/SHARD:ROW:TOKEN, from 0")] = None,
    limit: Annotated[int, typer.Option(min=1, help="of documents shown, for --search and --dropped")] = 10,
    as_json: AsJson = False,
) -> None:
    """Counts and decoded samples of finished shards, or the documents asked for: text, address, place."""
    from data_pipeline.summary import folder_tokenizer, opened

    corpora = [(manifest, folder_tokenizer(manifest)) for manifest in opened(where)]
    asked = [
        name for name, value in (("search", search), ("doc", doc), ("dropped", dropped), ("token", token)) if value
    ]
    if len(asked) > 1 or "" in (search, doc, dropped, token):
        raise ConfigError("expected one of --search, --doc, --dropped and --token, with what to look for")
    if search:
        _show_found(list(itertools.islice(_searched(corpora, search), limit)), f"no text contains {search!r}", as_json)
    elif doc:
        from data_pipeline.find import by_id

        _show_found([x for pair in corpora for x in by_id(*pair, doc)], f"no document has the id {doc!r}", as_json)
    elif token:
        from data_pipeline.find import by_token

        _show_token(by_token(corpora, token), as_json)
    elif dropped:
        _show_dropped([manifest for manifest, _ in corpora], dropped, limit, as_json)
    else:
        _show_samples(corpora, samples, as_json)


def _searched(corpora: Sequence[tuple[Manifest, Tokenizer]], text: str) -> Iterator[Found]:
    from data_pipeline.find import by_text, token_bytes
    from data_pipeline.progress import Display, Progress

    progress = Progress(sum(token_bytes(manifest) for manifest, _ in corpora))
    with Display("search") as display:
        for manifest, tokenizer in corpora:
            yield from by_text(manifest, tokenizer, text, progress, display)


def _show_found(found: Sequence[Found], otherwise: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(x) for x in found], indent=1, ensure_ascii=False))
    elif not found:
        print(f"data-prep: {otherwise}", file=sys.stderr)
    for x in () if as_json else found:
        _show_document(x)
    if not found:
        raise typer.Exit(1)


def _show_document(x: Found) -> None:
    lines = [
        f"--- {x.corpus}: {x.id}  {x.uri}",
        f"    from {x.input} at byte {x.offset}",
        f"    {x.tokens:,} tokens: {x.first_token} to {x.last_token}",
        f"{x.text}\n",
    ]
    print(_harmless("\n".join(lines)))


def _harmless(text: str) -> str:
    """What was found on the web says nothing to the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _show_token(at: At, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(at), indent=1, ensure_ascii=False))
        return
    print(f"{at.place}: token {at.id}, {at.piece!r}\n")
    _show_document(at.document)


def _show_dropped(manifests: Sequence[Manifest], rule: str, limit: int, as_json: bool) -> None:
    from data_pipeline.dropped import by_rule, lost_documents
    from data_pipeline.progress import Elapsed

    rows = ({"corpus": m.head["corpus"], **row} for m in manifests for row in by_rule(m, rule))
    with Elapsed(f"inspect: looking for what {rule} dropped", at_once=True):
        shown = list(itertools.islice(rows, limit))
    if not shown:
        known = dict.fromkeys(reason for m in manifests for reason in lost_documents(m.head["counts"]))
        raise ConfigError(f"--dropped {rule}: nothing was; the reasons here are {', '.join(sorted(known)) or 'none'}")
    if as_json:
        print(json.dumps(shown, indent=1, ensure_ascii=False))
        return
    for row in shown:
        stays = row.get("stays")  # of a duplicate: the document that is kept
        lines = [
            f"--- {row['corpus']}: {row['id']}  {row['uri']}",
            f"    {row['reason']}, {row['characters']:,} characters" + (f"; stays: {stays}" if stays else ""),
            f"    from {row['input']} at byte {row['offset']}",
            "    (its text was not kept)\n" if row["text"] is None else f"{row['text']}\n",
        ]
        print(_harmless("\n".join(lines)))


def _show_samples(corpora: Sequence[tuple[Manifest, Tokenizer]], count: int, as_json: bool) -> None:
    from data_pipeline.samples import samples
    from data_pipeline.summary import summarized

    found = {m.head["corpus"]: list(samples(m, tokenizer, "train", count)) for m, tokenizer in corpora}
    summaries = [summarized(manifest) for manifest, _ in corpora]
    if as_json:
        shown = {s.corpus: {**asdict(s), "samples": [asdict(x) for x in found[s.corpus]]} for s in summaries}
        print(json.dumps(shown, indent=1, ensure_ascii=False))
        return
    _show_table(summaries)
    for corpus, texts in found.items():
        for x in texts:
            head = f"\n--- {corpus}: {x.slice}/{x.shard} row {x.row}: {x.id}, {x.tokens:,} tokens, {x.uri}"
            print(_harmless(f"{head}\n{x.text}"))


STOPPED = 3  # exit code: what is made is kept, and the same command goes on
SIGNALS = (signal.SIGTERM, signal.SIGUSR2)  # SLURM ends the job; its time is nearly over


class _Told(BaseException):
    """A signal asked us to stop."""


@contextmanager
def _stoppable(has_advanced: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Exit 130 after Ctrl-C and 3 after a signal, but 1 where a whole time limit was not enough to advance."""

    def tell(number: int, frame: object) -> None:
        for each in (*SIGNALS, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)  # the end is on its way
        raise _Told(number)

    before = {number: signal.signal(number, tell) for number in SIGNALS}
    try:
        yield
    except KeyboardInterrupt:
        log.error("data-prep: interrupted; the same command goes on")
        raise typer.Exit(130) from None
    except _Told as told:
        name = signal.Signals(told.args[0]).name
        if told.args[0] == signal.SIGUSR2 and not has_advanced():
            raise typer.Exit(_fail(f"{name}: no slice was finished in all this time; give it more", 1)) from None
        raise typer.Exit(_fail(f"stopped by {name}; the same command goes on", STOPPED)) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _load(path: Path, overrides: Sequence[str] | None) -> Preparation:
    from data_pipeline.preparation import Preparation

    return configs.load(Preparation, path, overrides or [])


# --- tables ---------------------------------------------------------------------------------------------------------


def _show_summaries(summaries: Sequence[Summary], seconds: float, as_json: bool) -> None:
    if as_json:
        corpora = {summary.corpus: asdict(summary) for summary in summaries}
        print(json.dumps({"corpora": corpora, "seconds": round(seconds, 1)}, indent=1, ensure_ascii=False))
        return
    _show_table(summaries)
    print(f"{seconds:.1f} s")


def _show_table(summaries: Sequence[Summary]) -> None:
    """A column per corpus, a line per count."""
    rows: list[tuple[str, list[str]]] = [
        ("documents read", [f"{s.documents_read:,}" for s in summaries]),
        ("documents kept", [f"{s.documents:,}" for s in summaries]),
        *_reasons("dropped", [s.dropped for s in summaries]),
        *_reasons("set aside", [s.set_aside for s in summaries]),
        ("characters", [f"{s.characters:,}" for s in summaries]),
        ("tokens", [f"{s.tokens:,}" for s in summaries]),
        ("characters per token", [f"{s.characters_per_token:.3f}" for s in summaries]),
        ("train tokens", [f"{s.train_tokens:,}" for s in summaries]),
        ("validation tokens", [f"{s.validation_tokens:,}" for s in summaries]),
        ("blocks", [f"{s.blocks:,} x {s.block_tokens:,}" for s in summaries]),
        ("tail tokens, not fed", [_share(s.tail_tokens, s.train_tokens) for s in summaries]),
        ("shards", [f"{s.shards:,}" for s in summaries]),
        ("bytes", [f"{s.bytes:,}" for s in summaries]),
    ]
    _print_table([s.corpus for s in summaries], rows)


def _reasons(what: str, counts: Sequence[dict[str, int]]) -> list[tuple[str, list[str]]]:
    reasons = sorted({reason for each in counts for reason in each})
    return [(f"  {what}: {reason}", [f"{each.get(reason, 0):,}" for each in counts]) for reason in reasons]


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({100 * part / max(whole, 1):.1f} %)"


def _show_outlines(outlines: Sequence[Outline], as_json: bool) -> None:
    from data_pipeline.progress import size

    if as_json:
        print(json.dumps({outline.corpus: asdict(outline) for outline in outlines}, indent=1))
        return
    rows: list[tuple[str, list[str]]] = [
        ("inputs", [f"{o.inputs:,}" for o in outlines]),
        ("input bytes", [f"{o.input_bytes:,}" for o in outlines]),
        ("slices", [f"{o.slices:,}" for o in outlines]),
        ("slices made", [f"{o.slices_made:,}" for o in outlines]),
        ("text kept, about", [size(o.text_bytes) for o in outlines]),
        ("documents kept, about", ["?" if o.kept is None else f"{100 * o.kept:.0f} %" for o in outlines]),
        ("tokens, about", [f"{o.tokens:,}" for o in outlines]),
        ("time left on one core, about", [_time(o.core_seconds) for o in outlines]),
        ("  with the config's workers", [f"{_time(o.seconds)} ({o.workers})" for o in outlines]),
        ("disk for shards, about", [size(o.shard_bytes) for o in outlines]),
        *(
            [("disk for texts, until the seal", [size(o.texts_bytes) for o in outlines])]
            if _has_texts(outlines)
            else []
        ),
        ("memory of a worker, about", [size(o.worker_bytes) for o in outlines]),
        ("from a trial on", [size(o.tried_bytes) for o in outlines]),
    ]
    _print_table([o.corpus for o in outlines], rows)


def _has_texts(outlines: Sequence[Outline]) -> bool:
    return any(outline.texts_bytes for outline in outlines)


def _time(seconds: float | None) -> str:
    from data_pipeline.progress import duration

    return "?" if seconds is None else duration(seconds)


def _print_table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Plain text, aligned: it goes to files and mails as it is."""
    first = max(len(name) for name, _ in rows)
    widths = [max(len(name), *(len(cells[i]) for _, cells in rows)) for i, name in enumerate(columns)]
    for name, cells in [("", columns), *rows]:
        line = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        print(f"{name:<{first}}  {line}")


def main() -> None:
    """Run the command; what a user can mend is one line on stderr."""
    from data_pipeline.disk import refusal
    from data_pipeline.shards import ShardError
    from data_pipeline.work import Unfinished, WorkError

    try:
        app()
    except ConfigError as error:
        sys.exit(_fail(str(error), 2))
    except Unfinished as error:
        sys.exit(_fail(str(error), STOPPED))
    except (ShardError, WorkError) as error:
        sys.exit(_fail(str(error), 1))
    except OSError as error:
        sys.exit(_fail(refusal(error), 1))


def _fail(message: str, code: int) -> int:
    print(f"data-prep: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
