"""The exchange, CoinGecko and Telegram speak the real wire formats, over real data where it is at hand and over generated data."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import requests

from crpbot_lib.sandbox.data import FolderSource, Source, derive_hourly, resample
from crpbot_lib.sandbox.synthetic import SyntheticSource

CANDLES = "/api/v3/brokerage/market/products/{}/candles"
RANGE = "/api/v3/coins/{}/market_chart/range"
NOON = int(datetime(2025, 5, 20, 12, tzinfo=UTC).timestamp())


def candles(cloud: Any, product: str = "BTC-USD", **params: Any) -> requests.Response:
    asked = {"start": NOON, "end": NOON + 299 * 60, "granularity": "ONE_MINUTE", **params}
    response: requests.Response = cloud.get(CANDLES.format(product), **asked)
    return response


def points(cloud: Any, coin: str = "bitcoin", **params: Any) -> requests.Response:
    asked = {"vs_currency": "usd", "from": NOON, "to": NOON + 86400, "interval": "hourly", **params}
    response: requests.Response = cloud.get(RANGE.format(coin), **asked)
    return response


# --- wire formats ---


def test_candles_are_strings_newest_first_with_both_ends(cloud: Any, api_samples: Path | None) -> None:
    rows = candles(cloud).json()["candles"]
    assert [int(row["start"]) for row in rows] == list(range(NOON + 299 * 60, NOON - 1, -60))
    assert all(isinstance(value, str) and "e" not in value for row in rows for value in row.values())
    if api_samples:
        sample = json.loads((api_samples / "coinbase_advanced_candles_200.json").read_text())["body"]["candles"]
        assert rows[0].keys() == sample[0].keys()
        assert int(sample[0]["start"]) > int(sample[1]["start"])
    else:
        assert set(rows[0]) == {"start", "low", "high", "open", "close", "volume"}


def test_every_granularity_has_its_own_grid(cloud: Any) -> None:
    for name, seconds in (("FIVE_MINUTE", 300), ("FIFTEEN_MINUTE", 900), ("ONE_HOUR", 3600)):
        starts = [int(r["start"]) for r in candles(cloud, granularity=name, end=NOON + 9 * seconds).json()["candles"]]
        assert starts == list(range(NOON + 9 * seconds, NOON - 1, -seconds))


def test_350_candles_are_served_and_351_are_refused(cloud: Any) -> None:
    assert len(candles(cloud, end=NOON + 349 * 60).json()["candles"]) == 350
    refused = candles(cloud, end=NOON + 350 * 60)
    assert refused.status_code == 400
    assert refused.json()["error"] == "INVALID_ARGUMENT"
    assert "number of candles requested should be less than 350" in refused.text


def test_limit_keeps_the_newest(cloud: Any) -> None:
    assert [int(r["start"]) for r in candles(cloud, limit=2).json()["candles"]] == [NOON + 299 * 60, NOON + 298 * 60]


def test_unknown_products_and_granularities_are_refused_in_words(cloud: Any) -> None:
    unknown = candles(cloud, product="NOPE-USD")
    assert (unknown.status_code, unknown.json()["error"]) == (404, "NOT_FOUND")
    assert "Product NOPE-USD not supported" in unknown.text
    wrong = candles(cloud, granularity="60")
    assert wrong.status_code == 400
    assert "granularity argument is invalid" in wrong.text
    assert candles(cloud, start="2025-05-20").status_code == 400


def test_nothing_is_served_beyond_the_data(cloud: Any) -> None:
    later = int(datetime(2030, 1, 1, tzinfo=UTC).timestamp())
    assert candles(cloud, start=later, end=later + 600).json() == {"candles": []}


def test_a_product_has_the_fields_of_the_real_one(cloud: Any, api_samples: Path | None) -> None:
    body = cloud.get("/api/v3/brokerage/market/products/SOL-USD").json()
    assert (body["product_id"], body["base_currency_id"], body["product_type"]) == ("SOL-USD", "SOL", "SPOT")
    assert isinstance(body["price"], str)
    if api_samples:
        sample = json.loads((api_samples / "coinbase_advanced_product_200.json").read_text())["body"]
        assert set(body) <= set(sample)
        assert all(type(body[name]) is type(sample[name]) for name in body)


def test_points_come_as_three_arrays_of_pairs(cloud: Any, api_samples: Path | None) -> None:
    response = points(cloud)
    body = response.json()
    if api_samples:
        sample = json.loads((api_samples / "coingecko_market_chart_range_docs_example_200.json").read_text())["body"]
        assert list(body) == list(sample)
    assert [stamp for stamp, _ in body["prices"]] == [(NOON + 3600 * h) * 1000 for h in range(25)]
    assert len(body["prices"]) == len(body["market_caps"]) == len(body["total_volumes"])
    assert response.headers["X-Sandbox-Data"] == "synthetic; derived"
    daily = points(cloud, **{"from": NOON - 40 * 86400, "interval": "daily"})
    assert all(stamp % 86_400_000 == 0 for stamp, _ in daily.json()["prices"])
    assert daily.headers["X-Sandbox-Data"] == "synthetic"


def test_a_missing_or_wrong_key_is_refused_as_by_coingecko(cloud: Any) -> None:
    for headers in ({}, {"x-cg-pro-api-key": "wrong"}):
        response = requests.get(f"{cloud.sandbox.control_url}{RANGE.format('bitcoin')}", headers=headers, timeout=10)
        assert response.status_code == 401
        assert response.json()["status"]["error_code"] == 10002


def test_missing_parameters_and_unknown_coins_are_refused_as_by_coingecko(cloud: Any) -> None:
    missing = points(cloud, vs_currency="")
    assert (missing.status_code, missing.json()) == (422, {"error": "Missing parameter vs_currency"})
    assert points(cloud, coin="no-such-coin").status_code == 404


def test_a_coin_has_its_all_time_high(cloud: Any, api_samples: Path | None) -> None:
    body = cloud.get("/api/v3/coins/bitcoin").json()
    history = points(cloud, **{"from": 0, "interval": "daily", "to": 2_000_000_000}).json()["prices"]
    stamp, price = max(history, key=lambda pair: pair[1])
    assert body["market_data"]["ath"]["usd"] == price
    assert datetime.fromisoformat(body["market_data"]["ath_date"]["usd"]).timestamp() * 1000 == stamp
    if api_samples:
        sample = json.loads((api_samples / "coingecko_coin_bitcoin_200.json").read_text())["body"]
        assert set(body["market_data"]) <= set(sample["market_data"])


def test_telegram_takes_messages_and_lists_them(cloud: Any) -> None:
    address = f"{cloud.env['CRPBOT_TELEGRAM__URL']}/bot{cloud.env['CRPBOT_TELEGRAM__TOKEN']}/sendMessage"
    sent = requests.post(address, json={"chat_id": cloud.env["CRPBOT_TELEGRAM__CHAT_ID"], "text": "hello"}, timeout=10)
    assert sent.json()["ok"] is True
    assert cloud.get("/_sandbox/telegram").json()[-1]["text"] == "hello"
    assert requests.post(address.replace("/bot", "/botx"), json={}, timeout=10).status_code == 401
    assert requests.post(address, json={"chat_id": "1"}, timeout=10).json()["description"].startswith("Bad Request")


# --- faults ---


def test_faults_hit_their_share_and_are_counted(cloud: Any) -> None:
    before = cloud.get("/_sandbox/faults").json()["injected"].get("exchange:429", 0)
    cloud.post("/_sandbox/faults", {"exchange": {"status": 429, "rate": 0.5, "seed": 1}})
    codes = [candles(cloud, limit=1).status_code for _ in range(20)]
    cloud.post("/_sandbox/faults", {"exchange": None})
    assert set(codes) == {200, 429}
    assert cloud.get("/_sandbox/faults").json()["injected"]["exchange:429"] - before == codes.count(429)
    assert candles(cloud, limit=1).status_code == 200


def test_rate_limits_server_errors_cuts_and_stalls(cloud: Any) -> None:
    cloud.post("/_sandbox/faults", {"coingecko": {"status": 429, "retry_after": 7, "times": 1}})
    limited = points(cloud)
    assert (limited.status_code, limited.headers["retry-after"]) == (429, "7")
    assert limited.json()["status"]["error_code"] == 429
    assert points(cloud).status_code == 200  # once only
    cloud.post("/_sandbox/faults", {"coingecko": {"status": 503}})
    assert points(cloud).status_code == 503
    cloud.post("/_sandbox/faults", {"coingecko": {"truncate": True}})
    with pytest.raises(requests.exceptions.RequestException):
        points(cloud).json()
    cloud.post("/_sandbox/faults", {"coingecko": {"stall": 0.3}})
    assert points(cloud).elapsed >= timedelta(seconds=0.3)
    cloud.post("/_sandbox/faults", {"coingecko": None})


def test_a_fault_that_makes_no_sense_is_refused(cloud: Any) -> None:
    for body in ({"exchange": {"status": 200}}, {"exchange": {"rate": 1}}, {"nowhere": {"status": 500}}):
        assert cloud.post("/_sandbox/faults", body).status_code == 400


# --- the data itself ---


@pytest.fixture(scope="module", params=["folder", "synthetic"])
def source(request: pytest.FixtureRequest, market_data_dir: Path | None) -> Source:
    """The real data where it is at hand, else (and always besides) generated data."""
    if request.param == "folder" and market_data_dir is not None:
        return FolderSource(market_data_dir)
    return SyntheticSource(seed=2)


def frame(value: pl.DataFrame | None) -> pl.DataFrame:
    assert value is not None
    return value


@pytest.mark.parametrize("symbol", ["BTC-USD", "ETH-USD", "SOL-USD"])
def test_candles_are_sorted_unique_and_enclose(source: Source, symbol: str) -> None:
    for timeframe in ("1m", "5m", "15m", "1h"):
        rows = frame(source.candles(symbol, timeframe))
        assert rows.columns == ["timestamp", "open", "high", "low", "close", "volume"]
        assert rows.schema["timestamp"] == pl.Datetime("us", "UTC")
        assert rows["timestamp"].is_sorted()
        assert rows["timestamp"].is_unique().all()
        assert rows.filter(
            (pl.col("high") < pl.max_horizontal("open", "close")) | (pl.col("low") > pl.min_horizontal("open", "close"))
        ).is_empty()


@pytest.mark.parametrize("timeframe", ["5m", "15m", "1h"])
def test_wider_candles_agree_with_the_minutes_and_only_whole_ones_stand_at_the_ends(source: Source, timeframe: str) -> None:
    minutes, wide = frame(source.candles("BTC-USD", "1m")), frame(source.candles("BTC-USD", timeframe))
    again = resample(minutes, timeframe)
    assert wide["timestamp"].equals(again["timestamp"])
    for column in ("open", "high", "low", "close"):
        assert (wide[column] - again[column]).abs().max() == 0
    assert wide["timestamp"][0] >= minutes["timestamp"][0]


@pytest.mark.parametrize(("coin", "symbol"), [("bitcoin", "BTC-USD"), ("ethereum", "ETH-USD"), ("solana", "SOL-USD")])
def test_fundamentals_stand_near_the_candles(source: Source, coin: str, symbol: str) -> None:
    hourly, daily = frame(source.points(coin, "hourly")), frame(source.points(coin, "daily"))
    minutes = frame(source.candles(symbol, "1m")).select("timestamp", pl.col("open").alias("traded"))
    for series in (hourly, daily):
        both = series.join(minutes, on="timestamp")
        assert both.height > 30
        assert ((both["price"] / both["traded"] - 1).abs()).median() < 0.005
    first_candle = minutes["timestamp"][0]
    assert hourly["timestamp"][0] <= first_candle - timedelta(days=60)
    assert daily["timestamp"][0] <= first_candle - timedelta(days=5 * 365 - 40 if coin == "solana" else 3000)


def test_hourly_points_end_with_the_last_day_that_has_a_daily_point(source: Source) -> None:
    for coin in ("bitcoin", "ethereum", "solana"):
        hourly, daily = frame(source.points(coin, "hourly")), frame(source.points(coin, "daily"))
        assert hourly["timestamp"][-1] < daily["timestamp"][-1] + timedelta(days=1)


def test_a_derived_hour_needs_its_day_and_24_hours_before() -> None:
    start = datetime(2025, 1, 1, tzinfo=UTC)
    stamps = pl.datetime_range(start, start + timedelta(hours=71), "1h", time_zone="UTC", eager=True).cast(pl.Datetime("us", "UTC"))
    hours = pl.DataFrame({"timestamp": stamps, "close": [105.0 + i for i in range(72)], "volume": [1.0] * 72})
    daily = pl.DataFrame(
        {
            "timestamp": [start + timedelta(days=1)],
            "price": [128.0],
            "market_cap": [1280.0],
            "total_volume": [1.0],
        },
        schema_overrides={"timestamp": pl.Datetime("us", "UTC")},
    )
    derived = derive_hourly(hours.filter(pl.col("timestamp") != start + timedelta(hours=26)), daily)
    # stamps of 2 January only; the missing hour 02:00-03:00 takes with it all whose last 24 h hold it
    assert derived["timestamp"].to_list() == [start + timedelta(days=1, hours=h) for h in range(3)]
    assert derived.row(0) == (start + timedelta(days=1), 128.0, 1280.0, 24 * 128.0)


def test_generated_data_repeats_by_its_seed_and_can_stand_beside_another_price() -> None:
    def one(**options: Any) -> pl.DataFrame:
        return frame(SyntheticSource(**options).candles("BTC-USD", "1m"))

    assert one(seed=1).equals(one(seed=1))
    assert not one(seed=1).equals(one(seed=2))
    end = datetime(2026, 1, 10, tzinfo=UTC)
    moved = SyntheticSource(start=end - timedelta(days=2), end=end, prices={"BTC-USD": 90_000.0})
    assert frame(moved.candles("BTC-USD", "1m"))["timestamp"][-1] == end - timedelta(minutes=1)
    assert abs(frame(moved.points("bitcoin", "hourly"))["price"][-1] / 90_000 - 1) < 0.2
    with pytest.raises(ValueError, match="no timezone"):
        SyntheticSource(start=datetime(2025, 1, 1), end=end)  # noqa: DTZ001


def test_null_fundamentals_stay_null(market_data_dir: Path | None, cloud: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stamp = datetime(2017, 4, 2, tzinfo=UTC)
    if market_data_dir is not None:
        monkeypatch.setattr(cloud.sandbox.coingecko, "source", FolderSource(market_data_dir))
    else:
        source = SyntheticSource()
        whole = frame(source.points("bitcoin", "daily"))
        source._frames["bitcoin", "daily"] = whole.with_columns(
            pl.when(pl.col("timestamp") == stamp).then(None).otherwise(pl.col("market_cap")).alias("market_cap")
        )
        monkeypatch.setattr(cloud.sandbox.coingecko, "source", source)
    asked = {"from": int(stamp.timestamp()), "to": int(stamp.timestamp()), "interval": "daily"}
    body = points(cloud, **asked).json()
    assert body["market_caps"] == [[int(stamp.timestamp()) * 1000, None]]
    assert body["prices"][0][1] > 0


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder of market data"):
        FolderSource(tmp_path)


def test_about_says_what_the_data_is(cloud: Any) -> None:
    about = cloud.get("/_sandbox/about").json()
    assert about["data"]["kind"] == "synthetic"
    assert "derived" in about["data"]["coingecko"]["hourly"]
    assert about["aws"]["spot_prices"]["g5.xlarge"] == 0.3
