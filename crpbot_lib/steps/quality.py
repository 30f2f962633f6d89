"""Judging what the lake holds: how much of it is there, whether it can be true, and what its gaps are. Fetches nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime
from typing import Any

import polars as pl

from crpbot_lib.config import TIMEFRAMES, Settings, Symbol, Timeframe
from crpbot_lib.features.history import first_daily_day
from crpbot_lib.lake import KeyMissingError, Lake, UnreadableError, keys
from crpbot_lib.market_data import QualityError
from crpbot_lib.market_data.frames import CANDLE_SCHEMA, SERIES_WIDTH, width
from crpbot_lib.market_data.gaps import MINUTE_COLUMNS, WIDER_COLUMNS, classify, holes
from crpbot_lib.market_data.progress import Progress
from crpbot_lib.market_data.quality import Coverage, Finding, check_candles, check_points, compare, suspicious
from crpbot_lib.market_data.quality import coverage as cover
from crpbot_lib.steps.days import DAY, check_interval, days_of, midnight
from crpbot_lib.steps.partitions import IN_PARALLEL, Summary, stored_frame

log = logging.getLogger(__name__)

FINDINGS_KEPT = 100
"""Suspicious stretches of one frame that the day's record lists; all are counted."""


def coverage(settings: Settings, lake: Lake, symbol: str, timeframe: str, start: date, end: date) -> Summary:
    """What the lake has of the UTC days ``[start, end)``: per day ``state`` (absent, empty, partial, complete), ``rows``,
    ``expected``, ``missing`` and ``gaps``, and the totals. An absent partition counts as all rows missing."""
    settings.symbol(symbol)
    step = width(timeframe)
    check_interval(start, end)
    stored = set(lake.keys(keys.partitions(keys.candles(timeframe, symbol, start))))

    def of(day: date) -> Summary:
        key = keys.candles(timeframe, symbol, day)
        if key in stored:
            found = cover(lake.read_frame(key), step, midnight(day), midnight(day + DAY))
            state = "empty" if found.rows == 0 else "partial" if found.missing else "complete"
        else:
            found, state = Coverage(expected=DAY // step, rows=0, gaps=()), "absent"
        return {"day": day.isoformat(), "state": state, **_counts(found)}

    with ThreadPoolExecutor(IN_PARALLEL) as pool:
        days = list(pool.map(of, days_of(start, end)))
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


def report(settings: Settings, lake: Lake, symbol: str, start: date, end: date) -> Summary:
    """Judges the stored candles of the UTC days ``[start, end)``, each day as ``check_quality`` does; a log line a timeframe.

    Returns per timeframe ``complete, partial, empty, absent`` (days), ``rows, missing`` (candles), ``frozen, spikes`` (stretches);
    of the wider ones also ``differing``, the candles that disagree with the 1m, and ``columns``, per column the largest relative
    difference and where it is. QualityError lists the partitions that cannot be read or cannot be true; absent ones do not fail.
    """
    settings.symbol(symbol)
    check_interval(start, end)
    stored = {key for timeframe in TIMEFRAMES for key in lake.keys(keys.partitions(keys.candles(timeframe, symbol, start)))}
    days = list(days_of(start, end))
    progress = Progress(log, f"{symbol} {start} to {end}", len(days), "days judged")
    problems: list[str] = []
    totals: dict[Timeframe, Summary] = {
        timeframe: dict.fromkeys(("complete", "partial", "empty", "absent", "rows", "missing", "frozen", "spikes"), 0)
        for timeframe in TIMEFRAMES
    }
    for timeframe in TIMEFRAMES[1:]:
        totals[timeframe] |= {"differing": 0, "columns": {}}

    def judge(day: date) -> Summary:
        return _judge_candles(lake, symbol, day, [tf for tf in TIMEFRAMES if keys.candles(tf, symbol, day) in stored], problems)

    with ThreadPoolExecutor(IN_PARALLEL) as pool:
        for count, (day, judged) in enumerate(zip(days, pool.map(judge, days), strict=True), 1):
            for timeframe, total in totals.items():
                if timeframe in judged:
                    _add(total, judged[timeframe])
                elif keys.candles(timeframe, symbol, day) not in stored:
                    total["absent"] += 1
                    total["missing"] += DAY // width(timeframe)
            progress.done(count)
    for timeframe, total in totals.items():
        states = ", ".join(f"{total[state]} days {state}" for state in ("complete", "partial", "empty", "absent") if total[state])
        log.info(
            "%s %s %s to %s: %s; %d rows, %d missing; %d frozen stretches, %d spikes%s",
            *(symbol, timeframe, start, end, states, total["rows"], total["missing"], total["frozen"], total["spikes"]),
            "" if timeframe == "1m" else f"; {total['differing']} disagree with the 1m{_largest({timeframe: total})}",
        )
    _raise(problems, f"{symbol} {start} to {end}", "crpbot fetch heal fetches them again")
    return {"symbol": symbol, "start": start.isoformat(), "end": end.isoformat(), "timeframes": totals}


def _add(total: Summary, day: Summary) -> None:
    """Adds what ``_judge_candles`` says of one day and timeframe."""
    total["empty" if day["rows"] == 0 else "partial" if day["missing"] else "complete"] += 1
    total["rows"] += day["rows"]
    total["missing"] += day["missing"]
    total["frozen"] += day["suspicious"]["frozen"]
    total["spikes"] += day["suspicious"]["spike"]
    if against := day.get("against_1m"):
        total["differing"] += _disagreeing(against)
        for column, off in against["columns"].items():
            if off["largest"] > total["columns"].get(column, {"largest": 0})["largest"]:
                total["columns"][column] = {name: off[name] for name in ("largest", "at", "absolute")}


def gaps(settings: Settings, lake: Lake, symbols: Sequence[str], start: date, end: date) -> Summary:
    """Writes the record of what ``tell_gaps`` says of the UTC days ``[start, end)`` to ``keys.gaps(start, end)``. It is of all
    configured symbols whoever asks; ``symbols`` are those that are logged and returned.

    Returns ``key`` and per symbol ``outages, outage_minutes, longest`` (``start, minutes`` or None), ``no_trade, no_trade_minutes``
    and ``not_fetched`` (days). ValueError for an unknown symbol, an interval without a day, or one of which the lake has nothing.
    """
    check_interval(start, end)
    known = [settings.symbol(symbol).name for symbol in symbols]
    began = time.monotonic()
    record, not_fetched = tell_gaps(settings, lake, start, end)
    if all(not_fetched[symbol] == (end - start) // DAY for symbol in known):
        raise ValueError(
            f"the lake has no 1m candles of {', '.join(known)} from {start} to {end - DAY}: fetch them first "
            f"(crpbot fetch all --start {start} --end {end})"
        )
    key = keys.gaps(start, end)
    lake.write_frame(key, record)
    summary = {symbol: {**_gaps_of(record, symbol), "not_fetched": not_fetched[symbol]} for symbol in known}
    for symbol, told in summary.items():
        longest = f", the longest {told['longest']['minutes']} min from {told['longest']['start']}" if told["longest"] else ""
        log.log(
            logging.WARNING if told["not_fetched"] else logging.INFO,
            "%s %s to %s: %d outages, %d minutes%s; %d gaps without a trade, %d minutes; %d days not fetched",
            *(symbol, start, end, told["outages"], told["outage_minutes"], longest),
            *(told["no_trade"], told["no_trade_minutes"], told["not_fetched"]),
        )
    log.info("gaps of %d symbols in %.1f s: %s", len(known), time.monotonic() - began, lake.url(key))
    return {"key": key, "start": start.isoformat(), "end": end.isoformat(), "symbols": summary}


def tell_gaps(settings: Settings, lake: Lake, start: date, end: date) -> tuple[pl.DataFrame, dict[str, int]]:
    """(GAP_SCHEMA, days not fetched per symbol): the minutes of the UTC days ``[start, end)`` that have no 1m candle, as *no trade*
    or *outage*, of all configured symbols at once.

    One day of one symbol cannot be told alone: a day's edges depend on its neighbours, an outage on the other symbols. So the
    days beside the interval are read as well, where they are stored; a gap over the interval's end is told whole. Days that are
    not stored are no gap: nothing is known of them. One symbol at a time is in memory.
    """
    found: dict[str, pl.DataFrame] = {}
    not_fetched: dict[str, int] = {}
    progress = Progress(log, f"gaps of {start} to {end}", len(settings.symbols), "symbols")
    for symbol in (entry.name for entry in settings.symbols):
        days, minutes = _columns(lake, symbol, "1m", start, end, MINUTE_COLUMNS)
        wider: dict[str, pl.DataFrame] = {
            tf: _columns(lake, symbol, tf, start, end, WIDER_COLUMNS)[1] for tf in TIMEFRAMES if tf != "1m"
        }
        not_fetched[symbol] = (end - start) // DAY - sum(start <= day < end for day in days)
        found[symbol] = holes(minutes, wider, midnight(start), midnight(end), fetched=days)
        progress.done(len(found))
    return classify(found), not_fetched


def read_gaps(lake: Lake, start: date, end: date) -> list[Summary]:
    """The rows of the record ``keys.gaps(start, end)``: ``symbol, start, minutes, kind, evidence``."""
    rows = lake.read_frame(keys.gaps(start, end)).iter_rows(named=True)
    return [{**row, "start": _iso(row["start"])} for row in rows]


def check_quality(settings: Settings, lake: Lake, symbols: list[str], day: date) -> Summary:
    """Judges one day's partitions of ``symbols`` and writes the record to ``keys.quality(day)``, also when it does not pass.

    Each symbol needs the candles of all timeframes and both CoinGecko partitions, each possible in itself, and at least one 1m
    candle; otherwise QualityError lists every problem. Absent minutes, gaps, stretches that look frozen and spikes, a daily
    history that ends early, and differences between the fetched timeframes and the resampled 1m are counted and logged, and
    do not fail.

    Returns ``key`` and per symbol ``rows``, ``missing`` and ``gaps`` of its 1m candles, ``differing``, the higher-timeframe candles
    that disagree with them, and ``frozen`` and ``spikes``, the suspicious stretches of the 1m candles.
    """
    problems: list[str] = []
    report: dict[str, Summary] = {}
    for name in symbols:
        entry = settings.symbol(name)
        report[name] = {
            "candles": _judge_candles(lake, name, day, TIMEFRAMES, problems),
            "coingecko": _judge_points(settings, lake, entry, day, problems),
        }
        if report[name]["candles"].get("1m", {}).get("rows") == 0:
            problems.append(f"{lake.url(keys.candles('1m', name, day))}: the exchange served not one candle of the day")
    key = keys.quality(day)
    lake.write_json(key, {"day": day.isoformat(), "passed": not problems, "problems": problems, "symbols": report})
    _raise(problems, f"{day}", f"fetch them again; the record is {lake.url(key)}")

    per_symbol: dict[str, Summary] = {}
    for name, judged in report.items():
        minutes = judged["candles"]["1m"]
        differing = {tf: judged["candles"][tf]["against_1m"] for tf in TIMEFRAMES if tf != "1m"}
        told = per_symbol[name] = {
            "rows": minutes["rows"],
            "missing": minutes["missing"],
            "gaps": len(minutes["gaps"]),
            "differing": sum(_disagreeing(against) for against in differing.values()),
            "frozen": minutes["suspicious"]["frozen"],
            "spikes": minutes["suspicious"]["spike"],
        }
        log.info(
            "%s %s: %d minutes, %d absent in %d gaps; %d candles of %s disagree with the 1m%s",
            *(name, day, told["rows"], told["missing"], told["gaps"], told["differing"], ", ".join(differing), _largest(differing)),
        )
        if told["frozen"] or told["spikes"]:
            shown = "; ".join(f"{f['start']} {f['detail']}" for f in minutes["suspicious"]["findings"][:3])
            log.warning("%s %s: %d frozen stretches, %d spikes: %s", name, day, told["frozen"], told["spikes"], shown)
    return {"day": day.isoformat(), "key": key, "symbols": per_symbol}


def _columns(
    lake: Lake, symbol: str, timeframe: str, start: date, end: date, columns: Sequence[str]
) -> tuple[list[date], pl.DataFrame]:
    """(days, rows) of the partitions of ``[start, end)`` and of the day on either side of it that are stored and can be read."""
    stored = set(lake.keys(keys.partitions(keys.candles(timeframe, symbol, start))))
    days = [day for day in days_of(start - DAY, end + DAY) if keys.candles(timeframe, symbol, day) in stored]

    def read(day: date) -> pl.DataFrame | None:
        frame = stored_frame(lake, key := keys.candles(timeframe, symbol, day))
        if frame is None:
            log.warning("%s cannot be read and counts as not fetched; `crpbot fetch heal` fetches it again", lake.url(key))
        return frame if frame is None else frame.select(columns)

    with ThreadPoolExecutor(IN_PARALLEL) as pool:
        frames = dict(zip(days, pool.map(read, days), strict=True))
    read_days = [day for day, frame in frames.items() if frame is not None]
    nothing = pl.DataFrame(schema={name: CANDLE_SCHEMA[name] for name in columns})
    return read_days, pl.concat([nothing, *(frame for frame in frames.values() if frame is not None)])


def _gaps_of(record: pl.DataFrame, symbol: str) -> Summary:
    of = record.filter(pl.col("symbol") == symbol)
    outages, silent = of.filter(pl.col("kind") == "outage"), of.filter(pl.col("kind") == "no_trade")
    longest = outages.sort("minutes", "start", descending=[True, False]).head(1).to_dicts()
    return {
        "outages": outages.height,
        "outage_minutes": int(outages["minutes"].sum()),
        "longest": {"start": _iso(longest[0]["start"]), "minutes": longest[0]["minutes"]} if longest else None,
        "no_trade": silent.height,
        "no_trade_minutes": int(silent["minutes"].sum()),
    }


def _judge_candles(lake: Lake, symbol: str, day: date, timeframes: Sequence[str], problems: list[str]) -> Summary:
    """What one day's partitions of ``timeframes`` hold; those that are absent or cannot be true are told in ``problems``."""
    judged: Summary = {}
    minutes: pl.DataFrame | None = None
    start, end = midnight(day), midnight(day + DAY)
    for timeframe in timeframes:
        key = keys.candles(timeframe, symbol, day)
        frame = _read(lake, key, problems, lambda f, k=key, tf=timeframe: check_candles(f, tf, start, end, lake.url(k)))  # type: ignore[misc]
        if frame is None:
            continue
        found = suspicious(frame, timeframe)
        judged[timeframe] = {**_counts(cover(frame, width(timeframe), start, end)), "suspicious": _suspicious(found)}
        if timeframe == "1m":
            minutes = frame
        elif minutes is not None:
            judged[timeframe]["against_1m"] = compare(minutes, frame, timeframe)
    return judged


def _judge_points(settings: Settings, lake: Lake, entry: Symbol, day: date, problems: list[str]) -> Summary:
    judged: Summary = {}
    begins = {"hourly": (day, day), "daily": (entry.coin_listed, first_daily_day(settings, entry, day))}
    for series, (earliest, first) in begins.items():
        key = keys.coingecko(series, entry.coin, day)
        frame = _read(lake, key, problems, lambda f, k=key, s=series: check_points(f, s, lake.url(k)))  # type: ignore[misc]
        if frame is None:
            continue
        outside = frame.filter(~pl.col("timestamp").is_between(midnight(earliest), midnight(day + DAY), closed="left")).height
        if outside:
            problems.append(f"{lake.url(key)}: {outside} of {frame.height} rows lie outside {earliest} to {day}")
            continue
        found = cover(frame, SERIES_WIDTH[series], midnight(first), midnight(day + DAY))
        judged[series] = _counts(found)
        if series == "daily":
            if frame.is_empty():
                problems.append(f"{lake.url(key)}: the daily history is empty")
                continue
            newest: datetime = frame["timestamp"][-1]
            judged[series]["days_behind"] = (midnight(day) - newest) // DAY
            if judged[series]["days_behind"]:
                log.warning(
                    "%s %s: the daily history ends on %s, %d days before",
                    entry.coin,
                    day,
                    newest.date(),
                    judged[series]["days_behind"],
                )
    return judged


def _suspicious(found: Sequence[Finding]) -> Summary:
    kinds = [finding.kind for finding in found]
    listed = [{"kind": f.kind, "start": _iso(f.start), "rows": f.rows, "value": f.value, "detail": f.detail} for f in found]
    return {"frozen": kinds.count("frozen"), "spike": kinds.count("spike"), "findings": listed[:FINDINGS_KEPT]}


def _read(lake: Lake, key: str, problems: list[str], check: Callable[[pl.DataFrame], None]) -> pl.DataFrame | None:
    try:
        frame = lake.read_frame(key)
        check(frame)
    except (KeyMissingError, UnreadableError, QualityError) as error:
        problems.append(str(error))
        return None
    return frame


def _raise(problems: Sequence[str], what: str, remedy: str) -> None:
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise QualityError(f"{what}: {len(problems)} partitions are absent or broken: {shown}. What to do: {remedy}")


def _disagreeing(against: Summary) -> int:
    """Wider candles that are not what the 1m candles add up to, those that one of the two lacks included."""
    return int(against["differing"] + against["only_fetched"] + against["only_resampled"])


def _largest(comparisons: Mapping[Any, Summary]) -> str:
    """`` (largest: 15m volume by 2.1 %)`` of all differences, or nothing."""
    found = [(c["largest"], f"{tf} {name}") for tf, d in comparisons.items() for name, c in d["columns"].items()]
    if not found:
        return ""
    size, where = max(found)
    return f" (largest: {where} by {100 * size:.3g} %)"


def _counts(found: Coverage) -> Summary:
    gaps = [{"start": _iso(gap.start), "minutes": gap.minutes} for gap in found.gaps]
    return {"rows": found.rows, "expected": found.expected, "missing": found.missing, "gaps": gaps}


def _iso(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
