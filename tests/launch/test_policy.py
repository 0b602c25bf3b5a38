"""The policy as a function: what is on record of a submission's attempts -> what follows."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import launch
from launch.attempts import Attempt, expand, newest_step, read_attempts
from launch.ends import close_lost, record
from launch.policy import Decision, End, Rules, decide, excluded, verdict

RULES = Rules("requeue", restarts=5, crash_loop=3, nodes=2)


class Run:
    """A run folder with attempts of one submission on nodes n1 and n2, two ranks each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, **facts: Any) -> Attempt:
        number = len(list(self.folder.glob("logs/attempt-*"))) + 1
        folder = self.folder / "logs" / f"attempt-{number}"
        folder.mkdir(parents=True)
        begun = {"submission": 1, "job": "7", "nodes": ["n1", "n2"], "ranks": 4, "began": 1e9 - number, **facts}
        (folder / "attempt.json").write_text(json.dumps(begun))
        return Attempt(folder, number)

    def attempts(self) -> list[Attempt]:
        return read_attempts(self.folder / "logs")

    def end(self, end: End, rules: Rules = RULES, suspects: tuple[dict[str, Any], ...] = ()) -> Decision:
        """One more attempt, ended so."""
        attempt = self.begin()
        lines = [json.dumps(suspect) for suspect in suspects]
        (attempt.folder / "suspects.jsonl").write_text("\n".join(lines))
        decision = decide(end, self.attempts(), rules)
        assert record(attempt, end, decision)
        return decision


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.mark.parametrize(
    ("end", "action", "code", "by", "why"),
    [
        (End(0), "done", 0, "", "done"),
        (End(3), "restart", 3, "requeue", "to be requeued (restart 1 of 5)"),
        (End(3, stop=True), "stop", 3, "", "stopped on request, not to be started again"),
        (End(3, "cancelled"), "stop", 3, "", "cancelled, not to be started again"),
        (End(3, "preempted"), "restart", 3, "requeue", "to be requeued (preempted)"),
        (End(3, "requeued"), "restart", 3, "slurm", "requeued by SLURM (requeued)"),
        (End(1, "time limit"), "restart", 1, "requeue", "to be requeued (restart 1 of 5)"),
        (End(1), "restart", 1, "requeue", "to be requeued (restart 1 of 5)"),
        (
            End(1, words="rank 1 on n2: no", good_nodes=("n1", "n2")),
            "restart", 1, "here", "starting again at once on n1, n2 (restart 1 of 5) (rank 1 on n2: no)",
        ),
        (End(1, good_nodes=("n1", "n2"), time_left=False), "restart", 1, "requeue", "to be requeued (restart 1 of 5)"),
        (End(1, good_nodes=("n1",)), "restart", 1, "requeue", "to be requeued (restart 1 of 5)"),
        (End(4, good_nodes=("n1", "n2")), "restart", 4, "here", "starting again at once on n1, n2 (restart 1 of 5)"),
        (
            End(1, "node failure", failed_nodes=("n2",), good_nodes=("n1", "n3")),
            "restart", 1, "here", "starting again at once on n1, n3 (node failure of n2)",
        ),
        (
            End(1, "node failure", failed_nodes=("n2",), requeued=True, good_nodes=("n1", "n3")),
            "restart", 1, "slurm", "requeued by SLURM (node failure of n2)",
        ),
        (End(2), "stop", 2, "", "not to be started again: a mistake in the configuration"),
        (End(5), "stop", 5, "", "not to be started again: out of memory, as the next start would be"),
        (End(6), "stop", 6, "", "not to be started again: another attempt goes on"),
        (End(7), "stop", 7, "", "not to be started again: the guard gave up"),
        (End(130), "stop", 130, "", "not to be started again: interrupted"),
        (End(6, "requeued"), "stop", 6, "", "not to be started again: another attempt goes on"),
    ],
)  # fmt: skip
def test_what_follows_an_end(run: Run, end: End, action: str, code: int, by: str, why: str) -> None:
    decision = run.end(end)
    assert (decision.action, decision.exit_code, decision.by, decision.why) == (action, code, by, why)


def test_modes(run: Run) -> None:
    assert run.end(End(3), Rules("none", 5, 3)).why == "not to be started again: restart is none"
    assert run.end(End(3, successor="8"), Rules("chain", 5, 3)).why == "goes on as job 8 (restart 1 of 5)"
    assert run.end(End(3), Rules("chain", 5, 3)).by == "submit"
    assert run.end(End(1), Rules("here", 5, 3)).by == "here"


