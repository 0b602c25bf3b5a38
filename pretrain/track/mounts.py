"""Whether a file lies on a network file system, by the mount that covers it (proc(5), mountinfo)."""

from __future__ import annotations

import os
import re
from pathlib import Path

# Kinds that several machines share. FUSE names what it mounts behind a dot, as fuse.sshfs.
NETWORK = {
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "smb3", "smbfs", "9p", "ceph", "glusterfs", "afs", "pvfs2",
    "orangefs", "wekafs", "panfs", "ocfs2", "gfs2", "sshfs", "s3fs", "gcsfuse", "juicefs", "vastnfs",
}  # fmt: skip


def network(path: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> str | None:
    """The kind of the network file system that `path` would lie on; None for a local one, or where nothing tells."""
    try:
        lines = mountinfo.read_text().splitlines()
    except OSError:
        return None
    kind = _kind(lines, os.path.realpath(path))
    last = kind.rpartition(".")[2] if kind is not None else None
    return kind if last in NETWORK else None


def _kind(lines: list[str], path: str) -> str | None:
    """The kind of the mount that covers a path: the longest mount point, of equal ones the last mounted."""
    best, kind = -1, None
    for line in lines:
        left, dash, right = line.partition(" - ")
        if not dash or len(fields := left.split(" ")) < 5:
            continue
        point = re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), fields[4])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= best:
            best, kind = len(point), right.split(" ")[0]
    return kind
