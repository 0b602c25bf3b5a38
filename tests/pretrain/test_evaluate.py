"""Tasks and perplexities: how they are posed, that the harness's own backend agrees, alone and on several ranks."""

from __future__ import annotations

import json
import math
import sys
import threading
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from typer.testing import CliRunner

import configs
from configs import ConfigError, build
from data_pipeline.tokenizer import Tokenizer
from pretrain import evaluations, examination, report
from pretrain.cli import app
from pretrain.evaluate import Evaluation, check_tasks, import_harness, task_scores
from pretrain.evaluations import Corpus, Score, keep, read, table
from pretrain.export import export
from pretrain.generate import Sampling
from pretrain.harness import Model, _task, evaluate_task
from pretrain.models.gpt import GPT
from pretrain.ranks import Ranks
from pretrain.restore import open_run, opened, run_tokenizer
from pretrain.run import TrainRun
from pretrain.tasks import TASKS, Name, Shots, TaskFile, fitting, read_rows
from pretrain.together import Abandoned, Poll
from tests.pretrain.finished_run import WORDS, commit, finished, values, write_config
from tests.runs import Started, zero

REAL = Path(__file__).parents[3] / "shared/data/eval"
NAMES: tuple[Name, ...] = get_args(Name)
ALL: tuple[Shots, ...] = get_args(Shots)


