"""A real SLURM with accounting on one machine: munge, MariaDB, slurmdbd, slurmctld and one slurmd per node.

    python -m tests.cluster.slurm --nodes 4                          # up until Ctrl-C
    python -m tests.cluster.slurm --nodes 4 -- pytest tests/cluster  # up for one command

Every daemon is the child of the first process of a PID namespace of its own, which the kernel ends with everything
below it when this process ends, however it ends; all files lie in one temporary folder. So nothing is left running,
and losing a node is killing one process. Needs root and the packages PACKAGES (Debian, Ubuntu).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

PACKAGES = "slurmctld slurmd slurmdbd slurm-client munge mariadb-server-core mariadb-client-core"
PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "sbatch", "munged", "mariadbd", "unshare")
REQUEUE_DELAY_S = 5  # SLURM lets a credential of the old run expire before it starts a requeued job
PR_SET_PDEATHSIG = 1  # prctl(2)

LIBC = ctypes.CDLL(None)

SLURM_CONF = """
ClusterName=longhaul
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire={requeue_delay_s}
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PlugStackConfig=/dev/null
MpiDefault=none
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
EnforcePartLimits=ALL
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
MaxArraySize=5
JobRequeue=1
ReturnToService=1
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={database_port}
AccountingStoragePass={folder}/munge.sock
NodeName=n[1-{nodes}] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=2 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=abrupt Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=cheap Nodes=ALL PriorityTier=1 PreemptMode=CANCEL GraceTime=0
PartitionName=high Nodes=ALL PriorityTier=100 PreemptMode=OFF
"""

SLURMDBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
DbdHost=localhost
DbdPort={database_port}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StoragePass=unused
StorageLoc=accounting
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
CommitDelay=0
"""

MARIADB = (
    "mariadbd --no-defaults --user=root --datadir={folder}/database --socket={folder}/mariadb.sock --skip-networking "
    "--skip-grant-tables --skip-log-bin --innodb-buffer-pool-size=64M --innodb-log-file-size=16M "
    "--innodb-flush-log-at-trx-commit=0 --performance-schema=OFF --pid-file={folder}/mariadbd.pid"
)
MUNGED = (
    "munged --foreground --force --key-file={folder}/munge.key --socket={folder}/munge.sock "
    "--pid-file={folder}/munged.pid --seed-file={folder}/munge.seed"
)


def missing() -> str | None:
    """Why no cluster can be started on this machine, or None."""
    if os.geteuid() != 0:
        return "a SLURM of one's own needs root"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"no {', '.join(absent)}: apt-get install --no-install-recommends {PACKAGES}" if absent else None


