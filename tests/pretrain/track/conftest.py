"""A real MLflow server and a real sqlite database, one of each for all tests of this folder."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from pretrain.track import Mlflow

Place = Callable[..., Mlflow]  # makes the config of a new experiment


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of `mlflow server` on a sqlite backend."""
    folder, port = tmp_path_factory.mktemp("mlflow-server"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "art")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                    break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
        else:
            raise AssertionError((folder / "log").read_text())
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("it's a database") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()  # makes its tables, which takes seconds
    return path


@pytest.fixture(params=["sqlite", "server"])
def place(request: pytest.FixtureRequest) -> Place:
    """The same test on a database and on a server; each test has an experiment of its own."""
    if request.param == "sqlite":
        uri = f"sqlite:///{request.getfixturevalue('database')}"
    else:
        uri = f"http://127.0.0.1:{request.getfixturevalue('server')}"
    name = str(request.node.name)
    return lambda **settings: Mlflow(**{"uri": uri, "experiment": name, "every_seconds": 0.05, **settings})


@pytest.fixture
def on_database(database: Path, request: pytest.FixtureRequest) -> Place:
    """For what does not depend on the kind of store."""
    fixed = {"uri": f"sqlite:///{database}", "experiment": str(request.node.name), "every_seconds": 0.05}
    return lambda **settings: Mlflow(**{**fixed, **settings})


class Line:
    """The way to a server. It can be down (connections are refused), lose or withhold the answers of requests that
    were done, answer in the server's place, or break at the n-th request."""

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self.lose_answers = 0  # this many of the next answers to `log-batch` never arrive
        self.answers: list[int] = []  # HTTP codes of the next requests, which never reach the server
        self.delay_s = 0.0  # before each answer
        self.answering = threading.Event()  # while it is not set, no answer goes out
        self.answering.set()
        self.break_at: int | None = None  # this request and all later ones are cut off, until it is None again
        self.requests = 0
        self._target = target
        self._listener: socket.socket | None = None
        self._clients: list[socket.socket] = []

    def up(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def down(self) -> None:
        for connection in [self._listener, *self._clients]:
            if connection is not None:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        if self._listener is not None:
            self._listener.close()
        self._listener, self._clients = None, []

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self._clients.append(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.create_connection(("127.0.0.1", self._target)) as server:
            while request := _message(client):
                self.requests += 1
                if self.break_at is not None and self.requests >= self.break_at:
                    return
                if self.answers:
                    code = self.answers.pop(0)
                    client.sendall(b"HTTP/1.1 %d Fault\r\nContent-Length: 5\r\n\r\nfault" % code)
                    continue
                server.sendall(request)
                answer = _message(server)
                self.answering.wait()
                time.sleep(self.delay_s)
                if b"/runs/log-batch" in request.split(b"\r\n", 1)[0] and self.lose_answers:
                    self.lose_answers -= 1
                    return
                client.sendall(answer)


def _message(connection: socket.socket) -> bytes:
    """One HTTP message with a content length; nothing where the other side has closed."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(65536)
        if not part:
            return b""
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:])
    missing = int(fields.get(b"content-length", b"0")) - len(body)
    while missing > 0:
        part = connection.recv(65536)
        if not part:
            return b""
        data, missing = data + part, missing - len(part)
    return data


@pytest.fixture
def line(server: int) -> Iterator[Line]:
    way = Line(server)
    yield way
    way.down()