def write_tasks(folder: Path, rows: int = 24) -> dict[Name, TaskFile]:
    """Rows of the vocabulary of the runs here, in the three formats."""

    def words(seed: int, count: int) -> str:
        return " ".join(WORDS[(seed * 7 + i * i) % len(WORDS)] for i in range(count))

    made: dict[Name, list[dict[str, Any]]] = {
        "lambada": [{"context": words(i, 4 + i % 9), "continuation": WORDS[i % 15]} for i in range(rows)],
        "piqa": [
            {"query": f"Question: {words(i, 3)}\n", "choices": [words(i + 1, 2 + i % 3), words(i + 5, 3)],
             "gold": i % 2}
            for i in range(rows)
        ],
        "winogrande": [
            {"context_options": [f"{words(i, 3)} boat", f"{words(i, 3)} river"], "continuation": words(i, 2 + i % 4),
             "gold": i // 2 % 2} for i in range(rows)
        ],
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    for name, each in made.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    return {name: TaskFile(path=folder / f"{name}.jsonl") for name in made}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[Name, TaskFile]:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def counter(tokenizer: Tokenizer) -> Any:
    return lambda text: len(tokenizer.encode_batch([text])[0])


# --- how they are posed ---------------------------------------------------------------------------------------------

ROWS: dict[str, list[dict[str, Any]]] = {
    "lambada": [{"context": "He met", "continuation": "Bob"}, {"context": "She ate", "continuation": "fish"}],
    "piqa": [
        {"query": "Question: dresser\n", "choices": ["use a pin", "finish it"], "gold": 1},
        {"query": "Question: ice box\n", "choices": ["water", "soda"], "gold": 0},
    ],
    "winogrande": [
        {"context_options": ["So Sarah", "So Maria"], "continuation": "slept.", "gold": 1},
        {"context_options": ["The cat", "The dog"], "continuation": "ran.", "gold": 0},
    ],
}
POSED = {
    ("lambada", 0): [("He met", " Bob")],
    ("lambada", 1): [("Fill in blank:\n\nShe ate ____. -> fish\n\nFill in blank:\n\nHe met ____. ->", " Bob")],
    ("piqa", 0): [("Question: dresser\nAnswer:", " use a pin"), ("Question: dresser\nAnswer:", " finish it")],
    ("piqa", 1): [
        (f"Question: ice box\nAnswer: water\n\nQuestion: dresser\nAnswer:{''}", f" {choice}")
        for choice in ("use a pin", "finish it")
    ],
    ("winogrande", 0): [("So Sarah", " slept."), ("So Maria", " slept.")],
    ("winogrande", 1): [("The cat ran.\n\nSo Sarah", " slept."), ("The cat ran.\n\nSo Maria", " slept.")],
}


@pytest.mark.parametrize(("name", "k"), POSED)
def test_a_row_is_posed_as_the_paper_does_and_is_no_example_for_itself(name: str, k: int) -> None:
    posed = _task(TASKS[name], ROWS[name], ROWS[name], True, k, len)
    posed.build_all_requests(limit=1, rank=0, world_size=1)
    assert [request.args for request in posed.instances] == POSED[name, k]


def test_choices_are_judged_by_likelihood_per_token() -> None:
    task = _task(TASKS["piqa"], ROWS["piqa"], ROWS["piqa"], True, 0, lambda text: len(text.split()))
    assert task.process_results(ROWS["piqa"][0], [(-5.0, False), (-4.0, False)]) == {
        "accuracy": 0.0, "accuracy_whole": 1.0, "accuracy_per_character": 1.0,
    }  # fmt: skip
    task = _task(TASKS["winogrande"], ROWS["winogrande"], ROWS["winogrande"], True, 0, len)
    assert task.process_results(ROWS["winogrande"][0], [(-5.0, False), (-4.0, False)]) == {"accuracy": 1.0}
    task = _task(TASKS["lambada"], ROWS["lambada"], ROWS["lambada"], True, 0, len)
    assert task.process_results(ROWS["lambada"][0], [(-5.0, True)]) == {"accuracy": 1.0, "perplexity": -5.0}


@pytest.mark.parametrize(
    ("name", "shots", "context", "k"),
    [("lambada", "0", 64, 0), ("lambada", "1", 64, 1), ("lambada", "few", 2048, 15), ("piqa", "few", 10**5, 50),
     ("winogrande", "few", 10**5, 50), ("winogrande", "few", 64, 3), ("winogrande", "few", 8, 1)],
)  # fmt: skip
def test_few_is_the_paper_s_or_what_fits(name: str, shots: Shots, context: int, k: int) -> None:
    rows = ROWS[name][:1] * 60
    length = 16 if name == "winogrande" else 10
    assert fitting(TASKS[name], rows, shots, context, lambda text: length) == k
    if shots == "few":
        assert fitting(TASKS[name], rows[:3], shots, 10**5, lambda text: length) == 2


@pytest.mark.parametrize(
    ("name", "line"),
    [("lambada", '{"context": "a"}'), ("piqa", '{"query": "a", "choices": ["b"], "gold": 1}'), ("lambada", "no"),
     ("winogrande", '{"context_options": ["a", "b"], "continuation": "", "gold": 0}'), ("piqa", "[1]")],
)  # fmt: skip
def test_a_line_that_is_no_row_is_named(name: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[name][0]) + "\n\n" + line + "\n")
    with pytest.raises(ConfigError) as error:
        read_rows(path, TASKS[name])
    keys = ", ".join(TASKS[name].keys)
    assert str(error.value) == f"{path}:3: not a row of {name}: expected {{{keys}}}"


def test_the_real_files_are_read() -> None:
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is not here")
    counts = {"lambada": 5153, "piqa": 1838, "winogrande": 1267}
    for name, count in counts.items():
        path = REAL / f"{name}{'_openai' if name == 'lambada' else ''}.jsonl"
        assert len(read_rows(path, TASKS[name])[0]) == count


# --- the same scores ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt1", "gpt2"])
def test_scores_are_those_of_the_harness_s_own_backend_on_the_export(
    kind: str, alone: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts that fit the context and prompts that are cut off; likelihoods of every request, and all scores."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval.models.huggingface import HFLM

    run, model = finished(tmp_path / "run", kind)
    export(str(run.run_folder), tmp_path / "out")
    tokenizer = run_tokenizer(run)
    files = write_tasks(tmp_path / "tasks")
    theirs = HFLM(pretrained=str(tmp_path / "out"), device="cpu", batch_size=7, dtype="float32")
    ours = Model(model, tokenizer, run.model.context, alone, rows=5)
    different = set()
    for name in NAMES:
        for shots in ALL:
            found, wanted = (
                evaluate_task(each, name, files[name], shots, run.model.context, counter(tokenizer))
                for each in (ours, theirs)
            )
            assert found.metrics == pytest.approx(wanted.metrics, rel=1e-4) and found.rows == wanted.rows
            assert {k: v for k, v in found.metrics.items() if k != "perplexity"} == {
                k: v for k, v in wanted.metrics.items() if k != "perplexity"
            }
            different.add(tuple(found.metrics.values()))
    assert len(different) > 4
    texts = [("", " the river"), ("no boat came", " to"), ("the " * 80, "day"), ("deep ", "shore")]
    requests = [type("Request", (), {"args": args})() for args in texts]
    for (a, greedy), (b, also) in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert a == pytest.approx(b, abs=1e-3) and greedy == also
    whole = [type("Request", (), {"args": (" ".join(WORDS * 9),)})()]
    assert ours.loglikelihood_rolling(whole) == pytest.approx(theirs.loglikelihood_rolling(whole), rel=1e-4)


class Together(Ranks):
    """One of several ranks that are threads."""

    def __init__(self, rank: int, size: int, shared: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self._shared, self._barrier = rank, size, shared, barrier

    def gather(self, value: Any) -> list[Any]:
        self._shared[self.rank] = value
        self._barrier.wait()
        values = list(self._shared)
        self._barrier.wait()
        return values


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_ranks_gives_the_same_in_equally_many_batches(size: int, tmp_path: Path) -> None:
    run, model = finished(tmp_path / "run")
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 80, (13,), generator=generator).tolist()
    requests = [(torch.randint(300, (n,), generator=generator).tolist(), 1 + n % 2) for n in lengths]
    wanted = Model(model, run_tokenizer(run), run.model.context).score(requests)
    shared, barrier, batches = [None] * size, threading.Barrier(size), [0] * size
    results: list[Any] = [None] * size

    def one(rank: int) -> None:
        def logits(tokens: torch.Tensor) -> torch.Tensor:
            batches[rank] += 1
            return model(tokens)  # type: ignore[no-any-return]

        ranks = Together(rank, size, shared, barrier)
        results[rank] = Model(logits, run_tokenizer(run), run.model.context, ranks, rows=3).score(requests)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(batches)) == 1 and batches[0] == math.ceil(13 / (3 * size))
    for found in results:
        assert found == results[0]
        assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-4)


