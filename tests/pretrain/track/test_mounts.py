"""A database on a network file system is refused before anything begins, with what to do instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs import ConfigError
from pretrain.track import Mlflow, mounts, sync

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /home rw,relatime - nfs4 server:/home rw,vers=4.2
31 30 8:2 / /home/me/local rw - xfs /dev/sdb rw
32 22 0:41 / /scratch rw - lustre mgs:/fs rw
33 22 0:42 / /with\\040space rw master:2 - fuse.sshfs host:/x rw
34 22 0:43 / /shm rw - tmpfs tmpfs rw
35 22 0:44 / /twice rw - nfs a:/b rw
36 22 0:45 / /twice rw - ext4 /dev/sdc rw
torn li
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/me/mlflow.db", "nfs4"), ("/home/me/local/mlflow.db", None), ("/scratch/a/b", "lustre"),
        ("/scratches/a", None), ("/with space/x.db", "fuse.sshfs"), ("/shm/x", None), ("/twice/x", None), ("/x", None),
        ("/home", "nfs4"),
    ],
)  # fmt: skip
def test_the_mount_that_covers_a_path_tells(tmp_path: Path, path: str, kind: str | None) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTS)
    assert mounts.network(Path(path), tmp_path / "mountinfo") == kind


def test_this_machine_s_mounts_can_be_read(tmp_path: Path) -> None:
    assert mounts.network(Path("/dev/shm/mlflow.db")) is None
    assert mounts.network(tmp_path, tmp_path / "no mountinfo") is None


def test_sqlite_on_a_network_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTS)
    original = mounts.network
    monkeypatch.setattr(mounts, "network", lambda path: original(path, tmp_path / "mountinfo"))
    with pytest.raises(ConfigError) as error:
        sync([Mlflow(uri="sqlite:////home/me/mlflow.db")], tmp_path)
    assert str(error.value) == (
        "track.uri: sqlite:////home/me/mlflow.db: lies on a network file system (nfs4), whose locks sqlite cannot rely "
        "on; give a file on a local disk, or run `mlflow server --backend-store-uri sqlite:////LOCAL/DISK/mlflow.db "
        "--host HOST` and give uri: http://HOST:5000"
    )
    Mlflow(uri="sqlite:////home/me/local/mlflow.db").check()
    Mlflow(uri="http://host:5000").check()
