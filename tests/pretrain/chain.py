"""A run in attempts on 1, 2, 3 and 4 ranks, amended twice between them: `python -m tests.pretrain.chain DIR`.

A process of its own, which imports everything once and forks the ranks. What the amendments said is printed.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ["PYTHONWARNINGS"] = "ignore"

import json
import sys
from pathlib import Path

from tests.chaos.fleet import Fleet, import_everything
from tests.corpora import make_corpus
from tests.runs import write_run

STEPS = 24
TAKEN = ["s0/11", "s0/9", "nobody's"]  # of every source; s0/9 is a validation document


def main() -> None:
    folder = Path(sys.argv[1])
    config = write_run(folder, steps=STEPS)
    make_corpus(folder / "gamma", 3, slices=1)
    import_everything()
    from pretrain.amend import amend
    from pretrain.run import load_run
    from pretrain.trace import trace_step

    said: list[str] = []
    attempt(config, 1, "stop_at_step=6")
    seen = next(s for s in trace_step(load_run(folder / "run"), 3) if s.source == "alpha" and s.id not in TAKEN)
    (folder / "ids.txt").write_text("\n".join([f"alpha:{seen.id}", *TAKEN]) + "\n")
    amend(folder / "run", ["data.sources.beta.weight=2", f"takedown={folder / 'ids.txt'}"], said.append)
    attempt(config, 2, "stop_at_step=12")
    gamma = f"data.sources.gamma={{shards: {folder / 'gamma'}, weight: 0.5, max_epochs: 0.01}}"
    more = ["data.on_exhausted=reweight", "batch_tokens=1280", "skip_blocks=beta:0:1-2"]
    amend(config, [gamma, *more], said.append)
    attempt(config, 3, "stop_at_step=15")
    attempt(config, 4)
    print(json.dumps([seen.id, *said]))


def attempt(config: Path, ranks: int, *overrides: str) -> None:
    fleet = Fleet(config, ranks, *overrides)
    ended = fleet.wait(300)
    assert ended and set(fleet.codes.values()) == {0}, fleet.text


if __name__ == "__main__":
    main()
