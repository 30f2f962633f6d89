"""On a plan of CoinGecko that does not reach the listing: fetched, trained on, decided with, by the same all-time high."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from crpbot_lib import registry, runtime
from crpbot_lib.config import PromotionSettings, RuntimeSettings, Settings
from crpbot_lib.features import FeatureError, catalog
from crpbot_lib.lake import Lake, keys
from crpbot_lib.market_data import MarketData, MarketDataError
from crpbot_lib.runtime.market import MarketAt
from crpbot_lib.runtime.predict import live_features
from crpbot_lib.sandbox.server import Sandbox, SandboxOptions
from crpbot_lib.steps import features, ingest

DAY = date(2025, 5, 28)
NEXT = DAY + timedelta(days=1)
MIDNIGHT = datetime(2025, 5, 29, tzinfo=UTC)
NOW = MIDNIGHT + timedelta(minutes=10)
SYMBOL, COIN = "ETH-USD", "ethereum"
LONG_AGO = datetime(2015, 1, 1, tzinfo=UTC)
PLANS: dict[str, dict[str, Any]] = {
    "730 days": {"coingecko_plan": "pro", "coingecko_history_days": 730},
    "demo": {"coingecko_plan": "demo"},
}
UNTIL = {"730 days": date(2023, 7, 1), "demo": date(2024, 7, 1)}


def with_highs(settings: Settings, highs: Any, until: date | None) -> Settings:
    entry = settings.symbol(SYMBOL).model_copy(update={"all_time_highs": tuple(highs), "all_time_highs_until": until})
    return settings.model_copy(update={"symbols": tuple(entry if s.name == SYMBOL else s for s in settings.symbols)})


@pytest.fixture(scope="module", params=PLANS)
def plan(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def limited(plan: str, market_data_dir: Path | None, recorded: Any) -> Iterator[Settings]:
    """Settings of a local cloud that stands at ``NOW``, with the one record that the all-time high of ``UNTIL`` was."""
    options = {"data_dir": market_data_dir, "now": NOW, "coingecko_plan": PLANS[plan]["coingecko_plan"]}
    with Sandbox(SandboxOptions(**options)) as cloud:
        env = cloud.env()
        settings = Settings(
            coinbase_url=env["CRPBOT_COINBASE_URL"],
            coingecko_url=env["CRPBOT_COINGECKO_URL"],
            coingecko_api_key=env["CRPBOT_COINGECKO_API_KEY"],  # type: ignore[arg-type]
            coinbase_requests_per_second=1e6,
            coingecko_requests_per_second=1e6,
            promotion=PromotionSettings(allow_smoke=True),
            runtime=RuntimeSettings(as_of=NOW - timedelta(minutes=5)),
            **PLANS[plan],
        )
        until = datetime.combine(UNTIL[plan], datetime.min.time(), UTC)
        yield with_highs(settings, [highest(recorded.daily(COIN, LONG_AGO, until))], UNTIL[plan])


def highest(daily: pl.DataFrame) -> tuple[float, datetime]:
    """The highest price of ``daily``, and the first time it stood there."""
    top = daily.filter(pl.col("price") == pl.col("price").max())
    return top["price"][0], top["timestamp"][0]


@pytest.fixture(scope="module")
def trained(limited: Settings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Lake, pl.DataFrame]:
    """The lake of one day as it is fetched on that plan, and the features file that a training would read."""
    lake = Lake(f"file://{tmp_path_factory.mktemp('limited')}")
    ingest.ensure_coverage(limited, lake, SYMBOL, DAY, NEXT, now=lambda: NOW)
    built = features.plan_features(limited, lake, [SYMBOL], DAY, NEXT)
    features.build_features(limited, lake, built, SYMBOL)
    return lake, lake.read_frame(keys.features(built["version"], SYMBOL))


def live(settings: Settings) -> pl.DataFrame:
    """What the runtime computes at the day's end. The process's own settings have the whole history, as where the plan comes from
    an Airflow Connection: those of the run count."""
    data = MarketAt(MarketData(settings, now=lambda: NOW), MIDNIGHT, until=MIDNIGHT)
    return pl.from_pandas(live_features(settings.symbol(SYMBOL), data, MIDNIGHT, 1500, settings))


def test_the_stored_history_begins_where_the_records_end(plan: str, trained: tuple[Lake, pl.DataFrame]) -> None:
    daily = trained[0].read_frame(keys.coingecko("daily", COIN, DAY))
    assert (daily["timestamp"][0].date(), daily["timestamp"][-1].date()) == (UNTIL[plan], DAY)


def test_live_and_training_agree(limited: Settings, trained: tuple[Lake, pl.DataFrame]) -> None:
    mine, theirs = live(limited), trained[1]
    assert mine.columns == theirs.columns
    both = theirs.filter(pl.col("timestamp") >= mine["timestamp"][0])
    assert both.height == mine.height >= 900
    names = catalog.names(limited.symbol(SYMBOL).feature_groups)
    assert_frame_equal(mine.select(names), both.select(names), rel_tol=1e-6, abs_tol=0)
    high = ["ath_distance_pct", "days_since_ath"]
    assert_frame_equal(mine.select(high), both.select(high), check_exact=True)


def test_the_high_is_that_of_the_whole_history_and_of_nothing_later(trained: tuple[Lake, pl.DataFrame], recorded: Any) -> None:
    for row in trained[1].gather_every(97).iter_rows(named=True):
        closed = row["timestamp"] + timedelta(minutes=1)
        known = recorded.daily(COIN, LONG_AGO, MIDNIGHT).filter(pl.col("available_at") <= closed)
        (price, at), newest = highest(known), known.row(-1, named=True)
        assert row["ath_distance_pct"] == pytest.approx(100 * (newest["price"] / price - 1), rel=1e-5)
        assert row["days_since_ath"] == (newest["timestamp"] - at) / timedelta(days=1)


def test_a_model_can_be_dry_run(limited: Settings, trained_lake: Any, tmp_path: Path) -> None:
    own = trained_lake.copy(tmp_path)
    version = str(registry.publish(limited, own.lake, own.run)["version"])
    result = runtime.run(limited, own.lake, "dryrun", 3, version, symbols=[SYMBOL])
    assert (len(result["predictions"]), result["skipped"]) == (3, [])


def test_records_that_end_before_the_plan_begins_are_refused_in_training_and_live(limited: Settings, tmp_path: Path) -> None:
    """One old record: what was paid after it, and before the first day that the plan has, nobody knows."""
    old = with_highs(limited, [(1400.0, datetime(2018, 1, 13, tzinfo=UTC))], None)
    with pytest.raises(MarketDataError, match=r"set `all_time_highs_until` of ETH-USD to 202\d-05-3[01] or later, once") as error:
        ingest.ensure_coverage(old, Lake(tmp_path.as_uri()), SYMBOL, DAY, NEXT, now=lambda: NOW)
    assert error.value.permanent
    with pytest.raises(
        MarketDataError, match=r"ethereum daily from 2018-01-13: the plan '(pro|demo)' reaches back .*`all_time_highs_until`"
    ):
        live(old)


def test_without_a_record_live_refuses_as_training_does(limited: Settings) -> None:
    with pytest.raises(FeatureError, match=r"so its all-time high before is not known; .* set dated records"):
        live(with_highs(limited, (), None))
