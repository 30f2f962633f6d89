"""# market_data_range

Loads the days `[start, end)` of market data at once, years of them in one run: `plan` (checks the parameters, says how many
requests it will take) → `load` (a task per symbol; its log says how far it is) → `gaps` (tells outages from minutes without a
trade, over the whole interval and all symbols) → `report` (how much of each symbol is there, whether its 5m, 15m and 1h candles are
what its minutes add up to, and what looks frozen or like a spike).

The partitions are the same, byte for byte, as those of the daily runs of `market_data`, and the symbols share the machine's rate
limits. What was stored before is never lost: where a source now serves less, the stored partition is kept.

**Parameters.** `start`, `end`: UTC days, `[start, end)`, all of them over. `symbols`: which to load. `refetch`: `absent` fetches
the partitions that are not there, `incomplete` also those that lack a row, `all` everything again. `candles_only`: nothing of
CoinGecko, for days that its plan does not reach; `plan` fails where it does not.

**When it fails:** the task log says what to do; `plan` fails before anything is fetched. Clear the failed task: with `absent`,
`load` goes on where it stopped. Nothing half-written stays.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.sdk import Param, dag, task

from crpbot_airflow.defaults import Tag, default_args, interval, run_step, symbols_schema
from crpbot_lib.config import settings

SYMBOLS = [symbol.name for symbol in settings().symbols]
REFETCH = {"absent": "those not there", "incomplete": "also those that lack a row", "all": "all of them, again"}


@dag(
    schedule=None,
    start_date=datetime(2023, 11, 10, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
    default_args=default_args(),
    params={
        "start": Param(type="string", format="date", description="first UTC day, e.g. 2023-11-10"),
        "end": Param(type="string", format="date", description="UTC day after the last one; it must be over"),
        "symbols": Param(SYMBOLS, **symbols_schema(SYMBOLS), description="what to load"),
        "refetch": Param(
            "absent", type="string", enum=list(REFETCH), values_display=REFETCH, description="which partitions to fetch"
        ),
        "candles_only": Param(False, type="boolean", description="nothing of CoinGecko, whose plan may not reach back so far"),
    },
    doc_md=__doc__,
    tags=[Tag.DATA],
)
def market_data_range() -> None:
    @task
    def plan(params: dict[str, Any]) -> dict[str, Any]:
        """Checks the parameters, says what it will take; everything after takes them from here."""
        from crpbot_lib.steps import ingest

        chosen = {"coingecko": not params["candles_only"], "refetch": params["refetch"]}
        estimate = run_step(ingest.plan_load, params["symbols"], *interval(params), **chosen)
        return {**params} | {name: estimate[name] for name in ("present", "partitions", "requests", "seconds")}

    @task
    def symbols_of(range_plan: dict[str, Any]) -> list[str]:
        return list(range_plan["symbols"])

    # two at once: what ends an instance must not wait for hours behind the loads of many symbols
    @task(execution_timeout=timedelta(hours=24), max_active_tis_per_dag=2)
    def load(symbol: str, range_plan: dict[str, Any]) -> dict[str, Any]:
        from crpbot_lib.steps import ingest

        chosen = {"coingecko": not range_plan["candles_only"], "refetch": range_plan["refetch"]}
        return run_step(ingest.load, symbol, *interval(range_plan), **chosen)

    @task
    def gaps(range_plan: dict[str, Any]) -> dict[str, Any]:
        from crpbot_lib.steps import quality

        return run_step(quality.gaps, range_plan["symbols"], *interval(range_plan))

    @task
    def report(symbol: str, range_plan: dict[str, Any]) -> dict[str, Any]:
        from crpbot_lib.steps import quality

        return run_step(quality.report, symbol, *interval(range_plan))

    range_plan = plan()
    symbols = symbols_of(range_plan)
    loaded = load.partial(range_plan=range_plan).expand(symbol=symbols)
    loaded >> gaps(range_plan) >> report.partial(range_plan=range_plan).expand(symbol=symbols)


market_data_range()
