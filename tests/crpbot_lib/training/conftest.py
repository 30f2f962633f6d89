"""The job as a process of its own, and an instance-metadata service on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from crpbot_lib import training
from crpbot_lib.training import JobSpec
from crpbot_lib.training.job import read_spec


@pytest.fixture
def respec() -> Callable[..., JobSpec]:
    """Changes the job of a copied lake and writes it back; ``train`` may be a dict of changes."""

    def change(own: Any, **changes: Any) -> JobSpec:
        spec = read_spec(own.lake, own.run)
        if isinstance(train := changes.get("train"), dict):
            changes["train"] = spec.train.model_copy(update=train)
        spec = spec.model_copy(update=changes)
        training.write_job(own.lake, spec)
        return spec

    return change


class Job:
    """The container's entry point as a process, in which what the training image lacks cannot be imported."""

    def __init__(self, own: Any, before: str, environment: dict[str, str]) -> None:
        code = (
            "import sys, runpy\n"
            "sys.modules.update(dict.fromkeys(('pandas', 'pyarrow', 'typer', 'rich', 'airflow')))\n"
            f"{before}\n"
            "runpy.run_module('crpbot_lib.training', run_name='__main__')"
        )
        env = {**os.environ, "CRPBOT_LAKE": own.lake.root, "CRPBOT_RUN": own.run, "CRPBOT_GENERATION": "2", **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.output = ""

    def until(self, wanted: str) -> None:
        """Reads its lines up to the first that holds ``wanted``."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if wanted in line:
                return
        raise AssertionError(f"the job ended before a line with {wanted!r}:\n{self.output}")

    def end(self, seconds: float = 120) -> int:
        """Waits for its end; the exit status. ``output`` is then all that it wrote."""
        rest, _ = self.process.communicate(timeout=seconds)
        self.output += rest
        return self.process.returncode


@pytest.fixture
def job() -> Iterator[Callable[..., Job]]:
    """Starts jobs: ``job(own, before="python code", NAME="value")``. What is left of them is ended after the test."""
    started: list[Job] = []

    def start(own: Any, before: str = "", **environment: str) -> Job:
        started.append(Job(own, before, environment))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


class Metadata:
    """An instance-metadata service that speaks IMDSv2 and nothing else; ``documents`` is what it knows, by path."""

    def __init__(self) -> None:
        self.documents: dict[str, Any] = {}
        self.tokens: set[str] = set()
        self.requests: list[tuple[str, str]] = []
        self.status: int | None = None
        """Given to every request instead of an answer."""
        self.url = ""

    def spot_notice(self, at: str) -> None:
        self.documents["spot/instance-action"] = {"action": "terminate", "time": at}

    def rebalance(self, at: str) -> None:
        self.documents["events/recommendations/rebalance"] = {"noticeTime": at}

    def forget_tokens(self) -> None:
        self.tokens.clear()


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    state = Metadata()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, body: str = "") -> None:
            state.requests.append((self.command, self.path))
            self.send_response(state.status or status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def do_PUT(self) -> None:
            ttl = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
            if self.path != "/latest/api/token" or not ttl.isdigit() or not 1 <= int(ttl) <= 21600:
                return self.answer(400)
            state.tokens.add(token := f"token-{len(state.requests)}")
            self.answer(200, token)

        def do_GET(self) -> None:
            if self.headers.get("X-aws-ec2-metadata-token") not in state.tokens:
                return self.answer(401)
            document = state.documents.get(self.path.removeprefix("/latest/meta-data/"))
            if document is None:
                return self.answer(404, "Not Found")
            self.answer(200, document if isinstance(document, str) else json.dumps(document))

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()
