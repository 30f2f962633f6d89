"""What the settings say reaches the clients."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from crpbot_lib.config import Settings
from crpbot_lib.market_data import MarketData, MarketDataError

NOW = datetime(2025, 5, 20, 13, 7, tzinfo=UTC)
START = datetime(2025, 5, 5, tzinfo=UTC)


def settings(wire: Any, folder: Path, **options: Any) -> Settings:
    return Settings(
        **{
            "coinbase_url": wire.url,
            "coingecko_url": wire.url + "/api/v3",
            "coingecko_api_key": "key",
            "coinbase_requests_per_second": 1e6,
            "coingecko_requests_per_second": 1e6,
            "rate_limit_dir": str(folder / "limits"),
            **options,
        }
    )


def test_page_size_and_the_directory_of_the_limits(wire: Any, tmp_path: Path) -> None:
    market = MarketData(settings(wire, tmp_path, coinbase_page_size=60), now=lambda: NOW, backoff=0.001)
    for _ in range(2):
        wire.says(
            200,
            {"candles": [{"start": str(int(START.timestamp())), **dict.fromkeys(("low", "high", "open", "close", "volume"), "1")}]},
        )
    market.candles("BTC-USD", "1m", START, START + timedelta(minutes=1))
    assert wire.requests[0].query["limit"] == "60"
    port = wire.url.rpartition(":")[2]
    assert sorted(p.name for p in (tmp_path / "limits").iterdir()) == [f"coinbase-127.0.0.1_{port}"]


def test_the_plan_its_header_and_its_own_history(wire: Any, tmp_path: Path) -> None:
    chosen = settings(wire, tmp_path, coingecko_plan="demo", coingecko_history_days=10)
    market = MarketData(chosen, now=lambda: NOW, backoff=0.001)
    assert (market.coingecko.plan.name, market.coingecko.plan.history) == ("demo", timedelta(days=10))
    with pytest.raises(MarketDataError, match="the plan 'demo' reaches back 10 days, to 2025-05-11"):
        market.daily("bitcoin", START, NOW)
    assert wire.requests == []


def test_without_a_setting_host_and_rate_are_the_plans(tmp_path: Path) -> None:
    market = MarketData(Settings(coingecko_plan="public", rate_limit_dir=str(tmp_path)))
    assert market.coingecko._http._base == "https://api.coingecko.com/api/v3"
    assert market.coingecko._http._limiter._spacing == pytest.approx(15)


def test_the_time_limit(wire: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    market = MarketData(settings(wire, tmp_path, http_timeout_seconds=0.1), now=lambda: NOW, backoff=0.001)
    asks: dict[str, Callable[[], Any]] = {
        "Coinbase": lambda: market.candles("BTC-USD", "1m", START, START + timedelta(hours=1)),
        "CoinGecko": lambda: market.all_time_high("bitcoin"),
    }
    for source, ask in asks.items():
        wire.script.append(lambda _handler: time.sleep(0.5))
        wire.says(404, {"error": "not here"})
        with pytest.raises(MarketDataError, match="404: not here"):
            ask()
        assert f"{source}: GET" in caplog.text
        assert "Read timed out. (read timeout=0.1)" in caplog.text
        caplog.clear()
