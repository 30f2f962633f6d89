"""The exchange, CoinGecko and Telegram speak the real wire formats, over real data where it is at hand and over generated data."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import requests
from werkzeug.test import EnvironBuilder
from werkzeug.wrappers import Request, Response

from crpbot_lib.sandbox.coingecko import DEMO_KEY, PRO_KEY, CoinGecko
from crpbot_lib.sandbox.data import FolderSource, MixedSource, Source, derive_hourly, resample
from crpbot_lib.sandbox.exchange import Exchange, render
from crpbot_lib.sandbox.faults import Fault, Faults, RateLimit, Traffic
from crpbot_lib.sandbox.server import SandboxOptions, _MarketServer, _source
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


@pytest.mark.parametrize(
    ("plan", "headers", "status", "code"),
    [
        ("pro", {"x-cg-pro-api-key": PRO_KEY}, 200, None),
        ("pro", {"x-cg-pro-api-key": "wrong"}, 401, 10002),
        ("pro", {}, 401, 10002),
        ("pro", {"x-cg-demo-api-key": DEMO_KEY}, 400, 10011),
        ("demo", {"x-cg-demo-api-key": DEMO_KEY}, 200, None),
        ("demo", {"x-cg-demo-api-key": "wrong"}, 401, 10002),
        ("demo", {}, 401, 10002),
        ("demo", {"x-cg-pro-api-key": PRO_KEY}, 400, 10010),
        ("public", {}, 200, None),
        ("public", {"x-cg-pro-api-key": PRO_KEY}, 400, 10010),
    ],
)
def test_each_plan_takes_its_own_key_and_refuses_as_coingecko_does(
    cloud: Any, monkeypatch: pytest.MonkeyPatch, plan: str, headers: dict[str, str], status: int, code: int | None
) -> None:
    monkeypatch.setattr(cloud.sandbox.coingecko, "plan", plan)
    response = requests.get(f"{cloud.sandbox.control_url}/api/v3/coins/bitcoin", headers=headers, timeout=10)
    body = response.json()
    assert response.status_code == status
    assert body.get("error_code", body.get("status", {}).get("error_code")) == code


@pytest.mark.parametrize(("plan", "key"), [("pro", PRO_KEY), ("demo", DEMO_KEY), ("public", None)])
def test_a_client_s_environment_has_the_plan_and_its_key(
    cloud: Any, monkeypatch: pytest.MonkeyPatch, plan: Any, key: str | None
) -> None:
    monkeypatch.setattr(cloud.sandbox, "options", SandboxOptions(coingecko_plan=plan))
    env = cloud.sandbox.env()
    assert (env.get("CRPBOT_COINGECKO_PLAN", "pro"), env.get("CRPBOT_COINGECKO_API_KEY")) == (plan, key)


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


class Faulty:
    """Sets one fault at both markets: ``faulty({"status": 500})``."""

    def __init__(self, cloud: Any) -> None:
        self.cloud = cloud

    def __call__(self, fault: dict[str, Any]) -> None:
        assert self.cloud.post("/_sandbox/faults", {"exchange": fault, "coingecko": fault}).status_code == 200

    def candles(self) -> requests.Response:
        return candles(self.cloud)

    def points(self) -> requests.Response:
        return points(self.cloud)

    def injected(self) -> Any:
        return self.cloud.get("/_sandbox/faults").json()["injected"]


@pytest.fixture
def faulty(cloud: Any) -> Iterator[Faulty]:
    """Counts from zero; no fault and no limit is left behind."""
    cloud.sandbox.traffic.restart()
    yield Faulty(cloud)
    for what in ("faults", "rate_limits"):
        cloud.post(f"/_sandbox/{what}", {"exchange": None, "coingecko": None})


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


def test_a_fault_that_makes_no_sense_is_refused_and_nothing_is_changed(cloud: Any) -> None:
    for fault in ({"status": 200}, {"rate": 1}, {"empty": True, "truncate": True}, {"stall": 1, "html": True}):
        body = {"coingecko": {"status": 500}, "exchange": [{"status": 500}, fault]}
        assert cloud.post("/_sandbox/faults", body).status_code == 400
    assert cloud.post("/_sandbox/faults", {"nowhere": {"status": 500}}).status_code == 400
    assert cloud.get("/_sandbox/faults").json()["active"] == {}


def test_an_empty_answer_is_a_200_without_rows(faulty: Any) -> None:
    faulty({"empty": True})
    assert faulty.candles().json() == {"candles": []}
    assert faulty.points().json() == {"prices": [], "market_caps": [], "total_volumes": []}


def test_an_error_can_come_with_status_200(faulty: Any) -> None:
    faulty({"error_body": True})
    assert (faulty.candles().status_code, list(faulty.candles().json())) == (200, ["errors"])
    assert (faulty.points().status_code, faulty.points().json()) == (200, {"status": 500, "error": "Internal Server Error"})
    faulty({"error_body": {"error": "as told"}})
    assert faulty.candles().json() == {"error": "as told"}


def test_a_page_of_html_can_come_with_any_status(faulty: Any) -> None:
    faulty({"html": True})
    assert faulty.candles().status_code == 502
    faulty({"html": True, "status": 429, "retry_after": 3})
    for response in (faulty.candles(), faulty.points()):
        assert (response.status_code, response.headers["retry-after"]) == (429, "3")
        assert response.headers["Content-Type"].startswith("text/html")
        assert response.text.startswith("<html>")


def test_a_refusal_says_how_long_to_wait_where_the_api_does_or_the_fault_says(faulty: Any) -> None:
    faulty({"status": 429})
    assert "retry-after" not in faulty.candles().headers
    assert faulty.points().headers["retry-after"] == "1"
    faulty({"status": 429, "retry_after": 7})
    assert faulty.candles().headers["retry-after"] == faulty.points().headers["retry-after"] == "7"


def test_each_of_several_faults_hits_its_own_share_and_no_request_is_hit_twice() -> None:
    faults = Faults()
    shares = {"429": 0.1, "503": 0.03, "empty": 0.02, "truncate": 0.3}
    kinds: dict[str, Any] = {
        "429": {"status": 429},
        "503": {"status": 503},
        "empty": {"empty": True},
        "truncate": {"truncate": True},
    }
    faults.set("exchange", [Fault(**kinds[name], rate=rate) for name, rate in shares.items()])
    drawn = [faults.draw("exchange") for _ in range(50_000)]
    for name, rate in shares.items():
        assert faults.injected[f"exchange:{name}"] / len(drawn) == pytest.approx(rate, abs=0.005)
    assert sum(faults.injected.values()) == sum(fault is not None for fault in drawn)


def test_faults_come_in_their_order_as_each_has_hit_as_often_as_it_may() -> None:
    faults = Faults()
    faults.set("exchange", [Fault(status=500, times=2), Fault(empty=True, times=1)])
    assert [fault and fault.name for fault in (faults.draw("exchange") for _ in range(4))] == ["500", "500", "empty", None]
    faults.set("exchange", None)
    assert faults.draw("exchange") is None


# --- rate limits and what is counted ---


def test_a_rate_limit_is_a_token_bucket() -> None:
    clock = [0.0]
    traffic = Traffic({"exchange": RateLimit(per_second=10, burst=3)}, clock=lambda: clock[0])
    assert [traffic.admit("exchange") for _ in range(4)] == [True, True, True, False]
    clock[0] += 0.25
    assert [traffic.admit("exchange") for _ in range(3)] == [True, True, False]
    clock[0] += 60
    assert [traffic.admit("exchange") for _ in range(4)] == [True, True, True, False]
    assert all(traffic.admit("coingecko") for _ in range(100))
    said = traffic.describe()["exchange"]
    assert (said["requests"], said["limited"], said["seconds"], said["longest_idle"]) == (11, 3, 60.25, 60)


def test_an_empty_bucket_answers_429_as_the_api_does_and_counts_apart_from_faults(faulty: Any) -> None:
    injected = faulty.injected()
    limit = {"per_second": 0.001, "burst": 1}
    faulty.cloud.post("/_sandbox/rate_limits", {"exchange": limit, "coingecko": limit})
    assert (faulty.candles().status_code, faulty.points().status_code) == (200, 200)
    assert faulty.candles().json()["errors"][0]["id"] == "rate_limit_exceeded"
    assert faulty.points().json()["status"]["error_code"] == 429
    said = faulty.cloud.get("/_sandbox/about").json()["requests"]["exchange"]
    assert (said["requests"], said["limited"], said["limit"]) == (2, 1, limit)
    assert faulty.injected() == injected
    assert faulty.cloud.post("/_sandbox/rate_limits", {"exchange": None}).json() == {"exchange": None, "coingecko": limit}
    assert faulty.candles().status_code == 200


def test_counting_begins_anew_on_request(faulty: Any) -> None:
    faulty.candles()
    url = f"{faulty.cloud.sandbox.control_url}/_sandbox/requests"
    assert requests.delete(url, timeout=10).json()["exchange"]["requests"] == 1
    said = faulty.cloud.get("/_sandbox/requests").json()["exchange"]
    assert said == {"requests": 0, "limited": 0, "first": None, "last": None, "seconds": 0, "longest_idle": 0, "limit": None}


# --- connections ---


def test_a_connection_stays_open_and_is_closed_after_a_cut_answer(faulty: Any) -> None:
    path = f"{CANDLES.format('BTC-USD')}?start={NOON}&end={NOON}&granularity=ONE_MINUTE"
    connection = http.client.HTTPConnection(faulty.cloud.sandbox.control_url.removeprefix("http://"), timeout=10)
    for _ in range(2):
        connection.request("GET", path)
        assert len(json.loads(connection.getresponse().read())["candles"]) == 1
        assert connection.sock is not None
    faulty({"truncate": True})
    connection.request("GET", path)
    with pytest.raises(http.client.IncompleteRead):
        connection.getresponse().read()


def test_what_a_request_carries_is_read_even_where_nobody_asks_for_it(faulty: Any) -> None:
    connection = http.client.HTTPConnection(faulty.cloud.sandbox.control_url.removeprefix("http://"), timeout=10)
    connection.request("GET", "/_sandbox/telegram", body=b"GET /nowhere HTTP/1.1")
    assert connection.getresponse().read()
    connection.request("GET", "/_sandbox/telegram")
    assert connection.getresponse().status == 200


def talk(connection: http.client.HTTPConnection) -> bytes:
    connection.request("GET", "/")
    return connection.getresponse().read()


def test_no_client_goes_on_talking_to_a_stopped_server() -> None:
    server = _MarketServer("127.0.0.1", 0, lambda _: Response("still here"))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    assert talk(connection) == b"still here"
    server.shutdown()
    server.server_close()
    connection.auto_open = 0
    with pytest.raises((http.client.HTTPException, OSError)):
        talk(connection)


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
    assert about["aws"]["spot_prices"]["g5.xlarge"]["us-east-1a"] == 0.3


# --- venues ---

MONDAY = datetime(2025, 6, 2, tzinfo=UTC)


def minutes(start: datetime, count: int, price: float = 100.0) -> pl.DataFrame:
    """Candles of 1 minute that rise by one each."""
    stamps = [start + timedelta(minutes=i) for i in range(count)]
    opens = [price + i for i in range(count)]
    return pl.DataFrame(
        {
            "timestamp": pl.Series(stamps, dtype=pl.Datetime("us", "UTC")),
            "open": opens,
            "high": [p + 2 for p in opens],
            "low": [p - 2 for p in opens],
            "close": [p + 1 for p in opens],
            "volume": [1.0] * count,
        }
    )


def recorded(start: datetime, count: int, volume: float) -> pl.DataFrame:
    """Candles of 5 minutes that no minutes add up to."""
    return resample(minutes(start, 5 * count), "5m").with_columns(pl.lit(volume, pl.Float64).alias("volume"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two venues: ``thin`` with an hour of 1m candles of BTC, and two recordings of 5m; ``wide`` with 5m candles only."""

    def write(path: str, rows: pl.DataFrame) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        rows.write_parquet(tmp_path / path)

    (tmp_path / "daily").mkdir()
    write("candles_1m/SOL-USD.parquet", minutes(MONDAY, 60))
    write("candles_1m_windows/thin/BTC-USD.parquet", minutes(MONDAY, 60))
    write("candles_mtf/thin/BTC-USD_5m.parquet", recorded(MONDAY + timedelta(minutes=10), 2, volume=77))
    write("candles_mtf/thin/BTC-USD_5m_later.parquet", recorded(MONDAY + timedelta(minutes=30), 1, volume=88))
    write("candles_mtf/wide/ETH-USD_5m.parquet", recorded(MONDAY, 3, volume=5))
    return tmp_path


