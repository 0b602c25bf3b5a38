"""The cluster of these tests itself."""

from pathlib import Path

import pytest

from tests.cluster.slurm import Cluster, missing


def processes_of(cluster: Cluster) -> list[str]:
    """The processes whose environment names the cluster's configuration."""
    mark = f"SLURM_CONF={cluster.environment['SLURM_CONF']}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_text())
        except OSError:
            continue
    return found


def test_comes_and_goes_without_a_trace() -> None:
    if reason := missing():
        pytest.skip(f"no SLURM: {reason}")
    cluster = Cluster(nodes=1)
    cluster.start()
    try:
        job = cluster.run("sbatch --parsable --output=/dev/null --wrap 'sleep 1000'")
        cluster.wait(job, {"RUNNING"})
        cluster.until("accounting", lambda: job in cluster.run("sacct --noheader --format=JobID").split())
        assert len(processes_of(cluster)) > 6
    finally:
        cluster.stop()
    assert processes_of(cluster) == []
    assert not cluster.folder.exists()
