"""Run a function on several ranks, each in a process of its own, over gloo on this machine."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1]
PROGRAM = (
    "import os, pickle, sys\n"
    "import torch\n"
    "torch.set_num_threads(1)\n"
    "function, arguments = pickle.load(open(sys.argv[1], 'rb'))\n"
    "from pretrain.ranks import Ranks\n"
    "ranks = Ranks.join()\n"
    "result = function(ranks, *arguments)\n"
    "pickle.dump(result, open(f'{sys.argv[1]}.{ranks.rank}', 'wb'))\n"
    "ranks.barrier()\n"
    "sys.stdout.flush()\n"
    "os._exit(0)\n"  # DeepSpeed leaves a thread that aborts some exits
)


def on_ranks(
    folder: Path, ranks: int, function: Callable[..., Any], *arguments: Any, timeout: float = 400
) -> list[Any]:
    """What `function(Ranks, *arguments)` returns on each rank. The function must be importable by its module's name."""
    task = folder / f"task-{len(list(folder.glob('task-*')))}"
    task.write_bytes(pickle.dumps((function, arguments)))
    port = free_port()
    processes = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, str(task)], env=environment(rank, ranks, port), cwd=HERE)
        for rank in range(ranks)
    ]
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * ranks, f"exit codes {codes}"
    return [pickle.loads(Path(f"{task}.{rank}").read_bytes()) for rank in range(ranks)]


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """torchrun's variables, one thread a rank."""
    place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": path}
    return {**os.environ, **{k: str(v) for k, v in place.items()}, **quiet}


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