def test_budget_counts_what_was_nobodys_fault_for_nothing(run: Run) -> None:
    rules = Rules("requeue", restarts=2, crash_loop=3)
    for cause in ("preempted", "node failure", "requeued"):
        assert run.end(End(3, cause), rules).action == "restart"
    assert run.end(End(1, step=2), rules).why == "to be requeued (restart 1 of 2)"
    assert run.end(End(4, step=3), rules).why == "to be requeued (restart 2 of 2)"
    assert run.end(End(3, "preempted", step=4), rules).action == "restart"
    last = run.end(End(1, step=5), rules)
    assert (last.action, last.exit_code, last.why) == ("stop", 1, "not started again after 2 restarts")


def test_stops_that_have_gone_on_cost_no_restart(run: Run) -> None:
    rules = Rules("requeue", restarts=2, crash_loop=3)
    for step in range(1000, 30000, 1000):
        assert run.end(End(3, step=step), rules).why == f"to be requeued (saved step {step})"
    assert run.end(End(1, "time limit", step=30000), rules).why == "to be requeued (saved step 30000)"
    assert run.end(End(1, step=31000), rules).why == "to be requeued (restart 1 of 2)"
    assert run.end(End(3, step=31000), rules).why == "to be requeued (restart 2 of 2)"
    assert run.end(End(3, step=32000), rules).why == "to be requeued (saved step 32000)"
    last = run.end(End(3, step=32000), rules)
    assert (last.action, last.exit_code, last.why) == ("stop", 3, "not started again after 2 restarts")


def test_no_restarts_are_none_whatever_was_saved(run: Run) -> None:
    assert run.end(End(3, step=1000), Rules("here", 0, 3)).why == "not started again after 0 restarts"


def test_crash_loop(run: Run) -> None:
    assert run.end(End(1, step=40)).action == "restart"
    assert run.end(End(3, "preempted", step=40)).action == "restart"
    assert run.end(End(4, step=40)).action == "restart"
    assert run.end(End(3, step=40)).action == "restart"
    end = run.end(End(1, words="rank 0 on n1: ValueError: 7", step=40))
    assert (end.action, end.exit_code) == ("stop", 8)
    assert end.why == "crash loop: 3 bad ends in a row, no checkpoint since step 40 (rank 0 on n1: ValueError: 7)"
    assert run.attempts()[-1].ended["exit_code"] == 8


def test_progress_is_no_crash_loop(run: Run) -> None:
    rules = Rules("requeue", restarts=99, crash_loop=3)
    for step in range(9):
        assert run.end(End(1, step=step // 2), rules).action == "restart"


def test_before_the_first_checkpoint(run: Run) -> None:
    assert [run.end(End(1)).action for _ in range(3)] == ["restart", "restart", "stop"]
    assert run.attempts()[-1].ended["why"] == "crash loop: 3 bad ends in a row, not one checkpoint"


def test_a_node_that_failed_twice_is_left_out(run: Run) -> None:
    assert run.end(End(4), suspects=({"host": "n2.lab.example", "rank": 2, "cause": "hang: ..."},)).exclude == ()
    assert run.end(End(1, "node failure", failed_nodes=("n1",))).exclude == ()
    twice = ({"host": "", "rank": 3, "cause": "absent at the rendezvous"},) * 2  # one attempt counts once
    decision = run.end(End(4, good_nodes=("n1", "n2", "n3")), suspects=twice)
    assert decision.exclude == ("n2",)
    assert decision.why.startswith("starting again at once on n1, n3 (restart 2 of 5), without n2")


def test_a_node_named_by_the_preflight_is_left_out_at_once(run: Run) -> None:
    suspect = {"host": "n1", "rank": 0, "cause": "preflight: matmul at 31 % of the median"}
    decision = run.end(End(1), suspects=(suspect, {"host": "elsewhere", "rank": 77, "cause": "preflight: ?"}))
    assert (decision.exclude, decision.by) == (("n1",), "requeue")
    (run.attempts()[0].folder / "suspects.jsonl").write_text('{"torn')
    assert excluded(run.attempts()) == ()


@pytest.mark.parametrize(
    ("facts", "dead", "cause", "line"),
    [
        ({}, ["n2", "n9"], "node failure", "attempt 1 was lost: lost with n2"),
        ({}, [], "requeued", "attempt 1 was lost: put back into the queue by SLURM"),
        ({"job": "6"}, [], "lost", "attempt 1 was lost: its launcher ended without a word"),
    ],
)
def test_lost_attempts(run: Run, facts: dict[str, Any], dead: list[str], cause: str, line: str) -> None:
    attempt = run.begin(**facts)
    assert close_lost(run.folder, RULES, "7", dead) == [line]
    assert attempt.ended["cause"] == cause
    assert attempt.ended["exit_code"] is None
    assert close_lost(run.folder, RULES, "7", dead) == []


def test_lost_again_and_again_is_a_crash_loop(run: Run) -> None:
    for job in "123":
        run.begin(job=job)
        close_lost(run.folder, RULES, "9")
    ends = [attempt.ended for attempt in run.attempts()]
    assert [(end["action"], end["exit_code"]) for end in ends] == [("restart", None), ("restart", None), ("stop", 8)]


def test_an_end_is_written_once(run: Run) -> None:
    attempt = run.begin()
    close_lost(run.folder, RULES, "8")
    assert not record(attempt, End(0), Decision("done", 0, "done"))
    assert attempt.ended["cause"] == "lost"


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([0, 0], 0), ([3, 1], 1), ([1, 5], 5), ([3, 4], 4), ([1, 6], 6), ([], 1), ([77], 77), ([0, 3], 3),
        ([2, 2], 2), ([2, 1], 1), ([2, 0], 1), ([2, 3], 1), ([2, 4], 4), ([2, 5], 5), ([2], 1),
    ],
)  # fmt: skip
def test_the_code_that_tells_most(codes: list[int], code: int) -> None:
    assert verdict(codes, ranks=2) == code


