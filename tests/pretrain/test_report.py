"""The report of a run: what its journal tells is on the page, and nothing of it can become anything but text."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

import configs
from configs import ConfigError
from data_pipeline.stream import Corpora
from pretrain import report
from pretrain.goodput import PARTS, Account
from pretrain.run import TrainRun, load_run
from pretrain.segments import Segments, first_segment
from pretrain.track import Journal
from tests.data_pipeline.test_card import EVIL, Tags, browse
from tests.runs import write_run

PNG = b"\x89PNG"


def begin(folder: Path, steps: int = 400) -> TrainRun:
    """A run folder as a start leaves it, on real shards."""
    run = load_run(write_run(folder, steps=steps))
    run.run_folder.mkdir(parents=True)
    (run.run_folder / "run.yaml").write_text(configs.dump(run))
    Segments(run.run_folder).write(first_segment(run, Corpora(run.data)))
    return run


def tell(run: TrainRun, branch: int, parent: int | None, first: int, last: int, why: str = "start") -> Journal:
    """The journal of a branch with its steps, the first one being `first`."""
    journal = Journal(run.run_folder, branch)
    journal.attempt(parent, first - 1, why, config=run.model_dump(mode="json"), world_size=2, host="n1",
                    device="cpu", end_step=400, parameters=54_321, torch="2.13", commit="c0ffee" * 6)  # fmt: skip
    for step in range(first, last + 1):
        metrics = {"loss": 5 - step / 200, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_s": 1000.0, "data_wait": 0.01}
        journal.step(step, step * 10, step * 640, "ab" * 16, metrics, {"train": 0.5, "data": 0.1})
    return journal


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    """Killed at step 130, gone on from 100, stopped at 200."""
    run = begin(tmp_path_factory.mktemp("report"))
    first = tell(run, 1, None, 1, 130)
    first.checkpoint(100, "ready", str(run.run_folder / "checkpoints/step-100.b1"), "ab" * 32, 1.5)
    first.evaluation(100, 64_000, {"validation/alpha/loss": 4.6, "validation/alpha/perplexity": 99.5}, 2.0)
    first.checkpoint(120, "ready", str(run.run_folder / "checkpoints/step-120.b1"), "ab" * 32, 1.5)
    first.event(26, "spike", f"step 26: grad_norm 13 {EVIL}", quantity="grad_norm", value=13.0, sigmas=26.0)
    second = tell(run, 2, 1, 101, 200, "resume")
    second.evaluation(200, 128_000, {"validation/alpha/loss": 4.1, "validation/alpha/perplexity": 60.3}, 2.0)
    second.checkpoint(200, "ready", str(run.run_folder / "checkpoints/step-200.b2"), "cd" * 32, 1.5)
    second.end(200, 3, "stopped and saved, to be started again")
    (run.run_folder / "evaluations").mkdir()
    tree = {"step": 100, "tokens": 64_000, "metrics": {"lambada/accuracy": 0.31, "name": "no number"}}
    (run.run_folder / "evaluations" / "step-100.json").write_text(json.dumps(tree))
    (run.run_folder / "evaluations" / "torn.json").write_text("{")
    row = {"checkpoint": "step-100.b1", "step": 100, "tokens": 64_000, "prompt": "Once", "text": f" upon {EVIL}"}
    (run.run_folder / "samples.jsonl").write_text(json.dumps(row) + "\n{torn")
    return run


@pytest.fixture(scope="module")
def page(run: TrainRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.make([run], tmp_path_factory.mktemp("out"))


def rows(page: Path, heading: str) -> list[list[str]]:
    """The cells of the first table after a heading."""
    table = page.read_text().split(f"<h3>{heading}</h3>")[1].split("</table>")[0]
    found = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in table.split("<tr")[1:]]
    return [[re.sub(r"<[^>]+>", "", cell).strip() for cell in row] for row in found]


def test_what_the_journal_tells_is_on_the_page(page: Path) -> None:
    text = page.read_text()
    assert "<h1>small</h1>" in text and "stopped, to go on: stopped and saved, to be started again" in text
    assert "<b>200</b><span>of 400 steps</span>" in text
    titles = re.findall(r"<figcaption>([^<]+?)(?: <small>.*)?</figcaption>", text)
    assert titles == [
        "Training loss", "Validation loss", "Learning rate", "Gradient norm", "Tokens per second", "Waiting for data",
        "lambada/accuracy",
    ]  # fmt: skip
    assert "alpha <b>4.1</b>" in text and "<b>0.31</b>" in text
    checkpoints = [(row[0], row[1], row[-1]) for row in rows(page, "Checkpoints")[1:]]
    assert checkpoints == [
        ("step-200.b2 · best", "ready", "4.1000"), ("step-120.b1", "superseded", "–"),
        ("step-100.b1", "ready", "4.6000"),
    ]  # fmt: skip
    assert rows(page, "Attempts")[1:] == [
        ["b1", "0", "2", "n1", "cpu", "c0ffeec0ffee"], ["b2", "100", "2", "n1", "cpu", "c0ffeec0ffee"],
    ]  # fmt: skip
    assert sorted(path.name for path in page.parent.iterdir()) == [
        "data-wait.png", "evaluation-lambada-accuracy.png", "goodput.png", "gradient-norm.png", "learning-rate.png",
        "report.html", "tokens-per-second.png", "training-loss.png", "validation-loss.png",
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(PNG) for path in page.parent.glob("*.png"))


def test_every_restart_is_there_with_its_cause(page: Path) -> None:
    (row,) = rows(page, "Restarts")[1:]
    assert row[1:4] == ["lost", "100", "30"]
    falls = [row[0] for row in rows(page, "Where the time went")]
    assert falls[0].startswith("all time") and falls[-1].startswith("train")
    assert any(fall.startswith("redone") for fall in falls)


def test_the_data_are_shown_as_planned_and_as_fed(page: Path, run: TrainRun) -> None:
    head, *found = rows(page, "Data: as planned, and as fed")
    assert head[0] == "source" and [row[0] for row in found] == ["alpha", "beta"]
    mixed = report.mix(run, report.read(run.run_folder))
    alpha, beta = mixed["sources"]
    assert alpha["seen"] + beta["seen"] == 200 * 640 and alpha["planned"] + beta["planned"] == 400 * 640
    assert alpha["seen_share"] == pytest.approx(0.7, abs=0.01)
    assert "ab" * 16 in page.read_text()


def test_the_waterfall_falls_from_all_time_to_what_counts() -> None:
    seconds = {"train": 60.0, "redone": 25.0, "save": 15.0}
    account = Account({part: seconds.get(part, 0.0) for part in PARTS}, {}, [])
    found = [(row["part"], round(row["from"], 2), round(row["share"], 2)) for row in report.waterfall(account)]
    assert found == [("all time", 0.0, 1.0), ("redone", 0.75, 0.25), ("save", 0.6, 0.15), ("train", 0.0, 0.6)]


def test_what_is_put_in_stays_text(page: Path) -> None:
    text = page.read_text()
    found = Tags(text)
    assert not found.tags & {"script", "img", "iframe", "object", "link"} and "&lt;script&gt;" in text
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert not [value for name, value in found.attributes if name in ("href", "src")]
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in found.attributes


def test_a_browser_shows_it_and_runs_nothing(page: Path, tmp_path: Path) -> None:
    dom = browse(page, "--dump-dom")
    assert "data-ran" not in dom and dom.count('class="chart"') == 7
    shots = []
    for i, flags in enumerate(([], ["--force-dark-mode", "--enable-features=WebContentsForceDark"])):
        browse(page, f"--screenshot={tmp_path / f'{i}.png'}", "--window-size=1200,2400", *flags)
        shots.append((tmp_path / f"{i}.png").read_bytes())
    assert shots[0] != shots[1] and min(map(len, shots)) > 60_000


def test_two_runs_are_compared(run: TrainRun, tmp_path: Path) -> None:
    other = begin(tmp_path / "other", steps=400)
    other = other.model_copy(update={"optim": other.optim.model_copy(update={"lr_peak": 1e-4})})
    tell(other, 1, None, 1, 150).evaluation(100, 64_000, {"validation/alpha/loss": 4.8})
    page = report.make([run, other], tmp_path / "out")
    text = page.read_text()
    assert "<h1>small (A) and small (B)</h1>" in text
    assert ["optim.lr_peak", "0.003 -&gt; 0.0001"] in rows(page, "What is different")
    assert "alpha, small (A) <b>4.1</b>" in text and "alpha, small (B) <b>4.8</b>" in text
    assert text.count("<h3>Where the time went</h3>") == 2
    assert {"goodput-a.png", "goodput-b.png"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_a_run_of_one_step_has_a_report(tmp_path: Path) -> None:
    run = begin(tmp_path)
    tell(run, 1, None, 1, 1)
    text = report.make([run], tmp_path / "out").read_text()
    assert "no end on record: running, or lost" in text and "<b>1</b><span>of 400 steps</span>" in text
    assert "None is on record." in text


def test_a_run_without_a_step_has_one_too(tmp_path: Path) -> None:
    run = begin(tmp_path)
    tell(run, 1, None, 1, 0).end(0, 1, "preflight: too slow")
    assert "ended with exit code 1: preflight: too slow" in (text := report.make([run], tmp_path / "out").read_text())
    assert "No step is on record yet." in text


def test_what_is_missing_is_said_in_a_line(tmp_path: Path) -> None:
    run = begin(tmp_path)
    with pytest.raises(ConfigError) as error:
        report.make([run], tmp_path / "out")
    assert str(error.value) == f"{run.run_folder}: no journal: the run has not begun"
    tell(run, 1, None, 1, 3)
    gone = replace_shards(run, tmp_path / "gone")
    assert "gone" in report.make([gone], tmp_path / "out").read_text()  # the rest is shown all the same


def replace_shards(run: TrainRun, shards: Path) -> TrainRun:
    tree = run.model_dump()
    tree["data"]["sources"]["alpha"]["shards"] = shards
    return configs.build(TrainRun, tree, "moved")


def test_a_long_run_makes_no_long_page(tmp_path: Path) -> None:
    """20,000 steps, 300 attempts, 500 events."""
    run = begin(tmp_path)
    step = 0
    for branch in range(1, 301):
        journal = tell(run, branch, branch - 1 or None, step + 1, step + 67)
        journal.event(step + 5, "spike", "a spike")
        journal.event(step + 6, "spike", "a spike")
        step += 67
        journal.checkpoint(step, "ready", f"checkpoints/step-{step}.b{branch}", "ab" * 32, 1.0)
        journal.evaluation(step, step * 640, {"validation/alpha/loss": 4.0})
        journal.close()
    text = report.make([run], tmp_path / "out").read_text()
    assert len(text) < 400_000 and "The newest 40 of 299." in text and "The newest 40 of 600." in text


def test_a_step_of_a_long_run_is_held_in_some_hundred_bytes(tmp_path: Path) -> None:
    run = begin(tmp_path)
    tell(run, 1, None, 1, 3000)
    tracemalloc.start()
    try:
        told = report.read(run.run_folder)
        held = tracemalloc.get_traced_memory()[1] / 3000
    finally:
        tracemalloc.stop()
    assert held < 550 and told.account is not None and told.account.seconds["train"] == 1500


def test_the_command_prints_the_page(run: TrainRun, tmp_path: Path) -> None:
    code = "import sys; from pretrain.cli import main; main()"
    command = [sys.executable, "-c", code, "report", str(run.run_folder), "--out", str(tmp_path / "a b")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path}/a b/report.html\n"


def test_secrets_of_a_configuration_are_not_on_the_page(tmp_path: Path) -> None:
    run = begin(tmp_path)
    journal = tell(run, 1, None, 1, 2)
    journal.event(2, "spike", "https://me:Planted1@host/x")
    journal.end(2, 1, "could not open https://me:Planted2@host/x?token=Planted3")
    planted = run.model_copy(update={"init_from": "s3://me:Planted4@host/x"})
    out = report.make([planted], tmp_path / "out").parent
    for path in out.iterdir():
        assert b"Planted" not in path.read_bytes(), path


def test_the_shots_of_a_task_are_drawn_together(tmp_path: Path) -> None:
    run = begin(tmp_path)
    journal = tell(run, 1, None, 1, 100)
    for step in (50, 100):
        metrics = {f"tasks/piqa/{shots}-shot/accuracy_whole": 0.5 + i / 10 for i, shots in enumerate(("0", "1", "few"))}
        journal.evaluation(step, step * 640, {**metrics, "validation/alpha/loss": 4.0})
    told = report.read(run.run_folder)
    (plot,) = report.plots([told])[1]
    assert (plot.title, plot.percent) == ("piqa: accuracy whole", True)
    assert [(c.label, c.last, c.colour) for c in plot.curves] == [
        ("0-shot", 0.5, 0), ("1-shot", 0.6, 1), ("few-shot", 0.7, 2),
    ]  # fmt: skip
    labels = [(c.label, c.dashed) for c in report.plots([told, told])[1][0].curves]
    assert labels[0] == ("0-shot, small (A)", False) and labels[3] == ("0-shot, small (B)", True)


def test_points_of_evaluations_are_in_order_of_tokens(run: TrainRun) -> None:
    told = report.read(run.run_folder)
    assert list(told.evaluations["validation/alpha/loss"].x) == [64_000, 128_000]
    assert told.at_step[100] == {
        "validation/alpha/loss": 4.6,
        "validation/alpha/perplexity": 99.5,
        "lambada/accuracy": 0.31,
    }
