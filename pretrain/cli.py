"""The command `pretrain`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import configs
from configs import ConfigError

if TYPE_CHECKING:
    from pretrain.examination import Questions
    from pretrain.generate import Sampling
    from pretrain.restore import Restored
    from pretrain.run import TrainRun

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Train language models, and look at what became of them."
)

Run = Annotated[Path, typer.Argument(help="the config of a run, or its run folder")]
Checkpoint = Annotated[str, typer.Argument(help="a run or its config; RUN@step for one of its checkpoints")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value")]


@app.callback()
def pretrain() -> None:
    pass


@app.command()
def train(
    run: Run,
    overrides: Overrides = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="show the resolved run, and do nothing")] = False,
) -> None:
    """Train a run, or go on with it from its newest whole checkpoint. One process is one rank."""
    from pretrain.guard import StopSignals

    stop = StopSignals()  # before the imports below take their seconds
    from pretrain.run import load_run
    from pretrain.train import train as train_run

    loaded = load_run(run, overrides)
    if print_config:
        print(configs.dump(loaded), end="")
        return
    raise typer.Exit(train_run(loaded, stop))


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="the config of a run, its run folder, or a model's file")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="section.key=value; hardware.gpu=h100 and hardware.key=value say where it would run"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Before the queue: memory by part, what fits, how fast, how long and how dear, and how often to save."""
    import json

    from rich.console import Console

    from pretrain.plan import load_plan, show

    made = load_plan(config, overrides or [])
    if as_json:
        print(json.dumps(made.tree(), indent=1))
    else:
        show(made, Console(width=None if sys.stdout.isatty() else 200))


@app.command()
def amend(
    run: Run,
    changes: Annotated[
        list[str],
        typer.Argument(
            help="section.key=value: weights, budget, schedule, ...; takedown=FILE with an id, or SOURCE:ID, on each "
            "line; skip_blocks=SOURCE:GENERATION:BLOCK[-BLOCK]"
        ),
    ],
) -> None:
    """Change the course of a stopped run from its newest checkpoint on. The past stays as it was."""
    from data_pipeline.progress import Elapsed
    from pretrain.amend import amend as amend_run

    _show_progress()
    with Elapsed("amend", at_once=True):
        record = amend_run(run, changes, tell=lambda line: print(f"pretrain: {line}", file=sys.stderr))
    withdrawn = record.withdrawn.what if record.withdrawn is not None else []
    print(f"from sample {record.from_sample}: {' '.join([*record.changes, *withdrawn])}")


