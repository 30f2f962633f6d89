"""Airflow Connections over the settings: what they say counts, nothing is asked without them, and their secrets stay secret."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from crpbot_lib.config import OrchestrationSettings, Settings

KEY = "CG-secret-key"


@pytest.fixture(autouse=True)
def plugins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path))
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "plugins"))


def connection(monkeypatch: pytest.MonkeyPatch, name: str, **fields: Any) -> None:
    """A Connection as the environment gives it to Airflow."""
    monkeypatch.setenv(f"AIRFLOW_CONN_{name.upper()}", json.dumps({"conn_type": "http", **fields}))


def laid_over(**names: str) -> Settings:
    from crpbot_airflow.connections import with_connections

    return with_connections(Settings(lake="file:///lake", orchestration=OrchestrationSettings(**names)))


def test_what_a_connection_says_lies_over_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    connection(monkeypatch, "cg", host="api.example.com/api/v3", password=KEY, extra={"plan": "demo", "requests_per_second": 0.25})
    connection(monkeypatch, "cb", host="exchange.example.com", schema="http", port=8080, extra={"page_size": 100})
    got = laid_over(coingecko_conn_id="cg", coinbase_conn_id="cb")
    assert (got.coingecko_url, got.coingecko_plan, got.coingecko_requests_per_second) == (
        "https://api.example.com/api/v3",
        "demo",
        0.25,
    )
    assert got.coingecko_api_key is not None
    assert got.coingecko_api_key.get_secret_value() == KEY
    assert (got.coinbase_url, got.coinbase_page_size) == ("http://exchange.example.com:8080", 100)
    assert (got.lake, got.coinbase_requests_per_second) == ("file:///lake", Settings().coinbase_requests_per_second)


def test_what_it_does_not_say_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    connection(monkeypatch, "cg", password=KEY)
    got = laid_over(coingecko_conn_id="cg")
    assert (got.coingecko_url, got.coingecko_plan) == (Settings().coingecko_url, "pro")


def test_an_address_with_its_scheme_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    connection(monkeypatch, "cb", host="http://127.0.0.1:8080/prefix")
    assert laid_over(coinbase_conn_id="cb").coinbase_url == "http://127.0.0.1:8080/prefix"


def test_without_a_name_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from airflow.sdk import Connection

    from crpbot_airflow.connections import with_connections

    def asked(name: str) -> None:
        raise AssertionError(f"asked for {name}")

    monkeypatch.setattr(Connection, "get", asked)
    settings = Settings()
    assert with_connections(settings) is settings


def test_a_connection_that_is_not_there_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from airflow.sdk import Connection
    from airflow.sdk.exceptions import AirflowNotFoundException

    def unknown(name: str) -> None:
        raise AirflowNotFoundException(f"The conn_id `{name}` isn't defined")

    monkeypatch.setattr(Connection, "get", unknown)
    with pytest.raises(
        ValueError, match="CRPBOT_ORCHESTRATION__COINGECKO_CONN_ID='absent': Airflow has no such Connection; add it"
    ):
        laid_over(coingecko_conn_id="absent")


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"rate": 3}, "the extra of the Connection 'cg' has rate; it may have requests_per_second, plan"),
        ({"plan": "gold"}, "not valid: coingecko_plan: Input should be 'pro', 'demo' or 'public'"),
    ],
)
def test_what_is_wrong_with_it_is_told_without_its_secret(monkeypatch: pytest.MonkeyPatch, extra: Any, said: str) -> None:
    connection(monkeypatch, "cg", password=KEY, extra=extra)
    with pytest.raises(ValueError, match=said) as error:
        laid_over(coingecko_conn_id="cg")
    assert KEY not in str(error.value)


def test_steps_run_with_them_and_a_wrong_one_is_not_retried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    from crpbot_airflow.defaults import run_step

    monkeypatch.setenv("CRPBOT_LAKE", f"file://{tmp_path}")
    monkeypatch.setenv("CRPBOT_ORCHESTRATION__COINBASE_CONN_ID", "cb")
    connection(monkeypatch, "cb", host="http://127.0.0.1:1")
    assert run_step(lambda current, _: current.coinbase_url) == "http://127.0.0.1:1"
    connection(monkeypatch, "cb", extra={"page_size": 5000})
    with pytest.raises(AirflowFailException, match="coinbase_page_size"):
        run_step(lambda current, _: current.coinbase_url)
