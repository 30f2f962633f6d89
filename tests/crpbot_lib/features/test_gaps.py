"""Minutes without a trade are rows like others and are listed; over an outage nothing reaches: no window, no bar, no label."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from crpbot_lib import candle_rules
from crpbot_lib.config import Settings
from crpbot_lib.features import catalog
from crpbot_lib.lake import Lake, keys
from crpbot_lib.steps.features import build_features, gate_features, plan_features
from crpbot_lib.training.dataset import UNKNOWN, anchors, labels

MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)
COLD = catalog.SEGMENT_WARM_UP
HORIZON, WINDOW = 15, 60
PRICES = pl.col("open", "high", "low", "close", "volume")


def _outages(market: Any) -> list[tuple[datetime, datetime]]:
    """First missing minute and first one there again, from the candles alone."""
    times = market.minutes["timestamp"].to_list()
    longest = (candle_rules.MAX_NO_TRADE_MINUTES + 1) * MINUTE
    return [(a + MINUTE, b) for a, b in pairwise(times) if b - a > longest]


def test_another_world_before_an_outage_changes_no_row_after_it(real: Any, before_the_cast: None) -> None:
    whole = real.frame()
    for _, back in _outages(real):
        before = pl.col("timestamp") < back
        other = {
            width: frame.with_columns(pl.when(before).then(PRICES * 7).otherwise(PRICES).name.keep())
            for width, frame in real.candles.items()
        }
        mine, theirs = (frame.filter(~before) for frame in (whole, replace(real, candles=other).frame()))
        assert_frame_equal(mine, theirs, check_exact=True)


def test_no_row_lies_in_an_outage_or_is_not_warm_after_it(real: Any) -> None:
    frame = real.frame()
    for gone, back in _outages(real):
        assert frame.filter(pl.col("timestamp").is_between(gone, back + COLD * MINUTE, closed="left")).is_empty()
    begin = real.minutes["timestamp"][0]
    assert frame.filter(pl.col("timestamp") < begin + COLD * MINUTE).is_empty()


def test_no_label_and_no_training_window_spans_an_outage(real: Any) -> None:
    frame = real.frame()
    times = frame["timestamp"].dt.epoch("us").to_numpy()
    labelled = labels(times, frame["close"].to_numpy(), HORIZON) != UNKNOWN
    ends = anchors(times, WINDOW)
    assert labelled.sum() > 0.8 * frame.height
    assert ends.sum() > 0.8 * frame.height
    for gone, back in _outages(real):
        reaches = (frame["timestamp"] + HORIZON * MINUTE >= gone) & (frame["timestamp"] < back)
        assert not labelled[reaches.to_numpy()].any()
        looks_back = (frame["timestamp"] >= back) & (frame["timestamp"] - (WINDOW - 1) * MINUTE < back)
        assert not ends[looks_back.to_numpy()].any()


def test_the_outages_are_there(spans: Any, market_data_dir: Path | None) -> None:
    """Guards the tests above, which say nothing about a market without one."""
    counts = {name: len(_outages(span.market(market_data_dir))) for name, span in spans.items()}
    assert all(count for name, count in counts.items() if name.endswith(("2023-03", "2021-09")))
    assert counts["BTC thin"]


FIRST, LAST = date(2026, 2, 24), date(2026, 2, 27)


@pytest.fixture(scope="module")
def thin(spans: Any, market_data_dir: Path | None) -> Any:
    """Four days, of whose minutes 28 % have no trade."""
    start = datetime(2026, 2, 23, tzinfo=UTC)
    return replace(spans["SOL thin"], start=start, hours=96, outage=None).market(market_data_dir, record=False)


@pytest.fixture(scope="module")
def built(thin: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], pl.DataFrame]:
    """The sidecar and the file of the last three, from a lake, as the tasks build and gate them."""
    lake = Lake(tmp_path_factory.mktemp("lake").as_uri())
    for width, frame in thin.candles.items():
        for day, part in _days(frame):
            lake.write_frame(keys.candles(width, "SOL-USD", day), part)
    for day, part in _days(thin.hourly):
        lake.write_frame(keys.coingecko("hourly", "solana", day), part)
    lake.write_frame(keys.coingecko("daily", "solana", LAST - DAY), thin.daily)
    listed = {"coin_listed": thin.daily["timestamp"][0].date()}
    settings = Settings(symbols=(Settings().symbol("SOL-USD").model_copy(update=listed),))
    plan = plan_features(settings, lake, ["SOL-USD"], FIRST, LAST)
    build_features(settings, lake, plan, "SOL-USD")
    gate_features(settings, lake, plan)
    sidecar = lake.read_json(keys.features_sidecar(plan["version"], "SOL-USD"))
    return sidecar, lake.read_frame(keys.features(plan["version"], "SOL-USD"))


def _minutes(ranges: list[list[Any]]) -> set[datetime]:
    return {datetime.fromisoformat(start) + i * MINUTE for start, count in ranges for i in range(count)}


def _days(frame: pl.DataFrame) -> Iterator[tuple[date, pl.DataFrame]]:
    for part in frame.with_columns(day=pl.col("timestamp").dt.date()).partition_by("day"):
        yield part["day"][0], part.drop("day")


def test_every_minute_is_served_filled_or_of_an_outage(thin: Any, built: tuple[dict[str, Any], pl.DataFrame]) -> None:
    sidecar, _ = built
    served = set(thin.minutes["timestamp"].to_list())
    begin = datetime(FIRST.year, FIRST.month, FIRST.day, tzinfo=UTC)
    missing = {t for i in range((LAST - FIRST).days * 1440) if (t := begin + i * MINUTE) not in served}
    filled, outages = _minutes(sidecar["filled"]), _minutes(sidecar["outages"])
    assert len(missing) > 500
    assert not filled & outages
    # of a hole at the very end nobody knows yet which of the two it is
    assert {t for t in missing if t < thin.minutes["timestamp"][-1]} == filled | outages
    assert all(count <= candle_rules.MAX_NO_TRADE_MINUTES for _, count in sidecar["filled"])
    assert all(count > candle_rules.MAX_NO_TRADE_MINUTES for _, count in sidecar["outages"])


def test_a_filled_minute_is_flat_at_the_last_close_with_volume_0(thin: Any, built: tuple[dict[str, Any], pl.DataFrame]) -> None:
    sidecar, frame = built
    filled = frame.filter(pl.col("timestamp").is_in(list(_minutes(sidecar["filled"]))))
    assert filled.height > 300
    last = filled.select("timestamp").join_asof(thin.minutes.select("timestamp", "close"), on="timestamp")["close"]
    for column in ("open", "high", "low", "close"):
        assert filled[column].equals(last, check_names=False)
    assert set(filled["volume"]) == {0.0}
    assert set(filled["spread"]) == {0.0}


def test_every_other_row_is_the_candle_as_served(thin: Any, built: tuple[dict[str, Any], pl.DataFrame]) -> None:
    sidecar, frame = built
    others = frame.filter(~pl.col("timestamp").is_in(list(_minutes(sidecar["filled"]))))
    assert_frame_equal(others.select(thin.minutes.columns), thin.minutes.join(others.select("timestamp"), on="timestamp"))


def test_what_is_dropped_adds_up(built: tuple[dict[str, Any], pl.DataFrame]) -> None:
    sidecar, frame = built
    assert sidecar["rows"] == frame.height
    assert sidecar["minutes"] == frame.height + sidecar["dropped"]["cold"] + sidecar["dropped"]["unknown"]
