"""The command `launch`: starts runs on this machine or on a cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field

import configs
from configs import ConfigError, Section
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

    launchers = [text for text in overrides or [] if text.startswith(("launcher=", "launcher."))]
    rest = [text for text in overrides or [] if text not in launchers]
    launcher = configs.build(Where, {"launcher": {"kind": "local"}}, "command line", launchers).launcher
    job = load_job(run, rest)
    if dry_run:
        print(launcher.show(job))
    else:
        raise typer.Exit(launcher.start(job))


def main() -> None:
    """Run the command; what a user can mend is one line on stderr."""
    try:
        app()
    except ConfigError as error:
        sys.exit(_fail(str(error), 2))
    except (SlurmError, OSError) as error:
        sys.exit(_fail(str(error), 1))


def _fail(message: str, code: int) -> int:
    print(f"launch: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
