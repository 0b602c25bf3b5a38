"""What class each field of a run's configuration is of: what a resume may change, and how.

identity   part of what the run is: a resume with another value is refused, with the difference
segment    may change from a sample on, by `pretrain amend`
free       may change at every start
"""

from __future__ import annotations

from typing import Literal

from configs import ConfigError, differences

FieldClass = Literal["identity", "segment", "free"]

# A path stands for all below it that no longer path names; `*` stands for one name of the user's.
CLASSES: dict[str, FieldClass] = {
    "name": "free",
    "run_folder": "free",
    "seed": "identity",
    "model": "identity",
    "objective": "identity",
    "data.seq_tokens": "identity",
    "data.lanes": "identity",
    "data.group_blocks": "identity",
    "data.document_mask": "identity",
    "data.sources.*": "segment",
    "data.sources.*.shards": "free",  # what they hold is identity: the hash of their manifests
    "data.sources.*.shared_mount": "free",
    "data.on_exhausted": "segment",
    "data.read_threads": "free",
    "data.prefetch_steps": "free",
    "data.open_blocks_mib": "free",
    "data.cache": "free",
    "data.stage": "free",
    "data.fetch_threads": "free",
    "data.prefetch_blocks": "free",
    "batch_tokens": "segment",
    "batch_ramp": "segment",
    "micro_batch_seqs": "free",
    "train_tokens": "segment",
    "optim": "identity",
    "optim.lr_peak": "segment",
    "optim.weight_decay": "segment",
    "schedule": "segment",
    "engine": "free",
    "engine.precision": "identity",
    "evaluation": "free",
    "checkpoint": "free",
    "guard": "free",
    "preflight": "free",
    "profile": "free",
    "track": "free",
    "resume": "free",
    "fork_from": "free",  # once begun, another one is refused (pretrain.parent.check_same_parent)
    "fork_position": "free",
    "init_from": "free",
    "log_every_steps": "free",
    "stop_at_step": "free",
}

# Identity fields that came later, with their defaults. At its default such a field is no part of a run's identity, so
# that what was written before it was there is still of the same run.
ADDED: dict[str, object] = {"data.document_mask": False, "model.norm": "pre", "model.band": None}


def field_class(path: str) -> FieldClass:
    """The class of the field at a dotted path: that of the longest entry that covers it."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        for entry, its_class in CLASSES.items():
            names = entry.split(".")
            if len(names) == length and all(n in ("*", p) for n, p in zip(names, parts[:length], strict=True)):
                return its_class
    raise KeyError(f"{path} has no class: add it to CLASSES")


def check_same_run(recorded: object, given: object, name: str) -> None:
    """Raise ConfigError where two dumped configurations differ in what a start may not change."""
    for line in differences(recorded, given):
        its_class = field_class(line.split(":")[0])
        if its_class == "identity":
            raise ConfigError(
                f"{name}: {line}: is part of what this run is; give another run_folder to start a new run"
            )
        if its_class == "segment":
            raise ConfigError(f"{name}: {line}: changes the course of this run; use `pretrain amend RUN key=value`")
