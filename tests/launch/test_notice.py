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
from launch.notice import Notice, send

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
    assert send(None, "end", "done", {}) == []
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


def test_whoever_is_told_of_nothing_is_a_mistake() -> None:
    with pytest.raises(configs.ConfigError) as caught:
        configs.build(Notice, {}, "launcher.notice")
    assert str(caught.value) == "launcher.notice: needs a `command`, a `webhook_variable`, or both"