def test_a_venue_is_served_as_recorded_and_resampled_where_it_is_not(folder: Path) -> None:
    source = FolderSource(folder, "candles_1m_windows/thin")
    assert frame(source.candles("BTC-USD", "1m")).equals(minutes(MONDAY, 60))
    assert frame(source.candles("BTC-USD", "5m"))["volume"].to_list() == [5, 5, 77, 77, 5, 5, 88, 5, 5, 5, 5, 5]
    assert frame(source.candles("BTC-USD", "1h")).row(0)[1:] == (100, 161, 98, 160, 60)
    said = source.describe()["candles"]
    assert said["5m"]["BTC-USD"] == (
        "recorded in candles_mtf/thin/BTC-USD_5m.parquet, candles_mtf/thin/BTC-USD_5m_later.parquet; "
        "resampled from 1m where there is no recording"
    )
    assert said["1h"] == {"BTC-USD": "resampled from 1m"}


def test_only_the_venue_s_own_symbols_exist(folder: Path) -> None:
    source = FolderSource(folder, "candles_1m_windows/thin")
    assert source.symbols == ("BTC-USD",)
    assert source.candles("SOL-USD", "1m") is None
    assert ask(Exchange(source), product="SOL-USD").status_code == 404


def test_without_1m_candles_only_what_was_recorded_is_served(folder: Path) -> None:
    source = FolderSource(folder, "candles_mtf/wide")
    assert frame(source.candles("ETH-USD", "5m")).height == 3
    for timeframe in ("1m", "15m", "1h"):
        assert frame(source.candles("ETH-USD", timeframe)).is_empty()
    exchange = Exchange(source)
    assert ask(exchange, product="ETH-USD").json == {"candles": []}
    assert exchange.product("ETH-USD").json["price"] == "115"
    assert source.bounds() == (MONDAY, MONDAY + timedelta(minutes=15))


