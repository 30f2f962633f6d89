"""Fetching market data into the lake, by day or years at once.

Every partition is written whole and holds what was served, nothing filled. A partition without rows says "fetched, and there was
nothing", which is not the same as a missing one. The wall clock is asked for one thing only: whether a day is over.

However many days a call spans, what it holds at once is ``ROWS_AT_ONCE`` rows being fetched and as many being written; whenever
it is killed, each partition is there whole or not at all, and the next call goes on where it stopped.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from functools import partial
from math import ceil
from typing import Any, Literal

import polars as pl

from crpbot_lib.config import TIMEFRAMES, Settings, Symbol
from crpbot_lib.features import catalog
from crpbot_lib.lake import KeyMissingError, Lake, UnreadableError, keys
from crpbot_lib.market_data import Clock, MarketData, MarketDataError, QualityError, utc_now
from crpbot_lib.market_data.frames import EPOCH, SERIES_WIDTH, width
from crpbot_lib.market_data.plans import PLANS
from crpbot_lib.market_data.progress import LogMeter, Meter
from crpbot_lib.market_data.quality import check_candles, check_points
from crpbot_lib.market_data.quality import coverage as cover
from crpbot_lib.steps.days import DAY, closed_days, first_daily_day, midnight

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 36_000
"""Rows fetched before they are written, in whole days: 25 days of 1m candles, and whole pages of 300 at every timeframe."""

IN_PARALLEL = 8
"""Partitions read or written at once; each waits for the lake, not for the processor."""

HOURLY_DAYS_A_REQUEST = 85
"""For estimates: hourly points come in ranges of less than 90 days."""

Summary = dict[str, Any]
Refetch = Literal["absent", "incomplete", "all"]
REFETCH: tuple[Refetch, ...] = ("absent", "incomplete", "all")
Outcome = Literal["fetched", "filled", "unchanged", "changed", "kept"]


@dataclass(frozen=True)
class _Series:
    """Partitions of one kind: candles of one symbol and timeframe, or points of one coin and series."""

    of: str
    """Product or coin, as its source calls it."""
    what: str
    symbol: str
    timeframe: str
    source: Literal["Coinbase", "CoinGecko"]
    step: timedelta
    first: date | None
    """The source has nothing before this day."""
    key: Callable[[date], str]
    begins: Callable[[date], date]
    """The first day of which a day's partition has rows; all end with their own day."""
    fetch: Callable[[datetime, datetime], pl.DataFrame]
    days_a_request: float

    @property
    def grows(self) -> bool:
        """Whether each partition holds those before it, so that one fetch makes them all."""
        return self.timeframe == "daily"

    def chunks(self, days: Sequence[date]) -> Iterator[list[date]]:
        """``days`` in pieces of at most ``ROWS_AT_ONCE`` rows, each of neighbouring days."""
        if self.grows:
            yield from [list(days)] if days else []
            return
        most = max(1, int(ROWS_AT_ONCE * self.step / DAY))
        chunk: list[date] = []
        for day in days:
            if chunk and (day != chunk[-1] + DAY or len(chunk) == most):
                yield chunk
                chunk = []
            chunk.append(day)
        if chunk:
            yield chunk

    def requests(self, days: Sequence[date]) -> int:
        """About how many requests ``days`` take."""
        return sum(max(1, ceil(len(chunk) / self.days_a_request)) for chunk in self.chunks(days))


@dataclass(frozen=True)
class _Stored:
    """What became of one partition."""

    series: _Series
    day: date
    rows: int
    expected: int
    gaps: int
    outcome: Outcome
    added: int = 0
    """Rows that were not stored before; ``changed``: stored ones with another value now; ``lost``: stored ones that the new
    answer lacks, or has as unknown."""
    changed: int = 0
    lost: int = 0

    @property
    def missing(self) -> int:
        return self.expected - self.rows

    def summary(self) -> Summary:
        counts = {"rows": self.rows, "expected": self.expected, "missing": self.missing, "gaps": self.gaps}
        return {"key": self.series.key(self.day), **counts}

    def healed(self) -> Summary:
        where = {"symbol": self.series.symbol, "timeframe": self.series.timeframe, "day": self.day.isoformat()}
        counts = {"rows": self.rows, "missing": self.missing, "added": self.added, "changed": self.changed, "lost": self.lost}
        return {**where, "outcome": self.outcome, **counts}


