"""Carry a run's journal to MLflow: one MLflow run per run, kept across all its attempts.

Metrics go once per (metric, step), checkpoints are LoggedModels with the metrics of their step, corpora are dataset
inputs, the config is parameters. The registry's aliases `newest` and `best` follow the checkpoints that are there.
What has been carried is noted in `RUN/track/`, but that is only a shortcut: without it everything is found again in
MLflow itself, so a kill at any moment leaves nothing lost and nothing doubled.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import posixpath
import re
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, Field

from configs import ConfigError, Float, Section, flatten
from pretrain.track import mounts, source, system
from pretrain.track.follower import Busy, cause
from pretrain.track.journal import (
    Cursor,
    Record,
    branch_files,
    last_steps,
    lineage,
    read_journal,
    records_after,
    records_of,
)
from pretrain.track.mask import CREDENTIALS, mask_text

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel, Metric
    from mlflow.entities import Run as MlflowRun
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)

FOLDER = "track"
BATCH = 900  # metrics per request; MLflow takes 1,000 entries
MOST_EVALUATIONS = 50  # of one part: each asks for the checkpoints of its step
MAX_KEY, MAX_PARAM, MAX_TAG, MAX_DIGEST = 250, 6000, 5000, 36  # characters, MLflow's limits
IDENTITY = "longhaul.run"  # the tag by which a run is found again
SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql")
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")  # error codes that trying again does not change
STATE = "longhaul.state"  # the tag of a checkpoint: pending, ready, failed, removed, superseded

END = "longhaul.end"  # the tag that says how the newest attempt ended
NOTE = "mlflow.note.content"  # the tag that MLflow's page shows as the description
KIND = {"mlflow.experimentKind": "custom_model_development"}  # of an experiment: MLflow takes it for one of agents else
VERSIONS = "mlflow.modelVersions"  # the tag by which MLflow's page leads from a checkpoint to its registered versions
MODEL = "longhaul.model_id"  # the tag of a registered version
MODE = "?workflowType=machine_learning"  # MLflow's page begins with what it has for agents
NEWEST = "newest"  # the alias; MLflow keeps `latest` for the highest version, which a restart may have superseded
GOODPUT_SHARE = 0.02  # of its time that a follower reckons the goodput at most: that reads all of the journal

# Of how it trained, not of what it has become: no columns of MLflow's table of checkpoints.
OF_THE_RUN = ("lr", "grad_norm", "tokens_per_s", "data_wait", "mfu", "memory_gib", "goodput")
UNREADABLE = ("began",)  # facts of an attempt that are no tags: seconds since the epoch
SHOWN_EVENTS = ("rollback", "gave_up", "weights_differ", "hang")  # as tags of the run, of retired branches too

# Ours before MLflow's own: its defaults block for minutes on a dead server, print to stdout and send usage data.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the follower tries again, and knows when to
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "45",  # seconds; a server that answers after 30 still gets everything
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def check_uri(uri: str) -> str:
    """A tracking URI in full: a database of a relative path becomes the absolute one it means now."""
    scheme, _, rest = uri.partition("://")
    if not rest or scheme.partition("+")[0] not in SCHEMES:
        raise ValueError("expected sqlite:///FILE.db, http://HOST:PORT, or the URI of a PostgreSQL or MySQL database")
    if CREDENTIALS.search(uri):
        raise ValueError(
            "holds a user name or password, and the config is written down in many places; set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead (for a database: its driver's own file, "
            "such as ~/.pgpass)"
        )
    if scheme == "sqlite":
        return f"sqlite:///{Path(rest.removeprefix('/')).absolute()}"
    return uri.rstrip("/")


class Mlflow(Section):
    """Where a run is tracked with MLflow."""

    kind: Literal["mlflow"] = "mlflow"
    uri: Annotated[str, AfterValidator(check_uri)] = "sqlite:///mlflow.db"
    experiment: Annotated[str, Field(min_length=1, max_length=500)] = "longhaul"
    artifact_location: str | None = None  # of a new experiment; default: beside the database, or what the server says
    every_seconds: Annotated[Float, Field(gt=0)] = 5.0  # how often the journal is looked at
    close_seconds: Annotated[Float, Field(ge=0)] = 20.0  # how long the end of a run waits for what is not yet carried
    system_every_seconds: Annotated[Float, Field(gt=0)] | None = 10.0  # how often each node is measured
    register_as: Annotated[str, Field(min_length=1, pattern=r"^[^/:@'\"]+$")] | None = None  # a model of the registry
    best_by: str | None = None  # e.g. validation/wikipedia/loss; default: the mean of the validation losses

    def build(self, run_folder: Path) -> MlflowTracker:
        """The tracker of one run. Nothing is imported, opened or connected before there is something to carry."""
        return MlflowTracker(self, run_folder)

    def check(self) -> None:
        """Raise ConfigError where the database lies on a network file system, on which sqlite loses what it holds."""
        if self.database is None or (kind := mounts.network(self.database)) is None:
            return
        raise ConfigError(
            f"track.uri: {self.uri}: lies on a network file system ({kind}), whose locks sqlite cannot rely on; give a "
            f"file on a local disk, or run `mlflow server --backend-store-uri sqlite:////LOCAL/DISK/mlflow.db --host "
            f"HOST` and give uri: http://HOST:5000"
        )

    @property
    def database(self) -> Path | None:
        """The sqlite file, or None."""
        return Path(self.uri.removeprefix("sqlite:///")) if self.uri.startswith("sqlite:") else None

    def page(self, run_folder: Path | None = None) -> str:
        """How to look at it: the address of a server, of a run's page on it where that is known; or the command that
        starts a server on the database."""
        if self.uri.startswith("http"):
            state = None if run_folder is None else self.build(run_folder).state
            if state is None or state.run_id is None:
                return self.uri
            return f"{self.uri}/#/experiments/{state.experiment_id}/runs/{state.run_id}{MODE}"
        return f"mlflow server --backend-store-uri {shlex.quote(self.uri)}"


Point = tuple[str, float, Record]  # metric, value, where it comes from


class State(BaseModel):
    """How far a run has been carried to one place; `RUN/track/mlflow-<place>.json`."""

    format: Literal[1] = 1
    uri: str
    experiment: str
    experiment_id: str | None = None
    run_id: str | None = None
    cursor: tuple[int, int] = Cursor()
    marks: dict[str, int] = {}  # metric -> last step carried
    system: dict[str, int] = {}  # file of system metrics -> bytes carried


class MlflowTracker:
    """Follows one run. `carry` may be called from several processes by turns; a file lock orders them."""

    def __init__(self, config: Mlflow, run_folder: Path) -> None:
        self.config = config
        self.name = f"MLflow at {config.uri}"
        self.every_seconds, self.close_seconds = config.every_seconds, config.close_seconds
        self.metrics = 0  # carried by this object
        self.checkpoints = 0  # events of checkpoints, likewise
        self._run_folder = run_folder
        place = hashlib.sha256(f"{config.uri}\n{config.experiment}".encode()).hexdigest()[:8]
        self._state_file = run_folder / FOLDER / f"mlflow-{place}.json"
        self._branches: dict[int, tuple[int | None, int]] = {}  # the lineage, as known so far
        self._session: _Session | None = None
        self._reckoned = (-math.inf, 0.0)  # the goodput: when, and how long that took

    @property
    def carried(self) -> tuple[int, int]:
        """Bytes of the journal that have been carried, and all there are."""
        state = self._read_state()
        sizes = {branch: path.stat().st_size for branch, path in branch_files(self._run_folder).items()}
        before = sum(size for branch, size in sizes.items() if branch < state.cursor[0])
        return before + state.cursor[1], sum(sizes.values())

    @property
    def state(self) -> State:
        """How far the run has been carried."""
        return self._read_state()

    def carry(self) -> bool:
        """Carry the next part of the journal, at most one request of metrics or one event. Whether there was one."""
        with self._lock():
            state = self._read_state()
            journal = next(records_after(self._run_folder, Cursor(*state.cursor)), None) is not None
            if not journal and (state.run_id is None or not self._system_files(state)):
                return False
            try:
                self._session = self._session or _Session.open(self.config, self._run_folder, state)
                if journal:
                    self._carry_part(self._session, state)
                else:
                    self._carry_system(self._session, state)
            except Exception:
                self._session = None  # what MLflow has is asked again
                raise
            self._write_state(state)
            return True

    def _carry_part(self, session: _Session, state: State) -> None:
        last = self._last_steps()
        marks = {k: max(session.marks.get(k, -1), state.marks.get(k, -1)) for k in session.marks.keys() | state.marks}
        points: list[Point] = []
        evaluations: list[tuple[Record, Metric | None]] = []
        loss = session.newest.get("loss")
        for record, cursor in records_after(self._run_folder, Cursor(*state.cursor)):
            live = record.step <= last.get(record.branch, -math.inf)
            measured = record.type in ("step", "evaluation")
            if measured and live:
                new = _new_points(record, marks)
                points += new
                loss = next((_metric(key, value, record) for key, value, _ in new if key == "loss"), loss)
                if record.type == "evaluation":
                    evaluations.append((record, loss if loss is not None and loss.step <= record.step else None))
            elif (points or evaluations) and not measured:
                break  # first what came before this event
            elif not measured:
                self.checkpoints += session.event(record, live) and record.type == "checkpoint"
                if live and record.fields.get("status") == "ready":
                    points += _new_points(replace(record, fields={"metrics": self._goodput()}), marks)
            state.cursor = cursor
            if len(points) >= BATCH or len(evaluations) >= MOST_EVALUATIONS or not measured:
                break
        self.metrics += session.log(points)
        logged = {(key, record.step) for key, _, record in points}
        for evaluation, loss_then in evaluations:
            session.link(evaluation, loss_then, logged)
        state.marks = session.marks = marks

    def _carry_system(self, session: _Session, state: State) -> None:
        """The next part of what the nodes measured, at most one request."""
        last = self._last_steps()
        marks, points = dict(session.marks), list[Point]()
        for path, offset in self._system_files(state).items():
            host = path.name.partition(".")[2].removesuffix(".jsonl")
            for record, after in records_of(path, offset):
                if record.step <= last.get(record.branch, -math.inf):
                    metrics = {f"system/{host}/{name}": value for name, value in record.metrics.items()}
                    points += _new_points(replace(record, fields={"metrics": metrics}), marks)
                state.system[path.name] = after
                if len(points) >= BATCH - 100:
                    break
            if len(points) >= BATCH - 100:
                break
        session.log(points)
        session.marks = marks
        state.marks |= {key: step for key, step in marks.items() if key.startswith("system/")}

    def _system_files(self, state: State) -> dict[Path, int]:
        """The files that have more than was carried, and how much of each was."""
        found = sorted((self._run_folder / system.FOLDER).glob("*.jsonl"))
        sizes = {path: state.system.get(path.name, 0) for path in found}
        return {path: at for path, at in sizes.items() if next(records_of(path, at), None) is not None}

    def _goodput(self) -> dict[str, float]:
        """The share of the time so far that went into steps that count; nothing where reckoning it takes too long."""
        from pretrain.goodput import account  # imports the journal, which this package holds

        at, took = self._reckoned
        begun = time.monotonic()
        if took > GOODPUT_SHARE * (begun - at):
            return {}
        goodput = account(read_journal(self._run_folder), self._branches).goodput
        self._reckoned = (time.monotonic(), time.monotonic() - begun)
        return {} if goodput is None else {"goodput": goodput}

    def _last_steps(self) -> dict[int, float]:
        if branch_files(self._run_folder).keys() - self._branches.keys():
            self._branches = lineage(self._run_folder)
        return last_steps(self._branches)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        self._state_file.parent.mkdir(parents=True, exist_ok=True)
        with self._state_file.with_suffix(".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(f"{self._state_file}: another process is carrying this run") from None
            except OSError:
                pass  # a file system without locks: MLflow itself refuses an equal point, so nothing is doubled
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_UN)  # said aloud, since a forked worker may hold the file open too

    def _read_state(self) -> State:
        with contextlib.suppress(OSError, ValueError):
            return State.model_validate_json(self._state_file.read_bytes())
        return State(uri=self.config.uri, experiment=self.config.experiment)

    def _write_state(self, state: State) -> None:
        temporary = self._state_file.with_suffix(".tmp")
        temporary.write_text(state.model_dump_json())
        temporary.replace(self._state_file)


class _Session:
    """A connection to MLflow in which the run is known to exist and to be active."""

    def __init__(self, client: MlflowClient, run: MlflowRun, config: Mlflow, run_folder: Path) -> None:
        from mlflow.entities import Metric

        self.client, self.config, self.run_folder = client, config, run_folder
        self.run_id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self.newest = {m.key: Metric(m.key, m.value, m.timestamp, m.step) for m in run.data.to_proto().metrics}
        self.marks = {key: metric.step for key, metric in self.newest.items()}
        self._tags: dict[str, str] = dict(run.data.tags)
        self._refused: set[str] = set()

    @classmethod
    def open(cls, config: Mlflow, run_folder: Path, state: State) -> _Session:
        """Find the run, or make it, or bring it back where it was deleted; note it in `state`."""
        client = _client(config)
        run = _known_run(client, state)
        if run is None:
            experiment_id = _experiment(client, config)
            run = _find_or_create_run(client, experiment_id, run_folder)
        _restore(client, run, config)
        state.run_id, state.experiment_id = run.info.run_id, run.info.experiment_id
        return cls(client, run, config, run_folder)

    def log(self, points: list[Point]) -> int:
        """Log metrics. One that is not finite is a gap in the curve (NaN), and its first one a tag."""
        from mlflow.entities import RunTag

        metrics: list[Metric] = []
        tags: dict[str, str] = {}
        for key, value, record in points:
            if not math.isfinite(value) and f"nonfinite.{key}" not in self._tags:
                tags.setdefault(f"nonfinite.{key}", f"{value} at step {record.step}, the first")
            metrics.append(_metric(key, value if math.isfinite(value) else math.nan, record))
        if metrics:
            self._log_batch(metrics, [RunTag(key, value) for key, value in tags.items()])
            self._tags |= tags
            self.newest |= {metric.key: metric for metric in metrics}
        return len(metrics)

    def link(self, evaluation: Record, loss: Metric | None, logged: set[tuple[str, int]]) -> None:
        """Give the checkpoints of an evaluation's step its metrics, and the training loss that was newest then.

        `logged` are the points (metric, step) that have just gone to the run. Of others the run's own is taken, so that
        what is linked is never a second point of a curve.
        """
        step = evaluation.step
        models = [m for m in self._models(f"params.step = '{step}'") if m.tags.get(STATE) in ("pending", "ready")]
        if not models:
            return
        points = [] if loss is None else [loss]
        known = set.intersection(*({metric.key for metric in model.metrics or []} for model in models))
        for name, value in evaluation.metrics.items():
            if (key := _name(name)) in known:
                continue
            if (key, step) in logged:
                points.append(_metric(key, value, evaluation))
            else:
                points += [m for m in self.client.get_metric_history(self.run_id, key) if m.step == step][:1]
        if sum([self._give(model, points) for model in models]):
            self._set_aliases()

    def _give(self, model: LoggedModel, points: list[Metric]) -> bool:
        """Give a checkpoint the metrics of the run that it has not. Whether there were any."""
        from mlflow.entities import Metric

        known = {metric.key for metric in model.metrics or []}
        wanted = [m for m in points if m.key not in known and math.isfinite(m.value)]
        if wanted:
            linked = [Metric(m.key, m.value, m.timestamp, m.step, model_id=model.model_id) for m in wanted]
            self.client.log_batch(self.run_id, metrics=linked)  # the run has them: an equal point is one point
        return bool(wanted)

    def _at(self, step: int) -> list[Metric]:
        """The run's newest points, those at a step, and the newest training loss not after it."""
        return [
            metric
            for key, metric in self.newest.items()
            if not key.startswith("system/")
            and key not in OF_THE_RUN
            and (metric.step == step or (key == "loss" and metric.step < step))
        ]

    def _log_batch(self, metrics: list[Metric], tags: list[Any]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.log_batch(self.run_id, metrics=metrics, tags=tags)
        except MlflowException as error:
            if error.error_code not in REFUSED or not self._is_active():
                raise
            if len(metrics) > 1:
                half = len(metrics) // 2
                self._log_batch(metrics[:half], tags)
                self._log_batch(metrics[half:], [])
                return
            if metrics[0].key not in self._refused:
                logger.warning("MLflow refuses the metric %s: %s; it is left out", metrics[0].key, cause(error))
            self._refused.add(metrics[0].key)

    def _is_active(self) -> bool:
        return bool(self.client.get_run(self.run_id).info.lifecycle_stage == "active")

    def event(self, record: Record, live: bool) -> bool:
        """Show an attempt, a checkpoint or an end. Whether it changed anything; a superseded one may not."""
        from mlflow.exceptions import MlflowException

        try:
            if record.type == "checkpoint":
                return self._checkpoint(record, live)
            if live and record.type == "attempt":
                self._attempt(record)
            elif live and record.type == "end":
                self._end(record)
            elif live and record.type == "samples":
                self._samples(record)
            elif record.type == "event" and record.fields.get("kind") in SHOWN_EVENTS:
                key = f"longhaul.{record.fields['kind']}.b{record.branch}.step{record.step}"
                self.client.set_tag(self.run_id, key, _text(record.fields["text"], MAX_TAG))
            return live
        except MlflowException as error:
            if error.error_code not in REFUSED or not self._is_active():
                raise
            where = f"{record.type} at step {record.step} (branch {record.branch})"
            logger.warning("MLflow refuses what the journal says of the %s: %s; it is left out", where, cause(error))
            return False

    def _attempt(self, record: Record) -> None:
        """An attempt begins: the run is running; its config, corpora and facts; what older attempts left unfinished."""
        from mlflow.entities import Param, RunTag

        config = record.fields.get("config") or {}
        run = self.client.get_run(self.run_id)
        self.client.update_run(self.run_id, status="RUNNING", name=config.get("name"))
        if END in run.data.tags:
            self.client.delete_tag(self.run_id, END)  # it has begun again
        wanted = {_name(key): _text(value, MAX_PARAM) for key, value in flatten(config).items()} if config else {}
        known = run.data.params
        place = f"b{record.branch}, from step {record.step}"
        tags = {
            f"changed.{key}": f"{known[key]} -> {value} ({place})"
            for key, value in wanted.items()
            if key in known and known[key] != value
        }
        facts = {"branch": record.branch, **{k: v for k, v in record.fields.items() if k not in UNREADABLE}}
        tags |= {"mlflow.source.name": "pretrain train", "mlflow.source.type": "JOB"}
        if config and not run.data.tags.get(NOTE, "").strip():
            tags[NOTE] = _about(config, record)
        if "commit" in record.fields:
            tags["mlflow.source.git.commit"] = str(record.fields["commit"])
        tags |= {f"longhaul.{key}": str(v) for key, v in facts.items() if isinstance(v, str | int | float | bool)}
        self.client.log_batch(
            self.run_id,
            params=[Param(key, value) for key, value in wanted.items() if key not in known],
            tags=[RunTag(_name(key), _text(value, MAX_TAG)) for key, value in tags.items()],
        )
        self._tags |= tags
        self._close_unfinished(record)
        self._inputs(record.fields.get("datasets") or [])
        if config:
            self._artifact("run.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        diff = self.run_folder / source.FOLDER / f"{record.branch}.diff"
        if diff.is_file():
            self._artifact(f"code/b{record.branch}.diff", diff.read_text(encoding="utf-8", errors="replace"))
        if record.fields.get("parent") is None:
            self._cards(record.fields.get("datasets") or [])

    def _samples(self, record: Record) -> None:
        """What the model wrote at a step, as one text; the steps in the order of their names."""
        texts = [f"{text['prompt']}{text['text']}\n" for text in record.fields["texts"]]
        head = f"step {record.step:,}, {record.fields['tokens']:,} tokens\n"
        self._artifact(f"samples/step-{record.step:09d}.txt", "\n---\n\n".join([head, *texts]))

    def _cards(self, datasets: list[dict[str, Any]]) -> None:
        """The data cards of the corpora, where they can be read from here."""
        for dataset in datasets:
            for suffix in ("html", "json"):
                card = Path(str(dataset["source"])).parent / f"card.{suffix}"
                if card.is_file():
                    text = mask_text(card.read_text(encoding="utf-8", errors="replace"))
                    self._artifact(f"corpora/{_name(str(dataset['name']))}/card.{suffix}", text)

    def _inputs(self, datasets: list[dict[str, Any]]) -> None:
        """Corpora: name, source (where it lies) and digest (hash of its manifest). One already there is not doubled."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for dataset in datasets:
            more = {k: v for k, v in dataset.items() if k not in ("name", "source", "digest")}
            source = json.dumps({"uri": str(dataset["source"])})
            digest = str(dataset["digest"])
            entity = Dataset(
                name=str(dataset["name"])[:500],
                digest=digest[:MAX_DIGEST],  # the whole of it stands in the profile
                source_type="local",
                source=source,
                profile=json.dumps({"digest": digest, **more}, default=str),
            )
            inputs.append(DatasetInput(entity, [InputTag("mlflow.data.context", "train")]))
        if inputs:
            self.client.log_inputs(self.run_id, inputs)

    def _close_unfinished(self, attempt: Record) -> None:
        """What an earlier attempt was writing when it ended never becomes ready; what lies beyond is superseded."""
        for state in ("pending", "ready"):
            for model in self._models(f"tags.`{STATE}` = '{state}'"):
                if int(model.params["branch"]) >= attempt.branch:
                    continue
                if state == "pending":
                    self._fail(model)
                elif int(model.params["step"]) > attempt.step:
                    tags = {STATE: "superseded", "longhaul.superseded_by": f"b{attempt.branch}"}
                    self.client.set_logged_model_tags(model.model_id, tags)
        self._set_aliases()

    def _artifact(self, name: str, text: str) -> None:
        """Store a small text."""
        self._store(lambda: self.client.log_text(self.run_id, text, name), name)

    def _store(self, upload: Callable[[], object], name: str) -> None:
        """Upload. An artifact store that is not reachable from here does not hold up the metrics."""
        try:
            upload()
        except Exception as error:
            self.client.get_run(self.run_id)  # raises where it is MLflow that is away, and then all is tried again
            logger.warning("MLflow has no %s: its artifact store cannot be written from here: %s", name, cause(error))

    def _checkpoint(self, record: Record, live: bool) -> bool:
        """A checkpoint is a LoggedModel, its files by reference. Whether the record changed anything.

        pending: PENDING; ready: READY, an output of the run at its step; failed: FAILED; removed: no status. A
        superseded record makes nothing new, but what it says of a known one still holds, but for ready.
        """
        from mlflow.entities import LoggedModelOutput

        status, path = record.fields["status"], record.fields["path"]
        name = re.sub(r"[/:.%\"']", "-", Path(path).name)  # MLflow's rule for names of models
        model = next(iter(self._models(f"name = '{name}'")), None)
        if model is None:
            if not live or status in ("failed", "removed"):
                return False
            model = self._create_model(name, path, record)
        state = model.tags.get(STATE)
        if status == "ready" and live and state in ("pending", "ready"):
            manifest_hash = record.fields.get("manifest_hash")
            if manifest_hash and "manifest_hash" not in model.params:
                self.client.log_model_params(model.model_id, {"manifest_hash": manifest_hash})
            outputs = self.client.get_run(self.run_id).outputs
            if model.model_id not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:
                self.client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, record.step)])
            self._manifest(model, Path(path))
            self.client.finalize_logged_model(model.model_id, "READY")
            self.client.set_logged_model_tags(model.model_id, {STATE: "ready"})
            self._give(model, self._at(record.step))
            self._set_aliases()
        elif status == "failed" and state == "pending":
            self._fail(model)
        elif status == "removed":
            self._mark_removed(model, record)
            self._set_aliases()
        return True

    def _mark_removed(self, model: LoggedModel, record: Record) -> None:
        """Its folder is gone: on MLflow's page it is no longer Ready, and its versions in the registry say why."""
        from mlflow.entities import LoggedModelStatus

        at = datetime.fromtimestamp(record.time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        for version in json.loads(model.tags.get(VERSIONS, "[]")):
            name, number = version["name"], str(version["version"])
            text = f"Removed by retention at {at}: {model.params['path']} is gone."
            with _unless_gone():
                if not self.client.get_model_version(name, number).description:  # a person's words stay
                    self.client.update_model_version(name, number, text)
                self.client.set_model_version_tag(name, number, STATE, "removed")
        if "removed" not in model.params:
            self.client.log_model_params(model.model_id, {"removed": at})
        if model.status == "READY":
            self.client.finalize_logged_model(model.model_id, LoggedModelStatus.UNSPECIFIED)
        self.client.set_logged_model_tags(model.model_id, {STATE: "removed"})  # last: until then it is done again

    def _manifest(self, model: LoggedModel, folder: Path) -> None:
        """Give a checkpoint its manifest as an artifact; the tensors stay where they are."""
        if (folder / "MANIFEST.json").is_file():
            self._store(
                lambda: self.client.log_model_artifact(model.model_id, str(folder / "MANIFEST.json")), "manifest"
            )

    def _set_aliases(self) -> None:
        """`newest` and `best` name the newest and the best checkpoint there are; another run's better one stays."""
        if self.config.register_as is None:
            return
        ready = self._models(f"tags.`{STATE}` = 'ready'")
        if not ready:
            return
        name = self.config.register_as
        latest = max(ready, key=lambda model: (int(model.params["step"]), int(model.params["branch"])))
        self._alias(name, NEWEST, latest)
        measured = [(loss, model) for model in ready if (loss := self._measure(model)) is not None]
        if not measured:
            return
        loss, best = min(measured, key=lambda pair: pair[0])
        other = self._holder(name, "best")
        if other is not None and other.source_run_id != self.run_id and other.tags.get(STATE) == "ready":
            theirs = self._measure(other)
            if theirs is not None and theirs <= loss:
                return
        self._alias(name, "best", best)

    def _measure(self, model: LoggedModel) -> float | None:
        """What checkpoints are compared by, the less the better; None where it was not measured."""
        values = {metric.key: metric.value for metric in model.metrics or []}
        if self.config.best_by is not None:
            return values.get(_name(self.config.best_by))
        losses = [value for key, value in values.items() if key.startswith("validation/") and key.endswith("/loss")]
        return sum(losses) / len(losses) if losses else None

    def _holder(self, name: str, alias: str) -> LoggedModel | None:
        from mlflow.exceptions import MlflowException

        try:
            version = self.client.get_model_version_by_alias(name, alias)
            return self.client.get_logged_model(_model_id(version))
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def _alias(self, name: str, alias: str, model: LoggedModel) -> None:
        holder = self._holder(name, alias)
        if holder is None or holder.model_id != model.model_id:
            self.client.set_registered_model_alias(name, alias, self._version(name, model))

    def _version(self, name: str, model: LoggedModel) -> str:
        """The version of the registered model that a checkpoint is, made where it is none yet."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for version in self.client.search_model_versions(f"name = '{name}'", max_results=1000):
            if _model_id(version) == model.model_id:
                return str(version.version)
        tags = {MODEL: model.model_id, **{key: model.params[key] for key in ("step", "branch", "path")}}
        made = self.client.create_model_version(
            name, model.artifact_location, run_id=self.run_id, tags=tags, model_id=model.model_id, await_creation_for=0
        )
        known = json.loads(model.tags.get(VERSIONS, "[]"))
        known.append({"name": name, "version": int(made.version)})
        self.client.set_logged_model_tags(model.model_id, {VERSIONS: json.dumps(known)})
        return str(made.version)

    def _create_model(self, name: str, path: str, record: Record) -> LoggedModel:
        return self.client.create_logged_model(
            self.experiment_id,
            name=name,
            source_run_id=self.run_id,
            params={"step": str(record.step), "branch": str(record.branch), "path": path},
            tags={STATE: "pending"},
            model_type="checkpoint",
        )

    def _fail(self, model: LoggedModel) -> None:
        self.client.finalize_logged_model(model.model_id, "FAILED")
        self.client.set_logged_model_tags(model.model_id, {STATE: "failed"})

    def _models(self, condition: str) -> list[LoggedModel]:
        found: list[LoggedModel] = []
        page: str | None = None
        while True:
            part = self.client.search_logged_models(
                [self.experiment_id], f"source_run_id = '{self.run_id}' AND {condition}", page_token=page
            )
            found += part
            page = part.token
            if not page:
                return found

    def _end(self, record: Record) -> None:
        """The attempt ended. One that is to be started again (3) is SCHEDULED: MLflow's word for waiting its turn."""
        exit_code = int(record.fields["exit_code"])
        self.client.set_tag(self.run_id, END, f"{exit_code}: {record.fields.get('why', '')}"[:MAX_TAG])
        if exit_code == 3:
            self.client.update_run(self.run_id, status="SCHEDULED")
        elif exit_code != 6:  # 6: another attempt has taken over, and the run is its
            status = {0: "FINISHED", 130: "KILLED"}.get(exit_code, "FAILED")
            self.client.set_terminated(self.run_id, status, end_time=round(record.time * 1000))


def _client(config: Mlflow) -> MlflowClient:
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from mlflow.tracking import MlflowClient

    if config.database is not None:
        _make_database(config.database)
    return MlflowClient(tracking_uri=config.uri)


def _make_database(path: Path) -> None:
    """Make MLflow's tables in a new sqlite file: whole or absent.

    MLflow makes them in place, in some fifty steps, and never recovers from a kill between two of them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return
    import mlflow.store.db.utils

    tables: Any = mlflow.store.db.utils
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    engine = tables.create_sqlalchemy_engine(f"sqlite:///{temporary}")
    try:
        tables._initialize_tables(engine)
        engine.dispose()
        with contextlib.suppress(FileExistsError):  # another was first
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def find_model(config: Mlflow, name: str) -> tuple[Path, str | None]:
    """(folder, manifest hash) of the checkpoint behind `models:/NAME@alias`, `models:/NAME/VERSION` or `models:/m-ID`.

    Raises LookupError, with one line, where the registry does not lead to a checkpoint.
    """
    from mlflow.exceptions import MlflowException

    rest = name.removeprefix("models:/")
    client = _client(config)
    try:
        model_id = rest if re.fullmatch(r"m-\w+", rest) else _version_s_model(client, rest)
        params = client.get_logged_model(model_id).params
    except MlflowException as error:
        raise LookupError(f"MLflow at {config.uri}: {cause(error)}") from None
    if "path" not in params:
        raise LookupError(f"{model_id} in MLflow at {config.uri} is not a checkpoint of a run: it has no path")
    return Path(params["path"]), params.get("manifest_hash")


def _version_s_model(client: MlflowClient, rest: str) -> str:
    """The id of the logged model that NAME@alias or NAME/VERSION stands for."""
    model, at, alias = rest.rpartition("@")
    if at:
        alias = NEWEST if alias == "latest" else alias
        version = client.get_model_version_by_alias(model, alias)
    elif (parts := rest.rpartition("/"))[1]:
        version = client.get_model_version(parts[0], parts[2])
    else:
        raise LookupError("expected models:/NAME@alias or models:/NAME/VERSION")
    return _model_id(version)


def _model_id(version: ModelVersion) -> str:
    """The id of the logged model that a version is; MLflow's database does not keep it, so a tag of ours does."""
    return str(version.model_id or version.tags.get(MODEL) or str(version.source).removeprefix("models:/"))


def _known_run(client: MlflowClient, state: State) -> MlflowRun | None:
    """The run that `state` names; where MLflow has it no more, all is to be carried again, to a new one."""
    from mlflow.exceptions import MlflowException

    if state.run_id is None:
        return None
    try:
        return client.get_run(state.run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    logger.warning("MLflow at %s has no run %s any more: all of it is carried to a new one", state.uri, state.run_id)
    state.run_id, state.cursor, state.marks, state.system = None, Cursor(), {}, {}
    return None


def _experiment(client: MlflowClient, config: Mlflow) -> str:
    experiment = client.get_experiment_by_name(config.experiment)
    if experiment is None:
        location = config.artifact_location
        if location is None and config.database is not None:
            location = (config.database.parent / "mlartifacts").as_uri()
        return str(client.create_experiment(config.experiment, artifact_location=location, tags=KIND))
    if experiment.lifecycle_stage != "active":
        logger.warning("MLflow's experiment %s had been deleted; restored, for this run writes to it", experiment.name)
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


def _find_or_create_run(client: MlflowClient, experiment_id: str, run_folder: Path) -> MlflowRun:
    """The run is found by a tag made from the first line of its journal, so no lost note makes a second one."""
    from mlflow.entities import ViewType

    first = next(read_journal(run_folder))
    identity = hashlib.sha256(f"{first.type} {first.branch} {first.step} {first.time}".encode()).hexdigest()[:16]
    condition = f"tags.`{IDENTITY}` = '{identity}'"
    found = client.search_runs([experiment_id], condition, run_view_type=ViewType.ALL, order_by=["start_time ASC"])
    if found:
        return found[0]
    return client.create_run(
        experiment_id,
        start_time=round(first.time * 1000),
        tags={IDENTITY: identity, "longhaul.folder": str(run_folder)},
        run_name=run_folder.name,
    )


def _restore(client: MlflowClient, run: MlflowRun, config: Mlflow) -> None:
    """A deleted run that is still written to comes back: its history is worth more than the surprise."""
    experiment = client.get_experiment(run.info.experiment_id)
    if experiment.lifecycle_stage != "active":
        logger.warning("MLflow's experiment %s had been deleted; restored, for this run writes to it", experiment.name)
        client.restore_experiment(experiment.experiment_id)
    if client.get_run(run.info.run_id).info.lifecycle_stage != "active":
        logger.warning(
            "MLflow's run %s (%s) had been deleted; restored, for this run writes to it",
            run.info.run_id,
            config.experiment,
        )
        client.restore_run(run.info.run_id)


def _new_points(record: Record, marks: dict[str, int]) -> list[Point]:
    """The metrics of a record that have not been carried at its step; `marks` is moved on."""
    metrics = {**record.metrics, "tokens": float(record.fields["tokens"])} if record.type == "step" else record.metrics
    points = []
    for name, value in metrics.items():
        key = _name(name)
        if record.step > marks.get(key, -1):
            marks[key] = record.step
            points.append((key, value, record))
    return points


def _metric(key: str, value: float, record: Record) -> Metric:
    from mlflow.entities import Metric

    return Metric(key, value, round(record.time * 1000), record.step)


def _name(key: str) -> str:
    """A key as MLflow takes it: few signs, and as a path already in its shortest form."""
    name = re.sub(r"[^\w\-. :/]", "_", key)[:MAX_KEY]
    if posixpath.normpath(name) != name or name.startswith("/"):
        name = name.replace("/", "_")
    return f"_{name}" if name in ("", ".") or name.startswith("..") else name


def _about(config: dict[str, Any], attempt: Record) -> str:
    """A run in a few lines, as its description."""
    sources = (config.get("data") or {}).get("sources") or {}
    whole = sum(source.get("weight", 0) for source in sources.values()) or 1
    mixed = ", ".join(f"{name} {100 * source.get('weight', 0) / whole:.3g} %" for name, source in sources.items())
    facts = {
        "parameters": attempt.fields.get("parameters"), "tokens": config.get("train_tokens"),
        "steps": attempt.fields.get("end_step"),
    }  # fmt: skip
    told = [f"{value:,} {name}" for name, value in facts.items() if isinstance(value, int)]
    lines = [", ".join(told), f"Data: {mixed}" if mixed else "", f"`pretrain report {config.get('run_folder', 'RUN')}`"]
    return mask_text("\n\n".join(filter(None, lines)))


@contextlib.contextmanager
def _unless_gone() -> Iterator[None]:
    """What somebody has deleted in MLflow needs no mark."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def _text(value: Any, limit: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def carry_evaluations(config: Mlflow, run_folder: Path) -> int:
    """Give a run's checkpoints in MLflow what `pretrain evaluate` found of them; how many metrics were new.

    Nothing where the run itself has not been carried yet. Raises TrackError where MLflow is away.
    """
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException

    from pretrain.evaluations import read_all  # imports the run, which imports this
    from pretrain.track import TrackError

    state = config.build(run_folder)._read_state()
    if state.run_id is None or state.experiment_id is None:
        return 0
    carried = 0
    try:
        client = _client(config)
        for found in read_all(run_folder):
            name = re.sub(r"[/:.%\"']", "-", found.checkpoint)
            condition = f"source_run_id = '{state.run_id}' AND name = '{name}'"
            for model in client.search_logged_models([state.experiment_id], condition):
                known = {metric.key: metric.value for metric in model.metrics or []}
                at = round(found.time * 1000)
                metrics = [
                    Metric(_name(key), value, at, found.step, model_id=model.model_id)
                    for key, value in found.metrics.items()
                    if math.isfinite(value)
                    and known.get(_name(key)) != value
                    and not (key.startswith("validation/") and _name(key) in known)  # training's own
                ]
                for begin in range(0, len(metrics), BATCH):
                    client.log_batch(state.run_id, metrics=metrics[begin : begin + BATCH])
                carried += len(metrics)
    except (MlflowException, OSError) as error:
        raise TrackError(f"MLflow at {config.uri}: {cause(error)}; nothing was lost") from None
    return carried