class Cluster:
    """Nodes n1, n2, ...; partitions main, and low, whose jobs are requeued (10 s of grace) for those of high."""

    def __init__(self, nodes: int = 2) -> None:
        self.nodes = [f"n{i + 1}" for i in range(nodes)]
        self.folder = Path(tempfile.mkdtemp(prefix="longhaul-slurm-"))
        self.environment = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Return when every node is idle. Raises RuntimeError with the end of the daemons' logs."""
        try:
            self._configure()
            self._spawn("munged", MUNGED.format(folder=self.folder))
            self._spawn("mariadbd", MARIADB.format(folder=self.folder))
            self.until("munged", (self.folder / "munge.sock").exists)
            self.until("mariadbd", (self.folder / "mariadb.sock").exists)
            self.start_daemons()
            for node in self.nodes:
                self.start_node(node)
            self.until("nodes", lambda: self._states() == ["idle"] * len(self.nodes))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every process of the cluster and its jobs, and remove its files."""
        for daemon in self.daemons.values():
            daemon.kill()
        for daemon in self.daemons.values():
            daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_daemons(self) -> None:
        """Start those of slurmdbd and slurmctld that do not run, and wait until they answer."""
        commands = {"slurmdbd": f"MYSQL_UNIX_PORT={self.folder}/mariadb.sock slurmdbd -D", "slurmctld": "slurmctld -D"}
        for port, (name, command) in zip((self.port + 1, self.port), commands.items(), strict=True):
            if name not in self.daemons or self.daemons[name].poll() is not None:
                self._spawn(name, command)
            self.until(name, lambda port=port: _listens(port))  # type: ignore[misc]

    def stop_daemon(self, name: str) -> None:
        """Kill slurmdbd or slurmctld; `start_daemons` brings it back as it was."""
        self.daemons[name].kill()
        self.daemons[name].wait()

    def start_node(self, node: str) -> None:
        """Start a node whose name is its hostname, and which resolves the names of all."""
        hosts = shlex.quote(str(self.folder / "hosts"))
        slurmd = f"hostname {node} && mount --bind {hosts} /etc/hosts && slurmd -D -N {node}"
        self._spawn(node, f"{{ {slurmd}; sleep infinity; }}")  # jobs outlive a slurmd that is killed

    def crash_node(self, node: str) -> None:
        """End the node's slurmd and every process of every job on it at once, as a power cut does."""
        self.daemons[node].kill()
        self.daemons[node].wait()

    def kill_slurmd(self, node: str) -> None:
        """End the node's slurmd alone: its jobs go on, and SLURM believes them lost."""
        for process in psutil.Process(self.daemons[node].pid).children(recursive=True):
            if process.name() == "slurmd":
                process.kill()

    def declare_down(self, node: str) -> None:
        """Have SLURM notice at once, and not by its timeouts, that a node is lost."""
        self.run(f"scontrol update nodename={node} state=down reason=test")

    def repair_node(self, node: str) -> None:
        """Bring a lost node back, with nothing left on it."""
        self.crash_node(node)
        self.start_node(node)
        self.until(f"{node} answers", lambda: not re.search(r"\*|not_responding", self.node_state(node)))
        if self.node_state(node).startswith("down"):
            self.run(f"scontrol update nodename={node} state=resume")
        self.until(f"{node} idle", lambda: self.node_state(node) == "idle")

    def node_state(self, node: str) -> str:
        """As idle, mixed, down*, idle+completing. `sinfo` may go on showing a node as allocated for a minute."""
        return self.run(f"scontrol --oneliner show node {node}").partition(" State=")[2].split(" ")[0].lower()

    def run(self, command: str) -> str:
        """The output of a SLURM command. Raises CalledProcessError."""
        done = subprocess.run(shlex.split(command), env=self.environment, capture_output=True, text=True, timeout=30)
        done.check_returncode()
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """The state that slurmctld gives of a job, as PENDING, RUNNING, COMPLETED."""
        return self.run(f"squeue --noheader --states=all --format=%T --jobs={job}")

    def wait(self, job: str, states: set[str]) -> str:
        """The state of the job as soon as it is one of `states`. Raises RuntimeError when it takes too long."""
        self.until(f"job {job} {' or '.join(sorted(states))}", lambda: self.state(job) in states)
        return self.state(job)

    def until(self, what: str, ready: Callable[[], bool], seconds: float = 200) -> None:
        """Return when `ready`. Raises RuntimeError with the end of every log when it takes longer than `seconds`."""
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end:
                logs = [path for suffix in ("out", "log") for path in sorted(self.folder.glob(f"*.{suffix}"))]
                ends = [f"{path.name}: {path.read_text(errors='replace')[-600:]}" for path in logs]
                raise RuntimeError("\n".join([f"{what}: not after {seconds} s", *ends]))
            time.sleep(0.05)

    def _configure(self) -> None:
        self.port = _free_ports(2 + len(self.nodes))
        names = {
            "folder": self.folder,
            "nodes": len(self.nodes),
            "requeue_delay_s": REQUEUE_DELAY_S,
            "port": self.port,
            "database_port": self.port + 1,
            "first": self.port + 2,
            "last": self.port + 1 + len(self.nodes),
        }
        self.folder.chmod(0o755)
        for name in ("state", "database", *(f"spool.{node}" for node in self.nodes)):
            (self.folder / name).mkdir()
        _write(self.folder / "munge.key", os.urandom(1024), 0o600)
        _write(self.folder / "slurm.conf", SLURM_CONF.format(**names).encode(), 0o644)
        _write(self.folder / "slurmdbd.conf", SLURMDBD_CONF.format(**names).encode(), 0o600)
        _write(self.folder / "cgroup.conf", b"CgroupPlugin=cgroup/v1\n", 0o644)
        hosts = Path("/etc/hosts").read_text() + "".join(f"127.0.0.1 {node}\n" for node in self.nodes)
        _write(self.folder / "hosts", hosts.encode(), 0o644)

    def _spawn(self, name: str, command: str) -> None:
        """Run a shell line in PID, mount and host name namespaces of its own; their first process reaps orphans."""
        isolate = ["unshare", "--pid", "--kill-child", "--mount-proc", "--uts", "bash", "-c", f"{command} & wait $!"]
        with (self.folder / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                isolate,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                process_group=0,
                preexec_fn=_die_with_parent,
            )

    def _states(self) -> list[str]:
        try:
            return self.run("sinfo --noheader --Node --partition=main --format=%T").split()
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            return []


def _die_with_parent() -> None:
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _write(path: Path, content: bytes, mode: int) -> None:
    path.write_bytes(content)
    path.chmod(mode)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring free ports, below those that the kernel hands out."""
    while True:
        first = random.randrange(10_000, 30_000)
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a real SLURM on this machine until Ctrl-C, or for one command.")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("command", nargs="*", help="runs while the cluster is up; its exit code is returned")
    arguments = parser.parse_args()
    if reason := missing():
        print(f"tests.cluster.slurm: {reason}", file=sys.stderr)
        return 1
    cluster = Cluster(arguments.nodes)
    try:
        cluster.start()
        if arguments.command:
            return subprocess.run(arguments.command, env=cluster.environment).returncode
        print(f"export SLURM_CONF={shlex.quote(cluster.environment['SLURM_CONF'])}", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.pause()
    except KeyboardInterrupt:
        return 130
    finally:
        cluster.stop()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