@dataclass
class _Work:
    """The days to fetch of one series, and what was found of the others."""

    series: _Series
    days: list[date]
    present: int = 0
    missing_present: int = 0

    @property
    def requests(self) -> int:
        return self.series.requests(self.days)


@dataclass
class _Totals:
    """Sums over many partitions."""

    fetched: int = 0
    rows: int = 0
    missing: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    _history: tuple[int, int] = (0, 0)

    def add(self, stored: _Stored) -> None:
        counted = (stored.rows, stored.missing)
        # of a history that grows only the longest counts: the others are parts of it
        before = self._history if stored.series.grows else (0, 0)
        self.fetched += 1
        self.rows += counted[0] - before[0]
        self.missing += counted[1] - before[1]
        self.outcomes[stored.outcome] += 1
        if stored.series.grows:
            self._history = counted


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
    """Fetches one UTC day of candles and writes its partition. One that is there already is kept where the exchange now serves less.

    Returns ``key, rows, expected, missing, gaps`` of what is stored then. MarketDataError when the day is not over yet (it is, 5 minutes after its end) or
    lies before ``exchange_listed``, or the exchange fails; then nothing is written. ValueError for an unknown symbol or timeframe.
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
    """As ``fetch_candles`` for each UTC day of ``[start, end)``, in few requests; ``partitions`` has one summary a day. ``replace``: what
    is served now is stored, even if it is less than before."""
    entry = settings.symbol(symbol)
    series = _candles(settings, market or MarketData(settings, now=now), entry, timeframe)
    partitions = _fetch(lake, [_Work(series, _days(series, start, end, now))], progress, replace)
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

    The history begins with the coin's listing, or where the plan does not reach that far, ``training.days`` and the catalog's
    warm-up before the day. Returns ``coin, hourly, daily``, each with ``key, rows, expected, missing, gaps``. MarketDataError when
    the day is not over yet or lies before the listing, when CoinGecko fails, or has no daily history at all.
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
    both = _points(settings, market or MarketData(settings, now=now), entry)
    stored = _fetch(lake, [_Work(series, _days(series, start, end, now)) for series in both], progress, replace)
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
    stored is never lost by that: where the source now serves less than is stored, the partition is kept, and counted.

    Returns ``present`` (partitions left alone), ``fetched, rows, missing`` (of the fetched) and ``outcomes``, the number of fetched
    partitions that were absent (``fetched``), gained rows (``filled``), hold other values (``changed``), the same
    (``unchanged``), or were ``kept``. MarketDataError and ValueError as ``fetch_candles``, before anything is written; so is what
    a source answers to the first request, such as a wrong key.
    """
    began = time.monotonic()
    series = _all(settings, market or MarketData(settings, now=now), settings.symbol(symbol), timeframes, coingecko)
    work = _survey(lake, [(one, _days(one, start, end, now)) for one in series], refetch)
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
    work = [
        one
        for symbol in symbols
        for one in _survey(
            lake,
            [
                (series, _days(series, start, end, now))
                for series in _all(settings, market, settings.symbol(symbol), timeframes, coingecko)
            ],
            refetch,
        )
    ]
    return _estimate(settings, work)


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
    series = _all(settings, market or MarketData(settings, now=now), entry, TIMEFRAMES, coingecko=True)
    work = _survey(lake, [(one, _days(one, first[one.timeframe], end, now)) for one in series], "absent", count=True)
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
    """Fetches the candles of incomplete UTC days of ``[start, end)`` again: days that are absent, and those that lack a candle
    which no gap record (``keys.gaps``) calls *no trade*; with ``every``, any candle.

    Nothing is lost by it: where the exchange now serves less than is stored, the partition is kept and that is reported.

    Returns ``looked_at`` and ``outcomes`` (partitions), ``added, changed, missing`` (candles, of those fetched) and ``days``: of
    each partition that was fetched ``symbol, timeframe, day, outcome, rows, missing, added, changed, lost``. Errors as ``load``.
    """
    began = time.monotonic()
    work = _to_heal(settings, market or MarketData(settings, now=now), lake, symbols, start, end, every, now)
    days = [stored.healed() for stored in _stream(lake, work, _started(progress, "heal", work))]
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


def _candles(settings: Settings, market: MarketData, entry: Symbol, timeframe: str) -> _Series:
    step = width(timeframe)
    return _Series(
        of=entry.name,
        what=f"{entry.name} {timeframe}",
        symbol=entry.name,
        timeframe=timeframe,
        source="Coinbase",
        step=step,
        first=entry.exchange_listed,
        key=partial(keys.candles, timeframe, entry.name),
        begins=lambda day: day,
        fetch=partial(market.candles, entry.name, timeframe),
        days_a_request=settings.coinbase_page_size * step / DAY,
    )