def test_it_is_left_where_a_rank_is_asked_to_stop(alone: Ranks, files: dict[Name, TaskFile], tmp_path: Path) -> None:
    run, model = finished(tmp_path / "run")
    model.train()
    asked = iter([False, True, False, False])
    with pytest.raises(Abandoned):
        task_scores(model, run_tokenizer(run), 64, files, ("0",), alone, 2, lambda: next(asked))
    assert next(asked) is False and model.training  # a batch later, and as it was
    poll = Poll(alone, lambda: False)
    poll()
    poll()


def test_a_file_that_is_gone_is_one_line_on_every_rank(alone: Ranks, tmp_path: Path) -> None:
    run, model = finished(tmp_path / "run")
    gone: dict[Name, TaskFile] = {"piqa": TaskFile(path=tmp_path / "none.jsonl")}
    with pytest.raises(ConfigError, match=r"^piqa: .*none\.jsonl: cannot be read: No such file or directory$"):
        task_scores(model, run_tokenizer(run), 64, gone, ("0",), alone, 2)


def test_without_the_harness_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "pretrain.harness")
    with pytest.raises(ConfigError) as error:
        import_harness()
    assert str(error.value).startswith("tasks need lm-evaluation-harness (lm_eval")
    assert str(error.value).endswith("is missing): pip install 'longhaul[evaluate]'")


# --- what is kept ---------------------------------------------------------------------------------------------------


def score(task: str, shots: str, accuracy: float) -> Score:
    return Score(task, shots, 3, 101, f"{task}.jsonl", "0" * 64, {"accuracy": accuracy})


