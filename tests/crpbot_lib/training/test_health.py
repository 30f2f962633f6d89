"""What the image's HEALTHCHECK asks: whether the job's own heartbeat reaches the lake."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from crpbot_lib.lake import Lake, keys
from crpbot_lib.training import __main__ as entry
from crpbot_lib.training.status import FRESH_SECONDS, HEARTBEAT_SECONDS, StatusFile, health

NOW = datetime(2025, 5, 29, 10, 0, tzinfo=UTC)


def status(age: float, **others: Any) -> dict[str, Any]:
    return {"generation": 2, "state": "running", "heartbeat": (NOW - timedelta(seconds=age)).isoformat(), **others}


@pytest.mark.parametrize(
    ("told", "healthy", "said"),
    [
        (status(4), True, "running, heartbeat 4 s ago (expected within 60 s)"),
        (status(FRESH_SECONDS), True, "heartbeat 60 s ago"),
        (status(FRESH_SECONDS + 1), False, "running, heartbeat 61 s ago (expected within 60 s)"),
        (status(4, generation=1), False, "the status is generation 1's, this is 2"),
        (None, False, "the job has written no status yet"),
    ],
)
def test_a_job_is_healthy_while_its_own_heartbeat_is_fresh(told: dict[str, Any] | None, healthy: bool, said: str) -> None:
    found = health(told, 2, NOW)
    assert found[0] is healthy
    assert said in found[1]


def test_several_heartbeats_may_be_lost_before_a_job_is_unhealthy() -> None:
    assert FRESH_SECONDS >= 10 * HEARTBEAT_SECONDS


def ask(monkeypatch: pytest.MonkeyPatch, lake: str, *arguments: str) -> int:
    """The entry point's exit status, asked in the environment of generation 2 of run r."""
    for name, value in (("LAKE", lake), ("RUN", "r"), ("GENERATION", "2")):
        monkeypatch.setenv(f"CRPBOT_{name}", value)
    monkeypatch.setattr("sys.argv", ["crpbot_lib.training", *arguments])
    return entry.main()


def test_the_entry_point_says_it_by_its_exit_status_and_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(monkeypatch, f"file://{tmp_path}", "--health") == 1
    StatusFile(Lake(f"file://{tmp_path}"), "r", generation=2).finish("interrupted")
    assert ask(monkeypatch, f"file://{tmp_path}", "--health") == 0
    assert [path.name for path in tmp_path.rglob("*.*") if path.is_file()] == ["status.json"]


def test_a_status_that_cannot_be_read_is_unhealthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    Lake(f"file://{tmp_path}").write(keys.training_run("r", "status.json"), b"{half a sta")
    assert ask(monkeypatch, f"file://{tmp_path}", "--health") == 1
    assert "the status of run r cannot be read: " in caplog.text


def test_an_argument_that_it_does_not_know_starts_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(monkeypatch, f"file://{tmp_path}", "--helth") == 65
    assert list(tmp_path.iterdir()) == []
