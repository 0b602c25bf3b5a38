"""`pretrain report`: what became of a run, or of two side by side, as one HTML page without scripts, and PNGs.

Everything comes from the run folder: curves, checkpoints and evaluations from the journal, where the time went from
`goodput`, the data mix from the order's arithmetic and the position reached, samples of text from the kept checkpoints.
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from configs import ConfigError, differences
from data_pipeline.card import settings, share, short
from data_pipeline.page import render
from data_pipeline.shards import ShardError, write_durably
from pretrain.curves import Curve, Mark, Plot, curve, draw, number
from pretrain.goodput import PARTS, Account, Launched, account, launched
from pretrain.meter import duration
from pretrain.track.journal import Cursor, Record, branch_files, last_steps, lineage, records_after
from pretrain.track.mask import mask

if TYPE_CHECKING:
    from pretrain.run import TrainRun

Item = TypeVar("Item")
PAGE = "report.html"
FOLDER = "report"  # in the run folder, where nothing else is asked for
SAMPLES = "samples.jsonl"  # in the run folder: the texts of checkpoints that retention may have removed since
EVALUATIONS = "evaluations"  # in the run folder: *.json of {step, tokens, metrics}
ROWS = 40  # of a table that the page shows; the newest
TEXTS = 12  # of a prompt
MARKS = 200  # on a curve
SHOWN_EVENTS = {"rollback": "rollback", "gave_up": "gave up", "skip": "skipped", "spike": "spike", "hang": "hang"}


@dataclass
class Points:
    """A metric over tokens."""

    x: array[float] = field(default_factory=lambda: array("d"))
    y: array[float] = field(default_factory=lambda: array("d"))

    def add(self, x: float, y: float) -> None:
        self.x.append(x)
        self.y.append(y)


@dataclass
class Told:
    """What a run's journal tells. Of a superseded branch only what the account of the time needs is kept."""

    folder: Path
    metrics: dict[str, Points] = field(default_factory=dict)  # of steps
    evaluations: dict[str, Points] = field(default_factory=dict)
    at_step: dict[int, dict[str, float]] = field(default_factory=dict)  # evaluations by step
    tokens: dict[int, float] = field(default_factory=dict)  # of the steps that checkpoints and events name
    checkpoints: dict[str, dict[str, Any]] = field(default_factory=dict)  # by the folder's name
    attempts: list[Record] = field(default_factory=list)
    events: list[Record] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)  # {step, tokens, prompt, text}
    end: Record | None = None  # of the newest branch
    last: Record | None = None  # step that counts
    account: Account | None = None
    first_time: float = 0.0
    last_time: float = 0.0

    @property
    def facts(self) -> dict[str, Any]:
        return self.attempts[-1].fields if self.attempts else {}

    @property
    def name(self) -> str:
        return str((self.facts.get("config") or {}).get("name") or self.folder.name)


Look = Callable[[int, int, str, str], None]  # done, of how many, what is done, in which unit


def read(folder: Path, look: Look = lambda *_: None) -> Told:
    """Read a run's journal once. Raises ConfigError where there is none. `look` is told of the bytes read so far."""
    if not branch_files(folder):
        raise ConfigError(f"{folder}: no journal: the run has not begun")
    sizes = {branch: path.stat().st_size for branch, path in branch_files(folder).items()}
    before = {branch: sum(size for b, size in sizes.items() if b < branch) for branch in sizes}
    told, branches = Told(folder), lineage(folder)
    last = last_steps(branches)
    slim: list[Record] = []
    for count, (record, cursor) in enumerate(records_after(folder, Cursor())):
        if not count:
            told.first_time = record.time
        if count % 10_000 == 0:
            look(before.get(cursor.branch, 0) + cursor.offset, sum(sizes.values()), f"read {folder.name}", "bytes")
        told.last_time = max(told.last_time, record.time)
        live = record.step <= last.get(record.branch, -math.inf)
        _take(told, record, live)
        slim.append(_slim(record))
    told.account = account(slim, branches, _read_launched(folder))
    _read_evaluations(told, last)
    return told


