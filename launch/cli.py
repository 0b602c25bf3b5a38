"""The command `launch`: starts runs on this machine or on a cluster."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field

import configs
from configs import ConfigError, Section
from launch.job import LaunchError
from launch.local import Local
from launch.slurm import Slurm, SlurmError

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Start runs on this machine or on a cluster.")


class Where(Section):
    """Where a run is started, apart from what it is."""

    launcher: Annotated[Local | Slurm, Field(discriminator="kind")]


@app.callback()
def launch() -> None:
    pass


@app.command()
def submit(
    run: Annotated[Path, typer.Argument(help="the config of a run, or its run folder")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="section.key=value; launcher=FILE.yaml and launcher.key=value say where it runs"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be started, and start nothing")] = False,
) -> None:
    """Check a run and start it: in the foreground with launcher.kind=local, as a job on SLURM with slurm."""
    from launch.job import load_job

    launchers, rest = _apart(overrides)
    launcher = _launcher(launchers)
    job = load_job(run, rest)
    if dry_run:
        print(launcher.show(job))
    else:
        raise typer.Exit(launcher.start(job))


@app.command()
def prep(
    config: Annotated[Path, typer.Argument(help="what data-prep run takes")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="section.key=value; launcher=FILE.yaml and launcher.key=value say where it runs"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the jobs, and queue none")] = False,
    status: Annotated[bool, typer.Option("--status", help="show how far it is, and queue nothing")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="end its jobs; what is made stays")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Prepare corpora in arrays of jobs on SLURM, or do what is missing: plan, slices, manifest."""
    from launch import prep as preparations

    launchers, rest = _apart(overrides)
    launcher = _launcher(launchers)
    if status:
        tree = preparations.look(config, rest)
        print(json.dumps(tree, indent=2) if as_json else "\n".join(preparations.lines(tree)))
    elif stop:
        print("\n".join(preparations.stop(config, rest)))
    elif isinstance(launcher, Local):
        preparations.run_here(config, rest, dry_run, as_json)
    elif dry_run:
        steps = preparations.show(launcher, config, rest)
        print(json.dumps(steps, indent=2) if as_json else "\n".join(step["script"] for step in steps))
    else:
        jobs = preparations.submit(launcher, config, rest)
        print(json.dumps(jobs, indent=2) if as_json else "\n".join(id for ids in jobs.values() for id in ids))


def _apart(overrides: list[str] | None) -> tuple[list[str], list[str]]:
    """(what says where it runs, what says what it is)"""
    launchers = [text for text in overrides or [] if text.startswith(("launcher=", "launcher."))]
    return launchers, [text for text in overrides or [] if text not in launchers]


def _launcher(overrides: list[str]) -> Local | Slurm:
    return configs.build(Where, {"launcher": {"kind": "local"}}, "command line", overrides).launcher


AsJson = Annotated[bool, typer.Option("--json", help="for programs; the keys are in README")]
Started = Annotated[Path, typer.Argument(metavar="RUN", help="a run folder, or the config that names it")]


@app.command()
def status(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN]...", help="run folders or configs; without any, the runs below . and ./runs"),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="also each recovery by part")] = False,
    as_json: AsJson = False,
) -> None:
    """Show how runs are: state, steps, speed, checkpoint, and where the time went."""
    from rich.console import Console

    from launch.history import find_run, runs_below
    from launch.status import look, show

    folders, problems = [], []
    for run in runs or runs_below(Path()):
        try:
            folders.append(find_run(run))
        except ConfigError as error:
            problems.append(str(error))
    if not folders and not problems:
        problems.append("no run in this folder or in its runs/; name one")
    statuses = look(folders)
    if as_json:
        print(json.dumps([status.tree() for status in statuses], indent=2))
    elif statuses:
        show(statuses, Console(width=None if sys.stdout.isatty() else 200), verbose)
    for problem in problems:
        _fail(problem, 2)
    if problems:
        raise typer.Exit(2)


@app.command()
def logs(
    run: Started,
    rank: Annotated[int, typer.Option(min=0)] = 0,
    attempt: Annotated[int | None, typer.Option(min=1, help="this one alone; without, all in their order")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="go on, through restarts, until the run is over")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print what a rank has said, over all attempts."""
    from launch.history import find_run
    from launch.logs import print_logs

    try:
        print_logs(find_run(run), rank, attempt, follow, as_json)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:  # whoever read has had enough; nothing is left to be flushed at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@app.command()
def stop(
    run: Started,
    wait: Annotated[bool, typer.Option(help="return when the run is over")] = True,
    as_json: AsJson = False,
) -> None:
    """Let a run save and end; it is not started again until it is submitted."""
    from launch.history import find_run
    from launch.job import log
    from launch.stop import outcome
    from launch.stop import stop as stop_run

    folder = find_run(run)
    try:
        stopped = stop_run(folder, wait, log)
    except KeyboardInterrupt:
        log("no longer waiting; the run goes on to stop")
        raise typer.Exit(130) from None
    print(json.dumps(stopped.tree(), indent=2) if as_json else outcome(stopped))


def main() -> None:
    """Run the command; what a user can mend is one line on stderr."""
    try:
        app()
    except ConfigError as error:
        sys.exit(_fail(str(error), 2))
    except (SlurmError, LaunchError, OSError) as error:
        sys.exit(_fail(str(error), 1))


def _fail(message: str, code: int) -> int:
    print(f"launch: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
