"""The client of the local Airflow asks again where Airflow is busy, and what it starts is started once."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from crpbot_lib.sandbox import local_airflow
from crpbot_lib.sandbox.local_airflow import AirflowError, LocalAirflow


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> deque[int]:
    """The statuses that the server gives, in order; after them 200."""
    monkeypatch.setattr(local_airflow.time, "sleep", lambda _: None)
    return deque()


@pytest.fixture
def asked() -> list[dict[str, object]]:
    return []


@pytest.fixture
def airflow(tmp_path: Path, answers: deque[int], asked: list[dict[str, object]]) -> Iterator[LocalAirflow]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(answers.popleft() if answers else 200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield LocalAirflow(tmp_path / "home", {}, port=server.server_port)
        server.shutdown()
        thread.join()


def test_a_run_is_asked_for_again_by_the_same_name(
    airflow: LocalAirflow, answers: deque[int], asked: list[dict[str, object]]
) -> None:
    answers.extend([500, 503])
    name = airflow.trigger("market_data", partition_key="2025-05-26")
    assert [body["dag_run_id"] for body in asked] == [name] * 3


def test_a_run_whose_first_answer_was_lost_is_there_already(
    airflow: LocalAirflow, answers: deque[int], asked: list[dict[str, object]]
) -> None:
    answers.extend([500, 409])
    assert airflow.trigger("market_data") == asked[0]["dag_run_id"]


def test_an_airflow_that_stays_busy_is_an_error_that_says_where_its_logs_are(airflow: LocalAirflow, answers: deque[int]) -> None:
    answers.extend([500] * 20)
    with pytest.raises(AirflowError, match=r"no usable answer .* logs in"):
        airflow.trigger("market_data")


def test_a_refusal_is_not_repeated(airflow: LocalAirflow, answers: deque[int], asked: list[dict[str, object]]) -> None:
    answers.append(404)
    with pytest.raises(AirflowError, match="answered 404"):
        airflow.trigger("no_such_dag")
    assert len(asked) == 1


@pytest.fixture
def component(airflow: LocalAirflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The triggerer, in whose place a script dies as often as the file names that it is given; otherwise it waits."""
    deaths = tmp_path / "deaths"
    deaths.write_text("0")
    script = tmp_path / "airflow"
    script.write_text(
        f"#!/bin/sh\nleft=$(cat {deaths})\n"
        f'if [ "$left" -gt 0 ]; then echo $((left - 1)) > {deaths}; echo "database is locked"; exit 3; fi\nexec sleep 600\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(local_airflow, "_airflow", lambda: str(script))
    airflow.home.mkdir()
    yield deaths
    airflow.stop()


def _until_the_triggerer_has_ended(airflow: LocalAirflow) -> None:
    airflow._children["triggerer"].wait(timeout=10)


def test_a_component_that_dies_by_itself_is_started_anew_with_the_next_request(airflow: LocalAirflow, component: Path) -> None:
    component.write_text("1")
    airflow.start_component("triggerer")
    _until_the_triggerer_has_ended(airflow)
    airflow.trigger("market_data")
    assert airflow._children["triggerer"].poll() is None
    assert airflow.died == ["airflow triggerer ended with 3: database is locked"]


def test_a_component_that_dies_again_and_again_is_an_error_that_shows_what_it_said(airflow: LocalAirflow, component: Path) -> None:
    component.write_text("100")
    airflow.start_component("triggerer")
    for _ in range(5):
        _until_the_triggerer_has_ended(airflow)
        airflow.keep_up()
    _until_the_triggerer_has_ended(airflow)
    with pytest.raises(AirflowError, match="airflow triggerer ended 6 times, the last time with 3: database is locked"):
        airflow.keep_up()
