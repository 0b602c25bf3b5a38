"""The README.md of an export: recipe, data, curve, evaluation, where it comes from, hashes. Markdown for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import metadata

import configs
from data_pipeline import card
from data_pipeline.stream import Corpora
from pretrain import evaluations
from pretrain.checkpoint import Committed
from pretrain.evaluations import Evaluated
from pretrain.lineage import Lineage
from pretrain.run import TrainRun
from pretrain.segments import Segments
from pretrain.track.journal import lineage, live_records, read_journal

CURVE_ROWS = 20
HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt, longhaul, pretrained]
---
"""


def model_card(
    run: TrainRun, committed: Committed, precision: str, approximation: str | None, difference: float | None
) -> str:
    """The whole page. `difference`: that of the logits from those of transformers, where it was measured."""
    position, model = committed.position, run.model
    parity = "not compared with transformers" if difference is None else (
        f"logits in transformers differ from those of the model by at most {difference:.1e}"
    )  # fmt: skip
    facts = [
        ("parameters", f"{model.parameter_count():,}"),
        ("shape", f"{model.layers} layers, width {model.width}, {model.heads} heads, context {model.context}, "
                  f"vocabulary {model.vocab_size:,}"),
        ("trained on", f"{position.tokens:,} tokens in {position.step:,} steps"),
        ("weights", f"{precision}; {parity}"),
    ]  # fmt: skip
    parts = [
        f"{HEAD}\n# {run.name}, step {position.step:,}",
        f"A language model pretrained with Longhaul {metadata.version('longhaul')}; it continues text.",
        f"**This is {approximation}.**" if approximation else "",
        _table(["", ""], facts),
        "Begin a text with the tokenizer's `bos_token`, `<|endoftext|>`, as training did.",
        f"## Data\n\n{_data(run)}",
        f"## Loss\n\n{_curve(run, committed)}",
        f"## Evaluation\n\n{_evaluation(run, committed)}",
        f"## Where it comes from\n\n{_lineage(run, committed)}",
        f"## Recipe\n\n```yaml\n{configs.dump(run)}```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _data(run: TrainRun) -> str:
    weights = {name: source.weight for name, source in run.data.sources.items()}
    rows: list[Sequence[str]] = []
    notes: list[str] = []
    for name, manifest in Corpora(run.data).manifests.items():
        counts, generations = manifest.head.get("counts", {}), manifest.generations
        tokens = sum(int(generation["train"]["tokens"]) for generation in generations)
        documents = sum(counts["documents"].values()) if counts else None
        share = weights[name] / sum(weights.values())
        shown = "" if documents is None else f"{documents:,}"
        rows.append((name, f"{share:.1%}", shown, f"{tokens:,}", f"`{generations[-1]['identity']}`"))
        said = card.notes_of(card.read_beside(manifest)).get(name, {})
        notes += [f"{name}: {text}" for text in (said.get("about"), said.get("licence")) if text]
    table = _table(["corpus", "share of each batch", "documents", "training tokens", "identity (sha256)"], rows)
    return "\n\n".join([table, *notes])


def _curve(run: TrainRun, committed: Committed) -> str:
    """Validation losses of the live lineage up to the checkpoint."""
    found: dict[int, tuple[int, dict[str, float]]] = {}
    for record in live_records(read_journal(run.run_folder), lineage(run.run_folder)):
        losses = {k.split("/")[1]: v for k, v in record.metrics.items() if k.startswith("validation/") and "/loss" in k}
        if record.type == "evaluation" and losses and record.step <= committed.position.step:
            found[record.step] = int(record.fields["tokens"]), losses
    if not found:
        return "No validation losses were recorded."
    steps = _spread(sorted(found), CURVE_ROWS)
    names = sorted({name for step in steps for name in found[step][1]})
    rows: list[list[str]] = []
    for step in steps:
        tokens, losses = found[step]
        rows.append([f"{step:,}", f"{tokens:,}", *(f"{losses[n]:.4f}" if n in losses else "" for n in names)])
    return "Validation loss in nats per token.\n\n" + _table(["step", "tokens", *names], rows)


def _evaluation(run: TrainRun, committed: Committed) -> str:
    path = run.run_folder / evaluations.FOLDER / f"{committed.folder.name}.json"
    found: list[Evaluated] = [evaluations.read(path)] if path.is_file() else []
    if not found or found[0].manifest_sha256 != committed.manifest_hash:
        return "None was recorded of this checkpoint (`pretrain evaluate`)."
    return "```\n" + "\n".join(evaluations.table(found)) + "\n```"


def _lineage(run: TrainRun, committed: Committed) -> str:
    records = Segments(run.run_folder).read()
    lines = [
        ("checkpoint", f"`{committed.folder.name}` of run {run.name}"),
        ("its manifest (sha256)", f"`{committed.manifest_hash}`"),
        ("samples fed, their digest", f"{committed.position.samples:,}, `{committed.position.digest}`"),
        ("tokenizer (sha256)", f"`{Corpora(run.data).tokenizer_sha256}`"),
    ]
    branches = Lineage(run.run_folder).branches()
    number: int | None = committed.branch
    while number is not None and number in branches:
        branch = branches[number]
        origin = branch.origin or {}
        of = f" ({origin['kind']} from `{origin['name']}`, sha256 `{origin['hash']}`)" if origin else ""
        lines.append((f"branch {number}", f"from step {branch.step}: {branch.why}{of}"))
        number = branch.parent
    lines += [
        (f"amended at sample {record.from_sample:,}", f"`{json.dumps(list(record.changes))}`")
        for record in records[1:]
        if record.changes and record.from_sample <= committed.position.samples
    ]
    return _table(["", ""], lines)


def _spread(values: list[int], most: int) -> list[int]:
    """At most so many of some values, the first and the last among them."""
    if len(values) <= most:
        return values
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    escaped = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)