def _read_launched(run_folder: Path) -> list[Launched]:
    """Every attempt that a launcher began in a run folder, by number. What is missing or torn is left out."""
    paths = [(p.name.removeprefix("attempt-"), p) for p in (run_folder / "logs").glob("attempt-*")]
    numbered = sorted((int(number), path) for number, path in paths if number.isdigit())
    found = [launched(number, _tree(path / "attempt.json"), _tree(path / "end.json")) for number, path in numbered]
    return [each for each in found if each is not None]


def _tree(path: Path) -> dict[str, object]:
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _slim(record: Record) -> Record:
    """What the account of the time needs of it: there are as many as steps, perhaps a million."""
    if record.type == "step":
        spent = record.fields.get("spent")
        fields: Any = {} if not isinstance(spent, dict) else _Spent(spent)
        return Record(record.type, record.branch, record.step, record.time, fields)
    return record


class _Spent(Mapping[str, Any]):
    """The fields {spent: {part: seconds}} of a record, in a fifth of the memory."""

    __slots__ = ("_parts", "_seconds")

    def __init__(self, spent: Mapping[str, float]) -> None:
        self._parts, self._seconds = _parts(tuple(spent)), array("d", map(float, spent.values())).tobytes()

    def __getitem__(self, key: str) -> dict[str, float]:
        if key != "spent":
            raise KeyError(key)
        return dict(zip(self._parts, array("d", self._seconds), strict=True))

    def __iter__(self) -> Iterator[str]:
        return iter(("spent",))

    def __len__(self) -> int:
        return 1


@cache
def _parts(names: tuple[str, ...]) -> tuple[str, ...]:
    """One and the same for all that are equal."""
    return names


def _take(told: Told, record: Record, live: bool) -> None:
    if record.type == "checkpoint":
        _take_checkpoint(told, record, live)
    elif record.type == "event":
        if record.fields.get("kind") in SHOWN_EVENTS:
            told.events.append(record)
    elif record.type == "attempt":
        told.attempts.append(record)
        told.end = None
    elif record.type == "end":
        told.end = record
    elif live and record.type == "samples":
        at = {"step": record.step, "tokens": record.fields["tokens"]}
        told.samples += [{**at, "prompt": text["prompt"], "text": text["text"]} for text in record.fields["texts"]]
    elif live and record.type == "step":
        told.last = record
        tokens = float(record.fields["tokens"])
        for name, value in record.metrics.items():
            told.metrics.setdefault(name, Points()).add(tokens, value)
    elif live and record.type == "evaluation":
        told.tokens[record.step] = float(record.fields["tokens"])
        for name, value in record.metrics.items():
            told.evaluations.setdefault(name, Points()).add(float(record.fields["tokens"]), value)
        told.at_step.setdefault(record.step, {}).update(record.metrics)


def _take_checkpoint(told: Told, record: Record, live: bool) -> None:
    name = Path(record.fields["path"]).name
    row = told.checkpoints.setdefault(
        name, {"name": name, "step": record.step, "branch": record.branch, "live": live, "seconds": None, "time": None}
    )
    row["state"], row["live"] = record.fields["status"], live
    if record.fields["status"] == "ready":
        row |= {"seconds": record.fields.get("seconds"), "time": record.time}


