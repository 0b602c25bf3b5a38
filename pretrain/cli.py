"""The command `pretrain`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import configs
from configs import ConfigError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Train language models, and look at what became of them."
)

Run = Annotated[Path, typer.Argument(help="the config of a run, or its run folder")]
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
def amend(
    run: Run, changes: Annotated[list[str], typer.Argument(help="section.key=value: weights, budget, schedule, ...")]
) -> None:
    """Change the course of a stopped run from its newest checkpoint on. The past stays as it was."""
    from pretrain.amend import amend as amend_run

    record = amend_run(run, changes)
    print(f"from sample {record.from_sample}: {' '.join(record.changes)}")


@app.command()
def generate(
    run: Annotated[str, typer.Argument(help="a run or its config; RUN@step for one of its checkpoints")],
    prompt: Annotated[str, typer.Argument(help="what the text begins with")] = "",
    max_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, typer.Option(min=0)] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write text with a checkpoint of a run."""
    from pretrain.generate import Sampling
    from pretrain.restore import open_run

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    restored = open_run(run)
    print(prompt, end="")
    for piece in restored.write(prompt, sampling):
        print(piece, end="", flush=True)
    print()


@app.command()
def verify(
    run: Run,
    deep: Annotated[bool, typer.Option("--deep", help="read the data between them again, and add it up")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Read every byte of every checkpoint of a run and follow the chain of digests; a line for each. Damage: exit 1."""
    import json
    from dataclasses import asdict

    from data_pipeline.progress import Count
    from pretrain.run import load_run
    from pretrain.verify import verify_run

    loaded = load_run(run)
    with Count() as look:
        rows = verify_run(loaded, deep, look)
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

    loaded = load_run(run)
    try:
        with Count() as look:
            done = sync(loaded.track, loaded.run_folder, lambda tracker: look(*tracker.carried, tracker.name, "bytes"))
        for synced in done:
            print(
                f"{synced.name}: {synced.metrics} metrics and {synced.checkpoints} checkpoints carried to {synced.page}"
            )
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
    import click

    from data_pipeline.shards import ShardError
    from pretrain.checkpoint import SaveError
    from pretrain.lineage import TakenOver
    from pretrain.preflight import PreflightError
    from pretrain.ranks import AbsentRanks

    if isinstance(error, click.ClickException):
        error.show()
        return 2
    if isinstance(error, TakenOver):
        return _fail(error, 6)
    if isinstance(error, PreflightError):  # every rank's alike
        return _fail(error, 1, is_said=os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0")
    if isinstance(error, ShardError | SaveError | AbsentRanks):
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
