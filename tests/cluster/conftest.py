"""One cluster for all tests of a session."""

from collections.abc import Iterator

import pytest

from tests.cluster.slurm import Cluster, missing


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(f"no SLURM: {reason}")
    cluster = Cluster(nodes=4)
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture
def cluster(session_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """A running SLURM, which the commands of this process and its children find."""
    monkeypatch.setenv("SLURM_CONF", session_cluster.environment["SLURM_CONF"])
    return session_cluster
