"""The trigger: the job's own word decides, and logs that cannot be read decide nothing."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from crpbot_lib.config import GpuSettings
from crpbot_lib.gpu.watch import Outcome

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "plugins"))


class Job:
    """A watcher of a job that says what a test tells it to."""

    gpu = GpuSettings(poll_seconds=0.01)

    def __init__(
        self,
        outcomes: list[Outcome | Exception | None],
        lines: list[list[str] | Exception],
        progress: str | Exception | None = None,
    ) -> None:
        self.outcomes, self.lines, self.progressed = iter(outcomes), iter(lines), progress

    def outcome(self) -> Outcome | None:
        found = next(self.outcomes)
        if isinstance(found, Exception):
            raise found
        return found

    def progress(self) -> str | None:
        if isinstance(self.progressed, Exception):
            raise self.progressed
        return self.progressed

    def new_lines(self) -> list[str]:
        found = next(self.lines, [])
        if isinstance(found, Exception):
            raise found
        return found


def follow(job: Job, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], list[str]]:
    """The trigger's event and the lines that it logged."""
    from crpbot_airflow import triggers

    monkeypatch.setattr(triggers, "_SETTLE_SECONDS", 0.05)
    trigger = triggers.TrainingJobTrigger(run="run-a", generation=1)
    monkeypatch.setattr(trigger, "_watcher", lambda: job)
    logged: list[str] = []
    monkeypatch.setattr(trigger.log, "info", lambda message, *args: logged.append(message % args))

    async def first() -> dict[str, Any]:
        async for event in trigger.run():
            return dict(event.payload)
        raise AssertionError("the trigger ended without an event")

    return asyncio.run(first()), logged


def test_lines_appear_in_order_and_the_verdict_is_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job([None, None, Outcome("succeeded", "done")], [["a"], ["b"], ["c"], ["after the end"]])
    event, logged = follow(job, monkeypatch)
    assert event == {"run": "run-a", "generation": 1, "verdict": "succeeded", "message": "done", "permanent": False}
    assert logged[0].startswith("following run-a, generation 1")
    assert logged[1:] == ["a", "b", "c", "after the end"]


def test_the_progress_is_shown_and_where_it_cannot_be_told_nothing_else_suffers(monkeypatch: pytest.MonkeyPatch) -> None:
    done = Outcome("succeeded", "done")
    _, logged = follow(Job([None, done], [["a"]], "BTC-USD (1 of 3): epoch 2/15; $0.0041 so far"), monkeypatch)
    assert logged[1:] == ["a", "run-a: BTC-USD (1 of 3): epoch 2/15; $0.0041 so far"]
    event, logged = follow(Job([None, done], [["a"], ["b"]], ValueError("a launch record cannot be read")), monkeypatch)
    assert event["verdict"] == "succeeded"
    assert logged[1:] == ["a", "b"]


def test_logs_that_cannot_be_read_neither_fail_the_job_nor_hide_its_success(monkeypatch: pytest.MonkeyPatch) -> None:
    denied = PermissionError("logs:GetLogEvents denied")
    job = Job([*[None] * 30, Outcome("succeeded", "done")], [denied] * 100)
    event, _ = follow(job, monkeypatch)
    assert event["verdict"] == "succeeded"


def test_aws_away_for_a_while_is_survived_and_for_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    away = ConnectionError("no route")
    event, _ = follow(Job([*[away] * 19, None, *[away] * 19, Outcome("failed", "NaN loss", True)], []), monkeypatch)
    assert (event["verdict"], event["message"], event["permanent"]) == ("failed", "NaN loss", True)
    event, _ = follow(Job([away] * 20, []), monkeypatch)
    assert event["verdict"] == "unknown"
    assert event["permanent"] is False
    assert "no route" in event["message"]


def test_a_restarted_triggerer_makes_the_same_trigger_again() -> None:
    from crpbot_airflow.triggers import TrainingJobTrigger

    path, arguments = TrainingJobTrigger(run="run-a", generation=2).serialize()
    assert path == "crpbot_airflow.triggers.TrainingJobTrigger"
    assert TrainingJobTrigger(**arguments).serialize() == (path, arguments)