def test_two_recordings_of_one_series_are_joined_where_they_agree(folder: Path) -> None:
    again = folder / "candles_mtf/wide/ETH-USD_5m_again.parquet"
    recorded(MONDAY, 4, volume=5).write_parquet(again)
    assert frame(FolderSource(folder, "candles_mtf/wide").candles("ETH-USD", "5m")).equals(recorded(MONDAY, 4, volume=5))
    recorded(MONDAY, 4, volume=6).write_parquet(again)
    with pytest.raises(ValueError, match="ETH-USD 5m of candles_mtf/wide: two recordings say different things of 2025-06-02 00:00"):
        FolderSource(folder, "candles_mtf/wide").candles("ETH-USD", "5m")


@pytest.mark.parametrize("venue", ["candles_1m_windows/none", "candles_1m_windows", "../elsewhere", "daily"])
def test_a_venue_that_is_none_is_refused_with_those_there_are(folder: Path, venue: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"candles_1m, candles_1m_windows/thin, candles_mtf/thin, candles_mtf/wide"):
        FolderSource(folder, venue)


def test_every_real_file_is_served_as_it_is(market_data_dir: Path | None) -> None:
    if market_data_dir is None:
        pytest.skip("no folder of real market data")
    files = sorted(market_data_dir.glob("candles*/**/*.parquet"))
    assert len(files) > 50
    for file in files:
        symbol, width = [*file.stem.split("_"), "1m"][:2]
        kept = pl.read_parquet(file)
        served = frame(FolderSource(market_data_dir, str(file.parent.relative_to(market_data_dir))).candles(symbol, width))
        inside = served.filter(pl.col("timestamp").is_between(kept["timestamp"][0], kept["timestamp"][-1]))
        assert inside.equals(kept.select(inside.columns).cast(dict(inside.schema)).sort("timestamp")), file


