"""How long the job waits for a lake that is away, and for what it does not wait."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from botocore.exceptions import ClientError, ConnectTimeoutError, ReadTimeoutError, SSLError

from crpbot_lib.lake import KeyMissingError, LakeError, UnreadableError
from crpbot_lib.training.notices import Interrupted, Notices
from crpbot_lib.training.patience import PATIENCE_SECONDS, patiently
from crpbot_lib.training.smoke import ModelLog

LOG = ModelLog(logging.getLogger("test"), smoke=False)


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def pause(self, seconds: float) -> None:
        self.seconds += seconds


def failing(until: Callable[[], bool], error: Exception) -> Callable[[], str]:
    def action() -> str:
        if until():
            return "stored"
        raise error

    return action


def test_a_store_that_is_away_for_half_a_minute_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    action = failing(lambda: clock.seconds >= 30, LakeError("s3://bucket/model.pt: Could not connect"))

    assert patiently(action, LOG, clock.pause, now=clock.now) == "stored"

    assert clock.seconds == 38
    assert "the lake does not answer, tried again in 10 s (try 5): s3://bucket/model.pt: Could not connect" in caplog.text


def test_patience_ends(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with pytest.raises(LakeError, match="away"):
        patiently(failing(lambda: False, LakeError("away")), LOG, clock.pause, now=clock.now)
    assert PATIENCE_SECONDS - 10 <= clock.seconds <= PATIENCE_SECONDS


def caused_by(cause: Exception) -> LakeError:
    error = LakeError("refused")
    error.__cause__ = cause
    return error


def s3_error(code: str, status: int) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    "error",
    [
        KeyMissingError("absent"),
        UnreadableError("not JSON"),
        ValueError("wrong"),
        caused_by(OSError(28, "No space left on device")),
        caused_by(s3_error("AccessDenied", 403)),
    ],
)
def test_an_answer_is_not_waited_for(error: Exception) -> None:
    clock = Clock()
    with pytest.raises(type(error), match=str(error)):
        patiently(failing(lambda: False, error), LOG, clock.pause, now=clock.now)
    assert clock.seconds == 0


@pytest.mark.parametrize(
    "cause",
    [
        s3_error("SlowDown", 503),
        ConnectTimeoutError(endpoint_url="https://s3"),
        ReadTimeoutError(endpoint_url="https://s3"),
        SSLError(endpoint_url="https://s3", error="bad record"),
    ],
    ids=lambda cause: type(cause).__name__,
)
def test_a_store_that_is_overloaded_or_does_not_answer_in_time_is_waited_for(cause: Exception) -> None:
    clock = Clock()
    action = failing(lambda: clock.seconds >= 3, caused_by(cause))
    assert patiently(action, LOG, clock.pause, now=clock.now) == "stored"


def test_a_job_that_must_end_waits_no_longer() -> None:
    notices = Notices()
    notices.end("spot notice")
    with pytest.raises(Interrupted, match="spot notice"):
        patiently(failing(lambda: False, LakeError("away")), LOG, notices.pause)