def _read_evaluations(told: Told, last: Mapping[int, float]) -> None:
    """What evaluations of single checkpoints left beside the journal; what training measured itself stays."""
    rows = []
    for path in sorted((told.folder / EVALUATIONS).glob("*.json")):
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            if "branch" not in tree or tree["step"] <= last.get(tree["branch"], -math.inf):
                rows.append((float(tree["tokens"]), int(tree["step"]), dict(tree["metrics"])))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    for tokens, step, metrics in sorted(rows, key=lambda row: row[:2]):
        known = told.at_step.get(step, {})
        numbers = {name: float(v) for name, v in metrics.items() if isinstance(v, int | float) and name not in known}
        for name, value in numbers.items():
            told.evaluations.setdefault(name, Points()).add(tokens, value)
        told.at_step.setdefault(step, {}).update(numbers)
    for points in told.evaluations.values():
        order = sorted(range(len(points.x)), key=lambda i: points.x[i])
        points.x, points.y = (array("d", [values[i] for i in order]) for values in (points.x, points.y))


# --- plots ----------------------------------------------------------------------------------------------------------

STEP_PLOTS = {  # metric -> name of the PNG, title, unit
    "loss": ("training-loss", "Training loss", "nats per token"),
    "lr": ("learning-rate", "Learning rate", ""),
    "grad_norm": ("gradient-norm", "Gradient norm", ""),
    "tokens_per_s": ("tokens-per-second", "Tokens per second", "all ranks together"),
    "mfu": ("mfu", "Model FLOP utilization", "share of the hardware's peak"),
    "data_wait": ("data-wait", "Waiting for data", "share of step time"),
    "memory_gib": ("memory", "Memory", "GiB, the fullest device"),
}
PERCENT = ("mfu", "data_wait")
BY_CORPUS = "train_loss/"
SHOTS = re.compile(r"tasks/([^/]+)/([^/]+-shot)/(.+)")  # as pretrain.evaluations names them


def plots(runs: Sequence[Told]) -> tuple[list[Plot], list[Plot]]:
    """The curves of training, and those of evaluations; several runs on the same axes."""
    marks = _marks(runs[0]) if len(runs) == 1 else []
    training = [
        Plot(
            name, title,
            [curve(_label(runs, i), t.metrics[key].x, t.metrics[key].y, i) for i, t in enumerate(runs)
             if key in t.metrics],
            unit, key in PERCENT, marks if key in ("loss", "grad_norm") else [],
        )
        for key, (name, title, unit) in STEP_PLOTS.items()
    ]  # fmt: skip
    by_corpus = Plot("training-loss-by-corpus", "Training loss by corpus", _by_corpus(runs), "nats per token")
    validation = Plot("validation-loss", "Validation loss", _validation(runs), "nats per token")
    shown = [plot for plot in (training[0], by_corpus, validation, *training[1:]) if any(c.x for c in plot.curves)]
    return shown, _tasks(runs)


def _by_corpus(runs: Sequence[Told]) -> list[Curve]:
    names = sorted({name for told in runs for name in told.metrics if name.startswith(BY_CORPUS)})
    return [
        curve(_both(_label(runs, i), name.removeprefix(BY_CORPUS)), points.x, points.y, names.index(name), dashed=i > 0)
        for i, told in enumerate(runs)
        for name in names
        if (points := told.metrics.get(name)) is not None
    ]


def _validation(runs: Sequence[Told]) -> list[Curve]:
    names = sorted({name for told in runs for name in told.evaluations if _is_loss(name)})
    return [
        curve(_both(_label(runs, i), _corpus(name)), points.x, points.y, names.index(name), dashed=i > 0)
        for i, told in enumerate(runs)
        for name in names
        if (points := told.evaluations.get(name)) is not None
    ]


