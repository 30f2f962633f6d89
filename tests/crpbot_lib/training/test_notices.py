"""Spot notices over the real wire format (IMDSv2), and nothing that stands there disturbs the training."""

from __future__ import annotations

import logging
import socket
import time
from datetime import UTC, datetime
from typing import Any

import pytest

from crpbot_lib.training.notices import DEFAULT_ENDPOINT, Interrupted, MetadataPoller, Notices, endpoint

NOW = datetime(2025, 5, 29, 10, 0, tzinfo=UTC)


@pytest.fixture
def notices() -> Notices:
    return Notices()


@pytest.fixture
def poller(metadata: Any, notices: Notices) -> MetadataPoller:
    return MetadataPoller(metadata.url, notices, now=lambda: NOW)


def test_without_a_notice_the_training_goes_on_and_one_token_is_enough(
    metadata: Any, poller: MetadataPoller, notices: Notices
) -> None:
    assert [poller.poll() for _ in range(3)] == [False] * 3
    notices.check()
    assert not notices.wants_checkpoint()
    asked = [("GET", f"/latest/meta-data/{path}") for path in ("spot/instance-action", "events/recommendations/rebalance")]
    # the first answer only says that a token is needed: there is none yet, so it is fetched first
    assert metadata.requests == [("PUT", "/latest/api/token"), *asked * 3]


def test_a_spot_notice_ends_the_training_with_its_reason(
    metadata: Any, poller: MetadataPoller, notices: Notices, caplog: pytest.LogCaptureFixture
) -> None:
    metadata.spot_notice("2025-05-29T10:01:58Z")
    assert poller.poll()
    assert notices.wants_checkpoint()
    assert notices.wants_checkpoint(), "until the end"
    notices.end("SIGTERM comes after it")
    with pytest.raises(Interrupted, match=r"^spot notice: EC2 will terminate this instance at 2025-05-29T10:01:58Z$"):
        notices.check()
    assert "at 2025-05-29T10:01:58Z, in 118 s; stopping at the next step" in caplog.text


def test_a_rebalance_recommendation_asks_for_one_checkpoint_and_no_end(
    metadata: Any, poller: MetadataPoller, notices: Notices, caplog: pytest.LogCaptureFixture
) -> None:
    metadata.rebalance("2025-05-29T09:58:00Z")
    assert [poller.poll() for _ in range(3)] == [False] * 3
    assert [notices.wants_checkpoint() for _ in range(2)] == [True, False]
    notices.check()
    assert caplog.text.count("rebalance recommendation of 2025-05-29T09:58:00Z") == 1


def test_an_expired_token_is_renewed(metadata: Any, poller: MetadataPoller) -> None:
    poller.poll()
    metadata.forget_tokens()
    metadata.spot_notice("2025-05-29T10:01:58Z")
    assert poller.poll()


@pytest.mark.parametrize("fault", ["away", "error", "no json", "other json", "slow", "token refused"])
def test_whatever_stands_there_is_said_once_and_the_notice_after_it_is_seen(
    metadata: Any, notices: Notices, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("crpbot_lib.training.notices._TIMEOUT_SECONDS", 0.2)
    poller = MetadataPoller(metadata.url, notices)
    answering = poller._endpoint
    silent = socket.create_server(("127.0.0.1", 0))
    if fault in ("away", "slow"):
        poller._endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
    if fault == "away":
        silent.close()
    if fault in ("error", "token refused"):
        metadata.status = {"error": 500, "token refused": 403}[fault]
    if fault in ("no json", "other json"):
        metadata.documents["spot/instance-action"] = {"no json": "<html>", "other json": {"detail": "a proxy's page"}}[fault]

    began = time.monotonic()
    assert [poller.poll() for _ in range(3)] == [False] * 3
    assert time.monotonic() - began < 3
    notices.check()
    assert caplog.text.count("cannot be asked for spot notices") == 1

    silent.close()
    poller._endpoint, metadata.status = answering, None
    metadata.documents.clear()
    assert not poller.poll()
    assert caplog.text.count("answers again") == 1
    metadata.spot_notice("2025-05-29T10:01:58Z")
    assert poller.poll()


def test_the_thread_sees_a_notice_within_its_interval(metadata: Any, notices: Notices) -> None:
    MetadataPoller(metadata.url, notices).start(every=0.05)
    metadata.spot_notice("2025-05-29T10:01:58Z")
    end = time.monotonic() + 5
    while not notices.wants_checkpoint():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, DEFAULT_ENDPOINT),
        ({"AWS_EC2_METADATA_DISABLED": "false"}, DEFAULT_ENDPOINT),
        ({"AWS_EC2_METADATA_DISABLED": "true"}, None),
        ({"AWS_EC2_METADATA_DISABLED": "TRUE"}, None),
        ({"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:1/"}, "http://127.0.0.1:1"),
        ({"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:1", "AWS_EC2_METADATA_DISABLED": "true"}, "http://127.0.0.1:1"),
    ],
)
def test_where_notices_are_asked_for(environment: dict[str, str], expected: str | None) -> None:
    assert endpoint(environment) == expected
