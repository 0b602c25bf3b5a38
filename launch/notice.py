"""Notices: a command or a webhook of the user's is told when a run stalls, is in a crash loop, or ends.

A notice never delays a job by more than TIMEOUT_S and never fails one: what goes wrong is one line in the log. The
webhook's address is the value of an environment variable, so that no file and no log ever holds it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

import configs
from configs import Section
from launch.attempts import Attempt
from launch.policy import Decision
from pretrain.guard import CRASH_LOOP, HUNG

TIMEOUT_S = 10.0
Event = Literal["stall", "crash_loop", "end"]


class Notice(Section):
    """Whom to tell of what."""

    command: list[str] = Field([])  # gets the text as its last argument, and everything as JSON on its stdin
    webhook_variable: str | None = Field(None, pattern=r"\w+")  # names the variable that holds the address, no more
    on: list[Event] = Field(["stall", "crash_loop", "end"])

    @model_validator(mode="after")
    def _tells_somebody(self) -> Notice:
        if not self.command and self.webhook_variable is None:
            raise ValueError("needs a `command`, a `webhook_variable`, or both")
        return self

    def send(self, event: Event, text: str, facts: Mapping[str, Any]) -> list[str]:
        """Tell everybody who is to be told of `event`. Never raises; a line for each who could not be told.

        The JSON is {"event", "text", **facts}.
        """
        if event not in self.on:
            return []
        body = json.dumps({"event": event, "text": text, **facts}, default=str).encode()
        posting = _Posting(self.webhook_variable, body) if self.webhook_variable else None
        problems = [self._call([*self.command, text], body) if self.command else None, posting and posting.end()]
        return [f"notice of {event} not given: {problem}" for problem in problems if problem]

    def _call(self, command: list[str], body: bytes) -> str | None:
        """Run the command; what went wrong, or None."""
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            return f"{command[0]}: {error}"
        try:
            process.communicate(body, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return f"{command[0]}: did not end within {TIMEOUT_S:g} s"
        return f"{command[0]}: exit {process.returncode}" if process.returncode else None


class _Posting:
    """A POST of JSON, under way in a thread: resolving a name has no timeout of its own.

    Texts of errors are not shown: some hold the address.
    """

    def __init__(self, variable: str, body: bytes) -> None:
        self.address, self.body = os.environ.get(variable, ""), body
        self.variable, self.problem = variable, f"no answer within {TIMEOUT_S:g} s"
        self.until = time.monotonic() + TIMEOUT_S
        self.thread = threading.Thread(target=self._post, daemon=True)
        self.thread.start()

    def end(self) -> str | None:
        """What went wrong, or None."""
        self.thread.join(max(0.0, self.until - time.monotonic()))
        return f"{self.variable}: {self.problem}" if self.problem else None

    def _post(self) -> None:
        if not self.address.startswith(("http://", "https://")):
            got = "another text" if self.address else "nothing"
            self.problem = f"expected an address that begins with http:// or https://, got {got}"
            return
        try:
            request = urllib.request.Request(self.address, self.body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=TIMEOUT_S):
                self.problem = ""
        except urllib.error.HTTPError as error:
            self.problem = f"the server answered {error.code}"
        except TimeoutError:
            pass
        except Exception as error:
            reason = getattr(error, "reason", None)  # an OSError, as "connection refused"
            words = reason.strerror if isinstance(reason, OSError) and reason.strerror else type(error).__name__
            self.problem = words


def tell(attempt: Attempt, decision: Decision, exit_code: int | None) -> list[str]:
    """Tell of an attempt's end and of what follows it, as its submission's launcher.yaml wants it. Never raises.

    A hang is a stall; what is not started again is an end, or a crash loop. A line for each who could not be told.
    """
    run_folder = attempt.folder.parents[1]
    events = _events(decision, exit_code)
    if not events:
        return []
    try:
        settings = yaml.safe_load((run_folder / "submissions" / str(attempt.submission) / "launcher.yaml").read_text())
        if settings.get("notice") is None:
            return []
        notice = configs.build(Notice, settings["notice"], "launcher.notice")
    except (OSError, AttributeError, yaml.YAMLError, configs.ConfigError) as error:
        return [f"no notice given: {error}"]
    wanted = next((event for event in events if event in notice.on), None)
    if wanted is None:
        return []
    text = f"{run_folder.name}: attempt {attempt.number} ended with exit {decision.exit_code}: {decision.why}"
    facts = {
        "run_folder": str(run_folder),
        "attempt": attempt.number,
        "job": attempt.begun.get("job"),
        "nodes": attempt.nodes,
        "exit_code": decision.exit_code,
        "action": decision.action,
        "why": decision.why,
    }
    return notice.send(wanted, text, facts)


def _events(decision: Decision, exit_code: int | None) -> list[Event]:
    """What an end is, the most telling first: of these a user is told the first one asked for."""
    found: list[Event] = []
    if decision.exit_code == CRASH_LOOP:
        found.append("crash_loop")
    if decision.action != "restart":
        found.append("end")
    if exit_code == HUNG:
        found.append("stall")
    return found
