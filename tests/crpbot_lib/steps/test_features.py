"""Planning, building, gating and verifying features in a lake, and the commands that do it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from crpbot_lib.cli.features import app
from crpbot_lib.config import FeatureSettings, Settings
from crpbot_lib.features import FeatureError, catalog
from crpbot_lib.lake import Lake, UnreadableError, keys
from crpbot_lib.steps import features
from crpbot_lib.steps.features import (
    CoinGeckoPlaceholderError,
    FeatureMismatchError,
    GateError,
    MissingInputError,
    MultiTimeframeMissingError,
    PlaceholderError,
    build_features,
    gate_features,
    plan_features,
    verify_features,
)

DAY, MINUTE = timedelta(days=1), timedelta(minutes=1)
START, END = date(2025, 5, 20), date(2025, 5, 23)
SYMBOLS = ["BTC-USD", "ETH-USD", "SOL-USD"]


def _at(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


def _candles(first: date, last: date, seed: int) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    n = (last - first).days * 1440
    path = 100 * np.exp(np.concatenate([[0.0], rng.normal(0, 5e-4, n).cumsum()]))
    opens, closes = path[:-1], path[1:]
    return pl.DataFrame(
        {
            "timestamp": pl.datetime_range(_at(first), _at(last) - MINUTE, "1m", time_unit="us", eager=True),
            "open": opens,
            "high": np.maximum(opens, closes) * 1.0001,
            "low": np.minimum(opens, closes) * 0.9999,
            "close": closes,
            "volume": rng.lognormal(1, 1, n),
        }
    )


def _points(first: date, end: date, every: timedelta, lag: timedelta, seed: int) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    times = pl.datetime_range(_at(first), _at(end) - timedelta(seconds=1), every, time_unit="us", eager=True)
    price = 100 * np.exp(rng.normal(0, 0.01, len(times)).cumsum())
    return pl.DataFrame({"timestamp": times}).with_columns(
        available_at=pl.col("timestamp") + lag,
        price=pl.Series(price),
        market_cap=pl.Series(price * 1e9),
        total_volume=pl.Series(rng.lognormal(20, 0.3, len(times))),
    )


def _days(frame: pl.DataFrame) -> list[pl.DataFrame]:
    return frame.with_columns(day=pl.col("timestamp").dt.date()).partition_by("day", include_key=False)


def _fill(lake: Lake, settings: Settings) -> None:
    """Partitions as the ingest steps write them, for START to END and what has to be read before."""
    for seed, symbol in enumerate(settings.symbols):
        minutes = _candles(START - DAY, END, seed)
        widths = ("1m", "5m", "15m", "1h") if "multi_timeframe" in symbol.feature_groups else ("1m",)
        for width in widths:
            frame = minutes.group_by(pl.col("timestamp").dt.truncate(width), maintain_order=True).agg(
                pl.col("open").first(), pl.col("high").max(), pl.col("low").min(), pl.col("close").last(), pl.col("volume").sum()
            )
            for part in _days(frame):
                lake.write_frame(keys.candles(width, symbol.name, part["timestamp"][0].date()), part)
        hourly = _points(START - 17 * DAY, END, timedelta(hours=1), timedelta(minutes=5), seed)
        for part in _days(hourly):
            lake.write_frame(keys.coingecko("hourly", symbol.coin, part["timestamp"][0].date()), part)
        daily = _points(symbol.coin_listed, END, DAY, timedelta(minutes=35), seed)
        lake.write_frame(keys.coingecko("daily", symbol.coin, END - DAY), daily)


@pytest.fixture
def settings() -> Settings:
    return Settings()


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lake")
    _fill(Lake(folder.as_uri()), Settings())
    return folder


@pytest.fixture
def lake(filled: Path, tmp_path: Path) -> Lake:
    """A copy of its own of the filled lake."""
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    return Lake(tmp_path.as_uri())


def _build_all(settings: Settings, lake: Lake) -> dict[str, Any]:
    plan = plan_features(settings, lake, SYMBOLS, START, END)
    for symbol in SYMBOLS:
        build_features(settings, lake, plan, symbol)
    return plan


def _rewrite(lake: Lake, plan: dict[str, Any], symbol: str, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    key = keys.features(plan["version"], symbol)
    lake.write_frame(key, change(lake.read_frame(key)))


def test_three_symbols_pass_the_gate_with_73_54_73(settings: Settings, lake: Lake) -> None:
    plan = _build_all(settings, lake)
    manifest = gate_features(settings, lake, plan)
    assert [manifest["symbols"][s]["features"] for s in SYMBOLS] == [73, 54, 73]
    assert lake.read_json(keys.features_manifest(plan["version"])) == manifest
    assert lake.read_json(keys.FEATURES_LATEST)["version"] == plan["version"]
    for symbol in SYMBOLS:
        entry, frame = manifest["symbols"][symbol], lake.read_frame(keys.features(plan["version"], symbol))
        assert dict(frame.schema) == catalog.schema(settings.symbol(symbol).feature_groups)
        assert entry["names"] == catalog.feature_names(symbol)
        assert entry["hash"] == catalog.catalog_hash(settings.symbol(symbol).feature_groups)
        assert entry["rows"] == frame.height == 3 * 1440
        assert (frame["timestamp"][0], frame["timestamp"][-1]) == (_at(START), _at(END) - MINUTE)
    assert verify_features(settings, lake) == manifest


def test_building_again_writes_the_same_bytes(settings: Settings, lake: Lake) -> None:
    plan = _build_all(settings, lake)
    gate_features(settings, lake, plan)
    first = {key: lake.read(key) for key in lake.keys("features/")}
    again = plan_features(settings, lake, SYMBOLS, START, END)
    assert again == plan
    for symbol in reversed(SYMBOLS):
        build_features(settings, lake, json.loads(json.dumps(again)), symbol)
    gate_features(settings, lake, again)
    assert {key: lake.read(key) for key in lake.keys("features/")} == first


def test_the_version_names_catalog_interval_and_inputs(settings: Settings, lake: Lake) -> None:
    version = plan_features(settings, lake, SYMBOLS, START, END)["version"]
    assert plan_features(settings, lake, SYMBOLS[::-1], START, END)["version"] == version
    assert plan_features(settings, lake, SYMBOLS[:2], START, END)["version"] != version
    key = keys.candles("15m", "SOL-USD", START)
    frame = lake.read_frame(key)
    lake.write_frame(key, frame.with_columns(pl.col("volume") + 1))
    assert plan_features(settings, lake, SYMBOLS, START, END)["version"] != version


def test_inputs_that_changed_after_the_plan_are_refused(settings: Settings, lake: Lake) -> None:
    plan = plan_features(settings, lake, ["ETH-USD"], START, END)
    key = keys.candles("1m", "ETH-USD", START)
    frame = lake.read_frame(key)
    lake.write_frame(key, frame.with_columns(pl.col("volume") + 1))
    with pytest.raises(FeatureError, match="input partitions have changed since version"):
        build_features(settings, lake, plan, "ETH-USD")


def test_a_missing_partition_names_itself_and_the_command(settings: Settings, lake: Lake, tmp_path: Path) -> None:
    (tmp_path / keys.candles("5m", "BTC-USD", START)).unlink()
    (tmp_path / keys.coingecko("hourly", "bitcoin", START - 17 * DAY)).unlink()
    with pytest.raises(MissingInputError) as caught:
        plan_features(settings, lake, ["BTC-USD"], START, END)
    text = str(caught.value)
    assert "2 of" in text
    assert "raw/candles/5m/symbol=BTC-USD/date=2025-05-20" in text
    assert "crpbot fetch candles --symbol BTC-USD --timeframe 5m --start 2025-05-20 --end 2025-05-21" in text
    assert "crpbot fetch coingecko --coin bitcoin --start 2025-05-03 --end 2025-05-04" in text


def test_eth_needs_no_wider_candles(settings: Settings, lake: Lake) -> None:
    assert not lake.exists(keys.candles("5m", "ETH-USD", START))
    assert plan_features(settings, lake, ["ETH-USD"], START, END)["inputs"] == 4 + 20 + 1


@pytest.mark.parametrize(("start", "end"), [(END, START), (START, START)])
def test_an_empty_interval_is_refused(settings: Settings, lake: Lake, start: date, end: date) -> None:
    with pytest.raises(FeatureError, match="is empty"):
        plan_features(settings, lake, SYMBOLS, start, end)


def test_a_history_that_begins_late_needs_dated_records_until_it_begins(lake: Lake) -> None:
    key = keys.coingecko("daily", "solana", END - DAY)
    lake.write_frame(key, lake.read_frame(key).filter(pl.col("timestamp") >= _at(START - 60 * DAY)))
    plan = plan_features(Settings(), lake, ["SOL-USD"], START, END)
    with pytest.raises(FeatureError, match="the daily history of solana begins on 2025-03-21, the coin was listed on 2020-04-11"):
        build_features(Settings(), lake, plan, "SOL-USD")
    record: dict[str, Any] = {"all_time_highs": ((293.31, datetime(2025, 1, 19, tzinfo=UTC)),)}

    def settings(entry: dict[str, Any]) -> Settings:
        return Settings(symbols=tuple(s.model_copy(update=entry) if s.name == "SOL-USD" else s for s in Settings().symbols))

    plan = plan_features(settings(record), lake, ["SOL-USD"], START, END)
    with pytest.raises(FeatureError, match=r"`all_time_highs` are complete until 2025-01-19 only, .* to 2025-03-21 or later"):
        build_features(settings(record), lake, plan, "SOL-USD")
    recorded = settings(record | {"all_time_highs_until": date(2025, 3, 21)})
    plan = plan_features(recorded, lake, ["SOL-USD"], START, END)
    build_features(recorded, lake, plan, "SOL-USD")
    assert lake.read_frame(keys.features(plan["version"], "SOL-USD"))["days_since_ath"][-1] == pytest.approx(123)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[: len(data) // 2], "is not a readable parquet file"),
        (lambda _: b"", "is not a readable parquet file"),
        (
            lambda data: _bytes(pl.read_parquet(BytesIO(data)).rename({"close": "last"})),
            "has other columns than a partition: timestamp .*, last Float64, volume Float64",
        ),
        (lambda data: _bytes(pl.read_parquet(BytesIO(data)).drop("volume")), "has other columns than a partition: timestamp .*"),
    ],
    ids=["half", "empty", "renamed", "fewer"],
)
@pytest.mark.parametrize("day", [START - DAY, START + DAY], ids=["first", "inner"])
def test_a_spoilt_partition_is_named(
    settings: Settings, lake: Lake, spoil: Callable[[bytes], bytes], message: str, day: date
) -> None:
    key = keys.candles("1m", "ETH-USD", day)
    lake.write(key, spoil(lake.read(key)))
    plan = plan_features(settings, lake, ["ETH-USD"], START, END)
    with pytest.raises(UnreadableError, match=f"{re.escape(key)} {message}.*; delete it and fetch it again"):
        build_features(settings, lake, plan, "ETH-USD")
    assert not lake.keys("features/")


@pytest.mark.parametrize(
    ("series", "change", "message"),
    [
        (
            "hourly",
            {"price": 0.0, "market_cap": 0.0, "total_volume": 0.0},
            "price of all .* hourly .* is 0; is the API key missing",
        ),
        ("daily", {"price": 0.0, "market_cap": 0.0, "total_volume": 0.0}, "price of all .* daily .* is 0; is the API key missing"),
        ("daily", {"market_cap": 3.1e11}, r"market_cap of all .* daily .* is 3.1e\+11; is it one snapshot in place of the history"),
        ("hourly", {"total_volume": 0.0}, "total_volume of all .* hourly .* is 0; is the API key missing, or on the wrong plan"),
    ],
    ids=["hourly zero", "daily zero", "daily snapshot", "hourly volume"],
)
def test_constant_points_are_named_before_their_features_are_unknown(
    settings: Settings, lake: Lake, series: str, change: dict[str, float], message: str
) -> None:
    for key in lake.keys(f"raw/coingecko/{series}/coin=ethereum/"):
        lake.write_frame(key, lake.read_frame(key).with_columns(**{name: pl.lit(value) for name, value in change.items()}))
    plan = plan_features(settings, lake, ["ETH-USD"], START, END)
    with pytest.raises(CoinGeckoPlaceholderError, match=f"ETH-USD: {message}"):
        build_features(settings, lake, plan, "ETH-USD")
    assert not lake.keys("features/")


def _bytes(frame: pl.DataFrame) -> bytes:
    buffer = BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()


def test_a_hole_that_spans_the_interval_s_first_midnight_is_listed_from_there(settings: Settings, lake: Lake) -> None:
    """Its filled minutes are rows like others of that kind, and must not become anchors of a training window."""
    times, midnight = pl.col("timestamp"), _at(START)
    for day in (START - DAY, START):
        key = keys.candles("1m", "ETH-USD", day)
        missing = times.is_between(midnight - 3 * MINUTE, midnight + 4 * MINUTE)
        lake.write_frame(key, lake.read_frame(key).filter(~missing))
    plan = plan_features(settings, lake, ["ETH-USD"], START, END)
    build_features(settings, lake, plan, "ETH-USD")
    assert lake.read_json(keys.features_sidecar(plan["version"], "ETH-USD"))["filled"] == [["2025-05-20T00:00Z", 5]]


def test_the_sidecar_lists_filled_minutes_and_outages(settings: Settings, lake: Lake) -> None:
    day = START + DAY
    silent, gone = _at(day) + timedelta(hours=2), _at(day) + timedelta(hours=5)
    key = keys.candles("1m", "ETH-USD", day)
    times = pl.col("timestamp")
    frame = lake.read_frame(key)
    lake.write_frame(
        key, frame.filter(~times.is_between(silent, silent + MINUTE), ~times.is_between(gone, gone + timedelta(minutes=59)))
    )
    plan = plan_features(settings, lake, ["ETH-USD"], START, END)
    built = build_features(settings, lake, plan, "ETH-USD")
    sidecar = lake.read_json(keys.features_sidecar(plan["version"], "ETH-USD"))
    assert sidecar["filled"] == [["2025-05-21T02:00Z", 2]]
    assert sidecar["outages"] == [["2025-05-21T05:00Z", 60]]
    assert (built["filled"], built["outages"]) == (2, 1)
    assert sidecar["dropped"] == {"cold": catalog.SEGMENT_WARM_UP, "unknown": 0, "unknown_by_feature": {}}
    assert built["rows"] == 3 * 1440 - 60 - catalog.SEGMENT_WARM_UP
    gate_features(settings, lake, plan)


def test_the_number_of_threads_does_not_show_in_the_bytes(settings: Settings, lake: Lake) -> None:
    plan = plan_features(settings, lake, ["BTC-USD"], START, END)
    code = (
        "import json, sys; from crpbot_lib.config import Settings; from crpbot_lib.lake import Lake; "
        "from crpbot_lib.steps.features import build_features; "
        "print(build_features(Settings(), Lake(sys.argv[1]), json.loads(sys.argv[2]), 'BTC-USD')['sha256'])"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", code, lake.root, json.dumps(plan)],
            env={**os.environ, "POLARS_MAX_THREADS": threads},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for threads in ("1", "2", "5")
    }
    assert len(hashes) == 1


def test_a_gated_version_is_not_replaced_by_other_bytes(settings: Settings, lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a build with other libraries may give them."""
    plan = plan_features(settings, lake, ["ETH-USD"], START, END)
    build_features(settings, lake, plan, "ETH-USD")
    gate_features(settings, lake, plan)
    gated = {key: lake.read(key) for key in lake.keys("features/")}
    compute = features.engineer

    def otherwise(*arguments: Any, **more: Any) -> Any:
        built = compute(*arguments, **more)
        return replace(built, frame=built.frame.with_columns(pl.col("rsi") * (1 + 1e-6)))

    monkeypatch.setattr(features, "engineer", otherwise)
    with pytest.raises(FeatureError, match=rf"ETH-USD: features {plan['version']} have passed the gate with .* is left as it is"):
        build_features(settings, lake, plan, "ETH-USD")
    assert {key: lake.read(key) for key in lake.keys("features/")} == gated
    verify_features(settings, lake)