def _points(settings: Settings, market: MarketData, entry: Symbol) -> list[_Series]:
    """The coin's daily history and its hourly points."""
    plan = market.coingecko.plan
    if plan.history is not None and not entry.all_time_highs:
        log.warning(
            "CoinGecko's %s plan reaches back %d days, not to the listing of %s on %s: its features cannot be built without dated "
            "records in `all_time_highs` of %s",
            *(plan.name, plan.history.days, entry.coin, entry.coin_listed, entry.name),
        )
    common = {"of": entry.coin, "symbol": entry.name, "source": "CoinGecko", "first": entry.coin_listed}
    return [
        _Series(
            what=f"{entry.coin} daily history",
            timeframe="daily",
            step=SERIES_WIDTH["daily"],
            key=partial(keys.coingecko, "daily", entry.coin),
            begins=lambda day: first_daily_day(settings, entry, day),
            fetch=partial(market.daily, entry.coin),
            days_a_request=float("inf"),
            **common,  # type: ignore[arg-type]
        ),
        _Series(
            what=f"{entry.coin} hourly",
            timeframe="hourly",
            step=SERIES_WIDTH["hourly"],
            key=partial(keys.coingecko, "hourly", entry.coin),
            begins=lambda day: day,
            fetch=partial(market.hourly, entry.coin),
            days_a_request=HOURLY_DAYS_A_REQUEST,
            **common,  # type: ignore[arg-type]
        ),
    ]


def _all(settings: Settings, market: MarketData, entry: Symbol, timeframes: Sequence[str], coingecko: bool) -> list[_Series]:
    points = _points(settings, market, entry) if coingecko else []
    return points + [_candles(settings, market, entry, timeframe) for timeframe in timeframes]


def _days(series: _Series, start: date, end: date, now: Clock) -> list[date]:
    """The days of ``[start, end)``, once they are over; MarketDataError where the source has nothing so early."""
    days = closed_days(start, end, now)
    if series.first and start < series.first:
        name, setting = (
            (series.symbol, "exchange_listed") if series.source == "Coinbase" else (series.what.split()[0], "coin_listed")
        )
        raise MarketDataError(
            f"{start} lies before the listing of {name} on {series.first}: begin there, or correct {setting} in `symbols`",
            permanent=True,
        )
    return days


def _survey(lake: Lake, spans: Sequence[tuple[_Series, list[date]]], refetch: Refetch, *, count: bool = False) -> list[_Work]:
    """Which of the days are to be fetched. ``count``: the rows that present partitions lack are counted."""
    if refetch not in REFETCH:
        raise ValueError(f"refetch={refetch!r}: expected one of {', '.join(REFETCH)}")
    work = []
    for series, days in spans:
        if refetch == "all":
            work.append(_Work(series, days))
            continue
        stored = set(lake.keys(keys.partitions(series.key(days[0]))))
        there = [day for day in days if series.key(day) in stored]
        lacking = set(days) - set(there)
        missing = 0
        if count or refetch == "incomplete":
            for day, lacks in zip(there, _lacks(lake, series, there), strict=True):
                if refetch == "incomplete" and lacks:
                    lacking.add(day)
                else:
                    missing += lacks
        work.append(_Work(series, sorted(lacking), len(days) - len(lacking), missing))
    return work


def _lacks(lake: Lake, series: _Series, days: Sequence[date]) -> Iterator[int]:
    """How many rows each day's partition lacks; all of them where it cannot be read."""

    def lacks(day: date) -> int:
        begin, end = midnight(series.begins(day)), midnight(day + DAY)
        frame = _stored(lake, series.key(day))
        return (end - begin) // series.step if frame is None else cover(frame, series.step, begin, end).missing

    with ThreadPoolExecutor(IN_PARALLEL) as pool:
        yield from pool.map(lacks, days)


