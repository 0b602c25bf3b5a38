"""The door to lm-evaluation-harness: our models as one of its, and GPT-3's tasks in its terms.

Each rank sees every request and answers its share; the answers are gathered. The harness itself would give each rank
rows of its own, and draw other examples for them with another number of ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any

import torch
from lm_eval.api import task as its_task
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from pretrain.evaluations import Score
from pretrain.ranks import Ranks
from pretrain.tasks import TASKS, Posed, Row, Shots, Task, TaskFile, fitting, read_rows

VERSION = metadata.version("lm-eval")
SEED = 1234  # of the drawing of examples

Logits = Callable[[Tensor], Tensor]  # tokens int64[B, T] -> logits [B, T, V]
Request = tuple[list[int], int]  # tokens, and how many of the last of them are to be scored
Answer = tuple[float, bool]  # log-likelihood (nats), and whether each was the likeliest


class Model(TemplateLM):  # type: ignore[misc]
    """A model of ours as the harness takes one, shared by the ranks. Its contexts lose what is too long on the left."""

    def __init__(
        self,
        logits: Logits,
        tokenizer: Tokenizer,
        context: int,
        ranks: Ranks | None = None,
        rows: int = 16,
        device: torch.device | None = None,
        before_batch: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """`rows` are computed at once; `before_batch(answered, all)` may raise, on all ranks alike, to leave it."""
        super().__init__()
        self._logits, self._tokenizer, self._context, self._rows = logits, tokenizer, context, rows
        self._ranks, self._before_batch = ranks, before_batch
        self._device = device or torch.device("cpu")

    @property
    def eot_token_id(self) -> int:
        """What a text without a context begins with."""
        return self._tokenizer.end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, without marks."""
        return [int(id) for id in self._tokenizer.encode_batch([string])[0]]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Answer]:
        """The harness's own encoding of pairs, without its bar."""
        answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **_: Any) -> list[Answer]:
        return self.score([(context + ending, len(ending)) for _, context, ending in requests])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Of whole texts, in windows of the context."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows: list[Request] = []
        counts = []
        for (text,) in (request.args for request in requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.eot_token_id, max_seq_len=self._context,
                context_len=1,
            )  # fmt: skip
            own = [(context + ending, len(ending)) for context, ending in map(make_disjoint_window, rolling)]
            windows += own
            counts.append(len(own))
        answers = iter(self.score(windows))
        return [sum(next(answers)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """No task of ours generates; `pretrain generate` does."""
        raise NotImplementedError("tasks in which the model generates text are not evaluated")

    @torch.no_grad()
    def score(self, requests: Sequence[Request]) -> list[Answer]:
        """The answer to each request, on every rank. Every rank computes equally many batches."""
        rank, ranks = (0, 1) if self._ranks is None else (self._ranks.rank, self._ranks.size)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][0]))  # long ones first: of equal lengths
        mine: list[tuple[int, float, bool]] = []
        for begin in range(0, len(order), self._rows * ranks):
            self._before_batch(begin, len(order))
            numbers = order[begin + rank : begin + self._rows * ranks : ranks]
            batch = [requests[i] for i in numbers] or [([self.eot_token_id] * 2, 1)]  # a filler, for the collectives
            answers = list(self._batch(batch))
            mine += [(i, *answer) for i, answer in zip(numbers, answers, strict=False)]
        self._before_batch(len(order), len(order))
        shares = [mine] if self._ranks is None else self._ranks.gather(mine)
        found = {i: (value, greedy) for share in shares for i, value, greedy in share}
        return [found[i] for i in range(len(requests))]

    def _batch(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Filled up on the right, where nothing before it sees it."""
        kept = [tokens[-(self._context + 1) :] for tokens, _ in requests]
        length = max(map(len, kept)) - 1
        inputs = torch.zeros(len(kept), length, dtype=torch.int64)
        for row, tokens in enumerate(kept):
            inputs[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        logits = self._logits(inputs.to(self._device))
        for row, (tokens, (_, count)) in enumerate(zip(kept, requests, strict=True)):
            count = min(count, len(tokens) - 1)  # of an ending longer than the context, its last tokens
            targets = torch.tensor(tokens[-count:], device=self._device)
            scores = logits[row, len(tokens) - 1 - count : len(tokens) - 1].float().log_softmax(-1)
            value = float(scores.gather(-1, targets[:, None]).sum())
            yield value, bool((scores.argmax(-1) == targets).all())


def evaluate_task(
    model: Any, name: str, file: TaskFile, shots: Shots, context: int, count: Callable[[str], int]
) -> Score:
    """The score of a task. `model` is any of the harness's; ours gives every rank the same. Raises ConfigError.

    `count` is the number of tokens of a text. Metrics: accuracy; lambada's perplexity; for choices their accuracy by
    the whole likelihood and by that per character, which is the harness's `acc_norm`.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    its_task.tqdm = _no_bar  # there is no other way to have its bars off, and ours shows how far it is
    task = TASKS[name]
    rows, sha256 = read_rows(file.path, task)
    examples = rows if file.examples is None else read_rows(file.examples, task)[0]
    k = fitting(task, examples, shots, context, count)
    own = _task(task, rows, examples, file.examples is None, k, count)
    limit = min(file.rows or len(rows), len(rows))
    found = evaluate(lm=model, task_dict={"tasks": {name: own}}, limit=limit, bootstrap_iters=0, log_samples=False)
    assert found is not None, "none of several ranks of the harness's own"
    results = found["results"][name]
    metrics = {key.split(",")[0]: float(v) for key, v in results.items() if key.split(",")[0] in METRICS}
    return Score(name, shots, k, limit, str(file.path), sha256, metrics)


def _no_bar(items: Any, **_: Any) -> Any:
    return items


METRICS = ("accuracy", "perplexity", "accuracy_whole", "accuracy_per_character")


def _task(
    task: Task, rows: list[Row], examples: list[Row], same: bool, k: int, count: Callable[[str], int]
) -> ConfigurableTask:
    """The task in the harness's terms. Where the examples are of the same file, it leaves out the row in question."""
    import datasets

    def posed(row: Row) -> Posed:
        return task.pose(row, k > 0)

    def measured(row: Row, answers: Sequence[Answer]) -> dict[str, Any]:
        return _measured(posed(row), answers, count)

    poses_contexts = task.name == "winogrande"
    single = task.name == "lambada"
    form: dict[str, Any] = {
        "output_type": "loglikelihood" if single else "multiple_choice",
        "doc_to_text": (lambda row: posed(row).gold) if poses_contexts else (lambda row: posed(row).contexts[0]),
        "doc_to_target": (
            (lambda row: " " + posed(row).endings[0]) if single
            else (lambda row: posed(row).endings[0]) if poses_contexts
            else (lambda row: posed(row).gold)
        ),
    }  # fmt: skip
    if not single:
        form["doc_to_choice"] = lambda row: list(posed(row).contexts if poses_contexts else posed(row).endings)
    names = ("accuracy", "perplexity") if single else METRICS if not poses_contexts else ("accuracy",)
    own = ConfigurableTask(
        config={
            "task": task.name,
            "custom_dataset": lambda **_: {
                "test": datasets.Dataset.from_list(rows), "examples": datasets.Dataset.from_list(examples)
            },
            "test_split": "test",
            "fewshot_split": "test" if same else "examples",
            "num_fewshot": k,
            "target_delimiter": "" if single else " ",
            "fewshot_delimiter": "\n\n",
            "process_results": measured,
            "metric_list": [
                {"metric": name, "aggregation": "perplexity" if name == "perplexity" else "mean",
                 "higher_is_better": name != "perplexity"}
                for name in names if not (name == "perplexity" and not single)
            ],
            **form,
        }
    )  # fmt: skip
    own.set_fewshot_seed(seed=SEED)
    return own


def _measured(posed: Posed, answers: Sequence[Answer], count: Callable[[str], int]) -> dict[str, Any]:
    """What the answers to a row come to; numbers of which the mean is taken, but for the log-likelihood."""
    if len(posed.endings) == 1:
        value, greedy = answers[0]
        return {"accuracy": float(greedy), "perplexity": value}
    values = [value for value, _ in answers]
    if len(set(posed.endings)) == 1:  # the same ending after other contexts: nothing to normalize
        return {"accuracy": float(_best(values) == posed.gold)}
    per_token = [v / max(count(" " + ending), 1) for v, ending in zip(values, posed.endings, strict=True)]
    per_character = [v / len(ending) for v, ending in zip(values, posed.endings, strict=True)]
    return {
        "accuracy": float(_best(per_token) == posed.gold),
        "accuracy_whole": float(_best(values) == posed.gold),
        "accuracy_per_character": float(_best(per_character) == posed.gold),
    }


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
