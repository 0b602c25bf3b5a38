"""Small runs on random corpora, started as a user would: `pretrain train` on one or more ranks."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from pretrain import checkpoint
from pretrain.cli import main
from pretrain.track.journal import read_journal
from tests.corpora import make_corpus
from tests.processes import RankProcess, environment, free_port

RUN = """
name: small
run_folder: {folder}/run
model: {{kind: gpt, layers: 2, width: 32, heads: 2, context: 64, vocab_size: 509}}
data:
  seq_tokens: 64
  sources:
    alpha: {{shards: {folder}/alpha, weight: 0.7}}
    beta: {{shards: {folder}/beta, weight: 0.3}}
batch_tokens: 640
micro_batch_seqs: 3
train_tokens: {tokens}
optim: {{kind: adamw, lr_peak: 3e-3}}
schedule: {{kind: cosine, warmup_tokens: 2e3}}
engine: {engine}
evaluation: {{every_steps: 1000, tokens: 2000}}
checkpoint: {{save_every_steps: 10, keep_last: 3}}
log_every_steps: 1
"""
TORCH = "{kind: torch, precision: fp32}"


def zero(stage: int, precision: str = "fp32") -> str:
    """A DeepSpeed engine section."""
    return f"{{kind: deepspeed, zero_stage: {stage}, precision: {precision}}}"


def write_run(folder: Path, engine: str = TORCH, steps: int = 40) -> Path:
    """Two corpora and the config of a run over them; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(("alpha", "beta")):
        if not (folder / name).exists():
            make_corpus(folder / name, seed + 1, slices=1)
    path = folder / "run.yaml"
    path.write_text(RUN.format(folder=folder, engine=engine, tokens=steps * 640))
    return path


class Started:
    """The rank processes of one attempt. `variables` are added to their environment."""

    def __init__(
        self, config: Path, ranks: int = 1, *overrides: str, variables: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        port = free_port()
        self.outputs = [config.parent / f"rank-{rank}.{time.time_ns()}.log" for rank in range(ranks)]
        self.processes = [
            RankProcess(
                _train,
                config,
                overrides,
                variables=(environment(rank, ranks, port) if ranks > 1 else alone()) | dict(variables),
                log=self.outputs[rank],
            )
            for rank in range(ranks)
        ]

    def wait(self, timeout: float = 400) -> list[int]:
        """The exit codes; whoever is left after the timeout is killed."""
        try:
            return [process.wait(timeout) for process in self.processes]
        finally:
            self.kill()

    def kill(self, rank: int | None = None) -> None:
        """SIGKILL one rank, or all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            process.kill()
            process.wait()

    def signal(self, number: signal.Signals, rank: int = 0) -> None:
        """Send a signal to one rank."""
        self.processes[rank].send_signal(number)

    @property
    def text(self) -> str:
        """What rank 0 has written to stderr."""
        return self.outputs[0].read_text() if self.outputs[0].exists() else ""

    def wait_for_step(self, step: int, timeout: float = 300) -> None:
        """Wait until rank 0 has logged a step."""
        deadline = time.monotonic() + timeout
        while f"step {step}/" not in self.text:
            assert time.monotonic() < deadline, f"step {step} did not come:\n{self.text}"
            assert self.processes[0].poll() is None, f"ended before step {step}:\n{self.text}"
            time.sleep(0.02)


def _train(config: Path, overrides: tuple[str, ...]) -> None:
    """The command itself, in a process of its own."""
    sys.argv = ["pretrain", "train", str(config), *overrides]
    main()


def alone() -> dict[str, str]:
    """The environment of a bare `pretrain train`."""
    place = environment(0, 1, 0)
    return {key: value for key, value in place.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def run_to_end(config: Path, ranks: int = 1, *overrides: str) -> str:
    """Run to exit 0; what rank 0 said."""
    started = Started(config, ranks, *overrides)
    codes = started.wait()
    assert codes == [0] * ranks, f"{codes}\n{started.text}"
    return started.text


def final_state(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The position of the newest live checkpoint, and every rank's bytes: masters and moments, to the last bit."""
    newest = checkpoint.open_checkpoint(checkpoint.live_checkpoints(folder / "run")[0])
    names = sorted(name for name in newest.manifest["files"] if name.endswith(".bin"))
    data = {n: torch.frombuffer(bytearray((newest.folder / n).read_bytes()), dtype=torch.uint8) for n in names}
    return newest.manifest["position"], data


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The events of a kind in a run's journal."""
    return [record.fields | {"step": record.step} for record in read_journal(folder / "run")
            if record.type == "event" and record.fields["kind"] == kind]  # fmt: skip


def losses(folder: Path, branch: int) -> dict[int, float]:
    """The loss of every step that a branch's journal has."""
    lines = (folder / "run" / "journal" / f"{branch}.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {r["step"]: r["metrics"]["loss"] for r in records if r["type"] == "step" and "loss" in r["metrics"]}