def _to_heal(
    settings: Settings,
    market: MarketData,
    lake: Lake,
    symbols: Sequence[str],
    start: date,
    end: date,
    every: bool,
    now: Clock,
) -> list[_Work]:
    """The incomplete days of each symbol and timeframe."""
    spans = [
        (series, _days(series, start, end, now))
        for symbol in symbols
        for series in _all(settings, market, settings.symbol(symbol), TIMEFRAMES, coingecko=False)
    ]
    if every:
        return _survey(lake, spans, "incomplete")
    silent = _silent(lake, start, end)
    work = []
    for series, days in spans:
        stored = set(lake.keys(keys.partitions(series.key(days[0]))))

        def incomplete(day: date, series: _Series = series, stored: set[str] = stored) -> bool:
            frame = _stored(lake, series.key(day)) if series.key(day) in stored else None
            if frame is None:
                return True
            gaps = cover(frame, series.step, midnight(day), midnight(day + DAY)).gaps
            explained = silent[series.symbol]
            return any(not _within(gap.start, gap.start + timedelta(minutes=gap.minutes), explained) for gap in gaps)

        with ThreadPoolExecutor(IN_PARALLEL) as pool:
            lacking = [day for day, wanted in zip(days, pool.map(incomplete, days), strict=True) if wanted]
        work.append(_Work(series, lacking, len(days) - len(lacking)))
    return work


Spans = list[tuple[datetime, datetime]]


def _silent(lake: Lake, start: date, end: date) -> defaultdict[str, Spans]:
    """Per symbol the stretches of time without a trade, by the gap records: what one of them calls so and none an outage."""
    found: defaultdict[str, set[tuple[datetime, datetime]]] = defaultdict(set)
    outages: defaultdict[str, Spans] = defaultdict(list)
    for key in lake.keys(keys.GAPS):
        record = lake.read_frame(key)
        record = record.with_columns(end=pl.col("start") + pl.duration(minutes=pl.col("minutes")))
        record = record.filter((pl.col("start") < midnight(end)) & (pl.col("end") > midnight(start)))
        for symbol, kind, first, last in record.select("symbol", "kind", "start", "end").iter_rows():
            if kind == "no_trade":
                found[symbol].add((first, last))
            else:
                outages[symbol].append((first, last))
    silent: defaultdict[str, Spans] = defaultdict(list)
    for symbol, spans in found.items():
        bad = outages[symbol]
        silent[symbol] = sorted(s for s in spans if not any(a < s[1] and s[0] < b for a, b in bad))
    return silent


def _within(start: datetime, end: datetime, spans: Spans) -> bool:
    """Whether ``[start, end)`` is covered by ``spans``, sorted."""
    for first, last in spans:
        if first <= start < last:
            start = last
        if start >= end:
            return True
    return False


def _estimate(settings: Settings, work: Sequence[_Work]) -> Summary:
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


def _started(progress: Meter | None, what: str, work: Sequence[_Work]) -> Meter:
    meter = progress or LogMeter(log)
    meter.start(what, sum(len(w.days) for w in work), sum(w.requests for w in work))
    return meter


def _fetch(lake: Lake, work: Sequence[_Work], progress: Meter | None, replace: bool) -> list[_Stored]:
    return list(_stream(lake, work, _started(progress, work[0].series.symbol, work), replace=replace))


def _run(lake: Lake, symbol: str, work: Sequence[_Work], progress: Meter | None) -> _Totals:
    totals = _Totals()
    for stored in _stream(lake, work, _started(progress, symbol, work)):
        totals.add(stored)
    return totals


@dataclass
class _Chunk:
    series: _Series
    days: list[date]
    frame: pl.DataFrame
    seconds: float
    """That the fetch took."""
    writes: list[Future[_Stored]] = field(default_factory=list)


def _stream(lake: Lake, work: Sequence[_Work], meter: Meter, *, replace: bool = False) -> Iterator[_Stored]:
    """Fetches ``work``, and writes one piece of it while the next one is fetched. What is stored is not lost by it, unless it is
    to ``replace`` that."""
    # nothing is written before each source has answered once: a wrong key or an unknown product leaves nothing behind
    silent = {w.series.source for w in work if w.days}
    held: list[_Chunk] = []
    writing: list[_Chunk] = []
    with ThreadPoolExecutor(IN_PARALLEL) as pool:
        for one in work:
            series = one.series
            for days in series.chunks(one.days):
                began = time.monotonic()
                frame = series.fetch(midnight(series.begins(days[0])), midnight(days[-1] + DAY))
                if series.grows and frame.is_empty():
                    raise MarketDataError(
                        f"CoinGecko has no {series.what} from {series.begins(days[0])} to {days[-1]}: check the coin's id and "
                        "coin_listed in `symbols`, and the plan of CRPBOT_COINGECKO_API_KEY",
                        permanent=True,
                    )
                silent.discard(series.source)
                held.append(_Chunk(series, days, frame, time.monotonic() - began))
                meter.advance(0, series.requests(days), f"{series.what} {days[-1]}")
                if silent:
                    continue
                yield from _written(writing, meter)
                for chunk in held:
                    chunk.writes = [
                        pool.submit(_store, lake, chunk.series, chunk.frame, day, keep=not replace) for day in chunk.days
                    ]
                held, writing = [], held
        yield from _written(writing, meter)