def test_recordings_of_a_venue_are_found_where_they_are_kept(market_data_dir: Path | None) -> None:
    if market_data_dir is None:
        pytest.skip("no folder of real market data")
    for venue, width, found in (
        ("candles_1m_windows/binance_spot_2023-03", "1h", "candles_mtf/binance_spot_2023-03/ETH-USD_1h.parquet"),
        ("candles_1m_spot", "15m", "candles_mtf/binance_spot_2025-05/ETH-USD_15m.parquet"),
        ("candles_1m", "5m", "candles_mtf/binance_perp_2025-05/ETH-USD_5m.parquet"),
    ):
        assert found in FolderSource(market_data_dir, venue).describe()["candles"][width]["ETH-USD"]


# --- left out, and beside it ---


def test_minutes_are_left_out_by_share_and_wider_candles_know_nothing_of_them(folder: Path) -> None:
    whole = minutes(MONDAY, 60)
    source = FolderSource(folder, "candles_1m_windows/thin", omitted=0.4, seed=5)
    left = frame(source.candles("BTC-USD", "1m"))
    assert 20 < left.height < 50
    assert left.join(whole, on=whole.columns, how="semi").height == left.height
    assert (left["timestamp"][0], left["timestamp"][-1]) == (whole["timestamp"][0], whole["timestamp"][-1])
    assert frame(source.candles("BTC-USD", "5m")).equals(resample(left, "5m"))
    assert left.equals(frame(FolderSource(folder, "candles_1m_windows/thin", omitted=0.4, seed=5).candles("BTC-USD", "1m")))
    assert "0.4 of the 1m candles" in source.describe()["candles"]["omitted"]


