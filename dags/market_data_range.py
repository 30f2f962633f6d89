"""# market_data_range

Loads the days `[start, end)` of market data at once, years of them in one run: `plan` (checks the parameters, says how many
requests it will take) → `load` (a task per symbol; its log says how far it is) → `gaps` (tells outages from minutes without a
trade, over the whole interval and all symbols) → `report` (how much of each symbol is there).

The partitions are the same, byte for byte, as those of the daily runs of `market_data`, and the symbols share the machine's rate
limits. What was stored before is never lost: where a source now serves less, the stored partition is kept.

**Parameters.** `start`, `end`: UTC days, `[start, end)`. `symbols`: which to load. `refetch`: `absent` fetches the partitions that
are not there, `incomplete` also those that lack a row, `all` everything again.

**When it fails:** clear the failed task. `load` goes on where it stopped, nothing half-written stays.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Any

from airflow.sdk import Param, dag, task
from airflow.sdk.exceptions import AirflowFailException

from crpbot_airflow.defaults import Tag, default_args, run_step
from crpbot_lib.config import settings

SYMBOLS = [symbol.name for symbol in settings().symbols]


@dag(
    schedule=None,
    start_date=datetime(2023, 11, 10, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
    default_args=default_args(),
    params={
        "start": Param("", type="string", description="first UTC day, e.g. 2023-11-10"),
        "end": Param("", type="string", description="day after the last UTC day"),
        "symbols": Param(SYMBOLS, type="array", items={"type": "string", "enum": SYMBOLS}, description="what to load"),
        "refetch": Param("absent", type="string", enum=["absent", "incomplete", "all"], description="what of it to fetch"),
    },
    doc_md=__doc__,
    tags=[Tag.DATA],
)
def market_data_range() -> None:
    @task
    def plan(params: dict[str, Any]) -> dict[str, Any]:
        """The interval and the symbols, checked; everything after takes them from here."""
        from crpbot_lib.steps import ingest

        try:
            start, end = date.fromisoformat(params["start"]), date.fromisoformat(params["end"])
        except ValueError as error:
            raise AirflowFailException(
                f"start={params['start']!r}, end={params['end']!r}: expected days like 2025-05-26"
            ) from error
        if not params["symbols"]:
            raise AirflowFailException("symbols is empty: name at least one of " + ", ".join(SYMBOLS))
        estimate = run_step(ingest.plan_load, params["symbols"], start, end, refetch=params["refetch"])
        return {"start": params["start"], "end": params["end"], "symbols": params["symbols"], "refetch": params["refetch"]} | {
            name: estimate[name] for name in ("present", "partitions", "requests", "seconds")
        }

    @task
    def symbols_of(range_plan: dict[str, Any]) -> list[str]:
        return list(range_plan["symbols"])

    @task(execution_timeout=timedelta(hours=24))
    def load(symbol: str, range_plan: dict[str, Any]) -> dict[str, Any]:
        from crpbot_lib.steps import ingest

        start, end = date.fromisoformat(range_plan["start"]), date.fromisoformat(range_plan["end"])
        return run_step(ingest.load, symbol, start, end, refetch=range_plan["refetch"])

    @task
    def gaps(range_plan: dict[str, Any]) -> dict[str, Any]:
        from crpbot_lib.steps import quality

        start, end = date.fromisoformat(range_plan["start"]), date.fromisoformat(range_plan["end"])
        return run_step(quality.gaps, range_plan["symbols"], start, end)

    @task
    def report(symbol: str, range_plan: dict[str, Any]) -> dict[str, Any]:
        from crpbot_lib.steps import quality

        start, end = date.fromisoformat(range_plan["start"]), date.fromisoformat(range_plan["end"])
        return run_step(quality.report, symbol, start, end)

    range_plan = plan()
    symbols = symbols_of(range_plan)
    loaded = load.partial(range_plan=range_plan).expand(symbol=symbols)
    loaded >> gaps(range_plan) >> report.partial(range_plan=range_plan).expand(symbol=symbols)


market_data_range()
