"""Ranks as processes of their own on this machine, and functions run on several of them, over gloo.

A rank is a fork of a server that has imported everything, so that a start takes a tenth of a second and not ten. Where
there is a GPU, which no fork may share, it is a fresh interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1]
NO_SERVER = 255  # what multiprocessing gives as exit code then
QUIET = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


class RankProcess:
    """A started rank, with the calls of subprocess.Popen that tests need."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, variables: Mapping[str, str], log: Path | None):
        self._process = _context().Process(target=_enter, args=(dict(variables), log, function, arguments))
        self._process.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        pid: int | None = self._process.pid
        assert pid is not None
        return pid

    def poll(self) -> int | None:
        """Its exit code, below 0 where a signal ended it; None while it runs."""
        code: int | None = self._process.exitcode
        assert code != NO_SERVER, "the server of ranks has ended, and with it what became of this rank"
        return code

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(f"rank {self.pid}", timeout or 0.0)
        return code

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        self._process.kill()

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        os.kill(self.pid, number)


def on_ranks(
    folder: Path, ranks: int, function: Callable[..., Any], *arguments: Any, timeout: float = 400
) -> list[Any]:
    """What `function(Ranks, *arguments)` returns on each rank. The function must be importable by its module's name."""
    port = free_port()
    pipes = [multiprocessing.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        RankProcess(_on_rank, pipes[rank][1], function, arguments, variables=environment(rank, ranks, port), log=None)
        for rank in range(ranks)
    ]
    for _, theirs in pipes:
        theirs.close()
    try:
        results = [_receive(ours, timeout) for ours, _ in pipes]
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * ranks, f"exit codes {codes}"
    return results


def _receive(pipe: connection.Connection, timeout: float) -> Any:
    try:
        return pickle.loads(pipe.recv_bytes()) if pipe.poll(timeout) else None
    except EOFError:  # its exit code says more
        return None


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """torchrun's variables, one thread a rank."""
    place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    return {**os.environ, **{k: str(v) for k, v in place.items()}, **QUIET, "PYTHONPATH": path}


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@cache
def _context() -> Any:
    import torch

    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.imported"])
    before = {name: os.environ.get(name) for name in QUIET}
    os.environ.update(QUIET)
    forkserver.ensure_running()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    return context


def _enter(variables: dict[str, str], log: Path | None, function: Callable[..., Any], arguments: Any) -> None:
    """The first thing that a rank's process does."""
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(HERE)
    warnings.simplefilter("ignore")
    if log is not None:
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(target, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    function(*arguments)


def _on_rank(pipe: connection.Connection, function: Callable[..., Any], arguments: Any) -> None:
    try:
        import torch

        torch.set_num_threads(1)
        from pretrain.ranks import Ranks

        ranks = Ranks.join()
        pipe.send_bytes(pickle.dumps(function(ranks, *arguments)))  # tensors by value
        ranks.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed leaves a thread that aborts some exits