def test_generated_minutes_can_be_left_out_as_well() -> None:
    whole, left = (frame(SyntheticSource(omitted=share).candles("BTC-USD", "1m")) for share in (0.0, 0.1))
    assert left.height / whole.height == pytest.approx(0.9, abs=0.01)
    assert left.join(whole, on=whole.columns, how="semi").height == left.height


def test_symbols_can_be_generated_beside_real_ones_and_say_so(folder: Path) -> None:
    days = minutes(MONDAY, 2 * 1440)
    days.write_parquet(folder / "candles_1m_windows/thin/BTC-USD.parquet")
    options = SandboxOptions(data_dir=folder, venue="candles_1m_windows/thin", synthetic_symbols=("SOL-USD", "DOGE-USD"))
    source = _source(options)
    for symbol in options.synthetic_symbols:
        generated = frame(source.candles(symbol, "1m"))
        assert (generated["timestamp"][0], generated["timestamp"][-1]) == (days["timestamp"][0], days["timestamp"][-1])
    kinds = {name: source.kind_of(name) for name in ("BTC-USD", "SOL-USD", "DOGE-USD", "bitcoin", "solana", "doge")}
    assert kinds == {n: "real" if n in ("BTC-USD", "bitcoin") else "synthetic" for n in kinds}
    assert source.describe()["kind"] == "mixed"
    assert list(source.describe()["synthetic"]["candles"]["spans"]) == ["SOL-USD", "DOGE-USD"]
    assert {s: ask(Exchange(source), product=s).headers["X-Sandbox-Data"] for s in ("BTC-USD", "SOL-USD")} == {
        "BTC-USD": "real",
        "SOL-USD": "synthetic",
    }
    assert source.candles("ETH-USD", "1m") is None
    assert frame(source.points("solana", "hourly")).height > 24


def test_a_real_symbol_cannot_be_generated_as_well(folder: Path) -> None:
    with pytest.raises(ValueError, match="BTC-USD of candles_1m_windows/thin is real"):
        MixedSource(FolderSource(folder, "candles_1m_windows/thin"), SyntheticSource(), ["BTC-USD"])


def test_a_venue_of_no_folder_is_refused() -> None:
    with pytest.raises(ValueError, match="give data_dir as well"):
        _source(SandboxOptions(venue="candles_1m_spot"))


# --- the present ---