def _written(chunks: Sequence[_Chunk], meter: Meter) -> Iterator[_Stored]:
    """What became of the chunks' partitions, once they are written."""
    for chunk in chunks:
        done: list[_Stored] = []
        for write in chunk.writes:
            done.append(stored := write.result())
            if stored.outcome == "kept":
                log.warning(
                    "%s %s: kept as it is stored: the answer lacks %d of its rows",
                    *(chunk.series.what, stored.day, stored.lost),
                )
            meter.advance(1, 0, f"{chunk.series.what} {stored.day}")
        _report(chunk, done)
        yield from done


def _store(lake: Lake, series: _Series, frame: pl.DataFrame, day: date, *, keep: bool) -> _Stored:
    """Writes the day's part of ``frame``; ``keep``: unless that would lose rows, or is what is stored already."""
    begin, end = midnight(series.begins(day)), midnight(day + DAY)
    # rechunk: a day cut out of a longer fetch must give the same bytes as the day fetched alone
    part = frame.filter(pl.col("timestamp").is_between(begin, end, closed="left")).rechunk()
    old = _stored(lake, series.key(day)) if keep else None
    outcome: Outcome = "fetched"
    added = changed = lost = 0
    if old is not None and _sound(series, old, begin, end):
        added, changed, lost = _difference(old, part)
        outcome = "kept" if lost else "filled" if added else "changed" if changed else "unchanged"
    if outcome == "kept" and old is not None:
        part = old
    elif outcome != "unchanged":
        lake.write_frame(series.key(day), part)
    found = cover(part, series.step, begin, end)
    return _Stored(series, day, found.rows, found.expected, len(found.gaps), outcome, added, changed, lost)


def _stored(lake: Lake, key: str) -> pl.DataFrame | None:
    """The partition; None where there is none, or none that can be read."""
    try:
        return lake.read_frame(key)
    except (KeyMissingError, UnreadableError):
        return None


def _sound(series: _Series, frame: pl.DataFrame, begin: datetime, end: datetime) -> bool:
    """Whether a stored partition can be true: what cannot be is not worth keeping."""
    try:
        if series.source == "Coinbase":
            check_candles(frame, series.timeframe, begin, end, series.what)
        else:
            check_points(frame, series.timeframe, series.what)
    except QualityError:
        return False
    # a history that began earlier, under a longer plan, is worth more
    return frame.filter((pl.col("timestamp") >= end) | (pl.col("timestamp") < (EPOCH if series.grows else begin))).is_empty()


def _difference(old: pl.DataFrame, new: pl.DataFrame) -> tuple[int, int, int]:
    """Rows of ``new`` that ``old`` has not, rows with another value, rows of ``old`` that are absent or unknown in ``new``."""
    both = old.join(new, on="timestamp", suffix="_new")
    values = [c for c in old.columns if c != "timestamp"]
    unknown = pl.any_horizontal(pl.col(c).is_not_null() & pl.col(f"{c}_new").is_null() for c in values)
    other = pl.any_horizontal(pl.col(c).ne_missing(pl.col(f"{c}_new")) for c in values)
    lost = old.height - both.height + both.filter(unknown).height
    return new.height - both.height, both.filter(other).height, lost


def _report(chunk: _Chunk, written: Sequence[_Stored]) -> None:
    # of a history that grows the last partition says it all
    counted = written[-1:] if chunk.series.grows else written
    rows, missing, gaps = sum(p.rows for p in counted), sum(p.missing for p in counted), sum(p.gaps for p in counted)
    empty = sum(p.rows == 0 for p in written)
    first, last = chunk.days[0], chunk.days[-1]
    days = f"{first}" if first == last else f"{first} to {last}"
    line = f"{chunk.series.what} {days}: {rows} rows, {missing} absent in {gaps} gaps, {chunk.seconds:.1f} s"
    if empty:
        log.warning("%s; %d of %d days were served without a row", line, empty, len(written))
    else:
        log.info("%s", line)


def _shown(outcomes: Counter[str]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(outcomes.items())) or "none"
