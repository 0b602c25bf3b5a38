"""How the nodes of a run fare: processor, memory, network, GPUs; sampled by one rank of each node, in a thread.

A sample is a line of `RUN/system/<branch>.<node>.jsonl`, in the form of the journal's records, at the step that the
loop is in. Each node writes a file of its own; the trackers follow them as they follow the journal.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

FOLDER = "system"
GIB = 2**30


class SystemMetrics:
    """Samples this node until it is closed. Never raises, and holds up nobody. `step` tells where the loop is."""

    def __init__(self, run_folder: Path, branch: int, every_seconds: float, step: Callable[[], int]) -> None:
        self.path = system_file(run_folder, branch, socket.gethostname())
        self.step = step
        self._branch, self._every = branch, every_seconds
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        try:
            node = Node()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", buffering=1, encoding="utf-8") as file:
                while not self._closing.wait(self._every):
                    record = {
                        "type": "system", "branch": self._branch, "step": self.step(), "time": round(time.time(), 3),
                        "metrics": node.sample(),
                    }  # fmt: skip
                    file.write(json.dumps(record) + "\n")
        except OSError as error:
            logger.warning("%s: cannot be written: %s; there are no more system metrics", self.path, error)


def system_file(run_folder: Path, branch: int, host: str) -> Path:
    return run_folder / FOLDER / f"{branch}.{re.sub(r'[^A-Za-z0-9-]', '-', host)}.jsonl"


class Node:
    """Reads this node's counters; rates are since the sample before."""

    def __init__(self) -> None:
        import psutil  # here: whoever only reads what was sampled starts faster

        self._psutil, self._gpus = psutil, _Gpus()
        psutil.cpu_percent()  # the first call has nothing to compare with
        self._network, self._at = self._bytes(), time.monotonic()

    def sample(self) -> dict[str, float]:
        """Metrics of now; percent, GiB, MB/s, W, degrees Celsius."""
        memory, network, now = self._psutil.virtual_memory(), self._bytes(), time.monotonic()
        seconds = max(now - self._at, 1e-3)
        found = {
            "cpu_percent": self._psutil.cpu_percent(),
            "memory_gib": round((memory.total - memory.available) / GIB, 3),
        }
        for name, before, count in zip(("network_in", "network_out"), self._network, network, strict=True):
            found[f"{name}_mb_per_s"] = round(max(0, count - before) / seconds / 1e6, 3)
        self._network, self._at = network, now
        return found | self._gpus.sample()

    def _bytes(self) -> tuple[int, int]:
        """Bytes in and out so far; nothing where the system hides its counters."""
        with contextlib.suppress(OSError, RuntimeError):
            if (counters := self._psutil.net_io_counters()) is not None:
                return counters.bytes_recv, counters.bytes_sent
        return 0, 0


class _Gpus:
    """NVIDIA's counters through their own library; none without a driver, or without nvidia-ml-py."""

    def __init__(self) -> None:
        self._library: Any = None
        self._handles: list[Any] = []
        try:
            import pynvml

            pynvml.nvmlInit()
            self._library = pynvml
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        except Exception as error:  # of the library: its absence, no driver, no right
            if Path("/proc/driver/nvidia").exists():
                logger.warning("GPUs are not measured: %s; pip install 'longhaul[gpu]'", error)

    def sample(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for i, handle in enumerate(self._handles):
            with contextlib.suppress(self._library.NVMLError):  # a counter that a model of GPU does not have
                found[f"gpu{i}/used_percent"] = float(self._library.nvmlDeviceGetUtilizationRates(handle).gpu)
                found[f"gpu{i}/memory_gib"] = round(self._library.nvmlDeviceGetMemoryInfo(handle).used / GIB, 3)
                found[f"gpu{i}/power_w"] = self._library.nvmlDeviceGetPowerUsage(handle) / 1000
                found[f"gpu{i}/celsius"] = float(self._library.nvmlDeviceGetTemperature(handle, 0))
        return found