def ask(exchange: Exchange, *, product: str = "BTC-USD", granularity: str = "ONE_MINUTE", **params: Any) -> Any:
    begin = int(MONDAY.timestamp())
    asked = {"start": begin, "end": begin + 59 * 60, "granularity": granularity, **params}
    return exchange.candles(product, Request(EnvironBuilder(query_string=asked).get_environ()))


def test_nothing_later_than_the_present_is_served_and_the_open_candle_is_not_yet_what_it_will_be(folder: Path) -> None:
    source = FolderSource(folder, "candles_1m_windows/thin")
    exchange = Exchange(source, MONDAY + timedelta(minutes=31, seconds=15))
    newest, closed = ask(exchange).json["candles"][:2]
    assert newest == {
        "start": str(int(MONDAY.timestamp()) + 31 * 60),
        **{"low": "131", "high": "131", "open": "131", "close": "131", "volume": "0.25"},
    }
    assert (closed["close"], closed["volume"]) == ("131", "1")
    assert len(ask(exchange, granularity="FIFTEEN_MINUTE").json["candles"]) == 3
    assert exchange.product("BTC-USD").json["price"] == "131"


def test_numbers_are_written_in_full_and_read_back_as_they_were() -> None:
    odd = [1e-9, 1.5e-5, 0.1, 1 / 3, 5.0, 105_000.0, 2.0**53 + 2, 1.25e21, 0.0]
    rows = minutes(MONDAY, len(odd)).with_columns(pl.Series("volume", odd))
    texts = [json.loads(row)["volume"] for row in render(rows)]
    assert [float(text) for text in texts] == odd
    assert texts == [np.format_float_positional(value, trim="-") for value in odd]


# --- CoinGecko's plans and ways ---

