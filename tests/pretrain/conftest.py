"""What several tests of training share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from pretrain.ranks import Place, Ranks


@pytest.fixture(scope="module")
def alone() -> Iterator[Ranks]:
    """This process as the only rank."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "")  # so that what Ranks sets is taken back
        yield Ranks(Place(0, 1, 0, None, "alone"))
        dist.destroy_process_group()
