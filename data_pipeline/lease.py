"""Leases: which process works on what, in a folder that several processes and hosts share.

A lease is a symbolic link whose text names its owner, so that taking it is one atomic step. It only saves double work:
what is made under two leases by mistake is the same to the byte, and whole or absent.

A dead process holds nothing up on its own host, nor where SLURM starts its job again; elsewhere it does for SILENT_S.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

BEAT_S = 30.0
SILENT_S = 300.0  # after which the owner on another host is taken for dead


@dataclass(frozen=True)
class Owner:
    """A process. `boot` and `space` tell whether its pid means anything here; `started` whether the pid is still it.

    `job` is its job on SLURM, `start` how often that had been started before.
    """

    host: str
    pid: int
    boot: str
    space: str
    started: str
    token: str
    job: str = ""
    start: str = ""

    def __str__(self) -> str:
        return f"{self.host} pid {self.pid}"

    @staticmethod
    def me() -> Owner:
        pid = os.getpid()
        owner = Owner(socket.gethostname(), pid, _boot(), _pid_space(), _started(pid), secrets.token_hex(6))
        return replace(owner, job=_job(), start=_start())

    def is_alive(self, last_beat: float) -> bool:
        """On this host by its process, on another by its last sign of life (seconds of the epoch)."""
        if (self.host, self.space) == (socket.gethostname(), _pid_space()):
            return self.boot == _boot() and _started(self.pid) == self.started != "dead"
        if self.job and self.job == _job() and self.start != _start():
            return False  # SLURM starts a job again when it has ended it, or lost its node
        return time.time() - last_beat < SILENT_S


def _job() -> str:
    return os.environ.get("SLURM_JOB_ID", "")


def _start() -> str:
    return os.environ.get("SLURM_RESTART_COUNT", "0")


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_space() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks; "dead" for none, "alive" where there is no /proc."""
    if Path("/proc/self/stat").exists():
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return "dead" if fields[0] in "ZX" else fields[19]
        return "dead"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "dead"
    except PermissionError:
        pass
    return "alive"


@dataclass
class Lease:
    """A lease that this process holds; use it as a context, or release it."""

    path: Path
    owner: Owner
    _over: threading.Event = field(default_factory=threading.Event)

    @staticmethod
    def take(path: Path) -> Lease | None:
        """The lease at `path`, or None while another living process has it. A dead owner's is taken over."""
        owner = Owner.me()
        for _ in range(3):
            try:
                path.symlink_to(json.dumps(asdict(owner)))
            except FileExistsError:
                if not remove_dead(path):
                    return None
            else:
                lease = Lease(path, owner)
                threading.Thread(target=lease._beat, daemon=True).start()
                return lease
        return None

    @staticmethod
    def wait(path: Path, say: Callable[[str], None]) -> Lease:
        """The lease at `path`, after waiting for the one who has it."""
        said = False
        while (lease := Lease.take(path)) is None:
            if not said and (owner := holder(path)) is not None:
                say(f"waiting for {owner}, which holds {path}")
                said = True
            time.sleep(0.1)
        return lease

    def release(self) -> None:
        self._over.set()
        with suppress(FileNotFoundError):
            if _read(self.path) == self.owner:
                self.path.unlink()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            with suppress(OSError, NotImplementedError):
                os.utime(self.path, follow_symlinks=False)


def holder(path: Path) -> Owner | None:
    """The living owner of a lease, if any."""
    try:
        owner, last_beat = _read(path), path.lstat().st_mtime
    except OSError:
        return None
    return owner if owner is not None and owner.is_alive(last_beat) else None


def _read(path: Path) -> Owner | None:
    try:
        return Owner(**json.loads(str(path.readlink())))
    except (ValueError, TypeError):
        return None


def remove_dead(path: Path) -> bool:
    """Take a dead owner's lease away; False when its owner lives."""
    with _one_remover(path.parent):
        if not path.is_symlink():
            return True
        if holder(path) is not None:
            return False
        path.unlink(missing_ok=True)
        return True


@contextmanager
def _one_remover(folder: Path) -> Iterator[None]:
    """Between looking at a lease and removing it, nobody else removes one (where the file system can lock at all)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