JUNE = datetime(2025, 6, 20, 10, 7, 30, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def generated() -> SyntheticSource:
    return SyntheticSource(seed=3)


def chart(coingecko: CoinGecko, begin: datetime, end: datetime, **params: Any) -> Any:
    """The answer to a range of bitcoin."""
    asked = {"vs_currency": "usd", "from": begin.timestamp(), "to": end.timestamp(), **params}
    return coingecko.market_chart_range("bitcoin", Request(EnvironBuilder(query_string=asked).get_environ()))


def stamps(response: Any, name: str = "prices") -> list[datetime]:
    return [datetime.fromtimestamp(stamp / 1000, UTC) for stamp, _ in response.json[name]]


@pytest.mark.parametrize("plan", ["demo", "public"])
def test_the_free_plans_reach_back_a_year_and_say_so_in_coingecko_s_words(
    generated: Source, plan: Any, api_samples: Path | None
) -> None:
    free, paid = (CoinGecko(generated, p, now=JUNE) for p in (plan, "pro"))
    assert chart(free, JUNE - 365 * DAY, JUNE).status_code == 200
    refused = chart(free, JUNE - 365 * DAY - timedelta(seconds=1), JUNE)
    assert refused.status_code == 401
    said = refused.json["error"]["status"]
    assert said["error_code"] == 10012
    if api_samples:
        sample = json.loads((api_samples / "coingecko_401_over_365_days_10012.json").read_text())["body"]["error"]["status"]
        assert (said["error_message"], said.keys()) == (sample["error_message"], sample.keys())
    assert len(stamps(chart(paid, JUNE - 1000 * DAY, JUNE))) == 1000


@pytest.mark.parametrize(
    ("begin", "end", "interval", "step"),
    [
        (JUNE - DAY, JUNE, None, timedelta(minutes=5)),
        (JUNE - timedelta(hours=3), JUNE, None, timedelta(minutes=5)),
        (JUNE - DAY, JUNE, "hourly", timedelta(hours=1)),
        (JUNE - 9 * DAY, JUNE - 8 * DAY, None, timedelta(hours=1)),
        (JUNE - 2 * DAY, JUNE, None, timedelta(hours=1)),
        (JUNE - 90 * DAY, JUNE, None, timedelta(hours=1)),
        (JUNE - 90 * DAY - timedelta(hours=1), JUNE, None, DAY),
        (JUNE - 2 * DAY, JUNE, "daily", DAY),
    ],
)
def test_the_range_or_the_interval_decides_how_far_points_are_apart(
    generated: Source, begin: datetime, end: datetime, interval: str | None, step: timedelta
) -> None:
    params = {} if interval is None else {"interval": interval}
    response = chart(CoinGecko(generated, now=JUNE), begin, end, **params)
    at = stamps(response)
    assert {b - a for a, b in pairwise(at)} == {step}
    assert begin <= at[0] < begin + step
    assert end - step < at[-1] <= end
    assert ("derived" in response.headers["X-Sandbox-Data"]) == (step != DAY)


def test_points_between_two_hours_lie_on_the_line_between_them(generated: Source) -> None:
    coingecko = CoinGecko(generated, now=JUNE)
    hour = JUNE.replace(minute=0, second=0) - timedelta(hours=2)
    fine = chart(coingecko, hour, hour + timedelta(hours=1)).json["prices"]
    hourly = dict(chart(coingecko, hour, hour + timedelta(hours=1), interval="hourly").json["prices"])
    first, last = fine[0], fine[-1]
    assert [hourly[first[0]], hourly[last[0]]] == [first[1], last[1]]
    assert fine[3][1] == pytest.approx(first[1] + (last[1] - first[1]) / 4)


def test_intervals_that_a_plan_does_not_have_are_refused(generated: Source) -> None:
    coingecko = CoinGecko(generated, now=JUNE)
    fine = chart(coingecko, JUNE - DAY, JUNE, interval="5m")
    assert (fine.status_code, fine.json["status"]["error_code"]) == (401, 10005)
    assert chart(coingecko, JUNE - 101 * DAY, JUNE, interval="hourly").status_code == 422
    assert chart(coingecko, JUNE - DAY, JUNE, interval="weekly").status_code == 422


@pytest.mark.parametrize("interval", ["hourly", "daily"])
def test_messy_answers_hold_the_same_points_as_clean_ones_and_what_real_answers_add(generated: Source, interval: str) -> None:
    begin, end = JUNE - 80 * DAY, JUNE + timedelta(hours=1)
    clean, messy = (chart(CoinGecko(generated, now=JUNE, messy=flag), begin, end, interval=interval) for flag in (False, True))
    step = timedelta(hours=1) if interval == "hourly" else DAY
    pairs = [(datetime.fromtimestamp(stamp / 1000, UTC), price) for stamp, price in messy.json["prices"]]
    assert pairs[-1] == (JUNE, pairs[-2][1])
    backwards = [i for i in range(1, len(pairs)) if pairs[i][0] < pairs[i - 1][0]]
    assert len(backwards) == 1
    series = [pair for i, pair in enumerate(pairs[:-1]) if i != backwards[0]]
    midnight = datetime(1970, 1, 1, tzinfo=UTC)
    floored = [(at - (at - midnight) % step, price) for at, price in series]
    assert floored == [(at, price) for at, (_, price) in zip(stamps(clean), clean.json["prices"], strict=True)]
    off_grid = sum(a != b for (a, _), (b, _) in zip(series, floored, strict=True))
    assert 0 < off_grid <= len(series)
    if interval == "hourly":
        for name in ("market_caps", "total_volumes"):
            assert 0 < sum(value is None for _, value in messy.json[name]) < len(series) / 20
    assert "messy" in messy.headers["X-Sandbox-Data"]


def test_a_messy_point_is_the_same_in_every_answer(generated: Source) -> None:
    coingecko = CoinGecko(generated, now=JUNE, messy=True)
    middle = JUNE - 10 * DAY
    one, other = (set(stamps(chart(coingecko, middle - a * DAY, middle + b * DAY))) for a, b in ((8, 5), (5, 8)))
    inside = {at for at in one | other if middle - 4 * DAY < at < middle + 4 * DAY}
    # each answer repeats one stamp of its own
    assert len(inside - (one & other)) <= 2


def test_the_all_time_high_is_that_of_the_past(generated: Source) -> None:
    prices = frame(generated.points("bitcoin", "daily"))
    then = prices["timestamp"][200]
    body = CoinGecko(generated, now=then).coin("bitcoin").json
    assert body["market_data"]["ath"]["usd"] == prices["price"][:201].max()
