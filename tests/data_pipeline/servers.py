"""Servers on loopback: one that misbehaves as it is told, and moto's S3."""

from __future__ import annotations

import hashlib
import re
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from data_pipeline.sources import remote

KEY = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


class Server:
    """Serves `files` with ranges and ETags; each request of a path takes the next of its `faults` first.

    A fault is a status, or `reset` and `stall` (in mid-body), `endless`, `trickle`, `old` (If-Match is not looked at),
    `whole` (no ranges), `weak` (ETag), a `redirect:ADDRESS`, or "" for none. The last one stays where `*` ends it.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str]] = []  # (path, Range)
        self.over = threading.Event()
        server = self

        class Handler(_Handler):
            at = server

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def fault(self, path: str) -> str:
        waiting = self.faults.get(path, [])
        if waiting and waiting[0].endswith("*"):
            return waiting[0][:-1]
        return waiting.pop(0) if waiting else ""

    def close(self) -> None:
        self.over.set()
        self.http.shutdown()
        self.http.server_close()


class _Handler(BaseHTTPRequestHandler):
    at: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path)
        asked = self.headers.get("Range", "")
        self.at.requests.append((path, asked))
        fault, data = self.at.fault(path), self.at.files.get(path)
        if fault.startswith("redirect:"):
            self.answer(302, {"Location": fault.partition(":")[2]})
            return
        if fault.isdecimal() or data is None:
            self.answer(int(fault or 404), {"Retry-After": "0"})
            return
        tag = f'"{hashlib.md5(data).hexdigest()}"'
        tag = f"W/{tag}" if fault == "weak" else tag
        wanted = self.headers.get("If-Match")
        if wanted is not None and wanted != tag and fault != "old":
            self.answer(412, {})
            return
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", asked) if fault != "whole" else None
        first, last = (int(span[1]), min(int(span[2]), len(data) - 1)) if span else (0, len(data) - 1)
        headers = {"ETag": tag, "Last-Modified": "Sat, 21 Nov 2026 00:00:00 GMT", "Accept-Ranges": "bytes"}
        if span and first >= len(data):
            self.answer(416, {"Content-Range": f"bytes */{len(data)}"})
            return
        if span:
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.body(206 if span else 200, headers, data[first : last + 1], fault)

    def answer(self, status: int, headers: dict[str, str], length: int = 0) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def body(self, status: int, headers: dict[str, str], data: bytes, fault: str) -> None:
        if self.command == "HEAD":
            self.answer(status, headers, len(data))
            return
        self.answer(status, headers, len(data) * (1000 if fault == "endless" else 1))
        half = data[: max(1, len(data) // 2)]
        try:
            if fault == "reset":
                self.wfile.write(half)
                self.wfile.flush()
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
            elif fault == "stall":
                self.wfile.write(half)
                self.at.over.wait(30)
                self.close_connection = True
            elif fault == "trickle":
                for byte in data:
                    self.wfile.write(bytes([byte]))
                    if self.at.over.wait(0.02):
                        return
            elif fault == "endless":
                while not self.at.over.is_set():
                    self.wfile.write(data)
            else:
                self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True


def forget() -> None:
    """What this process knows of servers."""
    for cached in (remote.store, remote._server, remote._pool):
        cached.cache_clear()


@contextmanager
def moto(monkeypatch: pytest.MonkeyPatch, *buckets: str) -> Iterator[Any]:
    """moto's S3 on a socket, with empty buckets, named by the environment; gives obstore's view of the first."""
    import logging

    import urllib3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for key, value in {**KEY, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
        monkeypatch.setenv(key, value)
    forget()
    for bucket in buckets:
        for _ in range(100):
            if (
                urllib3.request("PUT", f"http://{host}:{port}/{bucket}", headers={"Authorization": "AWS test:x"}).status
                == 200
            ):
                break
            time.sleep(0.05)
    try:
        yield remote.store(buckets[0])
    finally:
        server.stop()
        forget()
