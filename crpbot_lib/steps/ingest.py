"""Fetching market data into the lake, day by day, and judging what is there.

Every partition is written whole and holds what was served, nothing filled. A partition without rows says "fetched, and there was
nothing", which is not the same as a missing one. The wall clock is asked for one thing only: whether a day is over.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from functools import partial
from itertools import islice
from typing import Any

import polars as pl

from crpbot_lib.config import TIMEFRAMES, Settings, Symbol
from crpbot_lib.features import catalog
from crpbot_lib.lake import KeyMissingError, Lake, UnreadableError, keys
from crpbot_lib.market_data import Clock, MarketData, MarketDataError, QualityError, utc_now
from crpbot_lib.market_data.frames import SERIES_WIDTH, width
from crpbot_lib.market_data.quality import Coverage, check_candles, check_points, compare
from crpbot_lib.market_data.quality import coverage as cover

log = logging.getLogger(__name__)

DAYS_AT_ONCE = 25
"""Days of candles fetched before they are written: whole pages of 300 at every timeframe, 36,000 minutes of memory."""

READERS = 8
"""Partitions read at once; each waits for the network, not for the processor."""

DAY = timedelta(days=1)
Summary = dict[str, Any]


def fetch_candles(settings: Settings, lake: Lake, symbol: str, timeframe: str, day: date, *, now: Clock = utc_now) -> Summary:
    """Fetches one UTC day of candles and writes its partition, replacing what was there.

    Returns ``key, rows, expected, missing, gaps``. MarketDataError when the day is not over yet, or the exchange fails; then
    nothing is written. ValueError for an unknown symbol or timeframe.
    """
    return fetch_candle_days(settings, lake, symbol, timeframe, day, day + DAY, now=now)["partitions"][0]  # type: ignore[no-any-return]


def fetch_candle_days(
    settings: Settings, lake: Lake, symbol: str, timeframe: str, start: date, end: date, *, now: Clock = utc_now
) -> Summary:
    """As ``fetch_candles`` for each UTC day of ``[start, end)``, in few requests; ``partitions`` has one summary a day."""
    settings.symbol(symbol)
    days = _closed_days(start, end, now)
    partitions = _load_candles(MarketData(settings, now=now), lake, symbol, timeframe, days)
    return {
        "symbol": symbol,
        "timeframe": timeframe,
        "rows": sum(p["rows"] for p in partitions),
        "missing": sum(p["missing"] for p in partitions),
        "partitions": partitions,
    }


def fetch_coingecko(settings: Settings, lake: Lake, symbol: str, day: date, *, now: Clock = utc_now) -> Summary:
    """Fetches a coin's hourly points of one UTC day and its daily history from the listing up to that day; writes both partitions.

    Returns ``coin, hourly, daily``, each with ``key, rows, expected, missing, gaps``. MarketDataError when the day is not over yet
    or lies before the coin's listing, when CoinGecko fails, or has no daily history at all.
    """
    summary = fetch_coingecko_days(settings, lake, symbol, day, day + DAY, now=now)
    return {"coin": summary["coin"], "hourly": summary["hourly"][0], "daily": summary["daily"][0]}


def fetch_coingecko_days(settings: Settings, lake: Lake, symbol: str, start: date, end: date, *, now: Clock = utc_now) -> Summary:
    """As ``fetch_coingecko`` for each UTC day of ``[start, end)``, in few requests; a summary a day in ``hourly``, ``daily``."""
    entry = settings.symbol(symbol)
    days = _closed_days(start, end, now)
    market = MarketData(settings, now=now)
    hourly = _load_hourly(market, lake, entry, days)
    daily = _load_daily(market, lake, entry, days)
    return {"coin": entry.coin, "hourly": hourly, "daily": daily}


def ensure_coverage(settings: Settings, lake: Lake, symbol: str, start: date, end: date, *, now: Clock = utc_now) -> Summary:
    """Fetches what features of ``[start, end)`` (UTC days) need and the lake lacks: candles of all timeframes and hourly points
    from the catalog's warm-up days on, and the daily history known at the last day. Partitions that are there are left alone.

    Returns ``present, fetched`` (partitions), ``rows`` (fetched), ``missing`` (absent candles and points of all of these) and
    ``missing_present`` (those of them in partitions that were there: a report, a short partition is not fetched again).
    """
    entry = settings.symbol(symbol)
    _closed_days(start, end, now)
    market = MarketData(settings, now=now)
    began = time.monotonic()
    present, missing_present = 0, 0
    fetched: list[Summary] = []

    def missing_of(first: date, key: Callable[[date], str], step: timedelta, since: date | None = None) -> list[date]:
        """The days from ``first`` to ``end`` without a partition; counts the others (from ``since``, or their day, on)."""
        nonlocal present, missing_present
        stored = set(lake.keys(keys.partitions(key(end))))
        wanted = list(_days(first, end))
        lacking = [day for day in wanted if key(day) not in stored]
        there = [day for day in wanted if key(day) in stored]
        present += len(there)
        with ThreadPoolExecutor(READERS) as pool:
            for day, frame in zip(there, pool.map(lambda day: lake.read_frame(key(day)), there), strict=True):
                missing_present += cover(frame, step, _midnight(since or day), _midnight(day + DAY)).missing
        return lacking

    candles_since = start - catalog.CANDLE_LEAD_DAYS * DAY
    for timeframe in TIMEFRAMES:
        lacking = missing_of(candles_since, partial(keys.candles, timeframe, symbol), width(timeframe))
        fetched += _load_candles(market, lake, symbol, timeframe, lacking)
    hourly, daily = (partial(keys.coingecko, series, entry.coin) for series in ("hourly", "daily"))
    since = catalog.first_hourly_day(start, entry.coin_listed)
    fetched += _load_hourly(market, lake, entry, missing_of(since, hourly, SERIES_WIDTH["hourly"]))
    fetched += _load_daily(market, lake, entry, missing_of(end - DAY, daily, SERIES_WIDTH["daily"], entry.coin_listed))

    summary = {
        "symbol": symbol,
        "start": start.isoformat(),
        "end": end.isoformat(),
        "present": present,
        "fetched": len(fetched),
        "rows": sum(p["rows"] for p in fetched),
        "missing": sum(p["missing"] for p in fetched) + missing_present,
        "missing_present": missing_present,
    }
    log.info(
        "%s %s to %s: %d partitions present (%d rows absent), %d fetched (%d rows), %d rows absent in all, %.1f s",
        *(symbol, start, end, present, missing_present, len(fetched), summary["rows"], summary["missing"]),
        time.monotonic() - began,
    )
    return summary


def coverage(settings: Settings, lake: Lake, symbol: str, timeframe: str, start: date, end: date) -> Summary:
    """What the lake has of the UTC days ``[start, end)``: per day ``state`` (absent, empty, partial, complete), ``rows``,
    ``expected``, ``missing`` and ``gaps``, and the totals. An absent partition counts as all rows missing."""
    settings.symbol(symbol)
    step = width(timeframe)
    _check_interval(start, end)
    stored = set(lake.keys(keys.partitions(keys.candles(timeframe, symbol, start))))
    days: list[Summary] = []
    for day in _days(start, end):
        key = keys.candles(timeframe, symbol, day)
        if key in stored:
            found = cover(lake.read_frame(key), step, _midnight(day), _midnight(day + DAY))
            state = "empty" if found.rows == 0 else "partial" if found.missing else "complete"
        else:
            found, state = Coverage(expected=DAY // step, rows=0, gaps=()), "absent"
        days.append({"day": day.isoformat(), "state": state, **_counts(found)})
    return {
        "symbol": symbol,
        "timeframe": timeframe,
        "start": start.isoformat(),
        "end": end.isoformat(),
        "rows": sum(d["rows"] for d in days),
        "missing": sum(d["missing"] for d in days),
        "absent": sum(d["state"] == "absent" for d in days),
        "days": days,
    }


def check_quality(settings: Settings, lake: Lake, symbols: list[str], day: date) -> Summary:
    """Judges one day's partitions of ``symbols`` and writes the record to ``keys.quality(day)``, also when it does not pass.

    Each symbol needs the candles of all timeframes and both CoinGecko partitions, each possible in itself; otherwise QualityError
    lists every problem. Absent minutes, gaps, a daily history that ends early, and differences between the fetched timeframes and
    the resampled 1m are counted and logged, and do not fail.

    Returns ``key`` and per symbol ``rows``, ``missing`` and ``gaps`` of its 1m candles and ``differing``, the
    higher-timeframe candles that disagree with them.
    """
    problems: list[str] = []
    report: dict[str, Summary] = {}
    for name in symbols:
        entry = settings.symbol(name)
        report[name] = {
            "candles": _judge_candles(lake, name, day, problems),
            "coingecko": _judge_points(lake, entry, day, problems),
        }
    key = keys.quality(day)
    lake.write_json(key, {"day": day.isoformat(), "passed": not problems, "problems": problems, "symbols": report})
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise QualityError(
            f"{day}: {len(problems)} partitions are absent or broken: {shown}. Fetch them again; the record is {lake.url(key)}"
        )

    per_symbol: dict[str, Summary] = {}
    for name, judged in report.items():
        minutes = judged["candles"]["1m"]
        differing = {tf: judged["candles"][tf]["against_1m"] for tf in TIMEFRAMES if tf != "1m"}
        per_symbol[name] = {
            "rows": minutes["rows"],
            "missing": minutes["missing"],
            "gaps": len(minutes["gaps"]),
            "differing": sum(d["differing"] + d["only_fetched"] + d["only_resampled"] for d in differing.values()),
        }
        log.info(
            "%s %s: %d minutes, %d absent in %d gaps; %d candles of %s disagree with the 1m%s",
            *(
                name,
                day,
                minutes["rows"],
                minutes["missing"],
                len(minutes["gaps"]),
                per_symbol[name]["differing"],
                ", ".join(differing),
            ),
            _largest(differing),
        )
    return {"day": day.isoformat(), "key": key, "symbols": per_symbol}


def _load_candles(market: MarketData, lake: Lake, symbol: str, timeframe: str, days: Sequence[date]) -> list[Summary]:
    """Fetches and writes the partitions of ``days``, neighbouring days together."""
    step = width(timeframe)
    partitions: list[Summary] = []
    for first, last in _runs(days, DAYS_AT_ONCE):
        began = time.monotonic()
        frame = market.candles(symbol, timeframe, _midnight(first), _midnight(last + DAY))
        written = [
            _write_day(lake, keys.candles(timeframe, symbol, day), part, step, day) for day, part in _by_day(frame, first, last)
        ]
        _report(f"{symbol} {timeframe}", first, last, written, began)
        partitions += written
    return partitions


def _load_hourly(market: MarketData, lake: Lake, entry: Symbol, days: Sequence[date]) -> list[Summary]:
    _check_listed(entry, days)
    partitions: list[Summary] = []
    for first, last in _runs(days, None):
        began = time.monotonic()
        frame = market.hourly(entry.coin, _midnight(first), _midnight(last + DAY))
        written = [
            _write_day(lake, keys.coingecko("hourly", entry.coin, day), part, SERIES_WIDTH["hourly"], day)
            for day, part in _by_day(frame, first, last)
        ]
        _report(f"{entry.coin} hourly", first, last, written, began)
        partitions += written
    return partitions


def _load_daily(market: MarketData, lake: Lake, entry: Symbol, days: Sequence[date]) -> list[Summary]:
    """One request for the history up to the last day; the partition of an earlier day is the part of it that day begins with."""
    if not days:
        return []
    _check_listed(entry, days)
    began = time.monotonic()
    listed = _midnight(entry.coin_listed)
    history = market.daily(entry.coin, listed, _midnight(days[-1] + DAY))
    if history.is_empty():
        raise MarketDataError(
            f"CoinGecko has no daily history of {entry.coin} from {entry.coin_listed} to {days[-1]}: check the coin's id and "
            "coin_listed in `symbols`, and the plan of CRPBOT_COINGECKO_API_KEY",
            permanent=True,
        )
    written: list[Summary] = []
    for day in days:
        part = history.filter(pl.col("timestamp") <= _midnight(day))
        written.append(
            _write(lake, keys.coingecko("daily", entry.coin, day), part, SERIES_WIDTH["daily"], listed, _midnight(day + DAY))
        )
    _report(f"{entry.coin} daily history", days[0], days[-1], written[-1:], began)
    return written


def _by_day(frame: pl.DataFrame, first: date, last: date) -> Iterator[tuple[date, pl.DataFrame]]:
    for day in _days(first, last + DAY):
        yield day, frame.filter(pl.col("timestamp").is_between(_midnight(day), _midnight(day + DAY), closed="left"))


def _write_day(lake: Lake, key: str, frame: pl.DataFrame, step: timedelta, day: date) -> Summary:
    return _write(lake, key, frame, step, _midnight(day), _midnight(day + DAY))


def _write(lake: Lake, key: str, frame: pl.DataFrame, step: timedelta, start: datetime, end: datetime) -> Summary:
    # rechunk: a day cut out of a longer fetch must give the same bytes as the day fetched alone
    lake.write_frame(key, frame.rechunk())
    found = cover(frame, step, start, end)
    return {"key": key, **_counts(found), "gaps": len(found.gaps)}


def _report(what: str, first: date, last: date, written: list[Summary], began: float) -> None:
    rows, missing, gaps = (sum(p[name] for p in written) for name in ("rows", "missing", "gaps"))
    empty = sum(p["rows"] == 0 for p in written)
    days = f"{first}" if first == last else f"{first} to {last}"
    line = f"{what} {days}: {rows} rows, {missing} absent in {gaps} gaps, {time.monotonic() - began:.1f} s"
    if empty:
        log.warning("%s; %d of %d days were served without a row", line, empty, len(written))
    else:
        log.info("%s", line)


def _judge_candles(lake: Lake, symbol: str, day: date, problems: list[str]) -> Summary:
    judged: Summary = {}
    minutes: pl.DataFrame | None = None
    start, end = _midnight(day), _midnight(day + DAY)
    for timeframe in TIMEFRAMES:
        key = keys.candles(timeframe, symbol, day)
        frame = _read(lake, key, problems, lambda f, k=key, tf=timeframe: check_candles(f, tf, start, end, lake.url(k)))  # type: ignore[misc]
        if frame is None:
            continue
        judged[timeframe] = _counts(cover(frame, width(timeframe), start, end))
        if timeframe == "1m":
            minutes = frame
        elif minutes is not None:
            judged[timeframe]["against_1m"] = compare(minutes, frame, timeframe)
    return judged


def _judge_points(lake: Lake, entry: Symbol, day: date, problems: list[str]) -> Summary:
    judged: Summary = {}
    begins = {"hourly": day, "daily": entry.coin_listed}
    for series, first in begins.items():
        key = keys.coingecko(series, entry.coin, day)
        frame = _read(lake, key, problems, lambda f, k=key, s=series: check_points(f, s, lake.url(k)))  # type: ignore[misc]
        if frame is None:
            continue
        found = cover(frame, SERIES_WIDTH[series], _midnight(first), _midnight(day + DAY))
        outside = frame.height - found.rows
        if outside:
            problems.append(f"{lake.url(key)}: {outside} of {frame.height} rows lie outside {first} to {day}")
            continue
        judged[series] = _counts(found)
        if series == "daily":
            if frame.is_empty():
                problems.append(f"{lake.url(key)}: the daily history is empty")
                continue
            newest: datetime = frame["timestamp"][-1]
            judged[series]["days_behind"] = (_midnight(day) - newest) // DAY
            if judged[series]["days_behind"]:
                log.warning(
                    "%s %s: the daily history ends on %s, %d days before",
                    entry.coin,
                    day,
                    newest.date(),
                    judged[series]["days_behind"],
                )
    return judged


def _read(lake: Lake, key: str, problems: list[str], check: Callable[[pl.DataFrame], None]) -> pl.DataFrame | None:
    try:
        frame = lake.read_frame(key)
        check(frame)
    except (KeyMissingError, UnreadableError, QualityError) as error:
        problems.append(str(error))
        return None
    return frame


def _largest(comparisons: Mapping[Any, Summary]) -> str:
    """`` (largest: 15m volume by 2.1 %)`` of all differences, or nothing."""
    found = [(c["largest"], f"{tf} {name}") for tf, d in comparisons.items() for name, c in d["columns"].items()]
    if not found:
        return ""
    size, where = max(found)
    return f" (largest: {where} by {100 * size:.3g} %)"


def _counts(found: Coverage) -> Summary:
    gaps = [{"start": gap.start.strftime("%Y-%m-%dT%H:%M:%SZ"), "minutes": gap.minutes} for gap in found.gaps]
    return {"rows": found.rows, "expected": found.expected, "missing": found.missing, "gaps": gaps}


def _closed_days(start: date, end: date, now: Clock) -> list[date]:
    _check_interval(start, end)
    over = now()
    if _midnight(end) > over:
        raise MarketDataError(
            f"{end - DAY} is not over yet: it ends at {_midnight(end):%Y-%m-%d %H:%M} UTC and it is {over:%Y-%m-%d %H:%M} UTC; "
            "fetch it after that, partitions hold whole days",
            permanent=True,
        )
    return list(_days(start, end))


def _check_interval(start: date, end: date) -> None:
    if end <= start:
        raise ValueError(f"the interval [{start}, {end}) holds no day: the end is exclusive and lies after the start")


def _check_listed(entry: Symbol, days: Sequence[date]) -> None:
    if days and days[0] < entry.coin_listed:
        raise MarketDataError(
            f"{days[0]} lies before the listing of {entry.coin} on {entry.coin_listed}: begin there, or correct coin_listed",
            permanent=True,
        )


def _days(start: date, end: date) -> Iterator[date]:
    return (start + n * DAY for n in range((end - start) // DAY))


def _runs(days: Sequence[date], at_most: int | None) -> Iterator[tuple[date, date]]:
    """(first, last) of each run of neighbouring days, in pieces of ``at_most``."""
    rest = iter(days)
    run = list(islice(rest, 1))
    for day in rest:
        if day != run[-1] + DAY or (at_most is not None and len(run) >= at_most):
            yield run[0], run[-1]
            run = []
        run.append(day)
    if run:
        yield run[0], run[-1]


def _midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)