def _tasks(runs: Sequence[Told]) -> list[Plot]:
    """A plot per metric of evaluations that is no validation loss, nor the perplexity that follows from one; of a task
    its numbers of shots together."""
    names = sorted({name for told in runs for name in told.evaluations})
    losses = {name for name in names if _is_loss(name)}
    together: dict[str, list[tuple[str, str]]] = {}  # title -> (shots, name)
    for name in names:
        if name not in losses and name.removesuffix("perplexity") + "loss" not in losses:
            shots = SHOTS.fullmatch(name)
            title, part = (f"{shots[1]}: {shots[3].replace('_', ' ')}", shots[2]) if shots else (name, "")
            together.setdefault(title, []).append((part, name))
    return [
        Plot(
            "evaluation-" + "".join(c if c.isalnum() else "-" for c in title), title,
            [curve(_both(_label(runs, i), part), points.x, points.y, n if len(parts) > 1 else i, dashed=i > 0)
             for i, told in enumerate(runs) for n, (part, name) in enumerate(parts)
             if (points := told.evaluations.get(name)) is not None],
            percent=bool(parts[0][0]) and "accuracy" in title,
        )
        for title, parts in together.items()
    ]  # fmt: skip


def _is_loss(name: str) -> bool:
    return name.startswith("validation/") and name.endswith("/loss")


def _corpus(name: str) -> str:
    return name.removeprefix("validation/").removesuffix("/loss")


def _label(runs: Sequence[Told], i: int) -> str:
    if len(runs) == 1:
        return ""
    same = runs[0].name == runs[1].name
    return f"{runs[i].name} ({'AB'[i]})" if same else runs[i].name


def _both(run: str, part: str) -> str:
    return ", ".join(filter(None, (part, run)))


def _marks(told: Told) -> list[Mark]:
    """Restarts and what the guard noticed, where they happened."""
    loss = told.metrics.get("loss")
    steps = told.last.step if told.last is not None else 0
    if loss is None or not steps or not loss.x:
        return []
    per_step = loss.x[-1] / steps  # near enough for a mark
    found = [
        Mark(r.step * per_step, "restart", f"attempt began again at step {r.step}: {r.fields.get('why', '')}")
        for r in told.attempts[1:]
    ]
    found += [Mark(r.step * per_step, str(r.fields["kind"]), str(r.fields.get("text", ""))) for r in told.events]
    return sorted(found, key=lambda mark: mark.x)[-MARKS:]


# --- what a run is made of ------------------------------------------------------------------------------------------


ABOUT = PARTS | {
    "start": "from the launcher's start of an attempt to its first step",
    "train": "steps that count: goodput",
}


def waterfall(found: Account) -> list[dict[str, Any]]:
    """From all time down to the steps that count: each part with where its bar begins, as shares of the whole."""
    whole = found.whole
    rows: list[dict[str, Any]] = [
        {"part": "all time", "about": "since the first attempt was queued", "seconds": whole, "from": 0.0}
    ]
    left = 1.0
    losses = sorted((p for p in PARTS if p != "train" and found.seconds[p] > 0), key=lambda p: -found.seconds[p])
    for part in [*losses, "train"]:
        size = found.seconds[part] / whole if whole else 0.0
        left -= size
        begin = 0.0 if part == "train" else max(0.0, left)
        rows.append({"part": part, "about": ABOUT[part], "seconds": found.seconds[part], "from": begin})
    for row in rows:
        row["share"] = row["seconds"] / whole if whole else 0.0
    return rows


def mix(run: TrainRun, told: Told) -> dict[str, Any]:
    """The mix of sources as planned for the whole run and as fed so far. Raises ConfigError, ShardError."""
    from pretrain.segments import Segments, plan_course

    records = Segments(run.run_folder).read()
    if not records:
        raise ConfigError(f"{run.run_folder}/segments: no record of the run's course")
    course = plan_course(run, records)
    end, seen = course.steps.start(course.end_step), int(told.last.fields["samples"]) if told.last is not None else 0
    planned, fed = course.order.drawn(end), course.order.drawn(seen)
    epochs = {when: course.order.epochs(samples) for when, samples in (("end", end), ("seen", seen))}
    size = run.data.seq_tokens
    return {
        "sources": [
            {
                "source": source,
                "shards": course.corpora.manifests[source].address,
                "digest": course.record.identities.get(source, ["?"])[-1],
                "planned": count * size,
                "planned_share": count / end if end else 0.0,
                "planned_epochs": epochs["end"][source],
                "seen": fed[source] * size,
                "seen_share": fed[source] / seen if seen else 0.0,
                "seen_epochs": epochs["seen"][source],
            }
            for source, count in sorted(planned.items(), key=lambda item: -item[1])
        ],
        "samples": seen,
        "skipped": course.skips.before(seen),
        "digest": told.last.fields.get("digest") if told.last is not None else None,
        "amendments": [{"from": r.from_sample * size, "changes": r.changes} for r in records if r.changes],
    }


