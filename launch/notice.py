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
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from configs import Section

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
        problems = [
            self._call([*self.command, text], body) if self.command else None,
            self._post(self.webhook_variable, body) if self.webhook_variable else None,
        ]
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

    def _post(self, variable: str, body: bytes) -> str | None:
        """Post the JSON; what went wrong, or None. Texts of errors are not shown: some hold the address."""
        address = os.environ.get(variable, "")
        if not address.startswith(("http://", "https://")):
            return f"{variable}: expected an address that begins with http:// or https://, got " + (
                "another text" if address else "nothing"
            )
        problem = [f"{variable}: no answer within {TIMEOUT_S:g} s"]

        def post() -> None:
            headers = {"Content-Type": "application/json"}
            try:
                request = urllib.request.Request(address, body, headers)
                with urllib.request.urlopen(request, timeout=TIMEOUT_S):
                    problem.clear()
            except urllib.error.HTTPError as error:
                problem[:] = [f"{variable}: the server answered {error.code}"]
            except TimeoutError:
                pass
            except Exception as error:
                reason = getattr(error, "reason", None)  # an OSError, as "connection refused"
                words = reason.strerror if isinstance(reason, OSError) and reason.strerror else type(error).__name__
                problem[:] = [f"{variable}: {words}"]

        thread = threading.Thread(target=post, daemon=True)  # resolving a name has no timeout of its own
        thread.start()
        thread.join(TIMEOUT_S)
        return problem[0] if problem else None


def send(notice: Notice | None, event: Event, text: str, facts: Mapping[str, Any]) -> list[str]:
    """`Notice.send`, where there is one."""
    return notice.send(event, text, facts) if notice is not None else []
