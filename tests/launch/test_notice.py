"""Notices, with real commands and a real server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

import configs
from launch import notice
from launch.attempts import Attempt
from launch.job import Job
from launch.local import Local
from launch.notice import Notice, tell
from launch.policy import Decision
from tests.launch.run_folder import RunFolder

SECRET = "planted-secret"


class Server(HTTPServer):
    """Keeps what was posted; answers 500 below /broken, and never below /silent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[Any] = []
        self.released = threading.Event()

    def address(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}?key={SECRET}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        if self.path.startswith("/silent"):
            self.server.released.wait(30)
            return
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.bodies.append((self.headers["Content-Type"], json.loads(body)))
        self.send_response(500 if self.path.startswith("/broken") else 204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_webhook(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK", server.address("ok"))
    told = Notice(webhook_variable="HOOK").send("stall", "small hangs", {"run": Path("/runs/small"), "step": 7})
    assert told == []
    body = {"event": "stall", "text": "small hangs", "run": "/runs/small", "step": 7}
    assert server.bodies == [("application/json", body)]


def test_command_gets_text_and_json(tmp_path: Path) -> None:
    told = Notice(command=["sh", "-c", f'cat > "{tmp_path}/in"; echo "$1" > "{tmp_path}/text"', "sh"])
    assert told.send("end", "small is done; $(id)", {"exit_code": 0}) == []
    assert (tmp_path / "text").read_text() == "small is done; $(id)\n"
    assert json.loads((tmp_path / "in").read_text()) == {"event": "end", "text": "small is done; $(id)", "exit_code": 0}


def test_only_what_was_asked_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK", server.address("ok"))
    assert Notice(webhook_variable="HOOK", on=["crash_loop"]).send("end", "done", {}) == []
    assert server.bodies == []


def test_problems_are_one_line_without_the_address(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(notice, "TIMEOUT_S", 0.3)
    cases = {
        server.address("broken"): "HOOK: the server answered 500",
        server.address("silent"): "HOOK: no answer within 0.3 s",
        f"http://127.0.0.1:1/{SECRET}": "HOOK: Connection refused",
        f"http://127.0.0.1:no/{SECRET}": "HOOK: InvalidURL",
        f"file:///{SECRET}": "HOOK: expected an address that begins with http:// or https://, got another text",
        "": "HOOK: expected an address that begins with http:// or https://, got nothing",
    }
    for address, problem in cases.items():
        monkeypatch.setenv("HOOK", address)
        lines = Notice(webhook_variable="HOOK").send("end", "done", {})
        assert lines == [f"notice of end not given: {problem}"]
    commands = {
        ("false",): "false: exit 1",
        ("sleep", "1000", ";"): "sleep: exit 1",
        (str(tmp_path / "none"),): f"{tmp_path}/none: [Errno 2] No such file or directory: '{tmp_path}/none'",
        ("sh", "-c", "sleep 1000"): "sh: did not end within 0.3 s",
    }
    for command, problem in commands.items():
        assert Notice(command=list(command)).send("end", "done", {}) == [f"notice of end not given: {problem}"]


@pytest.mark.parametrize(
    ("action", "exit_code", "decided", "on", "event"),
    [
        ("done", 0, 0, ["end"], "end"),
        ("stop", 5, 5, ["stall", "end"], "end"),
        ("stop", 1, 8, ["crash_loop", "end"], "crash_loop"),
        ("stop", 1, 8, ["end"], "end"),
        ("restart", 4, 4, ["stall"], "stall"),
        ("restart", 4, 4, ["end"], None),
        ("restart", 1, 1, ["stall", "crash_loop", "end"], None),
    ],
)
def test_what_is_told_of_an_end(
    tmp_path: Path, action: Any, exit_code: int, decided: int, on: list[str], event: str | None
) -> None:
    run = RunFolder(tmp_path / "run")
    command = ["sh", "-c", f'cat > "{tmp_path}/in"']
    (run.submission / "launcher.yaml").write_text(
        json.dumps({"kind": "local", "notice": {"command": command, "on": on}})
    )
    attempt = Attempt(run.attempt(), 1)
    assert tell(attempt, Decision(action, decided, "why it was"), exit_code) == []
    if event is None:
        assert not (tmp_path / "in").exists()
        return
    told = json.loads((tmp_path / "in").read_text())
    assert told["event"] == event
    assert told["text"] == f"run: attempt 1 ended with exit {decided}: why it was"
    assert (told["run_folder"], told["attempt"], told["exit_code"]) == (str(run.path), 1, decided)


def test_telling_never_fails(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    attempt, done = Attempt(run.attempt(), 1), Decision("done", 0, "done")
    assert tell(attempt, done, 0) == []
    (run.submission / "launcher.yaml").write_text("notice: {on: [nothing]}")
    [line] = tell(attempt, done, 0)
    assert line.startswith("no notice given: launcher.notice: ")
    (run.submission / "launcher.yaml").unlink()
    [line] = tell(attempt, done, 0)
    assert line.startswith("no notice given: [Errno 2] ")


def test_whoever_is_told_of_nothing_is_a_mistake() -> None:
    with pytest.raises(configs.ConfigError) as caught:
        configs.build(Notice, {}, "launcher.notice")
    assert str(caught.value) == "launcher.notice: needs a `command`, a `webhook_variable`, or both"


def test_the_launcher_tells(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK", server.address("ok"))
    run = tmp_path / "run"
    job = Job("small", run, run / "submissions" / "1", "name: small\n", ("-c", "raise SystemExit(5)"))
    assert Local(notice=Notice(webhook_variable="HOOK")).start(job) == 5
    [(_, told)] = server.bodies
    assert (told["event"], told["exit_code"], told["action"]) == ("end", 5, "stop")
    written = [path.read_text() for path in run.rglob("*") if path.is_file()]
    assert any("webhook_variable: HOOK" in text for text in written)
    assert not any(SECRET in text for text in written)