@app.command()
def trace(
    run: Run,
    step: Annotated[int | None, typer.Option(help="which documents a step sees; as numbered in the log")] = None,
    rank: Annotated[int | None, typer.Option(help="of that step, one rank alone")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="as if on so many; else as it was trained")] = None,
    doc: Annotated[str | None, typer.Option(help="which steps see a document: ID or SOURCE:ID")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Which documents a step sees, or which steps see a document: in the past, and as planned."""
    import json
    from dataclasses import asdict

    if (step is None) == (doc is None):
        raise ConfigError("trace: expected --step S [--rank R] or --doc ID")
    from data_pipeline.progress import Elapsed
    from pretrain.run import begun_run
    from pretrain.trace import trace_document, trace_step

    _show_progress()
    loaded = begun_run(run)
    if step is not None:
        with Elapsed(f"trace of step {step}", at_once=True):
            seen = trace_step(loaded, step, rank, ranks)
        lines = [
            f"sample {s.sample}  rank {s.rank}  {s.state}  {s.source}  epoch {s.epoch}  "
            f"tokens {s.first_token} to {s.end_token - 1}  {s.id}  {s.uri}"
            for s in seen
        ]
        print(json.dumps([asdict(s) for s in seen], indent=1) if as_json else "\n".join(lines))
        return
    assert doc is not None
    with Elapsed(f"trace of {doc}", at_once=True):
        found = trace_document(loaded, doc)
    if as_json:
        print(json.dumps([asdict(each) for each in found], indent=1))
        return
    for each in found:
        print(f"{each.source}:{each.id}  {each.split}, {each.tokens} tokens  {each.uri}")
        for s in each.sightings:
            print(
                f"step {s.step}  {s.state}  epoch {s.epoch}  sample {s.sample}  "
                f"tokens {s.first_token} to {s.end_token - 1}"
            )


@app.command()
def generate(
    run: Checkpoint,
    prompt: Annotated[str, typer.Argument(help="what the text begins with; the question, with --shots")] = "",
    file: Annotated[Path | None, typer.Option(help="prompts: one per line, or .jsonl")] = None,
    shots: Annotated[Path | None, typer.Option(help="YAML: examples before the question, and its form")] = None,
    samples: Annotated[int, typer.Option(min=1, help="texts per prompt")] = 1,
    max_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token")] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="end before this text; may be given several times")] = None,
    seed: Annotated[int, typer.Option(min=0, help="text i is drawn with seed + i")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="texts at once")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="for programs: a line per text")] = False,
) -> None:
    """Write text with a checkpoint of a run. A single text is shown as it is written."""
    from pretrain.generate import Sampling
    from pretrain.prompts import Shots, read_prompts
    from pretrain.restore import open_run

    if file is not None and prompt:
        raise ConfigError("--file: give a prompt or a file of prompts, got both")
    form = configs.load(Shots, shots) if shots is not None else None
    asked = read_prompts(file) if file is not None else [prompt]
    sampling = Sampling(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        stop=(*(stop or ()), *(form.stop if form else ())),
    )  # fmt: skip
    prompts = [form.prompt(text) if form else text for text in asked for _ in range(samples)]
    write = _write_json if as_json else _write_one if len(prompts) == 1 else _write_several
    _show_progress()
    write(open_run(run), prompts, sampling, batch)


def _write_one(restored: Restored, prompts: list[str], sampling: Sampling, batch: int) -> None:
    print(prompts[0], end="", flush=True)
    for piece in restored.write(prompts[0], sampling):
        print(piece, end="", flush=True)
    print()


def _write_several(restored: Restored, prompts: list[str], sampling: Sampling, batch: int) -> None:
    for number, text in enumerate(restored.write_texts(prompts, sampling, batch)):
        head = f"--- {number + 1} of {len(prompts)}, seed {sampling.seed + number}"
        print(f"{head}\n{prompts[number]}{text.text}", flush=True)


def _write_json(restored: Restored, prompts: list[str], sampling: Sampling, batch: int) -> None:
    import json

    for number, text in enumerate(restored.write_texts(prompts, sampling, batch)):
        line = {
            "prompt": prompts[number], "text": text.text, "tokens": text.tokens, "stopped": text.stopped,
            "seed": sampling.seed + number, "checkpoint": restored.committed.folder.name,
        }  # fmt: skip
        print(json.dumps(line, ensure_ascii=False), flush=True)


@app.command()
def evaluate(
    run: Checkpoint,
    task: Annotated[
        list[str] | None, typer.Option(help="lambada, piqa or winogrande, with =FILE where the run has none")
    ] = None,
    shots: Annotated[str | None, typer.Option(help="examples before each question: some of 0,1,few")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="of each task, the first so many")] = None,
    every: Annotated[bool, typer.Option("--all", help="every checkpoint of the run, oldest first")] = False,
    batch: Annotated[int | None, typer.Option(min=1, help="sequences at once on each rank")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="compute in bf16; default: fp32")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Perplexity per corpus, and LAMBADA, PIQA and WinoGrande; kept in RUN/evaluations. One process is one rank."""
    from pretrain.evaluations import table
    from pretrain.examination import carry, examine, questions

    _show_progress()
    loaded: list[TrainRun] = []

    def ask(its_run: TrainRun) -> Questions:
        loaded.append(its_run)
        return questions(its_run, task, shots, rows, batch, "bf16" if bf16 else "fp32")

    found = examine(run, ask, every)
    if not found:
        return  # another rank says it
    if as_json:
        import json

        print(json.dumps([each.tree for each in found], indent=1))
    else:
        print("\n".join(table(found)))
    carry(loaded[0])


@app.command()
def export(
    run: Checkpoint,
    out: Annotated[Path, typer.Argument(help="a new folder")],
    bf16: Annotated[bool, typer.Option("--bf16", help="weights in bf16; default: fp32")] = False,
    file_size: Annotated[str, typer.Option(help="of a file of weights, at most")] = "2Gi",
    check: Annotated[bool, typer.Option("--check", help="load it with transformers, and compare the logits")] = False,
) -> None:
    """Write a checkpoint as a folder that Hugging Face's transformers loads, with its tokenizer and a model card."""
    from data_pipeline.progress import size
    from pretrain.export import export as export_checkpoint

    _show_progress()
    try:
        file_bytes = configs.parse_int(file_size)
    except ValueError as error:
        raise ConfigError(f"--file-size: {error}") from None
    done = export_checkpoint(run, out, "bf16" if bf16 else "fp32", max(file_bytes, 1), check)
    parity = "" if done.difference is None else f", logits differ from transformers' by at most {done.difference:.1e}"
    there = "is there already" if done.was_there else f"{done.files} files, {size(done.bytes)}{parity}"
    print(f"{done.folder}: {there}")
    if done.approximation is not None:
        print(f"pretrain: {done.folder} is {done.approximation}", file=sys.stderr)


def _show_progress() -> None:
    """Let the lines of long work be seen where there is no terminal."""
    import logging

    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for name in ("pretrain", "data-prep"):
        logging.getLogger(name).setLevel(logging.INFO)


@app.command()
def verify(
    run: Run,
    deep: Annotated[bool, typer.Option("--deep", help="read the data between them again, and add it up")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="the same, in so many processes")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Read every byte of every checkpoint of a run and follow the chain of digests; a line for each. Damage: exit 1."""
    import json
    from dataclasses import asdict

    from data_pipeline.progress import Count
    from pretrain.run import begun_run
    from pretrain.verify import verify_run

    loaded = begun_run(run)
    deep = deep or workers is not None
    with Count() as look:
        tell = lambda line: print(f"pretrain: {line}", file=sys.stderr)  # noqa: E731
        rows = verify_run(loaded, deep, workers or 1, tell, look)
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print("\n".join(row.line for row in rows) or f"{loaded.run_folder}: no checkpoints")
    if any(row.problems for row in rows):
        raise typer.Exit(1)


@app.command()
def report(
    run: Run,
    other: Annotated[Path | None, typer.Argument(help="a second run, to compare")] = None,
    out: Annotated[Path | None, typer.Option(help="folder to write into; default: report in the run folder")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="let every kept checkpoint go on with this text; may be given again")
    ] = None,
) -> None:
    """Write what became of a run, or of two side by side, as an HTML page and PNGs."""
    from data_pipeline.progress import Count
    from pretrain.report import FOLDER, make
    from pretrain.run import load_run

    runs = [load_run(path) for path in (run, other) if path is not None]
    with Count() as look:
        page = make(runs, out or runs[0].run_folder / FOLDER, prompt or [], look)
    print(page)


@app.command("track-sync")
def track_sync(run: Run) -> None:
    """Carry what the trackers of a run have not seen yet, from a machine that reaches them."""
    from data_pipeline.progress import Count
    from pretrain.run import load_run
    from pretrain.track import TrackError, sync
    from pretrain.track.mlflow import carry_evaluations

    loaded = load_run(run)
    try:
        with Count() as look:
            done = sync(loaded.track, loaded.run_folder, lambda tracker: look(*tracker.carried, tracker.name, "bytes"))
        for synced in done:
            print(
                f"{synced.name}: {synced.metrics} metrics and {synced.checkpoints} checkpoints carried to {synced.page}"
            )
        for config in loaded.track:
            carry_evaluations(config, loaded.run_folder)
    except TrackError as error:
        print(f"pretrain: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def main() -> None:
    """Run the command; what a user can mend is one line on stderr."""
    try:
        code = app(standalone_mode=False) or 0  # click returns the code of typer.Exit here
    except Exception as error:
        code = explain(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # DeepSpeed leaves a thread that aborts some interpreters' exits (measured: 2 of 12)


def explain(error: Exception) -> int:
    """Say why this rank ends, in a line of its log, unless rank 0 says the same; the exit code."""
    if isinstance(error, ConfigError):
        return _fail(error, 2)
    from data_pipeline.shards import ShardError
    from pretrain.archive import ArchiveError
    from pretrain.checkpoint import SaveError
    from pretrain.lineage import TakenOver
    from pretrain.preflight import PreflightError
    from pretrain.ranks import AbsentRanks

    if callable(show := getattr(error, "show", None)):  # click's ClickException, or that of the copy in typer
        show()
        return 2
    if isinstance(error, TakenOver):
        return _fail(error, 6)
    if isinstance(error, PreflightError):  # every rank's alike
        return _fail(error, 1, is_said=os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0")
    if isinstance(error, ShardError | SaveError | ArchiveError | AbsentRanks):
        return _fail(error, 1)
    import traceback

    traceback.print_exception(error)
    return 1


def _fail(error: Exception, code: int, is_said: bool = False) -> int:
    """`said_by_rank_0` is from `Ranks.first`."""
    if not (is_said or vars(error).get("said_by_rank_0")):
        print(f"pretrain: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
