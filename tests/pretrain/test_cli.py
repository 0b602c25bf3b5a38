"""Which rank says why it ends."""

import subprocess
import sys

import pytest

from configs import ConfigError
from data_pipeline.shards import ShardError
from pretrain.checkpoint import SaveError
from pretrain.cli import app, explain
from pretrain.preflight import PreflightError
from pretrain.ranks import Ranks


@pytest.mark.parametrize(("kind", "code"), [(ShardError, 1), (SaveError, 1), (ConfigError, 2)])
@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_a_rank_that_fails_alone_says_why(
    kind: type[Exception], code: int, variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "3")
    assert explain(kind("shard-7: damaged")) == code
    assert capsys.readouterr().err == "pretrain: shard-7: damaged\n"


@pytest.mark.parametrize(("rank", "said"), [("0", "pretrain: n1 is slow\n"), ("3", "")])
def test_what_every_rank_found_is_said_once(
    rank: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert explain(PreflightError("n1 is slow")) == 1
    assert capsys.readouterr().err == said


class Told(Ranks):
    """A rank that hears from rank 0 what it raised."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def tell(self, value: object) -> object:
        return value if self.rank == 0 else (None, ConfigError("no run"))


@pytest.mark.parametrize(("rank", "said"), [(0, "pretrain: no run\n"), (3, "")])
def test_what_rank_0_has_raised_on_every_rank_it_alone_says(
    rank: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise ConfigError("no run")

    with pytest.raises(ConfigError) as caught:
        Told(rank).first(refuse)
    assert explain(caught.value) == 2
    assert capsys.readouterr().err == said


def test_a_command_that_does_not_exist_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match="nosuch") as caught:
        app(["nosuch"], standalone_mode=False)
    assert explain(caught.value) == 2
    assert "No such command 'nosuch'" in capsys.readouterr().err


def test_a_rank_imports_no_source_of_text() -> None:
    program = "import sys, pretrain.train; print([m for m in ('data_pipeline.sources',) if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