def test_findings_of_a_checkpoint_stay_until_they_are_found_again(tmp_path: Path) -> None:
    run, _ = finished(tmp_path / "run")
    committed = opened(run.run_folder / "checkpoints/step-10.b1")
    keep(run, committed, {"alpha": Corpus(1.0, math.e, 7)}, [score("piqa", "few", 0.5), score("piqa", "0", 0.25)])
    found = keep(run, committed, {}, [score("lambada", "1", 0.75), score("piqa", "few", 0.6)])
    path = run.run_folder / evaluations.FOLDER / "step-10.b1.json"
    assert read(path) == found and evaluations.read_all(run.run_folder) == [found]
    assert [(s.task, s.shots, s.metrics["accuracy"]) for s in found.tasks] == [
        ("lambada", "1", 0.75), ("piqa", "0", 0.25), ("piqa", "few", 0.6),
    ]  # fmt: skip
    tree = json.loads(path.read_text())
    assert (tree["step"], tree["tokens"], tree["format"]) == (10, 640, 1)
    assert tree["metrics"] == found.metrics and tree["metrics"]["tasks/piqa/few-shot/accuracy"] == 0.6
    lines = [
        ("", "step 10"), ("tokens", "640"), ("alpha perplexity", "2.72"), ("lambada 1-shot accuracy", "75.0 ± 4.3 %"),
        ("piqa 0-shot accuracy", "25.0 ± 4.3 %"), ("piqa few-shot (3) accuracy", "60.0 ± 4.9 %"),
    ]  # fmt: skip
    assert table([found]) == [f"{name:26}  {value:>12}" for name, value in lines]
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ConfigError, match=r"format 2 is newer than this code's; update longhaul$"):
        read(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"step-10\.b1\.json: damaged: .*; remove it, and evaluate again$"):
        read(path)


def test_the_command_measures_one_checkpoint_or_all(
    alone: Ranks, files: dict[Name, TaskFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ranks, "join", staticmethod(lambda: alone))
    run, model = finished(tmp_path / "run")
    commit(run, values(run, seed=8), 20)
    asked = [f"--task={name}={file.path}" for name, file in files.items()]

    def say(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["evaluate", *arguments], catch_exceptions=False)
        assert done.exit_code == 0
        return done.stdout

    text = say(f"{run.run_folder}@10", *asked, "--shots", "0,few", "--rows", "6")
    assert "alpha perplexity" in text and "winogrande few-shot (" in text
    (found,) = evaluations.read_all(run.run_folder)
    assert len(found.tasks) == 6 and {each.rows for each in found.tasks} == {6}
    corpus = found.corpora["alpha"]
    assert corpus.loss == pytest.approx(mean_loss(run, model), rel=1e-5) and corpus.tokens > 300
    assert corpus.perplexity == pytest.approx(math.exp(corpus.loss))

    trees = json.loads(say(str(run.run_folder), "--all", "--task", asked[0][7:], "--shots", "0", "--json"))
    assert [tree["step"] for tree in trees] == [10, 20] and len(trees[0]["tasks"]) == 6
    assert trees[0]["corpora"]["alpha"]["loss"] == corpus.loss != trees[1]["corpora"]["alpha"]["loss"]
    assert [len(each.tasks) for each in evaluations.read_all(run.run_folder)] == [6, 1]


def mean_loss(run: TrainRun, model: GPT) -> float:
    """By hand, from the rows of the validation shards."""
    from data_pipeline.stream import Corpora, Validation

    total, count = 0.0, 0
    for rows in Validation(Corpora(run.data).manifests["alpha"], 1, 32, 2000).batches(1, 0, 1):
        tokens, valid = torch.from_numpy(rows[0]), int(rows[1][0])
        with torch.no_grad():
            losses = -model(tokens[:, :-1])[0].log_softmax(-1).gather(-1, tokens[0, 1:, None])
        total, count = total + float(losses[:valid].sum()), count + valid
    return total / count


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--task", "arc"], "--task arc: expected one of lambada, piqa, winogrande, with =FILE behind it"),
     (["--task", "piqa"], "--task piqa: no evaluation.tasks.piqa.path in the run; give piqa=FILE"),
     (["--shots", "5"], "--shots: expected some of 0,1,few, got '5'")],
)  # fmt: skip
def test_what_cannot_be_asked_is_one_line(
    arguments: list[str], said: str, alone: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ranks, "join", staticmethod(lambda: alone))
    run, _ = finished(tmp_path / "run")
    assert str(CliRunner().invoke(app, ["evaluate", str(run.run_folder), *arguments]).exception) == said


