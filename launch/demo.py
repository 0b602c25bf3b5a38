"""The demo, `make demo`: the whole road on this machine, from raw corpora to a small GPT that was killed and resumed.

Every step but the first is one of the commands that a user gives, shown as it is run. Everything lies under `demo/`,
which is made anew. Half-way through training the ranks are killed with SIGKILL; the same command then goes on.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

DEMO = Path("demo")
CORPORA, SHARDS, RUN = DEMO / "corpora", DEMO / "shards", DEMO / "run"
TEXT_BYTES = 3_000_000  # per corpus, about
PROMPT = "This function returns"
PREPARE = "data-prep run configs/data/demo.yaml"
GENERATE = f'pretrain generate configs/demo.yaml "{PROMPT}" --max-tokens 60 --temperature 0.7 --top-k 40 --seed 2'
MLFLOW = f"mlflow ui --backend-store-uri sqlite:///{DEMO}/mlflow.db"


class DemoError(Exception):
    """A step went wrong. The message is one line."""


def demo() -> None:
    """Run every step. Raises DemoError."""
    begun = time.monotonic()
    shutil.rmtree(DEMO, ignore_errors=True)
    with _step("corpora: the documentation of Python's standard library, in three formats"):
        _make_corpora()
    with _step("prepare: raw text to tokens, in shards"):
        _run(PREPARE)
    submit = f"launch submit configs/demo.yaml launcher.kind=local launcher.ranks={_ranks()}"
    with _step("train: GPT-2 with DeepSpeed ZeRO-1, to be killed half-way"):
        killed_at = _train_until_killed(submit)
    with _step("train: the same command goes on"):
        _run(submit)
    with _step("generate"):
        generated = _output(GENERATE)
    print(f"\nDone in {(time.monotonic() - begun) / 60:.1f} minutes.\n")
    _show_results(killed_at, generated)


def _make_corpora() -> None:
    from data_pipeline.standard_library_docs import make_corpora

    sizes = make_corpora(CORPORA, TEXT_BYTES)
    print(", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items()), f"of text in {CORPORA}/")


def _ranks() -> int:
    """Two, or one where they would have to share a GPU."""
    import torch

    return 1 if torch.cuda.device_count() == 1 else 2


# --- commands -------------------------------------------------------------------------------------------------------


@contextmanager
def _step(title: str) -> Iterator[None]:
    print(f"\n== {title}", flush=True)
    begun = time.monotonic()
    yield
    print(f"   {time.monotonic() - begun:.0f} s", flush=True)


def _start(command: str, output: int | None = None) -> subprocess.Popen[str]:
    """Start one of the commands of this environment, and show it."""
    print(f"$ .venv/bin/{command}", flush=True)
    program, *arguments = shlex.split(command)
    return subprocess.Popen([str(Path(sys.executable).with_name(program)), *arguments], stdout=output, text=True)


def _run(command: str) -> None:
    if code := _start(command).wait():
        raise DemoError(f"`{command}` ended with exit {code}")


def _output(command: str) -> str:
    process = _start(command, subprocess.PIPE)
    output, _ = process.communicate()
    if process.returncode:
        raise DemoError(f"`{command}` ended with exit {process.returncode}")
    return output


def _train_until_killed(command: str) -> int:
    """Start training and kill its ranks when half of the steps are done; the step that they had reached."""
    process = _start(command)
    while process.poll() is None and _step_reached() < _last_step() // 2:
        time.sleep(0.2)
    if process.poll() is not None:
        raise DemoError(f"`{command}` ended with exit {process.returncode}, before it could be killed")
    ranks = psutil.Process(process.pid).children()
    for rank in ranks:
        rank.kill()
    process.wait()
    step = _step_reached()
    print(f"killed ranks {', '.join(str(rank.pid) for rank in ranks)} with SIGKILL after step {step}")
    return step


# --- results --------------------------------------------------------------------------------------------------------


def _step_reached() -> int:
    from pretrain.track.journal import read_journal

    return max((record.step for record in read_journal(RUN)), default=0)


def _last_step() -> int:
    from pretrain.run import load_run

    run = load_run(Path("configs/demo.yaml"))
    return -(-run.train_tokens // (run.batch_seqs * run.data.seq_tokens))


def _show_results(killed_at: int, generated: str) -> None:
    corpora, losses = _corpora(), _losses()
    print(f"{'':<14}{'documents':>11}{'tokens':>12}{'validation loss':>18}")
    for name, (documents, tokens) in corpora.items():
        print(f"{name:<14}{documents:>11,}{tokens:>12,}{losses.get(f'validation/{name}/loss', ''):>18}")
    print(f"{'train loss':<14}{losses['loss']:>41}")
    print(f"\nkilled after step {killed_at}; went on from step {_resumed_from()}")
    print(f"generated:    {_indented(generated)}")
    print(f"checkpoints:  {RUN / 'checkpoints'}/")
    print(f"MLflow:       .venv/bin/{MLFLOW}   (then http://127.0.0.1:5000)")


def _corpora() -> dict[str, tuple[int, int]]:
    """Documents and tokens of each corpus."""
    from data_pipeline.shards import Manifest
    from data_pipeline.summary import folders, summarized

    summaries = [summarized(Manifest.open(folder)) for folder in folders(SHARDS)]
    return {s.corpus: (s.documents, s.tokens) for s in summaries}


def _losses() -> dict[str, str]:
    """First and last value of each loss in the journal."""
    from pretrain.track.journal import lineage, live_records, read_journal

    values: dict[str, list[float]] = {}
    for record in live_records(read_journal(RUN), lineage(RUN)):
        for name, value in record.metrics.items():
            values.setdefault(name, []).append(value)
    return {name: f"{found[0]:.3f} -> {found[-1]:.3f}" for name, found in values.items()}


def _resumed_from() -> int:
    from pretrain.track.journal import read_journal

    return [record.step for record in read_journal(RUN) if record.type == "attempt"][-1]


def _indented(text: str) -> str:
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return ("\n" + " " * 14).join(lines[:6])


def main() -> int:
    """The exit code; what went wrong is one line on stderr."""
    try:
        demo()
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; `make demo` starts afresh", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