def test_hourly_points_are_asked_for_from_the_listing_on(lake: Lake) -> None:
    """As `ensure_coverage` fetches them: there are none before it."""
    young = Settings().symbol("ETH-USD").model_copy(update={"coin_listed": START - 5 * DAY})
    inputs = plan_features(Settings(symbols=(young,)), lake, ["ETH-USD"], START, END)["inputs"]
    assert inputs == 4 + (5 + 3) + 1


def _zero_but_first(name: str, first: float | None) -> pl.Expr:
    return pl.when(pl.int_range(pl.len()) == 0).then(pl.lit(first, pl.Float32)).otherwise(pl.lit(0.0, pl.Float32)).alias(name)


class TestGate:
    """The difference is readable, names the symbol, and nothing is published."""

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (
                lambda f: f.drop("rsi"),
                FeatureMismatchError,
                "BTC-USD: 72 numeric features, the catalog has 73 .feature mismatch.\n.*missing: rsi",
            ),
            (
                lambda f: f.drop("5m_open", "1h_close"),
                MultiTimeframeMissingError,
                "multi-TF features missing: 5m_open, 1h_close.*71 numeric features, the catalog has 73",
            ),
            (
                lambda f: f.with_columns(filled=pl.lit(1.0)),
                FeatureMismatchError,
                "74 numeric features.*\n.*not in the catalog: filled",
            ),
            (
                lambda f: f.select(*catalog.EXCLUDED, "session_london", "session_tokyo", pl.col(f.columns[10:])),
                FeatureMismatchError,
                "the order differs from column 8 on: session_london, the catalog has session_tokyo",
            ),
            (lambda f: f.with_columns(pl.col("atr").cast(pl.Float64)), FeatureMismatchError, "atr is Float64, expected Float32"),
            (
                lambda f: f.with_columns(pl.lit(0.0, pl.Float32).alias("rsi_1h")),
                CoinGeckoPlaceholderError,
                "CoinGecko features all zero: rsi_1h; is the API key",
            ),
            (
                lambda f: f.with_columns(pl.lit(9e11, pl.Float32).alias("volume_1h_ma")),
                CoinGeckoPlaceholderError,
                r"CoinGecko features constant from .*: volume_1h_ma = 9e\+11; is it one snapshot",
            ),
            (
                lambda f: f.with_columns(pl.lit(50.0, pl.Float32).alias("rsi")),
                PlaceholderError,
                "constant from .* as only a placeholder is: rsi = 50",
            ),
            (
                lambda f: f.with_columns(_zero_but_first("rsi_1h", None)),
                CoinGeckoPlaceholderError,
                "nulls: rsi_1h 1.*CoinGecko features all zero: rsi_1h",
            ),
            (
                lambda f: f.with_columns(_zero_but_first("rsi_1h", float("nan"))),
                CoinGeckoPlaceholderError,
                "not finite: rsi_1h.*CoinGecko features all zero: rsi_1h",
            ),
            (
                lambda f: f.drop("5m_open").with_columns(pl.lit(0.0, pl.Float32).alias("rsi_1h")),
                MultiTimeframeMissingError,
                "multi-TF features missing: 5m_open.*CoinGecko features all zero: rsi_1h",
            ),
            (lambda f: f.with_columns(pl.col("timestamp").shift(1)), GateError, "nulls: timestamp 1"),
            (lambda f: f.with_columns(pl.col("macd").shift(1)), GateError, "nulls: macd 1"),
            (lambda f: f.reverse(), GateError, "timestamps are not ascending"),
            (lambda f: f.with_columns(pl.col("timestamp") + DAY), GateError, "are not within"),
            (lambda f: f.clear(), GateError, "no rows"),
        ],
    )
    def test_a_file_that_differs(
        self,
        settings: Settings,
        lake: Lake,
        change: Callable[[pl.DataFrame], pl.DataFrame],
        error: type[GateError],
        message: str,
    ) -> None:
        plan = plan_features(settings, lake, ["BTC-USD"], START, END)
        build_features(settings, lake, plan, "BTC-USD")
        _rewrite(lake, plan, "BTC-USD", change)
        with pytest.raises(GateError, match=f"(?s){message}") as caught:
            gate_features(settings, lake, plan)
        assert caught.type is error
        assert "sha256 of the file is" in str(caught.value)
        assert not lake.exists(keys.features_manifest(plan["version"]))
        assert not lake.exists(keys.FEATURES_LATEST)

    def test_a_file_that_is_nearly_empty(self, settings: Settings, lake: Lake) -> None:
        """Two of three days without an hourly point give few rows, and the gate says what they lack."""
        for day in (START, START + DAY):
            key = keys.coingecko("hourly", "ethereum", day)
            lake.write_frame(key, lake.read_frame(key).clear())
        plan = plan_features(settings, lake, ["ETH-USD"], START, END)
        rows = build_features(settings, lake, plan, "ETH-USD")["rows"]
        assert 0 < rows < 500
        with pytest.raises(GateError) as caught:
            gate_features(settings, lake, plan)
        assert f"ETH-USD: {rows} rows for the 4320 minutes of [2025-05-20, 2025-05-23), " in str(caught.value)
        assert "expected at least 50 % (features.min_row_share)" in str(caught.value)
        assert re.search(r"minutes that lack a feature: \w+_1h 4255, \w+_1h 4255", str(caught.value))
        assert not lake.exists(keys.features_manifest(plan["version"]))
        lenient = Settings(features=FeatureSettings(min_row_share=0.001))
        assert gate_features(lenient, lake, plan)["symbols"]["ETH-USD"]["rows"] == rows

    def test_a_day_without_candles_counts_too(self, settings: Settings, lake: Lake) -> None:
        for day in (START + DAY, START + 2 * DAY):
            key = keys.candles("1m", "ETH-USD", day)
            lake.write_frame(key, lake.read_frame(key).clear())
        plan = plan_features(settings, lake, ["ETH-USD"], START, END)
        build_features(settings, lake, plan, "ETH-USD")
        with pytest.raises(GateError, match=r"1440 rows for the 4320 minutes .* 33.3 %, .*: 1440 minutes have a candle"):
            gate_features(settings, lake, plan)

    def test_another_catalog(self, settings: Settings, lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
        plan = plan_features(settings, lake, ["ETH-USD"], START, END)
        build_features(settings, lake, plan, "ETH-USD")
        monkeypatch.setattr(catalog, "catalog_hash", lambda _: "another")
        with pytest.raises(GateError, match=r"ETH-USD: built under catalog [0-9a-f]{16}, today's is another; plan and build again"):
            gate_features(settings, lake, plan)

    def test_a_sidecar_that_cannot_be_read_hides_no_other_symbol(self, settings: Settings, lake: Lake) -> None:
        plan = plan_features(settings, lake, ["BTC-USD", "ETH-USD"], START, END)
        for symbol in plan["symbols"]:
            build_features(settings, lake, plan, symbol)
        _rewrite(lake, plan, "BTC-USD", lambda f: f.drop("rsi"))
        lake.write(keys.features_sidecar(plan["version"], "ETH-USD"), b"{")
        with pytest.raises(FeatureMismatchError, match=r"(?s)BTC-USD: 72 numeric features.*ETH-USD: .* is not JSON"):
            gate_features(settings, lake, plan)

    def test_a_symbol_that_was_not_built(self, settings: Settings, lake: Lake) -> None:
        plan = plan_features(settings, lake, SYMBOLS, START, END)
        with pytest.raises(GateError, match=r"(?s)BTC-USD: .* does not exist; run the build.*SOL-USD: .* does not exist"):
            gate_features(settings, lake, plan)

    def test_one_day_of_constant_daily_values_is_ordinary(self, settings: Settings, lake: Lake) -> None:
        plan = plan_features(settings, lake, ["ETH-USD"], START, END)
        build_features(settings, lake, plan, "ETH-USD")
        frame = lake.read_frame(keys.features(plan["version"], "ETH-USD"))
        assert frame["is_weekend"].n_unique() == 1, "flags may be constant, and the gate passes"
        gate_features(settings, lake, plan)


class TestCommands:
    @pytest.fixture
    def run(self, lake: Lake, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
        monkeypatch.setenv("CRPBOT_LAKE", lake.root)
        return lambda *arguments: CliRunner().invoke(app, list(arguments))

    interval = ("--start", str(START), "--end", str(END))

    def test_build_with_the_flags_of_the_workflow_then_verify(self, run: Callable[..., Any]) -> None:
        flags = ("--use-coingecko-premium", "--include-multi-tf", "--symbols", ",".join(SYMBOLS))
        built = run("build", *flags, *self.interval, "--json")
        assert built.exit_code == 0, built.output
        assert [s["features"] for s in json.loads(built.stdout)["symbols"]] == [73, 54, 73]
        verified = run("verify", "--version", json.loads(built.stdout)["version"])
        assert verified.exit_code == 0
        assert "ETH-USD: 54 features, 4320 rows" in verified.stdout

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (
                ("--no-include-multi-tf", "--symbols", "BTC-USD,ETH-USD"),
                "include_multi_tf=False contradicts the catalog of BTC-USD",
            ),
            (("--include-multi-tf", "--symbols", "ETH-USD"), "include_multi_tf=True contradicts the catalog of ETH-USD"),
            (("--no-use-coingecko-premium", "--symbols", "SOL-USD"), "include_coingecko=False contradicts the catalog of SOL-USD"),
            (("--symbols", "DOGE-USD"), "unknown symbol 'DOGE-USD'"),
        ],
    )
    def test_flags_that_contradict_the_catalog_are_refused(
        self, run: Callable[..., Any], flags: tuple[str, ...], message: str
    ) -> None:
        refused = run("build", *flags, *self.interval)
        assert refused.exit_code == 1
        assert message in refused.stderr
        assert refused.stdout == ""

    def test_verify_finds_a_changed_file(self, run: Callable[..., Any], lake: Lake) -> None:
        version = json.loads(run("build", "--symbols", "ETH-USD", *self.interval, "--json").stdout)["version"]
        _rewrite(lake, {"version": version}, "ETH-USD", lambda f: f.head(4000))
        refused = run("verify")
        assert refused.exit_code == 1
        assert "sha256 of the file is" in refused.stderr

    def test_verify_without_any_version(self, run: Callable[..., Any]) -> None:
        refused = run("verify")
        assert refused.exit_code == 1
        assert "crpbot features build" in refused.stderr

    def test_explain(self, run: Callable[..., Any]) -> None:
        told = run("explain", "bb_position")
        assert told.exit_code == 0
        assert "(close - bb_low) / (bb_high - bb_low)" in told.stdout
        assert json.loads(run("explain", "1h_close", "--json").stdout)["symbols"] == ["BTC-USD", "SOL-USD"]
        assert run("explain", "rsi_2h").exit_code == 1