# --- in training ----------------------------------------------------------------------------------------------------


def test_what_cannot_be_evaluated_in_training_is_said_before_it() -> None:
    check_tasks(build(Evaluation, {"tasks": {"piqa": {"path": "none.jsonl"}}}, "test"))  # not in training
    with pytest.raises(ConfigError, match=r"^evaluation\.tasks_every_steps: no evaluation\.tasks are given$"):
        check_tasks(build(Evaluation, {"tasks_every_steps": 5}, "test"))
    wanted = {"tasks": {"piqa": {"path": "none.jsonl"}}, "tasks_every_steps": 5}
    with pytest.raises(ConfigError, match=r"^piqa: none\.jsonl: cannot be read: No such file or directory$"):
        check_tasks(build(Evaluation, wanted, "test"))
    assert build(Evaluation, {"shots": [0, "few"]}, "test").shots == ("0", "few")
    with pytest.raises(ConfigError, match=r"shots"):
        build(Evaluation, {"shots": [5]}, "test")


def test_two_ranks_of_zero_3_share_the_tasks_in_training(
    alone: Ranks, files: dict[Name, TaskFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores in the journal at an interval and at the end: those that `pretrain evaluate` finds of the checkpoint."""
    run = write_config(tmp_path / "run", "gpt2", f"engine={zero(3)}", "train_tokens=320")
    config = tmp_path / "run/config.yaml"
    tasks = {name: {"path": str(file.path), "rows": 5} for name, file in files.items()}
    samples = {"prompts": ["the river", ""], "max_tokens": 9, "temperature": 0}
    evaluation = {"every_steps": 4, "tokens": 500, "tasks": tasks, "shots": ["0", "1"], "tasks_every_steps": 3,
                  "samples": samples}  # fmt: skip
    run = run.model_copy(update={"evaluation": build(Evaluation, evaluation, "test")})
    config.write_text(configs.dump(run))
    started = Started(config, 2, "log_every_steps=1")
    assert started.wait() == [0, 0], started.text
    records = [json.loads(line) for line in (run.run_folder / "journal/1.jsonl").read_text().splitlines()]
    found = {
        r["step"]: r["metrics"] for r in records
        if r["type"] == "evaluation" and any(key.startswith("tasks/") for key in r["metrics"])
    }  # fmt: skip
    assert sorted(found) == [3, 5]
    monkeypatch.setattr(Ranks, "join", staticmethod(lambda: alone))
    (evaluated,) = examination.examine(f"{run.run_folder}@5", lambda run: examination.questions(run, None, None))
    wanted = {key: value for key, value in evaluated.metrics.items() if key.startswith("tasks/")}
    assert len(wanted) > 10 and found[5] == pytest.approx(wanted, rel=1e-3)
    assert "accuracy  lambada 0-shot" in started.text
    texts = {r["step"]: r["texts"] for r in records if r["type"] == "samples"}
    assert sorted(texts) == [0, 4, 5] and texts[0] != texts[5]
    written = open_run(f"{run.run_folder}@5").write_texts(["the river", ""], Sampling(max_tokens=9, temperature=0))
    assert [row["text"] for row in texts[5]] == [text.text for text in written]
    assert [row["prompt"] for row in texts[5]] == ["the river", ""]
    page = report.make([run], tmp_path / "out").read_text()
    assert page.count("<blockquote") == 6 and "Text over time" in page