def sample_texts(folder: Path, prompts: Sequence[str], look: Look = lambda *_: None) -> None:
    """Let every kept checkpoint of the live lineage go on with each prompt, once; kept in the run folder."""
    from pretrain import checkpoint
    from pretrain.generate import Sampling
    from pretrain.restore import open_run

    known = {(row["checkpoint"], row["prompt"]) for row in read_samples(folder)}
    names = [path.name for path in checkpoint.live_checkpoints(folder)]
    wanted = [(name, prompt) for name in reversed(names) for prompt in prompts if (name, prompt) not in known]
    sampling = Sampling(max_tokens=60, temperature=0.7, top_k=40, seed=0)
    restored = None
    for i, (name, prompt) in enumerate(wanted):
        step = int(name.removeprefix("step-").partition(".")[0])
        if restored is None or restored.committed.folder.name != name:
            restored = open_run(f"{folder}@{step}")
        row = {
            "checkpoint": name, "step": step, "tokens": restored.committed.position.tokens, "prompt": prompt,
            "text": "".join(restored.write(prompt, sampling)), "sampling": sampling.model_dump(mode="json"),
        }  # fmt: skip
        with (folder / SAMPLES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        look(i + 1, len(wanted), f"write on from the prompts, {folder.name}", "texts")


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The texts that were sampled of a run so far; a torn line is none."""
    rows = []
    if (folder / SAMPLES).is_file():
        for line in (folder / SAMPLES).read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                rows.append({key: row[key] for key in ("checkpoint", "step", "tokens", "prompt", "text")})
            except (ValueError, KeyError, TypeError):
                continue
    return rows


# --- the page -------------------------------------------------------------------------------------------------------


def make(runs: Sequence[TrainRun], out: Path, prompts: Sequence[str] = (), look: Look = lambda *_: None) -> Path:
    """Write the page and the PNGs of one or two runs into `out`; the page's path. Raises ConfigError.

    With `prompts` the kept checkpoints write on from each, once; texts of earlier reports are shown too.
    """
    told = []
    for run in runs:
        told.append(read(run.run_folder, look))
        if prompts:
            sample_texts(run.run_folder, prompts, look)
    training, tasks = plots(told)
    out.mkdir(parents=True, exist_ok=True)
    write_durably(out / PAGE, page(told, runs, training, tasks).encode())
    from pretrain.plots import save_png, save_waterfall

    for i, plot in enumerate([*training, *tasks]):
        look(i, len(training) + len(tasks), "draw", "plots")
        save_png(plot, out / f"{plot.name}.png")
    for i, each in enumerate(told):
        assert each.account is not None
        save_waterfall(waterfall(each.account), out / ("goodput.png" if len(told) == 1 else f"goodput-{'ab'[i]}.png"))
    return out / PAGE


def page(told: Sequence[Told], runs: Sequence[TrainRun], training: Sequence[Plot], tasks: Sequence[Plot]) -> str:
    """The report as one HTML file. Everything put in is escaped."""
    configs_ = [mask(run.model_dump(mode="json")) for run in runs]
    return render(
        Path(__file__).with_name("report.html.jinja"), FILTERS,
        runs=[_run(each, run, tree, _label(told, i)) for i, (each, run, tree) in
              enumerate(zip(told, runs, configs_, strict=True))],
        training=[draw(plot) for plot in training],
        tasks=[draw(plot) for plot in tasks],
        differences=[line.split(": ", 1) for line in differences(*configs_)] if len(runs) == 2 else [],
        rows=ROWS,
        made=_time(datetime.now(UTC).timestamp()),
        longhaul=metadata.version("longhaul"),
    )  # fmt: skip


def _run(told: Told, run: TrainRun, config: Mapping[str, Any], label: str) -> dict[str, Any]:
    assert told.account is not None
    facts = told.facts
    try:
        mixed, mix_problem = mix(run, told), None
    except (ConfigError, ShardError, OSError) as error:
        mixed, mix_problem = None, str(mask(str(error)))
    validation = {name: points.y[-1] for name, points in told.evaluations.items() if _is_loss(name)}
    checkpoints = sorted(told.checkpoints.values(), key=lambda row: (row["step"], row["branch"]), reverse=True)
    for row in checkpoints:
        row["losses"] = (
            {k: v for k, v in told.at_step.get(row["step"], {}).items() if _is_loss(k)} if row["live"] else {}
        )
    best = min((row for row in checkpoints if row["losses"]), key=lambda row: sum(row["losses"].values()), default=None)
    return {
        "label": label or told.name,
        "name": told.name,
        "folder": str(told.folder),
        "state": _state(told),
        "step": told.last.step if told.last is not None else 0,
        "end_step": facts.get("end_step"),
        "tokens": told.last.fields["tokens"] if told.last is not None else 0,
        "train_tokens": config["train_tokens"],
        "parameters": facts.get("parameters"),
        "loss": told.last.metrics.get("loss") if told.last is not None else None,
        "validation": {_corpus(name): value for name, value in validation.items()},
        "account": told.account,
        "waterfall": waterfall(told.account),
        "restarts": told.account.restarts,
        "checkpoints": checkpoints,
        "best": None if best is None else best["name"],
        "corpora": sorted({_corpus(name) for row in checkpoints for name in row["losses"]}),
        "mix": mixed,
        "mix_problem": mix_problem,
        "samples": _by_prompt([*told.samples, *read_samples(told.folder)]),
        "events": told.events,
        "attempts": told.attempts,
        "environment": _environment(facts),
        "datasets": facts.get("datasets") or [],
        "began": _time(told.first_time),
        "last": _time(told.last_time),
        "settings": settings(config),
    }


def _by_prompt(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The texts of each prompt by step; of many, those of TEXTS steps from the first to the last."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: int(row["step"])):
        found.setdefault(str(row["prompt"]), []).append(row)
    return {prompt: spread(texts, TEXTS) for prompt, texts in found.items()}


def spread(rows: Sequence[Item], most: int) -> list[Item]:
    """At most so many (at least two), evenly from the first to the last."""
    if len(rows) <= most:
        return list(rows)
    return [rows[i * (len(rows) - 1) // (most - 1)] for i in range(most)]


NO_ENVIRONMENT = (
    "config", "datasets", "seconds", "parent", "why", "began", "attempt", "end_step", "parameters",
)  # fmt: skip


def _environment(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), str(value)) for key, value in facts.items()
            if key not in NO_ENVIRONMENT and isinstance(value, str | int | float | bool) and value != ""]  # fmt: skip


def _state(told: Told) -> str:
    """In a word or two, from the newest branch's last record."""
    if told.end is None:
        return "no end on record: running, or lost"
    code = told.end.fields["exit_code"]
    word = {0: "done", 3: "stopped, to go on", 130: "interrupted"}.get(code, f"ended with exit code {code}")
    return f"{word}: {told.end.fields.get('why', '')}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


FILTERS = {
    "short": short,
    "share": lambda part: share(part, 1.0),
    "duration": duration,
    "seconds": lambda seconds: f"{seconds:.1f}s" if 0 < seconds < 10 else duration(seconds),
    "number": number,
    "time": _time,
}
