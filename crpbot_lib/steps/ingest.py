"""The steps that fetch: a day, years at once, what features need, what is incomplete.

The wall clock is asked for one thing only: whether a day is over. How it is fetched and stored: ``partitions``.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import date, timedelta

import polars as pl

from crpbot_lib.config import TIMEFRAMES, Settings
from crpbot_lib.features import catalog
from crpbot_lib.lake import Lake
from crpbot_lib.market_data import Clock, MarketData, utc_now
from crpbot_lib.market_data.plans import PLANS
from crpbot_lib.market_data.progress import LogMeter, Meter
from crpbot_lib.steps.days import DAY, closed_days
from crpbot_lib.steps.partitions import (
    Refetch,
    Series,
    Spans,
    Stored,
    Summary,
    Totals,
    Work,
    all_series,
    candles,
    check_reach,
    days_of_series,
    points,
    stream,
    survey,
)
from crpbot_lib.steps.quality import tell_gaps

log = logging.getLogger(__name__)


def fetch_candles(
    settings: Settings,
    lake: Lake,
    symbol: str,
    timeframe: str,
    day: date,
    *,
    now: Clock = utc_now,
    market: MarketData | None = None,
) -> Summary:
    """Fetches one UTC day of candles and writes its partition. One that is stored already is kept where less is served now.

    Returns ``key, rows, expected, missing, gaps`` of what is stored then. MarketDataError when the day is not over yet (it is, 5
    minutes after its end) or lies before ``exchange_listed``, or the exchange fails; then nothing is written. ValueError for an
    unknown symbol or timeframe.
    """
    fetched = fetch_candle_days(settings, lake, symbol, timeframe, day, day + DAY, now=now, market=market)
    return fetched["partitions"][0]  # type: ignore[no-any-return]


def fetch_candle_days(
    settings: Settings,
    lake: Lake,
    symbol: str,
    timeframe: str,
    start: date,
    end: date,
    *,
    replace: bool = False,
    now: Clock = utc_now,
    progress: Meter | None = None,
    market: MarketData | None = None,
) -> Summary:
    """As ``fetch_candles`` for each UTC day of ``[start, end)``, in few requests; ``partitions`` has one summary a day. With
    ``replace`` what is served now is stored, even if it is less than before."""
    entry = settings.symbol(symbol)
    series = candles(settings, market or MarketData(settings, now=now), entry, timeframe)
    partitions = _fetch(lake, [Work(series, days_of_series(series, start, end, now))], progress, replace)
    return {
        "symbol": symbol,
        "timeframe": timeframe,
        "rows": sum(p.rows for p in partitions),
        "missing": sum(p.missing for p in partitions),
        "partitions": [p.summary() for p in partitions],
    }


def fetch_coingecko(settings: Settings, lake: Lake, symbol: str, day: date, *, now: Clock = utc_now) -> Summary:
    """Fetches a coin's hourly points of one UTC day and its daily history up to that day; writes both partitions. One that is
    there already is kept where CoinGecko now serves less.

    The history begins with the coin's listing, or on a plan that does not reach that far as ``features.history.first_daily_day``
    says. Returns ``coin, hourly, daily``, each with ``key, rows, expected, missing, gaps``. MarketDataError when the day is not
    over yet or lies before the listing or the plan's reach, when CoinGecko fails, or has no daily history at all.
    """
    summary = fetch_coingecko_days(settings, lake, symbol, day, day + DAY, now=now)
    return {"coin": summary["coin"], "hourly": summary["hourly"][0], "daily": summary["daily"][0]}


def fetch_coingecko_days(
    settings: Settings,
    lake: Lake,
    symbol: str,
    start: date,
    end: date,
    *,
    replace: bool = False,
    now: Clock = utc_now,
    progress: Meter | None = None,
    market: MarketData | None = None,
) -> Summary:
    """As ``fetch_coingecko`` for each UTC day of ``[start, end)``, in few requests; a summary a day in ``hourly``, ``daily``.
    ``replace`` as in ``fetch_candle_days``."""
    entry = settings.symbol(symbol)
    both = points(settings, market or MarketData(settings, now=now), entry)
    stored = _fetch(lake, [Work(series, days_of_series(series, start, end, now)) for series in both], progress, replace)
    by_series = {name: [p.summary() for p in stored if p.series.timeframe == name] for name in ("hourly", "daily")}
    return {"coin": entry.coin, **by_series}


def load(
    settings: Settings,
    lake: Lake,
    symbol: str,
    start: date,
    end: date,
    *,
    timeframes: Sequence[str] = TIMEFRAMES,
    coingecko: bool = True,
    refetch: Refetch = "absent",
    now: Clock = utc_now,
    progress: Meter | None = None,
    market: MarketData | None = None,
) -> Summary:
    """Brings all partitions of one symbol's UTC days ``[start, end)`` into the lake, years at once, the same bytes as day by day.

    ``refetch`` says what of it is fetched: ``absent`` partitions; ``incomplete``, those that lack a row as well; ``all``. What is
    stored is never lost by that: where the source now serves less than is stored, the partition is kept, and counted. Without
    ``coingecko`` candles only.

    Returns ``present`` (partitions left alone), ``fetched, rows, missing`` (of the fetched) and ``outcomes``, the number of fetched
    partitions that were absent (``fetched``), gained rows (``filled``), hold other values (``changed``), the same
    (``unchanged``), or were ``kept``. MarketDataError and ValueError as ``fetch_candles``, before anything is written; so is what
    a source answers to the first request, such as a wrong key.
    """
    began = time.monotonic()
    market = market or MarketData(settings, now=now)
    work = survey(lake, _spans(settings, market, [symbol], start, end, timeframes, coingecko, now), refetch)
    totals = _run(lake, symbol, work, progress)
    summary = {
        "symbol": symbol,
        "start": start.isoformat(),
        "end": end.isoformat(),
        "present": sum(w.present for w in work),
        "fetched": totals.fetched,
        "rows": totals.rows,
        "missing": totals.missing,
        "outcomes": dict(totals.outcomes),
    }
    log.info(
        "%s %s to %s: %d partitions present, %d fetched (%s), %d rows, %d absent, %.1f s",
        *(symbol, start, end, summary["present"], totals.fetched, _shown(totals.outcomes), totals.rows, totals.missing),
        time.monotonic() - began,
    )
    return summary


def plan_load(
    settings: Settings,
    lake: Lake,
    symbols: Sequence[str],
    start: date,
    end: date,
    *,
    timeframes: Sequence[str] = TIMEFRAMES,
    coingecko: bool = True,
    refetch: Refetch = "absent",
    now: Clock = utc_now,
) -> Summary:
    """What ``load`` of each of ``symbols`` would do, with the same errors; asks no source for anything.

    Returns ``present, partitions`` (to fetch), ``requests``, ``seconds`` (at the allowed rates), and ``series``, the same for each.
    """
    market = MarketData(settings, now=now)
    return _estimate(settings, survey(lake, _spans(settings, market, symbols, start, end, timeframes, coingecko, now), refetch))


def ensure_coverage(
    settings: Settings,
    lake: Lake,
    symbol: str,
    start: date,
    end: date,
    *,
    now: Clock = utc_now,
    progress: Meter | None = None,
    market: MarketData | None = None,
) -> Summary:
    """Fetches what features of ``[start, end)`` (UTC days) need and the lake lacks: candles of all timeframes and hourly points
    from the catalog's warm-up days on, and the daily history known at the last day. Partitions that are there are left alone.

    Returns ``present, fetched`` (partitions), ``rows`` (fetched), ``missing`` (absent candles and points of all of these) and
    ``missing_present`` (those of them in partitions that were there: a report, a short partition is not fetched again).
    """
    began = time.monotonic()
    entry = settings.symbol(symbol)
    closed_days(start, end, now)
    first: dict[str, date] = {
        "hourly": catalog.first_hourly_day(start, entry.coin_listed),
        "daily": end - DAY,
        **dict.fromkeys(TIMEFRAMES, start - catalog.CANDLE_LEAD_DAYS * DAY),
    }
    series = all_series(settings, market or MarketData(settings, now=now), entry, TIMEFRAMES, coingecko=True)
    work = survey(lake, [(one, days_of_series(one, first[one.timeframe], end, now)) for one in series], "absent", count=True)
    totals = _run(lake, symbol, work, progress)
    missing_present = sum(w.missing_present for w in work)
    summary = {
        "symbol": symbol,
        "start": start.isoformat(),
        "end": end.isoformat(),
        "present": sum(w.present for w in work),
        "fetched": totals.fetched,
        "rows": totals.rows,
        "missing": totals.missing + missing_present,
        "missing_present": missing_present,
    }
    log.info(
        "%s %s to %s: %d partitions present (%d rows absent), %d fetched (%d rows), %d rows absent in all, %.1f s",
        *(symbol, start, end, summary["present"], missing_present, totals.fetched, totals.rows, summary["missing"]),
        time.monotonic() - began,
    )
    return summary


def heal(
    settings: Settings,
    lake: Lake,
    symbols: Sequence[str],
    start: date,
    end: date,
    *,
    every: bool = False,
    now: Clock = utc_now,
    progress: Meter | None = None,
    market: MarketData | None = None,
) -> Summary:
    """Fetches the candles of incomplete UTC days of ``[start, end)`` again: days that are absent, and those that lack more than
    the minutes in which nobody traded, by what the lake holds now (``quality.tell_gaps``); with ``every``, those as well.

    Nothing is lost by it: where the exchange now serves less than is stored, the partition is kept and that is reported. What the
    exchange never served stays absent, which is no error.

    Returns ``looked_at`` and ``outcomes`` (partitions), ``added, changed, missing`` (candles, of those fetched) and ``days``: of
    each partition that was fetched ``symbol, timeframe, day, outcome, rows, missing, added, changed, lost``. Errors as ``load``.
    """
    began = time.monotonic()
    work = _to_heal(settings, market or MarketData(settings, now=now), lake, symbols, start, end, every, now)
    days = [stored.healed() for stored in stream(lake, work, _started(progress, "heal", work))]
    outcomes = Counter(d["outcome"] for d in days)
    added, changed, missing = (sum(d[name] for d in days) for name in ("added", "changed", "missing"))
    looked_at = sum(w.present + len(w.days) for w in work)
    log.info(
        "healed %s %s to %s: %d partitions looked at, %d fetched (%s), %d candles added, %d changed, %d still absent, %.1f s",
        *(", ".join(symbols), start, end, looked_at, len(days), _shown(outcomes), added, changed, missing),
        time.monotonic() - began,
    )
    return {
        "start": start.isoformat(),
        "end": end.isoformat(),
        "looked_at": looked_at,
        "outcomes": dict(outcomes),
        "added": added,
        "changed": changed,
        "missing": missing,
        "days": days,
    }


def plan_heal(
    settings: Settings, lake: Lake, symbols: Sequence[str], start: date, end: date, *, every: bool = False, now: Clock = utc_now
) -> Summary:
    """What ``heal`` would fetch, as ``plan_load``."""
    market = MarketData(settings, now=now)
    return _estimate(settings, _to_heal(settings, market, lake, symbols, start, end, every, now))


def _to_heal(
    settings: Settings,
    market: MarketData,
    lake: Lake,
    symbols: Sequence[str],
    start: date,
    end: date,
    every: bool,
    now: Clock,
) -> list[Work]:
    """The incomplete days of each symbol and timeframe."""
    spans = _spans(settings, market, symbols, start, end, TIMEFRAMES, False, now)
    no_trade: defaultdict[str, Spans] = defaultdict(list)
    if not every:
        record, _ = tell_gaps(settings, lake, start, end)
        silent = record.filter(pl.col("kind") == "no_trade").select("symbol", "start", "minutes")
        for symbol, first, minutes in silent.iter_rows():
            no_trade[symbol].append((first, first + timedelta(minutes=minutes)))
    return survey(lake, spans, "incomplete", no_trade=no_trade)


def _spans(
    settings: Settings,
    market: MarketData,
    symbols: Sequence[str],
    start: date,
    end: date,
    timeframes: Sequence[str],
    coingecko: bool,
    now: Clock,
) -> list[tuple[Series, list[date]]]:
    return [
        (series, days_of_series(series, start, end, now))
        for symbol in symbols
        for series in all_series(settings, market, settings.symbol(symbol), timeframes, coingecko)
    ]


def _estimate(settings: Settings, work: Sequence[Work]) -> Summary:
    rates = {
        "Coinbase": settings.coinbase_requests_per_second,
        "CoinGecko": settings.coingecko_requests_per_second or PLANS[settings.coingecko_plan].requests_per_second,
    }
    asked: Counter[str] = Counter()
    for one in work:
        asked[one.series.source] += one.requests
    series = [{"series": w.series.what, "present": w.present, "partitions": len(w.days), "requests": w.requests} for w in work]
    return {
        "present": sum(w.present for w in work),
        "partitions": sum(len(w.days) for w in work),
        "requests": sum(asked.values()),
        "seconds": round(sum(n / rates[source] for source, n in asked.items()), 1),
        "series": series,
    }


def _started(progress: Meter | None, what: str, work: Sequence[Work]) -> Meter:
    meter = progress or LogMeter(log)
    meter.start(what, sum(len(w.days) for w in work), sum(w.requests for w in work))
    return meter


def _fetch(lake: Lake, work: Sequence[Work], progress: Meter | None, replace: bool) -> list[Stored]:
    check_reach(work)
    return list(stream(lake, work, _started(progress, work[0].series.symbol, work), replace=replace))


def _run(lake: Lake, symbol: str, work: Sequence[Work], progress: Meter | None) -> Totals:
    totals = Totals()
    for stored in stream(lake, work, _started(progress, symbol, work)):
        totals.add(stored)
    return totals


def _shown(outcomes: Counter[str]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(outcomes.items())) or "none"
