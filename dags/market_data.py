"""# market_data

Fetches one UTC day of market data into the lake, for every symbol of the configuration:

1. `fetch_1m`, the 1-minute candles, and `fetch_timeframes`, the 5m, 15m and 1h candles, from the exchange;
2. `fetch_coingecko`, the hourly points of the day and the daily history known on that day;
3. `check_quality`, which fails when a partition is absent or broken and writes the day's quality record.

The partition key is the day, e.g. `2025-05-26`; it says everything that a run needs, so any day can be run again or by backfill in
any order and gives the same bytes. Where a source now serves less than is stored, the stored partition is kept. The run of a day
starts a quarter past the next midnight: by then its last minute is served.

**When it fails:** the task log names the request and what to do. Clear the task; nothing half-written stays.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from airflow.sdk import CronPartitionTimetable, PartitionedAtRuntime, dag, task

from crpbot_airflow.defaults import Tag, day_of, default_args, run_step, scheduled
from crpbot_lib.config import settings

SYMBOLS = [symbol.name for symbol in settings().symbols]
DAY = "{{ partition_key }}"


@dag(
    schedule=scheduled(
        CronPartitionTimetable("15 0 * * *", timezone="UTC", run_offset=-1, key_format="%Y-%m-%d"), by_hand=PartitionedAtRuntime()
    ),
    start_date=datetime(2023, 11, 10, tzinfo=UTC),
    catchup=False,
    max_active_runs=3,
    default_args=default_args(),
    doc_md=__doc__,
    tags=[Tag.DATA],
)
def market_data() -> None:
    @task
    def fetch_1m(symbol: str, day: str) -> dict[str, Any]:
        from crpbot_lib.steps import ingest

        return run_step(ingest.fetch_candles, symbol, "1m", day_of(day))

    @task
    def fetch_timeframes(symbol: str, day: str) -> list[dict[str, Any]]:
        from crpbot_lib.steps import ingest

        return [run_step(ingest.fetch_candles, symbol, timeframe, day_of(day)) for timeframe in ("5m", "15m", "1h")]

    @task
    def fetch_coingecko(symbol: str, day: str) -> dict[str, Any]:
        from crpbot_lib.steps import ingest

        return run_step(ingest.fetch_coingecko, symbol, day_of(day))

    @task
    def check_quality(day: str) -> dict[str, Any]:
        from crpbot_lib.steps import quality

        return run_step(quality.check_quality, SYMBOLS, day_of(day))

    fetched = [step.partial(day=DAY).expand(symbol=SYMBOLS) for step in (fetch_1m, fetch_timeframes, fetch_coingecko)]
    fetched >> check_quality(DAY)


market_data()
