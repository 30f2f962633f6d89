"""Local clouds in a process beside this one, by their options: for what measures or kills a client and must not share its process.

The process ends with the one that started it. It speaks JSON lines: options in, what the cloud says of itself out.
"""

from __future__ import annotations

import json
import subprocess
import sys
from types import TracebackType
from typing import Any

import requests

from crpbot_lib.sandbox import processes


class CloudBeside:
    """``with CloudBeside() as cloud: cloud.start(venue="candles_1m") …``; one cloud at a time, as often as asked for."""

    def __init__(self) -> None:
        self.env: dict[str, str] = {}
        """Environment variables with which any process uses the cloud; empty before ``start``."""
        self._process: subprocess.Popen[bytes]
        self._url = ""
        self._http = requests.Session()
        # no proxy stands between here and this machine's own servers
        self._http.trust_env = False

    def __enter__(self) -> CloudBeside:
        command = [sys.executable, "-m", "crpbot_lib.sandbox.beside"]
        self._process = processes.spawn(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        processes.end_group(self._process.pid)
        self._process.communicate()

    def start(self, **options: Any) -> None:
        """Ends the cloud before it and starts one with these ``SandboxOptions``; RuntimeError when it does not start."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(options, default=str).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"no local cloud with the options {options}: its process has ended, see its traceback")
        self.env, self._url = (said := json.loads(answer))["env"], said["control_url"]

    def ask(self, what: str) -> Any:
        """GET of one of the control's pages: about, faults, requests."""
        return self._answer("GET", what, None)

    def tell(self, what: str, body: Any) -> Any:
        """POST to one of them: faults, rate_limits."""
        return self._answer("POST", what, body)

    def count_anew(self) -> None:
        """What ``ask("requests")`` tells begins here."""
        self._answer("DELETE", "requests", None)

    def _answer(self, method: str, what: str, body: Any) -> Any:
        answer = self._http.request(method, f"{self._url}/_sandbox/{what}", json=body, timeout=60)
        answer.raise_for_status()
        return answer.json()


def _serve() -> None:
    from crpbot_lib.sandbox.server import Sandbox, SandboxOptions

    cloud: Sandbox | None = None
    try:
        for line in sys.stdin:
            if cloud is not None:
                cloud.stop()
            cloud = Sandbox(SandboxOptions.model_validate_json(line)).start()
            sys.stdout.write(json.dumps({"env": cloud.env(), "control_url": cloud.control_url}) + "\n")
            sys.stdout.flush()
    finally:
        if cloud is not None:
            cloud.stop()


if __name__ == "__main__":
    _serve()
