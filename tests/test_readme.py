"""README and docs/: every command in them but `make test` is run here, in their order, in a copy of the tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

import docs.settings
from tests.processes import free_port

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}
IN_ORDER = [
    "README",
    "data",
    "training",
    "running",
    "results",
]  # later pages use what the commands of earlier ones left
BLOCKS = [
    block
    for path in sorted(PAGES, key=lambda path: IN_ORDER.index(path.stem) if path.stem in IN_ORDER else len(IN_ORDER))
    for block in re.findall(r"^```sh\n(.*?)^```", PAGES[path], re.MULTILINE | re.DOTALL)
]
SHORT = {"train_tokens": "64Ki", "log_every_steps": 1}  # 32 steps
SHORT_SECTIONS = {
    "schedule": {"warmup_tokens": "8Ki"},
    "evaluation": {"every_steps": 16, "tokens": "2Ki"},
    "checkpoint": {"save_every_steps": 5},
}


def tracked() -> list[str]:
    """Every file of the project, new ones too."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in names if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as a user has it after `make` has done its set-up, with a shorter demo."""
    folder = tmp_path_factory.mktemp("readme")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    environment = folder / ".venv"
    environment.mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (environment / name).symlink_to(Path(sys.prefix) / name)
    (environment / "ready").touch()
    config = folder / "configs" / "demo.yaml"
    run = yaml.safe_load(config.read_text())
    sections = {name: run[name] | shorter for name, shorter in SHORT_SECTIONS.items()}
    config.write_text(yaml.safe_dump(run | SHORT | sections))
    return folder


def command(block: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    quiet = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}
    environment = quiet | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return ["bash", "-euo", "pipefail", "-c", block], environment


def run(block: str, folder: Path) -> str:
    shell, environment = command(block, folder)
    done = subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{block}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def show_page(block: str, folder: Path) -> None:
    """Start a server, which does not end by itself, and get its page; at a free port, with fewer processes."""
    shell, environment = command(f"exec {block}", folder)
    environment |= {
        "MLFLOW_PORT": str(free_port()),
        "MLFLOW_WORKERS": "1",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    server = subprocess.Popen(shell, cwd=folder, env=environment, start_new_session=True)
    try:
        while not _answers(f"http://127.0.0.1:{environment['MLFLOW_PORT']}"):
            assert server.poll() is None, f"{block}: exit {server.returncode}"
            time.sleep(0.5)
    finally:
        os.killpg(server.pid, 9)
        server.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return b"MLflow" in answer.read()
    except OSError:
        return False


@pytest.mark.timeout(1200)
def test_every_command(copy: Path) -> None:
    stale = copy / "demo" / "stale"
    stale.parent.mkdir()
    stale.touch()
    assert BLOCKS[0] == "make demo\n"
    outputs = {}
    for block in BLOCKS:
        if "mlflow ui" in block:
            show_page(block, copy)
        elif block != "make test\n":
            outputs[block] = run(block, copy)
    demo = outputs["make demo\n"]
    assert not stale.exists()
    check_demo(demo)
    assert "#SBATCH --nodes=4" in next(text for block, text in outputs.items() if "--dry-run" in block)


def check_demo(output: str) -> None:
    """It says what the README says, it was killed and went on, and it learned something."""
    shown = README.partition("make demo")[2].partition("make test")[0]
    titles = re.findall(r"^== .*", shown, re.MULTILINE)
    assert len(titles) == 5
    assert re.findall(r"^== .*", output, re.MULTILINE) == titles
    found = re.search(r"killed after step (\d+); went on from step (\d+)", output)
    assert found is not None
    killed, resumed = int(found[1]), int(found[2])
    assert 16 <= killed < 32
    assert resumed <= killed
    assert resumed % 5 == 0
    for row in ("common_crawl", "wikipedia", "bookcorpus", "train loss"):
        losses = re.search(rf"^{row} .* (\S+) -> (\S+)$", output, re.MULTILINE)
        assert losses is not None, output
        assert float(losses[2]) < float(losses[1]) - 0.5


def test_the_tree_names_every_file() -> None:
    tree = PAGES[ROOT / "docs/tree.md"].partition("\n```\n")[2].partition("\n```\n")[0]
    folders: list[str] = []
    named = set()
    for line in tree.splitlines():
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name]
        if not name.endswith("/"):
            named.add("".join(folders))
    shown = {"configs", "data_pipeline", "pretrain", "launch"}
    files = {
        name for name in tracked() if name.split("/")[0] in shown and name.endswith((".py", ".sh")) and _says_more(name)
    }
    assert files - named == set()
    assert {name for name in named if not (ROOT / name).is_file()} == set()


def _says_more(name: str) -> bool:
    return bool((ROOT / name).read_text(encoding="utf-8").strip())


def test_links_lead_somewhere() -> None:
    links = [(path, link) for path, text in PAGES.items() for link in re.findall(r"\]\(([^)#]+)\)", text)]
    assert [link for path, link in links if not (path.parent / link).exists()] == []


def test_the_page_of_settings_is_that_of_the_code() -> None:
    """`python -m docs.settings > docs/settings.md` makes it anew."""
    assert PAGES[ROOT / "docs/settings.md"] == docs.settings.page()