def test_names_of_nodes() -> None:
    assert expand("n[1-2,04],m1,gpu[08-10]x") == ["n1", "n2", "n04", "m1", "gpu08x", "gpu09x", "gpu10x"]


def test_words_hold_no_secret(run: Run) -> None:
    attempt = run.begin()
    (attempt.folder / "srun.log").write_text(
        "srun: error: n2: task 2: Exited with exit code 1\nsrun: error: n1: tasks 0-1: Exited with exit code 3\n"
    )
    (attempt.folder / "rank-2.log").write_text("Traceback\nOSError: cannot reach https://me:planted@lab.example/x\n\n")
    assert attempt.last_words() == "rank 2 on n2: OSError: cannot reach https://***@lab.example/x"
    assert attempt.exit_codes() == [1, 3, 3]


def test_newest_step_of_the_live_lineage(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == -1
    (tmp_path / "lineage").mkdir()
    for branch, parent, step in ((1, None, 0), (2, 1, 20), (3, 1, 10)):
        (tmp_path / "lineage" / f"{branch}.json").write_text(json.dumps({"parent": parent, "step": step}))
    for name in ("step-0.b1", "step-10.b1", "step-20.b1", "step-50.b2", ".step-60.b3.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(tmp_path) == 10
    (tmp_path / "checkpoints" / "step-15.b3").mkdir()
    assert newest_step(tmp_path) == 15


def test_the_batch_shell_does_not_wait_for_torch() -> None:
    program = (
        "import sys, launch.batch; print(sorted({'torch', 'numpy', 'submitit', 'typer', 'psutil'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("code", "restarts", "python", "follows"),
    [
        (3, 50, "bash", "exit 3: requeue"),
        (1, 50, "bash", "exit 1: not to be started again"),
        (1, 4, "bash", "exit 1: requeue"),
        (2, 4, "bash", "exit 2: not to be started again"),
        (2, 4, "/no/python", "exit 1: requeue"),
    ],
)
def test_without_python_the_exit_code_decides(code: int, restarts: int, python: str, follows: str) -> None:
    source = (Path(launch.__path__[0]) / "batch.sh").read_text()
    function = source[source.index("end_without_python() {") :].partition("\n}\n")[0] + "\n}\n"
    facts = f"restarted='1 3 4' restart=requeue max_restarts=20 {restarts=} {code=} python=({python}) attempt=1\n"
    end = "say() { echo $*; }\nfield() { :; }\nend_without_python\n"
    done = subprocess.run(["bash", "-c", function + facts + end], capture_output=True, text=True, check=True)
    assert done.stdout == f"attempt 1 ended with {follows}, by its exit code alone\n"
