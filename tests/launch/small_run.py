"""The config of a run that two cores train in seconds."""

from pathlib import Path

import yaml

from tests.corpora import FORMAT, make_corpus

SEQ_TOKENS = 32


def write_small_run(folder: Path, steps: int) -> Path:
    """The path of the config of a run in `folder`/run, over a corpus made beside it."""
    make_corpus(folder / "shards")
    size = {"layers": 1, "width": 64, "heads": 2, "context": SEQ_TOKENS, "vocab_size": FORMAT.vocab_size}
    run = {
        "name": "small",
        "run_folder": str(folder / "run"),
        "model": {"kind": "gpt", **size},
        "data": {"seq_tokens": SEQ_TOKENS, "sources": {"random": {"shards": str(folder / "shards")}}},
        "batch_tokens": 4 * SEQ_TOKENS,
        "micro_batch_seqs": 2,
        "train_tokens": 4 * SEQ_TOKENS * steps,
        "optim": {"kind": "adamw", "lr_peak": 1e-3},
        "schedule": {"kind": "constant"},
        "engine": {"kind": "torch", "precision": "fp32"},
        "evaluation": {"every_steps": 100_000},
        "checkpoint": {"save_every_steps": 100_000},
        "log_every_steps": 1,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    return path
